"""
Checkpoints as files: which exist, which are complete, which to delete.

A checkpoint is complete unless its mark, `checkpoint-12.incomplete`, is beside it. While the checkpoint
of a step is written for a second time, the first one is kept as `checkpoint-12.previous`. transformers does not treat
either name as a checkpoint, and does not push it to the Hub.

This module imports neither torch nor transformers, because the report reads checkpoints too.
"""

import errno
import functools
import json
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any


STATE_FILE = "trainer_state.json"
# The runs whose training a checkpoint has, the last one last. GRPOTrainer does not write it.
RUNS_FILE = "runs.json"
PREVIOUS = ".previous"
_NAME = re.compile(r"checkpoint-[0-9]+(\.previous)?")

logger = logging.getLogger(__name__)


def mark_of(checkpoint: Path) -> Path:
    """The file that exists while the checkpoint is not complete."""
    return checkpoint.with_name(f"{checkpoint.name}.incomplete")


def is_marked(checkpoint: Path) -> bool:
    """Whether the checkpoint was not completely written or not completely deleted. The path may be a link."""
    return any(mark_of(Path(path)).exists() for path in (os.path.abspath(checkpoint), os.path.realpath(checkpoint)))


def is_complete(checkpoint: Path) -> bool:
    """Whether it was written to its end. GRPOTrainer makes no mark, but it writes the state last."""
    return not is_marked(checkpoint) and read_state(checkpoint / STATE_FILE) is not None


def has_optimizer(checkpoint: Path) -> bool:
    """Whether it has the files from which transformers or DeepSpeed loads the optimizer and the schedule."""
    # transformers names all optimizer files, and folders of FSDP, after the optimizer, and loads none without the
    # schedule. DeepSpeed has one folder for both, and leaves only some schedules to transformers.
    of_transformers = any(checkpoint.glob("*optimizer*")) and (checkpoint / "scheduler.pt").exists()
    return of_transformers or any(checkpoint.glob("global_step*"))


def is_of_later_run(checkpoint: Path, higher: Path) -> bool:
    """
    Whether a complete checkpoint is from a run that was started anew after another complete one of a higher step.

    Then it was written later, and the higher one does not continue its run: by the names of the runs, or by the logs
    where these are not known. The times alone would be wrong for copies of checkpoints. Without a state, as in a copy
    for inference, nothing says so.
    """
    state, of_higher = checkpoint / STATE_FILE, higher / STATE_FILE
    if not (state.exists() and of_higher.exists()):
        return False
    if _waits(checkpoint) or state.stat().st_mtime <= of_higher.stat().st_mtime:
        return False
    runs, of_higher_runs = runs_of(checkpoint), runs_of(higher)
    if runs and of_higher_runs:
        return of_higher_runs[: len(runs)] != runs
    log, longer = ((read_state(path) or {}).get("log_history", []) for path in (state, of_higher))
    return not continues(longer, log)


def runs_of(checkpoint: Path) -> list[str]:
    """The runs whose training a checkpoint has: one, and one more for each resuming. Empty if they are not known."""
    with suppress(OSError, ValueError):
        runs = json.loads((checkpoint / RUNS_FILE).read_text(encoding="utf-8"))
        if isinstance(runs, list):
            return runs
    return []


def continues(log: Iterable[Any], earlier: Iterable[Any]) -> bool:
    """Whether the log of a state begins with that of another, apart from summaries at the end of a training."""
    # As text, because NaN is not equal to itself.
    texts, begin = ([text for each in one if "train_runtime" not in (text := repr(each))] for one in (log, earlier))
    return texts[: len(begin)] == begin


