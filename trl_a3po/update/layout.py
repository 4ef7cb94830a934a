"""
The position of each token in a packed micro-batch: one row after another, without padding, each prompt once.

GRPO samples several completions of one prompt. For each prompt, the packed row first has the *prefix*: all tokens of
the prompt except the last, once. Then each completion has its *own* part: the last token of the prompt, and all tokens
of the completion except the last. So each own position predicts one token of one completion. The last token of a
completion predicts nothing, and no other token attends to it.

All prompts may have a common start, such as a system prompt, tools or worked examples. It lies there once, as the
start of the first prefix. The prefixes of the other prompts follow without it.

Shapes: B rows, P columns of prompt (padded on the left), C of completion (padded on the right), N packed positions.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor


class RowShape(NamedTuple):
    """
    Numbers of tokens of a row, and the number of its prompt, which rows with the same prompt share.

    `common` is how many first tokens all prompts have in common; it is the same for all rows. These tokens are shared.
    The last token of a prompt never is.
    """

    prompt: int
    completion: int
    prompt_number: int
    common: int = 0


class Segment(NamedTuple):
    """
    Positions from `start` to `end`. They attend to the first `common` positions, to their prefix, and causally to one
    another.
    """

    start: int
    end: int
    prefix_start: int
    prefix_end: int
    common: int = 0


class Block(NamedTuple):
    """
    Adjacent segments that one call of an attention function computes. A call costs more than a short segment.

    Its positions attend to the first `common` positions, to a prefix before the block, and to parts of the block:
    its keys.
    """

    start: int
    end: int
    prefix_start: int
    prefix_end: int
    common: int
    segments: int

    @property
    def spans(self) -> list[tuple[int, int]]:
        """Where its keys lie before it, in their order."""
        spans = (0, self.common), (self.prefix_start, self.prefix_end)
        return [(start, end) for start, end in spans if end > start]

    @property
    def keys(self) -> int:
        return self.common + self.prefix_end - self.prefix_start + self.end - self.start

    @property
    def is_causal(self) -> bool:
        """
        Whether it is computed as the end of a causal row of all its keys, without a mask.

        That computes the attention of the keys again. Under a mask, each position looks at all keys. If the block has
        most of the keys, that is more work.
        """
        return self.segments == 1 and self.keys <= 2 * (self.end - self.start)

    def sees(self, start: int, end: int) -> bool:
        """Whether its keys include these positions, which must not lie after it."""
        in_itself = start >= self.start
        in_prefix = self.prefix_start <= start and end <= self.prefix_end
        return start == end or in_itself or in_prefix or end <= self.common


# Maximum positions of a block with several segments. In a larger one, unneeded scores cost more than further calls.
_BLOCK = 128


class Starts(NamedTuple):
    """Segments in the form for variable-length kernels: boundaries of the queries and of the gathered keys."""

    of_queries: Tensor  # (segments + 1,), 32 bits
    of_keys: Tensor  # (segments + 1,), 32 bits
    keys: Tensor  # packed positions of the keys
    most_queries: int
    most_keys: int


def row_shapes(
    prompt_ids: Tensor, prompt_mask: Tensor, completion_mask: Tensor, by_column: bool = False
) -> list[RowShape] | None:
    """
    Lengths of rows, and what their prompts share. Waits for the device.

    Args:
        prompt_ids (`torch.Tensor` of shape `(B, P)`): Prompts, padded on the left.
        prompt_mask (`torch.Tensor` of shape `(B, P)`): Non-zero on tokens.
        completion_mask (`torch.Tensor` of shape `(B, C)`): Non-zero on tokens.
        by_column (`bool`, *optional*, defaults to `False`): Whether positions are counted from the first column. Then
            a common start has other positions in a shorter prompt, and is not shared.

    Returns:
        One shape per row; `None` if a row cannot be packed: it has no prompt, or padding between its tokens.
    """
    prompt, completion = prompt_mask.bool(), completion_mask.bool()
    _, numbers = torch.where(prompt, prompt_ids, -1).unique(dim=0, return_inverse=True)
    lengths = [prompt.sum(1), completion.sum(1)]
    # Padding must not follow a token of the prompt, and must not precede a token of the completion.
    in_one_piece = (prompt.diff(dim=1, append=torch.ones_like(prompt[:, :1])).sum(1) <= 1) & prompt[:, -1]
    in_one_piece &= completion.diff(dim=1, prepend=torch.ones_like(completion[:, :1])).sum(1) <= 1
    # How many columns are equal in all rows, from their first tokens on.
    columns = torch.arange(prompt.shape[1], device=prompt.device) - lengths[0][:, None]
    aligned = prompt_ids.gather(1, columns.clamp(max=-1) + prompt.shape[1])
    common = (aligned == aligned[:1]).all(0).cumprod(0).sum().expand(len(prompt))
    rows = torch.stack([*lengths, numbers, common, in_one_piece], dim=1).tolist()
    if not all(row[-1] for row in rows):
        return None
    shapes = [RowShape(*row[:-1]) for row in rows]
    shared = 0 if by_column else min(min(shape.common, shape.prompt - 1) for shape in shapes)
    return [shape._replace(common=shared) for shape in shapes]


def packed_positions(rows: Sequence[RowShape]) -> int:
    """Number of positions that a packed micro-batch of these rows computes: at least one."""
    prefixes = {row.prompt_number: row.prompt - 1 - row.common for row in rows if row.completion}
    common = rows[0].common if prefixes else 0
    return max(1, common + sum(prefixes.values()) + sum(row.completion for row in rows))


@dataclass(eq=False)
class PackedLayout:
    """
    Packed positions of the first `len(rows)` rows of a micro-batch. Built on the host without waiting for the device.

    A layout without completion tokens has one position, so that the model always runs.

    Args:
        rows (sequence of [`RowShape`]): Shapes of the rows. Rows with an empty completion take no position.
        shape (`tuple[int, int, int]`): B, P and C of the padded micro-batch. B may be larger than the number of rows.
        by_column (`bool`, *optional*, defaults to `False`): Whether positions are counted from the first column, as
            models do that ignore padding, or from the first token of the row. By column, rows have no common start.
        device (`torch.device`, *optional*): Device of the tensors.

    Attributes:
        positions (`int`): N.
        segments (`tuple[Segment, ...]`): Which positions attend to which.
        sources (`torch.Tensor` of shape `(N,)`): Indices into the flattened (B, P + C) tokens.
        position_ids (`torch.Tensor` of shape `(1, N)`): Positions within the rows.
        places (`torch.Tensor` of shape `(B, C)`): Packed position that predicts each completion token; N for none.
    """

    rows: Sequence[RowShape]
    shape: tuple[int, int, int]
    by_column: bool = False
    device: torch.device | str = "cpu"

    positions: int = field(init=False)
    segments: tuple[Segment, ...] = field(init=False)
    sources: Tensor = field(init=False)
    position_ids: Tensor = field(init=False)
    places: Tensor = field(init=False)

    # For attention: masks of blocks, the sliding windows that layers asked for (`None` for none), and whether a layer
    # asked for what no fast kernel takes.
    masks: dict[tuple[Any, ...], Tensor] = field(init=False, default_factory=dict)
    windows: set[int | None] = field(init=False, default_factory=set)
    needs_scores: bool = field(init=False, default=False)

    def __post_init__(self):
        batch, width, completion_width = self.shape
        if self.by_column and any(row.common for row in self.rows):
            raise ValueError("Counted by column, a common start has other positions in each prompt.")
        self.positions = packed_positions(self.rows)
        places = torch.full((batch, completion_width), self.positions)
        segments, sources, position_ids = [], [torch.zeros(0, dtype=torch.long)], [torch.zeros(0, dtype=torch.long)]
        end = 0

        def add(row: int, start: int, length: int, prefix: tuple[int, int], common: int) -> None:
            """Appends tokens of a row, from its token number `start` on."""
            nonlocal end
            if length == 0:
                return
            column = width - self.rows[row].prompt + start
            sources.append(torch.arange(length) + row * (width + completion_width) + column)
            position_ids.append(torch.arange(length) + (column if self.by_column else start))
            segments.append(Segment(end, end + length, *prefix, common))
            end += length

        groups: dict[int, list[int]] = {}
        for index, row in enumerate(self.rows):
            if row.completion:
                groups.setdefault(row.prompt_number, []).append(index)
        for members in groups.values():
            first = self.rows[members[0]]
            common = first.common if end else 0  # it lies there already
            prefix = (end, end + first.prompt - 1 - common)
            add(members[0], common, first.prompt - 1 - common, (end, end), common)
            for index in members:
                length = self.rows[index].completion
                places[index, :length] = torch.arange(length) + end
                add(index, first.prompt - 1, length, prefix, common)
        if not groups:
            segments = [Segment(0, 1, 0, 0)]
            sources, position_ids = [torch.zeros(1, dtype=torch.long)], [torch.zeros(1, dtype=torch.long)]
        self.segments = tuple(segments)
        moved = to_device(torch.cat([*sources, *position_ids, places.flatten()]), self.device)
        self.sources, position_row, flat_places = moved.split([self.positions, self.positions, places.numel()])
        self.position_ids, self.places = position_row[None], flat_places.view(places.shape)

    @cached_property
    def starts(self) -> Starts:
        keys, queries, counts = [], [0], [0]
        for segment in self.segments:
            prefix, own = (segment.prefix_start, segment.prefix_end), (segment.start, segment.end)
            spans = (0, segment.common), prefix, own
            keys += [torch.arange(*span) for span in spans]
            queries.append(segment.end - segment.start)
            counts.append(sum(end - start for start, end in spans))
        cumulated = torch.tensor([queries, counts], dtype=torch.int32).cumsum(1, dtype=torch.int32)
        of_queries, of_keys = to_device(cumulated, self.device)
        return Starts(of_queries, of_keys, to_device(torch.cat(keys), self.device), max(queries), max(counts))

    @cached_property
    def blocks(self) -> tuple[Block, ...]:
        """All segments, in blocks."""
        blocks: list[Block] = []
        for segment in self.segments:
            block = blocks[-1] if blocks else None
            if (
                block is not None
                and segment.end - block.start <= _BLOCK
                and block.sees(0, segment.common)
                and block.sees(segment.prefix_start, segment.prefix_end)
            ):
                blocks[-1] = block._replace(end=segment.end, segments=block.segments + 1)
            else:
                blocks.append(Block(*segment, segments=1))
        return tuple(blocks)

    def attends(self, block: Block, window: int | None = None) -> Tensor:
        """
        Which keys the positions of a block attend to.

        Args:
            block ([`Block`]): The block of Q positions. Its K keys are the common start, its prefix, and itself.
            window (`int`, *optional*): Maximum number of keys of a position: itself and the last ones before it.

        Returns:
            `torch.Tensor` of shape `(Q, K)`, of booleans.
        """
        queries = slice(block.start, block.end)
        numbers = torch.arange(self.positions, device=self.device)
        keys = torch.cat([numbers[start:end] for start, end in (*block.spans, block[:2])])
        start, prefix_start, prefix_end, common = self._bounds[:, queries, None]
        attends = ((keys >= prefix_start) & (keys < prefix_end)) | ((keys >= start) & (keys <= numbers[queries, None]))
        attends |= keys < common
        if window is not None:
            row = self.position_ids[0]
            attends &= row[queries, None] - row[keys] < window
        return attends

    @cached_property
    def _bounds(self) -> Tensor:
        """(4, N) for each position: the start of its segment; start and end of its prefix; the common start."""
        bounds = torch.tensor([(each.start, *each[2:]) for each in self.segments])
        lengths = torch.tensor([each.end - each.start for each in self.segments])
        return to_device(bounds.repeat_interleave(lengths, dim=0).T.contiguous(), self.device)

    def pack(self, values: Tensor, shift: int = 0) -> Tensor:
        """(1, N) values at the packed positions, or `shift` columns to their right, of a (B, P + C) tensor."""
        return values.reshape(-1)[self.sources + shift][None]

    def unpack(self, values: Tensor) -> Tensor:
        """(B, C) values of the completion tokens, from the (1, N) of the positions that predict them; 0 elsewhere."""
        return torch.cat([values[0], values.new_zeros(1)])[self.places]


def to_device(tensor: Tensor, device: torch.device | str) -> Tensor:
    """Copies a tensor of the host. From pageable memory, it would wait for the work that is queued on the device."""
    pinned = tensor.pin_memory() if torch.device(device).type == "cuda" else tensor
    return pinned.to(device, non_blocking=True)
