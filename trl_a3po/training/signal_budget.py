"""
[`SignalBudget`]: how much of what was sampled has a learning signal, and for what reason the rest has none.

Each completion has exactly one reason of `REASONS`, and each token of a completion with a signal one of
`TOKEN_REASONS`, so that the shares of either add up to 1. Counts, not shares, are kept: those of several micro-batches
and processes add up. They stay on the device until they are logged.

Shapes: B completions, T token positions, F reward functions, G completions of a group.
"""

import logging
import math
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from trl import GRPOTrainer

from ..a3po_config import A3POConfig
from ..update.micro_batches import loss_mask
from ..update.sampler_correction import largest_of, sampler_ratio
from .input_checks import total_rewards


logger = logging.getLogger(__name__)

# The key under which a rollout carries the number of each completion's reason.
SIGNAL = "a3po_signal"

REASONS = {
    "signal": "have a learning signal",
    "unscored": "were scored by no reward function",
    "unparsable": "belong to problems whose solution math-verify cannot parse",
    "truncated": "were truncated, and `mask_truncated_completions` removes them",
    "tools": "have no token that the model wrote",
    "all_right": "are in groups that are all right",
    "all_wrong": "are in groups that are all wrong",
    "all_equal": "are in groups whose rewards are equal",
    "at_mean": "have the mean reward of their group",
    "weight_zero": "got an advantage of 0 from the shaping (`positive_weight`, `negative_weight`)",
}
TOKEN_REASONS = (
    "trained",
    "tools",
    "off_policy",
    "entropy_quantile",
    "sampler_masked",
    "weight_zero",
    "clipped_low",
    "clipped_high",
    "sampler_truncated",
)
_NUMBER = {reason: number for number, reason in enumerate(REASONS)}
_CLIPPED_LOSSES = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo")
# Modules whose reward functions return None for one reason only: the solution cannot be parsed.
_MATH_VERIFY = ("trl.rewards", "trl_a3po.rewards")
_MISMATCH = ("tokens", "sum", "squares", "outside")
# What is counted, and how many numbers each has.
_PARTS = {
    "sampled": len(REASONS),
    "completions": len(REASONS),
    "tokens": len(TOKEN_REASONS),
    "mismatch": len(_MISMATCH),
    "amplified": len(_MISMATCH),
}


def parses_solutions(reward_func: Any) -> bool:
    """Whether None of a reward function says that math-verify cannot parse the solution."""
    return str(getattr(reward_func, "__module__", "")).startswith(_MATH_VERIFY)


def reward_reasons(
    rewards_per_func: Tensor, reward_weights: Tensor, parses: Sequence[bool], num_generations: int, by_function: bool
) -> Tensor:
    """
    The reasons that the rewards give. Completions of groups with different rewards count as having a signal.

    A group is all right if every reward function that scored a completion gave 1, and all wrong if it gave 0 or -1.
    Functions of weight 0 do not count: they are only logged.

    Args:
        rewards_per_func (`torch.Tensor` of shape `(B, F)`): NaN where a function did not score a completion.
        reward_weights (`torch.Tensor` of shape `(F,)`): The weights of the functions.
        parses (sequence of `bool`): For each function, what [`parses_solutions`] returns.
        num_generations (`int`): G. Rows are in the order of the groups.
        by_function (`bool`): Whether TRL normalizes each function by itself, so that one that differs is enough.

    Returns:
        `torch.Tensor` of shape `(B,)`: numbers of `REASONS`.
    """
    missing = rewards_per_func.isnan()
    unscored = missing.all(1)
    weighted = rewards_per_func.masked_fill(reward_weights.to(rewards_per_func.device) == 0, math.nan)
    unweighted = weighted.isnan().all(1).view(-1, num_generations).all(1)  # groups that only weights of 0 have scored
    unscored = unscored | unweighted.repeat_interleave(num_generations)
    columns = weighted if by_function else total_rewards(rewards_per_func, reward_weights)[:, None]
    groups = columns.view(-1, num_generations, columns.shape[1])
    highest = groups.nan_to_num(nan=-math.inf).amax(1)
    lowest = groups.nan_to_num(nan=math.inf).amin(1)
    differ = (highest > lowest).any(1)

    def whole_group(*values: float) -> Tensor:
        holds = weighted.isnan()
        for value in values:
            holds = holds | (weighted == value)
        return holds.all(1).view(-1, num_generations).all(1)

    reasons = torch.full_like(differ, _NUMBER["all_equal"], dtype=torch.long)
    reasons.masked_fill_(whole_group(0, -1), _NUMBER["all_wrong"])
    reasons.masked_fill_(whole_group(1), _NUMBER["all_right"])
    reasons.masked_fill_(differ, _NUMBER["signal"])
    reasons = reasons.repeat_interleave(num_generations)
    parsing = torch.tensor(list(parses), device=reasons.device)
    reasons = reasons.masked_fill(unscored, _NUMBER["unscored"])
    return reasons.masked_fill(unscored & (missing & parsing).any(1), _NUMBER["unparsable"])


