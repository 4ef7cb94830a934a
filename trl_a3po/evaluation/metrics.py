"""
avg@k, pass@k and maj@k over distinct problems, their intervals, and the paired differences of two models.

Rows with the same prompt are one problem, and all samples of these rows are samples of that problem. Published files
of AIME have each problem 32 times. With such a file, each problem has 32 times as many samples, but the interval still
counts it as one problem.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec

import numpy as np


RESAMPLES = 10_000
# A mean this close to 0 is 0: sums of equal numbers in another order differ by less.
ROUNDING = 1e-12


@dataclass(frozen=True)
class Solved:
    """
    The samples of one distinct problem.

    Args:
        completions (`Sequence[str]`): The text of each sample.
        correct (`Sequence[float]`): 1 for each that is correct, 0 for each other.
        answers (`Sequence[str]`): The part of each text that was scored.
    """

    completions: Sequence[str]
    correct: Sequence[float]
    answers: Sequence[str]


@dataclass(frozen=True)
class Estimate:
    """A mean over problems, and the ends of its 95 % interval. Both ends are None for a single problem."""

    mean: float
    low: float | None
    high: float | None

    def __str__(self) -> str:
        return f"{self.mean:.3f} {_ends(self, '.3f')}"

    @property
    def signed(self) -> str:
        return f"{self.mean:+.3f} {_ends(self, '+.3f')}"


def _ends(estimate: Estimate, form: str) -> str:
    if estimate.low is None or estimate.high is None:
        return "[no interval]"
    return f"[{estimate.low:{form}}, {estimate.high:{form}}]"


def pass_at_k(correct: int, samples: int, k: int) -> float:
    """
    Probability that at least one of k samples, drawn without replacement, is correct: the unbiased estimator of Chen
    et al. (arXiv 2107.03374, equation 1).

    Raises:
        `ValueError`: fewer than k samples.
    """
    if samples < k:
        raise ValueError(f"pass@{k} needs at least {k} samples of each problem, but there are {samples}.")
    return 1.0 - math.comb(samples - correct, k) / math.comb(samples, k)


def majority_is_correct(completions: Sequence[str], correct: Sequence[float]) -> float:
    """
    Whether the answer that most completions give is correct.

    Only an answer that the reward reads has a vote. Two answers are equal if math-verify says so in either order: it
    accepts (2, oo) for x > 2, but not the reverse. An answer is correct if the reward accepts at least half of the
    completions that give it. If several answers have the most votes, the answer that was given first counts. The last
    two rules are our choice.
    """
    return _majority(tuple(completions), tuple(correct))


@cache  # a comparison asks for the same completions several times
def _majority(completions: tuple[str, ...], correct: tuple[float, ...]) -> float:
    groups: list[list[int]] = []
    answers = [_answer(text) for text in completions]
    for index, answer in enumerate(answers):
        if not answer:
            continue
        for group in groups:
            if _equal(answers[group[0]], answer):
                group.append(index)
                break
        else:
            groups.append([index])
    if not groups:
        return 0.0
    most = max(groups, key=len)
    return float(2 * sum(correct[index] for index in most) >= len(most))


def _equal(first: list, second: list) -> bool:
    from math_verify import verify

    return first == second or verify(first, second) or verify(second, first)


def _answer(text: str) -> list:
    """What `trl.rewards.accuracy_reward` reads in a completion; empty if it reads no answer."""
    from latex2sympy2_extended import NormalizationConfig
    from math_verify import LatexExtractionConfig, parse

    config = LatexExtractionConfig(
        normalization_config=NormalizationConfig(units=True),
        boxed_match_priority=0,
        try_extract_without_anchor=False,
    )
    try:
        return parse(text, [config], extraction_mode="first_match")
    except Exception:  # a model may write any text; a text without an answer has no vote
        return []


def check_math_verify() -> None:
    """
    Raises:
        `ValueError`: math-verify, an extra, is not installed.
    """
    if find_spec("math_verify") is None:
        raise ValueError("Answers are compared by math-verify. Install it: pip install 'trl[math-verify]'")


def ks_of(samples: int) -> list[int]:
    """The values of k for pass@k: 1, 2, 4, ... up to the number of samples, and that number."""
    return sorted({*(2**i for i in range(samples.bit_length())), samples})


def per_problem(problems: Sequence[Solved], samples: int | None = None) -> dict[str, list[float]]:
    """
    The value of each metric for each problem.

    Args:
        problems (`Sequence[Solved]`): Distinct problems.
        samples (`int`, *optional*):
            The largest k; by default the lowest number of samples that a problem has. If a problem has more, avg@k is
            the mean over all of them, pass@k is estimated from all of them, and maj@k takes the first k.
    """
    samples = min(len(problem.correct) for problem in problems) if samples is None else samples
    counts = [(int(sum(problem.correct)), len(problem.correct)) for problem in problems]
    values = {f"avg@{samples}": [correct / number for correct, number in counts]}
    for k in ks_of(samples):
        values[f"pass@{k}"] = [pass_at_k(correct, number, k) for correct, number in counts]
    values[f"maj@{samples}"] = [
        majority_is_correct(each.answers[:samples], each.correct[:samples]) for each in problems
    ]
    return values


def metrics(problems: Sequence[Solved]) -> dict[str, Estimate]:
    """Each metric's mean over distinct problems, with its interval."""
    return {name: estimate(values) for name, values in per_problem(problems).items()}


def estimate(values: Sequence[float]) -> Estimate:
    """
    The mean over distinct problems and its 95 % bootstrap interval: problems are drawn with replacement, and the
    interval is between percentiles of their means. It covers the choice of the problems and the sampling of their
    completions.

    Args:
        values (`Sequence[float]`): One value for each distinct problem.
    """
    mean = float(np.mean(values))
    if len(values) < 2:
        return Estimate(mean, None, None)
    low, high = np.percentile(_resampled_means(values), [2.5, 97.5])
    return Estimate(mean, float(low), float(high))


def share_above_zero(values: Sequence[float]) -> float:
    """The share of bootstrap means above 0. A mean of exactly 0 counts as half."""
    means = _resampled_means(values)
    return float(np.mean((means > ROUNDING) + 0.5 * (np.abs(means) <= ROUNDING)))


def _resampled_means(values: Sequence[float]) -> np.ndarray:
    array, generator = np.asarray(values, dtype=float), np.random.default_rng(0)
    # At most a million numbers at once: for a large dataset, all resamples together would take gigabytes.
    rows = max(1, 1_000_000 // len(array))
    sizes = [min(rows, RESAMPLES - start) for start in range(0, RESAMPLES, rows)]
    return np.concatenate([array[generator.integers(len(array), size=(size, len(array)))].mean(1) for size in sizes])
