"""Disturbances on purpose: to try what-ifs, and to prove that a profile blames the right part.

For simulated robots and for the engine alone; never on an arm that a person may stand next to.
"""

from __future__ import annotations

import multiprocessing
import multiprocessing.process
import os
import re
import signal
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

import msgspec

from gwp_edge.drivers.disturbed import Delay
from gwp_edge.errors import SpecError
from gwp_edge.robot_config import RobotConfig
from gwp_edge.run_options import RunStatus
from gwp_edge.status import Mode

_STAGES: Final = ("preprocess", "vision", "prefill", "denoise", "postprocess")
_CAMERA: Final = ("observe", "transport")
_FORMS: Final = (
    "preprocess=5ms, vision=40ms, prefill=40ms@10%, denoise=5ms, postprocess=5ms (each call, a "
    "share of calls), transport=20ms (frames arrive later), observe=5ms (fetching a frame), "
    "drop=10% (camera frames), bus=3ms@5% (sending), stall=20ms/1s (of the motor process), cpu=2 "
    "(processes that compute), mem=2 (processes that stream through memory); 40+-10ms for a time "
    "that varies evenly"
)
_DELAY: Final = r"(\d+(?:\.\d+)?)(?:\+-(\d+(?:\.\d+)?))?ms(?:@(\d+(?:\.\d+)?)%)?"
# The guardian takes over after 50 ms of silence.
_MAX_STALL_MS: Final = 40.0
_MAX_BURNERS: Final = 64
# Larger than the caches of the machines that this is for, so that every pass goes to memory.
_STREAM_BYTES: Final = 256 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Disturbances:
    """What is injected; a delay is its time, ms, its chance, 0 to 1, and how far it varies, ms.

    Attributes:
        texts: as asked for.
        stages: delays by stage of the prediction.
        cameras: delays of ``transport`` and ``observe``.
        drop: chance of a camera frame to be lost.
        bus: delay of a command.
        stall: stop of the motor process, ms, and time between stops, s.
        n_burners: processes that keep a core busy.
        n_streams: processes that keep the memory busy.
    """

    texts: tuple[str, ...] = ()
    stages: dict[str, Delay] = field(default_factory=dict)
    cameras: dict[str, Delay] = field(default_factory=dict)
    drop: float = 0.0
    bus: Delay | None = None
    stall: tuple[float, float] | None = None
    n_burners: int = 0
    n_streams: int = 0

    @property
    def needs_robot(self) -> bool:
        """Whether one of them concerns cameras, bus or motor loop."""
        return bool(self.drop or self.bus or self.stall or self.cameras)


def parse_disturbances(texts: Sequence[str]) -> Disturbances:
    """Read what the command line gives.

    Raises:
        SpecError: not one of the forms, or out of range.
    """
    stages: dict[str, Delay] = {}
    cameras: dict[str, Delay] = {}
    drop, bus, stall = 0.0, None, None
    burners = {"cpu": 0, "mem": 0}
    for text in texts:
        name, _, value = text.partition("=")
        if name in (*_STAGES, *_CAMERA, "bus"):
            found = _match(_DELAY, value, text)
            delay = (float(found[1]), float(found[3] or 100.0) / 100.0, float(found[2] or 0.0))
            _check(delay[0] <= 10_000 and 0 < delay[1] <= 1 and delay[2] <= delay[0], text)
            if name == "bus":
                bus = delay
            elif name in _CAMERA:
                cameras[name] = delay
            else:
                stages[name] = delay
        elif name == "drop":
            drop = float(_match(r"(\d+(?:\.\d+)?)%", value, text)[1]) / 100.0
            _check(0 < drop < 1, text)
        elif name == "stall":
            found = _match(r"(\d+(?:\.\d+)?)ms/(\d+(?:\.\d+)?)s", value, text)
            stall = (float(found[1]), float(found[2]))
            _check(0 < stall[0] <= _MAX_STALL_MS and stall[1] >= 0.05, text)
        elif name in burners:
            burners[name] = int(_match(r"(\d+)", value, text)[1])
            _check(0 < burners[name] <= _MAX_BURNERS, text)
        else:
            _check(False, text)  # noqa: FBT003 - the check of a name that there is not
    return Disturbances(
        texts=tuple(texts),
        stages=stages,
        cameras=cameras,
        drop=drop,
        bus=bus,
        stall=stall,
        n_burners=burners["cpu"],
        n_streams=burners["mem"],
    )


