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


# The peers, from their formulas. They take what `trl_a3po.peers` takes, as lists; `advantages` are always (B, T).


def of_tokens(mask):
    return [(i, t) for i, row in enumerate(mask) for t, counts in enumerate(row) if counts]


def table(mask, value):
    """(B, T) rows of `value(i, t)`, 0 where masked."""
    tokens = set(of_tokens(mask))
    return [[value(i, t) if (i, t) in tokens else 0.0 for t in range(len(row))] for i, row in enumerate(mask)]


def mean(values, mask):
    every = [values[i][t] for i, t in of_tokens(mask)]
    return sum(every) / len(every)


def log_ratio(logps, old_logps, i, t):
    """As authors clamp it."""
    return min(max(logps[i][t] - old_logps[i][t], -20.0), 20.0)


def w_reinforce(advantages, *, rewards, positive_weight=0.1, correct_above=0.5, **_):
    values = [0.0 if math.isnan(r) else positive_weight if r > correct_above else -1.0 for r in rewards]
    return [[value] * len(row) for value, row in zip(values, advantages, strict=True)]


def forking_tokens(advantages, *, entropies, mask, top_ratio=0.2, **_):
    tokens = of_tokens(mask)
    kept = sorted(tokens, key=lambda it: -entropies[it[0]][it[1]])[: max(1, int(top_ratio * len(tokens) + 0.9999))]
    return table(mask, lambda i, t: advantages[i][t] * len(tokens) / len(kept) if (i, t) in kept else 0.0)


def clip_cov_candidates(
    advantages,
    *,
    per_token_logps,
    old_per_token_logps,
    mask,
    lower=1.0,
    upper=5.0,
    epsilon_low=1.0,
    epsilon_high=1.0,
    **_,
):
    mean_advantage, mean_logp = mean(advantages, mask), mean(per_token_logps, mask)
    candidates = []
    for i, t in of_tokens(mask):
        advantage, logp = advantages[i][t], per_token_logps[i][t]
        ratio = math.exp(logp - old_per_token_logps[i][t])
        covariance = (advantage - mean_advantage) * (logp - mean_logp)
        clipped = min(max(ratio, 1 - epsilon_low), 1 + epsilon_high)
        if lower < covariance < upper and ratio * advantage <= clipped * advantage:
            candidates.append((i, t))
    return candidates


def clip_cov(advantages, *, mask, lots, clip_ratio=0.0002, **batch):
    """`lots` are the random numbers: the candidates of the lowest are drawn."""
    candidates = clip_cov_candidates(advantages, mask=mask, **batch)
    count = max(1, int(clip_ratio * len(of_tokens(mask))))
    drawn = sorted(candidates, key=lambda it: lots[it[0]][it[1]])[:count]
    return table(mask, lambda i, t: 0.0 if (i, t) in drawn else advantages[i][t])


def entropy_change(advantages, *, per_token_logps, old_per_token_logps, entropies, mask, **_):
    def change(i, t):
        p, old = math.exp(per_token_logps[i][t]), math.exp(old_per_token_logps[i][t])
        return abs(advantages[i][t] / old * p * (1 - p) * (per_token_logps[i][t] + entropies[i][t]))

    return table(mask, change)


def steer(advantages, weight, *, mask, **batch):
    """`weight` of a change, and of the smallest and the largest change of all tokens."""
    changes = entropy_change(advantages, mask=mask, **batch)
    every = [changes[i][t] for i, t in of_tokens(mask)]
    return table(mask, lambda i, t: advantages[i][t] * weight(changes[i][t], min(every), max(every)))


def steer_exponential(advantages, *, min_weight=0.8, **batch):
    return steer(advantages, lambda x, _, most: math.exp(math.log(min_weight) * x / max(most, 0.02)), **batch)


