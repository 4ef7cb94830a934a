"""Train a tiny model on arithmetic, on a CPU, and show what it learned.

  trl-a3po demo

The model has 0.3 million parameters. It adds numbers, but often forgets to carry. In a few minutes it learns to carry.
The command prints pass rates on held-out problems before and after training, and writes a report of the run.

It also takes a model and problems of your own, and every option of `A3POConfig`. The defaults suit the tiny model. For
another model, set the learning rate, the batch size and the completion length.

  trl-a3po demo --model_name_or_path MODEL --dataset_name problems.jsonl --max_steps 100
"""

import logging
import sys
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, cast

import torch
from datasets import Dataset, disable_progress_bars
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.utils.logging import disable_progress_bar

from ..a3po_config import A3POConfig
from ..a3po_trainer import A3POTrainer
from ..demo import arithmetic
from ..evaluation.metrics import check_math_verify
from ..evaluation.models import find_model
from ..evaluation.problems import check_parseable, load_problems, split_off_last
from ..evaluation.runs import estimates, evaluate_model, refuse_empty, rows_in_both
from ..report import write_report
from ..report.text import counted
from ..rewards import accuracy_reward
from ..training.checkpoint_files import check_writable
from ..training.checkpoints import check_not_beyond, checkpoint_to_resume_from, resume_argument
from ..training.dataset_checks import check_dataset_sizes
from .eval import uncounted
from .parser import Parser, group_options
from .training_options import check_libraries, check_prompts, check_schedule


logger = logging.getLogger(__name__)

ARITHMETIC = "arithmetic"
START_MODEL = Path(arithmetic.__file__).parent / "start_model"

# Settings for the start model on two CPU cores.
TRAINING_DEFAULTS = {
    "output_dir": "a3po-demo",
    "max_steps": 300,
    "learning_rate": 1e-4,
    "lr_scheduler_type": "constant",
    "per_device_train_batch_size": 128,
    "num_generations": 8,
    "max_completion_length": 40,
    "logging_steps": 20,
    "log_tokens": 2,
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
    "dataloader_pin_memory": False,
    "bf16": False,
    "gradient_checkpointing": False,
}


