"""
Other ways to shape advantages, as pure functions of tensors, to compare A3PO with or to put together with it.

Each takes what [`A3POTrainer.shape_advantages`] is called with, and is run by a subclass that overrides it. Shapes: B
completions, T token positions. They are put together in this order:

1. completions, (B,) to (B,): the estimator ([`w_reinforce`]), then the weights of the polarities
   ([`~trl_a3po.weight_polarities`]);
2. tokens, (B,) or (B, T) to (B, T): [`~trl_a3po.shape_advantages`] first, since it needs one sign a completion, then
   the others here, in any order: each scales what it is given.

The statistics that a method takes over tokens are those of the micro-batch on one process, as in the authors' code,
which gives some of them another meaning at another micro-batch size. Nothing here waits for the device.

What is said of authors' code was read there: 2506.01939 at 6f5dda6, 2506.01347 at a5d4e7c, 2505.22617 at 8850579,
2510.10150 at b31df71, 2505.12929 at cbeb333.
"""

import math

import torch
from torch import Tensor

from .shaping import select_lowest


def w_reinforce(rewards: Tensor, *, positive_weight: float = 0.1, correct_above: float = 0.5) -> Tensor:
    """
    W-REINFORCE (arXiv 2506.01347): λ for a completion that is correct, -1 for one that is wrong.

    The group does not enter, so that groups that are all right or all wrong teach as well, where GRPO's advantage is
    0. With `positive_weight=0` it is the paper's NSR, negative samples alone.

    From the paper and the authors' code: λ = 0.1, no normalisation. The code takes a score of 1 for correct and 0 for
    wrong; the threshold is ours, and holds for rewards of 1 and -1 too.

    Args:
        rewards (`torch.Tensor` of shape `(B,)`): Reward of each completion.
        positive_weight (`float`, *optional*, defaults to `0.1`): λ, not negative.
        correct_above (`float`, *optional*, defaults to `0.5`): A completion is correct if its reward is larger. With
            other rewards besides correctness, put it where these alone cannot reach.

    Returns:
        `torch.Tensor` of shape `(B,)`: the advantages, in place of GRPO's; 0 where the reward is NaN.
    """
    _check("positive_weight", positive_weight, 0.0, math.inf)
    return torch.where(rewards > correct_above, positive_weight, -1.0).masked_fill(rewards.isnan(), 0.0)


def forking_tokens(advantages: Tensor, entropies: Tensor, mask: Tensor, *, top_ratio: float = 0.2) -> Tensor:
    """
    Trains on the tokens of the highest entropy alone (arXiv 2506.01939, "forking tokens"), in the authors' scale.

    From the authors' code: the ceil(ratio * N) highest entropies among the N tokens of the micro-batch, under the
    policy being trained, and the mean loss of those tokens. Here the same mean comes of a factor N / kept, with
    `loss_type="bnpo"` exactly and with `"dapo"` but for the rounding of the counts; both are means over all tokens.

    TRL's `top_entropy_quantile` keeps the same share, but divides by all tokens: at 0.2 its gradient is a fifth of
    this one. Its threshold is that of the micro-batches of all processes, which it gathers.

    Args:
        advantages (`torch.Tensor` of shape `(B,)` or `(B, T)`): The advantages.
        entropies (`torch.Tensor` of shape `(B, T)`): Entropies, in nats.
        mask (`torch.Tensor` of shape `(B, T)`): Non-zero on the tokens that count.
        top_ratio (`float`, *optional*, defaults to `0.2`): Share of the tokens that is kept, in [0, 1]; at least one.

    Returns:
        `torch.Tensor` of shape `(B, T)`.
    """
    _check("top_ratio", top_ratio, 0.0, 1.0)
    advantages, mask = _per_token(advantages, mask)
    number = mask.sum()
    # The authors' rounding up, to whom a product just above a whole number is that number.
    kept = (number.double() * top_ratio + 0.9999).floor().clamp(min=1)
    most = max(1, math.floor(mask.numel() * top_ratio + 0.9999))
    is_kept = _select_lowest_of_all(-entropies, mask, kept, most)
    return torch.where(is_kept, advantages * (number / kept).to(advantages.dtype), 0.0)


