"""Decides which rows share a packed pass: those of one prompt, with at most the positions of a padded micro-batch."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

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
        advantages (`torch.Tensor` of shape `(present,)`): The advantages that these signs are of.
        loss_scale (`float`): Factor of the loss, because TRL divides some losses by the number of rows.
        lacks_old_logps (`bool`): Whether only the computed rows have old log-probabilities, those of their layout.
    """

    computed: int
    present: int
    rows: int
    positions_of: Callable[[int], Extent | PackedLayout]
    skipped_signs: frozenset[int]
    advantages: Tensor
    loss_scale: float
    lacks_old_logps: bool = False

    def __post_init__(self) -> None:
        self._version = _version(self.advantages)

    def advantages_changed(self, advantages: Tensor) -> bool:
        """Whether a loss reads other advantages than those of the plan. Does not wait for the device."""
        return advantages is not self.advantages or _version(advantages) != self._version

    @cached_property
    def positions(self) -> Extent | PackedLayout:
        """The positions of the computed rows. They are kept for a rollout that is used again."""
        return self.positions_of(self.computed)


def _version(tensor: Tensor) -> int:
    """Grows when the tensor changes in place. Tensors of inference mode do not count."""
    return -1 if tensor.is_inference() else tensor._version


# The plan of a micro-batch without rows.
NOTHING = Plan(
    computed=0,
    present=0,
    rows=0,
    positions_of=lambda count: Extent(0, 1, 1),
    skipped_signs=frozenset(),
    advantages=torch.empty(0),
    loss_scale=1.0,
)


_ATTRIBUTE = "a3po_plan"


def give_plan(batch: dict[str, Any], plan: Plan) -> None:
    """
    Gives a micro-batch its plan, as an attribute of its `prompt_ids`. So all values of a micro-batch are what TRL's
    code, and a subclass, expects; and a copy of the dictionary has the plan, too.
    """
    setattr(batch["prompt_ids"], _ATTRIBUTE, plan)


def plan_of(batch: dict[str, Any]) -> Plan | None:
    """The plan of a micro-batch; `None` if it has none."""
    return getattr(batch.get("prompt_ids"), _ATTRIBUTE, None)


# The attention kernel of a GPU gets a copy of the prompt's keys for each row. So rows that share a micro-batch have at
# most this number of tokens, per position of its budget, each with its prompt. A prompt itself gets at most one copy.
_TOKENS_PER_POSITION = 2


def in_fewest(
    shapes: Sequence[RowShape], live: Sequence[bool], budget: int, group_size: int, least: int, most: int
) -> list[list[int]]:
    """
    Distributes the live rows of one optimizer step over as few micro-batches as have room for them.

    Each pass costs time that does not depend on its positions: for a small one, a GPU waits for the host. So few large
    passes are faster than many small ones.

    Args:
        shapes (sequence of [`RowShape`]): Lengths and prompts of the rows.
        live (sequence of `bool`): Whether a row has to be computed.
        budget (`int`): Maximum positions of a micro-batch. [`by_prompt`] finds room in `most` of them.
        group_size (`int`): Completions of each prompt.
        least (`int`): Minimum number of micro-batches.
        most (`int`): Maximum number of micro-batches.

    Returns:
        `list[list[int]]`: The live rows of each micro-batch.
    """
    needed = packed_positions([shape for shape, is_live in zip(shapes, live, strict=True) if is_live])
    for count in range(max(least, min(most, math.ceil(needed / budget))), most + 1):
        shared = by_prompt(shapes, live, count, budget, group_size)
        if shared is not None:
            return shared
    raise ValueError(f"{most} micro-batches of {budget} positions have no room for {len(shapes)} rows.")


def by_prompt(
    shapes: Sequence[RowShape], live: Sequence[bool], batches: int, budget: int, group_size: int
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
        group_size (`int`): Completions of each prompt. The number of rows never keeps two groups apart. Further rows
            have room while a micro-batch has at most twice the average number of rows, and its rows, if each had its
            own prompt, have at most twice as many tokens as the budget.

    Returns:
        `list[list[int]]`, *optional*: The live rows of each micro-batch, the emptiest micro-batches first. `None` if
        a row finds no room. Each row does if the budget is at least the longest row times `len(shapes) / batches`.
    """
    most_rows = 2 * math.ceil(len(shapes) / batches)
    groups: dict[int, list[int]] = {}
    for row, shape in enumerate(shapes):
        if live[row]:
            groups.setdefault(shape.prompt_number, []).append(row)

    common = shapes[0].common if shapes else 0  # lies in a micro-batch once, and counts in an empty one, too

    def prefix(group: Sequence[int]) -> int:
        return shapes[group[0]].prompt - 1 - common

    def positions(group: Sequence[int]) -> int:
        return prefix(group) + sum(shapes[row].completion for row in group)

    shared: list[list[int]] = [[] for _ in range(batches)]
    used, tokens = [common] * batches, [0] * batches

    def has_room(batch: int, size: int, rows: Sequence[int]) -> bool:
        count = len(shared[batch]) + len(rows)
        is_small = count <= most_rows and tokens[batch] + tokens_of(rows) <= _TOKENS_PER_POSITION * budget
        return used[batch] + size <= budget and (is_small or count <= 2 * group_size)

    def tokens_of(rows: Sequence[int]) -> int:
        return sum(shapes[row].prompt + shapes[row].completion for row in rows)

    def add(batch: int, size: int, rows: Sequence[int]) -> None:
        shared[batch] += rows
        used[batch] += size
        tokens[batch] += tokens_of(rows)

    def emptiest(size: int, rows: Sequence[int]) -> int | None:
        """The micro-batch with the fewest positions of those with room."""
        return min((each for each in range(batches) if has_room(each, size, rows)), key=used.__getitem__, default=None)

    for group in sorted(groups.values(), key=positions, reverse=True):
        size = positions(group)
        batch = emptiest(size, group)
        if batch is not None:
            add(batch, size, group)
            continue
        parts: list[int] = []  # the micro-batches that have this prompt already
        for row in sorted(group, key=lambda row: -shapes[row].completion):
            size = shapes[row].completion
            batch = next((each for each in parts if has_room(each, size, [row])), None)
            if batch is None:
                size += prefix(group)
                batch = emptiest(size, [row])
                if batch is None:
                    return None
                parts.append(batch)
            add(batch, size, [row])
    return [shared[batch] for batch in sorted(range(batches), key=used.__getitem__)]
