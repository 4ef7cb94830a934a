"""
Scales that follow what is measured in place of a schedule: ours, made to be compared with the schedules.

The paper (arXiv 2512.21625) decays the scales so that training and sampling do not drift apart. Here, once a log, the
mean entropy, or the mean distance of the sampler's log-probabilities from the trained policy's over the amplified
tokens, is divided by its bound, and the damping of the scales by that excess: by two at most, and likewise up where it
is below 1. A scale of s is 1 + (s - 1) * damping in force. Both means are over all processes, so that the damping is
the same on all, and what the log holds is all there is to resume.
"""

import math

from transformers import TrainerCallback

from trl_a3po import A3POTrainer


# Not 0: where nothing is amplified, nothing can be measured on amplified tokens.
LEAST_DAMPING = 1 / 64


def next_damping(damping: float, value: float, bound: float) -> float:
    """The damping from now on, from `LEAST_DAMPING` to 1; the same as before if the value is NaN."""
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
        """What is bounded, from the metrics of one log; NaN where it is not known."""
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
        if "a3po/zero/fraction" in log:  # neither an evaluation's nor the summary at the end
            self._trainer.damping = next_damping(
                self._trainer.damping, self._trainer.measured(log), self._trainer.bound
            )


class EntropyLoop(ClosedLoop):
    """Damps while there is exploration enough."""

    bound = 0.65  # nats: nine tenths of what the start model has

    def measured(self, log):
        return _mean_over_polarities(log, "entropy", ("fraction", "mean_length"))


class MismatchLoop(ClosedLoop):
    """Damps while the sampler, which must report its log-probabilities, is off on the amplified tokens."""

    bound = 0.05  # in log-probability: about what a sampler ten rollouts behind is off by, amplified or not

    def measured(self, log):
        return _mean_over_polarities(log, "selected_mismatch", ("fraction", "mean_length", "selected_fraction"))


def _mean_over_polarities(log: dict[str, float], metric: str, shares: tuple[str, ...]) -> float:
    """Mean of a metric that is logged by polarity, each weighted by the product of its shares; NaN if none has it."""
    total = weights = 0.0
    for polarity in ("positive", "negative", "zero"):
        if f"a3po/{polarity}/{metric}" in log:
            weight = math.prod(log[f"a3po/{polarity}/{share}"] for share in shares)
            total += weight * log[f"a3po/{polarity}/{metric}"]
            weights += weight
    return total / weights if weights else math.nan
