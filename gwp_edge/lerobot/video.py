"""Read single frames of a video file by time stamp, exact to the frame."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import av
from av.container import InputContainer
from av.video.frame import VideoFrame
from av.video.stream import VideoStream

from gwp_edge.errors import SpecError
from gwp_edge.types import ImageArray, frozen_array

# Decoding on is cheaper than seeking for steps up to this long.
_DECODE_ON_S = 0.5
# A frame belongs to a time stamp when it is nearer than this share of the frame period.
_TOLERANCE = 0.1


@contextmanager
def _named_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError as e:
        raise SpecError(f"{path}: video file is missing; copy the dataset again") from e
    except (av.FFmpegError, OSError) as e:
        raise SpecError(
            f"{path}: video is corrupt or truncated ({e}); copy the dataset again"
        ) from e


class VideoReader:
    """Frames of one video file. Threads: one owner.

    Keeps its decoder running: frames asked for in rising order are decoded once; a long step or a
    step back seeks to the key frame before.
    """

    def __init__(self, path: Path, *, fps: float) -> None:
        self._path = path
        self._fps = fps
        with _named_errors(path):
            self._container: InputContainer = av.open(str(path))
            if not self._container.streams.video:
                raise SpecError(f"{path}: expected a video stream, found none")
            self._stream: VideoStream = self._container.streams.video[0]
            if self._stream.time_base is None:
                raise SpecError(f"{path}: the video stream has no time base; encode it again")
            self._tick_s = float(self._stream.time_base)
            self._frames: Iterator[VideoFrame] = self._container.decode(self._stream)
        self._last: VideoFrame | None = None

    def frame(self, t_s: float) -> ImageArray:
        """Return the frame shown at ``t_s``: uint8 RGB, shape (h, w, 3).

        Args:
            t_s: time stamp in the file, s.

        Raises:
            SpecError: no frame lies within a tenth of a frame period, or the file is damaged.
        """
        tolerance_s = _TOLERANCE / self._fps
        with _named_errors(self._path):
            step_s = -1.0 if self._last is None else t_s - self._time_s(self._last)
            if not -tolerance_s <= step_s <= _DECODE_ON_S:
                self._seek(t_s)
            frame = self._last
            while frame is not None and self._time_s(frame) < t_s - tolerance_s:
                frame = self._next()
            if frame is None or abs(self._time_s(frame) - t_s) > tolerance_s:
                raise SpecError(
                    f"{self._path}: expected a frame at {t_s:.4f} s, "
                    + ("but the video ends before" if frame is None else "found none there")
                    + "; the video does not match the episode table"
                )
            if frame.is_corrupt:
                raise SpecError(
                    f"{self._path}: the frame at {t_s:.4f} s is corrupt; copy the dataset again"
                )
            image: ImageArray = frozen_array(frame.to_ndarray(format="rgb24"), "uint8")
            return image

    def close(self) -> None:
        """Close the file; safe to call twice."""
        self._container.close()

    def _time_s(self, frame: VideoFrame) -> float:
        if frame.pts is None:
            raise SpecError(f"{self._path}: a frame has no time stamp; encode the video again")
        return frame.pts * self._tick_s

    def _next(self) -> VideoFrame | None:
        self._last = next(self._frames, None)
        return self._last

    def _seek(self, t_s: float) -> None:
        """Stand on a decoded frame at or before ``t_s``."""
        back_s = 0.0
        while True:
            target = max(0, round((t_s - back_s) / self._tick_s))
            self._container.seek(target, stream=self._stream)
            self._frames = self._container.decode(self._stream)
            frame = self._next()
            # With reordered frames an index by decoding time may land one key frame late.
            found = frame is not None and self._time_s(frame) <= t_s + _TOLERANCE / self._fps
            if found or target == 0:
                return
            back_s = max(1.0, 2.0 * back_s)