def _match(pattern: str, value: str, text: str) -> re.Match[str]:
    found = re.fullmatch(pattern, value)
    if found is None:
        raise SpecError(f"--disturb {text}: expected one of {_FORMS}")
    return found


def _check(condition: bool, text: str) -> None:  # noqa: FBT001 - a guard reads best so
    if not condition:
        raise SpecError(
            f"--disturb {text}: unknown or out of range (a stall lasts at most "
            f"{_MAX_STALL_MS:.0f} ms); expected one of {_FORMS}"
        )


# -- the robot -----------------------------------------------------------------------------------


def disturbed_robot(robot: RobotConfig, disturbances: Disturbances) -> RobotConfig:
    """Return the robot with its devices wrapped.

    Raises:
        SpecError: the robot is a real one.
    """
    if disturbances.texts and not robot.is_simulated:
        raise SpecError(
            f"--disturb is for simulated robots: {robot.name} is a real one, and nobody next to it "
            "should meet a stall that was made on purpose"
        )
    if disturbances.drop or disturbances.cameras:
        cameras = tuple(
            msgspec.structs.replace(
                c,
                kind="disturbed",
                options={
                    **c.options,
                    "disturbed_kind": c.kind,
                    "disturbed_drop": disturbances.drop,
                    "disturbed_delays": {k: list(v) for k, v in disturbances.cameras.items()},
                },
            )
            for c in robot.cameras
        )
        robot = msgspec.structs.replace(robot, cameras=cameras)
    if disturbances.bus is not None:
        arm = robot.arm
        options = {
            **arm.options,
            "disturbed_kind": arm.kind,
            "disturbed_bus": list(disturbances.bus),
        }
        arm = msgspec.structs.replace(arm, kind="disturbed", options=options)
        robot = msgspec.structs.replace(robot, arm=arm)
    return robot


# -- around the run -------------------------------------------------------------------------------


class Around:
    """Burners and stalls while a run goes on; a context manager. Threads: one owner."""

    def __init__(self, disturbances: Disturbances) -> None:
        self._stall = disturbances.stall
        self._jobs = [_burn] * disturbances.n_burners + [_stream] * disturbances.n_streams
        self._motor_pid = 0
        self._over = threading.Event()
        self._thread: threading.Thread | None = None
        self._burners: list[multiprocessing.process.BaseProcess] = []

    def see(self, status: RunStatus) -> None:
        """Learn the motor's process; it is stalled in motion only."""
        self._motor_pid = status.motor_pid if status.mode in (Mode.APPROACH, Mode.RUN) else 0

    @property
    def pids(self) -> tuple[int, ...]:
        """Processes of the burners."""
        return tuple(b.pid for b in self._burners if b.pid is not None)

    def __enter__(self) -> Around:
        """Start what was asked for."""
        context = multiprocessing.get_context("spawn")
        for job in self._jobs:
            burner = context.Process(target=job, args=(os.getpid(),), daemon=True)
            burner.start()
            self._burners.append(burner)
        if self._stall is not None:
            self._thread = threading.Thread(target=self._stalls, args=self._stall, daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """End it all."""
        self._over.set()
        if self._thread is not None:
            self._thread.join()
        for burner in self._burners:
            burner.kill()
            burner.join()
            burner.close()

    def _stalls(self, for_ms: float, every_s: float) -> None:
        while not self._over.wait(every_s):
            pid = self._motor_pid
            if not pid:
                continue
            try:
                os.kill(pid, signal.SIGSTOP)
                try:
                    time.sleep(for_ms / 1e3)
                finally:
                    os.kill(pid, signal.SIGCONT)
            except ProcessLookupError:
                return


def _burn(parent_pid: int) -> None:
    while os.getppid() == parent_pid:
        sum(range(100_000))


def _stream(parent_pid: int) -> None:
    import numpy as np

    source = np.ones(_STREAM_BYTES // 16)
    target = np.empty_like(source)
    while os.getppid() == parent_pid:
        np.copyto(target, source)
