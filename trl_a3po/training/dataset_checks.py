"""Checks that datasets are large enough for TRL's batches, and streams for a step."""

from collections.abc import Mapping, Sized
from typing import Any, cast

from torch.utils.data import IterableDataset
from transformers import TrainerCallback

from ..a3po_config import A3POConfig


def check_dataset_sizes(args: A3POConfig, train_dataset: Any, eval_dataset: Any = None) -> None:
    """
    Refuses datasets that do not fill one batch.

    In training, TRL drops the last prompts of an epoch if they do not fill a generation batch of all processes. If the
    dataset is smaller than that batch, TRL drops everything. In evaluation it drops nothing, unless
    `dataloader_drop_last` is set.

    Args:
        args ([`A3POConfig`]):
            Its `generation_batch_size` counts completions, over all processes.
        train_dataset (`datasets.Dataset` or `torch.utils.data.Dataset`, *optional*):
            One prompt per row. Streams are not checked, because their length is unknown.
        eval_dataset (the same, or a dictionary of them, *optional*):
            Likewise.

    Raises:
        `ValueError`: a dataset has too few rows. The message names the sizes and the fix.
    """
    # Never None once constructed.
    generations, batch_size = cast(int, args.num_generations), cast(int, args.generation_batch_size)
    prompts = batch_size // generations  # as TRL's RepeatSampler
    rows = _length(train_dataset)
    if rows is not None and rows < prompts:
        raise ValueError(
            f"The training dataset has {_rows(rows)}, fewer than the {prompts} prompts of a generation batch "
            f"(`generation_batch_size={batch_size}` completions, `num_generations={generations}`), so "
            f"there is nothing to train on. Use at least {prompts} rows, or lower `per_device_train_batch_size`, "
            "`steps_per_generation` (by default `gradient_accumulation_steps`) or `generation_batch_size`."
        )
    named = eval_dataset if isinstance(eval_dataset, Mapping) else {"": eval_dataset}
    for name, dataset in named.items():
        rows = _length(dataset)
        if rows is None:
            continue
        label = f"evaluation dataset '{name}'" if name else "evaluation dataset"
        if rows == 0:
            raise ValueError(f"The {label} has no rows.")
        batch = args.per_device_eval_batch_size * args.world_size
        completions = rows * (getattr(args, "num_generations_eval", None) or generations)
        if args.dataloader_drop_last and completions < batch:
            raise ValueError(
                f"The {label} has {_rows(rows)}, which give {completions} completions, fewer than an evaluation batch "
                f"of {batch}. `dataloader_drop_last=True` drops them all. Set it to `False`, or lower "
                "`per_device_eval_batch_size`."
            )


class ChecksProgress(TrainerCallback):
    """
    Ends a training whose stream is shorter than an optimizer step: transformers would begin it again and again.

    Raises:
        `ValueError`: two epochs without a step. The first after resuming may have none, because it skips prompts.
    """

    _step, _empty_epochs = -1, 0

    def on_train_begin(self, args, state, control, **kwargs):
        self._empty_epochs = 0

    def on_epoch_begin(self, args, state, control, **kwargs):
        self._step = state.global_step

    def on_epoch_end(self, args, state, control, **kwargs):
        self._empty_epochs = self._empty_epochs + 1 if state.global_step == self._step else 0
        if self._empty_epochs > 1 and not control.should_training_stop:
            raise ValueError(
                "The training data ended before an optimizer step was complete, and again after it began anew. Use "
                "more rows, or lower `gradient_accumulation_steps`, `steps_per_generation` or "
                "`per_device_train_batch_size`."
            )


def _length(dataset: Any) -> int | None:
    return len(dataset) if isinstance(dataset, Sized) and not isinstance(dataset, IterableDataset) else None


def _rows(count: int) -> str:
    return f"{count} row" if count == 1 else f"{count} rows"
