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
# What all results of a directory share. Those of the small benchmark have no sampler and no model to choose.
SHARED = ("preset", "sampler", "model")


def load(directory: Path) -> Results:
    """
    Raises:
        `ValueError`: no results there, or results of different presets, samplers or models.
    """
    results: Results = defaultdict(dict)
    for path in sorted(directory.glob("*.json")):
        result = json.loads(path.read_text())
        results[result["method"]][result["seed"]] = result
    every = [result for by_seed in results.values() for result in by_seed.values()]
    if not every:
        raise ValueError(f"'{directory}' holds no result. Pass the `--output` of the runs.")
    for name in SHARED:
        found = {json.dumps(result.get(name), sort_keys=True) for result in every}
        if len(found) > 1:
            raise ValueError(
                f"'{directory}' holds results of {len(found)} {name}s. Pass the `--output` of one {name}'s runs."
            )
    return dict(results)


def is_done(directory: Path, method: str, seed: int, shared: Result) -> bool:
    """
    Whether a run has written its result.

    Raises:
        `ValueError`: The result there has another value of `shared`, whose keys are of [`SHARED`].
    """
    path = directory / f"{method}-{seed}.json"
    if not path.exists():
        return False
    before = json.loads(path.read_text())
    for name, value in json.loads(json.dumps(shared)).items():  # in JSON, tuples are lists
        if before.get(name) != value:
            raise ValueError(
                f"'{path}' was made with another {name}: {before.get(name)}. Pass that one, or another `--output`."
            )
    return True


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
