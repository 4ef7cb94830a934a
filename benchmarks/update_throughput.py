"""
Time of an update: GRPOTrainer against A3POTrainer with `trim_padding` and `skip_zero_advantage`, on the same rollouts.

    python benchmarks/update_throughput.py [--device cpu] [--threads 1] [--repeats 5] [--full]

The shaping is neutral, so that both compute the same gradients. Completion lengths are log-normal (mean `--length`), a
share of the groups has no spread of rewards. Each configuration is measured in turns, one optimizer step of both at a
time; the ratio is the median over the pairs, with quartiles. `cells` are the positions that the model computes in the
passes of the loss, over those that count: tokens, of prompts and completions, of completions with an advantage (1.0 is
the limit). `difference` is the largest difference of the gradients, relative to the largest gradient. `memory` is the
ratio of the peaks (CUDA only).

The last line is the ratio at sigma 0.8, 30 % of groups without spread and micro-batches of 4.
"""

import argparse
import itertools
import platform
import statistics
import tempfile
import time
import warnings

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM
from transformers.trainer_utils import set_seed
from trl import GRPOConfig, GRPOTrainer

from trl_a3po import A3POConfig, A3POTrainer


ROWS, GROUP, PROMPT = 64, 8, 32
HEADLINE = (0.8, 0.3, 4)
SIZES = {
    "tiny": {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 3, "num_attention_heads": 4},
    "1.5b": {"hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28, "num_attention_heads": 12},
}


def tokenizer():
    backend = Tokenizer(models.WordLevel({"<pad>": 0, "<eos>": 1, "<unk>": 2}, unk_token="<unk>"))
    special = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, padding_side="left", **special)


