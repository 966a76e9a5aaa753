"""Disturbances, the system's counters, and what profiling costs."""

from __future__ import annotations

import dataclasses
import gc
import multiprocessing
import os
import random
import sys
import tracemalloc
import types
from concurrent.futures import ProcessPoolExecutor

import msgspec
import numpy as np
import pytest
from profile_story import MS, SPEC, T0, Story, report_of, verdict

from gwp_edge.drivers.disturbed import DisturbedCamera, draw_ms, is_lost
from gwp_edge.errors import SpecError
from gwp_edge.machine_limits import GemmRate, Limits, describe_machine
from gwp_edge.mailbox import Board
from gwp_edge.profiling.collect import Listener, random_observation
from gwp_edge.profiling.columns import SEGMENTS
from gwp_edge.profiling.cost import _tick, measure_cost
from gwp_edge.profiling.disturb import _burn, _stream, disturbed_robot, parse_disturbances
from gwp_edge.profiling.jetson_stats import parse_tegrastats
from gwp_edge.profiling.roofline import cached_limits
from gwp_edge.profiling.schema import Cost
from gwp_edge.profiling.stamps import stamp_record
from gwp_edge.profiling.system_sampler import SystemSampler, SystemSamples
from gwp_edge.profiling.verdicts import _overhead
from gwp_edge.robots import load_robot
from gwp_edge.shared_memory import SHM_DIR, fence
from gwp_edge.status import Mode
from gwp_edge.telemetry import StageTimes
from gwp_edge.tick_log import TickLog
from gwp_edge.types import Frame

CHEAP = Cost(
    listener_percent=0.5, sampler_percent=0.4, view_percent=0.1, helper_percent=0.1, stamp_us=7.0,
    stamp_percent=0.01, tick_us=3.0, n_lost={},
)  # fmt: skip

# -- disturbances


def test_parse_disturbances_reads_every_form():
    found = parse_disturbances(
        [
            "prefill=40ms",
            "denoise=5.5ms@10%",
            "preprocess=4+-1.5ms@50%",
            "transport=20+-10ms",
            "drop=10%",
            "bus=3ms@5%",
            "stall=20ms/1s",
            "cpu=2",
            "mem=3",
        ]
    )
    assert found.stages == {
        "prefill": (40.0, 1.0, 0.0),
        "denoise": (5.5, 0.1, 0.0),
        "preprocess": (4.0, 0.5, 1.5),
    }
    assert found.cameras == {"transport": (20.0, 1.0, 10.0)}
    assert found.needs_robot
    assert (found.drop, found.bus, found.stall) == (0.1, (3.0, 0.05, 0.0), (20.0, 1.0))
    assert (found.n_burners, found.n_streams) == (2, 3)


