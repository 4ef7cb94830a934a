"""[`TrimmedGRPOTrainer`]: TRL's update without the padding, and the rows, that it computes for nothing."""

import math
from typing import Any

import torch
from torch import Tensor
from transformers import ProcessorMixin
from trl import GRPOTrainer

from ..a3po_config import A3POConfig
from .micro_batches import loss_mask, plan_micro_batches, row_lengths, run_extent, run_in_order
from .model_traits import configured_traits, has_experts_as_modules, never_alone, padding_traits


# Sums over tokens, or means over rows, with one denominator for all micro-batches of an optimizer step. That of BNPO
# is the number of tokens in the micro-batch.
_SAME_LOSS_IN_ANY_GROUPING = ("grpo", "sapo", "dr_grpo", "luspo", "dapo", "cispo", "vespo")


class TrimmedGRPOTrainer(GRPOTrainer):
    """
    The half of [`A3POTrainer`] that is about cost: the update of [`~trl.GRPOTrainer`], from less computation.

    Every pass over the model sees only the columns that some row of its micro-batch uses (`trim_padding`), and the
    passes of the loss leave out the rows that cannot have a gradient (`skip_zero_advantage`). The rows of an optimizer
    step are grouped by length, those with a gradient first, where the loss is the same for any grouping. Each
    micro-batch still runs the model once, so that all processes take part in the same collective operations.
    """

    args: A3POConfig
    model: torch.nn.Module

    # Those of the loss that is being computed.
    _loss_inputs: dict[str, Any] | None = None

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._multiple = int(self.pad_to_multiple_of or 1)
        unsuited = (
            # Images belong to columns, and are not split by rows.
            isinstance(self.processing_class, ProcessorMixin)
            # Where a process has fewer tokens than the others, more of its experts go without a gradient, which DDP
            # waits for.
            or (self.accelerator.num_processes > 1 and has_experts_as_modules(self.model))
        )
        # The scale of NEFTune's noise is that of the padded width.
        self._trims = self.args.trim_padding and not (unsuited or self.args.neftune_noise_alpha)
        # Terms of the loss for which a row, or the company of rows in a micro-batch, matters beyond its advantage.
        looks_at_all_rows = (
            self.top_entropy_quantile < 1.0
            or getattr(self, "_entropy_bonus_enabled", False)  # since TRL 1.9
            or getattr(self, "aux_loss_enabled", False)
        )
        self._skips = self.args.skip_zero_advantage and not (unsuited or looks_at_all_rows or self.beta != 0.0)
        self._groups = self.loss_type in _SAME_LOSS_IN_ANY_GROUPING and not looks_at_all_rows
        self._trims_prompt = False
        self._traits = configured_traits(self.model)
        # A sharded model cannot run before training begins.
        self._checks_traits = self.is_fsdp_enabled or self.is_deepspeed_enabled
        if not self._checks_traits:
            self._check_traits()

    def _check_traits(self) -> None:
        """Turns off what is not exact for the model. All processes must call it."""
        self._checks_traits = False
        if self._trims or self._skips or self.args.dynamic_sampling:
            self._traits = padding_traits(self.model)
        self._trims &= not (self._traits.right_padding or self._traits.company)
        self._skips &= not self._traits.company
        self._trims_prompt = self._trims and not self._traits.left_padding

    def _has_gradient(self, inputs: dict[str, Any]) -> Tensor:
        """(B,) whether the loss can have a gradient in a row of a micro-batch. The other rows are left out."""
        return (inputs["advantages"] != 0) & loss_mask(inputs).any(1)

    def _prepare_inputs(self, generation_batch):
        if self._checks_traits:
            self._check_traits()
        rollout = self._buffered_inputs
        inputs = super()._prepare_inputs(generation_batch)
        if self._buffered_inputs is rollout or not (self._trims or self._skips):
            return inputs  # a rollout that is used again, or an evaluation, whose batches are as wide as they need
        self._buffered_inputs = self._plan_update(self._buffered_inputs)
        return self._buffered_inputs[self._step % self.args.steps_per_generation]

    def _plan_update(self, micro_batches: list[dict[str, Any]]) -> list[dict[str, Any]]:
        # The most micro-batches that never straddle two optimizer steps, whichever of the two periods is the longer.
        window = math.gcd(len(micro_batches), self.args.gradient_accumulation_steps) if self._groups else 1
        planned = []
        for start in range(0, len(micro_batches), window):
            part = micro_batches[start : start + window]
            masks = [torch.cat([batch[name] for batch in part]) for name in ("prompt_mask", "completion_mask")]
            lengths = self._lengths(*masks)
            live = [True] * len(lengths)
            if self._skips:
                live = torch.cat([self._has_gradient(batch) for batch in part]).tolist()
            batches, extents = plan_micro_batches(part, lengths, live, self._multiple)
            planned += [{**batch, "extent": extent} for batch, extent in zip(batches, extents, strict=True)]
        return planned

    def _lengths(self, prompt_mask: Tensor, completion_mask: Tensor) -> list[tuple[int, int]]:
        if not self._trims:
            return [(prompt_mask.shape[1], completion_mask.shape[1])] * len(prompt_mask)
        return row_lengths(prompt_mask if self._trims_prompt else torch.ones_like(prompt_mask), completion_mask)

    def _compute_loss(self, model, inputs):
        self._loss_inputs = inputs
        try:
            return super()._compute_loss(model, inputs)
        finally:
            self._loss_inputs = None

    def _get_per_token_logps_and_entropies(
        self, model, input_ids, attention_mask, logits_to_keep, batch_size=None, **kwargs
    ):
        compute = super()._get_per_token_logps_and_entropies

        def forward(input_ids, attention_mask, logits_to_keep):
            return compute(model, input_ids, attention_mask, logits_to_keep, **kwargs)

        if self._loss_inputs is None and self._trims:
            prompt_width = input_ids.shape[1] - logits_to_keep
            lengths = self._lengths(attention_mask[:, :prompt_width], attention_mask[:, prompt_width:])
            batch_size = batch_size or len(input_ids)
            return run_in_order(
                forward, input_ids, attention_mask, logits_to_keep, lengths, batch_size, self._multiple
            )
        if self._loss_inputs is None or "extent" not in self._loss_inputs:
            return compute(model, input_ids, attention_mask, logits_to_keep, batch_size=batch_size, **kwargs)
        extent = self._loss_inputs["extent"]
        if self._traits.alone and len(input_ids) > 1:
            forward = never_alone(forward)
        logps, *others = run_extent(forward, input_ids, attention_mask, logits_to_keep, extent)
        if "old_per_token_logps" in self._loss_inputs:
            # In rows that are left out the ratio is 1, not the exponential of anything.
            old_logps = self._loss_inputs["old_per_token_logps"]
            logps = torch.cat([logps[: extent.rows], logps[extent.rows :] + old_logps[extent.rows :]])
        return logps, *others
