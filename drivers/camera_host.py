"""A blocking camera in a process of its own, so that a hung SDK call never stops the run.

``HostedCamera`` is what the run holds: it starts the process, reads the newest frame from shared
memory without blocking, and keeps the process alive: a camera that hangs, stalls or is unplugged
has its process killed and started again, with a growing pause, until it delivers again. What runs
inside the process is a ``FrameSource``; it may block and crash as it likes.
"""

from __future__ import annotations

import logging
import multiprocessing
import multiprocessing.process
import os
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

from gwp_edge.child_process import start_shielded
from gwp_edge.drivers.camera_process import CameraSegment, CameraWord, Phase, host_main
from gwp_edge.errors import DeviceError, DeviceTimeoutError, SpecError
from gwp_edge.frame_ring import FrameRing
from gwp_edge.shared_memory import unique_name
from gwp_edge.types import Frame

logger = logging.getLogger(__name__)

_POLL_S: Final = 0.02
_STOP_S: Final = 1.0
_N_SLOTS: Final = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class HostOptions:
    """When a camera's process is given up and started again.

    Attributes:
        open_timeout_s: time to open the device.
        hang_timeout_s: silence of the process itself, which means a hung call.
        stall_timeout_s: time without a frame; None never restarts for it.
        backoff_s: first pause before a restart; doubles with every failure in a row.
        backoff_max_s: longest pause.
    """

    open_timeout_s: float = 20.0
    hang_timeout_s: float = 2.0
    stall_timeout_s: float | None = 2.0
    backoff_s: float = 0.5
    backoff_max_s: float = 10.0

    def __post_init__(self) -> None:
        for name in ("open_timeout_s", "hang_timeout_s", "backoff_s", "backoff_max_s"):
            if not getattr(self, name) > 0:
                raise SpecError(f"{name}: expected a positive time, got {getattr(self, name)}")
        if self.stall_timeout_s is not None and not self.stall_timeout_s > 0:
            raise SpecError(f"stall_timeout_s: expected positive, got {self.stall_timeout_s}")


@dataclass(frozen=True, slots=True, kw_only=True)
class CameraHealth:
    """How a camera has fared since it was opened.

    Attributes:
        n_frames: frames published.
        n_dropped: frames that are missing by the camera's own count.
        n_implausible_stamps: frames whose stamp could not be true; see ``camera_clock``.
        n_restarts: times its process was replaced.
        last_error: why it was replaced last, or None.
        delivering: whether its process runs and streams.
    """

    n_frames: int
    n_dropped: int
    n_implausible_stamps: int
    n_restarts: int
    last_error: str | None
    delivering: bool

    @property
    def is_good(self) -> bool:
        """Whether nothing went wrong."""
        return not (self.n_dropped or self.n_implausible_stamps or self.n_restarts)

    def __str__(self) -> str:
        parts = [f"{self.n_frames} frames, {self.n_dropped} dropped"]
        if self.n_implausible_stamps:
            parts.append(f"{self.n_implausible_stamps} implausible time stamps")
        if self.n_restarts:
            parts.append(f"restarted {self.n_restarts}x, last: {self.last_error}")
        if not self.delivering:
            parts.append("delivers nothing at present")
        return "; ".join(parts)


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceConfig:
    """What the camera's process runs: "module:function", called with the role and these."""

    factory: str
    kwargs: Mapping[str, object] = field(default_factory=dict)


