"""Figures so far are those of the whole series, and what is shown is them."""

from __future__ import annotations

import dataclasses
import io

import numpy as np
import pytest
from profile_story import MS, Story
from rich.console import Console

from gwp_edge.commands.live_view import LiveView, live_rows
from gwp_edge.profiling.live import LiveFeed, LiveFigures, Spread
from gwp_edge.status import HoldReason, Mode, PolicyPhase, TickFlag


def fed(raw, *, step=7):
    """Feed a run piece by piece, ticks and chunks in turn."""
    feed = LiveFeed(("cam_high",))
    for i in range(0, max(len(raw.ticks), len(raw.stamps)), step):
        feed.take_ticks(raw.ticks[i : i + step])
        feed.take_stamps(raw.stamps[i : i + step])
    return feed.figures({"gpu_c": 61.0, "cpu_c": 55.0, "cpu0_percent": 20.0, "cpu1_percent": 90.0})


def test_live_feed_in_pieces_gives_percentiles_of_the_whole():
    story = Story(n=120)
    story.stages["vision"] += np.random.default_rng(0).gamma(2.0, 3.0, 120)
    story.late = {100: 3.25, 300: 20.0}
    raw = story.raw()
    figures = fed(raw)
    latency = (raw.stamps["t_published_ns"] - raw.stamps["t_observed_ns"]) / 1e6
    assert figures.chunk.n == 120
    assert figures.chunk.p50_ms == np.percentile(latency, 50)
    assert figures.chunk.p99_ms == np.percentile(latency, 99)
    assert figures.chunk.max_ms == latency.max()
    late = np.sort(np.maximum(raw.ticks["t_woke_ns"] - raw.ticks["t_planned_ns"], 0) // 1000) / 1e3
    assert figures.lateness.n == len(late)
    assert figures.lateness.max_ms == pytest.approx(20.05)
    assert figures.lateness.p50_ms == late[int(np.ceil(0.5 * len(late))) - 1]
    assert figures.lateness.p99_ms == late[int(np.ceil(0.99 * len(late))) - 1]
    assert figures.n_missed == story.report().motor.n_missed == 3
    assert (figures.hottest, figures.busiest_percent) == (("gpu", 61.0), 90.0)


def test_live_feed_hold_in_between_is_no_missed_period():
    raw = Story().raw()
    raw.ticks["mode"][200:300] = int(Mode.HOLD)
    assert fed(raw).n_missed == 0


def test_live_feed_counts_interventions_and_lost_frames():
    raw = Story(n=60, every=100 / 3).raw()
    raw.ticks["flags"][:30] |= int(TickFlag.VELOCITY)
    raw.ticks["flags"][:5] |= int(TickFlag.NOT_SENT)
    # Every frame is waited for, and three numbers never come: the loop begins a period later.
    number = np.delete(np.arange(63), [10, 20, 30])
    shift = number * round(100 / 3 * MS) - (
        raw.stamps["t_observed_ns"] - raw.stamps["t_observed_ns"][0]
    )
    raw.stamps["frame_idx"][:, 0] = number
    for name in ("t_observed_ns", "t_started_ns", "t_built_ns", "t_predicted_ns", "t_published_ns"):
        raw.stamps[name] += shift
    for name in ("t_captured_ns", "t_received_ns"):
        raw.stamps[name][:, 0] += shift
    raw.stamps["t_looked_ns"] = raw.stamps["t_started_ns"] - 3 * MS
    raw.stamps["looked_idx"][1:, 0] = number[:-1]
    figures = fed(raw)
    assert (figures.n_limited, figures.n_not_sent) == (30, 5)
    missing, due = figures.missing["cam_high"]
    assert 2 <= missing <= 3, "the last ones may still wait to be judged"
    assert due >= 30


def test_live_feed_before_anything_knows_nothing():
    figures = LiveFeed(("cam",)).figures({})
    assert (figures.chunk, figures.lateness, figures.hottest) == (None, None, None)
    assert live_rows(figures, None, 1.0) == [("time", "1 s")]


class Status:
    """As much of a run's status as is shown."""

    run_s, mode, n_ticks, n_missed, events = 3.25, Mode.RUN, 650, 2, ()
    hold_reason, phase = HoldReason.NONE, PolicyPhase.RUNNING


FIGURES = LiveFigures(
    chunk=Spread(n=90, p50_ms=30.0, p99_ms=41.5, max_ms=60.0),
    lateness=Spread(n=650, p50_ms=0.07, p99_ms=0.5, max_ms=2.0),
    n_ticks=640,
    n_missed=2,
    n_limited=3,
    n_not_sent=0,
    missing={"cam_high": (1, 88)},
    hottest=("gpu", 61.0),
    busiest_percent=92.0,
)


@pytest.fixture
def clock(monkeypatch):
    now = [100.0]
    monkeypatch.setattr("gwp_edge.commands.live_view.time.monotonic", lambda: now[0])
    return now


def test_live_view_without_a_terminal_prints_plain_lines_now_and_then(clock, capsys):
    with LiveView(Console(file=io.StringIO())) as view:
        view.progress("machine limits", 0, 6)
        view.progress("machine limits", 1, 6)
        view.take(FIGURES)
        for _ in range(24):
            clock[0] += 0.5
            view(Status())
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "machine limits ..."
    assert len(lines) == 3
    for words in ("p50 30.00, p99 41.50", "2 of 640 periods missed", "cam_high 1 of 88",
                  "3 ticks limited", "gpu 61 C", "3.2 s, RUN"):  # fmt: skip
        assert words in lines[1]
    assert "\x1b" not in "".join(lines)


def test_live_view_on_a_terminal_draws_in_place_at_most_four_times_a_second(clock):
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=120, height=30)
    with LiveView(console) as view:
        view.take(FIGURES)
        for _ in range(40):
            clock[0] += 0.05
            view(Status())
    assert 6 <= out.getvalue().count("p50 30.00") <= 10
    assert "\x1b" in out.getvalue()


def test_live_rows_mark_a_lateness_that_was_cut_off():
    """The view counts up to 50 ms, and showed a loop that was a second late as 50.00."""
    late = dataclasses.replace(FIGURES.lateness, max_ms=50.0)
    rows = dict(live_rows(dataclasses.replace(FIGURES, lateness=late), Status(), 1.0))
    assert "p99 0.50, max 50 or more ms" in rows["motor late"]
    assert "or more" not in rows["frame to chunk"]


def test_live_view_of_the_engine_alone_draws_when_figures_come(clock, capsys):
    with LiveView(Console(file=io.StringIO()), draw_taken=True) as view:
        clock[0] += 6.0
        view.take(FIGURES)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("time: 6 s; prediction: p50 30.00")
    assert "motor" not in line
