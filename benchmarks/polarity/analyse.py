"""
What the results say about the paper's claims: `python benchmarks/polarity/analyse.py RESULTS`.

Prints and writes `RESULTS/claims.md`, and with matplotlib the figures beside it. Every comparison is between two
methods on the same seeds, which share start model, training problems and held-out problems: the mean of the paired
differences over the seeds, and its 95 % interval by Student's t. The verdict follows from the interval alone:

    a > b     reproduced: all above 0.             contradicted: all below 0.
    a >= b    reproduced: all above -margin.       contradicted: all below -margin.
    a = b     reproduced: all within the margin.   contradicted: all beyond it, on one side.

`<` and `<=` mirror them. Anything else is null. A claim is contradicted if one of its comparisons is, reproduced if
all are, and null otherwise. A claim is skipped if none of its comparisons was run. Nothing is corrected for the number
of comparisons: expect about one of twenty comparisons without any effect to be not null.
"""

import argparse
import json
import math
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from results import Results, load, value


# 0.975 quantiles of Student's t for 1, 2, ... degrees of freedom.
T_QUANTILES = [
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228),
    *(2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086),
]
REPRODUCED, NULL, CONTRADICTED, NOT_RUN = "reproduced", "null", "contradicted", "not run"


@dataclass(frozen=True)
class Comparison:
    """`left` relation `right` in a statistic, with what counts as equal for the relations that allow it."""

    left: str
    relation: str
    right: str
    statistic: str
    margin: float = 0.0


@dataclass(frozen=True)
class Claim:
    text: str
    comparisons: list[Comparison]


def all_against(right: str, statistic: str, **relations: str) -> list[Comparison]:
    return [Comparison(left, relation, right, statistic) for left, relation in relations.items()]


# What is equal for practical purposes: two points of pass@k, or 0.02 nats. Chosen before the results were seen.
MARGIN = 0.02

