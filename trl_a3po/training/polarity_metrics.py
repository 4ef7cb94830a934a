"""
The metrics by polarity. They are kept as sums on the device until a log.

Sums can be added over micro-batches and processes with different numbers of tokens. Means cannot.
"""

import math

import torch
from torch import Tensor


# Rows and columns of the tensor that `polarity_sums` returns.
_POLARITIES = ("positive", "negative", "zero")
_SUMS = ("completions", "tokens", "entropy", "selected", "selected_prob", "prob", "advantage", "selected_mismatch")


def polarity_sums(
    advantages: Tensor,
    unselected: Tensor,
    shaped: Tensor,
    logps: Tensor,
    entropies: Tensor,
    mask: Tensor,
    sampling_logps: Tensor | None = None,
) -> Tensor:
    """
    Sums over one batch, by polarity.

    A token counts as selected if its shaped advantage differs from that of the unselected tokens of its completion, by
    more than rounding in float32.

    Args:
        advantages (`torch.Tensor` of shape `(B,)`): The advantages before shaping. Their sign is the polarity.
        unselected (`torch.Tensor` of shape `(B,)`): The advantages of unselected tokens.
        shaped (`torch.Tensor` of shape `(B, T)` or `(B,)`): The advantages after shaping.
        logps (`torch.Tensor` of shape `(B, T)`): Old log-probabilities of the sampled tokens.
        entropies (`torch.Tensor` of shape `(B, T)`): Entropies, in nats.
        mask (`torch.Tensor` of shape `(B, T)`): Non-zero on the unmasked tokens.
        sampling_logps (`torch.Tensor` of shape `(B, T)`, *optional*): Log-probabilities that the sampler reported, NaN
            where it reported none.

    Returns:
        `torch.Tensor` of shape `(3, 8)` in float32, for [`polarity_metrics`].
    """
    mask = mask.bool()
    if shaped.dim() == 1:
        shaped = shaped[:, None].expand(mask.shape)
    probs = logps.float().exp()
    # Rounding in float32 selects nothing: the ratio of two passes over the same model is not quite 1.
    selected = ((shaped - unselected[:, None]).abs() > 1e-5 * unselected[:, None].abs()) & mask
    if sampling_logps is None:
        mismatch = probs.new_full((), torch.nan)
    else:
        mismatch = (logps - torch.where(sampling_logps.isnan(), logps, sampling_logps)).abs()
    per_completion = torch.stack(
        [
            torch.ones_like(advantages, dtype=torch.float32),
            _row_sum(mask),
            _row_sum(entropies, mask),
            _row_sum(selected),
            _row_sum(probs, selected),
            _row_sum(probs, mask),
            _row_sum(shaped.abs(), mask),
            _row_sum(mismatch, selected),
        ],
        dim=1,
    )  # (B, 8)
    polarity = torch.stack([advantages > 0, advantages < 0, advantages == 0])  # (3, B)
    # Not a matrix product: in a product, a NaN in one completion would spread to all polarities.
    return torch.where(polarity[:, :, None], per_completion, 0.0).sum(1)


def polarity_metrics(sums: Tensor) -> dict[str, float]:
    """
    Computes the metrics from the sums. A metric is missing if there is nothing to average or if its value is unknown.

    Args:
        sums (`torch.Tensor` of shape `(3, 8)`): The sums of all batches and processes, added up.

    Returns:
        `dict[str, float]`, for each polarity:

        - `{polarity}/fraction`: share of all completions (`positive`, `negative`, `zero`)
        - `{polarity}/mean_length`: unmasked tokens per completion
        - `{polarity}/entropy`: mean over those tokens, in nats
        - `{polarity}/selected_fraction`: share of those tokens that the shaping selects
        - `{polarity}/selected_prob`, `{polarity}/other_prob`: mean old probability of the selected tokens, and of
          the others
        - `{polarity}/selected_mismatch`: mean absolute difference between the log-probability that the sampler
          reported and the old one, over the selected tokens. A token without a reported value counts as 0.

        and `advantage_ratio`: the sum of |shaped advantage| over the tokens of positive completions, divided by that
        of negative ones. The paper finds that this ratio controls the dynamics, not the size of the two sums.
    """
    total = _by_name(sums)
    completions = sum(total[polarity]["completions"] for polarity in _POLARITIES)
    means = {}
    for polarity in _POLARITIES:
        of = total[polarity]
        means[f"{polarity}/fraction"] = (of["completions"], completions)
        means[f"{polarity}/mean_length"] = (of["tokens"], of["completions"])
        means[f"{polarity}/entropy"] = (of["entropy"], of["tokens"])
        if polarity != "zero":  # nothing to shape
            means[f"{polarity}/selected_fraction"] = (of["selected"], of["tokens"])
            means[f"{polarity}/selected_prob"] = (of["selected_prob"], of["selected"])
            means[f"{polarity}/selected_mismatch"] = (of["selected_mismatch"], of["selected"])
            means[f"{polarity}/other_prob"] = (of["prob"] - of["selected_prob"], of["tokens"] - of["selected"])
    means["advantage_ratio"] = (total["positive"]["advantage"], total["negative"]["advantage"])
    return {
        name: numerator / denominator
        for name, (numerator, denominator) in means.items()
        if denominator and not math.isnan(numerator)
    }


def mean_entropy(sums: Tensor) -> float:
    """Mean entropy over the tokens of all polarities with a known entropy; NaN if there are none."""
    known = [of for of in _by_name(sums).values() if of["tokens"] and not math.isnan(of["entropy"])]
    tokens = sum(of["tokens"] for of in known)
    return sum(of["entropy"] for of in known) / tokens if tokens else math.nan


def _by_name(sums: Tensor) -> dict[str, dict[str, float]]:
    return {
        polarity: dict(zip(_SUMS, row, strict=True)) for polarity, row in zip(_POLARITIES, sums.tolist(), strict=True)
    }


def _row_sum(values: Tensor, mask: Tensor | None = None) -> Tensor:
    """(B,) sums over T. Masked values have no influence, not even NaN."""
    return (values if mask is None else torch.where(mask, values, 0.0)).sum(-1, dtype=torch.float32)