@pytest.mark.parametrize(
    "text",
    ["prefill", "prefill=40", "prefill=40ms@200%", "drop=0%", "drop=100%", "stall=60ms/1s",
     "stall=20ms", "cpu=0", "mem=0", "mem=65", "sleep=3ms", "", "prefill=5+-6ms", "prefill=5+-ms"],
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
    inner = types.SimpleNamespace(latest=lambda: next(frames), name="cam")
    camera = DisturbedCamera(inner, 0.3)
    seen = [camera.latest().frame_idx for _ in range(200)]
    assert seen == sorted(seen)
    assert 100 < len(set(seen)) < 180
    assert set(range(1, 200)) - set(seen) == {i for i in range(1, 200) if is_lost("cam", i, 0.3)}


def test_disturbed_cameras_lose_frames_of_their_own():
    """All cameras lost the same frames, so blaming the right one of two could not be tried."""
    lost = [{i for i in range(500) if is_lost(name, i, 0.2)} for name in ("a", "b")]
    assert all(60 < len(of_one) < 140 for of_one in lost)
    assert len(lost[0] & lost[1]) < 50


def frame(idx, *, captured_ns, received_ns):
    return Frame(
        camera="cam", image=np.zeros((2, 2, 3), np.uint8), t_captured_ns=captured_ns,
        t_received_ns=received_ns, frame_idx=idx, domain="host",
    )  # fmt: skip


def test_disturbed_camera_holds_frames_back_and_says_when_they_came(monkeypatch):
    now_ms, newest = [0.0], [None]
    clock = types.SimpleNamespace(monotonic_ns=lambda: int(now_ms[0] * MS), sleep=None)
    monkeypatch.setattr("gwp_edge.drivers.disturbed.time", clock)
    inner = types.SimpleNamespace(latest=lambda: newest[0], name="cam")
    camera = DisturbedCamera(inner, 0.0, {"transport": (20.0, 1.0, 0.0)})
    seen = []
    for step in range(120):
        now_ms[0] = float(step)
        if step % 30 == 5:
            newest[0] = frame(step // 30, captured_ns=step * MS, received_ns=step * MS)
        now_ms[0] += 0.5
        found = camera.latest()
        if found is not None and found.frame_idx not in [s[0] for s in seen]:
            seen.append(
                (found.frame_idx, step, found.t_received_ns // MS, found.t_captured_ns // MS)
            )
    assert seen == [(0, 25, 25, 5), (1, 55, 55, 35), (2, 85, 85, 65), (3, 115, 115, 95)]


def test_draw_ms_varies_evenly_and_happens_as_often_as_asked():
    chance = random.Random(0)
    drawn = np.array([draw_ms((40.0, 0.25, 10.0), chance) for _ in range(4000)])
    happened = drawn[drawn > 0]
    assert len(happened) == pytest.approx(1000, abs=120)
    assert happened.min() >= 30
    assert happened.max() <= 50
    assert happened.mean() == pytest.approx(40, abs=1)


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
            "/sys/class/net/right/type": "280\n",
            "/sys/class/net/right/statistics/tx_dropped": "3",
            "/sys/class/net/eth0/type": "1",
            "/sys/class/net/eth0/statistics/tx_dropped": "4",
            "/sys/class/thermal/thermal_zone1/temp": "55500",
            "/sys/class/thermal/thermal_zone1/type": "gpu-thermal",
            "/sys/class/hwmon/hwmon0/name": "pwmfan",
            "/sys/class/hwmon/hwmon0/rpm": "2100",
            "/proc/7/smaps_rollup": "5-9 ---p [rollup]\nRss: 4 kB\nPss:  2048 kB\nPss_Dirty: 9 kB",
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
    # The name of a bus is the user's; a network card is none.
    assert second["right_tx_dropped"] == 3
    assert not any(k.startswith("eth0") for k in second)
    assert second["gpu-thermal_zone1_c"] == 55.5, "one of two zones of a type was overwritten"
    assert second["pwmfan_rpm"] == 2100
    assert first["motor_pss_mb"] == 2.0
    assert "motor_pss_mb" not in second, "PSS is dear: seconds must lie between two readings"
    assert sampler.newest is second
    assert (second["motor_minor_faults"], second["motor_major_faults"]) == (5, 1)
    assert second["motor_rss_mb"] > 0
    assert not any(k.startswith(("policy", "gone")) for k in second)
    assert found.throttled == ("cpu-throttle",)


def test_system_sampler_adds_up_what_its_processes_started_and_leaves_burners_out():
    """A simulated robot's world is its own work; a burner injected from here is another program."""
    system = FakeSystem()
    stat = "(w) S 7 1 1 0 -1 0 10 0 2 0 {} 0 0 0 20 0 1 0 5 9 256 0"
    system.files["/proc/7/task/7/children"] = "20 30"
    system.files["/proc/20/task/20/children"] = "21"
    for pid in (20, 21, 30):
        system.files[f"/proc/{pid}/stat"] = f"{pid} " + stat.format(100)
    sampler = SystemSampler(system, jetson=False)
    sampler.pids, sampler.foreign = {"motor": 7}, frozenset({30})
    sampler.sample()
    for pid, ticks in ((20, 103), (21, 104), (30, 190)):
        system.files[f"/proc/{pid}/stat"] = f"{pid} " + stat.format(ticks)
    sampler.sample()
    elapsed_s = (sampler.samples().t_ns[1] - sampler.samples().t_ns[0]) / 1e9
    ticks = sampler.newest["helpers_cpu_percent"] / 100 * os.sysconf("SC_CLK_TCK") * elapsed_s
    assert ticks == pytest.approx(7.0)


def test_system_sampler_counts_what_its_own_threads_and_processes_take(monkeypatch):
    """On a Jetson tegrastats and jtop's thread do the work, and the profile did not count them."""
    system = FakeSystem()
    stat = "(t) S 1 1 1 0 -1 0 10 0 2 0 {} {} 0 0 20 0 1 0 5 9 256 0"

    def start():
        system.files["/proc/self/task/55/stat"] = "55 " + stat.format(20, 10)
        system.files["/proc/66/stat"] = "66 " + stat.format(40, 30)
        return types.SimpleNamespace(read=dict, pids=(66,), name="jtop", close=lambda: None)

    system.files["/proc/self/task/54/stat"] = "54 " + stat.format(900, 900)
    monkeypatch.setattr("gwp_edge.profiling.system_sampler.open_jetson_source", start)
    sampler = SystemSampler(system)
    sampler.sample()
    assert sampler.helper_s == pytest.approx(100 / os.sysconf("SC_CLK_TCK"))


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


def test_measure_cost_measures_the_dearest_tick_and_leaves_nothing_behind(monkeypatch):
    """The tick that was timed had no limit in force, while half of the real ones count some."""
    counted, created = [], []
    make = Board.create

    def create(*sizes):
        created.append(make(*sizes))
        return created[-1]

    close = Board.close

    def look(board):
        counted.append(board.interventions.sum(axis=1).copy())
        close(board)

    monkeypatch.setattr(Board, "create", create)
    monkeypatch.setattr(Board, "close", look)
    stamp_us, tick_us = measure_cost(SPEC)
    assert stamp_us > 0
    assert tick_us > 0
    assert (counted[0] > 0).all(), "every channel was limited in every tick"
    assert not (SHM_DIR / created[0].name).exists()


@pytest.mark.parametrize(
    ("costs", "words"),
    [
        ({"tick_us": 5.1}, "5.1 us of a motor tick"),
        ({"stamp_percent": 1.2}, "1.20 % of a chunk"),
        ({"sampler_percent": 0.7, "helper_percent": 0.6}, "1.30 % of a core"),
    ],
)
def test_report_profiling_that_costs_more_than_it_may_is_a_verdict(costs, words):
    cost = msgspec.structs.replace(CHEAP, **costs)
    assert _overhead(CHEAP) is None
    found = _overhead(cost)
    assert found.level == "warn"
    assert words in found.text


def test_report_of_a_dear_profile_holds_the_verdict():
    report = report_of([Story().raw()], cost_us=(2000.0, 3.0))
    assert verdict(report, "overhead").blames == "profiling"
    assert "of a chunk" in verdict(report, "overhead").text


def noted(board):
    """Return what notes a tick and a chunk, as the loops do."""
    tick = _tick(board, SPEC)
    observation = random_observation(SPEC, np.random.default_rng(0), 0)
    timing = StageTimes(
        preprocess_ns=1, vision_ns=1, prefill_ns=1, denoise_ns=(1, 1), postprocess_ns=1
    )
    moments = dict.fromkeys(("t_started_ns", "t_built_ns", "t_predicted_ns", "t_published_ns"), 5)

    def note():
        tick()
        board.stamps.append(stamp_record(0, observation, timing, **moments))

    return note


def test_tick_log_counts_every_limit_of_every_channel(board):
    """Channel by channel it took up to 18 us of a tick when limits acted on all of 14."""
    D = SPEC.n_channels
    limiter = types.SimpleNamespace(flags=[0] * D, rejected=None)
    limiter.flags[1], limiter.flags[2], limiter.flags[D - 1] = 2 | 4, 64, 1
    schedule = types.SimpleNamespace(t_observed_ns=0, chunk_idx=0, row=lambda _t_ns: 0.0)
    log = TickLog(board, types.SimpleNamespace(now_ns=lambda: 5), limiter, schedule)
    for _ in range(3):
        log.write(t_planned_ns=0, t_woke_ns=1, t_feedback_ns=0, sent=True, send_ns=1, mode=Mode.RUN)
    expected = np.zeros((D, 4), int)
    expected[1, 1] = expected[1, 2] = expected[2, 3] = expected[D - 1, 0] = 3
    np.testing.assert_array_equal(board.interventions, expected)
    assert set(board.ticks.drain()["flags"]) == {1 | 2 | 4 | 64}


@pytest.fixture
def board():
    made = Board.create(SPEC.n_channels, SPEC.n_rows)
    yield made
    made.close()
    made.unlink()


def growth_by_round():
    """Return by how many bytes this process grows in each of six times 3000 notes."""
    made = Board.create(SPEC.n_channels, SPEC.n_rows)
    try:
        note = noted(made)
        gc.collect()
        grown, before = [], 0
        tracemalloc.start()
        for _ in range(6):
            for _ in range(3000):
                note()
            now = tracemalloc.get_traced_memory()[0]
            grown.append(now - before)
            before = now
        return grown
    finally:
        made.close()
        made.unlink()


def test_noting_ticks_and_chunks_keeps_no_memory():
    # The whole process is counted, so it is one without the threads of other tests' cameras. A
    # single round may grow by the interpreter's stock of small objects; what is kept grows in all.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max_workers=1, mp_context=context) as alone:
        grown = alone.submit(growth_by_round).result()
    # Less than one byte a note.
    assert sorted(grown[1:])[2] < 3000


def test_noting_ticks_and_chunks_takes_no_lock_and_waits_for_nobody(board):
    """But for the fence of the shared memory, whose lock is the process's own and never held."""
    note, called = noted(board), set()
    note()

    def see(frame, event, arg):
        if event == "c_call" and frame.f_code is not fence.__code__:
            called.add(f"{type(arg.__self__).__name__}.{arg.__name__}")
        elif event == "call":
            called.add(f"{frame.f_code.co_filename}.{frame.f_code.co_name}")

    sys.setprofile(see)
    try:
        note()
    finally:
        sys.setprofile(None)
    assert any(name.endswith(".append") for name in called), "it saw what was called"
    words = {name.rsplit(".", 1)[1] for name in called}
    assert not words & {"acquire", "wait", "sleep", "select", "flock", "open", "read", "write_text"}
    assert not [name for name in called if name.startswith(("lock.", "RLock.", "Lock."))]


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
    cached_limits(machine, 1, again=True)
    assert len(calls) == 4, "limits that a busy machine left in the cache can be replaced"


def test_listener_without_a_run_ends_cleanly():
    listener = Listener(SPEC, None)
    listener.end()
    listener.end()
    assert len(listener.raw().stamps) == 0
    assert set(SEGMENTS) == set(Story().report().chunks.segments_ms)


def test_system_sampler_reads_pss_of_one_process_after_the_other(monkeypatch):
    system = FakeSystem()
    system.files["/proc/8/smaps_rollup"] = "Pss: 1024 kB"
    sampler = SystemSampler(system, jetson=False)
    sampler.pids = {"motor": 7, "policy": 8}
    monkeypatch.setattr("gwp_edge.profiling.system_sampler._PSS_EVERY_NS", 0)
    for _ in range(3):
        sampler.sample()
    found = [
        {k: v for k, v in row.items() if k.endswith("pss_mb")} for row in sampler.samples().rows
    ]
    assert found == [{"motor_pss_mb": 2.0}, {"policy_pss_mb": 1.0}, {"motor_pss_mb": 2.0}]


def test_report_counts_what_a_bus_did_over_the_run():
    rows = [{"can0_tx_dropped": 3.0, "can0_rx_packets": 10.0}, {"gpu_c": 40.0},
            {"can0_tx_dropped": 5.0, "can0_rx_packets": 2010.0}]  # fmt: skip
    story = Story()
    raw = dataclasses.replace(
        story.raw(),
        system=SystemSamples(t_ns=[T0, T0 + MS, T0 + 2 * MS], rows=rows),
        health={"cam_high": "900 frames, 2 lost"},
    )
    story.raw = lambda: raw
    report = story.report()
    (bus,) = report.system.buses
    assert (bus.name, bus.counts) == ("can0", {"tx_dropped": 2, "rx_packets": 2000})
    assert report.cameras[0].health == "900 frames, 2 lost"
    assert report.cameras[0].clock == "sim"


@pytest.mark.parametrize("target", [_burn, _stream])
def test_burners_end_when_their_parent_is_gone(target, monkeypatch):
    monkeypatch.setattr("gwp_edge.profiling.disturb._STREAM_BYTES", 1 << 12)
    parents = iter([5, 5, 1])
    monkeypatch.setattr("os.getppid", lambda: next(parents))
    target(5)
    assert next(parents, None) is None
