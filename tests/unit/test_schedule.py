"""The schedule in single situations."""

import numpy as np
import pytest

from gwp_edge.schedule import Acceptance, Schedule, seam_time_s
from gwp_edge.types import Chunk, JointLimits

PERIOD_NS = 40_000_000
D = 2
LIMITS = JointLimits(
    position_min=np.full(D, -3.0),
    position_max=np.full(D, 3.0),
    velocity_max=np.full(D, 3.0),
    acceleration_max=np.full(D, 5.0),
)
T0 = 1_000_000_000


def _ramp(t_observed_ns=T0, speed=0.5, start=0.0, n_rows=48, idx=0):
    t = np.arange(n_rows)[:, None] * PERIOD_NS / 1e9
    return Chunk(
        actions=start + speed * t * np.ones(D),
        t_observed_ns=t_observed_ns,
        period_ns=PERIOD_NS,
        chunk_idx=idx,
    )


def _schedule(**kwargs):
    schedule = Schedule(LIMITS, **kwargs)
    schedule.hold(np.zeros(D))
    return schedule


def test_sample_between_rows_follows_the_plan_by_time():
    schedule = _schedule()
    schedule.accept(_ramp(), T0, seam=False)
    # 10.25 rows after the observation, whatever the latency was.
    np.testing.assert_allclose(schedule.sample(T0 + 410_000_000), 0.5 * 0.41, atol=1e-12)


def test_sample_with_lead_reads_the_plan_ahead():
    schedule = _schedule(lead_ns=60_000_000)
    schedule.accept(_ramp(), T0, seam=False)
    np.testing.assert_allclose(schedule.sample(T0 + 400_000_000), 0.5 * 0.46, atol=1e-12)


def test_catmull_rom_follows_parabola_exactly_inside():
    t = np.arange(30)[:, None] * np.ones(D)
    chunk = Chunk(actions=0.001 * t**2, t_observed_ns=T0, period_ns=PERIOD_NS)
    schedule = _schedule()
    schedule.accept(chunk, T0, seam=False)
    u = 7.3
    np.testing.assert_allclose(schedule.sample(T0 + round(u * PERIOD_NS)), 0.001 * u**2, atol=1e-9)


def test_accept_older_chunk_is_rejected_and_plan_stays():
    schedule = _schedule()
    assert schedule.accept(_ramp(idx=5), T0 + 10) is Acceptance.ACCEPTED
    assert schedule.accept(_ramp(T0 - 1, speed=9, idx=4), T0 + 20) is Acceptance.OLDER
    assert schedule.accept(_ramp(T0, speed=9, idx=6), T0 + 20) is Acceptance.OLDER
    assert schedule.chunk_idx == 5


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_accept_not_finite_anywhere_rejects_the_whole_chunk(bad):
    schedule = _schedule()
    schedule.accept(_ramp(), T0)
    actions = np.zeros((48, D))
    actions[47, 1] = bad
    chunk = Chunk(actions=actions, t_observed_ns=T0 + 5, period_ns=PERIOD_NS, chunk_idx=1)
    assert schedule.accept(chunk, T0 + 10) is Acceptance.NOT_FINITE
    assert schedule.chunk_idx == 0
    assert np.isfinite(schedule.sample(T0 + 20)).all()


def test_accept_expired_future_and_misshapen_chunks_are_rejected():
    schedule = _schedule()
    late_ns = T0 + 49 * PERIOD_NS + 2_000_000_000
    assert schedule.accept(_ramp(), late_ns) is Acceptance.EXPIRED
    assert not schedule.active
    assert schedule.accept(_ramp(T0 + 10**9), T0) is Acceptance.FROM_FUTURE
    wide = Chunk(actions=np.zeros((4, D + 1)), t_observed_ns=T0, period_ns=PERIOD_NS)
    assert schedule.accept(wide, T0) is Acceptance.BAD_SHAPE


