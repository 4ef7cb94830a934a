"""How the scales decay to 1, as pure functions of progress and of what was measured."""

import math
from collections.abc import Iterable


SCALE_DECAYS = ("linear", "cosine", "constant")

# Not 0: where nothing is amplified, nothing can be measured on amplified tokens.
LEAST_DAMPING = 1 / 64


def resolve_decay_steps(scale_decay_steps: float, max_steps: int) -> int:
    """
    Number of optimizer steps over which the scales decay, read as transformers reads `warmup_steps`.

    Args:
        scale_decay_steps (`float`): From 1 on, a number of steps; below 1, a fraction of `max_steps`, rounded up.
        max_steps (`int`): Optimizer steps of the whole training.

    Returns:
        `int`: At least 1.
    """
    return max(1, math.ceil(scale_decay_steps if scale_decay_steps >= 1 else scale_decay_steps * max_steps))


def check_decay_ends(scale_decay_steps: float, max_steps: int) -> None:
    """
    Refuses a decay that is longer than the training.

    Raises:
        `ValueError`: naming the decay, the training and the fix.
    """
    if scale_decay_steps > max(1, max_steps):
        raise ValueError(
            f"`scale_decay_steps={scale_decay_steps}` is longer than the training of {max_steps} optimizer steps: the "
            "scales would never arrive at 1. Pass a fraction, for example 0.5, or not more steps than there are; to "
            "keep the scales as they are, `scale_decay='constant'`."
        )


def decay_scale(scale: float, step: int, decay_steps: int, scale_decay: str = "linear", damping: float = 1.0) -> float:
    """
    The scale in force at a step: from `scale` at step 0 to 1 at `decay_steps`, and 1 from then on.

    The paper (arXiv 2512.21625) has the scales decay to 1, so that training ends as the method it is built on does.
    Neither its schedule nor its rate were to be found, and the authors' released code has none. `"linear"` is our
    reading, s = max(rho - alpha * step, 1) with rho the initial scale and alpha = (rho - 1) / decay_steps;
    `"cosine"` (half a period) and `"constant"` are our additions. A scale below 1 rises to 1.

    Args:
        scale (`float`): Initial scale.
        step (`int`): Optimizer steps done.
        decay_steps (`int`): Steps until the scale is 1, at least 1.
        scale_decay (`str`, *optional*, defaults to `"linear"`): One of `SCALE_DECAYS`.
        damping (`float`, *optional*, defaults to `1.0`): What [`next_damping`] leaves of the distance from 1.

    Returns:
        `float`: Undamped, exactly `scale` at step 0; and, unless constant, exactly 1.0 from `decay_steps` on.
    """
    progress = 0.0 if scale_decay == "constant" else min(1.0, max(0, step) / decay_steps)
    remaining = 1.0 - progress if scale_decay == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))
    remaining *= damping
    return scale if remaining == 1.0 else 1.0 + (scale - 1.0) * remaining


def next_damping(damping: float, measured: Iterable[tuple[float, float]], monotone: bool = False) -> float:
    """
    Closes the loop: how much of what the schedule leaves of the scales is kept, from what they were seen to do.

    A scale of s in the schedule is 1 + (s - 1) * damping in force. Each measurement has a bound; the one that is
    furthest beyond its own divides the damping by the excess, and while all are within theirs it recovers likewise,
    by a factor of two at most either way. It starts at 1 and stays from `LEAST_DAMPING` to 1.

    Ours: the paper (arXiv 2512.21625) decays the scales so that training and sampling do not drift apart, by a
    schedule alone.

    Args:
        damping (`float`): The damping so far.
        measured (iterable of `tuple[float, float]`): Values, NaN where not known, with their bounds, above 0.
        monotone (`bool`, *optional*, defaults to `False`): Whether the damping never recovers.

    Returns:
        `float`: The damping from now on; the same as before if no value is known.
    """
    excesses = [value / bound for value, bound in measured if not math.isnan(value)]
    if not excesses:
        return damping
    factor = 1.0 / min(2.0, max(0.5, *excesses))
    return min(damping if monotone else 1.0, max(LEAST_DAMPING, damping * factor))
