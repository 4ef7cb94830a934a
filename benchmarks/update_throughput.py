r"""
Time of an update: GRPOTrainer against A3POTrainer with `trim_padding` and `skip_zero_advantage`, on the same rollouts.

    python benchmarks/update_throughput.py [--device cpu] [--threads 1] [--repeats 5] [--full | --headline]
    python benchmarks/update_throughput.py --whole-steps [--vllm]
    python benchmarks/update_throughput.py --device cuda --size 1.5b --length 1500 --longest 8192 \
        --vocabulary 151936 --headline --repeats 3

The shaping is neutral, so that both compute the same gradients. Completion lengths are log-normal (mean `--length`), a
share of the groups has no spread of rewards. Each configuration is measured in turns, one optimizer step of both at a
time; the ratio is the median over the pairs, with quartiles. `cells` are the positions that the model computes in the
passes of the loss, over those that count: tokens, of prompts and completions, of completions with an advantage (1.0 is
the limit). `difference` is the largest difference of the gradients, relative to the largest gradient. `memory` is the
ratio of the peaks of what the update allocates.

With `--whole-steps` each step also generates its completions (by transformers, from a model of random weights, which
ends them after `--length` tokens on average), scores them and steps the optimizer: what a user waits for. `--vllm`
generates by colocated vLLM, both trainers by one engine, so that there is room for both. On a CPU that takes the
environment of `make test-vllm`.

The last line is the ratio at sigma 0.8, 30 % of groups without spread and micro-batches of 4; of whole steps, that at
30 % and 4.
"""

import contextlib
import itertools
import sys
import tempfile
from pathlib import Path
from unittest.mock import patch

from transformers.trainer_utils import set_seed
from trl import GRPOConfig, GRPOTrainer
from workload import (
    GROUP,
    PROMPT,
    Update,
    compare,
    given_reward,
    make_rollout,
    make_trainer,
    parser,
    peak_bytes,
    start,
)

from trl_a3po import A3POConfig, A3POTrainer


HEADLINE = (0.8, 0.3, 4)


