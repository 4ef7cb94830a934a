"""[`EfficientUpdateGRPOTrainer`]: TRL's update without the padding and the rows that cannot matter."""

import math
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PretrainedConfig, ProcessorMixin
from trl import GRPOTrainer

from ..a3po_config import A3POConfig
from .loss_scope import LossScope
from .micro_batches import Plan, loss_mask, plan_micro_batches, row_lengths, run_extent, run_in_order


# Sums over tokens, or means over rows, with one denominator for all micro-batches of an optimizer step. That of BNPO
# is the number of tokens in the micro-batch.
_SAME_LOSS_IN_ANY_GROUPING = ("grpo", "sapo", "dr_grpo", "luspo", "dapo", "cispo", "vespo")

# The key under which a micro-batch carries its [`Plan`].
PLAN = "a3po_plan"

# Kinds of layers, as configurations name them, to which padding on the left is as if it were not there.
_BY_DISTANCE = {"full_attention", "sliding_attention", "linear_attention"}


class EfficientUpdateGRPOTrainer(GRPOTrainer):
    """
    The part of [`A3POTrainer`] that is about cost: the update of [`~trl.GRPOTrainer`], from fewer positions.

    Every pass over the model sees only the columns that some row of its micro-batch uses (`trim_padding`), and the
    passes of the loss skip the rows that cannot have a gradient (`skip_zero_advantage`). The rows of an optimizer step
    are grouped by length, those with a gradient first, where the loss is the same for any grouping. Each micro-batch
    still runs the model once, so that all processes take part in the same collective operations.

    A subclass answers two questions: [`~EfficientUpdateGRPOTrainer._signs_without_gradient`] (which rows may be
    skipped?) and [`~EfficientUpdateGRPOTrainer._before_loss_reads`] (which advantages does the loss read?).
    """

    args: A3POConfig
    model: torch.nn.Module

    # Of the call of TRL's loss that is running.
    _loss_scope: LossScope | None = None

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._multiple = int(self.pad_to_multiple_of or 1)
        suited = not (
            # Images belong to columns, and are not split by rows.
            isinstance(self.processing_class, ProcessorMixin)
            # Where a process has fewer tokens than the others, more of its experts have no gradient, and DDP waits
            # for them.
            or (self.accelerator.num_processes > 1 and has_experts_as_modules(self.model))
        )
        self._trims = self.args.trim_padding and suited
        self._trims_prompt = self._trims and not sees_padding(self.model)
        self._may_skip = self.args.skip_zero_advantage and suited

    def _signs_without_gradient(self) -> frozenset[int]:
        """
        The signs of advantages (-1, 0 or 1) whose completions have no gradient at this step.

        None at all says that every row matters, and so does the company of rows in a micro-batch: rows are neither
        skipped nor regrouped.
        """
        return frozenset({0})

    def _before_loss_reads(self, scope: LossScope, per_token_logps: Tensor, entropies: Tensor) -> None:
        """
        Called in each loss between the forward pass and the moment that TRL reads `scope.inputs`.

        Args:
            scope ([`LossScope`]): Its `inputs` may be changed. The tensors in them may not.
            per_token_logps (`torch.Tensor` of shape `(B, T)`): Log-probabilities; 0 in rows that are skipped.
            entropies (`torch.Tensor` of shape `(B, T)`): Entropies; NaN in rows that are skipped.
        """

    @property
    def _loss_looks_at_all_rows(self) -> bool:
        """Whether a row, or the company of rows in a micro-batch, matters to the loss beyond its own advantage."""
        return (
            self.top_entropy_quantile < 1.0
            or getattr(self, "_entropy_bonus_enabled", False)  # since TRL 1.9
            or getattr(self, "aux_loss_enabled", False)  # since TRL 1.7
        )

    def _skippable_signs(self) -> frozenset[int]:
        """The signs of advantages whose completions are skipped at this step."""
        skips = self._may_skip and self.beta == 0.0 and not self._loss_looks_at_all_rows
        return self._signs_without_gradient() if skips else frozenset()

    def _has_gradient(self, inputs: dict[str, Any]) -> Tensor:
        """(B,) whether the loss can have a gradient in each row of a micro-batch, if rows may be skipped at all."""
        return _has_sign_outside(self._signs_without_gradient(), inputs) & loss_mask(inputs).any(1)

    def _prepare_inputs(self, generation_batch):
        rollout = self._buffered_inputs
        inputs = super()._prepare_inputs(generation_batch)
        if self._buffered_inputs is rollout or not (self._trims or self._may_skip):
            return inputs  # a rollout that is used again, or an evaluation, whose batches are as wide as they need
        self._buffered_inputs = self._plan_update(self._buffered_inputs)
        return self._buffered_inputs[self._step % self.args.steps_per_generation]

    def _plan_update(self, micro_batches: list[dict[str, Any]]) -> list[dict[str, Any]]:
        regroups = (
            self.loss_type in _SAME_LOSS_IN_ANY_GROUPING
            and not self._loss_looks_at_all_rows
            and bool(self._signs_without_gradient())
        )
        # The most micro-batches that never straddle two optimizer steps, whichever of the two periods is the longer.
        window = math.gcd(len(micro_batches), self.args.gradient_accumulation_steps) if regroups else 1
        skipped = self._skippable_signs()
        planned = []
        for start in range(0, len(micro_batches), window):
            part = micro_batches[start : start + window]
            masks = [torch.cat([batch[name] for batch in part]) for name in ("prompt_mask", "completion_mask")]
            lengths = self._lengths(*masks)
            live = [True] * len(lengths)
            if skipped:
                has_gradient = [_has_sign_outside(skipped, batch) & loss_mask(batch).any(1) for batch in part]
                live = torch.cat(has_gradient).tolist()
            batches, extents = plan_micro_batches(part, lengths, live, self._multiple)
            planned += [{**batch, PLAN: Plan(extent, skipped)} for batch, extent in zip(batches, extents, strict=True)]
        return planned

    def _lengths(self, prompt_mask: Tensor, completion_mask: Tensor) -> list[tuple[int, int]]:
        if not self._trims:
            return [(prompt_mask.shape[1], completion_mask.shape[1])] * len(prompt_mask)
        return row_lengths(prompt_mask if self._trims_prompt else torch.ones_like(prompt_mask), completion_mask)

    def _compute_loss(self, model, inputs):
        self._loss_scope = scope = LossScope(self, inputs)
        try:
            return super()._compute_loss(model, scope.inputs)
        finally:
            scope.end()
            self._loss_scope = None

    def _get_per_token_logps_and_entropies(
        self, model, input_ids, attention_mask, logits_to_keep, batch_size=None, **kwargs
    ):
        compute = super()._get_per_token_logps_and_entropies

        def forward(input_ids, attention_mask, logits_to_keep):
            return compute(model, input_ids, attention_mask, logits_to_keep, **kwargs)

        scope = self._loss_scope
        is_for_loss = scope is not None and scope.waits_for_logps
        if self._trims and not is_for_loss:
            prompt_width = input_ids.shape[1] - logits_to_keep
            lengths = self._lengths(attention_mask[:, :prompt_width], attention_mask[:, prompt_width:])
            batch_size = batch_size or len(input_ids)
            return run_in_order(
                forward, input_ids, attention_mask, logits_to_keep, lengths, batch_size, self._multiple
            )
        if scope is None or not is_for_loss:
            return compute(model, input_ids, attention_mask, logits_to_keep, batch_size=batch_size, **kwargs)
        scope.waits_for_logps = False
        plan = scope.inputs.pop(PLAN, None)
        # A row that was skipped when the rollout was planned may have a gradient by now: in a subclass that changes
        # the weights from step to step, or a hook that was assigned in between.
        if plan is None or not plan.skipped_signs <= self._skippable_signs():
            output = compute(model, input_ids, attention_mask, logits_to_keep, batch_size=batch_size, **kwargs)
        else:
            output = run_extent(forward, input_ids, attention_mask, logits_to_keep, plan.extent)
            if "old_per_token_logps" in scope.inputs:
                # The ratio of a skipped row is 1.
                rows, old_logps = plan.extent.rows, scope.inputs["old_per_token_logps"]
                output = (torch.cat([output[0][:rows], output[0][rows:] + old_logps[rows:]]), *output[1:])
        self._before_loss_reads(scope, per_token_logps=output[0], entropies=output[1])
        return output


