"""
Time of the shaping against a loop over completions that takes each one's top k, as the authors' released code does.

    python benchmarks/shaping.py [--device cpu] [--threads 1] [--repeats 30]

Both compute A3PO's default (the lowest 20 % of positive and the highest 20 % of negative completions), in turn, on the
same tensors. Beside them one pass over the data, the least that anything can take: every metric read, multiplied and
written. The last line is the ratio at 64 x 8192, all of full length, the median over the pairs.
"""

import argparse
import platform
import statistics
import time

import torch

from trl_a3po import shape_advantages


SHAPES = [
    (8, 1024),
    (64, 1024),
    (512, 1024),
    (8, 8192),
    (64, 8192),
    (512, 8192),
    (8, 32768),
    (64, 32768),
    (512, 32768),
]
RATIO, SCALE = 0.2, 2.0


def ours(advantages, metric, mask):
    return shape_advantages(
        advantages,
        metric,
        mask,
        positive_low_ratio=RATIO,
        positive_low_scale=SCALE,
        negative_high_ratio=RATIO,
        negative_high_scale=SCALE,
    )


def loop(advantages, metric, mask):
    shaped = advantages[:, None] * mask
    for i in range(len(advantages)):
        tokens = mask[i].nonzero()[:, 0]
        count = max(1, int(RATIO * len(tokens)))
        selected = metric[i, tokens].topk(count, largest=bool(advantages[i] < 0)).indices
        shaped[i, tokens[selected]] *= SCALE
    return shaped


def one_pass(advantages, metric, mask):
    return metric * advantages[:, None]


def inputs(rows, width, ragged, device):
    generator = torch.Generator().manual_seed(0)
    advantages = torch.randn(rows, generator=generator)
    metric = -torch.rand(rows, width, generator=generator).argsort(dim=1) / width  # no ties: the loop's are arbitrary
    # Ragged: log-normal lengths around a third of the width, as completions padded to the longest of a batch have.
    lengths = (
        width * (0.5 * torch.randn(rows, generator=generator)).exp() / 3 if ragged else torch.full((rows,), width)
    )
    mask = (torch.arange(width) < lengths[:, None].clamp(1, width)).long()
    return [tensor.to(device) for tensor in (advantages, metric, mask)]


def seconds(function, arguments, device):
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    function(*arguments)
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--threads", type=int, default=1, help="threads of the CPU")
    parser.add_argument("--repeats", type=int, default=30, help="measurements of each, in turns; fewer of the largest")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    name = torch.cuda.get_device_name() if args.device == "cuda" else f"{platform.machine()}, {args.threads} thread(s)"
    print(f"torch {torch.__version__}, {args.device} ({name}); milliseconds are medians, [quartiles] of the ratio")
    print(
        f"{'completions':>12} {'tokens':>7} {'lengths':>8} {'loop':>9} {'ours':>9} {'one pass':>9}   "
        f"{'loop / ours':<20} ours / one pass"
    )
    for rows, width in SHAPES:
        for ragged in (False, True):
            arguments = inputs(rows, width, ragged, args.device)
            torch.testing.assert_close(ours(*arguments), loop(*arguments))
            repeats = max(3, min(args.repeats, args.repeats * 64 * 8192 // (rows * width)))
            rounds = [
                [1e3 * seconds(each, arguments, args.device) for each in (loop, ours, one_pass)]
                for _ in range(repeats)
            ]
            theirs, mine, floor = (statistics.median(column) for column in zip(*rounds, strict=True))
            low, ratio, high = statistics.quantiles([a / b for a, b, _ in rounds], n=4)
            passes = statistics.median(b / c for _, b, c in rounds)
            lengths = "ragged" if ragged else "full"
            print(
                f"{rows:>12} {width:>7} {lengths:>8} {theirs:>9.2f} {mine:>9.2f} {floor:>9.2f}   "
                f"{f'{ratio:.2f} [{low:.2f}, {high:.2f}]':<20} {passes:.0f}",
                flush=True,
            )
            if (rows, width, ragged) == (64, 8192, False):
                speedup = ratio
    print(f"speedup: {speedup:.2f}")


if __name__ == "__main__":
    main()
