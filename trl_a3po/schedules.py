"""Decay of the scales to 1, as pure functions of the optimizer step."""

import math


# The share of (scale - 1) that remains, by the share of the decay that is done.
_REMAINING = {
    "linear": lambda progress: 1.0 - progress,
    "cosine": lambda progress: 0.5 * (1.0 + math.cos(math.pi * progress)),
    "constant": lambda progress: 1.0,
}
SCALE_DECAYS = tuple(_REMAINING)


def resolve_decay_steps(scale_decay_steps: float, max_steps: int) -> int:
    """
    Computes the number of optimizer steps over which the scales decay, in the format of transformers' `warmup_steps`.

    Args:
        scale_decay_steps (`float`): 1 or more is a number of steps; below 1 is a fraction of `max_steps`, rounded up.
        max_steps (`int`): Optimizer steps of the whole training.

    Returns:
        `int`: At least 1.
    """
    return max(1, math.ceil(scale_decay_steps if scale_decay_steps >= 1 else scale_decay_steps * max_steps))


def check_scale_decay(scale_decay: str) -> None:
    """
    Refuses an unknown decay.

    Raises:
        `ValueError`: naming the decay and those that exist.
    """
    if scale_decay not in SCALE_DECAYS:
        raise ValueError(
            f"`scale_decay` must be one of {', '.join(map(repr, SCALE_DECAYS))}, got {scale_decay!r}. Pass 'constant' "
            "to keep the scales at their initial values."
        )


def check_decay_ends(scale_decay_steps: float, max_steps: int) -> None:
    """
    Refuses a decay that is longer than the training.

    Raises:
        `ValueError`: the error names the decay, the training and the fix.
    """
    if scale_decay_steps > max(1, max_steps):
        raise ValueError(
            f"`scale_decay_steps={scale_decay_steps}` is longer than the training of {max_steps} optimizer steps: the "
            f"scales would never reach 1. Pass a fraction, for example 0.5, or at most {max_steps} steps. To keep the "
            "scales at their initial values, set `scale_decay='constant'`."
        )


def decay_scale(scale: float, step: int, decay_steps: int, scale_decay: str = "linear") -> float:
    """
    Computes the scale at a step: from `scale` at step 0 to 1 at `decay_steps`, and 1 from then on.

    In the paper (arXiv 2512.21625) the scales decay to 1, so that training ends as the method it builds on does. We
    found neither its schedule nor its rate, and the authors' released code has no decay. `"linear"` is our reading:
    s = max(rho - alpha * step, 1) with the initial scale rho and alpha = (rho - 1) / decay_steps. `"cosine"` (half a
    period) and `"constant"` are our additions. A scale below 1 rises to 1.

    Args:
        scale (`float`): Initial scale.
        step (`int`): Optimizer steps done.
        decay_steps (`int`): Steps until the scale is 1, at least 1.
        scale_decay (`str`, *optional*, defaults to `"linear"`): One of `SCALE_DECAYS`.

    Returns:
        `float`: Exactly `scale` at step 0 and, unless constant, exactly 1.0 from `decay_steps` on.

    Raises:
        `ValueError`: `scale_decay` is not one of `SCALE_DECAYS`.
    """
    check_scale_decay(scale_decay)
    remaining = _REMAINING[scale_decay](min(1.0, max(0, step) / decay_steps))
    return scale if remaining == 1.0 else 1.0 + (scale - 1.0) * remaining
