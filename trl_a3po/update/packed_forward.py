"""Replaces the model in TRL's method for log-probabilities, and computes the rows packed."""

import inspect
from types import SimpleNamespace

import torch
from torch import Tensor
from trl import GRPOTrainer

from .attention import packed_attention, packed_in_backward
from .layout import PackedLayout


def trl_has_fused_head() -> bool:
    """Whether TRL's method takes log-probabilities from the model (since 1.15), not logits. Packing needs it."""
    return "fused_lm_head=True" in inspect.getsource(GRPOTrainer._get_per_token_logps_and_entropies)


class PackedForward:
    """
    Takes the place of `model` in [`~trl.GRPOTrainer._get_per_token_logps_and_entropies`].

    TRL calls it with a padded micro-batch. It runs the model once on the packed row, and returns the results in the
    padded shape. TRL must not divide the micro-batch: `batch_size` must be its number of rows.

    Args:
        model (`torch.nn.Module`): Model with TRL's fused head, in any wrapper.
        layout ([`PackedLayout`]): Layout of the micro-batch.
    """

    def __init__(self, model: torch.nn.Module, layout: PackedLayout):
        self.model, self.layout = model, layout

    def __call__(
        self, *, input_ids: Tensor, attention_mask: Tensor, labels: Tensor, fused_lm_head: bool
    ) -> SimpleNamespace:
        """
        Args:
            input_ids (`torch.Tensor` of shape `(B, P + C)`): Tokens of the micro-batch.
            attention_mask (`torch.Tensor` of shape `(B, P + C)`): Not used: the layout knows where the padding is.
            labels (`torch.Tensor` of shape `(B, P + C)`): Tokens of completions, -100 elsewhere.
            fused_lm_head (`bool`): `True`.

        Returns:
            `log_probs` and `entropy` (or `None`), each (B, C): 0 in padding and in rows that are not in the layout.
        """
        layout = self.layout
        with packed_attention(self.model, layout):
            outputs = self.model(
                input_ids=layout.pack(input_ids),
                position_ids=layout.position_ids,
                shift_labels=layout.pack(labels, shift=1),
                fused_lm_head=fused_lm_head,
            )
        return SimpleNamespace(
            log_probs=self._unpack(outputs.log_probs),
            entropy=None if outputs.entropy is None else self._unpack(outputs.entropy),
        )

    def _unpack(self, values: Tensor) -> Tensor:
        return self.layout.unpack(packed_in_backward(self.model, self.layout, values))