def reward_without_spread(share):
    """A reward under which that share of the groups is right throughout, and every other completion of the rest."""

    def reward(completions, **kwargs):
        groups = len(completions) // GROUP
        return [1.0 if row // GROUP < round(share * groups) else float(row % 2) for row in range(len(completions))]

    return reward


@contextlib.contextmanager
def one_engine(args):
    """In here, trainers with colocated vLLM share the first engine that is built."""
    if args.device == "cpu":
        sys.path.append(str(Path(__file__).parents[1] / "tests"))
        from support import vllm_on_cpu

        context = vllm_on_cpu.engines()
    else:
        context = contextlib.nullcontext()
    with context:
        from trl.generation import vllm_generation

        build, built = vllm_generation.LLM, []

        def build_once(**kwargs):
            if not built:
                built.append(build(**kwargs))
            return built[0]

        with patch.object(vllm_generation, "LLM", build_once):
            yield


class WholeStep:
    """Generation, rewards, the passes of one optimizer step, and the step."""

    def __init__(self, trainer):
        self.trainer = trainer
        self.batch = list(trainer.train_dataset)  # read here, not in what is timed
        trainer.create_optimizer()

    def run(self):
        set_seed(0)
        self.trainer._metrics["train"].clear()
        self.trainer._step = 0
        for _ in range(self.trainer.args.gradient_accumulation_steps):
            self.trainer.training_step(self.trainer.model, self.batch, None)
        self.trainer.optimizer.step()
        self.trainer.model.zero_grad(set_to_none=True)


def make_both(*arguments, **fields):
    neutral = {"positive_low_scale": 1.0, "negative_high_scale": 1.0}
    theirs = make_trainer(GRPOTrainer, GRPOConfig, *arguments, **fields)
    return theirs, make_trainer(A3POTrainer, A3POConfig, *arguments, **neutral, **fields)


def measure_update(sigma, dead, micro_batch, args):
    rollout, live = make_rollout(sigma, dead, args)
    with tempfile.TemporaryDirectory() as directory:
        theirs, ours = map(Update, make_both(args, micro_batch, directory, given_reward, rollout))
        bytes_theirs, bytes_ours = (peak_bytes(each.run, args.device) for each in (theirs, ours))  # warms up, too
        gradients = theirs.gradients()
        assert gradients.any()
        difference = ((gradients - ours.gradients()).abs().max() / gradients.abs().max()).item()
        medians, (_, (low, ratio, high)) = compare([theirs.run, ours.run], args.device, args.repeats)
    print(
        f"{sigma:>6} {dead:>6.0%} {micro_batch:>6} {medians[0]:>9.3f} {medians[1]:>9.3f} {theirs.cells / live:>7.2f} "
        f"{ours.cells / live:>6.2f} {difference:>11.1e} {bytes_ours / bytes_theirs:>7.2f}   {ratio:.2f} "
        f"[{low:.2f}, {high:.2f}]",
        flush=True,
    )
    return ratio


def measure_whole_step(dead, micro_batch, args):
    args.vocabulary = args.length  # of which one token ends a completion
    fields = {"use_vllm": True, "vllm_mode": "colocate", "vllm_max_model_length": args.longest + PROMPT}
    reward = reward_without_spread(dead)
    with tempfile.TemporaryDirectory() as directory, one_engine(args) if args.vllm else contextlib.nullcontext():
        theirs, ours = map(WholeStep, make_both(args, micro_batch, directory, reward, **(fields if args.vllm else {})))
        for each in (theirs, ours):  # warm up
            each.run()
        medians, (_, (low, ratio, high)) = compare([theirs.run, ours.run], args.device, args.repeats)
    print(f"{dead:>6.0%} {micro_batch:>6} {medians[0]:>9.3f} {medians[1]:>9.3f}   {ratio:.2f} [{low:.2f}, {high:.2f}]")
    return ratio


def main():
    options = parser(__doc__)
    what = options.add_mutually_exclusive_group()
    what.add_argument("--full", action="store_true", help="all combinations, not one line of each kind")
    what.add_argument("--headline", action="store_true", help="that of the last line, and one with nothing to save")
    what.add_argument("--whole-steps", action="store_true", help="generation, rewards and optimizer besides")
    options.add_argument("--vllm", action="store_true", help="generate by colocated vLLM, with --whole-steps")
    args = options.parse_args()
    if args.vllm and not args.whole_steps:
        options.error("--vllm is about whole steps: add --whole-steps")
    start(args)
    sigmas, deads, sizes = (0.5, 0.8, 1.1), (0.0, 0.3, 0.6), (1, 2, 4, 8, 16)
    if args.whole_steps:
        print(f"{'dead':>6} {'micro':>6} {'GRPO s':>9} {'A3PO s':>9}   GRPO / A3PO")
        ratios = {dead: measure_whole_step(dead, HEADLINE[2], args) for dead in deads}
        print(f"speedup: {ratios[HEADLINE[1]]:.2f}")
        return
    grid = set(itertools.product(sigmas, deads, sizes))
    if args.headline:
        grid = {HEADLINE}
    elif not args.full:
        grid = {case for case in grid if sum(a != b for a, b in zip(case, HEADLINE, strict=True)) <= 1}
    print(
        f"{'sigma':>6} {'dead':>6} {'micro':>6} {'GRPO s':>9} {'A3PO s':>9} {'cells':>7} {'A3PO':>6} "
        f"{'difference':>11} {'memory':>7}   GRPO / A3PO"
    )
    results = {case: measure_update(*case, args) for case in sorted({*grid, (0.0, 0.0, 4)})}
    print(f"speedup: {results[HEADLINE]:.2f}")


if __name__ == "__main__":
    main()
