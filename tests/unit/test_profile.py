"""Profiles from made-up stamps and ticks, where every answer is known beforehand."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest
from profile_story import MS, PERIOD, SPEC, T0, Story, verdict

from gwp_edge.errors import SpecError
from gwp_edge.profiling.cameras import camera_reports
from gwp_edge.profiling.chunks import chunk_table
from gwp_edge.profiling.compare import (
    read_report,
)
from gwp_edge.profiling.html_report import to_html
from gwp_edge.profiling.schema import Summary
from gwp_edge.status import Mode, TickFlag

# -- percentiles


@pytest.mark.parametrize(
    "values",
    [
        [3.0],
        [1.0] * 999 + [1e6],
        [1e6] + [1.0] * 5000,
        list(range(2000, 0, -1)),
        [0.0, -1.0, 1e-12, 1e12] * 300,
        [float("nan"), 2.0, 4.0, float("nan")],
    ],
)
def test_summary_adversarial_series_equals_numpy(values):
    array = np.array([v for v in values if v == v])
    found = Summary.of(values)
    assert found.n == len(array)
    for name, q in (("p50", 50), ("p90", 90), ("p95", 95), ("p99", 99)):
        assert getattr(found, name) == np.percentile(array, q)
    assert found.max == array.max()
    assert (found.p999 is None) == (len(array) < 1000)
    if found.p999 is not None:
        assert found.p999 == np.percentile(array, 99.9)


def test_summary_without_values_is_none():
    assert Summary.of([]) is None
    assert Summary.of([float("nan")]) is None


# -- chunks


def test_chunk_table_segments_add_up_to_frame_to_command():
    table = chunk_table(Story().raw(), SPEC, warmup_s=0.0).steady
    known = ~np.isnan(table.frame_to_command)
    assert known.sum() > 50
    np.testing.assert_allclose(
        table.segments[known].sum(axis=1), table.frame_to_command[known], atol=1e-9
    )
    assert np.allclose(table.segment("vision"), 8.0)
    assert np.allclose(table.segment("denoise"), 2.0)
    assert np.allclose(table.segment("frame age"), 5.0)
    assert np.allclose(table.segment("guide"), 0.3)
    assert np.nanmax(table.interval) == pytest.approx(50.0, abs=5.1)


def test_chunk_table_commands_that_were_not_sent_are_no_first_command():
    raw = Story().raw()
    raw.ticks["flags"] |= int(TickFlag.NOT_SENT)
    table = chunk_table(raw, SPEC, warmup_s=0.0)
    assert np.isnan(table.frame_to_command).all()
    assert not np.isnan(table.age).all()


def test_chunk_table_first_call_is_cold_and_warm_up_is_kept_apart():
    raw = Story().raw()
    raw.stamps["chunk_idx"][:3] = (-1, -2, -3)
    raw.ticks["chunk_idx"][raw.ticks["chunk_idx"] < 3] = -1
    table = chunk_table(raw, SPEC, warmup_s=1.0)
    assert list(table.phase[:4]) == [0, 1, 1, 1]
    assert (table.phase == 2).sum() == (table.t_ns >= raw.ticks["t_woke_ns"][0] + 1000 * MS).sum()


# -- verdicts


def test_report_even_story_has_no_tail_and_keeps_rate():
    report = Story().report()
    assert report.tail.group is None
    assert verdict(report, "rate").level == "good"
    assert verdict(report, "motor").level == "good"
    assert verdict(report, "stage").blames == "vision"
    assert not [v for v in report.verdicts if v.topic == "camera"]


def test_report_slow_prefill_is_the_stage_worth_work():
    story = Story(every=80.0)
    story.stages["prefill"] += 40.0
    assert verdict(story.report(), "stage").blames == "prefill"


def test_report_rare_slow_prefill_is_the_tail_of_the_engine():
    story = Story(every=80.0)
    story.stages["prefill"][[20, 40, 55]] += 40.0
    # Common and harmless: it makes no tail, although it costs more in all.
    story.stages["vision"][:29] += 6.0
    report = story.report()
    assert (report.tail.group, report.tail.segment) == ("engine", "prefill")
    assert verdict(report, "tail").blames == "engine"
    assert report.tail.excess_ms == pytest.approx(40.0, abs=6.0)


def test_report_old_frames_are_the_tail_of_the_camera():
    story = Story()
    story.age[[20, 40, 55]] += 33.0
    report = story.report()
    assert (report.tail.group, report.tail.segment) == ("camera", "frame age")


def test_report_slow_sends_are_the_tail_of_the_bus():
    story = Story()
    raw = story.raw()
    first = [int(np.flatnonzero(raw.ticks["chunk_idx"] == k)[0]) for k in (20, 40, 55)]
    story.send = dict.fromkeys(first, 9.0)
    report = story.report()
    assert (report.tail.group, report.tail.segment) == ("bus", "send")


def test_report_motor_stall_is_blamed_on_the_loop():
    story = Story()
    story.late = {100: 20.0, 300: 20.0}
    report = story.report()
    assert report.motor.tail == "loop"
    # Woken 20 ms late, 20.2 ms until sent: deadlines at 5, 10 and 15 ms were given up.
    assert report.motor.n_missed == 6
    assert report.motor.longest_miss == 3
    assert report.motor.n_long_gaps == 2
    assert verdict(report, "motor").blames == "loop"
    assert verdict(report, "motor").level == "bad"


def test_report_jitter_that_skips_no_deadline_is_no_missed_period():
    """Every third tick woke 2.7 ms late and every deadline was met, yet "333 of 1002 missed".

    The report took any gap above 1.5 periods for a missed period; the loop skips one only when it
    is behind by more than a period.
    """
    story = Story()
    story.late = dict.fromkeys(range(0, 2000, 3), 2.7)
    raw = story.raw()
    assert set(np.diff(raw.ticks["t_planned_ns"])) == {5 * MS}
    motor = story.report().motor
    assert (motor.n_missed, motor.longest_miss) == (0, 0)
    assert motor.n_long_gaps == pytest.approx(len(raw.ticks) / 3, abs=1)
    assert verdict(story.report(), "motor").level == "good"
    assert "skipped no deadline" in verdict(story.report(), "motor").text


def test_report_two_causes_of_long_gaps_are_both_named():
    story = Story()
    story.late = {k: 12.0 for k in (100, 200, 300)}
    story.send = dict.fromkeys((150, 250, 350), 14.0)
    found = verdict(story.report(), "motor")
    assert "look at the bus" in found.text
    assert "real-time priority" in found.text
    assert found.text.index("real-time priority") < found.text.index("look at the bus")
    assert found.blames == "loop"


def test_report_slow_bus_is_blamed_on_the_bus():
    story = Story()
    story.send = dict.fromkeys(range(50, 500, 50), 12.0)
    report = story.report()
    assert report.motor.tail == "bus"
    assert verdict(report, "motor").blames == "bus"


def test_report_hold_in_between_is_no_missed_period():
    story = Story()
    raw = story.raw()
    raw.ticks["mode"][200:300] = int(Mode.HOLD)
    story.raw = lambda: raw
    assert story.report().motor.n_missed == 0


def test_report_slow_engine_cannot_keep_the_rate():
    story = Story(n=40, every=1500.0)
    story.stages["vision"] += 1400.0
    report = story.report()
    assert verdict(report, "rate").level == "bad"
    assert report.budget.left_ms < 0


def test_report_without_chunks_says_so():
    report = Story(n=40).report(warmup_s=100.0)
    assert verdict(report, "rate").level == "bad"
    assert "no chunk" in verdict(report, "rate").text


@pytest.mark.parametrize("every_frame", [True, False])
def test_camera_reports_complete_frames_miss_nothing(every_frame):
    """A loop slower than its camera skips frames; that is nobody's loss."""
    story = Story(n=60, every=71.0)
    story.stages["vision"] += 54.0
    number = np.floor(np.arange(60) * 71.0 / (PERIOD / MS)).astype(int)
    story.frame_idx = number
    story.age = np.arange(60) * 71.0 - number * PERIOD / MS + 2.5
    found = camera_reports(story.raw(), ("cam",), warmup_s=0.0, every_frame=every_frame)[0]
    assert found.n_missing == 0
    assert found.n_expected >= 50
    assert found.period_ms == pytest.approx(33.33, abs=0.01)


