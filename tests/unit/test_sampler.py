"""The denoising schedule."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from gwp_edge.errors import SpecError
from gwp_edge.sampler import MAX_STEPS, make_schedule

REFERENCE = Path(__file__).parents[1] / "data" / "reference"


@pytest.mark.parametrize("family", ["gwp05", "gwp0"])
def test_make_schedule_exact_ten_steps_equal_the_reference(family):
    with np.load(REFERENCE / family / "expected.npz") as expected:
        sigmas, timesteps = expected["sigmas"], expected["timesteps"]
    schedule = make_schedule(10, rounding="exact")
    np.testing.assert_allclose(schedule.sigmas, sigmas, rtol=2e-7, atol=0)
    np.testing.assert_allclose(schedule.timesteps, timesteps, rtol=2e-7, atol=0)


def test_make_schedule_default_rounds_time_as_trained():
    schedule = make_schedule(10)
    want = (1000, 976, 948, 908, 864, 800, 716, 592, 396, 24.375)
    assert schedule.timesteps == want
    assert schedule.rounding == "bfloat16"
    # Only what the network is told is rounded; the steps that x takes are not.
    assert schedule.sigmas == make_schedule(10, rounding="exact").sigmas


@pytest.mark.parametrize("n_steps", [1, 2, 3, 5, 10, 50, MAX_STEPS])
@pytest.mark.parametrize("shift", [1.0, 2.0, 5.0, 0.5])
def test_make_schedule_any_size_runs_from_noise_to_clean(n_steps, shift):
    schedule = make_schedule(n_steps, shift=shift, rounding="exact")
    sigmas = np.array(schedule.sigmas)
    assert schedule.n_steps == n_steps == len(sigmas) - 1
    assert sigmas[0] == 1.0
    assert sigmas[-1] == 0.0
    assert (np.diff(sigmas) < 0).all()
    np.testing.assert_allclose(schedule.timesteps, 1000 * sigmas[:-1], rtol=1e-6)


def test_make_schedule_ideal_velocity_reaches_the_clean_actions():
    """Euler steps along the exact straight flow end on the data, whatever the step sizes."""
    rng = np.random.default_rng(0)
    clean, noise = rng.normal(size=(2, 48, 32))
    x, sigmas = noise.copy(), make_schedule(7).sigmas
    for i in range(7):
        x += (sigmas[i + 1] - sigmas[i]) * (noise - clean)
    np.testing.assert_allclose(x, clean, atol=1e-6)


@pytest.mark.parametrize("n_steps", [0, -1, MAX_STEPS + 1])
def test_make_schedule_bad_step_count_is_refused(n_steps):
    with pytest.raises(SpecError, match=rf"--steps must be 1 to 1000, got {n_steps}"):
        make_schedule(n_steps)


@pytest.mark.parametrize("shift", [0.0, -5.0, float("nan")])
def test_make_schedule_bad_shift_is_refused(shift):
    with pytest.raises(SpecError, match="shift must be positive"):
        make_schedule(10, shift=shift)