def steer_linear(advantages, *, min_weight=0.8, max_weight=1.2, **batch):
    def weight(x, least, most):
        share = (x - least) / (most - least) if most > least else 0.5
        return max_weight - share * (max_weight - min_weight)

    return steer(advantages, weight, **batch)


def advantage_reweighting(advantages, *, old_per_token_logps, mask, alpha=0.2, **_):
    return table(mask, lambda i, t: advantages[i][t] * (alpha * math.exp(old_per_token_logps[i][t]) + 1 - alpha))


def entropy_advantage(advantages, *, entropies, mask, alpha=0.4, kappa=2.0, **_):
    def value(i, t):
        advantage = advantages[i][t]
        return advantage + min(alpha * entropies[i][t], abs(advantage) / kappa)

    return table(mask, value)


def aspo(advantages, *, per_token_logps, old_per_token_logps, mask, max_weight=3.0, **_):
    def value(i, t):
        ratio = math.exp(log_ratio(per_token_logps, old_per_token_logps, i, t))
        weight = min(1 / ratio if advantages[i][t] > 0 else ratio, max_weight)
        return advantages[i][t] * weight / ratio

    return table(mask, value)


def position_bonus(advantages, *, mask, progress, alpha=0.1, begin=0.0, end=1.0, **_):
    def value(i, t):
        advantage = advantages[i][t]
        position = sum(map(bool, mask[i][:t])) / sum(map(bool, mask[i]))
        bonus = min(alpha / (1 + math.exp(-15 * (position - 0.5))), 0.5 * abs(advantage))
        return advantage + math.copysign(bonus, advantage) if begin <= progress <= end else advantage

    return table(mask, value)


def fipo(
    advantages,
    *,
    per_token_logps,
    old_per_token_logps,
    mask,
    half_life=32.0,
    lower=1.0,
    upper=1.2,
    delta=None,
    safety_threshold=4.0,
    **_,
):
    def value(i, t):
        future = 0.0
        for k in range(t, len(mask[i])):
            moved = log_ratio(per_token_logps, old_per_token_logps, i, k)
            if mask[i][k] and (delta is None or math.exp(moved) <= delta):
                future += 0.5 ** ((k - t) / half_life) * moved
        influence = min(max(math.exp(future), lower), upper)
        ratio = math.exp(log_ratio(per_token_logps, old_per_token_logps, i, t))
        if advantages[i][t] < 0 and ratio > safety_threshold:
            influence = min(max(influence, 0.8), 1.0)
        return advantages[i][t] * influence

    return table(mask, value)


def gtpo_simplified(advantages, *, entropies, mask, beta=0.1, **_):
    average = mean(entropies, mask)
    return table(mask, lambda i, t: advantages[i][t] * max(0.0, 1 + beta * (entropies[i][t] / average - 1)))


def aepo(advantages, *, entropies, mask, alpha=0.2, **_):
    every = [entropies[i][t] for i, t in of_tokens(mask)]
    average = sum(every) / len(every)
    deviation = math.sqrt(sum((value - average) ** 2 for value in every) / (len(every) - 1))
    return table(mask, lambda i, t: advantages[i][t] * (1 + alpha * (entropies[i][t] - average) / deviation))


def stare(
    advantages,
    *,
    per_token_logps,
    mask,
    entropy_of_last_step,
    top_ratio=0.1,
    positive_weight=1.1,
    negative_weight=1.0,
    target_entropy=0.3,
    **_,
):
    weights = {}
    if not entropy_of_last_step >= target_entropy:
        for sign, weight in ((1, positive_weight), (-1, negative_weight)):
            tokens = [(i, t) for i, t in of_tokens(mask) if sign * advantages[i][t] > 0]
            count = math.ceil(round(top_ratio * len(tokens), 6))
            most_surprising = sorted(tokens, key=lambda it: per_token_logps[it[0]][it[1]])[:count]
            weights.update(dict.fromkeys(most_surprising, weight))
    return table(mask, lambda i, t: advantages[i][t] * weights.get((i, t), 1.0))
