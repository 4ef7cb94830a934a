"""
Scales that follow a measurement instead of a schedule. They are ours, to compare with the schedules.

The paper (arXiv 2512.21625) decays the scales so that training and sampling do not drift apart. Here, a damping moves
them towards 1: a scale of s is 1 + (s - 1) * damping in force. At every log, the damping is divided by the ratio of a
measurement to its bound, at most by two and at least by a half, and never rises above 1. The measurement is the mean
entropy, or the mean distance of the sampler's log-probabilities from the trained policy's over the amplified tokens.

Both are means over all processes, so that the damping is the same on all of them. The log holds everything that a
resumed run needs.
"""

import math

from transformers import TrainerCallback

from trl_a3po import A3POTrainer


# Not 0: without amplification, there are no amplified tokens to measure.
LEAST_DAMPING = 1 / 64


def next_damping(damping: float, value: float, bound: float) -> float:
    """The next damping, from `LEAST_DAMPING` to 1. A value of NaN leaves it as it is."""
    if math.isnan(value):
        return damping
    return min(1.0, max(LEAST_DAMPING, damping / min(2.0, max(0.5, value / bound))))


class ClosedLoop(A3POTrainer):
    bound: float

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.damping = 1.0
        self.add_callback(_Damper(self))

    def measured(self, log: dict[str, float]) -> float:
        """The measurement, from the metrics of one log. NaN if it is not known."""
        raise NotImplementedError

    def current_shaping_settings(self):
        settings = super().current_shaping_settings()
        for name in [name for name in settings if name.endswith("_scale")]:
            settings[name] = 1.0 + (settings[name] - 1.0) * self.damping
        return settings


class _Damper(TrainerCallback):
    def __init__(self, trainer: ClosedLoop):
        self._trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        self._trainer.damping = 1.0
        for log in state.log_history:
            self._damp(log)

    def on_log(self, args, state, control, logs=None, **kwargs):
        self._damp(logs or {})

    def _damp(self, log: dict[str, float]) -> None:
        if "a3po/zero/fraction" in log:  # not the log of an evaluation, and not the summary at the end
            self._trainer.damping = next_damping(
                self._trainer.damping, self._trainer.measured(log), self._trainer.bound
            )


class EntropyLoop(ClosedLoop):
    """Damps while the entropy is above the bound: then there is enough exploration."""

    bound = 0.65  # nats: nine tenths of the start model's entropy

    def measured(self, log):
        return _mean_over_polarities(log, "entropy", ("fraction", "mean_length"))


class MismatchLoop(ClosedLoop):
    """Damps while the sampler differs on the amplified tokens. The sampler must report its log-probabilities."""

    bound = 0.05  # in log-probability: about the distance of a sampler ten rollouts behind, amplified or not

    def measured(self, log):
        return _mean_over_polarities(log, "selected_mismatch", ("fraction", "mean_length", "selected_fraction"))


def _mean_over_polarities(log: dict[str, float], metric: str, shares: tuple[str, ...]) -> float:
    """Mean of a metric over the polarities, each weighted by the product of its shares. NaN if no polarity has it."""
    total = weights = 0.0
    for polarity in ("positive", "negative", "zero"):
        if f"a3po/{polarity}/{metric}" in log:
            weight = math.prod(log[f"a3po/{polarity}/{share}"] for share in shares)
            total += weight * log[f"a3po/{polarity}/{metric}"]
            weights += weight
    return total / weights if weights else math.nan
