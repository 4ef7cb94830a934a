"""Checks whether a model can be packed: by rules for effects that short rows do not show, else on made-up rows."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig

from .layout import PackedLayout, RowShape
from .model_traits import (
    as_is,
    configured_traits,
    has_rotary_positions,
    multiplies_in_tf32,
    ordinary_tokens,
    position_limit,
    rotation_limit,
    text_config,
)
from .packed_forward import PackedForward, trl_has_fused_head


# Layer types, as named in configurations, whose positions interact only in an attention function.
_ATTENTION = {"full_attention", "sliding_attention"}

# The longest window that made-up rows exceed. For longer windows, the argument of the attention function is checked.
_LONGEST_WINDOW = 512


@dataclass(frozen=True)
class Packing:
    """
    How a model is packed.

    Attributes:
        reason (`str`, *optional*): Why it cannot be packed; `None` if it can.
        by_column (`bool`): How [`PackedLayout`] counts positions: from the first column if the model needs it.
        limit (`int`, *optional*): Maximum columns P + C for which the result is valid; `None` for any number.
    """

    reason: str | None = None
    by_column: bool = False
    limit: int | None = None


def check_packing(model: torch.nn.Module) -> Packing:
    """
    Checks whether a model computes the same log-probabilities for packed rows as for padded rows.

    Models that no rule excludes run four times on made-up rows of a few dozen tokens (a few hundred if the sliding
    window is that long), without gradients and dropout. The number of runs does not depend on results, so all
    processes run the model equally often. If the model raises an error, it cannot be packed. Numbers may differ
    between processes, so they must agree on the result.

    Args:
        model (`torch.nn.Module`): Model with TRL's fused head, in any wrapper, under the autocast of the training.
    """
    if not trl_has_fused_head():
        return Packing("TRL computes its logits without the fused head (it has one since 1.15)")
    reason = _excluded(model)
    if reason is not None:
        return Packing(reason)
    with as_is(model, training=False):
        return _compare(model)


def _excluded(model: torch.nn.Module) -> str | None:
    for module in model.modules():
        for adapter in getattr(module, "peft_config", {}).values():
            if adapter.is_prompt_learning:
                return "an adapter puts virtual tokens before each row"
            if getattr(adapter, "alora_invocation_tokens", None):
                return "an adapter looks for tokens that activate it in each row"
    others = set(getattr(text_config(model), "layer_types", None) or ()) - _ATTENTION
    if others:
        return f"it has layers other than attention ({', '.join(sorted(others))})"
    return None


@dataclass(frozen=True)
class _Batch:
    """A micro-batch as TRL makes it."""

    rows: list[RowShape]
    input_ids: Tensor
    attention_mask: Tensor
    columns: int  # C

    def score(self, model: Callable[..., Any]) -> Tensor:
        """(B, C) log-probabilities of the completions, computed with TRL's call; 0 in padding."""
        labels = self.input_ids.masked_fill(self.attention_mask == 0, -100)
        labels[:, : -self.columns] = -100
        outputs = model(
            input_ids=self.input_ids, attention_mask=self.attention_mask, labels=labels, fused_lm_head=True
        )
        return outputs.log_probs[:, -self.columns :].float()

    def first(self) -> "_Batch":
        return _Batch(self.rows[:1], self.input_ids[:1], self.attention_mask[:1], self.columns)

    def layout(self, by_column: bool) -> PackedLayout:
        batch, width = self.input_ids.shape
        shape = (batch, width - self.columns, self.columns)
        rows = [row._replace(common=0) for row in self.rows] if by_column else self.rows
        return PackedLayout(rows, shape, by_column, self.input_ids.device)


def _made_up_batch(config: PretrainedConfig, window: int, device: torch.device) -> _Batch:
    """Rows of two prompts with a common start. The first row needs no padding and is longer than the window."""
    usable = ordinary_tokens(config)
    generator = torch.Generator().manual_seed(0)

    def text(length: int) -> Tensor:
        return usable[torch.randint(len(usable), (length,), generator=generator)]

    common = text(3)
    prompts = [torch.cat([common, text(6)]), torch.cat([common, text(2)])]
    shared = text(12)
    completions = [(0, text(max(16, window + 8))), (0, shared), (1, shared), (1, text(7)), (0, text(1))]
    width, columns = len(prompts[0]), len(completions[0][1])
    input_ids = usable[0].repeat(len(completions), width + columns)
    attention_mask = torch.zeros_like(input_ids)
    rows = []
    for row, (number, completion) in enumerate(completions):
        prompt = prompts[number]
        used = slice(width - len(prompt), width + len(completion))
        input_ids[row, used] = torch.cat([prompt, completion])
        attention_mask[row, used] = 1
        rows.append(RowShape(len(prompt), len(completion), number, len(common)))
    return _Batch(rows, input_ids.to(device), attention_mask.to(device), columns)


