"""
Token-level advantage shaping as pure functions of tensors.

Shapes: B completions, T token positions. A completion is *positive* if its advantage is above zero and *negative* if
it is below. The sign decides, whatever the rewards are.

The method is that of "Rethinking Sample Polarity in Reinforcement Learning with Verifiable Rewards" (arXiv
2512.21625). It has two stages, in this order:

1. polarity: A_i becomes A_i * positive_weight or A_i * negative_weight;
2. tokens: a completion has N unmasked tokens. The advantage of the max(1, floor(ratio * N)) tokens with the lowest (or
   highest) metric is multiplied by a scale. A token selected at both ends gets both scales.

From the authors' released code: the selection within one completion, the count, the metric (the *old* probability or
the entropy), the product on overlaps. Chosen here: ties go to the earlier position, a NaN metric is never selected,
and all other unmasked tokens are ranked (the released code ignores metrics that are exactly zero).
"""

import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any, TypeGuard, TypeVar

import torch
from torch import Tensor


# Each has a ratio and a scale: `positive_low_ratio`, `positive_low_scale`, ...
TOKEN_ENDS = ("positive_low", "positive_high", "negative_low", "negative_high")

# Number of tokens that a CPU thread shapes at a time, so that they and the intermediate results stay in its caches.
CACHED_TOKENS = 2**16


Hook = TypeVar("Hook", bound=Callable[..., Tensor])


def completionwise(hook: Hook) -> Hook:
    """
    Marks a `shape_advantages` that shapes each completion by itself. Its update is then as fast as A3PO's.

    ```python
    >>> class HalfOfIt(A3POTrainer):
    ...     @completionwise
    ...     def shape_advantages(self, advantages, **batch):
    ...         return super().shape_advantages(advantages, **batch) / 2
    ```

    The mark is a promise, for every batch of B completions:

    - the result for a completion does not depend on the other completions of the batch;
    - it is 0 for a completion whose advantage is 0.

    So the trainer may skip completions of zero advantage (`skip_zero_advantage`), which the method then does not see,
    and choose which of the others share a micro-batch (`trim_padding`). The first loss with two completions checks
    the promise on them, and raises a `ValueError` if it does not hold there.

    Args:
        hook (callable): The method in its class, or a function with its arguments. It is returned.

    Raises:
        `TypeError`: `hook` is not a function, but for example a method of an instance.
    """
    if not inspect.isfunction(hook):
        raise TypeError(
            f"`completionwise` marks functions, got {hook!r}. Write `@completionwise` above the `def` of "
            "`shape_advantages`, or mark the function before you assign it."
        )
    # Not just True: `functools.wraps` copies attributes, and the mark does not hold for what wraps the function.
    hook._completionwise = hook  # type: ignore[attr-defined]
    return hook


def is_completionwise(hook: Callable[..., Any]) -> bool:
    """Whether a function or method is marked with [`completionwise`]."""
    function = getattr(hook, "__func__", hook)
    return getattr(function, "_completionwise", None) is function


