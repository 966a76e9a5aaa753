"""Profiles from made-up stamps and ticks, where every answer is known beforehand."""

from __future__ import annotations

import json
import types

import msgspec
import numpy as np
import pytest

from gwp_edge.drivers.disturbed import DisturbedCamera
from gwp_edge.errors import SpecError
from gwp_edge.machine_limits import GemmRate, Limits, describe_machine
from gwp_edge.mailbox import TICK_DTYPE, command_dtype, state_dtype
from gwp_edge.profiling.build import build_report
from gwp_edge.profiling.cameras import camera_reports
from gwp_edge.profiling.chunks import chunk_table
from gwp_edge.profiling.collect import Listener
from gwp_edge.profiling.columns import SEGMENTS
from gwp_edge.profiling.compare import (
    compare,
    failed_gates,
    main_quantity,
    parse_gate,
    read_report,
)
from gwp_edge.profiling.context import make_context
from gwp_edge.profiling.cost import measure_cost
from gwp_edge.profiling.disturb import disturbed_robot, parse_disturbances
from gwp_edge.profiling.html_report import to_html
from gwp_edge.profiling.jetson_stats import parse_tegrastats
from gwp_edge.profiling.raw import Raw
from gwp_edge.profiling.roofline import cached_limits
from gwp_edge.profiling.schema import Summary
from gwp_edge.profiling.stamps import MAX_CAMERAS, MAX_STEPS, STAMP_DTYPE
from gwp_edge.profiling.system_sampler import SystemSampler
from gwp_edge.profiling.trace import to_trace
from gwp_edge.robots import load_robot
from gwp_edge.status import Mode, TickFlag
from gwp_edge.testing import make_spec

MS = 1_000_000
PERIOD = 33 * MS + 333_333
T0 = 5_000 * MS
STAGES = {"preprocess": 1.0, "vision": 8.0, "prefill": 4.0, "postprocess": 0.5}
SPEC = make_spec()


class Story:
    """Writes what a run would have written: a chunk every ``every`` ms, ticks at 200 Hz."""

    def __init__(self, n=60, *, every=50.0, steps=(1.0, 1.0), age=5.0):
        self.n, self.every, self.steps = n, every, steps
        self.stages = {name: np.full(n, ms) for name, ms in STAGES.items()}
        self.age = np.full(n, age)
        self.late = {}  # tick number: ms
        self.send = {}
        self.frame_idx = None

    def raw(self):
        stamps = np.zeros(self.n, STAMP_DTYPE)
        published = np.zeros(self.n)
        for i in range(self.n):
            started = i * self.every
            total = sum(v[i] for v in self.stages.values()) + sum(self.steps)
            predicted = started + 0.2 + 0.3 + total
            published[i] = predicted + 0.1
            stamps[i] = self._stamp(i, started, predicted, published[i])
        return Raw(
            stamps=stamps,
            ticks=self._ticks(stamps),
            states=np.empty(0, state_dtype(SPEC.n_channels)),
            commands=np.empty(0, command_dtype(SPEC.n_channels)),
        )

    def _stamp(self, i, started, predicted, published):
        def ns(ms):
            return T0 + round(ms * MS)

        captured = ns(started - self.age[i])
        idx = i if self.frame_idx is None else self.frame_idx[i]
        rest = (0,) * (MAX_STEPS - len(self.steps))
        cameras = (0,) * (MAX_CAMERAS - 1)
        stages = {k: round(v[i] * MS) for k, v in self.stages.items()}
        return (
            i, 1, len(self.steps), 0, captured, captured, ns(started), ns(started + 0.2),
            ns(predicted), ns(published), stages["preprocess"], stages["vision"],
            stages["prefill"], stages["postprocess"], 0,
            tuple(round(s * MS) for s in self.steps) + rest,
            (captured, *cameras), (captured + 2 * MS, *cameras), (idx, *cameras),
            (3, *cameras),
        )  # fmt: skip

    def _ticks(self, stamps):
        rows, planned, k = [], T0, 0
        end = int(stamps["t_published_ns"][-1]) + 40 * MS
        while planned < end:
            woke = planned + round((0.05 + self.late.get(k, 0.0)) * MS)
            send = round(self.send.get(k, 0.05) * MS)
            sent = woke + MS // 10 + send
            newest = int(np.searchsorted(stamps["t_published_ns"], woke)) - 1
            observed = int(stamps["t_observed_ns"][newest]) if newest >= 0 else 0
            rows.append(
                (planned, woke, sent, woke - MS, observed, newest, 1.0, 0, int(Mode.RUN), send)
            )
            planned = planned + 5 * MS if sent < planned + 10 * MS else sent
            k += 1
        return np.array(rows, TICK_DTYPE)

    def report(self, **context):
        given = {
            "manifest": None, "bundle": None, "robot": "story", "engine": "ort",
            "provider": "cpu", "threads": 1, "motor_hz": 200.0, "duration_s": 3.0,
            "warmup_s": 0.0,
        }  # fmt: skip
        made = make_context(SPEC, describe_machine(), **{**given, **context})
        return build_report([self.raw()], SPEC, made, cameras=("cam_high",))


