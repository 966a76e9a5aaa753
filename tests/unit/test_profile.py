"""Profiles from made-up stamps and ticks, where every answer is known beforehand."""

from __future__ import annotations

import dataclasses
import re

import msgspec
import numpy as np
import pytest
from profile_story import MS, PERIOD, SPEC, Story, moving_arm, report_of, verdict

from gwp_edge.commands.profiling_tables import say_report
from gwp_edge.errors import SpecError
from gwp_edge.profiling.chunks import chunk_table
from gwp_edge.profiling.html_report import to_html
from gwp_edge.profiling.reports import read_report
from gwp_edge.profiling.schema import Summary
from gwp_edge.profiling.system_sampler import SystemSamples
from gwp_edge.status import TickFlag

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
        np.nansum(table.segments[known], axis=1), table.frame_to_command[known], atol=1e-9
    )
    assert np.allclose(table.segment("vision"), 8.0)
    assert np.allclose(table.segment("denoise"), 2.0)
    assert np.allclose(table.segment("transport"), 2.0)
    assert np.allclose(table.segment("frame wait"), 3.0)
    assert np.isnan(table.segment("frame age")).all()
    assert np.allclose(table.segment("guide"), 0.3)
    assert np.allclose(table.segment("unaccounted"), 0.3)
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


def test_report_frames_long_on_their_way_are_the_tail_of_the_camera():
    story = Story()
    story.age[[20, 40, 55]] += 33.0
    story.transport = np.full(60, 2.0)
    story.transport[[20, 40, 55]] += 33.0
    report = story.report()
    assert (report.tail.group, report.tail.segment) == ("camera", "transport")
    assert verdict(report, "tail").blames == "camera"


def out_of_step(transport):
    """A perfect camera at 30 Hz, 2.5 ms to arrive, and a loop of 41 ms that never varies."""
    story = Story(n=200, every=41.0)
    started = np.arange(200) * 41.0
    story.frame_idx = np.floor((started - 2.5) / (PERIOD / MS)).astype(int)
    story.age = started - story.frame_idx * PERIOD / MS
    story.transport = transport
    return story.report()


def test_report_loop_out_of_step_with_a_perfect_camera_does_not_blame_the_camera():
    """A constant camera and a constant engine got "90 % of that is the camera, mostly frame age".

    The age of a frame holds the wait for the end of the inference before; only the way from the
    capture to its arrival is the camera's.
    """
    report = out_of_step(2.5)
    assert (report.tail.group, report.tail.segment) == ("phase", "frame wait")
    assert verdict(report, "tail").blames == "phase"
    assert report.tail.by_group["camera"] == pytest.approx(0.0, abs=1e-6)
    assert report.cameras[0].transport_ms.max == pytest.approx(2.5)


def test_report_camera_that_is_asked_is_not_blamed_for_the_age_of_its_frames():
    """Its frame is received when it is asked for, so delay and wait cannot be told apart."""
    report = out_of_step(None)
    assert (report.tail.group, report.tail.segment) == ("undivided", "frame age")
    assert verdict(report, "tail").blames is None
    assert "cannot be told" in verdict(report, "tail").text
    assert report.cameras[0].transport_ms is None


def test_report_time_between_the_stages_is_not_called_guidance():
    """With burners beside it a profile said "90 % engine, mostly guide", and nothing was guided.

    What no stage accounts for was called guide, while guidance itself was part of preprocess.
    """
    story = Story()
    story.rest = np.full(60, 0.3)
    story.rest[[20, 40, 55]] += 30.0
    report = story.report()
    assert (report.tail.group, report.tail.segment) == ("unaccounted", "unaccounted")
    assert verdict(report, "tail").blames is None
    assert "was not run, or waited" in verdict(report, "tail").text


@pytest.mark.parametrize(("more_cpu", "said"), [(0.0, True), (40.0, False)])
def test_report_slow_predictions_that_computed_no_longer_are_said_to_have_waited(more_cpu, said):
    story = Story(every=80.0)
    slow = [20, 40, 55]
    story.stages["prefill"][slow] += 40.0
    story.cpu = np.full(60, 12.0)
    story.cpu[slow] += more_cpu
    assert ("was not run" in verdict(story.report(), "tail").text) == said


def test_report_slow_sends_are_the_tail_of_the_bus():
    story = Story()
    raw = story.raw()
    first = [int(np.flatnonzero(raw.ticks["chunk_idx"] == k)[0]) for k in (20, 40, 55)]
    story.send = dict.fromkeys(first, 9.0)
    report = story.report()
    assert (report.tail.group, report.tail.segment) == ("bus", "send")


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


def test_report_runs_are_pooled_for_every_camera():
    """With --repeat the transport was the last run's, beside counts of all runs."""
    stories = [Story(), Story()]
    stories[0].transport, stories[1].transport = 1.0, 3.0
    report = report_of([s.raw() for s in stories])
    assert report.cameras[0].transport_ms.n == report.cameras[0].n_used
    assert report.cameras[0].transport_ms.mean == pytest.approx(2.0)
    assert report.chunks.run.count(1) == 60


