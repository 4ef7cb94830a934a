"""A check for the tests of your own shaping: each token gets the gradient that you intend."""

import functools
import traceback
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from .a3po_trainer import A3POTrainer
from .peers import HOOK_ARGUMENTS
from .training.trl_contract import loss_gradient, loss_inputs
from .update.model_traits import same_random_numbers


def assert_gradients_follow(
    trainer: A3POTrainer,
    reference: Callable[..., Tensor],
    *,
    fields: Mapping[str, Any] | None = None,
    seed: int = 0,
) -> None:
    """
    Fails unless each token gets the gradient that TRL's loss gives to the advantage computed by `reference`.

    It runs the loss of the trainer, as it is configured, on made-up log-probabilities of 6 completions with up to 8
    tokens:

    - The advantages are positive, negative and zero. Those of zero are from groups that are all right or all wrong.
    - One completion has no reward, one is masked as a whole, and in three of them a single token is masked.
    - Some updates are aligned with their rollout. In the others, ratios are clipped.
    - The training is at its beginning, after a quarter, after half and at its end.

    The expected gradient of a token is GRPO's gradient for the advantage 1 or -1, times |A_t|. This also holds for
    completions whose advantage is 0.

    The check takes a fraction of a second. It does not change the model, and changes the trainer only if your method
    does.

    Args:
        trainer ([`A3POTrainer`]):
            A trainer of your class, which overrides `shape_advantages`.
        reference (callable):
            The same computation, written in another way. It gets the arguments of `shape_advantages` without `self`,
            and returns the advantages, of shape `(B, T)` or `(B,)`. Values where `mask` is 0 have no influence.
        fields (`dict`, *optional*):
            Fields that your class adds to its rollouts, if its hook or its loss reads them: for 6 completions of 8
            tokens. Tensors are copied. The hook and the reference get those that they name.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the made-up log-probabilities and entropies.

    Choose the settings of your method so that both sides of each of its conditions occur here: entropies are between 0
    and 3 nats, log-probabilities between -4 and 0 (old ones up to 0.7 from them), completions have at most 8 tokens,
    and rewards are 0 or 1, or NaN where a completion has none.

    Raises:
        `AssertionError`: a gradient differs. Names the token, its advantage by `reference`, its gradient and the
            expected one.
        `TypeError`, `ValueError`: your method or the reference returns something else than advantages; your method
            changes an argument in place, or reads one that the hook does not have; or your hook or loss reads a field
            that is not in `fields`.
    """
    if not isinstance(trainer, A3POTrainer):
        raise TypeError(f"`trainer` must be an `A3POTrainer`, got {trainer!r}.")
    inputs, logps, entropies = _batch(seed, trainer.accelerator.device)
    inputs.update(fields or {})
    if trainer._shapes_completionwise:
        # Where each completion has an advantage, there is more to compare.
        advantages = torch.tensor([1.2, -0.7, 0.9, -1.1, -0.5, 0.4], device=logps.device)
        _gradient(trainer, {**inputs, "advantages": advantages}, logps, entropies)
    noise = torch.tensor([[-0.6, 0.05, 0.7, -0.1]], device=logps.device).repeat(1, 2)
    for progress in (0.0, 0.25, 0.5, 1.0):
        for case in ({}, {"old_per_token_logps": logps + noise}):
            _compare(trainer, reference, {**inputs, **case}, logps, entropies, progress)


