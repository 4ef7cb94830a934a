"""[`write_report`]: the report on runs as one self-contained HTML file."""

import base64
import hashlib
import json
import os
import re
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from importlib import resources
from os import PathLike
from pathlib import Path
from typing import Any

from .. import __version__
from .run import Run, read_run
from .text import names_of, visible


_START = b"<!doctype html>"


def write_report(run_dirs: Sequence[str | PathLike[str]], path: str | PathLike[str]) -> Path:
    """
    Writes a report on one or more runs: metrics of all runs in the same charts, and completions token by token.

    The file is self-contained: it opens from disk and loads nothing. It shows up to 1000 points of each metric, and
    completions with up to 200,000 tokens of each run, from evenly spaced steps.

    Args:
        run_dirs (sequence of `str` or `PathLike`): The `output_dir` of each run.
        path (`str` or `PathLike`): The file to write.

    Returns:
        `Path`: the absolute path of the file.

    Raises:
        `ReportError`: one of the directories contains no log.
        `ValueError`: `path` exists and is no page, its directory does not exist, or a run was given twice.
    """
    return write_page([read_run(Path(directory)) for directory in run_dirs], path)


def write_page(runs: Sequence[Run], path: str | PathLike[str]) -> Path:
    """Writes the report on runs that were read, as [`write_report`] does."""
    names = names_of([run.directory for run in runs])
    data = {"version": __version__, "runs": [_plain(run, name) for run, name in zip(runs, names, strict=True)]}
    return save_page(_fill_in(_template(), data), path)


def check_page(path: str | PathLike[str]) -> None:
    """
    Raises:
        `OSError`, `ValueError`: no page can be written there: it is a directory or a file that is no page, or its
            directory does not exist.
    """
    path = Path(path).absolute()
    if path.is_dir():
        raise ValueError(f"A page is a file, but '{path}' is a directory. Name a file in it.")
    if not path.resolve().parent.is_dir():
        raise ValueError(f"There is no directory '{path.parent}' to write '{path.name}' into. Make it first.")
    if path.is_file():
        with path.open("rb") as file:
            if file.read(len(_START)).lower() not in (b"", _START):
                raise ValueError(f"'{path}' exists and is no HTML page. Choose another file, or delete it.")


def save_page(html: str, path: str | PathLike[str]) -> Path:
    """
    Writes a page as a whole, or not at all.

    Returns:
        `Path`: the absolute path of the file.

    Raises:
        `OSError`, `ValueError`: as [`check_page`].
    """
    check_page(path)
    path = Path(path).absolute()
    target = path.resolve()  # a link stays a link
    if path.is_relative_to("/dev") or (target.exists() and not target.is_file()):
        path.write_text(html, encoding="utf-8", newline="\n")
        return path
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(html, encoding="utf-8", newline="\n")
        if target.exists():
            shutil.copymode(target, temporary)
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def _template() -> str:
    return resources.files(__package__).joinpath("template.html").read_text(encoding="utf-8")


def _fill_in(template: str, data: dict[str, Any]) -> str:
    # A browser may run only the scripts, and apply only the styles, of the template. The policy names them by their
    # hashes.
    sources = [
        f"{kind}-src {' '.join(map(_hash, re.findall(f'<{tag}>(.*?)</{tag}>', template, flags=re.DOTALL)))}"
        for kind, tag in (("script", "script"), ("style", "style"))
    ]
    policy = "; ".join(["default-src 'none'", *sources, "base-uri 'none'", "form-action 'none'"])
    # "<" is escaped in JSON strings, so that nothing in the data can end the element around it.
    embedded = json.dumps(data, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    before, _, after = template.replace("{{policy}}", policy, 1).partition("{{data}}")
    return f"{before}{embedded}{after}"


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _plain(run: Run, name: str) -> dict[str, Any]:
    return {
        "name": visible(name),
        "metrics": {visible(metric): points for metric, points in run.metrics.items()},
        "completions": [
            {**asdict(each), "prompt": visible(each.prompt), "tokens": [visible(token) for token in each.tokens]}
            for each in run.completions
        ],
        "logged_steps": run.logged_steps,
        "unreadable_lines": run.unreadable_lines,
        "findings": None
        if run.findings is None
        else [{**asdict(each), "metric": visible(each.metric), "seen": visible(each.seen)} for each in run.findings],
    }