def test_tables_print_what_is_in_the_report(capsys, monkeypatch):
    """Used-up plans, limits, missing sends and rows were in the JSON and nowhere else."""
    monkeypatch.setenv("COLUMNS", "200")
    raw = moving_arm(80)
    raw.ticks["flags"][:9] |= int(TickFlag.WORKSPACE)
    raw.ticks["flags"][:3] |= int(TickFlag.NOT_SENT)
    say_report(report_of([raw]))
    out = " ".join(capsys.readouterr().out.split())
    for words in (
        "3 ticks without a command", "workspace 9", "at the end of a plan", "are executed",
        "motion after command", "lost in them",
    ):  # fmt: skip
        assert words in out


@pytest.mark.parametrize(
    ("n_on_device", "words"),
    [(60, "every chunk was one launch"), (0, "no chunk was one launch"), (20, "for 20 chunks")],
)
def test_report_says_how_an_engine_that_can_do_either_was_timed(n_on_device, words):
    """Of TensorRT it said "events where ..., else a wait" and left the reader to guess."""
    raw = Story().raw()
    raw.stamps["device_timed"][:n_on_device] = 1
    assert words in report_of([raw], engine="trt", provider=None).context.synchronised
    ort = report_of([raw]).context
    assert ort.synchronised.startswith("calls return"), "this one can do one thing only"


def test_report_sync_execution_says_how_long_the_arm_stands():
    """Plans that are meant to run out got "no, not at 30 Hz: 727 ms too long", for the engine."""
    plan_ms = (SPEC.n_rows - 1) * SPEC.period_ns / 1e6
    story = Story(n=40, every=plan_ms + 200.0)
    found = verdict(story.report(execution="sync"), "rate")
    assert (found.level, found.blames) == ("good", None)
    assert re.search(r"stands (19\d|20\d) ms", found.text)
    assert verdict(story.report(execution="soft"), "rate").level == "bad"


def test_report_rate_is_no_plain_yes_where_the_motor_loop_is_late():
    story = Story()
    story.late = {100: 20.0, 300: 20.0}
    found = verdict(story.report(), "rate")
    assert found.level == "warn"
    assert "motor loop" in found.text


def loaded(total, own, n_cores=2):
    """A story on a machine whose cores were busy, by whom."""
    story = Story()
    raw = story.raw()
    cores = {f"cpu{i}_percent": total / n_cores for i in range(n_cores)}
    row = {**cores, "policy_cpu_percent": own - 10.0, "helpers_cpu_percent": 10.0}
    times = [int(t) for t in raw.stamps["t_started_ns"][::10]]
    system = SystemSamples(t_ns=times, rows=[row] * len(times))
    raw = dataclasses.replace(raw, system=system)
    story.raw = lambda: raw
    return story.report()


def test_report_other_programs_on_a_full_machine_qualify_what_is_said_of_the_engine():
    """With four burners beside it: "denoise is worth work first", and not a word of them."""
    report = loaded(total=195.0, own=60.0)
    assert report.system.load.others_percent == pytest.approx(135.0)
    assert verdict(report, "machine").level == "warn"
    assert verdict(report, "machine").blames == "others"
    assert "not the robot's alone" in verdict(report, "stage").text


@pytest.mark.parametrize(("total", "own"), [(195.0, 190.0), (60.0, 58.0)])
def test_report_run_that_has_the_machine_for_itself_gets_no_word_about_it(total, own):
    report = loaded(total, own)
    assert not [v for v in report.verdicts if v.topic == "machine"]
    assert "robot's alone" not in verdict(report, "stage").text


def test_report_other_programs_beside_free_cores_are_told_but_excuse_nothing():
    report = loaded(total=300.0, own=150.0, n_cores=8)
    assert verdict(report, "machine").level == "good"
    assert "memory" in verdict(report, "machine").text
    assert "robot's alone" not in verdict(report, "stage").text


def test_chunk_table_golden_run_is_the_cold_call():
    """The golden run of the preflight came first and had no stamp.

    So "the first prediction took 65 ms, 2.1 times the usual" was said of a call that was warm.
    """
    raw = Story().raw()
    raw.stamps["chunk_idx"][:3] = (-1, -2, -3)
    raw.stamps["n_cameras"][0] = 0
    table = chunk_table(raw, SPEC, warmup_s=0.0)
    assert list(table.phase[:3]) == [0, 1, 1]
    assert np.isnan(table.frame_to_chunk[0])
    assert not np.isnan(table.predict[0])
    assert np.isnan(table.segment("transport")[0])
    assert not np.isnan(table.segment("transport")[1])


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
        (b'{"schema": "gwp-edge.profile", "schema_version": 3}', "version 3"),
        (b'{"schema": "gwp-edge.profile", "schema_version": 4}', "measure again"),
    ],
)
def test_read_report_of_something_else_is_refused(tmp_path, content, words):
    path = tmp_path / "p.json"
    path.write_bytes(content)
    with pytest.raises(SpecError, match=words):
        read_report(path)
