import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trl_a3po.schedules import LEAST_DAMPING, SCALE_DECAYS, decay_scale, next_damping, resolve_decay_steps


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


@given(scale=st.floats(0, 10), step=st.integers(0, 100), damping=st.floats(LEAST_DAMPING, 1))
def test_damping_is_a_share_of_the_distance_from_1(scale, step, damping):
    damped, undamped = decay_scale(scale, step, 100, "cosine", damping), decay_scale(scale, step, 100, "cosine")
    assert damped - 1 == pytest.approx((undamped - 1) * damping, abs=1e-9)


# The closed loop


@pytest.mark.parametrize(
    ("damping", "measured", "expected"),
    [
        (1.0, [(0.15, 0.1)], 1 / 1.5),
        (0.5, [(0.15, 0.1), (0.1, 1.0)], 0.5 / 1.5),  # the one that is furthest beyond its bound
        (0.25, [(0.08, 0.1), (0.9, 1.0)], 0.25 / 0.9),
        (0.25, [(0.01, 0.1)], 0.5),
        (0.5, [(9.0, 0.1)], 0.25),
        (1.0, [(0.0, 0.1)], 1.0),
        (LEAST_DAMPING, [(9.0, 0.1)], LEAST_DAMPING),
        (0.3, [(math.nan, 0.1)], 0.3),
        (0.3, [(math.nan, 0.1), (0.2, 0.1)], 0.15),
        (0.3, [(math.inf, 0.1)], 0.15),
    ],
)
def test_damping_follows_the_excess(damping, measured, expected):
    assert next_damping(damping, measured) == pytest.approx(expected)
    assert next_damping(damping, measured, monotone=True) == pytest.approx(min(damping, expected))


MEASURED = st.lists(st.tuples(st.floats(0, 1e30), st.floats(1e-6, 1e6)), max_size=2)


@given(st.lists(MEASURED, max_size=20), st.booleans())
def test_damping_is_bounded_and_monotone_if_asked(measurements, monotone):
    damping = 1.0
    for measured in measurements:
        before, damping = damping, next_damping(damping, measured, monotone)
        assert LEAST_DAMPING <= damping <= 1
        assert before / 2 <= damping <= (before if monotone else 2 * before)


def test_the_loop_settles_at_its_bound():
    """On a system in which what is measured grows with the scales in force."""
    damping = 1.0
    for _ in range(30):
        value = 0.2 * damping + 0.02
        damping = next_damping(damping, [(value, 0.1)])
    assert 0.2 * damping + 0.02 == pytest.approx(0.1, rel=1e-3)
