import json
import math
from pathlib import Path
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from support import reference

from trl_a3po import shape_advantages, shaping
from trl_a3po.shaping import TOKEN_ENDS, gspo_token_old_logps, selects_tokens, weight_polarities


A3PO = {
    "positive_low_ratio": 0.2,
    "positive_low_scale": 2.0,
    "negative_high_ratio": 0.2,
    "negative_high_scale": 2.0,
}


# What the authors' released implementation returned on random inputs (arXiv 2512.21625, repository
# txy77/Sample-Polarity-of-RLVR, `compute_grpo_outcome_advantage`).
AUTHORS = json.loads((Path(__file__).parent / "data" / "reference_shaping.json").read_text())


@pytest.mark.parametrize("case", AUTHORS["cases"], ids=lambda case: f"seed{case['seed']}")
def test_agrees_with_the_authors_code(case):
    metric = torch.tensor(case["log_probs"] if case["metric"] == "prob" else case["entropies"])
    shaped = shape_advantages(
        torch.tensor(case["advantages"]),
        metric,
        torch.tensor(case["mask"]),
        positive_weight=case["positive_weight"],
        negative_weight=case["negative_weight"],
        **{name.replace("_num_", "_"): value for name, value in case["shaping"].items()},
    )
    torch.testing.assert_close(shaped, torch.tensor(case["expected"]), rtol=1e-6, atol=1e-6)


DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Few different values, so that ties are common; infinities and NaN as a broken or a certain model gives them.
METRICS = st.sampled_from([-math.inf, -7.5, -2.0, -0.5, -0.25, -0.0, 0.0, 0.5, math.inf, math.nan]) | st.floats(
    -20, 20, width=16
)
ADVANTAGES = st.sampled_from([-1.5, -1.0, -0.0, 0.0, 0.5, 2.0]) | st.floats(-(2.0**99), 2.0**99, width=32)
RATIOS = st.sampled_from([0.0, 0.1, 0.2, 0.29, 1 / 3, 0.5, 0.999, 1.0]) | st.floats(0, 1)
SCALES = st.sampled_from([0.0, 0.5, 1.0, 2.0, 5.0]) | st.floats(0, 8, width=32)


@st.composite
def batches(draw):
    rows, width = draw(st.integers(1, 5)), draw(st.integers(0, 14))
    advantages = draw(arrays("float32", rows, elements=ADVANTAGES))
    metric = draw(arrays("float32", (rows, width), elements=METRICS))
    mask = draw(arrays("int64", (rows, width), elements=st.integers(0, 1)))
    return torch.from_numpy(advantages), torch.from_numpy(metric), torch.from_numpy(mask)


@st.composite
def shapings(draw):
    return {
        **{f"{end}_ratio": draw(RATIOS) for end in TOKEN_ENDS},
        **{f"{end}_scale": draw(SCALES) for end in TOKEN_ENDS},
        "positive_weight": draw(SCALES),
        "negative_weight": draw(SCALES),
    }


# All at once, by rows alone, by a few of like length: how a CPU takes small batches and large ones.
CACHED_TOKENS = st.sampled_from([shaping.CACHED_TOKENS, 1, 16])


@settings(max_examples=1000, deadline=None)
@given(batch=batches(), options=shapings(), dtype=st.sampled_from(DTYPES), cached_tokens=CACHED_TOKENS)
def test_agrees_with_the_definition(batch, options, dtype, cached_tokens):
    advantages, metric, mask = batch
    metric = metric.to(dtype)
    with mock.patch.object(shaping, "CACHED_TOKENS", cached_tokens):
        shaped = shape_advantages(advantages, metric, mask, **options)
    expected = reference.shape_advantages(advantages.tolist(), metric.tolist(), mask.tolist(), **options)
    torch.testing.assert_close(shaped, torch.tensor(expected).reshape(shaped.shape), rtol=1e-5, atol=1e-6)
    assert shaped.dtype == advantages.dtype