def rollout_reasons(reasons: Tensor, rollout: dict[str, Any], has_gradient: Tensor) -> Tensor:
    """
    (B,) the reasons of a rollout's completions, once masks and advantages are known.

    Args:
        reasons (`torch.Tensor` of shape `(B,)`): What [`reward_reasons`] returned for these rows.
        rollout (`dict`): With `advantages` and masks.
        has_gradient (`torch.Tensor` of shape `(B,)`): Whether the loss can have a gradient in a row.
    """
    scored = (reasons != _NUMBER["unscored"]) & (reasons != _NUMBER["unparsable"])
    reasons = reasons.masked_fill(scored & ~loss_mask(rollout).any(1), _NUMBER["tools"])
    reasons = reasons.masked_fill(scored & ~rollout["completion_mask"].any(1), _NUMBER["truncated"])
    return _settled(reasons, rollout["advantages"], has_gradient)


def trained_reasons(
    reasons: Tensor, advantages: Tensor, shaped: Tensor, mask: Tensor, signal_is_shaped: bool
) -> Tensor:
    """
    (B,) the reasons of completions in the loss, once the advantages are shaped.

    Args:
        reasons (`torch.Tensor` of shape `(B,)`): Those of the rollout.
        advantages (`torch.Tensor` of shape `(B,)`): The advantages before shaping.
        shaped (`torch.Tensor` of shape `(B, T)` or `(B,)`): Those that the loss reads.
        mask (`torch.Tensor` of shape `(B, T)`): Non-zero on the tokens of the loss.
        signal_is_shaped (`bool`):
            Whether another method than A3PO, or a rollout of the user's own, decides what has a signal.
    """
    has_gradient = ((_by_token(shaped) != 0) & mask.bool()).any(1)
    if signal_is_shaped:
        reasons = reasons.masked_fill(has_gradient, _NUMBER["signal"])
    return _settled(reasons, advantages, has_gradient)


def _settled(reasons: Tensor, advantages: Tensor, has_gradient: Tensor) -> Tensor:
    lacks = (reasons == _NUMBER["signal"]) & ~has_gradient
    reasons = reasons.masked_fill(lacks & (advantages == 0), _NUMBER["at_mean"])
    return reasons.masked_fill(lacks & (advantages != 0), _NUMBER["weight_zero"])


def count_reasons(reasons: Tensor) -> Tensor:
    """Completions by reason, of shape `(len(REASONS),)`."""
    numbers = torch.arange(len(REASONS), device=reasons.device)
    return (reasons[:, None] == numbers).sum(0, dtype=torch.float32)


def count_tokens(tokens: Tensor, removed: dict[str, Tensor]) -> Tensor:
    """
    Tokens by reason: each counts for the first one that removes it.

    Args:
        tokens (`torch.Tensor` of shape `(B, T)`): The completions' tokens, of rows with a signal.
        removed (`dict[str, torch.Tensor]`): By reason, whether a token is removed, of a shape that expands to
            `(B, T)`.

    Returns:
        `torch.Tensor` of shape `(len(TOKEN_REASONS),)`.
    """
    counts, left = {}, tokens
    for reason in TOKEN_REASONS[1:]:
        if reason in removed:
            here = left & removed[reason]
            counts[reason], left = here.sum(dtype=torch.float32), left & ~here
    counts["trained"] = left.sum(dtype=torch.float32)
    zero = torch.zeros_like(counts["trained"])
    return torch.stack([counts.get(reason, zero) for reason in TOKEN_REASONS])


