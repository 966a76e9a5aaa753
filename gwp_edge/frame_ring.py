"""Camera frames from one writing process to any readers, through shared memory.

The writer never waits and the newest frame wins; see ``shared_memory.LatestRing``. Frames carry
their capture time, so a reader judges their age itself. A camera that has failed for good says so
through ``mark_failed``, and every reader's ``latest`` then raises.
"""

from __future__ import annotations

from typing import Final, get_args

import numpy as np

from gwp_edge.errors import DeviceError
from gwp_edge.shared_memory import LatestRing, SharedSegment, fence
from gwp_edge.types import ClockDomain, Frame, ImageArray

_MAGIC: Final = 0x4757_5046_5249_4E47
_VERSION: Final = 1
_WORD_MAGIC, _WORD_VERSION, _WORD_WIDTH, _WORD_HEIGHT, _WORD_SLOTS, _WORD_FAILED = range(6)
_MESSAGE_OFFSET_BYTES: Final = 64
_HEADER_BYTES: Final = 1024
_MAX_SIDE_PX: Final = 16384
_DOMAINS: Final[tuple[ClockDomain, ...]] = get_args(ClockDomain)


class FrameRing:
    """The newest frames of one camera. Threads: one writer, any readers, each its own object.

    Attributes:
        name: the segment's name, for ``attach``; take one from ``shared_memory.unique_name``.
        width_px: image width.
        height_px: image height.
        n_slots: frames that the writer goes through before it overwrites one.
    """

    def __init__(self, segment: SharedSegment) -> None:
        words = segment.buffer[:_MESSAGE_OFFSET_BYTES].cast("q")
        if words[_WORD_MAGIC] != _MAGIC or words[_WORD_VERSION] != _VERSION:
            raise DeviceError(
                f"shared memory {segment.name} is not a frame ring of version {_VERSION}; "
                "both processes must run the same gwp-edge"
            )
        self.name = segment.name
        self.width_px = words[_WORD_WIDTH]
        self.height_px = words[_WORD_HEIGHT]
        self.n_slots = words[_WORD_SLOTS]
        self._segment = segment
        self._words = words
        dtype = _slot_dtype(self.width_px, self.height_px)
        self._ring = LatestRing(segment.buffer[_HEADER_BYTES:], dtype, self.n_slots)
        self._cached: Frame | None = None
        self._cached_count = 0
        self._closed = False

    @classmethod
    def create(cls, name: str, width_px: int, height_px: int, n_slots: int = 4) -> FrameRing:
        """Make a ring.

        Raises:
            DeviceError: the size is absurd, the name is taken, or shared memory is short.
        """
        if not (0 < width_px <= _MAX_SIDE_PX and 0 < height_px <= _MAX_SIDE_PX):
            raise DeviceError(
                f"frame ring {name}: expected 1 to {_MAX_SIDE_PX} px a side, "
                f"got {width_px}x{height_px}"
            )
        if not 2 <= n_slots <= 64:
            raise DeviceError(f"frame ring {name}: expected 2 to 64 slots, got {n_slots}")
        size = LatestRing.size_bytes(_slot_dtype(width_px, height_px), n_slots)
        segment = SharedSegment.create(name, _HEADER_BYTES + size)
        words = segment.buffer[:_MESSAGE_OFFSET_BYTES].cast("q")
        words[_WORD_WIDTH], words[_WORD_HEIGHT] = width_px, height_px
        words[_WORD_SLOTS], words[_WORD_VERSION] = n_slots, _VERSION
        fence()
        words[_WORD_MAGIC] = _MAGIC
        words.release()
        return cls(segment)

    @classmethod
    def attach(cls, name: str) -> FrameRing:
        """Open a ring that another process made, to read or to be its one writer.

        Raises:
            DeviceError: there is none of this name, or it is something else.
        """
        segment = SharedSegment.attach(name)
        try:
            return cls(segment)
        except DeviceError:
            segment.close()
            raise

    def publish(
        self,
        image: ImageArray,
        *,
        t_captured_ns: int,
        t_received_ns: int,
        frame_idx: int,
        domain: ClockDomain,
    ) -> None:
        """Copy one frame in; it becomes the newest one.

        Args:
            image: uint8 RGB, shape (height_px, width_px, 3).
            t_captured_ns: capture time on the monotonic clock.
            t_received_ns: time at which the writer had the frame.
            frame_idx: the camera's counter.
            domain: where ``t_captured_ns`` comes from.

        Raises:
            DeviceError: the image has another size or type than the ring; nothing is published.
        """
        self._check_open()
        if image.dtype != np.uint8 or image.shape != (self.height_px, self.width_px, 3):
            raise DeviceError(
                f"frame ring {self.name}: expected uint8 ({self.height_px}, {self.width_px}, 3), "
                f"got {image.dtype} {image.shape}; open the camera with the size of the ring"
            )
        domain_idx = _DOMAINS.index(domain)
        with self._ring.writing() as slot:
            slot["t_captured_ns"] = t_captured_ns
            slot["t_received_ns"] = t_received_ns
            slot["frame_idx"] = frame_idx
            slot["domain"] = domain_idx
            slot["image"][...] = image

    def latest(self, camera: str) -> Frame | None:
        """Return the newest frame under the role name ``camera``, or None before the first one.

        Raises:
            DeviceError: the writer has reported that the camera failed.
        """
        self._check_open()
        n_message_bytes = self._words[_WORD_FAILED]
        if n_message_bytes:
            fence()
            end = _MESSAGE_OFFSET_BYTES + min(n_message_bytes, _HEADER_BYTES)
            message = bytes(self._segment.buffer[_MESSAGE_OFFSET_BYTES:end])
            raise DeviceError(message.decode(errors="replace"))
        if self._cached is not None and self._cached_count == self._ring.count:
            return self._cached
        newest = self._ring.latest()
        if newest is None:
            return self._cached
        record, self._cached_count = newest
        image = record["image"]
        image.setflags(write=False)
        self._cached = Frame(
            camera=camera,
            image=image,
            t_captured_ns=int(record["t_captured_ns"]),
            t_received_ns=int(record["t_received_ns"]),
            frame_idx=int(record["frame_idx"]),
            domain=_DOMAINS[int(record["domain"])],
        )
        return self._cached

    def mark_failed(self, message: str) -> None:
        """Make every ``latest`` raise with ``message`` (one line); the first one stays."""
        self._check_open()
        if self._words[_WORD_FAILED]:
            return
        data = message.encode()[: _HEADER_BYTES - _MESSAGE_OFFSET_BYTES] or b"camera failed"
        end = _MESSAGE_OFFSET_BYTES + len(data)
        self._segment.buffer[_MESSAGE_OFFSET_BYTES:end] = data
        fence()
        self._words[_WORD_FAILED] = len(data)

    def close(self) -> None:
        """Unmap the ring in this process; safe to call twice."""
        if self._closed:
            return
        self._closed = True
        self._ring.release()
        self._words.release()
        self._segment.close()

    def unlink(self) -> None:
        """Remove the ring's name; the maker's job. Safe to call twice."""
        self._segment.unlink()

    def _check_open(self) -> None:
        if self._closed:
            raise DeviceError(f"frame ring {self.name} is closed; attach it again")


def _slot_dtype(width_px: int, height_px: int) -> np.dtype[np.void]:
    return np.dtype(
        [
            ("t_captured_ns", np.int64),
            ("t_received_ns", np.int64),
            ("frame_idx", np.int64),
            ("domain", np.int64),
            ("image", np.uint8, (height_px, width_px, 3)),
        ]
    )