def check_writable(directory: Path) -> None:
    """
    Fails unless files can be created in the directory, which is created if it does not exist.

    Raises:
        `OSError`: naming the directory, the reason and the fix.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):
            pass
    except OSError as error:
        raise OSError(
            error.errno,
            f"Cannot write to `output_dir='{directory}'` ({error.strerror}). Name a directory in which you may "
            "create files.",
        ) from error


def read_state(path: Path) -> dict[str, Any] | None:
    """
    The state of a trainer; `None` if the file is missing, damaged, or not the state of a trainer.

    Raises:
        `OSError`: the file exists but cannot be read.
    """
    if not path.is_file():
        return None
    try:
        state = json.loads(path.read_bytes())
        is_state = isinstance(state["global_step"], int) and isinstance(state["log_history"], list)
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    return state if is_state else None


def checkpoints_in(directory: Path) -> list[Path]:
    """All checkpoints, complete or not, the highest step first; then the `.previous` ones, which will be replaced."""
    paths = [path for path in directory.glob("checkpoint-*") if _NAME.fullmatch(path.name) and path.is_dir()]
    return sorted(paths, key=lambda path: (not _waits(path), _step(path)), reverse=True)


def previous_of(checkpoint: Path) -> Path:
    """Where the earlier checkpoint of the same step is kept while this one is written."""
    return checkpoint.with_name(checkpoint.name + PREVIOUS)


def put_back(directory: Path) -> None:
    """
    Gives a `.previous` checkpoint its name back if a kill has left no other complete checkpoint.

    Raises:
        `OSError`: a file cannot be renamed or deleted.
    """
    last = next(filter(is_complete, checkpoints_in(directory)), None)
    if last is not None and _waits(last):
        checkpoint = last.with_suffix("")
        delete(checkpoint)
        last.rename(checkpoint)


def outdated(newest: Path, limit: int, best: Path | None = None) -> list[Path]:
    """
    The checkpoints to delete once a new one is complete.

    As in transformers, the newest, the best and the most recent others stay. All checkpoints that are not complete are
    deleted. A checkpoint of a higher step than the newest is from an earlier run. It counts as older than any of a
    lower step.

    Args:
        newest (`Path`): The last checkpoint of this run. It is complete.
        limit (`int`): How many checkpoints stay, at least 1. The best one stays in any case.
        best (`Path`, *optional*): The best checkpoint.

    Returns:
        `list[Path]`: directories beside `newest`. Some may exist only as a mark.
    """
    kept = {path.resolve() for path in (newest, best) if path and path.is_dir()}
    others = [path for path in checkpoints_in(newest.parent) if path.resolve() not in kept]
    useless = [path for path in others if _waits(path) or is_marked(path)]
    # After a kill there may be a mark without a directory.
    useless += [path for path in _marked_in(newest.parent) if not path.exists()]
    recent_last = sorted(set(others) - set(useless), key=lambda path: (_step(path) < _step(newest), _step(path)))
    surplus = len(kept) + len(recent_last) - limit
    return useless + recent_last[: max(0, surplus)]


def delete(checkpoint: Path) -> None:
    """Deletes a checkpoint, which is marked until it is gone. Like transformers, skips what it may not delete."""
    with suppress(OSError):  # a full disk may have no room for the mark
        mark_of(checkpoint).touch()
    if checkpoint.is_symlink():
        checkpoint.unlink()
    else:
        shutil.rmtree(checkpoint, ignore_errors=True)
    if not checkpoint.exists():
        mark_of(checkpoint).unlink(missing_ok=True)


def flush(path: Path) -> None:
    """
    Waits until a file, or the list of names in a directory, is on the disk.

    Warns once if the file system or the permissions of the user do not support this.

    Raises:
        `OSError`: written data is lost, for example because the disk is full.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY)  # flushing a file needs no permission to write
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        if error.errno in _LOST:
            raise
        _warn_unflushed(error.strerror)


# The errors of `fsync` that mean that bytes did not reach the disk.
_LOST = {errno.EIO, errno.ENOSPC, errno.EDQUOT}


@functools.cache
def _warn_unflushed(reason: str) -> None:
    logger.warning(
        "Cannot wait until a checkpoint is on the disk (%s). After a power failure, the last one may be incomplete.",
        reason,
    )


def _marked_in(directory: Path) -> list[Path]:
    return [mark.with_suffix("") for mark in directory.glob("checkpoint-*.incomplete")]


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("checkpoint-").removesuffix(PREVIOUS))


def _waits(checkpoint: Path) -> bool:
    return checkpoint.suffix == PREVIOUS