def verdict(report, topic):
    return next(v for v in report.verdicts if v.topic == topic)


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
    assert report.motor.n_missed == 8
    assert report.motor.longest_miss == 4
    assert verdict(report, "motor").blames == "loop"
    assert verdict(report, "motor").level == "bad"


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


def test_trace_names_processes_and_leads_from_frame_to_command():
    raw = Story().raw()
    report = Story().report()
    events = json.loads(json.dumps(to_trace(raw, SPEC, report.context)))["traceEvents"]
    names = {e["args"]["name"] for e in events if e["ph"] == "M" and "name" in e["args"]}
    assert {"policy process", "motor process", "stages", "ticks"} <= names
    flows = [e for e in events if e.get("id") == 7 and e["ph"] in "stf"]
    assert [e["ph"] for e in flows] == ["s", "t", "f"]
    assert flows[0]["ts"] < flows[1]["ts"] < flows[2]["ts"]
    ticks = [e for e in events if e["name"] == "tick"]
    end = flows[2]["ts"]
    assert any(t["ts"] <= end <= t["ts"] + t["dur"] for t in ticks), "the arrow must hit a tick"
    assert all(e["dur"] >= 0 for e in events if e["ph"] == "X")
    assert sum(e["ph"] == "C" for e in events) == len(ticks)


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


# -- compare


def noisy(seed, slower=0.0, n=300):
    rng = np.random.default_rng(seed)
    story = Story(n=n)
    story.stages["vision"] += rng.gamma(2.0, 0.5, n)
    story.stages["prefill"] += slower
    return story.report()


def test_compare_equal_profiles_passes_a_gate():
    before, after = noisy(1), noisy(2)
    found = compare(before, after)
    assert failed_gates([parse_gate("p99=5%")], found, main_quantity(after)) == []
    vision = next(d for d in found if (d.quantity, d.statistic) == ("vision", "p50"))
    assert vision.verdict == "no difference shown"
    assert vision.low_percent <= 0 <= vision.high_percent


def test_compare_slower_prefill_fails_its_gate():
    before, after = noisy(1), noisy(2, slower=2.0)
    found = compare(before, after)
    prefill = next(d for d in found if (d.quantity, d.statistic) == ("prefill", "p50"))
    assert prefill.verdict == "slower"
    assert prefill.change_percent == pytest.approx(50.0)
    lines = failed_gates([parse_gate("prefill:p50=3%")], found, "frame to command")
    assert len(lines) == 1
    assert "prefill p50" in lines[0]
    assert failed_gates([parse_gate("prefill:p50=60%")], found, "frame to command") == []


def test_compare_gate_without_enough_chunks_is_an_error_not_a_pass():
    found = compare(noisy(1, n=50), noisy(2, n=50))
    with pytest.raises(SpecError, match="100 chunks"):
        failed_gates([parse_gate("p99=5%")], found, "frame to command")
    with pytest.raises(SpecError, match="no p50 of"):
        failed_gates([parse_gate("nonsense:p50=5%")], found, "frame to command")


@pytest.mark.parametrize("text", ["p99", "p99=5", "p98=5%", "p99=-5%", "=5%", ""])
def test_parse_gate_of_bad_text_is_refused(text):
    with pytest.raises(SpecError, match="--fail-on"):
        parse_gate(text)


# -- disturbances


def test_parse_disturbances_reads_every_form():
    found = parse_disturbances(
        ["prefill=40ms", "denoise=5.5ms@10%", "drop=10%", "bus=3ms@5%", "stall=20ms/1s", "cpu=2"]
    )
    assert found.stages == {"prefill": (40.0, 1.0), "denoise": (5.5, 0.1)}
    assert (found.drop, found.bus, found.stall) == (0.1, (3.0, 0.05), (20.0, 1.0))
    assert found.n_burners == 2


@pytest.mark.parametrize(
    "text",
    ["prefill", "prefill=40", "prefill=40ms@200%", "drop=0%", "drop=100%", "stall=60ms/1s",
     "stall=20ms", "cpu=0", "sleep=3ms", ""],
)  # fmt: skip
def test_parse_disturbances_of_bad_text_is_refused(text):
    with pytest.raises(SpecError, match="--disturb"):
        parse_disturbances([text])


def test_disturbed_robot_real_arm_is_refused():
    robot = load_robot("piper", SPEC)
    with pytest.raises(SpecError, match="simulated"):
        disturbed_robot(robot, parse_disturbances(["cpu=1"]))
    assert disturbed_robot(robot, parse_disturbances([])) is robot


