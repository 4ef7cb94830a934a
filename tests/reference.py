"""Slow, plain references, written from the definitions, one completion and one token at a time."""

import math


def shape_advantages(
    advantages: list[float],
    token_metric: list[list[float]],
    mask: list[list[bool]],
    *,
    positive_low_ratio=0.0,
    positive_low_scale=1.0,
    positive_high_ratio=0.0,
    positive_high_scale=1.0,
    negative_low_ratio=0.0,
    negative_low_scale=1.0,
    negative_high_ratio=0.0,
    negative_high_scale=1.0,
    positive_weight=1.0,
    negative_weight=1.0,
) -> list[list[float]]:
    """(B, T) advantages from (B,) advantages, as `trl_a3po.shape_advantages` is meant to compute them."""
    rows = []
    for advantage, metric, counts in zip(advantages, token_metric, mask, strict=True):
        row = [0.0] * len(metric)
        rows.append(row)
        tokens = [t for t in range(len(metric)) if counts[t]]
        if advantage > 0:
            weight = positive_weight
            low, high = (positive_low_ratio, positive_low_scale), (positive_high_ratio, positive_high_scale)
        elif advantage < 0:
            weight = negative_weight
            low, high = (negative_low_ratio, negative_low_scale), (negative_high_ratio, negative_high_scale)
        else:
            continue
        for t in tokens:
            row[t] = advantage * weight
        ranked = [t for t in tokens if not math.isnan(metric[t])]
        for (ratio, scale), order in ((low, 1), (high, -1)):
            if ratio == 0 or scale == 1:
                continue
            count = max(1, int(ratio * len(tokens)))
            # `sorted` keeps the order of ties: the earlier position comes first at both ends.
            for t in sorted(ranked, key=lambda t: order * metric[t])[:count]:
                row[t] *= scale
    return rows
