r"""
What the shaping costs: an update of A3POTrainer against one of GRPOTrainer, in turns, on the same rollouts.

    python benchmarks/step_overhead.py [--device cpu] [--threads 1] [--repeats 30] [--longest 512]
    python benchmarks/step_overhead.py --device cuda --size 7b --lora --length 4096 --longest 16384 \
        --vocabulary 152064 --rows 8 --micro-batch 1 --repeats 3

An update is the forward and backward passes of one optimizer step, of `--rows` completions in micro-batches of
`--micro-batch`, and for A3PO the sums that are logged, as if every step were. A3POTrainer computes it in GRPO's own
way (`trim_padding` and `skip_zero_advantage` off), so that the shaping alone is measured; `+ savings` is what a user
gets by default. Beside them, what a user would pick instead: the 20 % of tokens with the highest entropy, and TRL's
own GMPO where it has it.

`time` and `memory` are over GRPO's: the median of the ratios, with quartiles, and the ratio of the peaks of what an
update allocates. `syncs` and `collectives` are counted by the profiler in one update. The last line is the time of
A3PO over GRPO's.
"""

import tempfile

import torch
from trl import GRPOConfig, GRPOTrainer
from workload import Update, compare, given_reward, make_rollout, make_trainer, parser, peak_bytes, start

from trl_a3po import A3POConfig, A3POTrainer


# What makes the host wait for the device; on a CPU, what would.
SYNCS = {
    "cuda": {"cudaStreamSynchronize", "cudaEventSynchronize", "cudaDeviceSynchronize"},
    "cpu": {"aten::_local_scalar_dense", "aten::nonzero", "aten::is_nonzero"},
}


class LoggedUpdate(Update):
    """With the sums of the shaping, which are read at a log."""

    def run(self):
        super().run()
        self.trainer._reduce_polarity_sums("train")


def peers():
    """By name: the trainer, its configuration, fields of it, and what runs it."""
    plain = {"trim_padding": False, "skip_zero_advantage": False}
    yield "GRPO", GRPOTrainer, GRPOConfig, {}, Update
    yield "A3PO", A3POTrainer, A3POConfig, {"scale_decay": "constant", **plain}, LoggedUpdate
    yield "A3PO + savings", A3POTrainer, A3POConfig, {"scale_decay": "constant"}, LoggedUpdate
    yield "GRPO, top entropies", GRPOTrainer, GRPOConfig, {"top_entropy_quantile": 0.2}, Update
    try:
        from trl.experimental.gmpo import GMPOConfig, GMPOTrainer
    except ImportError:
        return
    yield "GMPO", GMPOTrainer, GMPOConfig, {"loss_type": "grpo"}, Update


def count_waits(run, device):
    with torch.profiler.profile() as profiler:
        run()
    names = [event.name() for event in profiler.profiler.kineto_results.events()]
    return sum(name in SYNCS[device] for name in names), sum(name.startswith(("c10d::", "nccl:")) for name in names)


def main():
    options = parser(__doc__)
    options.add_argument("--micro-batch", type=int, default=4)
    options.set_defaults(repeats=30)
    args = options.parse_args()
    start(args)
    rollout, _ = make_rollout(0.8, 0.3, args)
    with tempfile.TemporaryDirectory() as directory:
        updates = {
            name: update(
                make_trainer(trainer, config, args, args.micro_batch, directory, given_reward, rollout, **fields)
            )
            for name, trainer, config, fields, update in peers()
        }
        runs = [update.run for update in updates.values()]
        peaks = [peak_bytes(run, args.device) for run in runs]  # warms up, too
        waits = [count_waits(run, args.device) for run in runs]
        medians, ratios = compare(runs, args.device, args.repeats)
    print(f"{'':>20} {'seconds':>9}   {'time':<19} {'memory':>7} {'syncs':>6} {'collectives':>12}")
    for name, median, (low, ratio, high), peak, (syncs, collectives) in zip(
        updates, medians, ratios, peaks, waits, strict=True
    ):
        spread = f"{1 / ratio:.3f} [{1 / high:.3f}, {1 / low:.3f}]"
        print(f"{name:>20} {median:>9.3f}   {spread:<19} {peak / peaks[0]:>7.3f} {syncs:>6} {collectives:>12}")
    print(f"ratio: {1 / ratios[1][1]:.3f}")


if __name__ == "__main__":
    main()
