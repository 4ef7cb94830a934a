"""
Other ways to shape advantages, as pure functions of tensors: to compare A3PO with, or to combine with it.

To train with one of them, set `shaping` of [`~trl_a3po.A3POConfig`] to its name, and `shaping_args` to its settings.

Each function takes the arguments of [`A3POTrainer.shape_advantages`] and ignores those that it does not use. So a
trainer of your own calls it in one line:

```python
>>> class EntropyAdvantageTrainer(A3POTrainer):
...     def shape_advantages(self, advantages, **batch):
...         return peers.entropy_advantage(advantages, **batch)
```

Pass settings before the batch: `peers.entropy_advantage(advantages, alpha=0.1, **batch)`. A name that is neither a
setting nor an argument of the hook raises a `TypeError`, a value out of its range or a wrong shape a `ValueError`.
[`clip_cov`] and [`stare`] also need values that the trainer knows.

The tensors are those of the hook. B is the number of completions, T the number of token positions:

- `advantages` (B,) or (B, T): the advantages to shape, one per completion or one per token.
- `per_token_logps` (B, T): log-probabilities of the tokens under the policy being trained, ln p.
- `old_per_token_logps` (B, T): the same under the old policy, ln p_old. The ratio of a token is p / p_old.
- `entropies` (B, T): entropies of the policy being trained, in nats, H.
- `mask` (B, T): non-zero on the unmasked tokens. Values at the other positions have no influence, not even NaN.
- `rewards` (B,): the reward of each completion.
- `progress`: the share of the optimizer steps that are done, from 0 to 1.

The result has shape (B, T), is at least float32, and is 0 where masked. Only [`w_reinforce`] returns (B,). No function
waits for the device. No gradient flows through a weight: the hook runs under `torch.no_grad()`.

Order, to combine several:

1. completions, (B,) to (B,): the estimator ([`w_reinforce`]), then the weights of the polarities
   ([`~trl_a3po.weight_polarities`]);
2. tokens, (B,) or (B, T) to (B, T): [`~trl_a3po.shape_advantages`] first, because it needs one sign per completion,
   then the functions here, in any order.

**Statistics over the micro-batch.** [`forking_tokens`], [`clip_cov`], [`steer_exponential`], [`steer_linear`],
[`gtpo_simplified`], [`aepo`] and [`stare`] rank or average tokens over the micro-batch of one process, like the code
that they follow. Their result depends on which rows share a micro-batch, and so on `per_device_train_batch_size`. The
other functions treat each completion by itself.

**Speed.** The update of these others is as fast as A3PO's: they are marked with [`~trl_a3po.completionwise`].
[`w_reinforce`] is not, because it also trains on completions whose advantage is 0.

**Sources.** "Read" means that the formula and the defaults were compared with the named code at the named commit. The
equations of the papers were not compared.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from .shaping import completionwise, is_finite_number, select_lowest


# The arguments of the hook. A method ignores those that it does not use.
HOOK_ARGUMENTS = {"per_token_logps", "old_per_token_logps", "entropies", "mask", "rewards", "progress"}


# One value per completion


def w_reinforce(
    advantages: Tensor,
    *,
    rewards: Tensor | None,
    positive_weight: float = 0.1,
    correct_above: float = 0.5,
    **unused: Any,
) -> Tensor:
    """
    W-REINFORCE (arXiv 2506.01347): λ for a correct completion, -1 for a wrong one, in place of `advantages`.

    The group does not matter. Groups that are all right or all wrong also have a learning signal, where GRPO's
    advantage is 0. With `positive_weight=0` it is NSR of the same paper, negative samples only.

    Source: TianHongZXY/RLVR-Decomposed at a5d4e7c, read: λ = 0.1 and no normalization. There, a score is 1 for correct
    and 0 for wrong. The threshold is ours, so that rewards of 1 and -1 work too.

    Args:
        positive_weight (`float`, *optional*, defaults to `0.1`): λ, not negative.
        correct_above (`float`, *optional*, defaults to `0.5`): A completion is correct if its reward is larger. If
            other rewards are added to the one for correctness, choose a value that they cannot reach without it.

    Returns:
        `torch.Tensor` of shape `(B,)`: 0 where the reward is NaN.

    Raises:
        `ValueError`: `rewards` is `None`, because a method of the trainer scores completions in place of TRL's.
    """
    _refuse_unknown(unused)
    _check("positive_weight", positive_weight, 0.0)
    _check("correct_above", correct_above)
    if rewards is None:
        raise ValueError(
            "`w_reinforce` needs `rewards`, got None: the trainer overrides the method of TRL that scores "
            "completions, so the hook has no rewards. Pass them: `w_reinforce(advantages, rewards=...)`."
        )
    return torch.where(rewards > correct_above, positive_weight, -1.0).masked_fill(rewards.isnan(), 0.0)


# Each token by itself


@completionwise
def advantage_reweighting(
    advantages: Tensor, *, old_per_token_logps: Tensor, mask: Tensor, alpha: float = 0.2, **unused: Any
) -> Tensor:
    """
    Advantage Reweighting (arXiv 2505.12929): damps rare tokens, A (α p_old + 1 - α).

    On positive completions it does the opposite of A3PO, so it can serve as a control.

    Source: zhyang2226/AR-Lopti at cbeb333, read: the formula with probabilities of the old policy, and α = 0.2 in the
    script `train_kklogic_AR_4x80GB.sh`. Its scripts for both methods together have 0.3. The other method, Lopti, is
    not implemented here: it needs two updates per batch.

    Args:
        alpha (`float`, *optional*, defaults to `0.2`): α, from 0 to 1. 0 changes nothing.
    """
    _refuse_unknown(unused)
    _check("alpha", alpha, 0.0, 1.0)
    advantages, mask, old_logps = _unmasked(advantages, mask, old_per_token_logps)
    return advantages * (alpha * old_logps.exp() + (1 - alpha))


@completionwise
def entropy_advantage(
    advantages: Tensor, *, entropies: Tensor, mask: Tensor, alpha: float = 0.4, kappa: float = 2.0, **unused: Any
) -> Tensor:
    """
    Entropy advantage (arXiv 2506.14758): a bonus for uncertain tokens, A + min(α H, abs(A) / κ).

    The sign of an advantage stays, and 0 stays 0: positive tokens are reinforced more, negative ones punished less.

    Source: the authors' code was not found. Two forks of verl were read: the actor of one, and the document
    "Entropy-Based Advantage Shaping" of the other. Both have this formula, with the entropy detached. α = 0.4 and
    κ = 2 are the values of their scripts. We did not verify that they are the paper's.

    Args:
        alpha (`float`, *optional*, defaults to `0.4`): α, not negative. 0 changes nothing.
        kappa (`float`, *optional*, defaults to `2.0`): κ, at least 1. The bonus is at most abs(A) / κ.
    """
    _refuse_unknown(unused)
    _check("alpha", alpha, 0.0)
    _check("kappa", kappa, 1.0)
    advantages, mask, entropies = _unmasked(advantages, mask, entropies)
    return advantages + torch.minimum(alpha * entropies, advantages.abs() / kappa)


@completionwise
def aspo(
    advantages: Tensor,
    *,
    per_token_logps: Tensor,
    old_per_token_logps: Tensor,
    mask: Tensor,
    max_weight: float = 3.0,
    **unused: Any,
) -> Tensor:
    """
    ASPO (arXiv 2510.06062): weights the gradient of positive tokens by the inverse of the ratio.

    In GRPO, the gradient of ln p has the weight A r, with r = p / p_old. Here, it is A min(1 / r, c) where A > 0, and
    A min(r, c) where A < 0. The loss multiplies by r, so the shaped advantage is this weight divided by r. ASPO is the
    identity while rollout and update are aligned. It needs a loss that clips the ratio: `loss_type` `"grpo"`,
    `"bnpo"`, `"dr_grpo"` or `"dapo"`, with `importance_sampling_level="token"`.

    Source: wizard-III/Archer2.0 at b08d963, `compute_policy_loss_archer` in verl/trainer/ppo/core_algos.py, read: the
    weight, c = 3 for both signs, and a log-ratio that is clamped to [-20, 20]. The loss clips as `epsilon` and
    `epsilon_high` say. The authors clip at 0.2 or at 0.4, depending on the token's entropy: these two options cannot
    express that.

    Args:
        max_weight (`float`, *optional*, defaults to `3.0`): c, at least 1.
    """
    _refuse_unknown(unused)
    _check("max_weight", max_weight, 1.0)
    advantages, mask, logps, old_logps = _unmasked(advantages, mask, per_token_logps, old_per_token_logps)
    log_ratio = (logps - old_logps).clamp(min=-20.0, max=20.0)
    weight = torch.where(advantages > 0, -log_ratio, log_ratio).exp().clamp(max=max_weight)
    return advantages * weight * (-log_ratio).exp()


# Each completion by itself


@completionwise
def position_bonus(
    advantages: Tensor,
    *,
    mask: Tensor,
    progress: float,
    alpha: float = 0.1,
    begin: float = 0.0,
    end: float = 1.0,
    **unused: Any,
) -> Tensor:
    """
    Position bonus (arXiv 2508.02260 and its follow-up 2508.07534): more advantage for the end of a completion.

    Token number j of N, counted from 0, is at t = j / N. It gets A + sign(A) min(α sigmoid(15 (t - 0.5)), abs(A) / 2).

    Source: RUCAIBox/Slow_Thinking_with_LLMs at 834e1b7, read: the formula in `compute_policy_loss` of
    entropy2performance/verl/verl/trainer/ppo/core_algos.py, and α = 0.1 in scripts/location.sh. There, ray_trainer.py
    turns it on after step 200 and off before step 300. Here, `begin` and `end` are shares of the training. By default,
    the bonus is on throughout.

    Args:
        alpha (`float`, *optional*, defaults to `0.1`): α, not negative. 0 changes nothing.
        begin, end (`float`, *optional*, defaults to `0.0` and `1.0`): On while `begin <= progress <= end`.
    """
    _refuse_unknown(unused)
    _check("alpha", alpha, 0.0)
    _check("end", end, 0.0, 1.0)
    _check("begin", begin, 0.0, end)
    advantages, mask = _unmasked(advantages, mask)
    if not begin <= progress <= end:
        return advantages
    position = (mask.cumsum(1) - 1) / mask.sum(1, keepdim=True).clamp(min=1)  # (B, T)
    bonus = torch.minimum(alpha * torch.sigmoid(15 * (position - 0.5)), 0.5 * advantages.abs())
    return advantages + advantages.sign() * bonus


@completionwise
def fipo(
    advantages: Tensor,
    *,
    per_token_logps: Tensor,
    old_per_token_logps: Tensor,
    mask: Tensor,
    half_life: float = 32.0,
    lower: float = 1.0,
    upper: float = 1.2,
    delta: float | None = None,
    safety_threshold: float = 4.0,
    **unused: Any,
) -> Tensor:
    """
    FIPO (arXiv 2603.19835): more advantage for tokens after which the policy has moved towards the completion.

    The token at position t is weighted by f = exp(sum over k >= t of γ^(k - t) (ln p_k - ln p_old_k)), clamped to
    [`lower`, `upper`], with γ = 2^(-1 / half_life). Masked tokens, and those with a ratio above `delta`, count as 0 in
    the sum. Where A < 0 and the ratio is above `safety_threshold`, f is also clamped to [0.8, 1]. FIPO is the
    identity while rollout and update are aligned.

    Source: the authors' code (`compute_policy_loss_future_kl` in verl/trainer/ppo/core_algos.py, commit 4d52d01 of
    qwenpilot/FIPO, in the history of a fork), and modelscope/ms-swift at 3602360 (`_compute_fipo_influence` in
    swift/rlhf_trainers/grpo_trainer.py), both read: the formula, and a log-ratio that is clamped to [-20, 20]
    (authors). The defaults are ms-swift's; half-life and clamp are those of the authors' 32B script too, which sets
    10 for `delta` (the bound of the dual clip) and for `safety_threshold`. One rule is not implemented here: the
    authors skip a whole completion if the dual clip cuts more than one of its tokens.

    Args:
        half_life (`float`, *optional*, defaults to `32.0`): Tokens after which the weight of a term has halved.
        lower, upper (`float`, *optional*, defaults to `1.0` and `1.2`): Bounds of f. A comment in the authors' code
            recommends a lower bound of 0.8 for smaller models.
        delta (`float`, *optional*): Largest ratio of a token that counts in the sum, at least 1. Pass the `delta` of
            the configuration to have the same bound in the sum and in the loss.
        safety_threshold (`float`, *optional*, defaults to `4.0`): Ratio above which negative tokens are not amplified.
    """
    _refuse_unknown(unused)
    _check("half_life", half_life, 1e-3)
    _check("upper", upper, 0.0)
    _check("lower", lower, 0.0, upper)
    _check("safety_threshold", safety_threshold, 0.0)
    advantages, mask, logps, old_logps = _unmasked(advantages, mask, per_token_logps, old_per_token_logps)
    log_ratio = (logps - old_logps).clamp(min=-20.0, max=20.0)
    future = log_ratio
    if delta is not None:
        _check("delta", delta, 1.0)
        future = future.masked_fill(log_ratio > math.log(delta), 0.0)
    # After a round, each position has the discounted sum of the next `reach` terms: log2(T) rounds have them all.
    discount, reach = 2.0 ** (-1.0 / half_life), 1
    while reach < future.shape[1]:
        future = future + discount**reach * pad(future[:, reach:], (0, reach))
        reach *= 2
    influence = future.exp().clamp(min=lower, max=upper)
    is_unsafe = (advantages < 0) & (log_ratio.exp() > safety_threshold)
    return advantages * torch.where(is_unsafe, influence.clamp(min=0.8, max=1.0), influence)


# Over the tokens of the micro-batch


def forking_tokens(
    advantages: Tensor, *, entropies: Tensor, mask: Tensor, top_ratio: float = 0.2, **unused: Any
) -> Tensor:
    """
    Forking tokens (arXiv 2506.01939): trains only on the tokens with the highest entropy, at the authors' scale.

    The ceil(ratio N) tokens with the highest entropy keep their advantage, out of the N tokens in the micro-batch. The
    authors' loss is the mean over these tokens. Here, a factor N / kept gives the same mean: exactly with
    `loss_type="bnpo"`, and up to the rounding of the counts with `"dapo"`.

    TRL's `top_entropy_quantile` keeps the same share, but divides by the number of all tokens: at 0.2, its gradient is
    a fifth of this one. It takes its threshold from the micro-batches of all processes.

    Source: Shenzhi-Wang/Beyond-the-80-20-Rule-RLVR at 6f5dda6, read: the set, its size, and the mean.

    Args:
        top_ratio (`float`, *optional*, defaults to `0.2`): Share of the tokens to keep, from 0 to 1. At least one
            is kept.
    """
    _refuse_unknown(unused)
    _check("top_ratio", top_ratio, 0.0, 1.0)
    advantages, mask, entropies = _unmasked(advantages, mask, entropies)
    number = mask.sum()
    kept = _share(number, top_ratio, rounded_up_by=0.9999).clamp(min=1)
    is_kept = _select_lowest_of_all(-entropies, mask, kept, mask.numel() * top_ratio + 1)
    return torch.where(is_kept, advantages * (number / kept).to(advantages.dtype), 0.0)


def clip_cov(
    advantages: Tensor,
    *,
    per_token_logps: Tensor,
    old_per_token_logps: Tensor,
    mask: Tensor,
    epsilon_low: float,
    epsilon_high: float,
    clip_ratio: float = 0.0002,
    lower: float = 1.0,
    upper: float = 5.0,
    generator: torch.Generator | None = None,
    **unused: Any,
) -> Tensor:
    """
    Clip-Cov (arXiv 2505.22617): removes the gradient of a few random tokens that lower the entropy the most.

    The covariance of a token is (A - mean A) (ln p - mean ln p), with means over the tokens of the micro-batch. A
    token is a candidate if its covariance is between `lower` and `upper` and the loss does not clip its ratio already.
    max(1, floor(ratio N)) of the candidates are drawn at random and get no gradient. The loss is still the mean over
    all N tokens.

    Source: PRIME-RL/Entropy-Mechanism-of-RL at 8850579, read: all of it. Its scripts clip the ratio at 0 and 2. Set
    `epsilon=1.0, epsilon_high=1.0` in the configuration to do the same.

    Args:
        epsilon_low, epsilon_high (`float`): Where the loss clips the ratio: the trainer's attributes of these names.
        clip_ratio (`float`, *optional*, defaults to `0.0002`): Share of the tokens to draw, from 0 to 1. At least one
            is drawn.
        lower, upper (`float`, *optional*, defaults to `1.0` and `5.0`): Bounds of the covariance of candidates.
        generator (`torch.Generator`, *optional*): A generator on the device of the tensors. The default is torch's
            own: each process has its own seed, and checkpoints save its state.
    """
    _refuse_unknown(unused)
    _check("clip_ratio", clip_ratio, 0.0, 1.0)
    _check("upper", upper)
    _check("lower", lower, largest=upper)
    advantages, mask, logps, old_logps = _unmasked(advantages, mask, per_token_logps, old_per_token_logps)
    covariance = (advantages - _mean(advantages, mask)) * (logps - _mean(logps, mask))
    ratio = (logps - old_logps).exp()
    is_clipped = torch.where(advantages > 0, ratio > 1 + epsilon_high, (advantages < 0) & (ratio < 1 - epsilon_low))
    is_candidate = mask & (covariance > lower) & (covariance < upper) & ~is_clipped
    # Takes those with the lowest random numbers. To count the candidates would wait for the device.
    numbers = torch.rand(mask.shape, generator=generator, device=mask.device)
    drawn = _share(mask.sum(), clip_ratio).clamp(min=1)
    is_drawn = _select_lowest_of_all(numbers, is_candidate, drawn, mask.numel() * clip_ratio + 1)
    return advantages.masked_fill(is_drawn, 0.0)


def steer_exponential(
    advantages: Tensor,
    *,
    per_token_logps: Tensor,
    old_per_token_logps: Tensor,
    entropies: Tensor,
    mask: Tensor,
    min_weight: float = 0.8,
    **unused: Any,
) -> Tensor:
    """
    STEER (arXiv 2510.10150), exponential: the more a token would change the entropy, the lower its weight.

    The weight is `min_weight` to the power Ω / max(0.02, largest Ω in the micro-batch), with Ω of [`entropy_change`]:
    1 where nothing changes, `min_weight` for the largest change.

    Source: zz-haooo/STEER at b31df71, read: Ω, the 0.02, and 0.8 in the script `run_exp.sh`, which clips the ratio at
    0.8 and 1.28.

    Args:
        min_weight (`float`, *optional*, defaults to `0.8`): Weight of the largest change, from 0 to 1.
    """
    _refuse_unknown(unused)
    _check("min_weight", min_weight, 0.0, 1.0)
    change = entropy_change(
        advantages,
        per_token_logps=per_token_logps,
        old_per_token_logps=old_per_token_logps,
        entropies=entropies,
        mask=mask,
    )
    advantages, mask = _unmasked(advantages, mask)
    return advantages * min_weight ** (change / change.amax().clamp(min=0.02))


def steer_linear(
    advantages: Tensor,
    *,
    per_token_logps: Tensor,
    old_per_token_logps: Tensor,
    entropies: Tensor,
    mask: Tensor,
    min_weight: float = 0.8,
    max_weight: float = 1.2,
    **unused: Any,
) -> Tensor:
    """
    STEER (arXiv 2510.10150), linear: as [`steer_exponential`], with weights that fall linearly.

    The weight is `max_weight` for the smallest change in the micro-batch and `min_weight` for the largest. Where all
    changes are equal, it is the mean of the two.

    Source: zz-haooo/STEER at b31df71, read: the weights, and 0.8 and 1.2 in the script `run_linear.sh`.

    Args:
        min_weight, max_weight (`float`, *optional*, defaults to `0.8` and `1.2`): Weights of the largest and the
            smallest change, not negative.
    """
    _refuse_unknown(unused)
    _check("max_weight", max_weight, 0.0)
    _check("min_weight", min_weight, 0.0, max_weight)
    change = entropy_change(
        advantages,
        per_token_logps=per_token_logps,
        old_per_token_logps=old_per_token_logps,
        entropies=entropies,
        mask=mask,
    )
    advantages, mask = _unmasked(advantages, mask)
    smallest, largest = change.masked_fill(~mask, math.inf).amin(), change.amax()
    share = torch.where(largest > smallest, (change - smallest) / (largest - smallest), 0.5)
    return advantages * (max_weight - share * (max_weight - min_weight))


def entropy_change(
    advantages: Tensor,
    *,
    per_token_logps: Tensor,
    old_per_token_logps: Tensor,
    entropies: Tensor,
    mask: Tensor,
    **unused: Any,
) -> Tensor:
    """
    STEER's estimate of how much an update on one token only would change the entropy at its position (2510.10150).

    Ω = abs(A / p_old p (1 - p) (ln p + H)). It is not a method by itself: [`steer_exponential`] and [`steer_linear`]
    use it.

    Source: zz-haooo/STEER at b31df71, read: the formula; no probability is below 1e-8, and an Ω that is not finite
    is 0.
    """
    _refuse_unknown(unused)
    advantages, mask, logps, old_logps, entropies = _unmasked(
        advantages, mask, per_token_logps, old_per_token_logps, entropies
    )
    probs, old_probs = (each.exp().clamp(min=1e-8) for each in (logps, old_logps))
    change = (advantages / old_probs * probs * (1 - probs) * (probs.log() + entropies)).abs()
    return torch.where(mask & change.isfinite(), change, 0.0)


def gtpo_simplified(
    advantages: Tensor, *, entropies: Tensor, mask: Tensor, beta: float = 0.1, **unused: Any
) -> Tensor:
    """
    GTPO (arXiv 2508.04349), simplified: A max(0, 1 + β (H / mean H - 1)), with the mean over the micro-batch.

    The paper's method is another: it shapes rewards over whole groups, and treats wrong completions separately. The
    hook cannot do that, because a group may be spread over several micro-batches.

    Source: teilomillet/textpolicy at e88fc30, `apply_entropy_weighting` in textpolicy/algorithms/grpo.py, read: the
    formula, β = 0.1 (the paper's α₂, it says), and no change where the mean is below 1e-7. Its module for Tinker uses
    the mean of each completion instead. It is not by the authors of the paper, whose code was not found.

    Args:
        beta (`float`, *optional*, defaults to `0.1`): β, not negative. 0 changes nothing.
    """
    _refuse_unknown(unused)
    _check("beta", beta, 0.0)
    advantages, mask, entropies = _unmasked(advantages, mask, entropies)
    mean = _mean(entropies, mask)
    relative = torch.where(mean < 1e-7, 1.0, entropies / mean)
    return advantages * (1 + beta * (relative - 1)).clamp(min=0.0)


def aepo(advantages: Tensor, *, entropies: Tensor, mask: Tensor, alpha: float = 0.2, **unused: Any) -> Tensor:
    """
    Entropy-aware advantage of AEPO (arXiv 2510.14545): A (1 + α z), with z the standardized entropy of a token.

    z = (H - mean H) / std H over the tokens of the micro-batch, with the unbiased standard deviation. It is not
    clamped: with α = 0.2, the advantage changes its sign if the entropy is more than five deviations below the mean.
    The rollout and the clipping of AEPO are not implemented here.

    Source: multi-agent-deep-research/ARPO at 870d54c, a copy of the authors' repository,
    `compute_policy_loss_entropy_balanced_clipping` in AEPO/verl_aepo_entropy/verl/trainer/ppo/core_algos.py, read: the
    formula, α = 0.2, and a deviation of 0 that becomes 1. The available snapshots of the authors' own repository are
    older than AEPO. The copy computes the entropy only if `entropy_coeff` is not 0; otherwise it silently skips the
    method. Our choice: a deviation below 1e-5 nats becomes 1, too. It is rounding: one-token completions of one prompt
    have equal entropies.

    Args:
        alpha (`float`, *optional*, defaults to `0.2`): α, not negative. 0 changes nothing.
    """
    _refuse_unknown(unused)
    _check("alpha", alpha, 0.0)
    advantages, mask, entropies = _unmasked(advantages, mask, entropies)
    deviation = torch.where(mask, entropies - _mean(entropies, mask), 0.0)
    std = (deviation.square().sum() / (mask.sum() - 1).clamp(min=1)).sqrt()
    return advantages * (1 + alpha * deviation / torch.where(std < 1e-5, 1.0, std))


def stare(
    advantages: Tensor,
    *,
    per_token_logps: Tensor,
    mask: Tensor,
    entropy_of_last_step: float,
    top_ratio: float = 0.1,
    positive_weight: float = 1.1,
    negative_weight: float = 1.0,
    target_entropy: float = 0.3,
    **unused: Any,
) -> Tensor:
    """
    STARE (arXiv 2606.19236): while the entropy is below a target, amplifies surprising tokens of positive completions.

    The ceil(ratio N) tokens with the lowest ln p get the advantage A `positive_weight`, out of the N tokens with A > 0
    in the micro-batch. The same share of the tokens with A < 0 gets A `negative_weight`. Nothing changes while the
    entropy is at or above `target_entropy`.

    It is close to A3PO's `positive_low`. It ranks over the micro-batch instead of the completion, and by the current
    policy instead of the old one. A gate replaces the decay.

    Source: hp-luo/STARE at bffb9e7, `compute_stare_token_weights` and `STAREController` in
    verl/trainer/ppo/core_algos.py, read: the sets, the weights, and the gate. The defaults are those of its
    configuration, variant O1; variant C2 has `negative_weight=0.9`. Its README recommends 1.05 and 0.95 for models of
    14B and 32B. The adaptive weights, which are off by default, are not implemented here. One difference: the authors
    measure the entropy on the rollout, before it is used for updates. A trainer knows the entropy of its last step.

    Args:
        entropy_of_last_step (`float`): Mean entropy of the last step over all processes, in nats. A trainer passes
            `peers.logged_entropy(self.state.log_history)`. With NaN, before the first log, the gate is open, like that
            of the authors at the start.
        top_ratio (`float`, *optional*, defaults to `0.1`): Share of the tokens of each sign to select, from 0 to 1.
        positive_weight (`float`, *optional*, defaults to `1.1`): Weight of selected tokens with A > 0, not negative.
        negative_weight (`float`, *optional*, defaults to `1.0`): Weight of selected tokens with A < 0, not negative.
        target_entropy (`float`, *optional*, defaults to `0.3`): Target, in nats.
    """
    _refuse_unknown(unused)
    _check("top_ratio", top_ratio, 0.0, 1.0)
    _check("positive_weight", positive_weight, 0.0)
    _check("negative_weight", negative_weight, 0.0)
    _check("target_entropy", target_entropy, 0.0)
    advantages, mask, logps = _unmasked(advantages, mask, per_token_logps)
    if entropy_of_last_step >= target_entropy:
        return advantages
    shaped = advantages
    for candidates, weight in ((advantages > 0, positive_weight), (advantages < 0, negative_weight)):
        if weight != 1:
            count = _share(candidates.sum(), top_ratio, rounded_up_by=0.999999)
            selected = _select_lowest_of_all(logps, candidates, count, mask.numel() * top_ratio + 1)
            shaped = torch.where(selected, advantages * weight, shaped)
    return shaped


def logged_entropy(log_history: Sequence[Mapping[str, Any]]) -> float:
    """
    The mean entropy of a trainer's last log, for [`stare`].

    TRL logs the mean over the steps since the previous log, so set `logging_steps=1` to get the entropy of the last
    step. The value is the same on every process, and a checkpoint keeps it.

    Args:
        log_history (sequence of `dict`): `self.state.log_history` of the trainer.

    Returns:
        `float`: In nats. NaN if no entropy was logged yet.
    """
    logged = (entry["entropy"] for entry in reversed(log_history) if entry.get("entropy") is not None)
    return next(logged, math.nan)


def _unmasked(advantages: Tensor, mask: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
    """(B, T) advantages, the (B, T) mask as booleans, and the (B, T) tensors: at least float32, 0 where masked."""
    if advantages.shape not in (mask.shape, mask.shape[:1]) or mask.dim() != 2:
        raise ValueError(
            "Expected `mask` of shape (B, T), and `advantages` of shape (B,) or (B, T). Got "
            f"{tuple(mask.shape)} and {tuple(advantages.shape)}."
        )
    mask = mask.bool()

    def clean(tensor: Tensor) -> Tensor:
        return torch.where(mask, tensor.to(torch.promote_types(tensor.dtype, torch.float32)), 0.0)

    per_token = advantages if advantages.dim() == 2 else advantages[:, None]
    return clean(per_token), mask, *(clean(tensor) for tensor in tensors)


def _mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean over the unmasked tokens of values (B, T) that are 0 where masked. It is 0 if there is no token."""
    return values.sum() / mask.sum().clamp(min=1)


def _share(number: Tensor, ratio: float, *, rounded_up_by: float = 0.0) -> Tensor:
    """floor(number * ratio + rounded_up_by), in float64, which is how Python computes it for one number."""
    return (number.double() * ratio + rounded_up_by).floor()


def _select_lowest_of_all(values: Tensor, candidates: Tensor, count: Tensor, most: float) -> Tensor:
    """
    (B, T) boolean tensor: the `count` lowest of the values (B, T) that are candidates, or all if there are fewer.

    `most` is an upper bound of `count`, as a number of the host.
    """
    values = values.masked_fill(~candidates, math.nan)
    most = min(max(1, math.floor(most)), values.numel())
    return select_lowest(values.view(1, -1), count.int().view(1), most).view_as(values)


def _refuse_unknown(unused: dict[str, Any]) -> None:
    for name in unused.keys() - HOOK_ARGUMENTS:
        raise TypeError(
            f"Unknown argument `{name}`: it is neither a setting of this method nor an argument of "
            "`A3POTrainer.shape_advantages`. Check the spelling."
        )


def _check(name: str, value: float, smallest: float = -math.inf, largest: float = math.inf) -> None:
    if is_finite_number(value) and smallest <= value <= largest:
        return
    allowed = {
        (False, False): "a finite number",
        (True, False): f"a number of {smallest:g} or more",
        (False, True): f"a number of {largest:g} or less",
        (True, True): f"a number from {smallest:g} to {largest:g}",
    }[smallest > -math.inf, largest < math.inf]
    raise ValueError(f"`{name}` must be {allowed}, got {value!r}.")