def _compare(
    trainer: A3POTrainer,
    reference: Callable[..., Tensor],
    inputs: dict[str, Any],
    logps: Tensor,
    entropies: Tensor,
    progress: float,
) -> None:
    shaped = logps

    def unit(advantages: Tensor, **batch: Any) -> Tensor:
        nonlocal shaped
        shaped = reference(advantages, **batch)
        return torch.ones_like(advantages)

    functools.update_wrapper(unit, reference)  # it gets the fields that the reference names

    def of(shape_advantages: Callable[..., Tensor] | None) -> Tensor:
        return _gradient(trainer, inputs, logps, entropies, shape_advantages, progress)

    found, positive, negative = of(None), of(unit), of(lambda advantages, **_: -torch.ones_like(advantages))
    if not isinstance(shaped, Tensor) or shaped.shape not in (logps.shape, logps.shape[:1]):
        got = tuple(shaped.shape) if isinstance(shaped, Tensor) else type(shaped).__name__
        raise ValueError(f"`reference` must return a tensor of shape (B, T) = (6, 8) or (B,) = (6,), got {got}.")
    if shaped.dim() == 1:
        shaped = shaped[:, None].expand_as(logps)
    shaped = shaped.to(logps).where(inputs["completion_mask"].bool(), 0.0)
    expected = torch.where(shaped > 0, positive, negative) * shaped.abs()
    for row, token in (~torch.isclose(found, expected, rtol=1e-4, atol=1e-7)).nonzero().tolist():
        is_aligned = "old_per_token_logps" not in inputs
        case = "update aligned with its rollout" if is_aligned else "update after others on the same rollout"
        hint = "" if trainer._overrides_shaping else f" {type(trainer).__name__} does not override `shape_advantages`."
        raise AssertionError(
            f"Token {token} of completion {row} (advantage {inputs['advantages'][row]:g}, reward "
            f"{inputs['rewards'][row]:g}) has the gradient {found[row, token]:g}. Expected "
            f"{expected[row, token]:g}, because its advantage by the reference is {shaped[row, token]:g} ({case}; "
            f"progress {progress:g}).{hint}"
        )


def _gradient(trainer: A3POTrainer, inputs: dict[str, Any], *arguments: Any) -> Tensor:
    """What [`loss_gradient`] returns for copies of the inputs. Every call draws the same random numbers."""
    device = trainer.accelerator.device
    copies = {
        name: value.to(device, copy=True) if isinstance(value, Tensor) else value for name, value in inputs.items()
    }
    try:
        with same_random_numbers(device):
            return loss_gradient(trainer, copies, *arguments)
    except KeyError as error:
        name = error.args[0]
        if any(frame.name == "shape_advantages" for frame in traceback.extract_tb(error.__traceback__)):
            raise ValueError(
                f"`{type(trainer).__name__}.shape_advantages` reads {name!r}, which is not an argument of the "
                f"hook. Its arguments are advantages, {', '.join(sorted(HOOK_ARGUMENTS))}, and the fields of the "
                f"rollout that its signature names. If {name!r} is a field, name it there, and pass it in "
                "`fields`."
            ) from error
        if name in copies:
            raise
        raise ValueError(
            f"The loss of {type(trainer).__name__} reads {name!r}, which made-up completions do not have. Pass it "
            f"in `fields`, for 6 completions of 8 tokens: fields={{{name!r}: torch.zeros(6)}}."
        ) from error


def _batch(seed: int, device: torch.device) -> tuple[dict[str, Any], Tensor, Tensor]:
    """A micro-batch, log-probabilities (6, 8) and entropies (6, 8)."""
    generator = torch.Generator().manual_seed(seed)
    logps = (-4 * torch.rand(6, 8, generator=generator)).to(device)
    entropies = (3 * torch.rand(6, 8, generator=generator)).to(device)
    lengths = torch.tensor([8, 6, 8, 5, 0, 3], device=device)
    mask = (torch.arange(8, device=device) < lengths[:, None]).long()
    mask[[0, 1, 2], [2, 4, 1]] = 0  # like the output of a tool
    advantages = torch.tensor([1.2, -0.7, 0.0, 0.0, -0.5, 0.0], device=device)
    rewards = torch.tensor([1.0, 0.0, 0.0, 1.0, 0.0, torch.nan], device=device)
    return {**loss_inputs(advantages, mask, logps), "rewards": rewards}, logps, entropies