def assert_rows_alone_are_shaped_alike(together, batch, options):
    for i, row in enumerate(together):
        alone = shape_advantages(*(tensor[i : i + 1] for tensor in batch), **options)
        assert torch.equal(alone[0], row)


@settings(max_examples=200, deadline=None)
@given(batch=batches(), options=shapings())
def test_a_completion_is_shaped_alike_in_any_batch_and_padding(batch, options):
    advantages, metric, mask = batch
    together = shape_advantages(advantages, metric, mask, **options)
    padded = torch.nn.functional.pad(metric, (2, 3), value=-3.0), torch.nn.functional.pad(mask, (2, 3))
    assert torch.equal(shape_advantages(advantages, *padded, **options)[:, 2 : together.shape[1] + 2], together)
    assert_rows_alone_are_shaped_alike(together, batch, options)


def test_a_large_batch_is_shaped_as_each_of_its_completions():
    generator = torch.Generator().manual_seed(0)
    advantages, metric = torch.randn(40, generator=generator), torch.randn(40, 5000, generator=generator)
    assert metric.numel() >= shaping.CACHED_TOKENS
    length = torch.randint(0, 5001, (40, 1), generator=generator)
    mask = (torch.arange(5000) < length) & (torch.rand(40, 5000, generator=generator) < 0.9)
    together = shape_advantages(advantages, metric, mask, **A3PO)
    assert_rows_alone_are_shaped_alike(together, (advantages, metric, mask), A3PO)


@settings(max_examples=200, deadline=None)
@given(batch=batches(), weights=st.tuples(SCALES, SCALES))
def test_without_scales_every_token_has_the_weighted_advantage(batch, weights):
    advantages, metric, mask = batch
    shaped = shape_advantages(advantages, metric, mask, positive_weight=weights[0], negative_weight=weights[1])
    assert torch.equal(shaped, weight_polarities(advantages, *weights)[:, None] * mask)


@pytest.mark.parametrize("length", [*range(1, 60), 100, 1000])
@pytest.mark.parametrize("ratio", [0.01, 0.2, 0.29, 0.58, 0.7, 1.0])
def test_number_of_selected_tokens_is_that_of_python(length, ratio):
    # 0.29 * 100 is 28.999... in float64 and 29.0 in float32.
    shaped = shape_advantages(
        torch.ones(1),
        torch.randn(1, 1000),
        torch.arange(1000)[None] < length,
        positive_high_ratio=ratio,
        positive_high_scale=3.0,
    )
    assert (shaped == 3.0).sum() == max(1, int(ratio * length))


def test_ties_go_to_the_earlier_position_at_both_ends():
    mask = torch.tensor([[0, 1, 1, 1, 1, 1]])
    shaped = shape_advantages(torch.ones(1), torch.zeros(1, 6), mask, positive_low_ratio=0.4, positive_low_scale=2.0)
    assert shaped.tolist() == [[0, 2, 2, 1, 1, 1]]
    shaped = shape_advantages(
        -torch.ones(1), torch.zeros(1, 6), mask, negative_high_ratio=0.4, negative_high_scale=2.0
    )
    assert shaped.tolist() == [[0, -2, -2, -1, -1, -1]]


def test_overlapping_selections_multiply():
    shaped = shape_advantages(
        torch.ones(1),
        torch.tensor([[-3.0, -2.0, -1.0]]),
        torch.ones(1, 3),
        positive_low_ratio=0.7,
        positive_low_scale=2.0,
        positive_high_ratio=0.7,
        positive_high_scale=5.0,
    )
    assert shaped.tolist() == [[2.0, 10.0, 5.0]]


def test_a_nan_metric_is_never_selected_and_keeps_the_plain_advantage():
    metric = torch.tensor([[math.nan, -1.0, math.nan, -2.0]])
    shaped = shape_advantages(torch.ones(1), metric, torch.ones(1, 4), positive_low_ratio=1.0, positive_low_scale=2.0)
    assert shaped.tolist() == [[1.0, 2.0, 1.0, 2.0]]


