"""Checks for the commands that train: what `transformers` finds only later, or never."""

import math
from typing import Any, cast

import torch
from transformers import PreTrainedModel, SchedulerType, get_scheduler
from transformers.integrations import get_reporting_integration_callbacks

from ..a3po_config import A3POConfig
from ..a3po_trainer import A3POTrainer
from ..evaluation.models import Chat


def check_schedule(config: A3POConfig) -> None:
    """
    Checks the length of the training, and makes the schedule of the learning rate once, because `transformers` makes
    it only when training begins.

    Raises:
        `ValueError`: the training has no steps, or the schedule cannot be made. The message names the options.
    """
    _check_length(config)
    if not math.isfinite(config.learning_rate):
        raise ValueError(
            f"`learning_rate` must be a finite number, got {config.learning_rate}. Pass for example 1e-6."
        )
    kind, settings = SchedulerType(config.lr_scheduler_type), cast(Any, config.lr_scheduler_kwargs)
    try:
        optimizer = torch.optim.SGD([torch.zeros(1)], config.learning_rate)
        get_scheduler(kind, optimizer, 1, num_training_steps=10**9, scheduler_specific_kwargs=settings)
    except (TypeError, ValueError, ZeroDivisionError) as error:
        raise ValueError(
            f"`learning_rate={config.learning_rate}` with `lr_scheduler_type='{kind.value}'` and "
            f"`lr_scheduler_kwargs={settings}` does not work: {error}"
        ) from error


def _check_length(config: A3POConfig) -> None:
    """`transformers` accepts a training of no steps, and any negative `max_steps`. A3POConfig does so, too."""
    if config.max_steps < -1 or config.max_steps == 0:
        raise ValueError(
            "`max_steps` must be a number of steps, 1 or more, or -1 for a length in epochs (`num_train_epochs`), got "
            f"{config.max_steps}."
        )
    if config.max_steps == -1 and not 0 < config.num_train_epochs < math.inf:
        raise ValueError(
            f"`num_train_epochs` must be a number above 0, got {config.num_train_epochs}. Or pass `--max_steps` for a "
            "length in steps."
        )


def check_libraries(config: A3POConfig) -> None:
    """
    Looks for the trackers and the optimizer's library, which `transformers` loads after the model.

    Raises:
        `ValueError`: one is missing. The message names the option.
    """
    try:
        for callback in get_reporting_integration_callbacks(config.report_to):
            callback()
    except (ImportError, RuntimeError, ValueError) as error:
        raise ValueError(f"`report_to={config.report_to}` does not work: {error}") from error
    try:
        A3POTrainer.get_optimizer_cls_and_kwargs(config)
    except ImportError as error:
        raise ValueError(f"`optim='{cast(Any, config.optim).value}'` does not work: {error}") from error
    except (ValueError, NotImplementedError):
        pass  # it needs the model; the trainer says what is wrong


def check_prompts(trainer: A3POTrainer, *datasets: Any) -> None:
    """
    Tries the chat template on the problems, because a trainer does so only at the step that draws them. Streams are
    not checked.

    Raises:
        `ValueError`: there is no chat template, or it refuses a prompt.
    """
    config = cast(PreTrainedModel, trainer.model).config
    chat = Chat.of(cast(Any, trainer.processing_class), config, None, cast(Any, trainer.args.chat_template_kwargs))
    for dataset in datasets:
        if hasattr(dataset, "__len__"):
            chat.check(dataset["prompt"])
