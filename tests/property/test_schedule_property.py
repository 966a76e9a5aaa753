"""The schedule for any chunks: no jumps, no repeats, and it always comes to rest."""

import numpy as np
from hypothesis import example, given, settings
from hypothesis import strategies as st

from gwp_edge.schedule import Acceptance, Schedule
from gwp_edge.types import Chunk, JointLimits

PERIOD_NS = 33_333_333
TICK_NS = 5_000_000
D = 3
LIMITS = JointLimits(
    position_min=np.full(D, -3.0),
    position_max=np.full(D, 3.0),
    velocity_max=np.full(D, 3.0),
    acceleration_max=np.full(D, 5.0),
)


def _chunk(seed: int, t_observed_ns: int, *, n_rows: int, offset: float, idx: int) -> Chunk:
    """A smooth plan: a few slow waves about ``offset``."""
    rng = np.random.default_rng(seed)
    t = np.arange(n_rows)[:, None] * PERIOD_NS / 1e9
    actions = offset + sum(
        rng.uniform(-0.1, 0.1, D) * np.sin(rng.uniform(0.5, 3.0, D) * t + rng.uniform(0, 6, D))
        for _ in range(3)
    )
    return Chunk(actions=actions, t_observed_ns=t_observed_ns, period_ns=PERIOD_NS, chunk_idx=idx)


@settings(max_examples=60, deadline=None)
# A used-up plan still in the ensemble when the next one came made a jump of 0.08 rad.
@example(seed=0, n_rows=2, arrivals=[(10, 0, 0.0), (1, 0, 0.0)], blend="ensemble", lead_ms=0)
# The newest plan ended first, was dropped, and the older one was in force again.
@example(
    seed=0,
    n_rows=3,
    arrivals=[(1, 10, 0.0), (14, 14, 0.0), (1, 84, 0.0)],
    blend="ensemble",
    lead_ms=0,
)
@given(
    seed=st.integers(0, 10**6),
    n_rows=st.integers(1, 48),
    arrivals=st.lists(
        st.tuples(st.integers(1, 150), st.integers(0, 300), st.floats(-0.3, 0.3)),
        min_size=1,
        max_size=6,
    ),
    blend=st.sampled_from(["seam", "ensemble"]),
    lead_ms=st.integers(0, 100),
)
def test_schedule_any_arrivals_target_has_no_jump_and_ends_at_rest(
    seed, n_rows, arrivals, blend, lead_ms
):
    schedule = Schedule(LIMITS, blend=blend, lead_ns=lead_ms * 1_000_000)
    start = np.zeros(D)
    schedule.hold(start)
    now_ns, samples, last_idx = 10**9, [start], -1
    for i, (gap_ticks, latency_ms, offset) in enumerate(arrivals):
        chunk = _chunk(
            seed + i, now_ns - latency_ms * 1_000_000, n_rows=n_rows, offset=offset, idx=i
        )
        before = schedule.sample(now_ns)
        result = schedule.accept(chunk, now_ns)
        # At the moment of the change nothing changes.
        np.testing.assert_allclose(schedule.sample(now_ns), before, atol=1e-9)
        if result is Acceptance.ACCEPTED:
            last_idx = i
        assert schedule.chunk_idx == last_idx
        for _ in range(gap_ticks):
            now_ns += TICK_NS
            samples.append(schedule.sample(now_ns))
    for _ in range(800):
        now_ns += TICK_NS
        samples.append(schedule.sample(now_ns))
    velocity = np.diff(np.array(samples), axis=0) / (TICK_NS / 1e9)
    assert np.isfinite(velocity).all()
    # A plan moves at up to 0.9 rad/s here, a seam at half of the 3 rad/s and what it took over.
    assert np.abs(velocity).max() < 5.0
    assert schedule.ended(now_ns)
    assert np.abs(velocity[-100:]).max() < 1e-9


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), n_rows=st.integers(2, 48), latency_ms=st.integers(0, 60))
def test_schedule_row_never_goes_back_or_past_the_end(seed, n_rows, latency_ms):
    schedule = Schedule(LIMITS)
    now_ns = 10**9
    chunk = _chunk(seed, now_ns - latency_ms * 1_000_000, n_rows=n_rows, offset=0.0, idx=0)
    if schedule.accept(chunk, now_ns) is not Acceptance.ACCEPTED:
        return
    rows = [schedule.row(now_ns + i * TICK_NS) for i in range(1000)]
    assert (np.diff(rows) >= 0).all()
    assert rows[-1] == n_rows - 1
    np.testing.assert_allclose(schedule.sample(now_ns + 5 * 10**9), chunk.actions[-1], atol=1e-9)
