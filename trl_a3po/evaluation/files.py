"""The files of one evaluation: one process writes them, and what is damaged is named."""

import hashlib
import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


RUN_FILE = "run.json"
SAMPLES_FILE = "samples.jsonl"
RESULTS_FILE = "results.json"
# What each line of `samples.jsonl` has: of the problem, and of each sample with its type.
OF_PROBLEM = {"problem", "prompt", "solution"}
OF_SAMPLES = {"completions": str, "tokens": int, "ended": bool, "correct": float | int | None}
# And the part of each sample that is scored, if it is not the whole.
ANSWERS = {"answers": str}


@contextmanager
def only_writer(directory: Path) -> Iterator[None]:
    """Refuses a second process that writes into the directory. The lock ends with its process, even by a kill."""
    with (directory / ".lock").open("a+", encoding="utf-8") as file:
        try:
            import fcntl

            # Not `flock`: the processes of an engine would inherit it, and could keep it after a kill of this one.
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            file.seek(0)
            raise ValueError(
                f"{file.read() or 'Another process'} is writing an evaluation into '{directory}'. Wait for its end, "
                "or choose another `output_dir`."
            ) from error
        except (ImportError, OSError):
            pass  # Windows, or a file system without locks
        file.truncate(0)
        file.write(f"Process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        yield


def read_samples(path: Path) -> list[dict[str, Any]]:
    """Reads the lines of the file. Removes the last line from the file if it was cut off."""
    if not path.exists():
        return []
    data = path.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    if whole != data:
        _replace(path, whole)
    return records_of(whole, path)


def records_of(data: bytes, path: Path) -> list[dict[str, Any]]:
    """
    Reads the lines of `samples.jsonl`.

    Raises:
        `ValueError`: a line is not what an evaluation writes.
    """
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        raise ValueError(
            f"'{path}' is damaged: it is not UTF-8 ({error}). Delete the file to sample again."
        ) from error
    records = []
    for number, line in enumerate(text.split("\n")[:-1], start=1):
        try:
            record = json.loads(line)
        except ValueError:
            record = None
        if not _is_record(record):
            raise ValueError(
                f"Line {number} of '{path}' is damaged: it is not a sample. Delete the file to sample again."
            )
        records.append(record)
    return records


def _is_record(value: Any) -> bool:
    if not isinstance(value, dict) or not value.keys() >= OF_PROBLEM | OF_SAMPLES.keys():
        return False
    number = len(value["correct"]) if isinstance(value["correct"], list) else 0
    of_samples = OF_SAMPLES | ANSWERS if "answers" in value else OF_SAMPLES
    return number > 0 and all(
        isinstance(value[name], list)
        and len(value[name]) == number
        and all(isinstance(each, kind) for each in value[name])
        for name, kind in of_samples.items()
    )


def read_object(path: Path, *parts: str, fix: str) -> dict[str, Any]:
    """
    Reads a JSON object of which some parts are objects too.

    Args:
        path (`Path`): The file.
        *parts (`str`): Names of the parts.
        fix (`str`): What the user can do if the file is damaged.

    Raises:
        `ValueError`: the file contains something else.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"'{path}' is damaged: it is not JSON ({error}). {fix}") from error
    if not isinstance(value, dict):
        raise ValueError(f"'{path}' is damaged: it is not a JSON object. {fix}")
    if missing := [part for part in parts if not isinstance(value.get(part), dict)]:
        raise ValueError(f"'{path}' is damaged: it has no {', '.join(missing)}. {fix}")
    return value


def hash_of_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hash_of_value(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def write_whole(path: Path, value: dict[str, Any]) -> None:
    _replace(path, (json.dumps(value, indent=2) + "\n").encode())


def _replace(path: Path, data: bytes) -> None:
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.write_bytes(data)
    temporary.replace(path)
