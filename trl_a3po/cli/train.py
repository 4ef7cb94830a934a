r"""
Train a model with A3PO: what `trl grpo` is for GRPO, with its options, those of A3POConfig and of `accelerate launch`.

  trl-a3po train --model_name_or_path Qwen/Qwen2.5-1.5B --dataset_name openai/gsm8k --dataset_config main \
      --problems --output_dir gsm8k-a3po --accelerate_config fsdp2 --num_processes 8

All of them may stand in a YAML file (`--config`), with environment variables under `env:`.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import trl
from accelerate.commands.launch import launch_command, launch_command_parser
from trl import DatasetMixtureConfig, GRPOConfig, ModelConfig, TrlParser
from trl.cli.accelerate_config import resolve_accelerate_config_argument
from trl.scripts import grpo
from trl.scripts.utils import DatasetConfig

from ..a3po_config import A3POConfig
from ..a3po_trainer import A3POTrainer
from ..evaluation.problems import LOADERS, to_prompt_and_solution
from .main import parser_of


@dataclass
class A3POScriptArguments(grpo.GRPOScriptArguments):
    """
    Arguments of `trl-a3po train`: those of TRL's GRPO script, and how to read a dataset.

    Args:
        problems (`bool`, *optional*, defaults to `False`):
            Whether the dataset has problems with checkable answers, to be mapped to `prompt` and `solution` by
            [`~trl_a3po.evaluation.problems.to_prompt_and_solution`]. The reward is then `accuracy_reward`, unless
            another is named.
        instruction (`str`, *optional*):
            Appended to each of the problems.
    """

    problems: bool = field(
        default=False,
        metadata={
            "help": "Whether the dataset has problems with checkable answers, in columns as of GSM8K, MATH, AIME, "
            "DAPO-Math-17k or verl, to be mapped to `prompt` and `solution`. The reward is then `accuracy_reward`, "
            "unless another is named."
        },
    )
    instruction: str | None = field(
        default=None,
        metadata={"help": "Appended to each of the problems, such as 'Put your final answer within \\boxed{}.'"},
    )


def make_parser() -> TrlParser:
    parser = parser_of("train", __doc__, [A3POScriptArguments, A3POConfig, ModelConfig, DatasetMixtureConfig])
    _group(parser, "dataset and rewards", _names(A3POScriptArguments))
    _group(parser, "what A3POConfig adds to GRPOConfig", _names(A3POConfig) - _names(GRPOConfig))
    _group(parser, "model", _names(ModelConfig))
    _group(parser, "dataset mixture", _names(DatasetMixtureConfig))
    return parser


def _names(dataclass_type: Any) -> set[str]:
    return {each.name for each in fields(dataclass_type)}


def _group(parser: argparse.ArgumentParser, title: str, names: set[str]) -> None:
    """Has the help list some options under a title of their own."""
    listed = parser._optionals._group_actions
    parser.add_argument_group(title)._group_actions += [action for action in listed if action.dest in names]
    parser._optionals._group_actions = [action for action in listed if action.dest not in names]


def main(arguments: Sequence[str] | None = None) -> int:
    """Checks the arguments, and starts as many processes of [`train`] as they say, by `accelerate launch`."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    parser, launcher = make_parser(), launch_command_parser()
    try:
        *_, in_file, on_line = parser.parse_args_and_config(
            arguments, return_remaining_strings=True, separate_remaining_strings=True
        )
        for_launcher = [*resolve_accelerate_config_argument([*in_file, *on_line]), "--module", __name__]
    except (OSError, ValueError) as error:
        parser.error(str(error))
    known, unknown = launcher.parse_known_args(for_launcher)
    if unknown or known.training_script != __name__:
        parser.error(f"unrecognized arguments: {' '.join(unknown or [known.training_script])}")
    launch_command(launcher.parse_args([*for_launcher, *arguments]))
    return 0


def train(arguments: Sequence[str] | None = None) -> None:
    """Trains, in one of the processes that [`main`] starts."""
    # What is left over has been taken by the launcher.
    script, config, model, mixture, _ = make_parser().parse_args_and_config(arguments, return_remaining_strings=True)
    if script.problems and not (script.reward_funcs or script.reward_model_name_or_path):
        script.reward_funcs = ["accuracy_reward"]
    if config.resume_from_checkpoint == "True":  # otherwise it is a path
        config.resume_from_checkpoint = True
    path = Path(script.dataset_name or "")
    if path.suffix in LOADERS:
        mixture.datasets = [DatasetConfig(path=LOADERS[path.suffix], data_files=str(path), split="train")]
        script.dataset_name = None

    trainers = []

    def make_trainer(*, train_dataset, eval_dataset, **keywords):
        if script.problems:
            train_dataset = to_prompt_and_solution(train_dataset, script.instruction)
            eval_dataset = eval_dataset and to_prompt_and_solution(eval_dataset, script.instruction)
        elif "prompt" not in (train_dataset.column_names or ["prompt"]):  # of a stream they may not be known
            raise ValueError(
                f"The dataset has the columns {train_dataset.column_names}, and no `prompt`. If it has problems with "
                "checkable answers, pass `--problems`."
            )
        trainers.append(A3POTrainer(train_dataset=train_dataset, eval_dataset=eval_dataset, **keywords))
        return trainers[0]

    # TRL's script does the rest. It imports the trainer when it runs.
    trl.GRPOTrainer = make_trainer  # type: ignore[assignment, misc]
    grpo.main(script, config, model, mixture)
    trainers[0].save_state()  # for `trl-a3po report`


if __name__ == "__main__":
    train()
