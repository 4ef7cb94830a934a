"""
[`SamplerCorrection`]: TRL's importance ratio between the policy and the sampler (vLLM), computed in the loss.

TRL computes the ratio after generation, from a forward pass of its own over the whole rollout. If rollout and update
are aligned, the forward pass of the loss computes the same log-probabilities a moment later. The formulas are those of
TRL's `vllm_importance_sampling_mode`. In the first rollout of a run both ratios are computed and compared.

Shapes: B completions, T token positions.
"""

import logging
import math
from collections.abc import Sequence
from typing import Any, cast

import torch
import trl
from torch import Tensor
from trl import GRPOConfig, GRPOTrainer

from .micro_batches import loss_mask


logger = logging.getLogger(__name__)

# How the names of TRL's metrics of the correction begin.
MISMATCH_METRICS = ("sampling/sampling_logp_difference/", "sampling/importance_sampling_ratio/")


class SamplerCorrection:
    """
    Computes the ratio for a trainer, and collects the statistics for TRL's `sampling/*` metrics.

    Attributes:
        is_trls (`bool`, *optional*): Whether the ratio equals TRL's; `None` until the first rollout was checked.
    """

    def __init__(self, trainer: GRPOTrainer):
        self.is_trls: bool | None = None
        self._trainer = trainer
        # By mode, "train" or "eval": sums and largest values since the last log, on the device.
        self._statistics: dict[str, tuple[Tensor, Tensor]] = {}

    def check(self, rollout: dict[str, Any]) -> bool:
        """Compares TRL's ratio in a rollout with that of [`sampler_ratio`]. All processes must call it."""
        expected, found = rollout["importance_sampling_ratio"], self._ratio(rollout, rollout["old_per_token_logps"])
        agrees = expected.shape == found.shape and torch.allclose(expected, found, rtol=1e-4, equal_nan=True)
        differs = torch.tensor([not agrees], device=expected.device)
        self.is_trls = not bool(self._trainer.accelerator.gather(differs).any())
        if not self.is_trls and self._trainer.accelerator.is_main_process:
            logger.warning(
                "TRL %s computes another importance ratio for vLLM than trl-a3po. Therefore the pass for "
                "`old_per_token_logps` runs after every generation: the update is exact but costs more.",
                trl.__version__,
            )
        return self.is_trls

    def correct(self, inputs: dict[str, Any], per_token_logps: Tensor, is_computed: Tensor, mode: str) -> Tensor:
        """
        The ratio of a batch, 1 in rows that are not computed. Adds the mismatch to the statistics for the next log.

        Args:
            inputs (`dict`): The inputs of the loss, with `sampling_per_token_logps` of shape `(B, T)`.
            per_token_logps (`torch.Tensor` of shape `(B, T)`): Log-probabilities under the policy that is trained.
            is_computed (`torch.Tensor` of shape `(B,)`): Whether the log-probabilities of a row are known.
            mode (`str`): `"train"` or `"eval"`.
        """
        ratio = self._ratio(inputs, per_token_logps)
        mask = loss_mask(inputs).bool() & is_computed[:, None]
        sums, largest = mismatch_statistics(per_token_logps, inputs["sampling_per_token_logps"], ratio, mask)
        if mode in self._statistics:
            sums = sums + self._statistics[mode][0]
            largest = largest.maximum(self._statistics[mode][1])
        self._statistics[mode] = sums, largest
        return ratio.where(is_computed[:, None], 1.0)

    def _ratio(self, inputs: dict[str, Any], per_token_logps: Tensor) -> Tensor:
        args = cast(GRPOConfig, self._trainer.args)
        return sampler_ratio(
            per_token_logps,
            inputs["sampling_per_token_logps"],
            loss_mask(inputs),
            args.vllm_importance_sampling_mode,
            args.vllm_importance_sampling_clip_min,
            args.vllm_importance_sampling_clip_max,
        )

    def forget(self) -> None:
        """Forgets the statistics of an interrupted run."""
        self._statistics.clear()

    def pop_metrics(self, mode: str) -> dict[str, float]:
        """TRL's `sampling/*` metrics since the last call. Waits for the device; all processes must call it."""
        if mode not in self._statistics:
            return {}
        accelerator = self._trainer.accelerator
        gathered = accelerator.gather(torch.cat(self._statistics.pop(mode))[None])  # (processes, 7)
        return mismatch_metrics(gathered[:, :4].sum(0), gathered[:, 4:].amax(0))