# What is claimed: arXiv 2512.21625 and the README of its code. How it is tested: ours. `dapo` has the weights P1N1.
CLAIMS = [
    Claim(
        "Training on positive samples only (PSR) lowers the entropy and shortens the completions",
        all_against("dapo", "entropy", psr="<") + all_against("dapo", "length", psr="<"),
    ),
    Claim(
        "Training on negative samples only (NSR) keeps the entropy up and lengthens the completions",
        all_against("dapo", "entropy", nsr=">") + all_against("dapo", "length", nsr=">"),
    ),
    Claim(
        "One polarity is worse than both, in accuracy and in what can be reached",
        all_against("dapo", "pass@1", psr="<", nsr="<") + all_against("dapo", "pass@16", psr="<", nsr="<"),
    ),
    Claim(
        "More weight on positive samples makes the reward grow faster and the entropy fall; on negative ones, it does "
        "the opposite",
        all_against("dapo", "reward", p2n1=">", p1n2="<") + all_against("dapo", "entropy", p2n1="<", p1n2=">"),
    ),
    Claim(
        "The ratio of the weights rules, not their size (with AdamW, which cancels the size except for its epsilon "
        "and the clipping of the gradient's norm: only a check)",
        [
            Comparison("p2n2", "=", "dapo", "entropy", MARGIN),
            Comparison("p2n2", "=", "dapo", "pass@1", MARGIN),
            Comparison("p2n1", "=", "p1n0.5", "entropy", MARGIN),
            Comparison("p2n1", "=", "p1n0.5", "pass@1", MARGIN),
        ],
    ),
    Claim(
        "The same with plain gradient descent at one learning rate, where twice the size is twice the step",
        [
            Comparison("sgd_p2n2", "=", "sgd", "entropy", MARGIN),
            Comparison("sgd_p2n2", "=", "sgd", "pass@1", MARGIN),
        ],
    ),
    Claim(
        "Amplified by themselves, low-probability tokens of positive samples and high-probability tokens of negative "
        "samples keep the entropy up; the two other ends lower it",
        all_against("dapo", "entropy", positive_low=">", positive_high="<", negative_low="<", negative_high=">"),
    ),
    Claim(
        "A3PO beats DAPO, and keeps what can be reached",
        [Comparison("a3po", ">", "dapo", "pass@1"), Comparison("a3po", ">=", "dapo", "pass@16", MARGIN)],
    ),
    Claim(
        "A3PO beats the other methods of the paper's main table",
        [Comparison("a3po", ">", each, "pass@1") for each in ("grpo", "dapo_fork", "w_reinforce")],
    ),
    Claim(
        "Ours: A3PO is no worse than other token-level methods, each with the values of its authors",
        [Comparison("a3po", ">=", each, "pass@1", MARGIN) for each in ("clip_cov", "steer", "ar")],
    ),
    Claim(
        "Both halves of A3PO matter",
        [Comparison("a3po", ">", f"a3po_{each}", "pass@1") for each in ("positive", "negative")],
    ),
    Claim("The decay matters", [Comparison("a3po", ">", "a3po_constant", "pass@1")]),
    Claim(
        "Ours: no other ratio, scale or decay is better than the package's defaults",
        [
            Comparison(f"a3po_{each}", "<=", "a3po", "pass@1", MARGIN)
            for each in ("ratio_0.1", "ratio_0.4", "scale_1.5", "scale_3", "cosine", "decay_0.25", "decay_0.75")
        ],
    ),
    Claim(
        "Ours: a decay that closes the loop is no worse than the schedules, with a sampler in step or behind",
        [
            Comparison("a3po_loop_entropy", ">=", "a3po", "pass@1", MARGIN),
            Comparison("a3po_loop_entropy", ">=", "a3po_constant", "pass@1", MARGIN),
            *(
                Comparison(f"stale_a3po_{loop}", ">=", f"stale_{schedule}", "pass@1", MARGIN)
                for loop in ("loop", "loop_entropy")
                for schedule in ("a3po", "a3po_constant")
            ),
        ],
    ),
    Claim(
        "Controls do not help: the two other ends, and random tokens",
        [
            *(Comparison(each, "<=", "dapo", "pass@1", MARGIN) for each in ("reversed", "random")),
            *(Comparison("a3po", ">", each, "pass@1") for each in ("reversed", "random")),
        ],
    ),
    Claim(
        "Ours: with GRPO's loss and clipping, A3PO beats GRPO, and keeps what can be reached",
        [
            Comparison("a3po_grpo", ">", "grpo", "pass@1"),
            Comparison("a3po_grpo", ">=", "grpo", "pass@16", MARGIN),
        ],
    ),
    Claim(
        "Ours: GRPO's loss beats DAPO's with the same clipping",
        [Comparison("grpo_clip_higher", ">", "dapo", "pass@1")],
    ),
    Claim(
        "Ours: A3PO is no worse than seven more token-level methods; the target of `stare` is ours",
        [
            Comparison("a3po", ">=", each, "pass@1", MARGIN)
            for each in ("stare", "fipo", "entropy_advantage", "aspo", "gtpo", "position_bonus", "aepo")
        ],
    ),
]


# Verdicts


def paired_interval(differences: Sequence[float]) -> tuple[float, float, float]:
    """Mean, and the ends of its 95 % interval."""
    mean, number = statistics.fmean(differences), len(differences)
    quantile = T_QUANTILES[min(number - 1, len(T_QUANTILES)) - 1]  # beyond the table: a little too wide
    half = quantile * statistics.stdev(differences) / math.sqrt(number)
    return mean, mean - half, mean + half


def verdict(relation: str, low: float, high: float, margin: float) -> str:
    """What the rule above makes of an interval of left - right."""
    if relation.startswith("<"):
        relation, low, high = relation.replace("<", ">"), -high, -low
    if relation == "=":
        beyond = low > margin or high < -margin
        return CONTRADICTED if beyond else REPRODUCED if -margin <= low and high <= margin else NULL
    threshold = -margin if relation == ">=" else 0.0
    return REPRODUCED if low > threshold else CONTRADICTED if high < threshold else NULL


def claim_verdict(verdicts: Sequence[str]) -> str:
    if NOT_RUN in verdicts:
        return NOT_RUN
    if CONTRADICTED in verdicts:
        return CONTRADICTED
    return REPRODUCED if all(each == REPRODUCED for each in verdicts) else NULL


