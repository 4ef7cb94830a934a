r"""
Time of an update: GRPOTrainer against A3POTrainer with its default savings, on the same rollouts.

    python benchmarks/update_throughput.py [--micro-batch 8] [--prompt 109] [--headline]
    python benchmarks/update_throughput.py --model DIR --problems gsm8k.jsonl --rows 32 --length 108 --longest 240 \
        --threads 2 --repeats 3 --headline
    python benchmarks/update_throughput.py --count-only [--prompt 2000] [--common 150]
    python benchmarks/update_throughput.py --whole-steps [--vllm]
    python benchmarks/update_throughput.py --device cuda --size 1.5b --length 1500 --longest 8192 \
        --vocabulary 151936 --headline --repeats 3

The shaping is neutral, so that both compute the same gradients. Completions are made-up tokens of log-normal length
(mean `--length`, cut at `--longest`), eight to a prompt. Prompts are made up, too, with lengths like those of GSM8K's
problems under a chat template (log-normal, mean `--prompt`), or they are the problems of `--problems` under the chat
template of `--model`. A share of the groups has no spread of rewards.

Both trainers are measured in turns, one optimizer step each; the ratio is the median over the pairs, with quartiles.
`GRPO` and `A3PO` are the positions that the model computes, divided by the distinct ones: tokens of the completions
that have an advantage, and the tokens of their prompts once per group. `difference` is the largest difference of the
gradients, relative to the largest gradient. `memory` is the ratio of the peaks of what the update allocates.

`--count-only` counts the positions without running the model, for micro-batches of 1 to 16. Each figure is the median
over `--repeats` rollouts, with quartiles.

With `--whole-steps` each step also generates its completions (a model of random weights ends them after `--length`
tokens on average), scores them and steps the optimizer: what a user waits for. `--vllm` generates by colocated vLLM,
both trainers by one engine, so that there is room for both. On a CPU that takes the environment of `make test-vllm`.

The last line is the ratio at sigma 0.8, 30 % of groups without spread and `--micro-batch`.
"""

import contextlib
import statistics
import sys
import tempfile
from pathlib import Path
from unittest.mock import patch

