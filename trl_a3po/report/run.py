"""Reads the directory of a run: metrics over time, and completions token by token."""

import functools
import logging
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise, takewhile
from pathlib import Path
from typing import Any, TypeVar

from ..training.checkpoint_files import STATE_FILE, checkpoints_in, continues, is_marked, read_state
from ..training.token_log_format import MAX_LINE_BYTES, TOKENS_FILE, LoggedCompletion, is_number
from .findings import Finding, find
from .training_log import Log


logger = logging.getLogger(__name__)

# Limits for a long run. Points and steps are evenly spaced.
MAX_POINTS = 1000
MAX_TOKENS_SHOWN = 200_000

# What a log has besides metrics. The summary of the whole training is logged with metrics of the last step.
_NOT_METRICS = ("step", "epoch", "total_flos")
_SUMMARY = "train_"
_Item = TypeVar("_Item")


class ReportError(Exception):
    """There is nothing to report: the message says why."""


@dataclass(frozen=True)
class Run:
    """
    The logged data of a run.

    Args:
        directory (`Path`): Directory of the run.
        metrics (`dict[str, list[tuple[int, float]]]`): By name, values at optimizer steps, at most `MAX_POINTS`.
        completions (`list[LoggedCompletion]`): Completions of some steps, in the order of the log.
        logged_steps (`int`): Number of steps with logged completions.
        unreadable_lines (`int`): Number of unreadable lines of the token log.
        findings (`list[Finding]`, *optional*): What is wrong with the run; `None` if its log is too short to tell.
    """

    directory: Path
    metrics: dict[str, list[tuple[int, float]]]
    completions: list[LoggedCompletion]
    logged_steps: int
    unreadable_lines: int
    findings: list[Finding] | None


def read_run(directory: Path, steps: Sequence[int] | None = None) -> Run:
    """
    Reads the directory of a run of `A3POTrainer` or `GRPOTrainer`.

    Args:
        directory (`Path`): The `output_dir` of the run, or one of its checkpoints.
        steps (sequence of `int`, *optional*):
            The steps whose completions are read; by default as many as `MAX_TOKENS_SHOWN` allows.

    Raises:
        `ReportError`: nothing was logged there.
    """
    if not directory.is_dir():
        raise ReportError(f"There is no directory '{directory}'. Pass the `output_dir` of a run.")
    (state, torn), tokens = _newest_state(directory), directory / TOKENS_FILE
    if state is None and not tokens.is_file():
        raise ReportError(
            f"'{torn[0]}' is incomplete, or not the state of a trainer."
            if torn
            else f"'{directory}' contains no log of a run (looked for {STATE_FILE}, checkpoint-N/{STATE_FILE} and "
            f"{TOKENS_FILE}). Call `trainer.save_state()` when training is done, or save checkpoints."
        )
    for path in torn:
        logger.warning("warning: skipping '%s', which is incomplete.", path)
    tokens_of_step: Counter[int] = Counter()
    unreadable = 0
    for completion in _read_completions(tokens):
        if completion is None:
            unreadable += 1
        else:
            tokens_of_step[completion.step] += len(completion.tokens) + 1
    if steps is None:
        steps = _evenly(sorted(tokens_of_step), MAX_TOKENS_SHOWN // max(tokens_of_step.values(), default=1))
    chosen = set(steps)
    completions = [each for each in _read_completions(tokens) if each and each.step in chosen]
    findings: list[Finding] | None = find(state["log_history"]) if state else []
    if not findings and not (state and Log(state["log_history"]).is_long_enough()):
        findings = None
    return Run(directory, _metrics(state), completions, len(tokens_of_step), unreadable, findings)


def _newest_state(directory: Path) -> tuple[dict[str, Any] | None, list[Path]]:
    """
    The state that covers most of the last run, and the later states that are skipped because a kill has damaged them.

    A damaged state is also skipped if it has no mark, because GRPOTrainer makes no marks. The state before it lacks
    only the metrics of the last steps.

    An earlier run may have left checkpoints of higher steps. The file that was written last is of the last run, and so
    is every state whose log continues its log. The second also finds the longest state where files were copied.
    """
    checkpoints = checkpoints_in(directory)
    read = functools.cache(lambda path: read_state(path / STATE_FILE))
    # A marked checkpoint may be from an earlier run. It is used only if there is no other.
    last = next((path for path in sorted(checkpoints, key=is_marked) if read(path)), None)
    passed_over = [path / STATE_FILE for path in takewhile(lambda path: path != last, checkpoints)]
    youngest = max((path for path in checkpoints if not is_marked(path)), key=_written_at, default=None)
    paths = sorted({path for path in (directory, last, youngest) if path}, key=_written_at, reverse=True)
    states = [state for path in paths if (state := read(path))]
    if read(directory) is None:
        passed_over.insert(0, directory / STATE_FILE)
    of_last_run = [state for state in states if continues(state["log_history"], states[0]["log_history"])]
    state = max(of_last_run, key=lambda state: state["global_step"], default=None)
    return state, [path for path in passed_over if path.exists()]


def _written_at(directory: Path) -> float:
    path = directory / STATE_FILE
    return path.stat().st_mtime if path.is_file() else -math.inf


def _metrics(state: dict[str, Any] | None) -> dict[str, list[tuple[int, float]]]:
    by_name: dict[str, dict[int, float]] = {}
    for entry in state["log_history"] if state else ():
        if isinstance(entry, dict) and is_number(entry.get("step")):
            for name, value in entry.items():
                if name not in _NOT_METRICS and not name.startswith(_SUMMARY) and is_number(value):
                    by_name.setdefault(name, {})[int(entry["step"])] = value
    if speed := _tokens_per_second(by_name):
        by_name["tokens per second"] = speed
    return {name: _evenly(sorted(values.items()), MAX_POINTS) for name, values in sorted(by_name.items())}


def _tokens_per_second(by_name: dict[str, dict[int, float]]) -> dict[int, float]:
    """Tokens of prompts and completions per second since the log before. TRL logs the mean time of a step."""
    seconds, tokens = by_name.get("step_time", {}), by_name.get("num_tokens", {})
    steps = sorted(seconds.keys() & tokens.keys())
    return {
        step: (tokens[step] - tokens[before]) / (seconds[step] * (step - before))
        for before, step in pairwise(steps)
        if seconds[step] > 0 and tokens[step] >= tokens[before]
    }


def _read_completions(path: Path) -> Iterator[LoggedCompletion | None]:
    """The lines of a token log; `None` for unreadable lines."""
    if not path.is_file():
        return
    with path.open("rb") as file:
        while line := file.readline(MAX_LINE_BYTES):
            if len(line) == MAX_LINE_BYTES and not line.endswith(b"\n"):
                while (rest := file.readline(MAX_LINE_BYTES)) and not rest.endswith(b"\n"):
                    pass
            try:
                yield LoggedCompletion.from_line(line)
            except ValueError:
                yield None


def _evenly(items: Sequence[_Item], most: int) -> list[_Item]:
    """At most `most` of the items, evenly spaced, with the first and the last; at least two if there are two."""
    most = max(2, most)
    if len(items) <= most:
        return list(items)
    last = len(items) - 1
    return [items[round(i * last / (most - 1))] for i in range(most)]
