"""A check of a shaping of one's own, for one's own tests: that the gradient of each token is the one that is meant."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .a3po_trainer import A3POTrainer
from .training.trl_contract import loss_gradient, loss_inputs


def assert_gradients_follow(trainer: A3POTrainer, reference: Callable[..., Tensor], *, seed: int = 0) -> None:
    """
    Fails unless each token's gradient is the one that TRL's loss gives to the advantage that `reference` says.

    The trainer's loss, as it is configured, is run on made-up log-probabilities of 6 completions of up to 8 tokens:
    of positive, negative and zero advantage, the last of groups that are all right and all wrong, one without a
    reward, one masked whole, three with a token masked among others; as in an update that is aligned with its rollout
    and as in a later one, with ratios that are clipped; at the beginning, after a quarter, after half and at the end
    of training. A token's gradient is to be GRPO's of the advantage 1, or -1, times |A_t|: also where the advantage of
    its completion is 0.

    Takes a fraction of a second, and touches neither the model nor, unless your method does, the trainer.

    Args:
        trainer ([`A3POTrainer`]):
            Yours, with `shape_advantages` overridden.
        reference (callable):
            What it is meant to compute, written another way. It is called as `shape_advantages` is, without `self`,
            and returns the advantages of shape `(B, T)` or `(B,)`; what they are where `mask` is 0 makes no
            difference.
        seed (`int`, *optional*, defaults to `0`):
            Of what is made up.

    Raises:
        `AssertionError`: naming the token, its advantage by `reference`, its gradient and the one that is expected.
        `TypeError`, `ValueError`: your method returns what no loss can take, or changes an argument in place.
    """
    inputs, logps, entropies = _batch(seed, trainer.accelerator.device)
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

    def of(shape_advantages: Callable[..., Tensor] | None) -> Tensor:
        copies = {name: value.clone() for name, value in inputs.items()}
        return loss_gradient(trainer, copies, logps, entropies, shape_advantages, progress)

    found, positive, negative = of(None), of(unit), of(lambda advantages, **_: -torch.ones_like(advantages))
    if shaped.dim() == 1:
        shaped = shaped[:, None].expand_as(logps)
    shaped = shaped.to(logps.dtype).where(inputs["completion_mask"].bool(), 0.0)
    expected = torch.where(shaped > 0, positive, negative) * shaped.abs()
    for row, token in (~torch.isclose(found, expected, rtol=1e-4, atol=1e-7)).nonzero().tolist():
        case = "with old log-probabilities" if "old_per_token_logps" in inputs else "while they are the old ones"
        raise AssertionError(
            f"Token {token} of completion {row} (advantage {inputs['advantages'][row]:g}, reward "
            f"{inputs['rewards'][row]:g}) has the gradient {found[row, token]:g}. To the advantage that the reference "
            f"says, {shaped[row, token]:g}, the loss gives {expected[row, token]:g} ({case}; progress {progress:g})."
        )


def _batch(seed: int, device: torch.device) -> tuple[dict[str, Any], Tensor, Tensor]:
    """What a loss is computed from, log-probabilities (6, 8) and entropies (6, 8)."""
    generator = torch.Generator().manual_seed(seed)
    logps = (-4 * torch.rand(6, 8, generator=generator)).to(device)
    entropies = (3 * torch.rand(6, 8, generator=generator)).to(device)
    lengths = torch.tensor([8, 6, 8, 5, 0, 3], device=device)
    mask = (torch.arange(8, device=device) < lengths[:, None]).long()
    mask[[0, 1, 2], [2, 4, 1]] = 0  # as the output of a tool leaves them
    advantages = torch.tensor([1.2, -0.7, 0.0, 0.0, -0.5, 0.0], device=device)
    rewards = torch.tensor([1.0, 0.0, 0.0, 1.0, 0.0, torch.nan], device=device)
    return {**loss_inputs(advantages, mask, logps), "rewards": rewards}, logps, entropies
