"""[`LossScope`]: one call of TRL's loss, or of the pass that it takes the old log-probabilities from."""

from typing import Any

from torch import Tensor
from trl import GRPOTrainer

from .micro_batches import add_rows
from .plan import Plan, plan_of


def check_advantages(advantages: Tensor) -> None:
    """
    Raises:
        `ValueError`: the rollout has not one advantage per completion.
    """
    if advantages.dim() != 1:
        raise ValueError(
            f"The rollout has `advantages` of shape {tuple(advantages.shape)}. It must have one per completion, of "
            "shape (B,). Override `shape_advantages` to give each token its own."
        )


class LossScope:
    """
    Exists as long as one call of TRL's loss, and holds the state of that call.

    TRL's loss first asks for the log-probabilities of its micro-batch, and then reads the advantages. It gets a copy
    of the micro-batch, because the rollout's own dict is reused in later iterations and must not be shaped twice.

    Attributes:
        inputs (`dict`): The copy that TRL's loss reads.
        is_loss (`bool`): Whether TRL's loss runs, not the pass for old log-probabilities in its layout.
        plan ([`Plan`], *optional*): Which rows are computed; `None` for all.
        advantages_changed (`bool`): Whether a subclass has replaced the advantages, or changed them in place.
        present (`int`): Rows of the micro-batch. `inputs` may have more rows, which have no tokens.
        computed (`int`): Rows that the model computes. They are the first ones.
        waits_for_logps (`bool`): Whether TRL's loss has not asked for the log-probabilities yet. A subclass may run
            further passes inside the loss.
    """

    def __init__(self, trainer: GRPOTrainer, inputs: dict[str, Any], is_loss: bool = True):
        check_advantages(inputs["advantages"])
        self.is_loss = is_loss
        self.inputs = dict(inputs)
        self.plan: Plan | None = plan_of(inputs)
        self.present = len(inputs["completion_ids"])
        self.computed = self.present if self.plan is None else self.plan.computed
        self.advantages_changed = self.plan is not None and self.plan.advantages_changed(inputs["advantages"])
        if self.plan is not None:
            self.inputs = add_rows(self.inputs, self.plan.rows)
        self.waits_for_logps = True
        self._trainer = trainer
        self._importance_sampling_level = trainer.importance_sampling_level

    def use_token_level_ratio(self) -> None:
        """Makes the loss compute one importance ratio per token until the scope ends."""
        self._trainer.importance_sampling_level = "token"

    def end(self) -> None:
        self._trainer.importance_sampling_level = self._importance_sampling_level
