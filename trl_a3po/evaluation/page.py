"""Writes a comparison as one HTML file, which loads no other file and runs no code."""

from collections.abc import Sequence
from html import escape
from pathlib import Path

from ..report.page import save_page
from ..report.text import visible
from .compare import Pair, Problem, Result
from .metrics import Estimate, Solved


SHOWN = 100  # problems per pair of evaluations

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem;
  color: #1c2430; background: #fff; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.2rem; margin-top: 2.5rem; } h3 { font-size: 1rem; }
table { border-collapse: collapse; } th, td { padding: .25rem .8rem .25rem 0; text-align: left; }
th { font-weight: 600; } td { font-variant-numeric: tabular-nums; border-top: 1px solid #d9dee5; }
svg { display: block; } .note { color: #5a6472; }
.better { color: #12703c; } .worse { color: #a82a1e; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; background: #f3f5f8; padding: .6rem; }
summary { cursor: pointer; overflow-wrap: anywhere; }
@media (prefers-color-scheme: dark) { body { color: #dfe4ea; background: #14181d; } td { border-color: #333b45; }
  pre { background: #1d232b; } .better { color: #5fc98d; } .worse { color: #f08a7d; } .note { color: #9aa5b1; } }
"""


def write_page(results: Sequence[Result], pairs: Sequence[Pair], path: Path) -> Path:
    """Writes the comparison: the interval of each metric, the differences, and the problems that differ."""
    body = ["<h1>Evaluations compared</h1>", *_results(results)]
    for pair in pairs:
        body += _pair(pair)
    policy = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
    return save_page(
        "<!doctype html>\n"
        f'<html lang="en"><head><meta charset="utf-8"><meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width"><title>Evaluations compared</title>'
        f"<style>{STYLE}</style></head><body>\n" + "\n".join(body) + "\n</body></html>\n",
        path,
    )


def _shown(text: str) -> str:
    return escape(visible(text))


def _results(results: Sequence[Result]) -> list[str]:
    lines = ['<p class="note">Mean and 95 % interval over distinct problems.</p>']
    for name in dict.fromkeys(name for result in results for name in result.estimates):
        lines += [f"<h3>{escape(name)}</h3>", "<table>"]
        for result in results:
            if (value := result.estimates.get(name)) is not None:
                plot = _interval(value, 0.0, 1.0)
                lines.append(f"<tr><td>{_shown(result.name)}</td><td>{plot}</td><td>{value}</td></tr>")
        lines.append("</table>")
    return lines


def _interval(value: Estimate, left: float, right: float) -> str:
    """Draws an interval and its mean on an axis from `left` to `right`."""

    def x(number: float) -> str:
        return f"{5 + 290 * (number - left) / (right - left):.1f}"

    low, high = (value.mean if end is None else end for end in (value.low, value.high))
    return (
        f'<svg width="300" height="16" role="img" aria-label="{value}">'
        '<line x1="5" x2="295" y1="8" y2="8" stroke="currentColor" stroke-opacity=".2"/>'
        f'<line x1="{x(0)}" x2="{x(0)}" y1="1" y2="15" stroke="currentColor" stroke-opacity=".4"/>'
        f'<line x1="{x(low)}" x2="{x(high)}" y1="8" y2="8" stroke="currentColor" stroke-width="2"/>'
        f'<circle cx="{x(value.mean)}" cy="8" r="4" fill="currentColor"/></svg>'
    )


def _pair(pair: Pair) -> list[str]:
    first, second = _shown(pair.first.name), _shown(pair.second.name)
    values = [each.estimate for each in pair.differences.values()]
    reach = max(
        0.01, *(abs(end) for value in values for end in (value.mean, value.low, value.high) if end is not None)
    )
    lines = [
        f"<h2>{second} minus {first}</h2>",
        f'<p class="note">{len(pair.shared)} problems, paired. The intervals go from -{reach:.3f} to {reach:.3f}.</p>',
        "<table>",
        "<tr><th>metric</th><th></th><th>difference</th><th>share of resamples above 0</th><th></th></tr>",
    ]
    for name, each in pair.differences.items():
        plot = _interval(each.estimate, -reach, reach)
        kind = each.verdict if each.verdict in ("better", "worse") else "note"
        lines.append(
            f"<tr><th>{escape(name)}</th><td>{plot}</td><td>{each.estimate.signed}</td>"
            f'<td>{each.share_above_zero:.1%}</td><td class="{kind}">{each.verdict}</td></tr>'
        )
    lines.append("</table>")
    lines += [f'<p class="note">{_shown(note)}</p>' for note in pair.notes]
    lines.append(f"<p>{_shown(pair.solved_only)}</p>")
    differing = pair.by_difference()
    for problem in differing[:SHOWN]:
        lines += _problem(pair, problem)
    if len(differing) > SHOWN:
        lines.append(f'<p class="note">{len(differing) - SHOWN} more problems differ.</p>')
    return lines


def _problem(pair: Pair, fingerprint: str) -> list[str]:
    text: Problem = pair.first.texts[fingerprint]
    sides = [(result.name, result.problems[fingerprint]) for result in (pair.first, pair.second)]
    counts = ", ".join(f"{_shown(name)} {int(sum(each.correct))}/{len(each.correct)}" for name, each in sides)
    line = text.prompt if len(text.prompt) <= 120 else text.prompt[:120] + "..."
    lines = [f"<details><summary>{counts}: {_shown(line)}</summary>", f"<pre>{_shown(text.prompt)}</pre>"]
    lines.append(f"<p>Solution: {_shown(', '.join(sorted(text.solutions)))}</p>")
    for name, each in sides:
        lines.append(f"<p>{_shown(name)}, {_kind(each)}</p><pre>{_shown(_example(each))}</pre>")
    return [*lines, "</details>"]


def _kind(problem: Solved) -> str:
    return "the first correct sample" if any(problem.correct) else "the first sample, which is not correct"


def _example(problem: Solved) -> str:
    return problem.completions[problem.correct.index(1.0) if any(problem.correct) else 0]
