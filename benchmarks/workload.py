"""What the benchmarks of the trainer share: models of random weights, rollouts made up beforehand, clocks."""

import argparse
import itertools
import platform
import statistics
import time
import warnings

import torch
import trl
from datasets import Dataset, disable_progress_bars
from peft import LoraConfig
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)
from transformers.trainer_utils import set_seed
from transformers.utils import logging

from trl_a3po.evaluation.problems import load_problems


GROUP = 8
# Of the logarithm of the lengths of GSM8K's problems under SmolLM2's chat template.
PROMPT_SIGMA = 0.23
SIZES = {
    "tiny": {
        "hidden_size": 128,
        "intermediate_size": 384,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    },
    # The shapes of Qwen2.5.
    "1.5b": {
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
    },
    "7b": {
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
    },
}


def parser(description):
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--size", default="tiny", choices=SIZES, help="shape of a model of random weights")
    parser.add_argument("--model", metavar="DIR", help="a real model, in place of one of random weights")
    parser.add_argument("--problems", metavar="FILE", help="real problems (.jsonl or .parquet), with --model")
    parser.add_argument("--prompt", type=int, default=109, help="mean of the prompt lengths, without --problems")
    parser.add_argument("--common", type=int, default=0, help="tokens that all made-up prompts have before their own")
    parser.add_argument("--lora", action="store_true", help="train an adapter of rank 16, not all parameters")
    parser.add_argument("--rows", type=int, default=64, help=f"completions an update, in groups of {GROUP}")
    parser.add_argument("--length", type=int, default=100, help="mean of the completion lengths")
    parser.add_argument("--longest", type=int, default=512, help="where completions are cut off")
    parser.add_argument("--vocabulary", type=int, default=512, help="number of tokens, without --model")
    parser.add_argument("--threads", type=int, default=1, help="threads of the CPU")
    parser.add_argument("--repeats", type=int, default=5, help="measurements of each, in turns")
    parser.add_argument("--seed", type=int, default=0)
    return parser


def start(args):
    """Says what is measured on what."""
    if args.problems and not args.model:
        raise SystemExit("--problems are tokenized with the chat template of a model: add --model DIR.")
    torch.set_num_threads(args.threads)
    warnings.filterwarnings("ignore")
    logging.disable_progress_bar()
    disable_progress_bars()
    if args.model:
        args.vocabulary = AutoConfig.from_pretrained(args.model).vocab_size
    name = torch.cuda.get_device_name() if args.device == "cuda" else f"{platform.machine()}, {args.threads} thread(s)"
    print(
        f"torch {torch.__version__}, TRL {trl.__version__}, {args.device} ({name}), "
        f"{args.model or f'{args.size} model'}, {args.rows} completions an update"
    )


