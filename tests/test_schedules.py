import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trl_a3po.schedules import SCALE_DECAYS, decay_scale, resolve_decay_steps


@pytest.mark.parametrize(
    ("scale_decay_steps", "max_steps", "expected"),
    [
        (500, 10_000, 500),
        (500.0, 10_000, 500),
        (0.5, 1000, 500),
        (0.5, 1001, 501),
        (1, 1000, 1),
        (0.001, 10, 1),
        (0.5, 0, 1),
    ],
)
def test_steps_are_read_as_warmup_steps_are(scale_decay_steps, max_steps, expected):
    assert resolve_decay_steps(scale_decay_steps, max_steps) == expected


def test_linear_is_the_initial_scale_less_a_rate_a_step_and_not_below_1():
    rate = (2.0 - 1.0) / 100
    for step in range(200):
        assert decay_scale(2.0, step, 100, "linear") == pytest.approx(max(2.0 - rate * step, 1.0))


def test_cosine_is_half_a_period():
    for step in range(101):
        expected = 1 + 0.5 * (1 + math.cos(math.pi * step / 100))
        assert decay_scale(2.0, step, 100, "cosine") == pytest.approx(expected)


@given(
    scale=st.floats(0, 10),
    step=st.integers(0, 1000),
    decay_steps=st.integers(1, 1000),
    scale_decay=st.sampled_from(SCALE_DECAYS),
)
def test_runs_monotonically_from_the_scale_to_exactly_1(scale, step, decay_steps, scale_decay):
    now, later = (decay_scale(scale, at, decay_steps, scale_decay) for at in (step, step + 1))
    assert min(scale, 1.0) <= now <= max(scale, 1.0)
    assert abs(later - 1) <= abs(now - 1) + 1e-12
    assert decay_scale(scale, 0, decay_steps, scale_decay) == scale
    if scale_decay == "constant":
        assert now == scale
    elif step >= decay_steps:
        assert now == 1.0


@pytest.mark.parametrize("scale_decay", ["exponential", "Linear", "", None])
def test_an_unknown_decay_is_refused(scale_decay):
    with pytest.raises(ValueError, match=r"`scale_decay` must be one of 'linear', 'cosine', 'constant', got"):
        decay_scale(2.0, 5, 10, scale_decay)


def test_every_decay_has_its_own_course():
    courses = {tuple(decay_scale(2.0, step, 10, name) for step in range(11)) for name in SCALE_DECAYS}
    assert len(courses) == len(SCALE_DECAYS)