def make_rollout(sigma, dead, mean_length, longest, seed, vocabulary):
    """Prompts, completions and rewards of one generation batch."""
    generator = torch.Generator().manual_seed(seed)
    lengths = (sigma * torch.randn(ROWS, generator=generator) - sigma**2 / 2).exp() * mean_length
    lengths = lengths.round().long().clamp(2, longest).tolist()
    prompts = torch.randint(PROMPT // 2, PROMPT + 1, (ROWS // GROUP,), generator=generator).tolist()
    groups = torch.randperm(ROWS // GROUP, generator=generator)
    without_spread = set(groups[: round(dead * ROWS / GROUP)].tolist())
    draw = lambda n: torch.randint(3, vocabulary, (n,), generator=generator).tolist()  # noqa: E731
    prompt_ids = [ids for n in prompts for ids in [draw(n)] * GROUP]
    completion_ids = [[*draw(n - 1), 1] for n in lengths]
    rewards = [1.0 if i // GROUP in without_spread else float(i % 2) for i in range(ROWS)]
    live = sum(len(prompt_ids[i]) + len(completion_ids[i]) for i in range(ROWS) if i // GROUP not in without_spread)
    logprobs = [[0.0] * len(ids) for ids in completion_ids]
    output = {"prompt_ids": prompt_ids, "completion_ids": completion_ids, "logprobs": logprobs, "given": rewards}
    return output, live


def given_reward(given, **kwargs):
    return given


def make_trainer(trainer_class, config_class, args, micro_batch, rollout, directory, **fields):
    set_seed(0)
    config = Qwen2Config(
        **SIZES[args.size],
        vocab_size=args.vocabulary,
        num_key_value_heads=2,
        max_position_embeddings=args.longest + PROMPT,
        pad_token_id=0,
        eos_token_id=1,
    )
    trainer = trainer_class(
        model=Qwen2ForCausalLM(config).to(torch.float32 if args.device == "cpu" else torch.bfloat16),
        reward_funcs=given_reward,
        args=config_class(
            directory,
            per_device_train_batch_size=micro_batch,
            gradient_accumulation_steps=ROWS // micro_batch,
            num_generations=GROUP,
            max_completion_length=args.longest,
            max_steps=1000,
            learning_rate=0.0,
            loss_type="dapo",
            use_cpu=args.device == "cpu",
            bf16=args.device != "cpu",
            gradient_checkpointing=args.device != "cpu",
            report_to="none",
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
            **fields,
        ),
        train_dataset=Dataset.from_dict({"prompt": ["-"] * ROWS}),
        processing_class=tokenizer(),
        rollout_func=lambda prompts, trainer: {key: list(value) for key, value in rollout.items()},
    )
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = ROWS // micro_batch
    return trainer


class Update:
    """The forward and backward passes of one optimizer step, on a rollout that is made beforehand."""

    def __init__(self, trainer, device):
        self.trainer, self.device = trainer, device
        self.cells = 0
        trainer._prepare_inputs([{"prompt": "-"} for _ in range(ROWS)])
        self.micro_batches = trainer._buffered_inputs
        trainer.model.register_forward_pre_hook(self._count, with_kwargs=True)

    def _count(self, module, args, kwargs):
        self.cells += kwargs["input_ids"].numel()

    def run(self):
        """Seconds, and with CUDA bytes at the peak."""
        self.trainer.model.zero_grad(set_to_none=True)
        self.trainer._metrics["train"].clear()
        self.cells = 0
        if self.device == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        for inputs in self.micro_batches:
            self.trainer.accelerator.backward(self.trainer.compute_loss(self.trainer.model, inputs))
        if self.device == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
        return seconds, torch.cuda.max_memory_allocated() if self.device == "cuda" else 0

    def gradients(self):
        return torch.cat([parameter.grad.flatten().float() for parameter in self.trainer.model.parameters()])


def measure(sigma, dead, micro_batch, args):
    rollout, live = make_rollout(sigma, dead, args.length, args.longest, args.seed, args.vocabulary)
    with tempfile.TemporaryDirectory() as directory:
        neutral = {"positive_low_scale": 1.0, "negative_high_scale": 1.0}
        savings = {"trim_padding": True, "skip_zero_advantage": True}
        theirs, ours = (
            Update(make_trainer(trainer, config, args, micro_batch, rollout, directory, **fields), args.device)
            for trainer, config, fields in (
                (GRPOTrainer, GRPOConfig, {}),
                (A3POTrainer, A3POConfig, neutral | savings),
            )
        )
        for each in (theirs, ours):  # warm up
            each.run()
        gradients = theirs.gradients()
        assert gradients.any()
        difference = ((gradients - ours.gradients()).abs().max() / gradients.abs().max()).item()
        pairs = [(theirs.run(), ours.run()) for _ in range(args.repeats)]
    low, ratio, high = statistics.quantiles([a[0] / b[0] for a, b in pairs], n=4)
    memory = statistics.median(b[1] / a[1] if a[1] else float("nan") for a, b in pairs)
    seconds = [statistics.median(pair[i][0] for pair in pairs) for i in range(2)]
    print(
        f"{sigma:>6} {dead:>6.0%} {micro_batch:>6} {seconds[0]:>9.3f} {seconds[1]:>9.3f} {theirs.cells / live:>7.2f} "
        f"{ours.cells / live:>6.2f} {difference:>11.1e} {memory:>7.2f}   {ratio:.2f} [{low:.2f}, {high:.2f}]",
        flush=True,
    )
    return ratio


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--size", default="tiny", choices=SIZES)
    parser.add_argument("--length", type=int, default=100, help="mean of the completion lengths")
    parser.add_argument("--longest", type=int, default=512, help="where completions are cut off")
    parser.add_argument("--vocabulary", type=int, default=512)
    parser.add_argument("--threads", type=int, default=1, help="threads of the CPU")
    parser.add_argument("--repeats", type=int, default=5, help="pairs of measurements")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--full", action="store_true", help="all combinations, not one line of each kind")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    warnings.filterwarnings("ignore")
    sigmas, deads, sizes = (0.5, 0.8, 1.1), (0.0, 0.3, 0.6), (1, 2, 4, 8, 16)
    grid = set(itertools.product(sigmas, deads, sizes))
    if not args.full:
        grid = {case for case in grid if sum(a != b for a, b in zip(case, HEADLINE, strict=True)) <= 1}
    name = torch.cuda.get_device_name() if args.device == "cuda" else f"{platform.machine()}, {args.threads} thread(s)"
    print(f"torch {torch.__version__}, {args.device} ({name}), {args.size} model, {ROWS} completions an update")
    print(
        f"{'sigma':>6} {'dead':>6} {'micro':>6} {'GRPO s':>9} {'A3PO s':>9} {'cells':>7} {'A3PO':>6} "
        f"{'difference':>11} {'memory':>7}   GRPO / A3PO"
    )
    results = {case: measure(*case, args) for case in sorted({*grid, (0.0, 0.0, 4)})}
    print(f"speedup: {results[HEADLINE]:.2f}")


if __name__ == "__main__":
    main()
