"""What runs inside a camera's own process, and the memory that it shares with its keeper."""

from __future__ import annotations

import enum
import time
from dataclasses import dataclass
from typing import Final, Protocol, cast

from gwp_edge.child_process import die_with_parent, leave_terminal
from gwp_edge.errors import DeviceError, GwpError
from gwp_edge.frame_ring import FrameRing
from gwp_edge.robots import import_callable
from gwp_edge.shared_memory import SharedSegment, fence
from gwp_edge.types import ClockDomain, ImageArray

_READ_TIMEOUT_NS: Final = 200_000_000
_POLL_S: Final = 0.005
_WORDS_BYTES: Final = 128
_TEXT_BYTES: Final = 1024


class FramesEnded(DeviceError):  # noqa: N818 - the end of a recording, not a failure
    """There will be no more frames; the message says why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RawFrame:
    """What a source delivers.

    Attributes:
        image: uint8 RGB, (h, w, 3); may be overwritten by the next ``read``.
        t_captured_ns: capture time on the monotonic clock.
        t_received_ns: arrival on the monotonic clock.
        frame_idx: the camera's own counter.
        domain: where ``t_captured_ns`` comes from.
    """

    image: ImageArray
    t_captured_ns: int
    t_received_ns: int
    frame_idx: int
    domain: ClockDomain


class FrameSource(Protocol):
    """A camera as its own process sees it. Threads: one owner, and every call may block."""

    @property
    def n_implausible_stamps(self) -> int:
        """Frames whose time stamp could not be true."""
        ...

    def open(self) -> tuple[int, int]:
        """Start the device; return width and height of its pictures, px.

        Raises:
            DeviceError: absent, or it refuses; says what to do.
        """
        ...

    def read(self, timeout_ns: int) -> RawFrame | None:
        """Return the next frame, or None when none came in time.

        Raises:
            DeviceError: the device has failed; its process is to be replaced.
            FramesEnded: there will be no more.
        """
        ...

    def close(self) -> None:
        """Stop the device; safe to call twice and after a failed ``open``."""
        ...


class Phase(enum.IntEnum):
    """How far the process is."""

    STARTING = 0
    OPENED = 1  # the size is known, the ring is waited for
    STREAMING = 2
    FAILED = 3
    ENDED = 4


class CameraWord(enum.IntEnum):
    """Single 64-bit values; the process writes all but RING_READY and STOP."""

    PHASE = 0
    HEARTBEAT_NS = enum.auto()
    WIDTH = enum.auto()
    HEIGHT = enum.auto()
    RING_READY = enum.auto()
    STOP = enum.auto()
    N_FRAMES = enum.auto()
    N_DROPPED = enum.auto()
    N_IMPLAUSIBLE = enum.auto()
    T_LAST_FRAME_NS = enum.auto()
    LAST_IDX = enum.auto()
    TEXT_BYTES = enum.auto()


class CameraSegment:
    """Words and one text in shared memory. Threads: one owner per process."""

    def __init__(self, segment: SharedSegment) -> None:
        self._segment = segment
        self.name = segment.name
        self.words = segment.buffer[:_WORDS_BYTES].cast("q")

    @classmethod
    def create(cls, name: str) -> CameraSegment:
        """Make one.

        Raises:
            DeviceError: shared memory is missing or short.
        """
        made = cls(SharedSegment.create(name, _WORDS_BYTES + 2 * _TEXT_BYTES))
        made.words[CameraWord.LAST_IDX] = -1
        return made

    @classmethod
    def attach(cls, name: str) -> CameraSegment:
        """Open one that another process made.

        Raises:
            DeviceError: there is none of this name.
        """
        return cls(SharedSegment.attach(name))

    @property
    def message(self) -> str:
        """What the process said before it failed."""
        return self._text(_WORDS_BYTES, self.words[CameraWord.TEXT_BYTES])

    @property
    def ring_name(self) -> str:
        """The ring to publish into; valid once RING_READY is set."""
        return self._text(_WORDS_BYTES + _TEXT_BYTES, self.words[CameraWord.RING_READY])

    def say(self, message: str) -> None:
        """Write the message."""
        data = message.encode()[:_TEXT_BYTES]
        self._segment.buffer[_WORDS_BYTES : _WORDS_BYTES + len(data)] = data
        fence()
        self.words[CameraWord.TEXT_BYTES] = len(data)

    def give_ring(self, name: str) -> None:
        """Tell the process its ring."""
        data = name.encode()
        start = _WORDS_BYTES + _TEXT_BYTES
        self._segment.buffer[start : start + len(data)] = data
        fence()
        self.words[CameraWord.RING_READY] = len(data)

    def reset(self) -> None:
        """Make it ready for another process; counters stay."""
        for word in (CameraWord.RING_READY, CameraWord.STOP, CameraWord.TEXT_BYTES):
            self.words[word] = 0
        self.words[CameraWord.PHASE] = Phase.STARTING

    def close(self) -> None:
        """Unmap; safe to call twice."""
        self.words.release()
        self._segment.close()

    def unlink(self) -> None:
        """Remove the name; safe to call twice."""
        self._segment.unlink()

    def _text(self, start: int, n_bytes: int) -> str:
        fence()
        return bytes(self._segment.buffer[start : start + n_bytes]).decode(errors="replace")


def host_main(
    role: str, factory: str, kwargs: dict[str, object], *, segment_name: str, parent_pid: int
) -> None:
    """Run the process of one camera to its end."""
    die_with_parent(parent_pid)
    leave_terminal(killable=True)
    segment = CameraSegment.attach(segment_name)
    words = segment.words
    source: FrameSource | None = None
    try:
        source = cast(FrameSource, import_callable(factory, "camera source")(role, **kwargs))
        words[CameraWord.WIDTH], words[CameraWord.HEIGHT] = source.open()
        fence()
        words[CameraWord.PHASE] = Phase.OPENED
        ring = _await_ring(segment)
        if ring is not None:
            _Publisher(ring, segment, source).run()
    except GwpError as e:
        segment.say(str(e))
        words[CameraWord.PHASE] = Phase.FAILED
    except Exception as e:  # a bug in a source; the keeper reports it and tries again
        segment.say(f"camera {role}: {type(e).__name__}: {e}")
        words[CameraWord.PHASE] = Phase.FAILED
        raise
    finally:
        # Stopping a device that is gone may hang; the keeper does not wait for it.
        if source is not None:
            source.close()


def _await_ring(segment: CameraSegment) -> FrameRing | None:
    while not segment.words[CameraWord.STOP]:
        if segment.words[CameraWord.RING_READY]:
            return FrameRing.attach(segment.ring_name)
        time.sleep(_POLL_S)
    return None


class _Publisher:
    """Moves frames from a source to a ring and counts them. Threads: one owner."""

    def __init__(self, ring: FrameRing, segment: CameraSegment, source: FrameSource) -> None:
        self._ring = ring
        self._segment = segment
        self._words = segment.words
        self._source = source
        self._last_raw_idx: int | None = None
        self._t_last_captured_ns = 0

    def run(self) -> None:
        """Publish until told to stop or out of frames."""
        words = self._words
        words[CameraWord.HEARTBEAT_NS] = words[CameraWord.T_LAST_FRAME_NS] = time.monotonic_ns()
        fence()
        words[CameraWord.PHASE] = Phase.STREAMING
        try:
            while not words[CameraWord.STOP]:
                words[CameraWord.HEARTBEAT_NS] = time.monotonic_ns()
                raw = self._source.read(_READ_TIMEOUT_NS)
                # A device that was unplugged may hand out its last frame once more.
                if raw is not None and raw.frame_idx != self._last_raw_idx:
                    self._publish(raw)
        except FramesEnded as e:
            self._ring.mark_failed(str(e))
            words[CameraWord.PHASE] = Phase.ENDED
        finally:
            self._ring.close()

    def _publish(self, raw: RawFrame) -> None:
        words = self._words
        step = 1
        if self._last_raw_idx is not None and raw.frame_idx > self._last_raw_idx:
            step = raw.frame_idx - self._last_raw_idx
        # A counter that starts again, by a reset or in a new process, goes on from the last one.
        frame_idx = words[CameraWord.LAST_IDX] + step
        self._last_raw_idx = raw.frame_idx
        self._t_last_captured_ns = max(self._t_last_captured_ns, raw.t_captured_ns)
        self._ring.publish(
            raw.image,
            t_captured_ns=self._t_last_captured_ns,
            t_received_ns=raw.t_received_ns,
            frame_idx=frame_idx,
            domain=raw.domain,
        )
        words[CameraWord.LAST_IDX] = frame_idx
        words[CameraWord.N_DROPPED] += step - 1
        words[CameraWord.N_IMPLAUSIBLE] = self._source.n_implausible_stamps
        words[CameraWord.N_FRAMES] += 1
        words[CameraWord.T_LAST_FRAME_NS] = raw.t_received_ns
