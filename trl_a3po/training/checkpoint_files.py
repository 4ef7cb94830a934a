"""
Checkpoints as files: which there are, which are whole, which to delete.

A checkpoint is whole unless its mark, `checkpoint-12.incomplete`, is beside it. While the checkpoint of a step is
written for a second time, the first one waits as `checkpoint-12.previous`. transformers does not take either name for
a checkpoint, and does not push it to the Hub.

This module imports neither torch nor transformers, because the report reads checkpoints too.
"""

import errno
import functools
import json
import logging
import os
import re
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any


STATE_FILE = "trainer_state.json"
PREVIOUS = ".previous"
_NAME = re.compile(r"checkpoint-\d+(\.previous)?")

logger = logging.getLogger(__name__)


def mark_of(checkpoint: Path) -> Path:
    """The file that exists while the checkpoint is not whole."""
    return checkpoint.with_name(f"{checkpoint.name}.incomplete")


def is_marked(checkpoint: Path) -> bool:
    """Whether the checkpoint was not written, or not deleted, to the end. The path may be relative, or a link."""
    return any(mark_of(Path(path)).exists() for path in (os.path.abspath(checkpoint), os.path.realpath(checkpoint)))


def is_whole(checkpoint: Path) -> bool:
    """Whether a trainer can resume from it. GRPOTrainer makes no mark, but writes the state last."""
    return not is_marked(checkpoint) and read_state(checkpoint / STATE_FILE) is not None


def read_state(path: Path) -> dict[str, Any] | None:
    """
    The state of a trainer, or `None` if the file is missing, torn, or something else.

    Raises:
        `OSError`: the file is there, but cannot be read.
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
    """All checkpoints, whole or not, the highest step first; then those that wait, which are to be replaced."""
    paths = [path for path in directory.glob("checkpoint-*") if _NAME.fullmatch(path.name) and path.is_dir()]
    return sorted(paths, key=lambda path: (not _waits(path), _step(path)), reverse=True)


def previous_of(checkpoint: Path) -> Path:
    """Where the earlier checkpoint of the same step waits while this one is written."""
    return checkpoint.with_name(checkpoint.name + PREVIOUS)


def put_back(directory: Path) -> None:
    """
    Gives the last whole checkpoint its name again if a kill, while it was overwritten, has left no other whole one.

    Raises:
        `OSError`: a file cannot be renamed or deleted.
    """
    last = next(filter(is_whole, checkpoints_in(directory)), None)
    if last is not None and _waits(last):
        checkpoint = last.with_suffix("")
        delete(checkpoint)
        last.rename(checkpoint)


def outdated(newest: Path, limit: int, best: Path | None = None) -> list[Path]:
    """
    The checkpoints to delete once a new one is whole.

    As in transformers, the newest, the best and the most recent others stay. Those that are not whole are all
    deleted. A higher step than the newest is from an earlier run, and less recent than any lower step.

    Args:
        newest (`Path`): The last checkpoint of this run. It is whole.
        limit (`int`): How many checkpoints stay, at least 1. The best one stays in any case.
        best (`Path`, *optional*): The best checkpoint.

    Returns:
        `list[Path]`: directories beside `newest`; of some there may only be the mark.
    """
    kept = {path.resolve() for path in (newest, best) if path and path.is_dir()}
    others = [path for path in checkpoints_in(newest.parent) if path.resolve() not in kept]
    useless = [path for path in others if _waits(path) or is_marked(path)]
    # After a kill there may be a mark and no directory.
    useless += [path for path in _marked_in(newest.parent) if not path.exists()]
    recent_last = sorted(set(others) - set(useless), key=lambda path: (_step(path) < _step(newest), _step(path)))
    surplus = len(kept) + len(recent_last) - limit
    return useless + recent_last[: max(0, surplus)]


def delete(checkpoint: Path) -> None:
    """Deletes a checkpoint, marked until all of it is gone. As transformers does, it leaves what it may not delete."""
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
    Returns when a file or directory is on the disk. For a directory, these are the names in it.

    Warns once where the file system, or the user's permissions, do not allow to wait for that.

    Raises:
        `OSError`: what was written is lost, for example because the disk is full.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY)  # to flush a file needs no permission to write
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
        "Cannot wait until a checkpoint is on the disk (%s). After a power failure, the last one may not be whole.",
        reason,
    )


def _marked_in(directory: Path) -> list[Path]:
    return [mark.with_suffix("") for mark in directory.glob("checkpoint-*.incomplete")]


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("checkpoint-").removesuffix(PREVIOUS))


def _waits(checkpoint: Path) -> bool:
    return checkpoint.suffix == PREVIOUS
