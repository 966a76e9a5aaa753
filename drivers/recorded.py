"""Recordings played back as live cameras: librealsense files and LeRobot episodes.

Each plays in a process of its own, like a real camera. ``real`` speed keeps the recording's pace;
``max`` publishes as fast as it can be read, and a reader sees the newest. Capture times are those
of the playback, labelled ``recorded``. Cameras of one recording that are made together, one for
each role, start together.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal, TypeVar

import msgspec
import numpy as np

from gwp_edge.drivers.camera_host import HostedCamera, HostOptions, SourceConfig
from gwp_edge.drivers.camera_process import FramesEnded, FrameSource, RawFrame
from gwp_edge.drivers.realsense import import_sdk
from gwp_edge.errors import DeviceError, SpecError
from gwp_edge.protocols import Camera
from gwp_edge.spec import PolicySpec
from gwp_edge.types import ImageArray

if TYPE_CHECKING:
    from gwp_edge.lerobot.dataset import LeRobotDataset

Speed = Literal["real", "max"]
# Enough for every camera's process to be up; one that is later joins at the right place.
_LEAD_NS: Final = 2_000_000_000
_MS_NS: Final = 1_000_000
_FORMATS: Final = ("rgb8", "bgr8")

_Options = TypeVar("_Options", bound="PlaybackOptions")


class PlaybackOptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How a recording is played.

    Attributes:
        speed: ``real`` or ``max``.
        loop: begin again at the end; otherwise the end is an error of the camera.
        t_start_ns: monotonic time of the first frame at real speed; set by the factory.
    """

    speed: Speed = "real"
    loop: bool = False
    t_start_ns: int | None = None


