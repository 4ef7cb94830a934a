"""
Functions of tensors that decide which rows and columns of a rollout are computed.

TRL pads every completion to the longest of the whole generation batch before it splits the batch into micro-batches.
It runs completions of zero advantage like the others. Here the rows of an optimizer step are sorted: rows with a
learning signal come first, sorted by length. So the rows of a micro-batch have similar lengths and need few columns,
and some micro-batches need no rows.

Shapes: B rows, P columns of prompt (padded on the left), C of completion (padded on the right).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from .layout import to_device


# (input_ids, attention_mask, logits_to_keep) -> (log-probabilities, entropies or None, ...), as TRL's method returns.
Forward = Callable[[Tensor, Tensor, int], tuple[Any, ...]]


@dataclass(frozen=True)
class Extent:
    """
    The computed part of a batch: the first `rows` rows, the last `prompt` and the first `completion` columns.

    The numbers are on the host, so that slicing by them does not wait for the device.
    """

    rows: int
    prompt: int
    completion: int


def loss_mask(inputs: dict[str, Any]) -> Tensor:
    """(B, C) tensor, non-zero on the unmasked tokens of a micro-batch: not padding, not tool output."""
    mask = inputs["completion_mask"]
    return mask * inputs["tool_mask"] if "tool_mask" in inputs else mask


def row_lengths(prompt_mask: Tensor, completion_mask: Tensor) -> list[tuple[int, int]]:
    """
    Numbers of prompt and completion columns that each row needs. Waits for the device.

    Args:
        prompt_mask (`torch.Tensor` of shape `(B, P)`): Non-zero on tokens.
        completion_mask (`torch.Tensor` of shape `(B, C)`): Non-zero on tokens.
    """
    lengths = torch.stack([_last_used(prompt_mask.flip(1)), _last_used(completion_mask)], dim=1)  # (B, 2)
    return [(prompt, completion) for prompt, completion in lengths.tolist()]


def extent_of(lengths: Sequence[tuple[int, int]], multiple: int = 1) -> Extent:
    """The extent of rows of the given lengths: at least one column of each kind, rounded up to a multiple."""
    # A model needs one token to predict from and one token to predict.
    prompts, completions = zip((1, 1), *lengths, strict=True)
    columns = (math.ceil(max(each) / multiple) * multiple for each in (prompts, completions))
    return Extent(len(lengths), *columns)


def by_length(
    lengths: Sequence[tuple[int, int]], live: Sequence[bool], batches: int, multiple: int = 1
) -> list[list[int]]:
    """
    Distributes the live rows of one optimizer step over its micro-batches. Rows of similar length stay together.

    Args:
        lengths (sequence of `tuple[int, int]`): Columns that each row needs, of prompt and of completion.
        live (sequence of `bool`): Whether a row has to be computed.
        batches (`int`): Number of micro-batches. The rows fill them exactly.
        multiple (`int`, *optional*, defaults to `1`): What the number of columns is rounded up to.

    Returns:
        `list[list[int]]`: The live rows of each micro-batch.
    """
    alive = [row for row in _longest_first(lengths) if live[row]]
    shared = []
    for count in share_out([lengths[row] for row in alive], batches, len(lengths) // batches, multiple):
        shared.append(alive[:count])
        alive = alive[count:]
    return shared


def fill_up(shared: Sequence[Sequence[int]], rows: int) -> list[list[int]]:
    """
    Adds the rows that are not computed to micro-batches with room, so that each row is in one micro-batch.

    Args:
        shared (sequence of sequences of `int`): The live rows of each micro-batch.
        rows (`int`): Number of all rows.
    """
    size = math.ceil(rows / len(shared))
    others = iter(sorted(set(range(rows)).difference(*shared)))
    return [[*live, *islice(others, max(0, size - len(live)))] for live in shared]


def share_out(lengths: Sequence[tuple[int, int]], batches: int, size: int, multiple: int = 1) -> list[int]:
    """
    Chooses the number of rows of each micro-batch so that all of them together compute the fewest positions.

    The rows keep their order. If fewer rows are live than there is room for, micro-batches that are not full have less
    padding. All micro-batches run in any case.

    Args:
        lengths (sequence of `tuple[int, int]`): Columns that each row needs, of prompt and of completion.
        batches (`int`): Number of micro-batches.
        size (`int`): Maximum rows of a micro-batch; `batches * size` is at least the number of rows.
        multiple (`int`, *optional*, defaults to `1`): What the number of columns is rounded up to.
    """
    rows = len(lengths)
    # cells[i, s]: positions of a micro-batch of s rows that starts at row i.
    cells = torch.full((rows + 1, size + 1), torch.inf, dtype=torch.float64)
    cells[:, 0] = 0.0
    widest = torch.ones(rows, 2, dtype=torch.float64)  # columns of both kinds, over `count` rows from each start
    for count in range(1, min(size, rows) + 1):
        lasts = torch.tensor(lengths[count - 1 :], dtype=torch.float64)
        widest = widest[: len(lasts)].maximum(lasts)
        cells[: len(lasts), count] = count * multiple * (widest / multiple).ceil().sum(1)
    # Dynamic programming, from the last micro-batch to the first. fewest[i]: positions for row i and all after it.
    nexts = (torch.arange(rows + 1)[:, None] + torch.arange(size + 1)).clamp(max=rows)
    fewest = torch.full((rows + 1,), torch.inf, dtype=torch.float64)
    fewest[rows] = 0.0
    choices = []
    for _ in range(batches):
        fewest, choice = (cells + fewest[nexts]).min(dim=1)
        choices.append(choice.tolist())
    counts: list[int] = []
    for choice in reversed(choices):
        counts.append(choice[sum(counts)])
    return sorted(counts, key=bool, reverse=True)  # the empty ones last: their place makes no difference


def run_extent(
    forward: Forward, input_ids: Tensor, attention_mask: Tensor, logits_to_keep: int, extent: Extent
) -> tuple[Any, ...]:
    """
    Computes an extent, and returns the results in the shape of the whole batch.

    If the extent has no rows, the columns of the first row are computed with a weight of 0. So the model and its
    gradients take part in collective operations, and no other process waits for this one.

    Returns:
        The outputs of `forward`, with log-probabilities (B, C) and entropies (B, C). In rows that are not computed,
        log-probabilities are 0 and entropies NaN. In columns that are not computed, both are 0.
    """
    rows, width = input_ids.shape
    prompt_width = width - logits_to_keep
    columns = slice(prompt_width - extent.prompt, prompt_width + extent.completion)
    if extent.rows == 0:
        ids = _copy(input_ids[:1, columns])
        logps, entropies, *others = forward(ids, torch.ones_like(ids), extent.completion)
        logps = (0.0 * logps.sum()).expand(rows, logits_to_keep)
        return logps, None if entropies is None else torch.full_like(logps, torch.nan), *others
    box = slice(extent.rows), columns
    logps, entropies, *others = forward(_copy(input_ids[box]), _copy(attention_mask[box]), extent.completion)
    missing = (0, logits_to_keep - extent.completion)
    logps = pad(logps, (*missing, 0, rows - extent.rows))
    if entropies is not None:
        entropies = pad(pad(entropies, missing), (0, 0, 0, rows - extent.rows), value=torch.nan)
    return logps, entropies, *others


def run_in_order(
    forward: Forward,
    input_ids: Tensor,
    attention_mask: Tensor,
    logits_to_keep: int,
    lengths: Sequence[tuple[int, int]],
    batch_size: int,
    multiple: int = 1,
) -> tuple[Any, ...]:
    """
    Computes all rows, sorted by length.

    Returns:
        The outputs of `forward`, with rows in the order of `input_ids`, and 0 in columns of padding.
    """
    order = _longest_first(lengths)
    parts = []
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        extent = extent_of([lengths[row] for row in rows], multiple)
        ids, mask = take_rows(input_ids, rows), take_rows(attention_mask, rows)
        parts.append(run_extent(forward, ids, mask, logits_to_keep, extent))
    return gather_parts(parts, order)


def gather_parts(parts: Sequence[Sequence[Any]], rows: Sequence[int]) -> tuple[Any, ...]:
    """
    Joins the results of several passes.

    Args:
        parts (sequence of sequences): The outputs of [`Forward`] in each pass.
        rows (sequence of `int`): The computed rows, in the order of the passes.

    Returns:
        `tuple`: The outputs of one pass over all rows in their original order.
    """
    place = torch.tensor(rows).argsort().tolist()
    return tuple(_join(part, place) for part in zip(*parts, strict=True))


def _join(parts: Sequence[Any], place: list[int]) -> Any:
    if not isinstance(parts[0], Tensor):
        return None
    if not parts[0].dim():
        return torch.stack(list(parts)).mean()  # the router's loss
    return take_rows(torch.cat(list(parts)), place)


def _longest_first(lengths: Sequence[tuple[int, int]]) -> list[int]:
    """Sorts the longest rows first, so that the allocator gets its largest request at once."""
    return sorted(range(len(lengths)), key=lambda row: -sum(lengths[row]))


def _last_used(mask: Tensor) -> Tensor:
    """(B,) number of columns up to the last non-zero one."""
    columns = torch.arange(1, mask.shape[1] + 1, device=mask.device)
    return torch.cat([torch.where(mask.bool(), columns, 0), columns.new_zeros(len(mask), 1)], dim=1).amax(1)


def _copy(part: Tensor) -> Tensor:
    """A contiguous copy. A compiled model would be compiled again for each memory layout of a slice."""
    return part.clone(memory_format=torch.contiguous_format)


def merge_rows(values: list[Any]) -> Any:
    """Joins the values of several batches under one key, row by row. Values that rows share do not change."""
    if isinstance(values[0], Tensor) and values[0].dim():
        return torch.cat(values)
    if isinstance(values[0], list):
        return [row for value in values for row in value]
    return values[0]


def take_rows(value: Any, rows: list[int]) -> Any:
    """Takes rows of a batch's value under one key. Values that rows share do not change."""
    if isinstance(value, Tensor) and value.dim():
        return value[to_device(torch.tensor(rows, dtype=torch.long), value.device)]
    return [value[row] for row in rows] if isinstance(value, list) else value


def first_rows(value: Any, count: int) -> Any:
    """Takes the first rows of a batch's value under one key."""
    return value[:count] if isinstance(value, list) or (isinstance(value, Tensor) and value.dim()) else value


def add_rows(inputs: dict[str, Any], rows: int) -> dict[str, Any]:
    """
    Adds rows of zeros to the end of a micro-batch. They have no tokens, no advantage and no gradient.

    Args:
        inputs (`dict`): Tensors and lists with one row per completion, and values that rows share.
        rows (`int`): Number of rows of the result.
    """
    missing = rows - len(inputs["prompt_ids"])
    if missing <= 0:
        return inputs
    added = dict(inputs)
    for key, value in inputs.items():
        if isinstance(value, Tensor) and value.dim():
            # VESPO takes the logarithm of the ratio, also of padding.
            filler = 1 if key == "importance_sampling_ratio" else 0
            added[key] = pad(value, [0, 0] * (value.dim() - 1) + [0, missing], value=filler)
    return added
