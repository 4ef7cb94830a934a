r"""
Train a model with A3PO, or with another method that shapes advantages (`--shaping`). It takes the options of
`trl grpo`, A3POConfig and `accelerate launch`.

  trl-a3po train --model_name_or_path Qwen/Qwen2.5-1.5B --dataset_name openai/gsm8k --dataset_config main \
      --problems --output_dir gsm8k-a3po --accelerate_config fsdp2 --num_processes 8

A YAML file (`--config`) can contain any of them, and environment variables under `env:`.
"""

import argparse
import functools
import importlib
import importlib.util
import logging
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]
import trl
import yaml
from accelerate.commands.launch import launch_command, launch_command_parser
from datasets import get_dataset_split_names
from datasets.exceptions import DatasetGenerationError
from safetensors import SafetensorError
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from trl import DatasetMixtureConfig, GRPOConfig, ModelConfig
from trl.cli.accelerate_config import resolve_accelerate_config_argument
from trl.scripts import grpo

from ..a3po_config import A3POConfig
from ..a3po_trainer import A3POTrainer
from ..evaluation.problems import Message, check_parseable, listed_rows, to_prompt_and_solution, unreadable
from ..evaluation.runs import refuse_empty, rows_in_both
from ..evaluation.worked_examples import check_no_overlap, load_worked_examples, overlap
from ..report.text import counted
from ..training.checkpoint_files import check_writable
from ..training.checkpoints import BeyondTheEndError, resume_argument
from ..training.dataset_checks import check_dataset_sizes
from .dataset_options import resolve_datasets, take_slice
from .main import exit_status
from .parser import Parser, group_options
from .training_options import check_libraries, check_prompts, check_schedule


logger = logging.getLogger(__name__)

# TRL's rewards accept one answer per problem. Ours have the same names and accept several.
OUR_REWARDS = {name: f"trl_a3po.rewards.{name}" for name in ("accuracy_reward", "reasoning_accuracy_reward")}


@dataclass
class A3POScriptArguments(grpo.GRPOScriptArguments):
    """
    Arguments of `trl-a3po train`: those of TRL's GRPO script, and three about datasets of problems.

    Args:
        problems (`bool`, *optional*, defaults to `False`):
            Whether the dataset has problems with checkable answers. Its columns are mapped to `prompt` and
            `solution` by [`~trl_a3po.evaluation.problems.to_prompt_and_solution`]. The reward is `accuracy_reward`,
            unless you name another.
        instruction (`str`, *optional*):
            Text appended to each problem.
        worked_examples (`str`, *optional*):
            File of problems with solutions, all of which stand before each problem. See
            [`~trl_a3po.evaluation.worked_examples.load_worked_examples`].
    """

    problems: bool = field(
        default=False,
        metadata={
            "help": "Whether the dataset has problems with checkable answers, with columns as in GSM8K, MATH, AIME, "
            "DAPO-Math-17k or verl. They are mapped to `prompt` and `solution`. The reward is `accuracy_reward`, "
            "unless you name another."
        },
    )
    instruction: str | None = field(
        default=None,
        metadata={
            "help": "Text appended to each problem, such as 'Put your final answer within \\boxed{}.' Needs "
            "`problems`."
        },
    )
    worked_examples: str | None = field(
        default=None,
        metadata={
            "help": "A .jsonl, .json or .parquet file of problems with solutions. All its rows stand before each "
            "problem, as user and assistant turns. Needs `problems`."
        },
    )


class UsageError(ValueError):
    """A mistake in the options or in the files that they name. The message is one line, without a traceback."""


def make_parser() -> Parser:
    dataclasses = [A3POScriptArguments, A3POConfig, ModelConfig, DatasetMixtureConfig]
    parser = Parser("train", __doc__, dataclasses, with_recipes=True)
    group_options(parser, "dataset and rewards", _names(A3POScriptArguments))
    group_options(parser, "what A3POConfig adds to GRPOConfig", _names(A3POConfig) - _names(GRPOConfig))
    group_options(parser, "model", _names(ModelConfig))
    group_options(parser, "dataset mixture", _names(DatasetMixtureConfig))
    return parser


def _names(dataclass_type: Any) -> set[str]:
    return {each.name for each in fields(dataclass_type)}


