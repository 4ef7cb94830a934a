"""
What the runs say of the paper's claims: `python benchmarks/real/real_claims.py RESULTS`

Prints and writes `RESULTS/claims.md`. The comparisons below were written down before the first run. The rule from a
difference to a verdict is that of the small benchmark, `benchmarks/polarity/analyse.py`: paired by seed, 95 % interval
by Student's t, nothing corrected for the number of comparisons.
"""

import argparse
import sys
from pathlib import Path


sys.path.insert(0, str(Path(__file__).parents[1] / "polarity"))

from analyse import MARGIN, Claim, Comparison, claim_table, method_table, surroundings
from results import load


# `start` is the model before training, with the curves of the first step.
CLAIMS = [
    Claim(
        "Ours: there is something to win. The model learns, its entropy collapses, and it reaches less than at first",
        [
            *(Comparison(each, ">", "start", "pass@1") for each in ("grpo", "dapo")),
            *(Comparison(each, "<", "start", "entropy") for each in ("grpo", "dapo")),
            *(Comparison(each, "<", "start", "pass@32") for each in ("grpo", "dapo")),
        ],
    ),
    Claim(
        "A3PO keeps the entropy up, on both bases",
        [Comparison("a3po", ">", "dapo", "entropy"), Comparison("a3po_grpo", ">", "grpo", "entropy")],
    ),
    Claim(
        "A3PO beats DAPO, and keeps what can be reached",
        [Comparison("a3po", ">", "dapo", "pass@1"), Comparison("a3po", ">=", "dapo", "pass@32", MARGIN)],
    ),
    Claim("A3PO beats GRPO", [Comparison("a3po", ">", "grpo", "pass@1")]),
    Claim(
        "Ours: with GRPO's loss and clipping, A3PO beats GRPO, and keeps what can be reached",
        [Comparison("a3po_grpo", ">", "grpo", "pass@1"), Comparison("a3po_grpo", ">=", "grpo", "pass@32", MARGIN)],
    ),
    Claim("The decay matters", [Comparison("a3po", ">", "a3po_constant", "pass@1")]),
    Claim(
        "Controls do not help: the two other ends, and random tokens",
        [
            *(Comparison(each, "<=", "dapo", "pass@1", MARGIN) for each in ("reversed", "random")),
            *(Comparison("a3po", ">", each, "pass@1") for each in ("reversed", "random")),
        ],
    ),
    Claim(
        "Ours: A3PO is no worse than its closest relative, STARE",
        [Comparison("a3po", ">=", "stare", each, MARGIN) for each in ("pass@1", "pass@32")],
    ),
]
# On problems of a kind that is not trained on.
CLAIMS_OF_THE_OTHER_KIND = [
    Claim(
        "Ours: A3PO carries over no worse than DAPO and GRPO",
        [
            *(Comparison("a3po", ">=", each, "pass@1", MARGIN) for each in ("dapo", "grpo")),
            *(Comparison("a3po", ">=", each, "pass@32", MARGIN) for each in ("dapo", "grpo")),
        ],
    ),
]
COLUMNS = ["pass@1", "pass@2", "pass@4", "pass@8", "pass@16", "pass@32", "reward", "entropy", "length"]


def with_start(results):
    """The results, and as a method the model that all of them start from."""
    start = {}
    for by_seed in results.values():
        for seed, result in by_seed.items():
            curves = {name: values[:1] for name, values in result["curves"].items()}
            others = {"held_out": result["start"]["test"], "other": result["start"].get("other"), "train_seconds": 0.0}
            start.setdefault(seed, {**result, "method": "start", "curves": curves, **others})
    return {"start": start, **results}


def of_the_other_kind(results):
    """The results, with the problems of the other kind as the held-out ones."""
    return {
        method: {seed: {**result, "held_out": result["other"]} for seed, result in by_seed.items()}
        for method, by_seed in results.items()
    }


def mismatch_table(results):
    """Where vLLM sampled: mean distance of its log-probabilities from the trained policy's, over amplified tokens."""
    lines = ["| method | positive | negative |", "| --- | --- | --- |"]
    for method, by_seed in results.items():
        means = []
        for name in ("mismatch_positive", "mismatch_negative"):
            values = [each for result in by_seed.values() for each in result["curves"].get(name, [])]
            means.append(f"{sum(values) / len(values):.4f}" if values else "")
        if any(means):
            lines.append(f"| `{method}` | {' | '.join(means)} |")
    return lines if len(lines) > 2 else ["Not known: no method amplified tokens that vLLM sampled."]


def report(results, directory):
    every = with_start(results)
    pass_columns = [each for each in COLUMNS if each.startswith("pass@")]
    other_claims, other_methods = [], []
    if all("other" in result for by_seed in results.values() for result in by_seed.values()):
        other, heading = of_the_other_kind(every), "On problems of a kind that is not trained on:"
        other_claims = [heading, "", *claim_table(other, CLAIMS_OF_THE_OTHER_KIND), ""]
        other_methods = [heading, "", *method_table(other, pass_columns), ""]
    return "\n".join(
        [
            "# What the runs say",
            "",
            f"Made by `python benchmarks/real/real_claims.py {directory}`. Its first lines name the rule.",
            "",
            *surroundings(results),
            "",
            "## Claims",
            "",
            *claim_table(every, CLAIMS),
            "",
            *other_claims,
            "## Methods",
            "",
            "Mean ± standard deviation over the seeds; entropy and length over the second half of the training.",
            "",
            *method_table(every, COLUMNS),
            "",
            *other_methods,
            "## Mismatch of sampler and trainer",
            "",
            *mismatch_table(results),
            "",
        ]
    )


def main(line=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, help="directory that `real_runs.py` wrote")
    directory = parser.parse_args(line).results
    text = report(load(directory), directory)
    print(text)
    (directory / "claims.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
