"""
Dynamic sampling, as functions of rollouts: groups without a learning signal are replaced by groups of fresh prompts.

This is the dynamic sampling of DAPO (arXiv 2503.14476, section 3.2), which samples until the batch is full of groups
that are neither all right nor all wrong (its equation 11). We chose three things. A group has a learning signal by its
advantages, not by how many of its completions are right. Fresh prompts are drawn from the whole dataset. After a
number of rounds the batch is used as it is.

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
        Iterator over indices, without end: of all prompts in one random order, then in another.
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
        has_gradient (`torch.Tensor` of shape `(B,)`): Whether the loss can have a gradient in it.
        num_generations (`int`): Completions of a group.

    Returns:
        `list[bool]` of length B / G: whether advantages of the group differ, and a completion of it has a gradient.
    """
    groups = advantages.view(-1, num_generations)
    differ = (groups != groups[:, :1]).any(1)
    return (differ & has_gradient.view(-1, num_generations).any(1)).tolist()


def pair_groups(live: Sequence[bool], fresh_live: Sequence[bool]) -> list[tuple[int, int]]:
    """Pairs each group that is not live with a fresh one that is, in order, for as long as there are both."""
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
    Puts groups of one rollout in the places of groups of another.

    Args:
        rollout (`dict`): Tensors and lists with a row for each completion, and what all of them share.
        fresh (`dict`): The same of other prompts, as many rows, with as many columns as it takes.
        swaps (sequence of `tuple[int, int]`): Pairs of a group of `rollout` and the group of `fresh` in its place.
        num_generations (`int`): Completions of a group.
        pad_token_id (`int`): What token ids are padded with.

    Returns:
        `dict`: `rollout` with those groups, as wide as the wider of the two: prompts padded on the left, the rest on
        the right. What all rows share is that of `rollout`.

    Raises:
        `ValueError`: the two do not hold the same.
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
    # As TRL pads. VESPO reads the ratio of padding, too.
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
    """Two tensors of shape (B, columns), or (B,), the narrower one padded."""
    if a.dim() == 1:
        return [a, b]
    missing = [max(a.shape[1], b.shape[1]) - each.shape[1] for each in (a, b)]
    return [
        pad(each, (columns, 0) if on_the_left else (0, columns), value=value)
        for each, columns in zip((a, b), missing, strict=True)
    ]