def _compare(model: torch.nn.Module) -> Packing:
    config = text_config(model)
    window = getattr(config, "sliding_window", None) or 0
    window = window if window <= _LONGEST_WINDOW else 0
    batch = _made_up_batch(config, window, next(model.parameters()).device)
    width, positions = batch.input_ids.shape[1], position_limit(model)
    if positions is not None and width > positions:
        # On a GPU, a lookup beyond the table is no error to catch: the process cannot use the device any more.
        return Packing(f"its table has {positions} positions, and made-up rows need {width}")
    # The first row by itself: without padding, other kernels compute the same numbers.
    padded, alone = _attempt(batch, model), _attempt(batch.first(), model)
    # If each row counts from its first token, as in samplers, a common start has the same positions in all prompts.
    # Rotations depend on distances only, so it makes no difference to them. Other models try columns first, as TRL
    # counts: in half precision, learned positions that change slowly would pass. Some rotations, or scales, depend on
    # the column beyond some length; `configured_traits` knows them.
    any_origin = has_rotary_positions(config) and not configured_traits(model).left_padding
    layouts = [batch.layout(by_column) for by_column in ((False, True) if any_origin else (True, False))]
    results = [_attempt(batch, PackedForward(model, layout)) for layout in layouts]
    if isinstance(padded, str) or isinstance(alone, str):
        return Packing(f"it fails on made-up rows ({padded if isinstance(padded, str) else alone})")
    noise = _distance(alone[0], padded[0])
    shared = batch.rows[1].completion
    signal = _distance(padded[1, :shared], padded[2, :shared])  # the same completion after another prompt
    tokens = batch.attention_mask[:, -batch.columns :].bool()
    coarse = _in_half_precision(model)
    tolerance = max(4 * noise, signal * (0.05 if coarse else 1e-4), 1e-6)
    reasons = []
    for layout, packed in zip(layouts, results, strict=True):
        if isinstance(packed, str):
            reasons.append(packed)
            continue
        error = _distance(packed[tokens], padded[tokens])
        if not error <= tolerance <= signal / 2:
            reasons.append(
                f"its log-probabilities differ by {error:.1g}; padding changes them by {noise:.1g}, another prompt by "
                f"{signal:.1g}"
            )
        elif (asked := _expected_windows(config, window)) not in (None, layout.windows):
            reasons.append(f"its attention layers ask for windows of {layout.windows}, its configuration for {asked}")
        elif layout.needs_scores and re.search("flash|flex", str(config._attn_implementation)):
            # The model's own kernel does not keep the scores of all pairs of tokens in memory. Ours would.
            reasons.append("no kernel for packed rows has its soft-capped scores or its sinks")
        else:
            return Packing(None, layout.by_column, rotation_limit(config))
    return Packing(reasons[0])


def _attempt(batch: _Batch, model: Callable[..., Any]) -> Tensor | str:
    """The log-probabilities, or the error that the model raises instead."""
    try:
        return batch.score(model)
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def _distance(one: Tensor, other: Tensor) -> float:
    return (one - other).square().mean().sqrt().item()


def _expected_windows(config: PretrainedConfig, tried: int) -> set[int | None] | None:
    """The windows that the layers should ask for if no row was longer; `None` if the runs have checked the window."""
    window = getattr(config, "sliding_window", None)
    if not window or window <= tried:
        return None
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"]
    return {window if kind == "sliding_attention" else None for kind in kinds}


def _in_half_precision(model: torch.nn.Module) -> bool:
    halves = (torch.float16, torch.bfloat16)
    kind = next(model.parameters()).device.type
    autocast = torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) in halves
    rounds = kind == "cuda" and multiplies_in_tf32()
    return autocast or rounds or any(parameter.dtype in halves for parameter in model.parameters())
