"""Decides which rows share a packed pass: those of one prompt, with at most the positions of a padded micro-batch."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import cast

from .layout import PackedLayout, RowShape, packed_positions
from .micro_batches import Extent


@dataclass
class Plan:
    """
    The rows that the loss of a micro-batch computes. This is decided when the rollout is made.

    Attributes:
        computed (`int`): Number of computed rows. They are the first ones.
        present (`int`): Number of rows of the micro-batch.
        rows (`int`): Number of rows that the loss reads. It is the same on all processes, because TRL gathers the
            rows. Missing rows are added without tokens. 0 if no process has rows: then neither the model nor the loss
            runs.
        positions_of (callable): Takes a number of rows; returns the positions that the model gets for the first ones.
        skipped_signs (`frozenset[int]`): Signs of advantages (-1, 0 or 1) whose rows are not computed.
        loss_scale (`float`): Factor of the loss, because TRL divides some losses by the number of rows.
    """

    computed: int
    present: int
    rows: int
    positions_of: Callable[[int], Extent | PackedLayout]
    skipped_signs: frozenset[int]
    loss_scale: float

    @cached_property
    def positions(self) -> Extent | PackedLayout:
        """The positions of the computed rows. They are kept for a rollout that is used again."""
        return self.positions_of(self.computed)


def most_rows(count: int, rows: int, group: int) -> int:
    """
    Maximum rows of each of `count` micro-batches. It does not depend on the rollout, so all processes have the same.

    Args:
        count (`int`): Number of micro-batches with rows.
        rows (`int`): Rows of the optimizer step.
        group (`int`): Completions of each prompt. There is room for two whole groups.
    """
    return min(rows, max(2 * math.ceil(rows / count), 2 * group))


def in_fewest(
    shapes: Sequence[RowShape], live: Sequence[bool], batches: int, budget: int, group: int
) -> list[list[int]]:
    """
    Distributes the live rows of one optimizer step over as few micro-batches as have room for them, at least one.

    Each pass costs time that does not depend on its positions: for a small one, a GPU waits for the host. So few large
    passes are faster than many small ones.

    Args:
        shapes (sequence of [`RowShape`]): Lengths and prompts of the rows.
        live (sequence of `bool`): Whether a row has to be computed.
        batches (`int`): Maximum number of micro-batches.
        budget (`int`): Maximum positions of a micro-batch, see [`by_prompt`].
        group (`int`): Completions of each prompt.

    Returns:
        `list[list[int]]`: The live rows of each micro-batch.
    """
    needed = packed_positions([shape for shape, is_live in zip(shapes, live, strict=True) if is_live])
    for count in range(min(batches, math.ceil(needed / budget)), batches):
        shared = by_prompt(shapes, live, count, budget, most_rows(count, len(shapes), group))
        if shared is not None:
            return shared
    return cast(list[list[int]], by_prompt(shapes, live, batches, budget, most_rows(batches, len(shapes), group)))


def by_prompt(
    shapes: Sequence[RowShape], live: Sequence[bool], batches: int, budget: int, most_rows: int
) -> list[list[int]] | None:
    """
    Distributes the live rows of one optimizer step over micro-batches. Rows of one prompt stay together, and all
    micro-batches have about the same number of positions.

    The largest group comes first. Each group goes to the micro-batch with the fewest positions. A group that fits
    nowhere is divided.

    Args:
        shapes (sequence of [`RowShape`]): Lengths and prompts of the rows.
        live (sequence of `bool`): Whether a row has to be computed.
        batches (`int`): Number of micro-batches.
        budget (`int`): Maximum positions of a micro-batch.
        most_rows (`int`): Maximum rows of a micro-batch.

    Returns:
        `list[list[int]]`, *optional*: The live rows of each micro-batch, the emptiest micro-batches first. `None` if
        a row finds no room. Each row does if the budget is at least the longest row times `len(shapes) / batches`, and
        `most_rows` at least `len(shapes) / batches`.
    """
    groups: dict[int, list[int]] = {}
    for row, shape in enumerate(shapes):
        if live[row]:
            groups.setdefault(shape.prompt_number, []).append(row)

    def prefix(group: Sequence[int]) -> int:
        return shapes[group[0]].prompt - 1

    def positions(group: Sequence[int]) -> int:
        return prefix(group) + sum(shapes[row].completion for row in group)

    shared: list[list[int]] = [[] for _ in range(batches)]
    used = [0] * batches

    def has_room(batch: int, size: int, rows: int) -> bool:
        return used[batch] + size <= budget and len(shared[batch]) + rows <= most_rows

    for group in sorted(groups.values(), key=positions, reverse=True):
        size, rows = positions(group), len(group)
        batch = min(
            (each for each in range(batches) if has_room(each, size, rows)), key=used.__getitem__, default=None
        )
        if batch is not None:
            shared[batch] += group
            used[batch] += size
            continue
        parts: list[int] = []  # the micro-batches that have this prompt already
        for row in sorted(group, key=lambda row: -shapes[row].completion):
            completion = shapes[row].completion
            batch = next((each for each in parts if has_room(each, completion, 1)), None)
            if batch is None:
                roomy = (each for each in range(batches) if has_room(each, prefix(group) + completion, 1))
                batch = min(roomy, key=used.__getitem__, default=None)
                if batch is None:
                    return None
                parts.append(batch)
                used[batch] += prefix(group)
            shared[batch].append(row)
            used[batch] += completion
    return [shared[batch] for batch in sorted(range(batches), key=used.__getitem__)]
