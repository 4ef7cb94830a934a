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


# The peers, from their formulas. `advantages` are (B, T) everywhere: lists of one number a token.


def of_tokens(mask):
    return [(i, t) for i, row in enumerate(mask) for t, counts in enumerate(row) if counts]


def table(mask, value):
    """(B, T) rows of `value(i, t)`, 0 where masked."""
    tokens = set(of_tokens(mask))
    return [[value(i, t) if (i, t) in tokens else 0.0 for t in range(len(row))] for i, row in enumerate(mask)]


def w_reinforce(rewards, positive_weight=0.1, correct_above=0.5):
    return [0.0 if math.isnan(r) else positive_weight if r > correct_above else -1.0 for r in rewards]


def forking_tokens(advantages, entropies, mask, top_ratio=0.2):
    tokens = of_tokens(mask)
    kept = sorted(tokens, key=lambda it: -entropies[it[0]][it[1]])[: max(1, int(top_ratio * len(tokens) + 0.9999))]
    return table(mask, lambda i, t: advantages[i][t] * len(tokens) / len(kept) if (i, t) in kept else 0.0)


def clip_cov_candidates(advantages, logps, old_logps, mask, lower=1.0, upper=5.0, epsilon_low=1.0, epsilon_high=1.0):
    tokens = of_tokens(mask)
    mean_advantage = sum(advantages[i][t] for i, t in tokens) / len(tokens)
    mean_logp = sum(logps[i][t] for i, t in tokens) / len(tokens)
    candidates = []
    for i, t in tokens:
        advantage, ratio = advantages[i][t], math.exp(logps[i][t] - old_logps[i][t])
        covariance = (advantage - mean_advantage) * (logps[i][t] - mean_logp)
        clipped = min(max(ratio, 1 - epsilon_low), 1 + epsilon_high)
        if lower < covariance < upper and ratio * advantage <= clipped * advantage:
            candidates.append((i, t))
    return candidates


def clip_cov(advantages, logps, old_logps, mask, lots, clip_ratio=0.0002, **settings):
    """`lots` are the random numbers: the candidates of the lowest are drawn."""
    candidates = clip_cov_candidates(advantages, logps, old_logps, mask, **settings)
    count = max(1, int(clip_ratio * len(of_tokens(mask))))
    drawn = sorted(candidates, key=lambda it: lots[it[0]][it[1]])[:count]
    return table(mask, lambda i, t: 0.0 if (i, t) in drawn else advantages[i][t])


def entropy_change(advantages, logps, old_logps, entropies, mask):
    def change(i, t):
        p, old = math.exp(logps[i][t]), math.exp(old_logps[i][t])
        return abs(advantages[i][t] / old * p * (1 - p) * (logps[i][t] + entropies[i][t]))

    return table(mask, change)


def steer(advantages, logps, old_logps, entropies, mask, weight):
    """`weight` of a change, and of the smallest and the largest change of all tokens."""
    changes = entropy_change(advantages, logps, old_logps, entropies, mask)
    every = [changes[i][t] for i, t in of_tokens(mask)]
    return table(mask, lambda i, t: advantages[i][t] * weight(changes[i][t], min(every), max(every)))


def steer_exponential(*args, min_weight=0.8):
    return steer(*args, lambda x, _, most: math.exp(math.log(min_weight) * x / max(most, 0.02)))


def steer_linear(*args, min_weight=0.8, max_weight=1.2):
    def weight(x, least, most):
        share = (x - least) / (most - least) if most > least else 0.5
        return max_weight - share * (max_weight - min_weight)

    return steer(*args, weight)


def advantage_reweighting(advantages, old_logps, mask, alpha=0.2):
    return table(mask, lambda i, t: advantages[i][t] * (alpha * math.exp(old_logps[i][t]) + 1 - alpha))
