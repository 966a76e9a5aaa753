"""The schedule against the scheduler that the policy was trained with."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

from gwp_edge.sampler import make_schedule  # noqa: E402

pytestmark = pytest.mark.export


@pytest.mark.parametrize("n_steps", [1, 2, 5, 10, 20, 50])
@pytest.mark.parametrize("shift", [5.0, 2.0, 3.0])
def test_make_schedule_equals_diffusers_flow_match_euler(n_steps, shift):
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(n_steps)
    schedule = make_schedule(n_steps, shift=shift, rounding="exact")
    np.testing.assert_allclose(schedule.sigmas, scheduler.sigmas.numpy(), rtol=2e-7, atol=0)
    np.testing.assert_allclose(schedule.timesteps, scheduler.timesteps.numpy(), rtol=2e-7, atol=0)


def test_make_schedule_euler_steps_equal_diffusers_steps():
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=5.0)
    scheduler.set_timesteps(10)
    schedule = make_schedule(10, rounding="exact")
    generator = torch.Generator().manual_seed(0)
    want = got = torch.randn(1, 48, 32, generator=generator)
    for i, t in enumerate(scheduler.timesteps):
        v = torch.randn(1, 48, 32, generator=generator)
        want = scheduler.step(v, t, want).prev_sample
        got = got + (schedule.sigmas[i + 1] - schedule.sigmas[i]) * v
    assert float((got - want).abs().max()) < 2e-6


@pytest.mark.parametrize("n_steps", [4, 10, 30])
def test_make_schedule_bfloat16_equals_torch_rounding(n_steps):
    exact = make_schedule(n_steps, rounding="exact").timesteps
    want = torch.tensor(exact).to(torch.bfloat16).float().numpy()
    assert np.array_equal(np.float32(make_schedule(n_steps).timesteps), want)
