"""
The log of a run, and what it says at the start and at the end.

Two words have one meaning throughout. The *start* of a metric is its mean over the first tenth of the logs. Its *end*
is the mean over the last quarter, three logs at least; the first log is part of it only if there is no other. One log
of a small batch says little, so the end of a run with fewer than three logs is known only after ten steps.
"""

import math
import re
from collections.abc import Iterable, Sequence
from itertools import pairwise
from statistics import fmean, stdev
from typing import Any

from ..training.token_log_format import is_number


Points = list[tuple[int, float]]

# Shorter runs say nothing, unless they logged the mean of many steps.
FEWEST_LOGS, FEWEST_STEPS = 3, 10
# A difference of two means is real if it is larger than this many standard errors.
ERRORS = 3.0
# Trainers log numbers of 32 bits, up to 3e38. The square, or the sum, of a much larger one is too large for Python.
LARGEST = 1e100
# From this share of completions without a learning signal on, nothing is learned.
MOST = 0.9
# The reasons why a completion has no learning signal, as `signal/completions/{reason}`.
SAME_REWARD = ("all_right", "all_wrong", "all_equal")
NO_SIGNAL = (
    *SAME_REWARD,
    "at_mean",
    "unscored",
    "unparsable",
    "truncated",
    "tools",
    "weight_zero",
)


class Log:
    """The metrics of a run: by name, values at optimizer steps. A value that is None or not a number is NaN."""

    def __init__(self, history: Iterable[Any]):
        by_name: dict[str, dict[int, float]] = {}
        self.has_ended = False
        for entry in history:
            if not isinstance(entry, dict) or not is_number(entry.get("step")):
                continue
            if "train_runtime" in entry:
                self.has_ended = True
                continue
            # More training may follow, and so may an evaluation.
            self.has_ended &= any(str(name).startswith("eval_") for name in entry)
            for name, value in entry.items():
                if value is None or isinstance(value, float) or is_number(value):
                    by_name.setdefault(name, {})[int(entry["step"])] = math.nan if value is None else float(value)
        self._by_name: dict[str, Points] = {name: sorted(values.items()) for name, values in by_name.items()}

    def __contains__(self, name: str) -> bool:
        return name in self._by_name

    def __iter__(self):
        return iter(self._by_name)

    def all(self, name: str) -> Points:
        return self._by_name.get(name, [])

    def is_long_enough(self) -> bool:
        """Whether it says anything of the end of the run."""
        return any(is_enough(self.known(name)) for name in self)

    def known(self, name: str) -> Points:
        """The values that are finite, and small enough to calculate with."""
        return [(step, value) for step, value in self.all(name) if abs(value) <= LARGEST]

    def start(self, name: str) -> float:
        points = self.known(name)
        return mean_value(points[: max(1, len(points) // 10)])

    def end(self, name: str) -> float:
        """NaN if too little was logged; every comparison with it is false."""
        return mean_value(last_quarter(self.known(name)))

    def shares(self) -> dict[str, float]:
        """The end of the share of completions without a signal, by reason; empty if the log does not say."""
        shares = {reason: self.end(f"signal/completions/{reason}") for reason in NO_SIGNAL}
        return {reason: share for reason, share in shares.items() if not math.isnan(share)} or self._shares_by_trl()

    def _shares_by_trl(self) -> dict[str, float]:
        """The shares by reason, from metrics of TRL: `frac_reward_zero_std` and the means of the reward functions."""
        share = self.end("frac_reward_zero_std")
        if math.isnan(share):
            return {}
        share = min(share, 1.0)  # a larger one is an error of the log
        names = [name for name in self if re.fullmatch(r"rewards/.+/mean", name)] or ["reward"]
        scored = [name for name in names if not math.isnan(self.end(name))]
        rest = 1 - share + 1e-9

        def is_at(name: str, reward: float, span: float) -> bool:
            """Whether all rewards can be this one, except in the groups that differ: those are up to `span` away."""
            distance, spread = abs(self.end(name) - reward), self.end(f"{name.removesuffix('/mean')}/std")
            # A tenth more, because a batch may be small. Without any spread, all rewards are at the distance.
            fits = math.isnan(spread) or distance / 2 <= spread <= 1.1 * span * math.sqrt(rest)
            return distance <= span * rest and fits

        if scored and all(is_at(name, 0, 1) or is_at(name, -1, 2) for name in scored):
            return {"all_wrong": share}
        return {"all_right" if scored and all(is_at(name, 1, 1) for name in scored) else "all_equal": share}

    def lacks_signal(self) -> bool:
        """Whether hardly a completion has a learning signal at the end."""
        return sum(self.shares().values()) >= MOST

    def last_step(self) -> int:
        return max((points[-1][0] for points in self._by_name.values()), default=0)

    def rise(self, name: str) -> tuple[float, float]:
        """How much the end is above the start, and the standard error of that."""
        points = self.known(name)
        ends = max(1, len(points) // 10), max(1, len(last_quarter(points)))
        # The scatter of one log, from the differences of neighbors: a trend hardly changes it.
        steps = [after - before for (_, before), (_, after) in pairwise(points)]
        scatter = stdev(steps) / math.sqrt(2) if len(steps) > 1 else 0.0
        return self.end(name) - self.start(name), scatter * math.sqrt(sum(1 / count for count in ends))

    def has_learned(self) -> bool:
        """Whether the reward has risen by more than chance explains."""
        rise, error = self.rise("reward")
        return rise > ERRORS * error and rise > 0.1 * self.spread()

    def has_solved(self) -> bool:
        """Whether it has learned, and hardly a reward differs from the others any more."""
        return self.has_learned() and self.end("reward_std") < 0.5 * self.spread()

    def spread(self) -> float:
        """The standard deviation of rewards at the start, the scale on which a change of the reward is large."""
        spread = self.start("reward_std")
        return 0.0 if math.isnan(spread) else spread


def is_enough(points: Sequence[tuple[int, float]]) -> bool:
    return len(points) >= FEWEST_LOGS or bool(points and points[-1][0] >= FEWEST_STEPS)


def last_quarter(points: Points) -> Points:
    """The logs at the end, without the first if there are others; none if there are too few."""
    return points[min(1, len(points) - 1) :][-max(FEWEST_LOGS, len(points) // 4) :] if is_enough(points) else []


def mean_value(points: Points) -> float:
    return fmean(value for _, value in points) if points else math.nan
