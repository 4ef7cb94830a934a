"""
Functions for dynamic sampling: they replace groups without a learning signal by groups of fresh prompts.

This is the dynamic sampling of DAPO (arXiv 2503.14476, section 3.2), which samples until the batch is full of groups
that are neither all right nor all wrong (its equation 11). Three points are our choice. The advantages decide whether
a group has a learning signal, not the number of its right completions. Fresh prompts are drawn from the whole dataset.
After a maximum number of rounds the batch is used as it is.

Shapes: B rows, group after group, each of G completions of one prompt.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from torch import Tensor
from torch.nn.functional import pad

from ..update.micro_batches import merge_rows, take_rows


def fresh_prompts(dataset_size: int, seed: int, step: int) -> Iterator[int]:
    """
    The prompts that dynamic sampling draws in an optimizer step, the same on all processes and in a resumed run.

    Returns:
        Endless iterator over indices: all prompts in one random order, then in another.
    """
    generator = np.random.default_rng([seed, step])
    while True:
        yield from map(int, generator.permutation(dataset_size))


def live_groups(advantages: Tensor, has_gradient: Tensor, num_generations: int) -> list[bool]:
    """
    Whether each group has a learning signal. Waits for the device.

    Equal rewards give equal advantages, but not always 0: the mean of eight times 0.3 is not 0.3 in float32.

    Args:
        advantages (`torch.Tensor` of shape `(B,)`): Advantage of each completion.
        has_gradient (`torch.Tensor` of shape `(B,)`): Whether the completion can have a gradient in the loss.
        num_generations (`int`): Completions per group.

    Returns:
        `list[bool]` of length B / G: whether the advantages of a group differ and a completion has a gradient.
    """
    groups = advantages.view(-1, num_generations)
    differ = (groups != groups[:, :1]).any(1)
    return (differ & has_gradient.view(-1, num_generations).any(1)).tolist()


def pair_groups(live: Sequence[bool], fresh_live: Sequence[bool]) -> list[tuple[int, int]]:
    """Pairs groups that are not live with fresh groups that are, in order, until one of the two runs out."""
    places = [group for group, is_live in enumerate(live) if not is_live]
    return list(zip(places, [group for group, is_live in enumerate(fresh_live) if is_live], strict=False))


def swap_groups(
    rollout: dict[str, Any],
    fresh: dict[str, Any],
    swaps: Sequence[tuple[int, int]],
    num_generations: int,
    pad_token_id: int,
) -> dict[str, Any]:
    """
    Replaces groups of a rollout by groups of another rollout.

    Args:
        rollout (`dict`): Tensors and lists with one row per completion, and values that all rows share.
        fresh (`dict`): A rollout of other prompts with the same number of rows. The number of columns may differ.
        swaps (sequence of `tuple[int, int]`): Pairs of a group of `rollout` and the group of `fresh` that replaces it.
        num_generations (`int`): Completions per group.
        pad_token_id (`int`): Token id for padding.

    Returns:
        `dict`: `rollout` with the new groups. It is as wide as the wider of the two: prompts are padded on the left,
        other tensors on the right. Values that all rows share come from `rollout`.

    Raises:
        `ValueError`: the two rollouts have different fields.
    """
    if rollout.keys() != fresh.keys():
        raise ValueError(
            "Dynamic-sampling rounds returned different fields: only one has "
            f"{', '.join(f'`{key}`' for key in sorted(rollout.keys() ^ fresh.keys()))}. Return the same fields from "
            "every call of `rollout_func`, with an `env_mask` of 1 where no token is masked."
        )
    rows = list(range(len(rollout["completion_ids"])))
    for place, group in swaps:
        first, first_fresh = place * num_generations, len(rows) + group * num_generations
        rows[first : first + num_generations] = range(first_fresh, first_fresh + num_generations)
    # As TRL pads. VESPO also reads the ratio of padding.
    padding = {
        "prompt_ids": pad_token_id,
        "completion_ids": pad_token_id,
        "tool_mask": 1,
        "importance_sampling_ratio": 1,
    }
    swapped: dict[str, Any] = {}
    for key, value in rollout.items():
        both = [value, fresh[key]]
        if isinstance(value, Tensor) and value.dim():
            both = _same_width(*both, on_the_left=key.startswith("prompt"), value=padding.get(key, 0))
        swapped[key] = take_rows(merge_rows(both), rows)
    return swapped


def _same_width(a: Tensor, b: Tensor, *, on_the_left: bool, value: float) -> list[Tensor]:
    """Pads the narrower of two tensors of shape (B, columns). Tensors of shape (B,) do not change."""
    if a.dim() == 1:
        return [a, b]
    missing = [max(a.shape[1], b.shape[1]) - each.shape[1] for each in (a, b)]
    return [
        pad(each, (columns, 0) if on_the_left else (0, columns), value=value)
        for each, columns in zip((a, b), missing, strict=True)
    ]