@dataclass
class DemoArguments:
    """What to train, and on which problems."""

    model_name_or_path: str = field(
        default=str(START_MODEL),
        metadata={"help": "Model to train. The default comes with the demo."},
    )
    dataset_name: str = field(
        default=ARITHMETIC,
        metadata={
            "help": "`arithmetic`, a .jsonl, .json or .parquet file, or a dataset on the Hugging Face Hub, with "
            "columns as in GSM8K, MATH, AIME, verl or TRL."
        },
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a dataset on the Hub."})
    dataset_train_split: str = field(default="train", metadata={"help": "Split of a dataset from the Hub."})
    eval_size: int = field(
        default=256,
        metadata={"help": "Number of held-out problems. From a dataset of your own, the last rows are held out."},
    )
    eval_samples: int = field(default=8, metadata={"help": "Completions sampled for each held-out problem."})

    def __post_init__(self):
        refuse_empty(self, "model_name_or_path", "dataset_name", "dataset_train_split")
        for name in ("eval_size", "eval_samples"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be 1 or more, got {getattr(self, name)}.")


class ProgressLines(TrainerCallback):
    """Prints one short line for each log instead of the dictionary of all metrics."""

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if logs and logs.get("reward") is not None and state.is_local_process_zero:
            print(f"step {state.global_step:>4}/{state.max_steps}   reward {logs['reward']:.3f}", flush=True)


def make_parser() -> Parser:
    parser = Parser("demo", __doc__, [DemoArguments, A3POConfig])
    parser.set_defaults(**TRAINING_DEFAULTS)
    group_options(parser, "demo", {each.name for each in fields(DemoArguments)})
    return parser


def train_and_held_out(demo: DemoArguments) -> tuple[Dataset, Dataset]:
    if demo.dataset_name != ARITHMETIC:
        problems = load_problems(demo.dataset_name, demo.dataset_train_split, demo.dataset_config)
        train_problems, held_out_problems = split_off_last(problems, demo.eval_size)
        repeated = set(rows_in_both(train_problems, held_out_problems))
        if len(repeated) == len(train_problems):
            raise ValueError(
                f"`eval_size={demo.eval_size}`: all other rows of '{demo.dataset_name}' repeat the problems that are "
                "held out. Pass a smaller one."
            )
        if repeated:
            logger.warning("Left out %d rows for training whose problems are held out.", len(repeated))
            train_problems = train_problems.select([row for row in range(len(train_problems)) if row not in repeated])
        check_parseable(train_problems, "training")
        return train_problems.remove_columns("row"), held_out_problems
    train = [arithmetic.row(problem) for problem in arithmetic.problems("train")]
    held_out = [arithmetic.row(problem) for problem in arithmetic.problems("test")[: demo.eval_size]]
    return Dataset.from_list(train), Dataset.from_list(held_out)


def held_out_results(trainer: A3POTrainer, problems: Dataset, num_samples: int) -> dict[str, Any]:
    return evaluate_model(
        cast(PreTrainedModel, trainer.model),
        cast(PreTrainedTokenizerBase, trainer.processing_class),
        problems,
        num_samples=num_samples,
        max_completion_length=cast(int, trainer.args.max_completion_length),
    )


def before_after_table(before: dict[str, Any], after: dict[str, Any]) -> str:
    lines = [f"{'held-out':<10}{'before':>22}{'after':>22}"]
    first, last = estimates(before), estimates(after)
    pass_rates = [name for name in first if name.startswith("pass@")]
    for name in dict.fromkeys([pass_rates[0], pass_rates[-1]]):
        lines.append(f"{name:<10}{first[name]!s:>22}{last[name]!s:>22}")
    return "\n".join([*lines, f"mean and 95 % interval over {counted(after['problems'], 'problem')}"])


def main(line: Sequence[str] | None = None) -> int:
    """
    Trains, and prints pass rates before and after.

    Args:
        line (`list[str]`, *optional*): The words of the line, by default those of the program.

    Returns:
        `int`: the exit status: 0, or 2 if the options or their files are wrong.
    """
    # These warnings are about TRL's use of transformers, not about the demo.
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    disable_progress_bar()
    disable_progress_bars()

    parser = make_parser()
    try:
        demo, config = parser.parse_args_and_config(list(sys.argv[1:] if line is None else line))
        refuse_empty(config, "output_dir")
        check_math_verify()
        check_schedule(config)
        check_libraries(config)
        resume = resume_argument(config.resume_from_checkpoint)
        find_model(demo.model_name_or_path)
        train_problems, held_out_problems = train_and_held_out(demo)
        check_dataset_sizes(config, train_problems)
        output_dir = Path(config.output_dir)
        check_writable(output_dir)
        trainer = make_trainer(demo, config, train_problems)
        checkpoint = checkpoint_to_resume_from(resume, output_dir, trainer.accelerator)
        check_not_beyond(config.max_steps, checkpoint)
        print(f"{counted(len(train_problems), 'training problem')}, {len(held_out_problems)} held out", flush=True)
        check_prompts(trainer, train_problems, held_out_problems)
        before = held_out_results(trainer, held_out_problems, demo.eval_samples)
        print("".join(f"{each}\n" for each in uncounted(before)), end="", flush=True)
    except BrokenPipeError:
        raise
    except (OSError, ValueError) as error:
        parser.error(" ".join(str(error).split()))

    start = time.perf_counter()
    trainer.train(checkpoint)
    seconds = time.perf_counter() - start
    try:
        after = held_out_results(trainer, held_out_problems, demo.eval_samples)
        print(before_after_table(before, after), flush=True)
    finally:  # an error of one must not cost the other
        trainer.save_model(str(output_dir))
        trainer.save_state()
    since = f", resumed from {checkpoint}" if checkpoint else ""
    print(f"\n{trainer.state.global_step} steps in {seconds:.0f} s{since}; model saved in {config.output_dir}")
    print(f"Report, token by token: {write_report([output_dir], output_dir / 'report.html')}")
    return 0


def make_trainer(demo: DemoArguments, config: A3POConfig, problems: Dataset) -> A3POTrainer:
    if demo.model_name_or_path == str(START_MODEL):
        # This model is so small that more threads gain little. On a busy machine they lose much time by waiting.
        torch.set_num_threads(1)
    trainer = A3POTrainer(
        model=demo.model_name_or_path,
        reward_funcs=accuracy_reward,
        args=config,
        train_dataset=problems,
        callbacks=[ProgressLines()],
    )
    trainer.remove_callback(PrinterCallback)
    return trainer
