"""Decides which rows share a packed pass: those of one prompt, with at most the positions of a padded micro-batch."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

from .layout import PackedLayout, RowShape
from .micro_batches import Extent


@dataclass
class Plan:
    """
    The rows that the loss of a micro-batch computes. This is decided when the rollout is made.

    Attributes:
        computed (`int`): Number of computed rows. They are the first ones.
        present (`int`): Number of rows of the micro-batch.
        rows (`int`): Number of rows that the loss reads. It is the same on all processes, because TRL gathers the
            rows. Missing rows are added without tokens.
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


def by_prompt(
    shapes: Sequence[RowShape], live: Sequence[bool], batches: int, budget: int, most_rows: int
) -> list[list[int]]:
    """
    Distributes the live rows of one optimizer step over its micro-batches. Rows of one prompt stay together, and all
    micro-batches have about the same number of positions.

    The largest group comes first. Each group goes to the micro-batch with the fewest positions. A group that fits
    nowhere is divided.

    Args:
        shapes (sequence of [`RowShape`]): Lengths and prompts of the rows.
        live (sequence of `bool`): Whether a row has to be computed.
        batches (`int`): Number of micro-batches.
        budget (`int`): Maximum positions of a micro-batch. It is at least the longest row times
            `len(shapes) / batches`, so that there is room for every row.
        most_rows (`int`): Maximum rows of a micro-batch, at least `len(shapes) / batches`.

    Returns:
        `list[list[int]]`: The live rows of each micro-batch, the emptiest micro-batches first.
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
                batch = min(roomy, key=used.__getitem__)
                parts.append(batch)
                used[batch] += prefix(group)
            shared[batch].append(row)
            used[batch] += completion
    return [shared[batch] for batch in sorted(range(batches), key=used.__getitem__)]