def test_stale_plan_slows_down_along_its_path_and_holds_its_last_row():
    schedule = _schedule()
    chunk = _ramp()
    schedule.accept(chunk, T0, seam=False)
    times = T0 + np.arange(0, 4_000_000_000, 5_000_000)
    samples = np.array([schedule.sample(int(t)) for t in times])[:, 0]
    velocity = np.diff(samples) / 0.005
    acceleration = np.diff(velocity) / 0.005
    assert (velocity >= -1e-9).all()
    assert np.abs(acceleration[5:]).max() < 5.0
    assert samples.max() <= chunk.actions[-1, 0] + 1e-12
    assert samples[-1] == chunk.actions[-1, 0]
    assert schedule.ended(int(times[-1]))


def test_new_chunk_during_slowing_down_goes_on_without_jump():
    schedule = _schedule()
    schedule.accept(_ramp(), T0, seam=False)
    now_ns = T0 + 46 * PERIOD_NS
    before = schedule.sample(now_ns)
    step = before - schedule.sample(now_ns - 1_000_000)
    start = float(before[0]) - 0.02
    new = _ramp(now_ns - 1, start=start, idx=1)
    assert schedule.accept(new, now_ns) is Acceptance.ACCEPTED
    np.testing.assert_allclose(schedule.sample(now_ns), before, atol=1e-9)
    after = schedule.sample(now_ns + 1_000_000) - before
    # The speed carries on as well, within what 5 rad/s^2 change in a millisecond.
    np.testing.assert_allclose(after, step, atol=1e-5)
    np.testing.assert_allclose(
        schedule.sample(now_ns + 1_200_000_000), start + 0.5 * 1.2, atol=1e-6
    )


def test_seam_time_of_position_offset_is_the_formula():
    offset, none = np.array([0.1, 0.0]), np.zeros(D)
    v, a, j = 1.5, 2.5, 25.0
    expected = max(1.875 * 0.1 / v, np.sqrt(5.774 * 0.1 / a), np.cbrt(60 * 0.1 / j))
    assert seam_time_s(offset, none, LIMITS, 0.1) == pytest.approx(expected)


def test_blend_none_jumps_for_comparison():
    schedule = _schedule(blend="none")
    schedule.accept(_ramp(start=0.2), T0)
    np.testing.assert_allclose(schedule.sample(T0), 0.2)


def test_ensemble_averages_with_the_oldest_weighing_most():
    schedule = _schedule(blend="ensemble")
    schedule.accept(_ramp(T0, speed=0.0, start=1.0), T0, seam=False)
    schedule.accept(_ramp(T0 + 1, speed=0.0, start=2.0, idx=1), T0 + 1, seam=False)
    w = np.exp(-0.01)
    np.testing.assert_allclose(schedule.sample(T0 + 2), (1.0 + 2.0 * w) / (1.0 + w))


def test_rebase_starts_the_chunk_when_it_arrives():
    schedule = _schedule(rebase=True)
    late_ns = T0 + 3_000_000_000
    assert schedule.accept(_ramp(), late_ns, seam=False) is Acceptance.ACCEPTED
    np.testing.assert_allclose(schedule.sample(late_ns), 0.0, atol=1e-12)
    np.testing.assert_allclose(schedule.sample(late_ns + PERIOD_NS), 0.02, atol=1e-12)


def test_stop_slows_down_within_the_limit_and_holds():
    schedule = _schedule()
    schedule.accept(_ramp(), T0, seam=False)
    schedule.stop(T0, np.array([0.1, 0.2]), np.array([1.0, -0.5]))
    samples = np.array([schedule.sample(T0 + i * 5_000_000) for i in range(200)])
    velocity = np.diff(samples, axis=0) / 0.005
    assert np.abs(np.diff(velocity, axis=0) / 0.005).max() <= 5.0
    assert (velocity[0] > [0.9, -0.51]).all()
    assert np.abs(velocity[-50:]).max() == 0.0
    assert not schedule.active
    assert schedule.chunk_idx == -1


def test_single_row_chunk_is_a_constant():
    schedule = _schedule()
    chunk = Chunk(actions=np.full((1, D), 0.3), t_observed_ns=T0, period_ns=PERIOD_NS)
    # A plan of one row is over the moment it begins.
    assert schedule.accept(chunk, T0 + 1) is Acceptance.EXPIRED
