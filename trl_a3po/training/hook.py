"""Calls a `shape_advantages` that is not A3PO's, and checks what it does."""

import inspect
from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor

from ..peers import HOOK_ARGUMENTS
from ..update.micro_batches import take_rows
from ..update.model_traits import same_random_numbers


def fields_named_by(hook: Callable[..., Any]) -> dict[str, bool]:
    """The parameters of a `shape_advantages` that are no arguments of the hook, and whether each has no default."""
    named = list(inspect.signature(hook).parameters.values())[1:]
    variable = inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD
    return {
        each.name: each.default is each.empty
        for each in named
        if each.kind not in variable and each.name not in HOOK_ARGUMENTS
    }


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

    A completion has to get the same beside the others as beside copies of itself without tokens, at the same place
    and with the same random numbers. If all advantages are 0, the results have to be 0. Waits for the device.

    Returns:
        `bool`: Whether there were at least two completions to compare. If not, `hook` did not run.

    Raises:
        `ValueError`: the promise is broken.
    """
    live = ((advantages != 0) & mask.any(1)).nonzero().flatten().tolist()
    if len(live) < 2:
        return False
    given = {"advantages": advantages, "mask": mask, **batch}

    def run(changed: dict[str, Any]) -> Tensor:
        with same_random_numbers(advantages.device):
            shaped = call_hook(hook, **{**given, **changed})
        return shaped if shaped.dim() == 2 else shaped[:, None]

    without = run({"advantages": torch.zeros_like(advantages)})
    if others := without[without != 0].tolist():
        _refuse_mark(hook, f"it returns {others[0]:g} for a completion whose advantage is 0")
    together = run({})
    for row in live:
        copies = {name: take_rows(value, [row] * len(advantages)) for name, value in given.items()}
        is_row = (torch.arange(len(advantages), device=advantages.device) == row)[:, None]
        alone = run({**copies, "mask": copies["mask"].where(is_row, 0)})
        if not torch.allclose(alone[row], together[row], rtol=1e-4, equal_nan=True):
            _refuse_mark(
                hook,
                "what it returns for a completion depends on the other completions of the batch, or on random numbers "
                "that are not from torch's own generator",
            )
    return True


def _refuse_mark(hook: Callable[..., Tensor], found: str) -> NoReturn:
    raise ValueError(
        f"`{getattr(hook, '__qualname__', 'shape_advantages')}` is marked with `@completionwise`, but {found}. The "
        "update would be wrong: completions of advantage 0 are skipped, and the others change their micro-batches. "
        "Remove the mark, or compute each row from its own values only."
    )