def sampler_ratio(
    per_token_logps: Tensor,
    sampling_per_token_logps: Tensor,
    mask: Tensor,
    mode: str,
    clip_min: float | None,
    clip_max: float | None,
) -> Tensor:
    """
    The importance ratio, truncated or masked.

    Args:
        per_token_logps (`torch.Tensor` of shape `(B, T)`): Log-probabilities under the policy that is trained.
        sampling_per_token_logps (`torch.Tensor` of shape `(B, T)`): Those that the sampler reported, NaN where it
            reported none. Such a token is not corrected.
        mask (`torch.Tensor` of shape `(B, T)`): Non-zero on the tokens of the loss.
        mode (`str`): `"token_truncate"`, `"token_mask"`, `"sequence_truncate"` or `"sequence_mask"`.
        clip_min, clip_max (`float`, *optional*): The bounds. A ratio beyond a bound is truncated to it, or set to 0.

    Returns:
        `torch.Tensor` of shape `(B, T)`, or `(B, 1)` for the sequence modes. It has no gradient.
    """
    difference = ((per_token_logps.detach() - sampling_per_token_logps) * mask).nan_to_num(nan=0.0)
    level, _, treatment = mode.partition("_")
    if level == "sequence":
        difference = difference.sum(-1, keepdim=True)
    ratio = difference.exp()
    low = -math.inf if clip_min is None else clip_min
    high = math.inf if clip_max is None else clip_max
    if treatment == "truncate":
        return ratio.clamp(min=low, max=high)
    return ratio.masked_fill((ratio < low) | (ratio > high), 0.0)


def mismatch_statistics(
    per_token_logps: Tensor, sampling_per_token_logps: Tensor, ratio: Tensor, mask: Tensor
) -> tuple[Tensor, Tensor]:
    """
    The statistics for TRL's `sampling/*` metrics, for a part of a batch.

    Args:
        per_token_logps (`torch.Tensor` of shape `(B, T)`): Log-probabilities under the policy that is trained.
        sampling_per_token_logps (`torch.Tensor` of shape `(B, T)`): Those of the sampler, NaN where it reported none.
        ratio (`torch.Tensor` of shape `(B, T)` or `(B, 1)`): The result of [`sampler_ratio`].
        mask (`torch.Tensor` of shape `(B, T)`): Non-zero on the tokens of the loss.

    Returns:
        Two `torch.Tensor`: sums of shape `(4,)`, which add up over parts, and largest values of shape `(3,)`.
    """
    mask = mask.bool()
    distance = (per_token_logps.detach() - sampling_per_token_logps).abs()
    is_known = mask & ~distance.isnan()
    is_counted = mask if ratio.shape == mask.shape else mask.any(-1, keepdim=True)
    sums = [distance.where(is_known, 0.0).sum(), is_known.sum(), ratio.where(is_counted, 0.0).sum(), is_counted.sum()]
    return (
        torch.stack([each.float() for each in sums]),
        largest_of([(distance, is_known), (ratio, is_counted), (-ratio, is_counted)]),
    )


def largest_of(values: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """The largest of each tensor where its mask is true, in float32; -inf if it is true nowhere."""
    nothing = values[0][0].new_full((1,), -math.inf, dtype=torch.float32)
    masked = [torch.cat([each.float().where(mask, -math.inf).flatten(), nothing]) for each, mask in values]
    return torch.stack([each.amax() for each in masked])


def mismatch_metrics(sums: Tensor, largest: Tensor) -> dict[str, float]:
    """
    TRL's `sampling/*` metrics. Waits for the device.

    Args:
        sums (`torch.Tensor` of shape `(4,)`): Added up over batches and processes.
        largest (`torch.Tensor` of shape `(3,)`): The largest over batches and processes.

    Returns:
        `dict[str, float]`: Empty if no token was computed.
    """
    distance, known, ratio, counted = sums.tolist()
    most_distance, most_ratio, minus_least_ratio = largest.tolist()
    metrics = {}
    difference, of_ratio = MISMATCH_METRICS
    if known:
        metrics[f"{difference}mean"] = distance / known
        metrics[f"{difference}max"] = most_distance
    if counted:
        metrics[f"{of_ratio}min"] = -minus_least_ratio
        metrics[f"{of_ratio}mean"] = ratio / counted
        metrics[f"{of_ratio}max"] = most_ratio
    return metrics