def mismatch(
    logps: Tensor, sampling_logps: Tensor, mask: Tensor, mode: str, clip_min: float, clip_max: float
) -> tuple[Tensor, Tensor, Tensor]:
    """
    The ratio between policy and sampler before it is truncated or masked.

    Args:
        logps, sampling_logps (`torch.Tensor` of shape `(B, T)`): Log-probabilities of both; NaN if the sampler
            reported none.
        mask (`torch.Tensor` of shape `(B, T)`): Non-zero on the tokens that are compared.
        mode (`str`): `vllm_importance_sampling_mode`. With `"sequence_..."` all tokens have their sequence's ratio.
        clip_min, clip_max (`float`): The bounds of the correction.

    Returns:
        `tuple` of `torch.Tensor` of shape `(B, T)`: the ratio, whether it is outside the bounds, and whether a token
        is compared.
    """
    compared = mask.bool() & ~(logps - sampling_logps).isnan()
    level = mode.partition("_")[0]
    untreated = sampler_ratio(logps, sampling_logps, compared, f"{level}_truncate", clip_min=None, clip_max=None)
    # Bounded, so that the sum of squares is finite.
    ratio = untreated.float().clamp(math.exp(-20), math.exp(20)).expand(compared.shape)
    return ratio, (ratio < clip_min) | (ratio > clip_max), compared


def mismatch_sums(ratio: Tensor, outside: Tensor, counted: Tensor) -> tuple[Tensor, Tensor]:
    """Sums of shape `(4,)`, which add up over batches, and the largest ratio and its negative smallest, `(2,)`."""
    weight = ratio.where(counted, 0.0)
    sums = [counted, weight, weight**2, outside & counted]
    largest = largest_of([(ratio, counted), (-ratio, counted)])
    return torch.stack([each.sum(dtype=torch.float32) for each in sums]), largest