def _has_sign_outside(signs: frozenset[int], inputs: dict[str, Any]) -> Tensor:
    """(B,) whether the sign of each advantage is none of some signs. NaN has no sign, and a gradient."""
    advantages = inputs["advantages"]
    is_inside = torch.zeros_like(advantages, dtype=torch.bool)
    for sign in signs:
        is_inside |= advantages.sign() == sign
    return ~is_inside


def sees_padding(model: torch.nn.Module) -> bool:
    """
    Whether it makes a difference to a model how many columns of padding are to the left of its tokens.

    It makes none to rotary positions and attention that goes by distance. It does to positions that are looked up by
    column (GPT-2), to a rotation that depends on the length, to attention that is scaled or cut into blocks by column
    (Llama 4, Ministral 3), and where adapters put virtual tokens before the padding. What is not known is taken to see
    it.
    """
    adapters = getattr(model, "peft_config", {}).values()
    config = cast(PretrainedConfig, model.config).get_text_config()
    rope = _rope(config)
    nested = [rope, *(value for value in rope.values() if isinstance(value, dict))]
    return (
        any(adapter.is_prompt_learning for adapter in adapters)
        or not has_rotary_positions(config)
        or not {each.get("rope_type", "default") for each in nested}.isdisjoint({"dynamic", "longrope"})
        or any(each.get("llama_4_scaling_beta") for each in nested)
        or bool(getattr(config, "attn_temperature_tuning", None) or getattr(config, "log_scaling_n_floor", None))
        or not _BY_DISTANCE.issuperset(getattr(config, "layer_types", None) or ())
        or config.model_type == "recurrent_gemma"  # whose recurrent layers do not mask it
    )


def has_experts_as_modules(model: torch.nn.Module) -> bool:
    """Whether experts are modules of their own, as before transformers 5: those without a token have no gradient."""
    return any(
        name.endswith("experts") and isinstance(module, torch.nn.ModuleList) for name, module in model.named_modules()
    )


def has_rotary_positions(config: PretrainedConfig) -> bool:
    """Whether a model rotates its positions, rather than looks them up in a table of so many."""
    return bool(_rope(config)) or hasattr(config.get_text_config(), "rope_theta")


def _rope(config: PretrainedConfig) -> dict[str, Any]:
    config = config.get_text_config()
    return getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