@pytest.mark.parametrize("advantage", [math.inf, -math.inf, math.nan])
def test_what_is_masked_is_0_whatever_the_advantage(advantage):
    shaped = shape_advantages(torch.tensor([advantage]), torch.randn(1, 3), torch.tensor([[1, 0, 1]]), **A3PO)
    assert shaped[0, 1] == 0


@pytest.mark.parametrize("dtype", [torch.float64, *DTYPES])
def test_keeps_the_dtype_of_the_advantages(dtype):
    advantages = torch.tensor([1.0, -1.0], dtype=dtype)
    shaped = shape_advantages(advantages, torch.randn(2, 9), torch.ones(2, 9), **A3PO)
    assert shaped.dtype == dtype


def test_arguments_are_left_alone():
    advantages, metric, mask = torch.randn(4), torch.randn(4, 9), torch.ones(4, 9)
    before = [tensor.clone() for tensor in (advantages, metric, mask)]
    shape_advantages(advantages, metric, mask, **A3PO)
    assert all(torch.equal(a, b) for a, b in zip(before, (advantages, metric, mask), strict=True))


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("positive_low_ratio", 20, "from 0 to 1"),
        ("negative_high_ratio", -0.1, "from 0 to 1"),
        ("positive_low_ratio", math.nan, "from 0 to 1"),
        ("positive_low_ratio", "0.2", "from 0 to 1"),
        ("positive_low_ratio", True, "from 0 to 1"),
        ("positive_low_scale", -2.0, "not negative"),
        ("negative_low_scale", math.inf, "finite"),
        ("positive_weight", -1.0, "not negative"),
        ("negative_weight", None, "finite"),
    ],
)
def test_refuses_settings_without_meaning(name, value, allowed):
    with pytest.raises(ValueError, match=rf"`{name}` must be a .*{allowed}.*, got {value!r}.*: pass "):
        shape_advantages(torch.ones(1), torch.ones(1, 2), torch.ones(1, 2), **{name: value})


@pytest.mark.parametrize(
    "shapes", [((2, 1), (2, 3), (2, 3)), ((2,), (2, 3), (2, 4)), ((3,), (2, 3), (2, 3)), ((), (3,), (3,))]
)
def test_refuses_shapes_that_do_not_fit(shapes):
    with pytest.raises(ValueError, match=r"Expected `advantages` of shape \(B,\)"):
        shape_advantages(*(torch.ones(shape) for shape in shapes))


def test_selects_tokens():
    off = {f"{end}_{what}": 1.0 if what == "scale" else 0.0 for end in TOKEN_ENDS for what in ("ratio", "scale")}
    off |= {"positive_weight": 1.0, "negative_weight": 1.0}
    assert selects_tokens({**off, **A3PO})
    assert not selects_tokens(off)
    assert not selects_tokens({**off, **A3PO, "positive_low_scale": 1.0, "negative_high_scale": 1.0})
    assert not selects_tokens({**off, "positive_low_scale": 2.0})  # of no token
    assert not selects_tokens({**off, **A3PO, "positive_weight": 0.0, "negative_high_scale": 1.0})
    assert selects_tokens({**off, **A3PO, "positive_weight": 0.0})


def test_gspo_token_old_logps_give_every_token_the_ratio_of_the_sequence():
    logps = torch.randn(3, 5, requires_grad=True)
    old, mask = torch.randn(3, 5), torch.tensor([[1, 1, 1, 0, 0], [1, 0, 1, 1, 1], [0, 0, 0, 0, 0]])
    ratio = (logps - gspo_token_old_logps(logps, old, mask)).exp()
    for i in range(3):
        tokens = mask[i].nonzero()[:, 0]
        mean = sum(float(logps.detach()[i, t] - old[i, t]) for t in tokens) / max(1, len(tokens))
        torch.testing.assert_close(ratio[i], torch.full((5,), math.exp(mean)))
    (gradient,) = torch.autograd.grad(ratio.sum(), logps)
    torch.testing.assert_close(gradient, ratio.detach())  # each token its own, none of its neighbours'
