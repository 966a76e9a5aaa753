"""Record a run: a process of its own that listens to what the others publish anyway.

It never makes anybody wait: it reads the board's rings, the cameras' rings and the policy's tap,
runs at low priority, holds a bounded amount of memory, and counts what it was too slow to fetch.
"""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import multiprocessing.process
import platform
import time
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Final, cast

import msgspec

from gwp_edge.child_process import start_shielded
from gwp_edge.errors import DeviceError, SpecError
from gwp_edge.mailbox import Board
from gwp_edge.record_process import RecordSetup, record_main
from gwp_edge.robot_config import RobotConfig
from gwp_edge.session_format import VERSION, SessionHeader, remove_session
from gwp_edge.shared_memory import SHM_DIR, unique_name
from gwp_edge.spec import PolicySpec

logger = logging.getLogger(__name__)

_START_TIMEOUT_S: Final = 30.0
_STOP_TIMEOUT_S: Final = 20.0
_PACKAGES: Final = ("gwp-edge", "numpy", "onnxruntime", "pillow")


class Recorder:
    """The run's handle on its recorder. Threads: one owner.

    Args:
        folder: of the session; made, must be new or empty.
        board: of the run.
        spec: of the policy.
        robot: which robot.
        policy: what makes the policy and with what; noted in the session.
        task: prompt that is followed.

    Attributes:
        tap_name: what the policy process is to write to.
        folder: of the session.

    Raises:
        SpecError: the folder is in use or cannot be made.
    """

    def __init__(
        self,
        folder: Path,
        board: Board,
        spec: PolicySpec,
        robot: RobotConfig,
        *,
        policy: Mapping[str, object],
        task: str = "",
    ) -> None:
        self.tap_name = unique_name("tap")
        self.folder = folder
        self._is_made = _make_folder(folder)
        self._header = make_header(spec, robot, policy=policy, task=task)
        setup = RecordSetup(folder=folder, board=board.name, tap=self.tap_name, header=self._header)
        context = multiprocessing.get_context("spawn")
        self._pipe: Connection | None
        self._pipe, theirs = context.Pipe()
        self._process: multiprocessing.process.BaseProcess = context.Process(
            target=record_main, args=(setup, theirs), name="gwp-record", daemon=True
        )
        start_shielded(self._process)
        # With our copy closed, the process sees the end of the pipe when we die.
        theirs.close()

    def await_ready(self) -> None:
        """Return once the recorder listens.

        Raises:
            DeviceError: it does not start.
        """
        if self._pipe is None:
            raise DeviceError(f"recording to {self.folder} has ended")
        try:
            answer = self._pipe.recv() if self._pipe.poll(_START_TIMEOUT_S) else "no answer"
        except EOFError:
            answer = "its process ended"
        if answer != "ready":
            raise DeviceError(f"recording to {self.folder} did not start: {answer}")

    def discard(self) -> None:
        """Finish a recording that did not start; remove what was made for it."""
        self.stop()
        # Why it did not start says more than what cannot be removed.
        with contextlib.suppress(OSError):
            remove_session(self.folder, self._header)
        if self._is_made:
            with contextlib.suppress(OSError):
                self.folder.rmdir()

    def failure(self) -> str | None:
        """Return one line, once, when the recording has ended before the run."""
        if self._pipe is None or not self._pipe.poll():
            return None
        return "; ".join(self.stop())

    def stop(self) -> list[str]:
        """Finish the session; return what went wrong, one line each. Safe to call twice."""
        pipe, self._pipe = self._pipe, None
        if pipe is None:
            return []
        problems = []
        # Where the process has ended, its last words still wait in the pipe.
        with contextlib.suppress(OSError):
            pipe.send("stop")
        try:
            answer = pipe.recv() if pipe.poll(_STOP_TIMEOUT_S) else "it did not finish in time"
        except (EOFError, OSError):
            answer = "its process ended"
        if isinstance(answer, dict):
            lost = ", ".join(f"{n} {kind}" for kind, n in answer.items() if n)
            if lost:
                problems.append(
                    f"recording to {self.folder} lost {lost}; the machine or its disk is too slow"
                )
        else:
            problems.append(f"recording to {self.folder} is incomplete: {answer}")
        self._process.join(1.0)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()
        self._process.close()
        pipe.close()
        (SHM_DIR / self.tap_name).unlink(missing_ok=True)
        return problems


def make_header(
    spec: PolicySpec, robot: RobotConfig, *, policy: Mapping[str, object], task: str
) -> SessionHeader:
    """Return what a session says about the run that begins now."""
    software = {"python": platform.python_version(), "machine": platform.machine()}
    for name in _PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            software[name] = version(name)
    return SessionHeader(
        version=VERSION,
        spec=spec,
        policy={key: str(value) for key, value in policy.items()},
        task=task,
        robot=cast("dict[str, object]", msgspec.to_builtins(robot)),
        software=software,
        t_start_unix_ns=time.time_ns(),
        t_start_ns=time.monotonic_ns(),
    )


def _make_folder(folder: Path) -> bool:
    """Make ``folder`` or take it as it is; return whether it was made."""
    try:
        is_made = not folder.exists()
        folder.mkdir(parents=True, exist_ok=True)
        taken = any(folder.iterdir())
    except OSError as e:
        raise SpecError(f"--record {folder}: cannot be made: {e.strerror}") from e
    if taken:
        raise SpecError(f"--record {folder}: is not empty; name a new folder for each run")
    return is_made