def shape_advantages(
    advantages: Tensor,
    token_metric: Tensor,
    mask: Tensor,
    *,
    positive_low_ratio: float = 0.0,
    positive_low_scale: float = 1.0,
    positive_high_ratio: float = 0.0,
    positive_high_scale: float = 1.0,
    negative_low_ratio: float = 0.0,
    negative_low_scale: float = 1.0,
    negative_high_ratio: float = 0.0,
    negative_high_scale: float = 1.0,
    positive_weight: float = 1.0,
    negative_weight: float = 1.0,
) -> Tensor:
    """
    Gives each token of a completion its own advantage.

    A3PO is `positive_low_ratio=0.2, positive_low_scale=2, negative_high_ratio=0.2, negative_high_scale=2`, with scales
    that decay to 1 during training (see [`~trl_a3po.schedules.decay_scale`]).

    The function never waits for the device.

    Args:
        advantages (`torch.Tensor` of shape `(B,)`):
            Group-normalized advantage of each completion.
        token_metric (`torch.Tensor` of shape `(B, T)`):
            Metric that ranks the tokens, in any floating dtype: the log-probability of each sampled token under the
            old policy (ordered as the probability), or the entropy at its position.
        mask (`torch.Tensor` of shape `(B, T)`):
            Non-zero on unmasked tokens. May have holes, for example where tools wrote.
        positive_low_ratio, positive_high_ratio, negative_low_ratio, negative_high_ratio (`float`, defaults to `0.0`):
            Share of a completion's tokens to select at each end, in [0, 1]. A share above 0 selects at least one
            token.
        positive_low_scale, positive_high_scale, negative_low_scale, negative_high_scale (`float`, defaults to `1.0`):
            Factor for the advantage of the selected tokens, finite and not negative. 1 selects nothing at that end.
        positive_weight, negative_weight (`float`, defaults to `1.0`):
            Factor for the advantage of every token of positive or negative completions, finite and not negative.

    Returns:
        `torch.Tensor` of shape `(B, T)` in the dtype of `advantages`: the shaped advantages, 0 where `mask` is 0.

    Raises:
        `ValueError`: a shape does not fit, a ratio is outside [0, 1], or a scale or weight is negative or not finite.
    """
    if advantages.dim() != 1 or token_metric.shape != mask.shape or token_metric.shape[:-1] != advantages.shape:
        raise ValueError(
            "Expected `advantages` of shape (B,), and `token_metric` and `mask` both of shape (B, T). Got "
            f"{tuple(advantages.shape)}, {tuple(token_metric.shape)} and {tuple(mask.shape)}."
        )
    settings = {
        "positive_low_ratio": positive_low_ratio,
        "positive_low_scale": positive_low_scale,
        "positive_high_ratio": positive_high_ratio,
        "positive_high_scale": positive_high_scale,
        "negative_low_ratio": negative_low_ratio,
        "negative_low_scale": negative_low_scale,
        "negative_high_ratio": negative_high_ratio,
        "negative_high_scale": negative_high_scale,
        "positive_weight": positive_weight,
        "negative_weight": negative_weight,
    }
    check_settings(**settings)
    mask = mask.bool()
    if mask.device.type != "cpu" or mask.numel() < CACHED_TOKENS:
        return _shape_rows(advantages, token_metric, mask, settings)
    # On a CPU, memory access takes the time, and reading the lengths of completions waits for nothing. So completions
    # of similar length are shaped together without their padding, as many at a time as fit into the caches.
    shaped = torch.zeros_like(mask, dtype=advantages.dtype)
    positions = torch.arange(1, mask.shape[1] + 1, dtype=torch.int32)
    by_length = mask.sum(-1, dtype=torch.int32).argsort()
    for rows in by_length.split(max(1, CACHED_TOKENS * torch.get_num_threads() // mask.shape[1])):
        counted = mask[rows]
        width = int((counted * positions).amax())
        shaped[rows, :width] = _shape_rows(advantages[rows], token_metric[rows, :width], counted[:, :width], settings)
    return shaped


def _shape_rows(advantages: Tensor, token_metric: Tensor, mask: Tensor, settings: Mapping[str, float]) -> Tensor:
    """Computes [`shape_advantages`] for arguments that it has checked."""
    positive = advantages > 0
    # The metric of negative completions is negated, which turns their high end into a low one. A completion has only
    # one polarity, so one selection serves `positive_low` and `negative_high`, and a second one the other two ends.
    sign = torch.ones_like(token_metric[:, :1]).masked_fill(~positive[:, None], -1.0)  # (B, 1)
    signed_metric = (token_metric * sign).masked_fill_(~mask, math.nan)

    weighted = weight_polarities(advantages, settings["positive_weight"], settings["negative_weight"])
    shaped = torch.where(mask, weighted[:, None], 0.0)
    for flip, ends in (False, ("positive_low", "negative_high")), (True, ("positive_high", "negative_low")):
        positive_scale, negative_scale = (settings[f"{end}_scale"] for end in ends)
        positive_ratio, negative_ratio = (
            settings[f"{end}_ratio"] if settings[f"{end}_scale"] != 1 else 0.0 for end in ends
        )
        if positive_ratio == 0 and negative_ratio == 0:
            continue
        lengths = mask.sum(-1, dtype=torch.int32)
        counts = torch.where(positive, _token_counts(lengths, positive_ratio), _token_counts(lengths, negative_ratio))
        most = max(1, math.floor(max(positive_ratio, negative_ratio) * mask.shape[1]))
        selected = select_lowest(-signed_metric if flip else signed_metric, counts, most)
        scale = _per_polarity(positive, positive_scale, negative_scale, shaped.dtype)
        # A lookup, because torch.where of a tensor and a number takes several times as long.
        shaped *= torch.stack([torch.ones_like(scale), scale], dim=-1).gather(1, selected.long())
    return shaped.to(advantages.dtype)


def weight_polarities(advantages: Tensor, positive_weight: float = 1.0, negative_weight: float = 1.0) -> Tensor:
    """
    Weights positive and negative completions against each other (arXiv 2512.21625, polarity-level shaping).

    `(1, 0)` is the paper's PSR (only positive samples), `(0, 1)` its NSR (only negative samples), `(x, y)` its PxNy.

    Args:
        advantages (`torch.Tensor` of shape `(B,)`): One advantage per completion.
        positive_weight, negative_weight (`float`, defaults to `1.0`): The weights.

    Returns:
        `torch.Tensor` of shape `(B,)`, at least in float32. With both weights 1 it equals the advantages to the last
        bit.
    """
    dtype = torch.promote_types(advantages.dtype, torch.float32)
    return advantages.to(dtype) * _per_polarity(advantages > 0, positive_weight, negative_weight, dtype)


def gspo_token_old_logps(per_token_logps: Tensor, old_per_token_logps: Tensor, mask: Tensor) -> Tensor:
    """
    Computes old log-probabilities that turn token-level ratios into GSPO-token's (arXiv 2507.18071, section 4.3).

    With them, exp(log-prob - old log-prob) has the value of the sequence's ratio at every token, but each token keeps
    its own gradient, and so its own advantage. With GSPO's plain ratio, every token gets the mean instead.

    Args:
        per_token_logps (`torch.Tensor` of shape `(B, T)`): Log-probabilities under the current policy.
        old_per_token_logps (`torch.Tensor` of shape `(B, T)`): Log-probabilities under the old policy.
        mask (`torch.Tensor` of shape `(B, T)`): Non-zero on unmasked tokens.

    Returns:
        `torch.Tensor` of shape `(B, T)`, without gradient.
    """
    per_token_logps = per_token_logps.detach()
    log_ratio = ((per_token_logps - old_per_token_logps) * mask).sum(-1) / mask.sum(-1).clamp(min=1.0)
    return per_token_logps - log_ratio[:, None]


def selects_tokens(settings: Mapping[str, float]) -> bool:
    """Whether these arguments of [`shape_advantages`] treat some tokens of a completion differently from others."""
    return any(
        settings[f"{end}_ratio"] > 0 and settings[f"{end}_scale"] != 1 and settings[f"{end.split('_')[0]}_weight"] > 0
        for end in TOKEN_ENDS
    )


def is_finite_number(value: object) -> TypeGuard[float]:
    """Whether a value is a finite number, and not a bool."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def check_settings(**settings: float) -> None:
    """
    Refuses a ratio, scale or weight without a meaning. The keyword names the setting.

    Raises:
        `ValueError`: the error names the setting, its value, what is allowed and the fix.
    """
    for name, value in settings.items():
        is_ratio = name.endswith("_ratio")
        if is_finite_number(value) and value >= 0 and not (is_ratio and value > 1):
            continue
        if is_ratio:
            raise ValueError(
                f"`{name}` must be a number from 0 to 1, got {value!r}. It is the share of a completion's tokens to "
                "select: pass 0.2 for 20 %, or 0 to select none."
            )
        neutral = "keep the selected tokens" if name.endswith("_scale") else "keep completions of that polarity"
        raise ValueError(
            f"`{name}` must be a finite number that is not negative, got {value!r}. It multiplies advantages, whose "
            f"sign must stay: pass 1 to {neutral} as they are, or 0 to ignore them."
        )


def _per_polarity(positive: Tensor, if_positive: float, if_negative: float, dtype: torch.dtype) -> Tensor:
    """Returns a (B,) tensor with one value for the positive rows and another for the rest."""
    return torch.full_like(positive, if_negative, dtype=dtype).masked_fill(positive, if_positive)


def _token_counts(lengths: Tensor, ratio: float) -> Tensor:
    """Returns the (B,) numbers of tokens to select, computed in float64 as in Python for a single completion."""
    return (lengths.double() * ratio).floor().clamp(min=1).int() if ratio > 0 else torch.zeros_like(lengths)


def select_lowest(metric: Tensor, counts: Tensor, most: int) -> Tensor:
    """
    Selects the `counts` (B,) lowest values in each row of `metric` (B, T), never a NaN, as a boolean tensor (B, T).

    `most` is a number on the host, at least as large as every count.
    """
    # The threshold of a row is its `counts`-th lowest metric. Top-k takes one k for all rows, so a row that selects
    # fewer than `most` tokens gets columns of -inf for the difference. Unsorted top-k takes linear time.
    is_filler = torch.arange(most, device=metric.device) < (most - counts)[:, None]
    filler = torch.full_like(is_filler, math.nan, dtype=metric.dtype).masked_fill(is_filler, -math.inf)
    lowest = torch.cat([metric, filler], dim=-1).topk(most, dim=-1, largest=False, sorted=False).values  # NaN is last
    # The threshold is NaN if a row has fewer numbers than it selects; then all of them are selected.
    threshold = lowest.amax(-1, keepdim=True).nan_to_num(nan=math.inf, posinf=math.inf, neginf=-math.inf)  # (B, 1)
    # Tokens that tie with the threshold fill the remaining places from the left.
    below = metric < threshold
    tied = metric == threshold
    places = counts[:, None] - below.sum(-1, keepdim=True, dtype=torch.int32)
    return below | (tied & (tied.cumsum(-1, dtype=torch.int32) <= places))