def test_camera_reports_lost_frames_are_counted():
    """The loop waits for each frame; five never come, so it begins one period later."""
    number = np.delete(np.arange(65), [10, 20, 30, 31, 50])
    raw = Story(n=60).raw()
    raw.stamps["frame_idx"][:, 0] = number
    shift = number * PERIOD + T0 - raw.stamps["t_observed_ns"]
    for name in (
        "t_observed_ns", "t_started_ns", "t_built_ns", "t_predicted_ns", "t_published_ns",
    ):  # fmt: skip
        raw.stamps[name] += shift
    for name in ("t_captured_ns", "t_received_ns"):
        raw.stamps[name][:, 0] += shift
    raw.ticks["t_woke_ns"][-1] = raw.stamps["t_published_ns"][-1] + MS
    found = camera_reports(raw, ("cam",), warmup_s=0.0, every_frame=True)[0]
    assert (found.n_missing, found.n_expected) == (5, 64)


# -- files


def test_report_survives_json_and_page_holds_it(tmp_path):
    report = Story().report()
    path = tmp_path / "p.json"
    path.write_bytes(msgspec.json.encode(report))
    assert read_report(path) == report
    hostile = msgspec.structs.replace(report, faults=("</script><b>&",))
    page = to_html(hostile)
    assert "</script><b>" not in page
    assert page.count("<script") == 2
    assert "http" not in page.split('id="report"')[0].split("<meta")[1]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"{", "is no report"),
        (b"[]", "is no report"),
        (b'{"schema": "gwp-edge.run", "schema_version": 1}', "gwp-edge.run"),
        (b'{"schema": "gwp-edge.profile", "schema_version": 99}', "99"),
        (b'{"schema": "gwp-edge.profile", "schema_version": 2}', "measure again"),
    ],
)
def test_read_report_of_something_else_is_refused(tmp_path, content, words):
    path = tmp_path / "p.json"
    path.write_bytes(content)
    with pytest.raises(SpecError, match=words):
        read_report(path)
