"""
Checks that the installed TRL still behaves as the hook of [`A3POTrainer`] needs.

The hook overrides two methods of `GRPOTrainer` and copies neither. A release of TRL can change these methods without
an error: if it averaged advantages to one per completion, or read them too early, it would train plain GRPO under the
name of A3PO. A version number does not show this. So the check runs the loss of the installed TRL, as the trainer is
configured, on a few made-up log-probabilities, and looks at the gradient of each token.

It examines TRL's loss and the classes of this package, and runs no code of a user's subclass. That code may need
attributes that its `__init__` has not set yet, or fields that only real rollouts have.
"""

import copy
import inspect
import math
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from trl import GRPOConfig, GRPOTrainer

from .relied_on import advice, base_description, check_relied_on, our_class


def check_contract(trainer: GRPOTrainer) -> None:
    """
    Fails unless TRL has the names that are relied on, and each token's gradient is GRPO's times that token's weight.

    Takes a few milliseconds and changes neither the model nor the trainer. On several processes, each runs the same
    collective operations, those of two loss computations.

    Args:
        trainer ([`A3POTrainer`]): The trainer at the end of [`A3POTrainer`]'s own `__init__`.

    Raises:
        `RuntimeError`: the check fails. The message has the reason and the TRL version, or the class that has
            replaced TRL's.
        `ValueError`: the loss refuses the value of an option.
    """
    check_relied_on(trainer)
    try:
        plain, weighted, weights = _gradients(trainer)
    except Exception as error:
        for option in ("loss_type", "importance_sampling_level"):
            # A loss that does not know the value says which. Any other error is of TRL, not of the user.
            if isinstance(error, ValueError) and str(value := getattr(trainer.args, option)) in str(error):
                raise ValueError(
                    f"`{option}={value!r}` is not known to the loss of {base_description(trainer)} ({error}). The "
                    "documentation of `GRPOConfig` lists the values. The default is "
                    f"{GRPOConfig.__dataclass_fields__[option].default!r}. If your class computes a loss of its own, "
                    f"set `self.{option}` after `super().__init__()`."
                ) from error
        raise RuntimeError(_message(trainer, f"its loss raises {type(error).__name__}: {error}")) from error
    if not torch.equal(plain != 0, weights != 0):
        raise RuntimeError(_message(trainer, "an unmasked token got no gradient, or a masked token got one"))
    if not torch.allclose(weighted, plain * weights, rtol=1e-4):
        found = torch.where(weights != 0, weighted / plain, 0.0)
        raise RuntimeError(_message(trainer, f"token weights of {weights.tolist()} became {found.tolist()}"))


def _message(trainer: GRPOTrainer, found: str) -> str:
    args: Any = trainer.args
    return (
        f"{base_description(trainer)} does not compute A3PO's loss with `loss_type={args.loss_type!r}` and "
        f"`importance_sampling_level={args.importance_sampling_level!r}`: {found}. A3POTrainer needs "
        "`GRPOTrainer.compute_loss` to call `_compute_loss`, and `_compute_loss` to call "
        "`_get_per_token_logps_and_entropies` before it reads `inputs['advantages']` of shape (B, T). "
        f"{advice(trainer)} If you changed `loss_type` or `importance_sampling_level`, the default may also work."
    )


def loss_gradient(
    trainer: GRPOTrainer,
    inputs: dict[str, Any],
    per_token_logps: Tensor,
    entropies: Tensor,
    shape_advantages: Callable[..., Tensor] | None = None,
    progress: float = 0.0,
    trainer_class: type[Any] | None = None,
) -> Tensor:
    """
    Gradient of the trainer's loss with respect to given log-probabilities, which replace those of its model.

    Args:
        trainer ([`A3POTrainer`]): The trainer. It does not change.
        inputs (`dict`): A micro-batch of B rows and T tokens.
        per_token_logps (`torch.Tensor` of shape `(B, T)`): The log-probabilities.
        entropies (`torch.Tensor` of shape `(B, T)`): The entropies.
        shape_advantages (callable, *optional*): Replaces the trainer's `shape_advantages`.
        progress (`float`, *optional*, defaults to `0.0`): Share of the optimizer steps that are done.
        trainer_class (`type`, *optional*): The class whose loss is used; by default that of the trainer.

    Returns:
        `torch.Tensor` of shape `(B, T)`.
    """

    class Probe(trainer_class or type(trainer), _FixedLogps):  # type: ignore[misc]
        pass

    probe = shallow_copy(trainer)
    probe.__class__ = Probe
    probe.state.max_steps = max(4, trainer.args.max_steps)
    probe.state.global_step = math.ceil(progress * probe.state.max_steps)
    probe.current_gradient_accumulation_steps = 1
    if shape_advantages is not None:
        probe.shape_advantages = shape_advantages
    probe._given = per_token_logps.clone().requires_grad_(), entropies
    with torch.enable_grad():
        loss = probe.compute_loss(trainer.model, inputs)
        return torch.autograd.grad(loss, probe._given[0])[0]