class RsFileOptions(PlaybackOptions, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """``path``: a .db3 or .bag file of librealsense with a colour stream."""

    path: str


class LeRobotOptions(PlaybackOptions, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """``root``: dataset; ``episode``: index; ``camera``: its name there, by default the role."""

    root: str
    episode: int = 0
    camera: str | None = None


class _Starts:
    """Gives the cameras of one recording one start. Threads: one owner."""

    def __init__(self) -> None:
        self._known: dict[object, tuple[int, set[str]]] = {}

    def of(self, recording: object, role: str) -> int:
        t_start_ns, roles = self._known.get(recording, (0, {role}))
        if role in roles:  # the same role again is a new run
            t_start_ns, roles = time.monotonic_ns() + _LEAD_NS, set()
        self._known[recording] = (t_start_ns, roles | {role})
        return t_start_ns


_STARTS: Final = _Starts()


def create_rs_file_camera(role: str, options: Mapping[str, object], spec: PolicySpec) -> Camera:
    """Make a camera that plays a librealsense recording.

    Raises:
        SpecError: an option is wrong, or there is no such file.
    """
    parsed = _parse(role, options, RsFileOptions)
    if not Path(parsed.path).is_file():
        raise SpecError(f"camera {role}: {parsed.path}: no such recording")
    recording = tuple(sorted(spec.cameras))  # one file for each camera of the robot
    return _hosted(role, "create_rs_file_source", parsed, recording)


def create_lerobot_camera(role: str, options: Mapping[str, object], spec: PolicySpec) -> Camera:
    """Make a camera that plays an episode of a LeRobot v3.0 dataset.

    Raises:
        SpecError: an option is wrong, or there is no such dataset.
    """
    del spec
    parsed = _parse(role, options, LeRobotOptions)
    if not (Path(parsed.root) / "meta" / "info.json").is_file():
        raise SpecError(f"camera {role}: {parsed.root}: is no LeRobot dataset")
    return _hosted(role, "create_lerobot_source", parsed, (parsed.root, parsed.episode))


def create_rs_file_source(role: str, **options: object) -> FrameSource:
    """Make what runs in the camera's process."""
    return RsFileSource(role, _parse(role, options, RsFileOptions))


def create_lerobot_source(role: str, **options: object) -> FrameSource:
    """Make what runs in the camera's process."""
    return LeRobotSource(role, _parse(role, options, LeRobotOptions))


class RsFileSource:
    """The colour stream of a librealsense recording. Threads: one owner."""

    n_implausible_stamps: int = 0

    def __init__(self, role: str, options: RsFileOptions) -> None:
        self._role = role
        self._options = options
        self._pipeline: Any = None
        self._playback: Any = None
        self._stopped: Any = None
        self._is_bgr = False
        self._pending: tuple[ImageArray, int, int] | None = None
        self._t_base_ns = 0
        self._stamp0_ns: int | None = None
        self._last_stamp_ns = 0
        self._last_number: int | None = None
        self._n_frames = 0

    def open(self) -> tuple[int, int]:
        """Open the file; return width and height of its pictures, px.

        Raises:
            DeviceError: unreadable, or without a colour stream in RGB.
        """
        rs, o = import_sdk(), self._options
        pipeline, config = rs.pipeline(), rs.config()
        try:
            config.enable_device_from_file(o.path, repeat_playback=o.loop)
            config.enable_stream(rs.stream.color)
            if not config.can_resolve(pipeline):
                raise DeviceError(
                    f"camera {self._role}: {o.path}: is no recording of librealsense, or has no "
                    "colour stream"
                )
            # The pace is kept here, so that several files play in step. Told before the start: the
            # SDK would begin at the file's own pace, and what nobody reads in that time is lost.
            self._playback = config.resolve(pipeline).get_device().as_playback()
            self._playback.set_real_time(False)
            profile = pipeline.start(config)
            self._pipeline = pipeline
            stream = profile.get_stream(rs.stream.color).as_video_stream_profile()
        except RuntimeError as e:
            raise DeviceError(
                f"camera {self._role}: {o.path}: cannot be played ({e}); expected a .db3 or .bag "
                "file of librealsense"
            ) from e
        self._stopped = rs.playback_status.stopped
        name = str(stream.format()).rsplit(".", 1)[-1]
        if name not in _FORMATS:
            raise DeviceError(
                f"camera {self._role}: {o.path}: expected colour as {' or '.join(_FORMATS)}, got "
                f"{name}; record with the stream set to rgb8"
            )
        self._is_bgr = name == "bgr8"
        self._t_base_ns = o.t_start_ns or time.monotonic_ns()
        return int(stream.width()), int(stream.height())

    def read(self, timeout_ns: int) -> RawFrame | None:
        """Return the next frame once it is due.

        Raises:
            DeviceError: not open, or the SDK reports a failure.
            FramesEnded: the file has ended and does not loop.
        """
        if self._pipeline is None:
            raise DeviceError(f"camera {self._role} is not open; call open first")
        deadline_ns = time.monotonic_ns() + timeout_ns
        if self._pending is None:
            self._pending = self._fetch(timeout_ns)
        if self._pending is None:
            return None
        image, number, position_ns = self._pending
        t_due_ns = self._t_base_ns + position_ns
        if self._options.speed == "real" and not _sleep_until(t_due_ns, deadline_ns):
            return None
        self._pending = None
        self._n_frames += 1
        now_ns = time.monotonic_ns()
        return RawFrame(
            image=image,
            t_captured_ns=t_due_ns if self._options.speed == "real" else now_ns,
            t_received_ns=now_ns,
            frame_idx=number,
            domain="recorded",
        )

    def close(self) -> None:
        """Close the file; safe to call twice."""
        pipeline, self._pipeline = self._pipeline, None
        if pipeline is not None:
            pipeline.stop()

    def _fetch(self, timeout_ns: int) -> tuple[ImageArray, int, int] | None:
        try:
            ok, frames = self._pipeline.try_wait_for_frames(max(1, timeout_ns // _MS_NS))
            color = frames.get_color_frame() if ok else None
            ended = not ok and self._playback.current_status() == self._stopped
        except RuntimeError as e:
            raise DeviceError(f"camera {self._role}: {self._options.path}: {e}") from e
        if ended:
            raise _ended(self._role, self._options.path, self._n_frames)
        if not color or color.get_frame_number() == self._last_number:
            return None
        self._last_number = color.get_frame_number()
        stamp_ns = round(color.get_timestamp() * _MS_NS)
        if self._stamp0_ns is None:
            self._stamp0_ns = self._last_stamp_ns = stamp_ns
        if stamp_ns < self._last_stamp_ns:  # the file has begun again
            self._t_base_ns += self._last_stamp_ns - self._stamp0_ns + 33 * _MS_NS
            self._stamp0_ns = stamp_ns
        self._last_stamp_ns = stamp_ns
        image = np.asanyarray(color.get_data())
        # The SDK takes the frame's memory back with the frame.
        image = np.ascontiguousarray(image[:, :, ::-1]) if self._is_bgr else image.copy()
        return image, self._last_number, stamp_ns - self._stamp0_ns


class LeRobotSource:
    """One camera of one episode. Threads: one owner."""

    n_implausible_stamps: int = 0

    def __init__(self, role: str, options: LeRobotOptions) -> None:
        self._role = role
        self._options = options
        self._camera = options.camera or role
        self._dataset: LeRobotDataset | None = None
        self._n_frames = 0
        self._period_ns = 0
        self._t_start_ns = 0
        self._idx = 0
        self._pending: tuple[int, ImageArray] | None = None

    def open(self) -> tuple[int, int]:
        """Open the dataset; return width and height of its pictures, px.

        Raises:
            DeviceError: pyarrow or PyAV is missing, or the dataset has no such episode or camera.
        """
        o = self._options
        try:
            # Needs pyarrow and PyAV, which a robot without recordings does without.
            from gwp_edge.lerobot.dataset import LeRobotDataset
        except ImportError as e:
            raise DeviceError(
                f"camera {self._role}: playing a LeRobot episode needs pyarrow and PyAV ({e}); "
                "pip install 'gwp-edge[recorded]'"
            ) from e
        try:
            self._dataset = LeRobotDataset.open(o.root)
            self._n_frames = self._dataset.episode(o.episode).n_frames
            first = self._dataset.image(o.episode, 0, self._camera)
        except SpecError as e:
            raise DeviceError(f"camera {self._role}: {e}") from e
        self._period_ns = round(1e9 / self._dataset.fps)
        self._t_start_ns = o.t_start_ns or time.monotonic_ns()
        return first.shape[1], first.shape[0]

    def read(self, timeout_ns: int) -> RawFrame | None:
        """Return the next frame once it is due; at real speed late frames are left out.

        Raises:
            DeviceError: not open, or the video is damaged.
            FramesEnded: the episode has ended and does not loop.
        """
        if self._dataset is None:
            raise DeviceError(f"camera {self._role} is not open; call open first")
        deadline_ns = time.monotonic_ns() + timeout_ns
        is_real = self._options.speed == "real"
        if is_real:
            passed = (time.monotonic_ns() - self._t_start_ns) // self._period_ns
            self._idx = max(self._idx, passed)
        t_due_ns = self._t_start_ns + self._idx * self._period_ns
        is_over = self._idx >= self._n_frames and not self._options.loop
        image = None if is_over else self._image(self._idx % self._n_frames)
        if is_real and not _sleep_until(t_due_ns, deadline_ns):
            return None
        if image is None:
            where = f"{self._options.root} episode {self._options.episode}"
            raise _ended(self._role, where, self._n_frames)
        now_ns = time.monotonic_ns()
        raw = RawFrame(
            image=image,
            t_captured_ns=t_due_ns if is_real else now_ns,
            t_received_ns=now_ns,
            frame_idx=self._idx,
            domain="recorded",
        )
        self._idx += 1
        return raw

    def close(self) -> None:
        """Close the dataset; safe to call twice."""
        dataset, self._dataset = self._dataset, None
        if dataset is not None:
            dataset.close()

    def _image(self, frame: int) -> ImageArray:
        if self._dataset is None:
            raise DeviceError(f"camera {self._role} is not open; call open first")
        if self._pending is None or self._pending[0] != frame:
            try:
                image = self._dataset.image(self._options.episode, frame, self._camera)
            except SpecError as e:
                raise DeviceError(f"camera {self._role}: {e}") from e
            self._pending = (frame, image)
        return self._pending[1]


def _sleep_until(t_ns: int, deadline_ns: int) -> bool:
    """Sleep until ``t_ns``; return False when the deadline comes first."""
    time.sleep(max(0, min(t_ns, deadline_ns) - time.monotonic_ns()) / 1e9)
    return t_ns <= deadline_ns


def _ended(role: str, what: str, n_frames: int) -> FramesEnded:
    return FramesEnded(
        f"camera {role}: the recording {what} has ended after {n_frames} frames; "
        "set loop = true to repeat it"
    )


def _parse(role: str, options: Mapping[str, object], kind: type[_Options]) -> _Options:
    try:
        return msgspec.convert(dict(options), kind)
    except (msgspec.ValidationError, ValueError) as e:
        raise SpecError(f"camera {role}: {e}") from e


def _hosted(role: str, factory: str, options: PlaybackOptions, recording: object) -> Camera:
    if options.t_start_ns is None:
        t_start_ns = _STARTS.of(recording, role)
        options = msgspec.structs.replace(options, t_start_ns=t_start_ns)
    source = SourceConfig(factory=f"{__name__}:{factory}", kwargs=msgspec.structs.asdict(options))
    # A pause in a recording is part of it; starting the process again would not fill it.
    return HostedCamera(role, source, HostOptions(stall_timeout_s=None, hang_timeout_s=5.0))


if TYPE_CHECKING:
    _FACTORIES: tuple[Callable[..., Camera], ...] = (create_rs_file_camera, create_lerobot_camera)