class SignalBudget:
    """
    Counts for a trainer, until they are logged.

    Args:
        trainer (`GRPOTrainer`): Its options say which reasons can apply; others are not logged.
    """

    def __init__(self, trainer: GRPOTrainer):
        self._trainer = trainer
        self._args = cast(A3POConfig, trainer.args)
        args = self._args
        self._corrects = bool(args.use_vllm and args.vllm_importance_sampling_correction)
        device = trainer.accelerator.device
        self._counts = {part: torch.zeros(size, device=device) for part, size in _PARTS.items()}
        self._largest = torch.full((4,), -math.inf, device=device)
        self._has_warned = False
        # With `top_entropy_quantile`, TRL's loss makes the mask after the advantages are shaped.
        self._count_rest: Callable[[Tensor], None] | None = None

    # Where it counts

    def add_sampled(self, reasons: Tensor) -> None:
        """Counts the completions of a round of sampling."""
        self._add("sampled", count_reasons(reasons))

    def add_trained(
        self,
        inputs: dict[str, Any],
        advantages: Tensor,
        unselected: Tensor,
        *,
        logps: Tensor,
        old_logps: Tensor,
        entropies: Tensor,
        rows: slice,
        signal_is_shaped: bool,
    ) -> None:
        """
        Counts the completions and tokens of one loss.

        Args:
            inputs (`dict`): What TRL's loss reads, with the shaped advantages.
            advantages (`torch.Tensor` of shape `(B,)`): The advantages before shaping.
            unselected (`torch.Tensor` of shape `(B,)`): What a token that is not selected gets.
            logps (`torch.Tensor` of shape `(B, T)`): Log-probabilities under the policy that is trained.
            old_logps (`torch.Tensor` of shape `(B, T)`):
                Those that TRL compares with the sampler's. For GSPO-token, those in `inputs` are others.
            entropies (`torch.Tensor` of shape `(B, T)`): NaN in rows that are skipped.
            rows (`slice`): The rows that are completions.
            signal_is_shaped (`bool`): As in [`trained_reasons`].
        """
        if SIGNAL not in inputs:
            return  # of a subclass that makes rollouts of its own
        mask, shaped = loss_mask(inputs).bool(), inputs["advantages"]
        reasons = trained_reasons(inputs[SIGNAL][rows], advantages[rows], shaped[rows], mask[rows], signal_is_shaped)
        self._add("completions", count_reasons(reasons))
        has_signal = torch.zeros_like(mask[:, 0])
        has_signal[rows] = reasons == _NUMBER["signal"]
        tokens = inputs["completion_mask"].bool() & has_signal[:, None]
        removed = {"tools": ~mask, "weight_zero": _by_token(shaped) == 0, **self._removed(inputs, mask, logps)}
        if self._trainer.top_entropy_quantile < 1:
            self._count_rest = lambda kept: self._add(
                "tokens", count_tokens(tokens, {**removed, "entropy_quantile": ~kept.bool()})
            )
        else:
            self._add("tokens", count_tokens(tokens, removed))
        if self._corrects:
            amplified = _by_token(shaped).abs() > unselected.abs()[:, None]
            self._add_mismatch(inputs, old_logps, mask & ~entropies.isnan(), amplified)

    def add_entropy_mask(self, kept: Tensor) -> None:
        """Takes the mask of `top_entropy_quantile`, which TRL's loss makes next."""
        if self._count_rest is not None:
            self._count_rest(kept)
            self._count_rest = None

    def _removed(self, inputs: dict[str, Any], mask: Tensor, logps: Tensor) -> dict[str, Tensor]:
        """What removes tokens, as in TRL's loss."""
        trainer, args = self._trainer, self._args
        shaped = _by_token(inputs["advantages"])
        old_logps = inputs.get("old_per_token_logps", logps)
        removed = {}
        if args.off_policy_mask_threshold is not None:
            keeps = trainer.get_off_policy_mask(
                advantages=shaped,
                per_token_logps=logps,
                sampling_per_token_logps=inputs.get("sampling_per_token_logps", old_logps),
                mask=mask.long(),
                off_policy_threshold=args.off_policy_mask_threshold,
            )
            removed["off_policy"] = ~keeps.bool()
        if trainer.loss_type in _CLIPPED_LOSSES:
            log_ratio = logps - old_logps
            if trainer.importance_sampling_level == "sequence":
                log_ratio = (log_ratio * mask).sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp(min=1)
            ratio = log_ratio.exp()
            high, delta = 1 + trainer.epsilon_high, math.inf if args.delta is None else args.delta
            # Without `delta`, a large ratio of a negative token is not clipped. It clips positive ones too.
            bound = torch.where(shaped > 0, min(high, delta), max(high, delta))
            removed["clipped_low"] = (ratio < 1 - trainer.epsilon_low) & (shaped < 0)
            removed["clipped_high"] = (ratio > bound) & (shaped != 0)
        if self._corrects:
            treated, (low, high) = inputs["importance_sampling_ratio"], _bounds(self._args)
            removed["sampler_masked"] = treated == 0
            removed["sampler_truncated"] = (treated <= low) | (treated >= high)
        return removed

    def _add_mismatch(self, inputs: dict[str, Any], old_logps: Tensor, mask: Tensor, amplified: Tensor) -> None:
        ratio, outside, compared = mismatch(
            old_logps,
            inputs["sampling_per_token_logps"],
            mask,
            self._args.vllm_importance_sampling_mode,
            *_bounds(self._args),
        )
        largest = []
        for name, counted in (("mismatch", compared), ("amplified", compared & amplified)):
            sums, most = mismatch_sums(ratio, outside, counted)
            self._add(name, sums)
            largest.append(most)
        self._largest = self._largest.maximum(torch.cat(largest))

    # What it logs

    def pop_counts(self) -> Tensor:
        """Counts since the last call, the same number on every process, to be added up over processes."""
        counts = torch.cat(list(self._counts.values()))
        for each in self._counts.values():
            each.zero_()
        return counts

    def forget(self) -> None:
        """Forgets what an interrupted run has counted."""
        self.pop_counts()
        self._largest.fill_(-math.inf)
        self._count_rest = None

    def metrics(self, counts: Tensor) -> dict[str, float]:
        """
        What the counts of all processes say. Waits for the device; with vLLM, all processes must call it.

        Returns:
            `dict[str, float]`:

            - `signal/completions/{reason}`: shares of the completions that were trained on
            - `signal/sampled/{reason}`: with `dynamic_sampling`, shares of all that were sampled
            - `signal/tokens/{reason}`: shares of the tokens in completions with a signal
            - `signal/mismatch/...`: of the ratio between policy and vLLM, before it is treated
            - `signal/mismatch/amplified/...`: the same over tokens whose advantage is raised
        """
        by_part = dict(zip(_PARTS, counts.split(list(_PARTS.values())), strict=True))
        metrics: dict[str, float] = {}
        for part in ("completions", "sampled") if self._args.dynamic_sampling else ("completions",):
            metrics |= _shares(f"signal/{part}", REASONS, by_part[part], self._possible())
        metrics |= _shares("signal/tokens", TOKEN_REASONS, by_part["tokens"], self._possible_of_tokens())
        if self._corrects:
            accelerator = self._trainer.accelerator
            largest = accelerator.gather(self._largest[None]).amax(0)
            self._largest = torch.full_like(self._largest, -math.inf)
            metrics |= _mismatch_metrics("signal/mismatch", by_part["mismatch"], largest[:2])
            metrics |= _mismatch_metrics("signal/mismatch/amplified", by_part["amplified"], largest[2:])
        return metrics

    def warn_once(self, metrics: dict[str, float], step: int) -> None:
        """Warns of the first log without any learning signal, with the reasons."""
        if self._has_warned or metrics.get("signal/completions/signal") != 0:
            return
        self._has_warned = True
        shares = {reason: metrics.get(f"signal/completions/{reason}", 0.0) for reason in REASONS}
        reasons = sorted((each for each in shares if shares[each] >= 0.05), key=shares.__getitem__, reverse=True)
        if self._trainer.accelerator.is_main_process:
            logger.warning(
                "No completion had a learning signal since the last log, at step %d: %s. If this continues, the model "
                "does not learn. `trl-a3po report %s` says what to change.",
                step,
                ", ".join(f"{shares[each]:.0%} {REASONS[each]}" for each in reasons),
                self._args.output_dir,
            )

    def _possible(self) -> set[str]:
        """The reasons that are logged even at 0."""
        args = self._args
        possible = {"signal", "unscored", "all_right", "all_wrong", "all_equal", "at_mean"}
        if any(map(parses_solutions, self._trainer.reward_funcs)):
            possible.add("unparsable")
        if args.mask_truncated_completions:
            possible.add("truncated")
        if 0 in (args.positive_weight, args.negative_weight):
            possible.add("weight_zero")
        return possible

    def _possible_of_tokens(self) -> set[str]:
        possible = {"trained"}
        if self._trainer.loss_type in _CLIPPED_LOSSES:
            possible |= {"clipped_low", "clipped_high"}
        if self._args.off_policy_mask_threshold is not None:
            possible.add("off_policy")
        if self._trainer.top_entropy_quantile < 1:
            possible.add("entropy_quantile")
        if self._corrects:
            possible.add(f"sampler_{'masked' if 'mask' in self._args.vllm_importance_sampling_mode else 'truncated'}")
        return possible

    def _add(self, part: str, counts: Tensor) -> None:
        self._counts[part] += counts