def shallow_copy(trainer: GRPOTrainer) -> Any:
    """A copy that has the attributes which a loss assigns for itself. Containers that the loss changes are new."""
    copied: Any = copy.copy(trainer)
    copied.args = copy.copy(trainer.args)
    copied.args.report_to = []
    copied._metrics = {"train": defaultdict(list), "eval": defaultdict(list)}
    copied._polarity_sums = {}
    copied._token_log = None
    copied.state = copy.copy(trainer.state)
    return copied


class _FixedLogps(GRPOTrainer):
    """Stands between the trainer and `GRPOTrainer`, and returns given log-probabilities instead of a model's."""

    _given: tuple[Tensor, Tensor]

    def _get_per_token_logps_and_entropies(self, *args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
        # The third value, the router's loss, came with TRL 1.7.
        parameters = inspect.signature(GRPOTrainer._get_per_token_logps_and_entropies).parameters
        router_loss = (self._given[0].new_zeros(()),) if "compute_aux_loss" in parameters else ()
        return *self._given, *router_loss


def _gradients(trainer: GRPOTrainer) -> tuple[Tensor, Tensor, Tensor]:
    """(B, T) each: gradients without weights, gradients with weights, and the weights, 0 where masked."""
    device = trainer.accelerator.device
    advantages = torch.tensor([1.0, -1.0], device=device)
    weights = torch.tensor([[1.0, 2.0, 4.0], [3.0, 0.5, 0.0]], device=device)
    logps = torch.tensor([[-0.5, -1.0, -2.0], [-1.5, -0.25, -0.75]], device=device)
    inputs = loss_inputs(advantages, (weights != 0).long(), logps)
    probed = shallow_copy(trainer)
    # The KL term has no gradient here. With weights, the option may be refused, although this trainer has none.
    probed.args.use_bias_correction_kl = False

    def gradient(shape_advantages: Callable[..., Tensor]) -> Tensor:
        entropies = torch.ones_like(logps)
        return loss_gradient(probed, inputs, logps, entropies, shape_advantages, trainer_class=our_class(trainer))

    plain = gradient(lambda advantages, **_: advantages)
    weighted = gradient(lambda advantages, **_: advantages[:, None] * weights)
    return plain, weighted, weights


def loss_inputs(advantages: Tensor, mask: Tensor, per_token_logps: Tensor) -> dict[str, Any]:
    """
    A made-up micro-batch, of a rollout that is aligned with the update. All tokens are from the model, and rewards are
    1 and 0. The KL term, if there is one, has no gradient.

    Args:
        advantages (`torch.Tensor` of shape `(B,)`): One advantage per completion.
        mask (`torch.Tensor` of shape `(B, T)`): 1 on unmasked tokens, else 0.
        per_token_logps (`torch.Tensor` of shape `(B, T)`): Log-probabilities of reference model and sampler.
    """
    return {
        "prompt_ids": mask[:, :1],
        "prompt_mask": torch.ones_like(mask[:, :1]),
        "completion_ids": mask,
        "completion_mask": mask,
        "advantages": advantages,
        "rewards": (advantages > 0).float(),
        "num_items_in_batch": mask.sum(),
        "ref_per_token_logps": per_token_logps,
        "sampling_per_token_logps": per_token_logps,
        "importance_sampling_ratio": torch.ones_like(per_token_logps),
    }
