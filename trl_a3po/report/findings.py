"""[`find`]: what is wrong with a run, from its log alone. [`RULES`] says what is looked for."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from textwrap import fill
from typing import Any

from .rules import RULES
from .text import visible
from .training_log import Log


@dataclass(frozen=True)
class Finding:
    """
    One thing that is wrong with a run.

    Args:
        name (`str`): The name of the rule.
        metric (`str`): The metric that shows it.
        since (`int`): The first optimizer step at which it holds.
        seen (`str`): The figures.
        means (`str`): Why that matters.
        change (`str`): Which options to change.
    """

    name: str
    metric: str
    since: int
    seen: str
    means: str
    change: str


def find(log_history: Iterable[Any]) -> list[Finding]:
    """
    The findings on a run, in the order of the table; none if the run is healthy.

    Args:
        log_history (iterable of `dict`):
            The logs, as in `trainer.state.log_history` of `A3POTrainer` or `GRPOTrainer`. Other entries are passed
            over.

    Returns:
        `list[Finding]`: Symptoms of another finding are left out.

    Example:

    ```python
    >>> from trl_a3po.report.findings import find

    >>> [finding] = find([{"step": step, "learning_rate": 0.0, "grad_norm": 1.0} for step in range(1, 11)])
    >>> finding.name
    'learning rate at 0'
    ```
    """
    log = Log(log_history)
    found = [(rule, seen) for rule in RULES if (seen := rule.check(log, rule.bound)) is not None]
    hidden: set[str] = set()
    findings = []
    for rule, seen in found:
        if rule.name not in hidden:
            findings.append(Finding(rule.name, seen.metric, seen.since, seen.text, rule.means, rule.change))
            hidden.update(rule.hides)
    return findings


def as_text(name: str, findings: Sequence[Finding] | None) -> str:
    """The findings on a run, for a terminal. Names that a user gave to reward functions are made safe."""
    if findings is None:
        return f"{name}: too few logs to tell what is wrong"
    if not findings:
        return f"{name}: no findings"
    lines = [f"{name}: {len(findings)} finding{'s' if len(findings) > 1 else ''}"]
    for finding in findings:
        lines.append(f"\n  {finding.name}, since step {finding.since}")
        for text in (f"Seen: {visible(finding.seen)}.", f"Meaning: {finding.means}", f"Change: {finding.change}"):
            lines.append(fill(text, 100, initial_indent="    ", subsequent_indent="      ", break_on_hyphens=False))
    return "\n".join([*lines, ""])
