"""Padded micro-batches: which rows and columns are computed, as functions of lengths."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trl_a3po.update.micro_batches import (
    Extent,
    add_rows,
    by_length,
    extent_of,
    fill_up,
    row_lengths,
    run_extent,
    run_in_order,
    share_out,
)


def test_row_lengths_reach_to_the_last_token():
    prompt = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1], [0, 0, 0, 0]])
    completion = torch.tensor([[1, 0, 1, 0], [1, 1, 1, 1], [0, 0, 0, 0]])
    assert row_lengths(prompt, completion) == [(2, 3), (4, 4), (0, 0)]
    assert row_lengths(prompt[:, :0], completion) == [(0, 3), (0, 4), (0, 0)]


def test_extent_is_rounded_up():
    assert extent_of([(2, 3), (4, 1)]) == Extent(2, 4, 3)
    assert extent_of([(2, 3), (4, 1)], multiple=8) == Extent(2, 8, 8)
    assert extent_of([(2, 0)]) == Extent(1, 2, 1)
    assert extent_of([], multiple=8) == Extent(0, 8, 8)


def test_live_rows_are_shared_out_by_length_and_every_row_has_a_place():
    lengths = [(1, 5), (1, 9), (1, 2), (1, 7), (1, 1), (1, 8)]
    shared = by_length(lengths, [True, False, True, True, True, False], batches=2)
    assert shared == [[3, 0], [2, 4]]
    assert fill_up(shared, 6) == [[3, 0, 1], [2, 4, 5]]
    assert fill_up([[5, 4, 3, 2], [1]], 6) == [[5, 4, 3, 2], [1, 0]]
    assert fill_up([[], [3], []], 10) == [[0, 1, 2, 4], [3, 5, 6, 7], [8, 9]]


def test_added_rows_have_no_token_and_no_advantage():
    inputs = {
        "prompt_ids": torch.ones(2, 3, dtype=torch.long),
        "advantages": torch.ones(2),
        "importance_sampling_ratio": torch.full((2, 1), 0.5),
        "num_items_in_batch": torch.tensor(7),
        "text": ["a", "b"],
    }
    added = add_rows(inputs, 4)
    assert added["prompt_ids"].sum(1).tolist() == [3, 3, 0, 0]
    assert added["advantages"].tolist() == [1, 1, 0, 0]
    assert added["importance_sampling_ratio"].flatten().tolist() == [0.5, 0.5, 1, 1]  # its logarithm is finite
    assert added["num_items_in_batch"] == 7
    assert added["text"] == ["a", "b"]
    assert add_rows(inputs, 2) is inputs


@given(
    st.lists(st.tuples(st.integers(0, 9), st.integers(0, 30)), max_size=7),
    st.integers(1, 4),
    st.integers(1, 4),
    st.sampled_from([1, 8]),
)
def test_rows_are_shared_out_so_that_the_fewest_positions_are_computed(lengths, batches, size, multiple):
    lengths = lengths[: batches * size]

    def cells(counts):
        ends = itertools.accumulate(counts)
        extents = [extent_of(lengths[end - count : end], multiple) for end, count in zip(ends, counts, strict=True)]
        return sum(extent.rows * (extent.prompt + extent.completion) for extent in extents)

    counts = share_out(lengths, batches, size, multiple)
    every_way = itertools.product(range(size + 1), repeat=batches)
    assert cells(counts) == min(cells(way) for way in every_way if sum(way) == len(lengths))


def toy_forward(calls):
    """'Log-probabilities' that are the ids, 'entropies' twice that; where masked 0, as TRL's are."""

    def forward(ids, mask, keep):
        calls.append(tuple(ids.shape))
        values = (ids * mask).float()[:, -keep:]
        return values, 2 * values, None

    return forward


@pytest.mark.parametrize("rows", [0, 1, 3])
def test_an_extent_gives_what_the_whole_gives(rows):
    ids = torch.arange(1, 25).view(3, 8)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 0, 0], [0, 1, 1, 1, 1, 0, 0, 0], [0, 0, 0, 1, 1, 1, 0, 0]])
    whole, entropies, _ = toy_forward([])(ids, mask, 4)
    calls = []
    logps, our_entropies, other = run_extent(toy_forward(calls), ids, mask, 4, Extent(rows, 3, 2))
    assert calls == [(max(1, rows), 5)]
    assert torch.equal(logps[:rows], whole[:rows])
    assert torch.equal(our_entropies[:rows], entropies[:rows])
    assert not logps[rows:].any()
    assert our_entropies[rows:].isnan().all()
    assert other is None


def test_rows_computed_in_order_come_back_in_place():
    generator = torch.Generator().manual_seed(0)
    prompts, completions = (
        torch.randint(1, 5, (7,), generator=generator),
        torch.randint(0, 9, (7,), generator=generator),
    )
    mask = torch.cat([torch.arange(4) >= 4 - prompts[:, None], torch.arange(8) < completions[:, None]], dim=1).long()
    ids = torch.randint(1, 99, (7, 12), generator=generator)
    calls = []
    lengths = row_lengths(mask[:, :4], mask[:, 4:])
    outputs = run_in_order(toy_forward(calls), ids, mask, 8, lengths, batch_size=3)
    for ours, theirs in zip(outputs, toy_forward([])(ids, mask, 8), strict=True):
        assert (ours is None) if theirs is None else torch.equal(ours, theirs)
    assert [rows for rows, _ in calls] == [3, 3, 1]
    assert sum(rows * width for rows, width in calls) < ids.numel()