from transformers.trainer_utils import set_seed
from trl import GRPOConfig, GRPOTrainer
from workload import (
    GROUP,
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
from trl_a3po.update.plan import plan_of


SIGMAS, DEADS, MICRO_BATCHES = (0.5, 0.8, 1.1), (0.0, 0.3, 0.6), (1, 2, 4, 8, 16)
SIGMA, DEAD = 0.8, 0.3  # of the last line
NEUTRAL = {"positive_low_scale": 1.0, "negative_high_scale": 1.0}


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
    theirs = make_trainer(GRPOTrainer, GRPOConfig, *arguments, **fields)
    return theirs, make_trainer(A3POTrainer, A3POConfig, *arguments, **NEUTRAL, **fields)


def measure_update(sigma, dead, micro_batch, args):
    rollout, distinct = make_rollout(sigma, dead, args)
    with tempfile.TemporaryDirectory() as directory:
        theirs, ours = map(Update, make_both(args, micro_batch, directory, given_reward, rollout))
        bytes_theirs, bytes_ours = (peak_bytes(each.run, args.device) for each in (theirs, ours))  # warms up, too
        gradients = theirs.gradients()
        assert gradients.any()
        difference = ((gradients - ours.gradients()).abs().max() / gradients.abs().max()).item()
        medians, (_, (low, ratio, high)) = compare([theirs.run, ours.run], args.device, args.repeats)
    positions = f"{theirs.positions / distinct:>6.2f} {ours.positions / distinct:>6.3f}"
    print(
        f"{sigma:>6} {dead:>6.0%} {micro_batch:>6} {medians[0]:>9.3f} {medians[1]:>9.3f} {positions} "
        f"{difference:>11.1e} {bytes_ours / bytes_theirs:>7.2f}   {ratio:.2f} [{low:.2f}, {high:.2f}]",
        flush=True,
    )
    return ratio


def count_positions(micro_batch, args):
    """Positions over distinct ones that the micro-batches of both trainers have, in several rollouts."""
    ratios = []
    for _ in range(args.repeats):
        rollout, distinct = make_rollout(SIGMA, DEAD, args)
        args.seed += 1
        with tempfile.TemporaryDirectory() as directory:
            trainer = make_trainer(
                A3POTrainer, A3POConfig, args, micro_batch, directory, given_reward, rollout, **NEUTRAL
            )
            micro_batches = Update(trainer).micro_batches
        width = sum(micro_batches[0][key].shape[1] for key in ("prompt_ids", "completion_ids"))
        ours = sum(plan.positions.positions for plan in map(plan_of, micro_batches) if plan.rows)
        ratios.append((args.rows * width / distinct, ours / distinct))
    args.seed -= args.repeats
    theirs, ours = (statistics.quantiles(column, n=4) for column in zip(*ratios, strict=True))
    print(
        f"{micro_batch:>6}   {theirs[1]:>5.2f} [{theirs[0]:.2f}, {theirs[2]:.2f}]   "
        f"{ours[1]:.3f} [{ours[0]:.3f}, {ours[2]:.3f}]",
        flush=True,
    )


def measure_whole_step(dead, micro_batch, args):
    if not args.model:
        args.vocabulary = args.length  # of which one token ends a completion
    rollout, _ = make_rollout(SIGMA, dead, args)
    longest = max(map(len, rollout["prompt_ids"])) + args.longest
    fields = {"generates": True}
    if args.vllm:
        fields |= {"use_vllm": True, "vllm_mode": "colocate", "vllm_max_model_length": longest}
    reward = reward_without_spread(dead)
    with tempfile.TemporaryDirectory() as directory, one_engine(args) if args.vllm else contextlib.nullcontext():
        theirs, ours = map(WholeStep, make_both(args, micro_batch, directory, reward, rollout, **fields))
        for each in (theirs, ours):  # warm up
            each.run()
        medians, (_, (low, ratio, high)) = compare([theirs.run, ours.run], args.device, args.repeats)
    print(f"{dead:>6.0%} {micro_batch:>6} {medians[0]:>9.3f} {medians[1]:>9.3f}   {ratio:.2f} [{low:.2f}, {high:.2f}]")
    return ratio


def main():
    options = parser(__doc__)
    what = options.add_mutually_exclusive_group()
    what.add_argument("--headline", action="store_true", help="only what the last line is about")
    what.add_argument("--count-only", action="store_true", help="only the positions, without running the model")
    what.add_argument("--whole-steps", action="store_true", help="generation, rewards and optimizer as well")
    options.add_argument("--micro-batch", type=int, default=8, help="rows of a micro-batch in the last line")
    options.add_argument("--vllm", action="store_true", help="generate by colocated vLLM, with --whole-steps")
    args = options.parse_args()
    if args.vllm and not args.whole_steps:
        options.error("--vllm is about whole steps: add --whole-steps")
    start(args)
    if args.count_only:
        print(f"{'micro':>6}   {'GRPO':<20} A3PO")
        for micro_batch in MICRO_BATCHES:
            count_positions(micro_batch, args)
        return
    if args.whole_steps:
        print(f"{'dead':>6} {'micro':>6} {'GRPO s':>9} {'A3PO s':>9}   GRPO / A3PO")
        ratios = {dead: measure_whole_step(dead, args.micro_batch, args) for dead in DEADS}
        print(f"speedup: {ratios[DEAD]:.2f}")
        return
    headline = (SIGMA, DEAD, args.micro_batch)
    cases = {headline}
    if not args.headline:  # each of the three by itself, and where nothing can be saved
        cases |= {(sigma, DEAD, args.micro_batch) for sigma in SIGMAS}
        cases |= {(SIGMA, dead, args.micro_batch) for dead in DEADS}
        cases |= {(SIGMA, DEAD, micro_batch) for micro_batch in MICRO_BATCHES}
        cases |= {(0.0, 0.0, args.micro_batch)}
    print(
        f"{'sigma':>6} {'dead':>6} {'micro':>6} {'GRPO s':>9} {'A3PO s':>9} {'GRPO':>6} {'A3PO':>6} "
        f"{'difference':>11} {'memory':>7}   GRPO / A3PO"
    )
    results = {case: measure_update(*case, args) for case in sorted(cases)}
    print(f"speedup: {results[headline]:.2f}")


if __name__ == "__main__":
    main()