def test_disturbed_camera_gives_the_frame_before_the_lost_one():
    frames = iter([types.SimpleNamespace(frame_idx=i) for i in range(200)])
    camera = DisturbedCamera(types.SimpleNamespace(latest=lambda: next(frames)), 0.3)
    seen = [camera.latest().frame_idx for _ in range(200)]
    assert seen == sorted(seen)
    assert 100 < len(set(seen)) < 180


# -- system, cost, limits


class FakeSystem:
    """Two cores, one sensor, one cooler, one bus."""

    python_version = (3, 11)

    def __init__(self):
        self.files = {
            "/proc/stat": "cpu  9 9 9 9\ncpu0 100 0 100 800 0 0 0 0 0 0\nintr 5",
            "/proc/meminfo": "MemTotal: 9 kB\nMemAvailable: 2048 kB",
            "/proc/7/stat": "7 (a (b) c) S 1 1 1 0 -1 0 10 0 2 0 50 50 0 0 20 0 1 0 5 9 256 0",
            "/sys/class/thermal/thermal_zone0/temp": "45500",
            "/sys/class/thermal/thermal_zone0/type": "gpu-thermal",
            "/sys/class/thermal/cooling_device0/cur_state": "2",
            "/sys/class/thermal/cooling_device0/type": "cpu-throttle",
            "/sys/class/net/can0/statistics/tx_dropped": "3",
        }

    def read(self, path):
        return self.files.get(path)

    def glob(self, pattern):
        folders = {p.rsplit("/", 1)[0] for p in self.files}
        stem = pattern.split("*")[0].split("[")[0]
        return sorted(f for f in folders if f.startswith(stem) and "*" in pattern)

    def run(self, *argv):
        return None

    def probe(self, name):
        return None


def test_system_sampler_reads_load_memory_heat_and_bus():
    system = FakeSystem()
    sampler = SystemSampler(system, jetson=False)
    sampler.pids = {"motor": 7, "policy": 0, "gone": 99}
    sampler.sample()
    system.files["/proc/stat"] = "cpu0 175 0 100 825 0 0 0 0 0 0"
    system.files["/proc/7/stat"] = (
        "7 (a (b) c) S 1 1 1 0 -1 0 15 0 3 0 60 50 0 0 20 0 1 0 5 9 256 0"
    )
    sampler.sample()
    found = sampler.samples()
    first, second = found.rows
    assert "cpu0_percent" not in first
    assert second["cpu0_percent"] == pytest.approx(75.0)
    assert second["MemAvailable_mb"] == 2.0
    assert second["gpu-thermal_c"] == 45.5
    assert second["can0_tx_dropped"] == 3
    assert (second["motor_minor_faults"], second["motor_major_faults"]) == (5, 1)
    assert second["motor_rss_mb"] > 0
    assert not any(k.startswith(("policy", "gone")) for k in second)
    assert found.throttled == ("cpu-throttle",)


def test_parse_tegrastats_reads_documented_fields():
    line = (
        "11-23-2026 10:00:00 RAM 3500/30536MB (lfb 5x4MB) CPU [12%@1728,off] EMC_FREQ 12%@3199 "
        "GR3D_FREQ 45%@[1300,1300] cpu@46.5C gpu@-256C tj@48C VDD_GPU_SOC 2400mW/2380mW"
    )
    assert parse_tegrastats(line) == {
        "gpu_percent": 45.0, "gpu_mhz": 1300.0, "emc_percent": 12.0, "emc_mhz": 3199.0,
        "cpu_c": 46.5, "tj_c": 48.0, "VDD_GPU_SOC_w": 2.4,
    }  # fmt: skip
    assert parse_tegrastats("") == {}


def test_measure_cost_leaves_nothing_behind():
    stamp_us, tick_us = measure_cost(SPEC)
    assert stamp_us > 0
    assert tick_us > 0


def test_cached_limits_measures_once(tmp_path, monkeypatch):
    calls = []
    limits = Limits(threads=1, gemm=(GemmRate(shape=(1, 1, 1), gflop_s=2.0),), stream_gb_s=1.0)

    def measure(threads, *, progress=None):
        calls.append(threads)
        return limits

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("gwp_edge.profiling.roofline.measure_limits", measure)
    machine = describe_machine()
    assert cached_limits(machine, 1) == cached_limits(machine, 1) == limits
    assert cached_limits(machine, 2) == limits
    assert calls == [1, 2]
    next((tmp_path / "gwp-edge").glob("*.json")).write_bytes(b"broken")
    cached_limits(machine, 1), cached_limits(machine, 2)
    assert len(calls) == 3


def test_listener_without_a_run_ends_cleanly():
    listener = Listener(SPEC, None)
    listener.end()
    listener.end()
    assert len(listener.raw().stamps) == 0
    assert set(SEGMENTS) == set(Story().report().chunks.segments_ms)
