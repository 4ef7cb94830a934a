"""
[`ResumableGRPOTrainer`]: a run that is killed, and resumed, is the run that was not.

transformers writes a checkpoint under its final name, and resumes from the one with the highest number, whatever is in
it. Killed in between, it stops at a file that is missing, or takes files of two runs, or of some processes, for whole.
So a file beside the checkpoint, `checkpoint-12.incomplete`, is there for as long as it is being written.
"""

import logging
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import takewhile
from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from transformers import TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from trl import GRPOTrainer


logger = logging.getLogger(__name__)


class ResumableGRPOTrainer(GRPOTrainer):
    """
    The part of [`A3POTrainer`] that is about resuming: from no checkpoint but a whole one, with the prompts that would
    have come next.
    """

    _resumed_from: str | None = None

    def train(self, resume_from_checkpoint=None, *args, **kwargs):
        output_dir = Path(self.args.output_dir)  # type: ignore[arg-type]  # never None once constructed
        self._resumed_from = checkpoint_to_resume_from(resume_from_checkpoint, output_dir, self.accelerator)
        return super().train(self._resumed_from, *args, **kwargs)

    def _save_checkpoint(self, model, trial):
        checkpoint = Path(self._get_output_dir(trial), f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}")
        with marked_incomplete(checkpoint, self.accelerator, marks=self.args.should_save):
            super()._save_checkpoint(model, trial)

    def _get_train_sampler(self, *args, **kwargs):
        sampler = super()._get_train_sampler(*args, **kwargs)
        if self._resumed_from:
            # It draws the order of each epoch when that begins. A new one would begin with that of the first again.
            state = TrainerState.load_from_json(os.path.join(self._resumed_from, TRAINER_STATE_NAME))
            for _ in range(int(state.epoch or 0)):
                next(iter(sampler), None)
        return sampler

    def get_batch_samples(self, *args, **kwargs):
        if self.state.global_step >= self.state.max_steps:
            # Resumed after the last step. Only at the end of a step does transformers look whether to stop.
            self.control.should_training_stop = True
            return [], None
        return super().get_batch_samples(*args, **kwargs)


def last_whole_checkpoint(output_dir: str | Path) -> str | None:
    """
    As transformers' `get_last_checkpoint`, but passes over checkpoints that were not written to the end.

    Args:
        output_dir (`str` or `Path`): Where the trainer saves its checkpoints.

    Returns:
        `str` or `None`: The path of the checkpoint, if there is one.
    """
    return next((str(path) for path in _latest_first(output_dir) if _is_whole(path)), None)


def checkpoint_to_resume_from(
    resume_from_checkpoint: str | bool | None, output_dir: str | Path, accelerator: Accelerator
) -> str | None:
    """
    What `Trainer.train` should resume from, given what it was asked to.

    The first process decides for all: on file systems shared over a network, others may see files of a while ago.

    Raises:
        `ValueError`: the checkpoint was not written to the end, or `True` was given and none was.
    """
    if resume_from_checkpoint is True:
        last = last_whole_checkpoint(output_dir)
        passed_over = [path.name for path in takewhile(lambda path: not _is_whole(path), _latest_first(output_dir))]
        (last,) = broadcast_object_list([last])
        if last is None:
            raise ValueError(
                f"There is no whole checkpoint in '{output_dir}' to resume from. Not written to the end: "
                f"{', '.join(passed_over) or 'none'}. To train from the start, leave out `resume_from_checkpoint`."
            )
        if passed_over and accelerator.is_main_process:
            logger.warning(
                "Resuming from '%s'. Not written to the end, and passed over: %s.", last, ", ".join(passed_over)
            )
        return last
    if resume_from_checkpoint and _mark(Path(resume_from_checkpoint)).exists():
        raise ValueError(
            f"'{resume_from_checkpoint}' was not written to the end. Pass `resume_from_checkpoint=True` to resume "
            "from the last checkpoint that was."
        )
    return resume_from_checkpoint or None


@contextmanager
def marked_incomplete(checkpoint: Path, accelerator: Accelerator, *, marks: bool) -> Iterator[None]:
    """
    Marks a checkpoint until all processes have written their part of it, and all of it is on the disk.

    After an error, or a kill, the mark stays until the checkpoint is written again.

    Args:
        checkpoint (`Path`): The directory that is written in the block. It need not exist yet.
        accelerator (`Accelerator`): That of the trainer. Every process must enter the block.
        marks (`bool`): Whether this process is the one that writes what is not split over processes.
    """
    if marks:
        checkpoint.parent.mkdir(parents=True, exist_ok=True)
        _mark(checkpoint).touch()
        _flush(_mark(checkpoint))
    accelerator.wait_for_everyone()
    yield
    accelerator.wait_for_everyone()
    if accelerator.is_local_main_process:
        for path in checkpoint.rglob("*"):
            if path.is_file():
                _flush(path)
    accelerator.wait_for_everyone()
    if marks:
        _mark(checkpoint).unlink()


def _mark(checkpoint: Path) -> Path:
    # A file, whose name transformers takes for no checkpoint, and leaves out of what it pushes to the Hub.
    return checkpoint.with_name(f"{checkpoint.name}.incomplete")


def _is_whole(checkpoint: Path) -> bool:
    # Without its state, the last file that GRPOTrainer writes, no trainer can resume from it.
    return not _mark(checkpoint).exists() and (checkpoint / TRAINER_STATE_NAME).exists()


def _latest_first(output_dir: str | Path) -> list[Path]:
    paths = Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*")
    numbered = [path for path in paths if re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-\d+", path.name) and path.is_dir()]
    return sorted(numbered, key=lambda path: int(path.name.removeprefix(f"{PREFIX_CHECKPOINT_DIR}-")), reverse=True)


def _flush(path: Path) -> None:
    with path.open("rb+") as file:
        os.fsync(file)