class HostedCamera:
    """A camera that lives in its own process. Threads: one owner; it runs one thread of its own.

    Args:
        role: name as in the policy's spec.
        source: what to run in the process.
        options: when to restart it.
    """

    def __init__(self, role: str, source: SourceConfig, options: HostOptions | None = None) -> None:
        self._role = role
        self._source = source
        self._options = options or HostOptions()
        self._segment: CameraSegment | None = None
        self._ring: FrameRing | None = None
        self._thread: threading.Thread | None = None
        self._closing = threading.Event()
        self._opened = threading.Event()
        self._open_error: DeviceError | None = None
        self._process: multiprocessing.process.BaseProcess | None = None
        self._n_restarts = 0
        self._last_error: str | None = None

    @property
    def name(self) -> str:
        """Role name as in the spec."""
        return self._role

    @property
    def ring_name(self) -> str | None:
        """Name of the ring that holds its frames, for other readers; None while closed."""
        return None if self._ring is None else self._ring.name

    @property
    def host_pid(self) -> int | None:
        """Process id of its process, None while there is none."""
        process = self._process
        return None if process is None else process.pid

    @property
    def health(self) -> CameraHealth:
        """How it has fared.

        Raises:
            DeviceError: not open.
        """
        words = self._opened_segment().words
        return CameraHealth(
            n_frames=words[CameraWord.N_FRAMES],
            n_dropped=words[CameraWord.N_DROPPED],
            n_implausible_stamps=words[CameraWord.N_IMPLAUSIBLE],
            n_restarts=self._n_restarts,
            last_error=self._last_error,
            delivering=words[CameraWord.PHASE] == Phase.STREAMING,
        )

    def open(self) -> None:
        """Start the process and wait until the device streams.

        Raises:
            DeviceError: the device is absent or refuses.
            DeviceTimeoutError: it does not open in time.
        """
        if self._segment is not None:
            return
        self._closing.clear()
        self._opened.clear()
        self._open_error = None
        self._n_restarts, self._last_error = 0, None
        self._segment = CameraSegment.create(unique_name("camera"))
        self._thread = threading.Thread(target=self._keep, name=f"camera-{self._role}", daemon=True)
        self._thread.start()
        self._opened.wait()
        error = self._opening_error()
        if error is not None:
            self.close()
            raise error

    def latest(self) -> Frame | None:
        """Return the newest frame, or None before the first; never blocks.

        A camera that is being restarted keeps its last frame: the caller judges its age.

        Raises:
            DeviceError: not open, or there will be no more frames (a recording has ended).
        """
        self._opened_segment()
        return None if self._ring is None else self._ring.latest(self._role)

    def close(self) -> None:
        """End the process; safe to call twice and after a failed ``open``."""
        self._closing.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._ring is not None:
            self._ring.close()
            self._ring.unlink()
            self._ring = None
        if self._segment is not None:
            self._segment.close()
            self._segment.unlink()
            self._segment = None

    def _opening_error(self) -> DeviceError | None:
        return self._open_error

    def _opened_segment(self) -> CameraSegment:
        if self._segment is None:
            raise DeviceError(f"camera {self._role} is not open; call open first")
        return self._segment

    # The thread: everything below runs in it.

    def _keep(self) -> None:
        """Keep a process running until the camera is closed."""
        backoff_s = self._options.backoff_s
        try:
            while not self._closing.is_set():
                n_before = self._opened_segment().words[CameraWord.N_FRAMES]
                self._start()
                try:
                    error = self._follow()
                finally:
                    self._end()
                if error is None:
                    return
                if not self._opened.is_set():
                    self._open_error = error
                    return
                self._n_restarts += 1
                self._last_error = str(error)
                if self._opened_segment().words[CameraWord.N_FRAMES] > n_before:
                    backoff_s = self._options.backoff_s
                logger.warning("%s; starting it again in %.1f s", error, backoff_s)
                self._closing.wait(backoff_s)
                backoff_s = min(2 * backoff_s, self._options.backoff_max_s)
        except (DeviceError, OSError) as e:
            self._give_up(f"camera {self._role}: cannot run its process: {e}")
        finally:
            self._opened.set()

    def _give_up(self, message: str) -> None:
        self._last_error = message
        if self._ring is None:
            self._open_error = DeviceError(message)
        else:
            self._ring.mark_failed(message)

    def _start(self) -> None:
        segment = self._opened_segment()
        segment.reset()
        # Made here and not by the caller: its end is tied to the life of this thread.
        self._process = multiprocessing.get_context("spawn").Process(
            target=host_main,
            args=(self._role, self._source.factory, dict(self._source.kwargs)),
            kwargs={"segment_name": segment.name, "parent_pid": os.getpid()},
            name=f"gwp-camera-{self._role}",
            daemon=True,
        )
        start_shielded(self._process)

    def _follow(self) -> DeviceError | None:
        """Watch the process; return why it must be replaced, or None when it must not."""
        t_start_ns = time.monotonic_ns()
        while not self._closing.wait(_POLL_S):
            segment = self._opened_segment()
            phase = Phase(segment.words[CameraWord.PHASE])
            if phase is Phase.ENDED:
                return None
            if phase is Phase.OPENED and not segment.words[CameraWord.RING_READY]:
                error = self._make_ring(segment)
                if error is not None:
                    return error
            if phase is Phase.STREAMING:
                self._opened.set()
            error = self._judge(segment, phase, t_start_ns)
            if error is not None:
                return error
        return None

    def _judge(self, segment: CameraSegment, phase: Phase, t_start_ns: int) -> DeviceError | None:
        exit_code = self._process.exitcode if self._process is not None else None
        if phase is Phase.FAILED:
            return DeviceError(segment.message)
        if exit_code is not None:
            how = f"was killed by signal {-exit_code}" if exit_code < 0 else f"ended ({exit_code})"
            return DeviceError(f"camera {self._role}: its process {how}")
        words, options = segment.words, self._options
        now_ns = time.monotonic_ns()
        if phase in (Phase.STARTING, Phase.OPENED):
            if now_ns - t_start_ns > options.open_timeout_s * 1e9:
                return DeviceTimeoutError(
                    f"camera {self._role}: did not open in {options.open_timeout_s:g} s; "
                    "unplug it and plug it in again"
                )
            return None
        silent_s = (now_ns - words[CameraWord.HEARTBEAT_NS]) / 1e9
        if silent_s > options.hang_timeout_s:
            return DeviceTimeoutError(
                f"camera {self._role}: its process hangs since {silent_s:.1f} s"
            )
        stalled_s = (now_ns - words[CameraWord.T_LAST_FRAME_NS]) / 1e9
        if options.stall_timeout_s is not None and stalled_s > options.stall_timeout_s:
            return DeviceTimeoutError(
                f"camera {self._role}: no frame for {stalled_s:.1f} s; check its cable"
            )
        return None

    def _make_ring(self, segment: CameraSegment) -> DeviceError | None:
        width_px, height_px = segment.words[CameraWord.WIDTH], segment.words[CameraWord.HEIGHT]
        if self._ring is None:
            self._ring = FrameRing.create(
                unique_name(f"frames-{os.getpid()}"), width_px, height_px, _N_SLOTS
            )
        elif (self._ring.width_px, self._ring.height_px) != (width_px, height_px):
            return DeviceError(
                f"camera {self._role}: came back with {width_px}x{height_px} px instead of "
                f"{self._ring.width_px}x{self._ring.height_px}; is it another device?"
            )
        segment.give_ring(self._ring.name)
        return None

    def _end(self) -> None:
        """End the process; a hung one is killed."""
        process, self._process = self._process, None
        if process is None or process.pid is None:
            return
        self._opened_segment().words[CameraWord.STOP] = 1
        if self._closing.is_set() or process.exitcode is not None:
            process.join(_STOP_S)
        if process.is_alive():
            process.kill()
        process.join()
        process.close()