def main(arguments: Sequence[str] | None = None) -> int:
    """
    Checks the arguments, and starts the processes of [`train`] with `accelerate launch`.

    Args:
        arguments (`list[str]`, *optional*): The words of the line, by default those of the program.

    Returns:
        `int`: the exit status: 0, 2 if the options or their files are wrong, or that of the process that failed.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    parser, launcher = make_parser(), launch_command_parser()
    try:
        arguments = parser.find_config(arguments)
        script, config, model, mixture, in_file, on_line = parser.parse_args_and_config(
            arguments, return_remaining_strings=True, separate_remaining_strings=True
        )
        for_launcher = [*resolve_accelerate_config_argument([*in_file, *on_line]), "--module", __name__]
        known, unknown = launcher.parse_known_args(for_launcher)
        if unknown or known.training_script != __name__:
            parser.error(f"unrecognized arguments: {' '.join(unknown or [known.training_script])}")
        if model.model_name_or_path is None:
            parser.error("the following arguments are required: --model_name_or_path")
        _check_model(model)
        check_schedule(config)
        check_libraries(config)
        _resolve(script, config, mixture)
        _worked_examples(script, config, mixture)
        resume_argument(config.resume_from_checkpoint)
        return _launch(launcher.parse_args([*for_launcher, *arguments]))
    except yaml.YAMLError as error:  # of our own file, the parser says so
        parser.error(f"The file of `accelerate_config` is not YAML: {_one_line(error)}")
    except (OSError, ValueError) as error:
        parser.error(_one_line(error))


def _check_model(model: ModelConfig) -> None:
    """Finds mistakes that the libraries find late, or not at all. Other names may be those of the Hub."""
    refuse_empty(model, "model_name_or_path")
    name = str(model.model_name_or_path)
    path = Path(name)
    if (path.is_absolute() or name.startswith(".") or name.count("/") > 1) and not path.is_dir():
        raise UsageError(f"There is no directory '{name}' for `model_name_or_path`.")
    if (path / "adapter_config.json").exists() and not (path / "config.json").exists():
        raise UsageError(
            f"`model_name_or_path='{name}'` is an adapter, without its base model. Merge it into its base model, and "
            "pass the directory of the merged model."
        )


def _resolve(script: A3POScriptArguments, config: A3POConfig, mixture: DatasetMixtureConfig):
    """Fills in missing options, and raises errors that can be known now. Returns the slices of the two splits."""
    refuse_empty(config, "output_dir")
    if not script.reward_funcs and not script.reward_model_name_or_path:
        if not script.problems:
            raise UsageError(
                "There is no reward. Pass `--reward_funcs`, or `--problems` for a dataset of problems with checkable "
                "answers."
            )
        script.reward_funcs = ["accuracy_reward"]
    for name in ("worked_examples", "instruction"):
        if getattr(script, name) and not script.problems:
            raise UsageError(f"`{name}` has an effect only on problems. Pass `--problems`, or leave it out.")
    if _checks_answers(script) and importlib.util.find_spec("math_verify") is None:
        raise UsageError("`accuracy_reward` needs math-verify. Install it: pip install 'trl[math-verify]'")
    return resolve_datasets(script, mixture, config.eval_strategy != "no", config.max_steps)


def _worked_examples(script: A3POScriptArguments, config: A3POConfig, mixture: DatasetMixtureConfig) -> list[Message]:
    """The messages that stand before each problem."""
    if script.worked_examples is None:
        return []
    if config.eval_strategy != "no" and (script.dataset_streaming or mixture.streaming):
        raise UsageError(
            "`worked_examples` are compared with all problems to evaluate on, and a stream cannot be read twice. "
            "Leave out `--dataset_streaming`."
        )
    return load_worked_examples(script.worked_examples, script.instruction, _checks_answers(script))


def _checks_answers(script: A3POScriptArguments) -> bool:
    return not {*OUR_REWARDS, *OUR_REWARDS.values()}.isdisjoint(script.reward_funcs or ())


def _launch(arguments: argparse.Namespace) -> int:
    """Starts the processes. They report their own errors, so the traceback of the launcher is not shown."""
    # This logger reports the end of each process as one more error.
    logging.getLogger("torch.distributed.elastic.multiprocessing.api").setLevel(logging.CRITICAL)
    try:
        with _signals_passed_on():
            launch_command(arguments)
    except subprocess.CalledProcessError as error:
        return exit_status([error.returncode], "training")
    except ChildFailedError as error:
        return exit_status([failure.exitcode for failure in error.failures.values()], "training")
    except SignalException as error:  # several processes, which the launcher has ended
        return exit_status([-error.sigval], "training")
    return 0


@contextmanager
def _signals_passed_on() -> Iterator[None]:
    """
    In this context, a signal that ends this process ends its children instead, for which the launcher then waits. It
    would leave a single process running. For several, it replaces these handlers by its own, which end them.
    """

    def pass_on(number: int, _: Any) -> None:
        children = psutil.Process().children()
        for child in children:
            with suppress(psutil.NoSuchProcess):
                child.send_signal(number)
        if not children:
            raise SystemExit(128 + number)

    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for number, handler in before.items():
        if handler is not signal.SIG_IGN:  # as in the background of a shell script
            signal.signal(number, pass_on)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def train(arguments: Sequence[str] | None = None) -> None:
    """
    Trains, in one of the processes that [`main`] starts.

    Raises:
        `UsageError`: the options name something that does not exist or does not work; always before the first step.
        `RuntimeError`: the script of the installed TRL does not train with [`A3POTrainer`]; before the first step.
    """
    # The words that are left over are for the launcher.
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        parsed = make_parser().parse_args_and_config(arguments, return_remaining_strings=True)
        script, config, model, mixture, _ = parsed
        named = f" from '{script.dataset_name}'" if script.dataset_name else ""
        train_slice, test_slice = _resolve(script, config, mixture)
        examples = _worked_examples(script, config, mixture)
        if config.should_save:  # the trained model, with any `save_strategy`
            check_writable(Path(config.output_dir))
    except (OSError, ValueError) as error:
        raise UsageError(_one_line(error)) from error
    script.reward_funcs = [OUR_REWARDS.get(name, name) for name in script.reward_funcs or ()]
    checks_answers = _checks_answers(script)
    if config.process_index:
        logging.getLogger("trl_a3po").setLevel(logging.ERROR)  # the main process warns for all

    trainers: list[A3POTrainer] = []

    def make_trainer(*, train_dataset, eval_dataset, **keywords):
        prepare = functools.partial(
            _prepared, named=named, script=script, examples=examples, checks_answers=checks_answers
        )
        train_dataset = prepare(*take_slice(train_dataset, train_slice), use="training")
        if eval_dataset is not None:
            eval_dataset = prepare(*take_slice(eval_dataset, test_slice), use="evaluation")
        check_dataset_sizes(config, train_dataset, eval_dataset)
        if script.problems and hasattr(train_dataset, "__len__") and not config.process_index:
            if eval_dataset is not None:
                _warn_of_shared(train_dataset, eval_dataset)
            held_out = f", {len(eval_dataset)} to evaluate on" if eval_dataset is not None else ""
            shown = f", {counted(len(examples) // 2, 'worked example')} before each" if examples else ""
            print(f"{counted(len(train_dataset), 'problem')} to train on{held_out}{shown}", flush=True)
        try:
            trainer = A3POTrainer(train_dataset=train_dataset, eval_dataset=eval_dataset, **keywords)
        except SafetensorError as error:
            names = filter(None, [model.model_name_or_path, script.reward_model_name_or_path])
            raise UsageError(
                f"Cannot load the model {' or '.join(map(repr, names))}: a file of its weights is damaged: {error}. "
                "Copy or download it again."
            ) from error
        if script.problems:
            check_prompts(trainer, train_dataset, eval_dataset)
        # The script of TRL 1.0 does not pass the option on.
        resumed = functools.partial(trainer.train, resume_from_checkpoint=config.resume_from_checkpoint)
        trainer.train = resumed  # type: ignore[method-assign]
        trainers.append(trainer)
        return trainer

    try:
        _check_reward_names(script.reward_funcs)
        with trains_with(make_trainer):
            grpo.main(script, config, model, mixture)
    except (OSError, ValueError, ImportError, KeyError, RuntimeError, DatasetGenerationError) as error:
        if trainers and trainers[0].state.max_steps > 0 and not isinstance(error, BeyondTheEndError):
            raise  # training had begun, and the traceback says where it failed
        message = _usage_message(error, script, mixture)
        if message is None:
            raise
        raise UsageError(message) from error
    trainers[0].save_state()  # for `trl-a3po report`


@contextmanager
def trains_with(make_trainer: Callable[..., A3POTrainer]) -> Iterator[None]:
    """
    In this context, TRL's scripts get the given function in place of `trl.GRPOTrainer`, which they import when they
    run. A GRPOTrainer that is made in another way is refused before it trains.

    Raises:
        `RuntimeError`: the script makes a GRPOTrainer of its own, or no trainer at all.
    """
    refusal = (
        f"`trl-a3po train` does not work with TRL {trl.__version__}: its script does not import its trainer from "
        "`trl.GRPOTrainer` when it runs, so it would train with GRPO. Use another release of TRL, or a script of "
        "your own with `A3POTrainer`."
    )
    original, original_init = trl.GRPOTrainer, trl.GRPOTrainer.__init__
    made = False

    def make(*positional, **keywords):
        nonlocal made
        made = True
        return make_trainer(*positional, **keywords)

    def refuse(self, *positional, **keywords):
        if not isinstance(self, A3POTrainer):
            raise RuntimeError(refusal)
        original_init(self, *positional, **keywords)

    trl.GRPOTrainer, original.__init__ = make, refuse  # type: ignore[assignment, misc, method-assign]
    try:
        yield
    finally:
        trl.GRPOTrainer, original.__init__ = original, original_init  # type: ignore[misc, method-assign]
    if not made:
        raise RuntimeError(refusal)


def _prepared(
    dataset: Any,
    row_numbers: Sequence[int] | None,
    named: str,
    script: A3POScriptArguments,
    examples: list[Message],
    checks_answers: bool,
    use: str,
) -> Any:
    """The dataset in TRL's columns. Warns about unscorable problems, and about worked examples in the training."""
    if not script.problems:
        if "prompt" not in (dataset.column_names or ["prompt"]):  # a stream may not know its columns
            raise UsageError(
                f"The dataset has the columns {dataset.column_names}, but no `prompt`. If it has problems with "
                "checkable answers, pass `--problems`."
            )
        return dataset
    dataset = to_prompt_and_solution(
        dataset, script.instruction, examples, name=f"the problems for {use}{named}", row_numbers=row_numbers
    )
    if not hasattr(dataset, "__len__"):
        return dataset
    if use == "evaluation":
        check_no_overlap(dataset, examples, "to evaluate on")
    elif found := overlap(dataset, examples):
        logger.warning(
            "%d of %d problems for training are worked examples too, whose solutions their prompts contain: %s.",
            len(found),
            len(dataset),
            listed_rows([row for row, _, _ in found]),
        )
    if checks_answers:
        check_parseable(dataset, use)
    return dataset.remove_columns("row")  # rewards would get it