@dataclass(frozen=True)
class Finding:
    comparison: Comparison
    verdict: str
    seeds: int = 0
    mean: float = math.nan
    low: float = math.nan
    high: float = math.nan


def compare(results: Results, comparison: Comparison) -> Finding:
    left, right = results.get(comparison.left, {}), results.get(comparison.right, {})
    seeds = sorted(left.keys() & right.keys())
    if len(seeds) < 2:
        return Finding(comparison, NOT_RUN, len(seeds))
    differences = [
        value(left[seed], comparison.statistic) - value(right[seed], comparison.statistic) for seed in seeds
    ]
    mean, low, high = paired_interval(differences)
    return Finding(comparison, verdict(comparison.relation, low, high, comparison.margin), len(seeds), mean, low, high)


# The report


COLUMNS = ["pass@1", "pass@4", "pass@16", "pass@64", "entropy", "length"]


def method_table(results: Results, columns: Sequence[str] = COLUMNS) -> list[str]:
    lines = [f"| method | seeds | {' | '.join(columns)} | seconds |", f"| --- {'| --- ' * (len(columns) + 2)}|"]
    for method, by_seed in results.items():
        cells = []
        for column in columns:
            values = [value(each, column) for each in by_seed.values()]
            spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
            cells.append(f"{statistics.fmean(values):.3f}{spread}")
        seconds = statistics.median(each["train_seconds"] for each in by_seed.values())
        lines.append(f"| `{method}` | {len(by_seed)} | {' | '.join(cells)} | {seconds:.0f} |")
    return lines


def claim_table(results: Results, claims: Sequence[Claim] = CLAIMS) -> list[str]:
    lines = ["| claim | comparison | difference, 95 % interval | seeds | verdict |", "| --- | --- | --- | --- | --- |"]
    for number, claim in enumerate(claims, 1):
        findings = [compare(results, comparison) for comparison in claim.comparisons]
        if all(each.verdict == NOT_RUN for each in findings):
            continue
        lines.append(
            f"| **{number}. {claim.text}** | | | | **{claim_verdict([each.verdict for each in findings])}** |"
        )
        for finding in findings:
            this = finding.comparison
            margin = f" (margin {this.margin:g})" if this.margin else ""
            tested = f"{this.statistic}: `{this.left}` {escape(this.relation)} `{this.right}`{margin}"
            difference = f"{finding.mean:+.3f} [{finding.low:+.3f}, {finding.high:+.3f}]" if finding.seeds > 1 else ""
            lines.append(f"| | {tested} | {difference} | {finding.seeds} | {finding.verdict} |")
    return lines


def surroundings(results: Results) -> list[str]:
    """One line for each distinct commit, hardware and set of versions."""
    every = [result for by_seed in results.values() for result in by_seed.values()]
    lines = []
    for key, name in (("commit", "Commit"), ("hardware", "Hardware"), ("versions", "Versions")):
        found = sorted({json.dumps(each[key]).strip('"') for each in every})
        lines.append(f"{name}: {'; '.join(found)}  ")
    return lines


def report(results: Results, directory: Path) -> str:
    return "\n".join(
        [
            "# What the results say",
            "",
            f"Made by `python benchmarks/polarity/analyse.py {directory}`, whose first lines state the rules.",
            "",
            *surroundings(results),
            "",
            "## Claims",
            "",
            *claim_table(results),
            "",
            "## Methods",
            "",
            "Mean ± standard deviation over the seeds; seconds are the median of the training.",
            "",
            *method_table(results),
            "",
        ]
    )


def main(line: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, help="directory that `run.py` wrote")
    directory = parser.parse_args(line).results
    results = load(directory)
    text = report(results, directory)
    print(text)
    (directory / "claims.md").write_text(text, encoding="utf-8")
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        print("No figures: they need matplotlib.")
        return 0
    from figures import draw

    print("Figures:", *draw(results, directory))
    return 0


if __name__ == "__main__":
    sys.exit(main())
