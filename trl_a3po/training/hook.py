"""Calls a `shape_advantages` that is not A3PO's, and checks what it does."""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..peers import HOOK_ARGUMENTS


def fields_named_by(hook: Callable[..., Any]) -> frozenset[str]:
    """The parameters of a `shape_advantages` that have no default and are no arguments of the hook."""
    named = list(inspect.signature(hook).parameters.values())[1:]
    variable = inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD
    required = {each.name for each in named if each.default is each.empty and each.kind not in variable}
    return frozenset(required - HOOK_ARGUMENTS)


def is_completionwise(hook: Callable[..., Any]) -> bool:
    """Whether a function or method is marked with [`~trl_a3po.completionwise`]."""
    return getattr(hook, "is_completionwise", False)


def call_hook(hook: Callable[..., Tensor], advantages: Tensor, *, mask: Tensor, **batch: Any) -> Tensor:
    """
    The advantages that `hook` returns, 0 where `mask` is 0. Does not wait for the device.

    Raises:
        `TypeError`: the result is not a tensor of floating-point numbers.
        `ValueError`: the result has a wrong shape, or an argument was changed in place.
    """
    given = {"advantages": advantages, "mask": mask, **batch}
    versions = {
        name: tensor._version
        for name, tensor in given.items()
        if isinstance(tensor, Tensor) and not tensor.is_inference()  # inference tensors have no version
    }
    shaped = hook(advantages, mask=mask, **batch)
    if not isinstance(shaped, Tensor) or not shaped.is_floating_point():
        found = shaped.dtype if isinstance(shaped, Tensor) else type(shaped).__name__
        raise TypeError(f"`shape_advantages` must return a tensor of floating-point numbers, got {found}.")
    if shaped.shape not in (advantages.shape, mask.shape):
        raise ValueError(
            f"`shape_advantages` must return a tensor of shape (B, T) = {tuple(mask.shape)} or (B,) = "
            f"{tuple(advantages.shape)}, got {tuple(shaped.shape)}."
        )
    changed = [f"`{name}`" for name, version in versions.items() if given[name]._version != version]
    if changed:
        raise ValueError(
            f"`shape_advantages` changed {', '.join(changed)} in place. These tensors are reused in later "
            "iterations. Return a new tensor instead."
        )
    # TRL multiplies by the mask, and 0 times NaN is NaN.
    is_counted = mask.bool() if shaped.dim() == 2 else mask.any(1)
    return shaped.where(is_counted, 0.0)


def check_completionwise(hook: Callable[..., Tensor], advantages: Tensor, *, mask: Tensor, **batch: Any) -> bool:
    """
    Fails unless `hook` keeps the promise of [`~trl_a3po.completionwise`] on these completions.

    It runs twice, with the same random numbers. The second time, half of the completions have the advantage 0, other
    rewards, log-probabilities and entropies. The results for the other half have to be the same. Waits for the device.

    Returns:
        `bool`: Whether there were at least two completions to compare.

    Raises:
        `ValueError`: a result differs, or a completion of advantage 0 gets another advantage.
    """
    is_live = (advantages != 0) & mask.any(1)
    is_changed = is_live.cumsum(0) > is_live.sum() // 2
    changed = dict(batch)
    for name in ("per_token_logps", "old_per_token_logps", "entropies"):
        changed[name] = torch.where(is_changed[:, None], batch[name] / 2, batch[name])
    if (rewards := batch["rewards"]) is not None:
        changed["rewards"] = torch.where(is_changed, rewards + 1, rewards)

    def run(advantages: Tensor, batch: dict[str, Any]) -> Tensor:
        device = advantages.device
        devices = [] if device.type in ("cpu", "mps") else [device]
        with torch.random.fork_rng(devices, device_type=device.type):
            shaped = call_hook(hook, advantages, mask=mask, **batch)
        return shaped if shaped.dim() == 2 else shaped[:, None]

    before, after = run(advantages, batch), run(advantages.masked_fill(is_changed, 0.0), changed)
    if (after[is_changed] != 0).any():
        found = "gives an advantage to tokens of a completion whose own advantage is 0"
    elif not torch.allclose(before[~is_changed], after[~is_changed], rtol=1e-4, equal_nan=True):
        found = "gives a completion other advantages if other completions of the batch change"
    else:
        return int(is_live.sum()) > 1
    raise ValueError(
        f"`{getattr(hook, '__qualname__', 'shape_advantages')}` is marked with `@completionwise`, but it {found}. Its "
        "update would be wrong: completions of advantage 0 are skipped, and the others change their micro-batches. "
        "Remove the mark, or compute each row from its own values only."
    )