def _warn_of_shared(train_dataset: Any, eval_dataset: Any) -> None:
    if shared := rows_in_both(eval_dataset, train_dataset):
        logger.warning(
            "%d of %d rows to evaluate on have a problem that is trained on too: the dataset repeats problems, or the "
            "two splits share them.",
            len(shared),
            len(eval_dataset),
        )


def _check_reward_names(names: Sequence[str]) -> None:
    """Imports the rewards that are given by their path, as TRL's script will do."""
    paths = [name.rpartition(".") for name in names if "." in name]
    if paths:
        sys.path.insert(0, os.getcwd())
    for module, _, function in paths:
        try:
            imported = importlib.import_module(module)
        except ImportError as error:
            raise UsageError(
                f"`reward_funcs` names '{module}.{function}', but the module '{module}' cannot be imported: {error}."
            ) from error
        if not hasattr(imported, function):
            raise UsageError(f"`reward_funcs` names '{function}', but the module '{module}' has no such function.")


def _usage_message(error: Exception, script: A3POScriptArguments, mixture: DatasetMixtureConfig) -> str | None:
    """A message that tells the user how to fix an error before training; `None` if the error is a defect."""
    names = script.dataset_name or ", ".join(str(each.data_files or each.path) for each in mixture.datasets)
    if isinstance(error, RuntimeError) and not isinstance(error, NotImplementedError):
        return _one_line(error) if "Dataset scripts" in str(error) else None
    if isinstance(error, DatasetGenerationError):
        return unreadable(names, error)
    if isinstance(error, KeyError):
        split = error.args[0] if error.args else None
        if split not in (script.dataset_train_split, script.dataset_test_split):
            return None
        option = "train" if split == script.dataset_train_split else "test"
        known = get_dataset_split_names(names, script.dataset_config) if script.dataset_name else ["train"]
        return (
            f"The dataset '{names}' has no split '{split}', only {', '.join(known)}. Name one of them with "
            f"`--dataset_{option}_split`, or hold out rows of the training split with `--test_split_size 0.1`."
        )
    # `datasets` names its own argument, and says how many rows there are.
    refused_split = re.search(r"(?:number of samples |n_samples=)(\d+)", str(error))
    if refused_split and mixture.test_split_size is not None:
        return (
            f"`test_split_size={mixture.test_split_size}` leaves no rows to train on: the dataset '{names}' has "
            f"{refused_split[1]} in all. Pass a smaller one."
        )
    return _one_line(error)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())


if __name__ == "__main__":
    try:
        train()
    except UsageError as usage_error:
        if int(os.environ.get("RANK", "0")):
            time.sleep(30)  # the main process prints the same message, and the launcher then ends this one
        print(f"trl-a3po train: error: {usage_error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal and the launcher both send it
        sys.exit(128 + signal.SIGINT)
