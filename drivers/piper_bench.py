"""What one tick of the PiPER driver costs: read, decode, pack and send, two fake arms.

Measured in a process of its own that is set up as the motor process is: what else a program has
loaded costs a tenth of such a tick.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import socket
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from gwp_edge.clock import MonotonicClock
from gwp_edge.drivers import piper_codec as codec
from gwp_edge.drivers.piper import PiperArm
from gwp_edge.drivers.piper_can import UNIX_FRAME
from gwp_edge.drivers.piper_core import FrameStore, SocketPort
from gwp_edge.drivers.piper_fake_bus import FakeProcess
from gwp_edge.drivers.piper_link import RECEIVED_IDS, make_command
from gwp_edge.drivers.piper_options import parse_options
from gwp_edge.realtime import SPIN_NS, make_realtime
from gwp_edge.spec import Channel

logger = logging.getLogger(__name__)

_PERIOD_NS = 5_000_000
_FRAMES_PER_TICK = 12


@dataclass(frozen=True, slots=True, kw_only=True)
class DriverCost:
    """Cost of one driver tick for two arms over Unix sockets.

    Attributes:
        n_ticks: ticks measured, after the warm-up.
        n_warm_up: ticks left out.
        n_frames: frames decoded while measuring.
        tick_us: p50, p95, p99 and maximum of ``state`` plus ``send``, us.
        cpu_us: the same in processor time of this thread, which other programs cannot lengthen
            but by cold caches.
        state_us: the same for ``state`` alone.
        again_us: the same for a second tick soon after the first, which finds its code and data
            in the caches and few frames to read: the distance to ``tick_us`` is mostly what the
            machine makes of a program that stands still for 5 ms.
        bare_us: the same for its part in C alone, in the same run: as many frames read from two
            sockets and decoded, four sent to each.
        ratio: p50 of ``tick_us`` over that of ``bare_us``.
        hold_us: the same for ``hold`` on a second connection that was opened ahead, us.
    """

    n_ticks: int
    n_warm_up: int
    n_frames: int
    tick_us: tuple[float, float, float, float]
    cpu_us: tuple[float, float, float, float]
    state_us: tuple[float, float, float, float]
    again_us: tuple[float, float, float, float]
    bare_us: tuple[float, float, float, float]
    hold_us: tuple[float, float, float, float]

    @property
    def ratio(self) -> float:
        """Driver over its part in C alone, p50."""
        return self.tick_us[0] / self.bare_us[0]


def _summary(values_ns: list[int]) -> tuple[float, float, float, float]:
    p50, p95, p99, most = np.percentile(values_ns, (50, 95, 99, 100)) / 1e3
    return float(p50), float(p95), float(p99), float(most)


def measure_driver_cost(
    *, n_ticks: int = 2000, n_warm_up: int = 200, n_holds: int = 50, priority: int | None = None
) -> DriverCost:
    """Run the driver at 200 Hz on two fake arms, each in its own process, and time it.

    Args:
        n_ticks: ticks to measure.
        n_warm_up: ticks before that.
        n_holds: holds to time afterwards.
        priority: of SCHED_FIFO, as the motor process has it; None for ordinary scheduling.
    """
    with tempfile.TemporaryDirectory() as folder:
        left = FakeProcess(os.fspath(Path(folder) / "left"))
        right = FakeProcess(os.fspath(Path(folder) / "right"))
        context = multiprocessing.get_context("spawn")
        with left, right, ProcessPoolExecutor(max_workers=1, mp_context=context) as alone:
            channels = {"left": left.channel, "right": right.channel}
            return alone.submit(_measure, channels, n_ticks, n_warm_up, n_holds, priority).result()


def _measure(
    can: dict[str, str], n_ticks: int, n_warm_up: int, n_holds: int, priority: int | None
) -> DriverCost:
    names = [f"{side}_joint_{i}" for side in ("left", "right") for i in range(7)]
    channels = [
        Channel(name=name, unit="m" if i % 7 == 6 else "rad", kind="absolute")
        for i, name in enumerate(names)
    ]
    options = parse_options(can)
    arm, second = PiperArm(channels, options), PiperArm(channels, options)
    for warning in make_realtime(priority=priority or 1, cpu=None, scheduler=priority is not None):
        logger.warning("driver benchmark: %s", warning)
    try:
        arm.open(enable=True)
        times_ns, n_frames = _run(arm, n_ticks, n_warm_up)
        second.open(enable=False)
        holds = _time_holds(second, n_holds)
    finally:
        arm.close()
        second.close()
    return DriverCost(
        n_ticks=n_ticks,
        n_warm_up=n_warm_up,
        n_frames=n_frames,
        tick_us=_summary(times_ns["tick"]),
        cpu_us=_summary(times_ns["cpu"]),
        state_us=_summary(times_ns["state"]),
        again_us=_summary(times_ns["again"]),
        bare_us=_summary(times_ns["bare"]),
        hold_us=_summary(holds),
    )


def _run(arm: PiperArm, n_ticks: int, n_warm_up: int) -> tuple[dict[str, list[int]], int]:
    """Return what ticks took, ns by what was timed, and how many frames they read."""
    pose = arm.state().position
    times_ns: dict[str, list[int]] = {
        what: [] for what in ("tick", "cpu", "state", "again", "bare")
    }
    calls = _BareCalls()
    n_before = 0
    clock = MonotonicClock(spin_ns=SPIN_NS)
    due_ns = clock.now_ns()
    for i in range(n_ticks + n_warm_up):
        due_ns += _PERIOD_NS
        clock.sleep_until_ns(due_ns)
        cpu_begin_ns = time.thread_time_ns()
        begin_ns = time.perf_counter_ns()
        state = arm.state()
        between_ns = time.perf_counter_ns()
        arm.send(pose)
        end_ns = time.perf_counter_ns()
        cpu_end_ns = time.thread_time_ns()
        bare_ns = calls.time_ns()
        again_begin_ns = time.perf_counter_ns()
        arm.state()
        arm.send(pose)
        again_end_ns = time.perf_counter_ns()
        if state.fault is not None:
            logger.warning("driver benchmark: %s", state.fault)
        if i == n_warm_up:
            n_before = sum(unit.feedback.n_frames for unit in arm.units)
        if i >= n_warm_up:
            times_ns["tick"].append(end_ns - begin_ns)
            times_ns["cpu"].append(cpu_end_ns - cpu_begin_ns)
            times_ns["state"].append(between_ns - begin_ns)
            times_ns["again"].append(again_end_ns - again_begin_ns)
            times_ns["bare"].append(bare_ns)
    calls.close()
    return times_ns, sum(unit.feedback.n_frames for unit in arm.units) - n_before


class _BareCalls:
    """The compiled part of one tick on two sockets of this process. Threads: one owner."""

    def __init__(self) -> None:
        kind = socket.SOCK_SEQPACKET
        self._pairs = [socket.socketpair(socket.AF_UNIX, kind) for _ in range(2)]
        self._ports = [SocketPort(near.fileno(), RECEIVED_IDS) for near, _ in self._pairs]
        self._stores = [FrameStore() for _ in self._ports]
        ids = (*codec.ID_JOINT_FEEDBACK, codec.ID_GRIPPER_FEEDBACK, *codec.ID_MOTOR_FAST)
        self._packets = [UNIX_FRAME.pack(can_id, 8, bytes(8), 0) for can_id in (*ids, *ids)]
        for _, far in self._pairs:
            far.settimeout(0)

    def time_ns(self) -> int:
        """Return how long the calls of one tick take now."""
        for _, far in self._pairs:
            for packet in self._packets[:_FRAMES_PER_TICK]:
                far.send(packet)
        command = make_command([0] * codec.N_JOINTS, (0, 0))
        begin_ns = time.perf_counter_ns()
        for port, store in zip(self._ports, self._stores, strict=True):
            port.drain(store)
        for port in self._ports:
            port.send(command)
        taken_ns = time.perf_counter_ns() - begin_ns
        for _, far in self._pairs:
            for _ in command:
                far.recv(UNIX_FRAME.size)
        return taken_ns

    def close(self) -> None:
        """Close the sockets."""
        for pair in self._pairs:
            for end in pair:
                end.close()


def _time_holds(arm: PiperArm, n_holds: int) -> list[int]:
    durations: list[int] = []
    for _ in range(n_holds):
        time.sleep(0.005)
        arm.state()
        time.sleep(0.005)
        begin_ns = time.perf_counter_ns()
        arm.hold()
        durations.append(time.perf_counter_ns() - begin_ns)
    return durations