def make_rollout(sigma, dead, args):
    """
    Prompts, completions and rewards of one generation batch, and the number of its distinct positions: the tokens of
    the completions that have an advantage, and once those of each prompt that has such completions, a common start of
    the prompts included.

    Completions are made up. Their lengths are log-normal, and so are those of prompts that are made up. With a `sigma`
    of 0 there is nothing to save: all completions are equally long, and prompts have one token. `dead` is the share of
    the groups without spread.
    """
    generator = torch.Generator().manual_seed(args.seed)
    rows, groups = args.rows, args.rows // GROUP

    def log_normal(count, mean, sigma):
        return ((sigma * torch.randn(count, generator=generator) - sigma**2 / 2).exp() * mean).round().long()

    def draw(length):
        return torch.randint(3, args.vocabulary, (length,), generator=generator).tolist()

    lengths = log_normal(rows, args.length, sigma).clamp(2, args.longest).tolist()
    without_spread = set(torch.randperm(groups, generator=generator)[: round(dead * groups)].tolist())
    tokenizer = load_tokenizer(args)
    if args.problems and sigma:
        problems = load_problems(args.problems, "train")
        chosen = torch.randperm(len(problems), generator=generator)[:groups].tolist()
        prompts = [
            tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=True)["input_ids"]
            for prompt in problems.select(chosen)["prompt"]
        ]
    else:
        lengths_of_prompts = log_normal(groups, args.prompt, PROMPT_SIGMA) if sigma else torch.ones(groups).long()
        common = draw(args.common)
        prompts = [common + draw(n) for n in lengths_of_prompts.clamp(1).tolist()]
    completions = [[*draw(n - 1), tokenizer.eos_token_id] for n in lengths]
    is_live = [row // GROUP not in without_spread for row in range(rows)]
    distinct = sum(map(len, itertools.compress(completions, is_live)))
    distinct += sum(map(len, itertools.compress(prompts, is_live[::GROUP])))
    rollout = {
        "prompt_ids": [prompt for prompt in prompts for _ in range(GROUP)],
        "completion_ids": completions,
        "logprobs": [[0.0] * n for n in lengths],
        "given": [float(row % 2) if is_live[row] else 1.0 for row in range(rows)],
    }
    return rollout, distinct


def given_reward(given, **kwargs):
    return given


def make_trainer(
    trainer_class, config_class, args, micro_batch, directory, reward, rollout, *, generates=False, **fields
):
    """A trainer whose completions are those of the rollout, or if it `generates`, its own to the rollout's prompts."""
    set_seed(0)
    accumulation, rest = divmod(args.rows, micro_batch)
    if rest or not accumulation:
        raise ValueError(f"{args.rows} rows are no whole micro-batches of {micro_batch}. Pass a multiple to `--rows`.")
    tokenizer = load_tokenizer(args)
    model = load_model(args, longest=max(map(len, rollout["prompt_ids"])) + args.longest)
    if fields.get("use_vllm") and not args.model:  # its engine reads them from where the model says that it is from
        model.name_or_path = directory
        model.save_pretrained(directory)
        tokenizer.save_pretrained(directory)
    trainer = trainer_class(
        model=model,
        reward_funcs=reward,
        args=config_class(
            directory,
            per_device_train_batch_size=micro_batch,
            gradient_accumulation_steps=accumulation,
            num_generations=GROUP,
            max_completion_length=args.longest,
            max_steps=1000,
            learning_rate=0.0,
            use_cpu=args.device == "cpu",
            gradient_checkpointing=args.device != "cpu",
            report_to="none",
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
            **{"loss_type": "dapo", "bf16": args.device != "cpu", **fields},
        ),
        train_dataset=Dataset.from_dict({"prompt": tokenizer.batch_decode(rollout["prompt_ids"])}),
        processing_class=tokenizer,
        peft_config=LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM") if args.lora else None,
        rollout_func=None
        if generates
        else lambda prompts, trainer: {key: list(value) for key, value in rollout.items()},
    )
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = accumulation
    return trainer


def load_tokenizer(args):
    """That of the model, or one whose words are the numbers of the tokens."""
    if args.model:
        return AutoTokenizer.from_pretrained(args.model)
    special = ["<pad>", "<eos>", "<unk>"]
    words = [*special, *map(str, range(len(special), args.vocabulary))]
    backend = Tokenizer(models.WordLevel({word: n for n, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names = dict(zip(("pad_token", "eos_token", "unk_token"), special, strict=True))
    return PreTrainedTokenizerFast(tokenizer_object=backend, padding_side="left", **names)


def load_model(args, longest):
    dtype = torch.float32 if args.device == "cpu" else torch.bfloat16
    if args.model:
        return AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype).to(args.device)
    config = Qwen2Config(
        **SIZES[args.size],
        vocab_size=args.vocabulary,
        max_position_embeddings=longest,
        pad_token_id=0,
        eos_token_id=1,
    )
    with torch.device(args.device):
        return Qwen2ForCausalLM(config).to(dtype)


class Update:
    """The forward and backward passes of one optimizer step, on a rollout that is made beforehand."""

    def __init__(self, trainer):
        self.trainer = trainer
        self.positions = 0  # positions that the model computed in the last run
        trainer._prepare_inputs(list(trainer.train_dataset))
        self.micro_batches = trainer._buffered_inputs
        trainer.model.register_forward_pre_hook(self._count, with_kwargs=True)

    def _count(self, module, args, kwargs):
        self.positions += kwargs["input_ids"].numel()

    def run(self):
        self.trainer.model.zero_grad(set_to_none=True)
        self.trainer._metrics["train"].clear()
        self.positions = 0
        for inputs in self.micro_batches:
            self.trainer.accelerator.backward(self.trainer.compute_loss(self.trainer.model, inputs))

    def gradients(self):
        parameters = self.trainer.model.parameters()
        return torch.cat([each.grad.flatten().float() for each in parameters if each.requires_grad])


def seconds(run, device):
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def peak_bytes(run, device):
    """Of what the run allocates, on top of what is there."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    return max(itertools.accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())))


def compare(runs, device, repeats):
    """Seconds of each run, in turns: their medians, and for each the quartiles of the first's seconds over its own."""
    rounds = [[seconds(run, device) for run in runs] for _ in range(repeats)]
    columns = list(zip(*rounds, strict=True))
    ratios = [statistics.quantiles([a / b for a, b in zip(columns[0], each, strict=True)], n=4) for each in columns]
    return [statistics.median(column) for column in columns], ratios
