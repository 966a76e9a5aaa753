"""Guidance gains and the shifted prefix."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gwp_edge.chunking import (
    Guidance,
    frozen_rows,
    prefix_gain,
    prefix_weights,
    shift_rows,
    warm_start_step,
)
from gwp_edge.errors import SpecError
from gwp_edge.types import Chunk

SIGMAS = np.array([1.0, 0.9, 0.75, 0.5, 0.2, 0.0])
H = 12


def _denoise(guidance, a_prev, velocity, seed=0):
    """Run the Euler loop as the denoise graph does, with ``velocity(x, sigma)`` as the network."""
    x = np.random.default_rng(seed).normal(size=a_prev.shape)
    gain = prefix_gain(guidance, SIGMAS, H)
    for i, (s, s_next) in enumerate(pairwise(SIGMAS)):
        v = velocity(x, s)
        v = v - gain[i] * (a_prev - (x - s * v))
        x = x + (s_next - s) * v
    return x


def _toward(goal):
    """A network that knows its clean answer: v = (x - goal) / sigma."""
    return lambda x, s: (x - goal) / s


def test_weights_are_one_while_frozen_then_fall_to_zero():
    w = prefix_weights(3, 8, H)
    np.testing.assert_allclose(w[:3], 1.0)
    assert (np.diff(w[2:9]) < 0).all()
    assert (w[8:] == 0).all()
    # Paper's formula by hand for i = 5: w = (3-1-5)/(8-3+1) + 1 = 0.5.
    assert w[5] == pytest.approx(0.5 * np.expm1(0.5) / np.expm1(1.0))


@pytest.mark.parametrize("method", ["soft", "hard"])
def test_frozen_rows_end_exactly_on_the_old_chunk(method):
    a_prev, goal = np.full((H, 2), 0.7), np.zeros((H, 2))
    x = _denoise(Guidance(method=method, n_frozen_rows=4, n_horizon_rows=9), a_prev, _toward(goal))
    np.testing.assert_allclose(x[:4], 0.7, atol=1e-6)
    np.testing.assert_allclose(x[9:], 0.0, atol=1e-6)


def test_soft_blends_between_old_and_new():
    a_prev, goal = np.ones((H, 1)), np.zeros((H, 1))
    x = _denoise(Guidance(n_frozen_rows=2, n_horizon_rows=10), a_prev, _toward(goal))
    assert (np.diff(x[:, 0]) <= 1e-9).all()
    assert 0.0 < x[5, 0] < 1.0


def test_identity_pulls_towards_the_old_chunk_and_never_past_it():
    a_prev, goal = np.ones((H, 1)), np.zeros((H, 1))
    free = _denoise(Guidance(method="none"), a_prev, _toward(goal))
    pulled = _denoise(
        Guidance(method="identity", n_frozen_rows=6, n_horizon_rows=H, beta=1000.0),
        a_prev,
        _toward(goal),
    )
    np.testing.assert_allclose(free, 0.0, atol=1e-9)
    assert (pulled[:6] > 0.1).all()
    assert (pulled <= 1.0 + 1e-6).all()


def test_identity_gain_is_capped_by_beta_and_by_the_step():
    gain = prefix_gain(Guidance(method="identity", n_frozen_rows=H, beta=3.0), SIGMAS, H)[:, 0, 0]
    s = SIGMAS[:-1]
    with np.errstate(divide="ignore"):
        formula = (s**2 + (1 - s) ** 2) / (s * (1 - s))
    np.testing.assert_allclose(gain, np.minimum(np.minimum(formula, 3.0), 1 / -np.diff(SIGMAS)))
    assert gain[0] == 3.0


def test_no_method_has_no_gain():
    gain = prefix_gain(Guidance(method="none", n_frozen_rows=5), SIGMAS, H)
    assert gain.shape == (5, H, 1)
    assert gain.dtype == np.float32
    assert not gain.any()


@given(
    d=st.integers(0, 60),
    e=st.integers(0, 60),
    method=st.sampled_from(["soft", "hard", "identity"]),
    beta=st.floats(0.01, 1e6),
)
def test_gain_any_guidance_never_overshoots_in_one_step(d, e, method, beta):
    """gain * d sigma <= 1: a step goes at most all the way to the old chunk."""
    guidance = Guidance(method=method, n_frozen_rows=d, n_horizon_rows=e, beta=beta)
    gain = prefix_gain(guidance, SIGMAS, H)
    assert np.isfinite(gain).all()
    assert (gain >= 0).all()
    assert (gain[:, :, 0] * -np.diff(SIGMAS)[:, None] <= 1 + 1e-6).all()


@pytest.mark.parametrize(
    "bad",
    [
        {"method": "magic"},
        {"n_frozen_rows": -1},
        {"beta": 0.0},
        {"beta": float("nan")},
        {"warm_start_sigma": 0.0},
        {"warm_start_sigma": 1.1},
    ],
)
def test_guidance_bad_values_are_refused(bad):
    with pytest.raises(SpecError):
        Guidance(**bad)


def test_gain_bad_sigmas_are_refused():
    with pytest.raises(SpecError, match="sigmas"):
        prefix_gain(Guidance(), np.array([0.0, 1.0]), H)


def test_within_caps_rows_to_what_is_real():
    guidance = Guidance(n_frozen_rows=10, n_horizon_rows=0).within(6)
    assert (guidance.n_frozen_rows, guidance.n_horizon_rows) == (6, 6)


def test_warm_start_step_skips_the_noisier_ones():
    assert warm_start_step(Guidance(), SIGMAS) == 0
    assert warm_start_step(Guidance(warm_start_sigma=0.75), SIGMAS) == 2
    assert warm_start_step(Guidance(warm_start_sigma=0.6), SIGMAS) == 3
    assert warm_start_step(Guidance(warm_start_sigma=0.01), SIGMAS) == 4


def test_shift_rows_resamples_by_time_and_holds_the_tail():
    previous = Chunk(
        actions=np.arange(10.0)[:, None], t_observed_ns=1000, period_ns=100, chunk_idx=0
    )
    rows, n_real = shift_rows(previous, 1250, 100, 10)
    np.testing.assert_allclose(rows[:, 0], [2.5, 3.5, 4.5, 5.5, 6.5, 7.5, 8.5, 9, 9, 9])
    assert n_real == 7
    rows, n_real = shift_rows(previous, 1200, 50, 4)
    np.testing.assert_allclose(rows[:, 0], [2.0, 2.5, 3.0, 3.5])
    assert n_real == 4


def test_shift_rows_of_a_plan_that_is_over_has_none_real():
    previous = Chunk(actions=np.ones((3, 2)), t_observed_ns=0, period_ns=100)
    rows, n_real = shift_rows(previous, 10_000, 100, 5)
    assert n_real == 0
    np.testing.assert_array_equal(rows, 1.0)


@pytest.mark.parametrize(
    ("latency_ms", "margin_ms", "expected"),
    [(0, 0, 0), (1, 0, 1), (100, 0, 3), (100, 10, 4), (90, 10, 3), (5000, 0, 48)],
)
def test_frozen_rows_is_the_ceiling(latency_ms, margin_ms, expected):
    period_ns = 33_333_334
    assert frozen_rows(latency_ms * 10**6, margin_ms * 10**6, period_ns, 48) == expected
