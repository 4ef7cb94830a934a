"""Which rows share a packed pass."""

import math

from hypothesis import given
from hypothesis import strategies as st

from trl_a3po.update.layout import RowShape, packed_positions
from trl_a3po.update.plan import by_prompt, in_fewest


@st.composite
def steps(draw):
    """The rows of an optimizer step, in groups of one prompt, and how they are divided into micro-batches."""
    size, batches, generations = draw(st.integers(1, 5)), draw(st.integers(1, 5)), draw(st.integers(1, 4))
    groups = -(-size * batches // generations)
    prompts = draw(st.lists(st.integers(1, 30), min_size=groups, max_size=groups))
    common = draw(st.integers(0, min(prompts) - 1))
    completions = draw(st.lists(st.integers(0, 40), min_size=size * batches, max_size=size * batches))
    shapes = [
        RowShape(prompts[i // generations], length, i // generations, common) for i, length in enumerate(completions)
    ]
    live = draw(st.lists(st.booleans(), min_size=len(shapes), max_size=len(shapes)))
    return shapes, live, batches, size, generations


@given(steps())
def test_every_live_row_has_a_place_within_the_positions_of_a_padded_micro_batch(step):
    shapes, live, batches, size, generations = step
    width = max(shape.prompt for shape in shapes) + max(shape.completion for shape in shapes)
    shared = by_prompt(shapes, live, batches, size * width, generations)
    assert len(shared) == batches
    assert sorted(row for rows in shared for row in rows) == [row for row, is_live in enumerate(live) if is_live]
    assert all(len(rows) <= 2 * max(size, generations) for rows in shared)
    positions = [packed_positions([shapes[row] for row in rows]) for rows in shared]
    assert max(positions) <= size * width


@given(steps())
def test_few_micro_batches_hold_the_same_rows_and_one_less_would_not(step):
    shapes, live, batches, size, generations = step
    width = max(shape.prompt for shape in shapes) + max(shape.completion for shape in shapes)
    budget = size * width
    shared = in_fewest(shapes, live, budget, generations, least=1, most=batches)
    assert 1 <= len(shared) <= batches
    assert sorted(row for rows in shared for row in rows) == [row for row, is_live in enumerate(live) if is_live]
    for rows in shared:
        assert packed_positions([shapes[row] for row in rows]) <= budget
        if len(rows) > 2 * generations:
            assert sum(shapes[row].prompt + shapes[row].completion for row in rows) <= 2 * budget
            assert len(rows) <= 2 * math.ceil(len(shapes) / len(shared))
    fewer = len(shared) - 1
    assert not fewer or by_prompt(shapes, live, fewer, budget, generations) is None
    assert len(in_fewest(shapes, live, budget, generations, least=batches, most=batches)) == batches


def test_a_group_stays_together_and_the_micro_batches_are_balanced():
    lengths = [9, 8, 7, 6, 5, 4, 3, 2]
    shapes = [RowShape(10, length, group) for group in range(4) for length in lengths]
    shared = by_prompt(shapes, [True] * 32, batches=16, budget=2 * 60, group_size=8)
    assert [len(rows) for rows in shared] == [0] * 12 + [8] * 4  # the last pass, which synchronises, has rows
    assert {shapes[rows[0]].prompt_number for rows in shared[12:]} == {0, 1, 2, 3}
    balanced = by_prompt(shapes, [True] * 32, batches=2, budget=16 * 60, group_size=8)
    assert [len(rows) for rows in balanced] == [16, 16]


def test_a_group_that_fits_nowhere_is_divided():
    shapes = [RowShape(10, 20, 0)] * 4
    shared = by_prompt(shapes, [True] * 4, batches=4, budget=1 * 30, group_size=4)
    assert sorted(map(len, shared)) == [1, 1, 1, 1]
    shared = by_prompt(shapes, [True] * 4, batches=2, budget=2 * 30, group_size=4)
    assert sorted(map(len, shared)) == [2, 2]