def clip_cov(
    advantages: Tensor,
    per_token_logps: Tensor,
    old_per_token_logps: Tensor,
    mask: Tensor,
    *,
    clip_ratio: float = 0.0002,
    lower: float = 1.0,
    upper: float = 5.0,
    epsilon_low: float = 1.0,
    epsilon_high: float = 1.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """
    Clip-Cov (arXiv 2505.22617): takes the gradient from a few random tokens that drive entropy down the most.

    From the authors' code: the covariance of a token is (A - mean A) * (log p - mean log p), with the means over the
    tokens of the micro-batch and p under the policy being trained. Of the tokens whose covariance is in (1, 5) and
    that the ratio does not clip already, max(1, floor(0.0002 * N)) of N are drawn, all alike, and get no gradient; the
    loss is still the mean over all N. Their scripts clip the ratio at 0 and 2: set `epsilon` and `epsilon_high` of the
    configuration to 1.0 for that.

    Args:
        advantages (`torch.Tensor` of shape `(B,)` or `(B, T)`): The advantages.
        per_token_logps (`torch.Tensor` of shape `(B, T)`): Log-probabilities under the policy being trained.
        old_per_token_logps (`torch.Tensor` of shape `(B, T)`): Log-probabilities under the old policy.
        mask (`torch.Tensor` of shape `(B, T)`): Non-zero on the tokens that count.
        clip_ratio (`float`, *optional*, defaults to `0.0002`): Share of the tokens to draw, in [0, 1]; at least one.
        lower, upper (`float`, *optional*, defaults to `1.0` and `5.0`): Between which covariances tokens are drawn.
        epsilon_low, epsilon_high (`float`, *optional*, defaults to `1.0`): Where the loss clips the ratio, as the
            trainer's attributes of that name.
        generator (`torch.Generator`, *optional*): On the device of the tensors. Without it torch's own is used,
            which TRL seeds by process, and which checkpoints keep.

    Returns:
        `torch.Tensor` of shape `(B, T)`.
    """
    _check("clip_ratio", clip_ratio, 0.0, 1.0)
    advantages, mask = _per_token(advantages, mask)
    number = mask.sum()
    mean_advantage, mean_logp = (
        torch.where(mask, values, 0.0).sum() / number.clamp(min=1) for values in (advantages, per_token_logps)
    )
    covariance = (advantages - mean_advantage) * (per_token_logps - mean_logp)
    ratio = (per_token_logps - old_per_token_logps).exp()
    is_clipped = torch.where(advantages > 0, ratio > 1 + epsilon_high, (advantages < 0) & (ratio < 1 - epsilon_low))
    is_candidate = mask & (covariance > lower) & (covariance < upper) & ~is_clipped
    # Those with the lowest of as many random numbers: any number of candidates is drawn from without counting them.
    lots = torch.rand(mask.shape, generator=generator, device=mask.device)
    drawn = (number.double() * clip_ratio).floor().clamp(min=1)
    most = max(1, math.floor(mask.numel() * clip_ratio))
    return advantages.masked_fill(_select_lowest_of_all(lots, is_candidate, drawn, most), 0.0)


def steer_exponential(
    advantages: Tensor,
    per_token_logps: Tensor,
    old_per_token_logps: Tensor,
    entropies: Tensor,
    mask: Tensor,
    *,
    min_weight: float = 0.8,
) -> Tensor:
    """
    STEER (arXiv 2510.10150), exponential: the more a token would change the entropy, the lower its weight.

    The weight is exp(-k Ω) with k = -ln(min_weight) / max(0.02, largest Ω of the micro-batch): from 1 where nothing
    changes to `min_weight` for the largest change. From the authors' code: Ω of [`entropy_change`], the 0.02, and 0.8
    in the script `run_exp.sh`, which clips the ratio at 0.8 and 1.28.

    Args:
        advantages (`torch.Tensor` of shape `(B,)` or `(B, T)`): The advantages.
        per_token_logps, old_per_token_logps, entropies, mask (`torch.Tensor` of shape `(B, T)`): As in
            [`entropy_change`].
        min_weight (`float`, *optional*, defaults to `0.8`): Weight of the largest change, in [0, 1].

    Returns:
        `torch.Tensor` of shape `(B, T)`.
    """
    _check("min_weight", min_weight, 0.0, 1.0)
    advantages, mask = _per_token(advantages, mask)
    change = entropy_change(advantages, per_token_logps, old_per_token_logps, entropies, mask)
    return advantages * min_weight ** (change / change.amax().clamp(min=0.02))


def steer_linear(
    advantages: Tensor,
    per_token_logps: Tensor,
    old_per_token_logps: Tensor,
    entropies: Tensor,
    mask: Tensor,
    *,
    min_weight: float = 0.8,
    max_weight: float = 1.2,
) -> Tensor:
    """
    STEER (arXiv 2510.10150), linear: as [`steer_exponential`], with weights that fall linearly.

    The weight runs from `max_weight` for the smallest change in the micro-batch to `min_weight` for the largest; where
    all are equal it is the mean of the two. The defaults are those of the authors' script `run_linear.sh`.

    Args:
        advantages (`torch.Tensor` of shape `(B,)` or `(B, T)`): The advantages.
        per_token_logps, old_per_token_logps, entropies, mask (`torch.Tensor` of shape `(B, T)`): As in
            [`entropy_change`].
        min_weight, max_weight (`float`, *optional*, defaults to `0.8` and `1.2`): Weights of the largest and the
            smallest change, not negative.

    Returns:
        `torch.Tensor` of shape `(B, T)`.
    """
    _check("max_weight", max_weight, 0.0, math.inf)
    _check("min_weight", min_weight, 0.0, max_weight)
    advantages, mask = _per_token(advantages, mask)
    change = entropy_change(advantages, per_token_logps, old_per_token_logps, entropies, mask)
    smallest, largest = change.masked_fill(~mask, math.inf).amin(), change.amax()
    share = torch.where(largest > smallest, (change - smallest) / (largest - smallest), 0.5)
    return advantages * (max_weight - share * (max_weight - min_weight))


def entropy_change(
    advantages: Tensor, per_token_logps: Tensor, old_per_token_logps: Tensor, entropies: Tensor, mask: Tensor
) -> Tensor:
    """
    How much an update on each token alone would change the entropy at its position, estimated (arXiv 2510.10150).

    Ω = |A / p_old * p (1 - p) (ln p + H)|, with p and H under the policy being trained. From the authors' code:
    probabilities are no lower than 1e-8, and an Ω that is not finite is 0.

    Args:
        advantages (`torch.Tensor` of shape `(B,)` or `(B, T)`): The advantages A.
        per_token_logps (`torch.Tensor` of shape `(B, T)`): ln p.
        old_per_token_logps (`torch.Tensor` of shape `(B, T)`): ln p_old.
        entropies (`torch.Tensor` of shape `(B, T)`): H, in nats.
        mask (`torch.Tensor` of shape `(B, T)`): Non-zero on the tokens that count.

    Returns:
        `torch.Tensor` of shape `(B, T)`, 0 where `mask` is 0.
    """
    advantages, mask = _per_token(advantages, mask)
    probs, old_probs = (logps.exp().clamp(min=1e-8) for logps in (per_token_logps, old_per_token_logps))
    change = (advantages / old_probs * probs * (1 - probs) * (probs.log() + entropies)).abs()
    return torch.where(mask & change.isfinite(), change, 0.0)


def advantage_reweighting(
    advantages: Tensor, old_per_token_logps: Tensor, mask: Tensor, *, alpha: float = 0.2
) -> Tensor:
    """
    Advantage Reweighting (arXiv 2505.12929): damps rare tokens, A * (α p_old + 1 - α).

    On positive completions it does the opposite of A3PO, which makes it a control. From the authors' code: the formula
    under the old policy, and α = 0.2 in the script `train_kklogic_AR_4x80GB.sh`; with Lopti, which is not here (it
    needs two updates a batch), 0.3.

    Args:
        advantages (`torch.Tensor` of shape `(B,)` or `(B, T)`): The advantages.
        old_per_token_logps (`torch.Tensor` of shape `(B, T)`): Log-probabilities under the old policy.
        mask (`torch.Tensor` of shape `(B, T)`): Non-zero on the tokens that count.
        alpha (`float`, *optional*, defaults to `0.2`): α in [0, 1]; 0 changes nothing.

    Returns:
        `torch.Tensor` of shape `(B, T)`.
    """
    _check("alpha", alpha, 0.0, 1.0)
    advantages, _ = _per_token(advantages, mask)
    return advantages * (alpha * old_per_token_logps.exp() + (1 - alpha))


def _per_token(advantages: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """(B, T) advantages, 0 where masked and at least in float32, and the (B, T) mask as booleans."""
    if advantages.shape not in (mask.shape, mask.shape[:1]) or mask.dim() != 2:
        raise ValueError(
            "Expected `mask` of shape (B, T), and `advantages` of shape (B,) or (B, T). Got "
            f"{tuple(mask.shape)} and {tuple(advantages.shape)}."
        )
    advantages = advantages.to(torch.promote_types(advantages.dtype, torch.float32))
    if advantages.dim() == 1:
        advantages = advantages[:, None]
    mask = mask.bool()
    return torch.where(mask, advantages, 0.0), mask


def _select_lowest_of_all(values: Tensor, candidates: Tensor, count: Tensor, most: int) -> Tensor:
    """(B, T) boolean tensor: of the values (B, T) that are candidates the `count` lowest, or all if they are fewer."""
    values = values.masked_fill(~candidates, math.nan)
    return select_lowest(values.view(1, -1), count.int().view(1), most).view_as(values)


def _check(name: str, value: float, smallest: float, largest: float) -> None:
    if not smallest <= value <= largest:
        allowed = f"from {smallest:g} to {largest:g}" if largest < math.inf else f"of {smallest:g} or more"
        raise ValueError(f"`{name}` must be a number {allowed}, got {value!r}.")
