"""Starts, watches and stops the processes of the simulated table-top."""

from __future__ import annotations

import logging
import multiprocessing
import os
import time
from collections.abc import Mapping, Sequence
from multiprocessing.connection import Connection
from typing import Any, Final

import msgspec

from gwp_edge.child_process import start_shielded
from gwp_edge.drivers import sim_model
from gwp_edge.drivers.sim_loops import Job, run_job, run_physics, run_renderer
from gwp_edge.drivers.sim_options import RINGS_KEY, SEGMENT_KEY, SimOptions
from gwp_edge.drivers.sim_segment import SimSegment, SimWord
from gwp_edge.errors import DeviceError, DeviceTimeoutError, SpecError
from gwp_edge.frame_ring import FrameRing
from gwp_edge.shared_memory import remove_leftovers, unique_name

logger = logging.getLogger(__name__)

_NS_PER_S: Final = 1_000_000_000
_START_TIMEOUT_S: Final = 90.0
_STOP_TIMEOUT_S: Final = 5.0


class SimProcesses:
    """The world of a simulated robot, in real time. Threads: one owner.

    Args:
        n_arms: 1 or 2.
        cameras: roles, as in the policy's spec.
        options: see ``SimOptions``.

    Raises:
        SpecError: a camera has no mount, or a mount is for none of the cameras.
    """

    def __init__(self, n_arms: int, cameras: Sequence[str], options: SimOptions) -> None:
        # Bad roles are the user's error: say so now, not from another process.
        strangers = sorted(set(options.mounts) - set(cameras))
        if strangers:
            raise SpecError(
                f"option mounts of the sim: {', '.join(strangers)} is no camera of the robot; it "
                f"has {', '.join(cameras) or 'none'}"
            )
        sim_model.camera_mounts(n_arms, cameras, options.mounts)
        self._n_arms = n_arms
        self._cameras = tuple(cameras)
        self._options = options
        self._segment: SimSegment | None = None
        self._rings: dict[str, FrameRing] = {}
        self._processes: dict[str, tuple[Any, Connection]] = {}
        self.backend: str | None = None

    def start(self) -> Mapping[str, object]:
        """Start both processes; return what arms and cameras need to find them.

        Raises:
            DeviceError: MuJoCo or a renderer is missing, or shared memory is short.
            DeviceTimeoutError: a process is not ready in time.
        """
        if self._segment is not None:
            raise DeviceError("the simulated world runs already; close it first")
        for name in remove_leftovers():
            logger.warning("removed shared memory %s of a run that was killed", name)
        try:
            self._segment = SimSegment.create(self._n_arms)
            for role in self._cameras:
                width_px, height_px = self._options.width_px, self._options.height_px
                self._rings[role] = FrameRing.create(unique_name(role), width_px, height_px)
            jobs: dict[str, Job] = {"physics": run_physics}
            if self._cameras:
                jobs["renderer"] = run_renderer
            for job_name, job in jobs.items():
                self._spawn(job_name, job)
            deadline_ns = time.monotonic_ns() + round(_START_TIMEOUT_S * _NS_PER_S)
            for job_name in jobs:
                self._await_ready(job_name, deadline_ns)
        except BaseException:
            self.close()
            raise
        logger.info("sim world runs, %d arms, renderer %s", self._n_arms, self.backend)
        return {
            SEGMENT_KEY: self._segment.name,
            RINGS_KEY: {role: ring.name for role, ring in self._rings.items()},
        }

    @property
    def process_ids(self) -> tuple[int, ...]:
        """Ids of the processes that run for this world."""
        return tuple(process.pid for process, _ in self._processes.values())

    @property
    def real_time_factor(self) -> float:
        """Simulated time per real time since the start; below 1 when the machine is too slow."""
        words = self._running().words
        elapsed_ns = time.monotonic_ns() - words[SimWord.T_START_NS]
        return words[SimWord.N_STEPS] * _NS_PER_S / self._options.physics_hz / elapsed_ns

    @property
    def drawing_ms(self) -> float:
        """Mean time to draw all cameras once, ms; NaN before the first pictures."""
        words = self._running().words
        n_drawn = words[SimWord.N_DRAWN]
        return words[SimWord.DRAWING_NS] / n_drawn / 1e6 if n_drawn else float("nan")

    def check(self) -> None:
        """Return while both processes live.

        Raises:
            DeviceError: one has ended; says why.
        """
        self._running()
        for name, (process, connection) in self._processes.items():
            if process.exitcode is not None:
                raise DeviceError(_last_words(name, process, connection))

    def close(self) -> None:
        """Stop the processes and remove the shared memory; safe to call twice."""
        if self._segment is not None:
            self._log_pace()
            self._segment.words[SimWord.STOP] = 1
        for process, connection in self._processes.values():
            process.join(_STOP_TIMEOUT_S)
            if process.exitcode is None:
                logger.warning("sim process %d does not stop; it is killed", process.pid)
                process.kill()
                process.join()
            connection.close()
            process.close()
        self._processes.clear()
        for ring in self._rings.values():
            ring.mark_failed("the simulated world has been closed; start it again")
            ring.unlink()
            ring.close()
        self._rings.clear()
        if self._segment is not None:
            self._segment.unlink()
            self._segment.close()
            self._segment = None

    def _log_pace(self) -> None:
        words = self._running().words
        if words[SimWord.N_STEPS] == 0:
            return
        lost_ms = words[SimWord.LOST_NS] / 1e6
        logger.log(
            logging.WARNING if lost_ms else logging.INFO,
            "sim ran at %.3f of real time, %.0f ms given up, %.1f ms to draw %d cameras",
            self.real_time_factor,
            lost_ms,
            self.drawing_ms,
            len(self._cameras),
        )

    def _running(self) -> SimSegment:
        if self._segment is None:
            raise DeviceError("the simulated world is not running; call start")
        return self._segment

    def _spawn(self, name: str, job: Job) -> None:
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe(duplex=False)
        rings = {role: ring.name for role, ring in self._rings.items()}
        process = context.Process(
            target=run_job,
            args=(
                job,
                theirs,
                self._running().name,
                rings,
                self._n_arms,
                msgspec.to_builtins(self._options),
                os.getpid(),
            ),
            name=f"gwp-sim-{name}",
            daemon=True,
        )
        start_shielded(process)
        theirs.close()
        self._processes[name] = (process, ours)

    def _await_ready(self, name: str, deadline_ns: int) -> None:
        process, connection = self._processes[name]
        wait_s = max(0.0, (deadline_ns - time.monotonic_ns()) / _NS_PER_S)
        if not connection.poll(wait_s):
            raise DeviceTimeoutError(
                f"sim process {name} is not ready after {_START_TIMEOUT_S:.0f} s; "
                "is the machine overloaded?"
            )
        try:
            kind, text = connection.recv()
        except EOFError:
            process.join(_STOP_TIMEOUT_S)
            raise DeviceError(_last_words(name, process, connection)) from None
        if kind == "error":
            raise DeviceError(text)
        self.backend = text or self.backend


def _last_words(name: str, process: Any, connection: Connection) -> str:  # noqa: ANN401
    try:
        if connection.poll():
            return str(connection.recv()[1])
    except EOFError:
        pass
    return f"sim process {name} has ended with exit code {process.exitcode}; start the run again"
