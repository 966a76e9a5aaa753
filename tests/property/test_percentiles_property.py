"""Percentiles are exact over their window: no spike is remembered for ever, none is forgotten."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from gwp_edge.mailbox import TICK_DTYPE
from gwp_edge.profiling.live import LiveFeed
from gwp_edge.profiling.schema import Summary
from gwp_edge.profiling.stamps import STAMP_DTYPE
from gwp_edge.status import Mode

finite = st.floats(-1e12, 1e12, allow_nan=False)
# Mostly alike, with spikes anywhere: what approximate sketches and running maxima get wrong.
spiky = st.lists(st.sampled_from([1.0, 1.0, 1.0, 1.000001, 1e9, -5.0]), min_size=1, max_size=3000)


@given(st.one_of(st.lists(finite, min_size=1, max_size=300), spiky))
def test_summary_any_series_equals_numpy(values):
    found = Summary.of(values)
    for name, q in (("p50", 50), ("p90", 90), ("p95", 95), ("p99", 99), ("max", 100)):
        assert getattr(found, name) == np.percentile(values, q)
    assert (found.p999 is None) == (len(values) < 1000)
    if found.p999 is not None:
        assert found.p999 == np.percentile(values, 99.9)


@given(st.lists(st.integers(0, 45_000), min_size=1, max_size=400), st.integers(1, 60))
def test_live_feed_in_any_pieces_equals_the_whole(late_us, piece):
    ticks = np.zeros(len(late_us), TICK_DTYPE)
    ticks["mode"] = Mode.RUN
    ticks["t_planned_ns"] = 10**9 + np.arange(len(late_us)) * 5_000_000
    ticks["t_woke_ns"] = ticks["t_planned_ns"] + np.array(late_us) * 1000
    stamps = np.zeros(len(late_us), STAMP_DTYPE)
    stamps["t_published_ns"] = np.array(late_us) * 1000
    feed = LiveFeed()
    for i in range(0, len(ticks), piece):
        feed.take_ticks(ticks[i : i + piece])
        feed.take_stamps(stamps[i : i + piece])
    figures = feed.figures({})
    ordered = np.sort(late_us) / 1e3
    assert figures.lateness.n == figures.chunk.n == len(late_us)
    for q, name in ((0.5, "p50_ms"), (0.99, "p99_ms"), (1.0, "max_ms")):
        assert getattr(figures.lateness, name) == ordered[int(np.ceil(q * len(ordered))) - 1]
        assert getattr(figures.chunk, name) == np.percentile(np.array(late_us) / 1e3, 100 * q)