def _shares(prefix: str, reasons: Sequence[str] | dict[str, str], counts: Tensor, possible: set[str]):
    values = counts.tolist()
    total = sum(values)
    return {
        f"{prefix}/{reason}": value / total
        for reason, value in zip(reasons, values, strict=True)
        if total and (value or reason in possible)
    }


def _mismatch_metrics(prefix: str, sums: Tensor, largest: Tensor) -> dict[str, float]:
    tokens, total, squares, outside = sums.tolist()
    if not tokens:
        return {}
    highest, minus_lowest = largest.tolist()
    return {
        f"{prefix}/mean": total / tokens,
        f"{prefix}/min": -minus_lowest,
        f"{prefix}/max": highest,
        f"{prefix}/outside": outside / tokens,
        # Kish: as many tokens of equal weight would give an estimate of the same variance.
        f"{prefix}/effective_sample_size": total**2 / squares / tokens if squares else 0.0,
    }


def _bounds(args: A3POConfig) -> tuple[float, float]:
    """The bounds of the vLLM correction. Older releases of TRL have an upper one: `vllm_importance_sampling_cap`."""
    cap = getattr(args, "vllm_importance_sampling_cap", None)
    low = getattr(args, "vllm_importance_sampling_clip_min", None)
    high = getattr(args, "vllm_importance_sampling_clip_max", cap)
    return -math.inf if low is None else low, math.inf if high is None else high


def _by_token(advantages: Tensor) -> Tensor:
    return advantages[:, None] if advantages.dim() == 1 else advantages
