"""Reads the results that `run.py` writes, and computes the statistics of one run."""

import json
import statistics
from collections import defaultdict
from pathlib import Path
from typing import Any

from trl_a3po.evaluation.metrics import pass_at_k


Result = dict[str, Any]
# By method and seed.
Results = dict[str, dict[int, Result]]


def load(directory: Path) -> Results:
    """
    Raises:
        `ValueError`: no results there, or results of different presets.
    """
    results: Results = defaultdict(dict)
    presets = set()
    for path in sorted(directory.glob("*.json")):
        result = json.loads(path.read_text())
        results[result["method"]][result["seed"]] = result
        presets.add(json.dumps(result["preset"], sort_keys=True))
    if len(presets) != 1:
        found = "no result of `run.py`" if not presets else f"results of {len(presets)} presets"
        raise ValueError(f"'{directory}' holds {found}. Pass the `--output` of one preset's runs.")
    return dict(results)


def pass_rate(result: Result, k: int) -> float:
    """pass@k on the held-out problems, the unbiased estimator."""
    samples, right = result["held_out"]["samples"], result["held_out"]["right"]
    return statistics.fmean(pass_at_k(count, samples, k) for count in right)


def value(result: Result, statistic: str) -> float:
    """pass@k at the end, or the mean of a metric: of the reward over all logs, of others over the second half."""
    if statistic.startswith("pass@"):
        return pass_rate(result, int(statistic.removeprefix("pass@")))
    logged = result["curves"][statistic]
    return statistics.fmean(logged if statistic == "reward" else logged[len(logged) // 2 :])
