"""A RealSense made of librealsense's own software_device: the real SDK without a camera.

The pipeline, its queues, clock domains and recorder are the SDK's; only the pictures are drawn
here. For tests and for trying a robot file before the cameras have come.
"""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any, Final, Literal

import msgspec
import numpy as np

from gwp_edge.drivers.camera_process import FrameSource
from gwp_edge.drivers.realsense import RealSenseOptions, RealSenseSource
from gwp_edge.errors import DeviceError, SpecError
from gwp_edge.types import ImageArray

Domain = Literal["system_time", "global_time", "hardware_clock"]
# A device clock starts when the device does, which is never the host's epoch.
_DEVICE_EPOCH_NS: Final = 123_456_789_000


class SoftwareScript(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the software camera does.

    Attributes:
        domain: which clock it stamps with.
        plug: path of a file that stands for the cable: while it is missing, so is the device.
        skip_every: every this many frames one frame number is left out; 0 for never.
        late_ms: time between capture and arrival.
    """

    domain: Domain = "system_time"
    plug: str | None = None
    skip_every: int = 0
    late_ms: float = 0.0


def create_source(
    role: str, *, script: dict[str, object] | None = None, **options: object
) -> FrameSource:
    """Make the source of a software camera, by the options of a real one and a script.

    Raises:
        SpecError: an option is wrong.
    """
    try:
        parsed = msgspec.convert(options, RealSenseOptions)
        how = msgspec.convert(script or {}, SoftwareScript)
    except (msgspec.ValidationError, ValueError) as e:
        raise SpecError(f"camera {role}: {e}") from e
    return RealSenseSource(role, parsed, SoftwareLookup(role, parsed, how))


def draw(frame_number: int, width_px: int, height_px: int) -> ImageArray:
    """Return a picture, uint8 RGB, that is red on the left, blue on the right, and counts."""
    image = np.zeros((height_px, width_px, 3), np.uint8)
    image[:, : width_px // 2, 0] = 200
    image[:, width_px // 2 :, 2] = 200
    image[: height_px // 4, :, 1] = frame_number % 256
    return image


class SoftwareLookup:
    """Makes a software device and feeds it from a thread of its own. Threads: one owner."""

    def __init__(self, role: str, options: RealSenseOptions, script: SoftwareScript) -> None:
        self._role = role
        self._options = options
        self._script = script
        self._device: Any = None

    def bind(self, rs: Any, pipeline: Any, config: Any, serial: str | None) -> None:  # noqa: ANN401
        """Give ``pipeline`` a software device; see ``realsense.DeviceLookup``.

        Raises:
            DeviceError: it is unplugged.
        """
        del config
        if not self._is_plugged():
            raise DeviceError(f"camera {self._role}: no RealSense with serial {serial}; found none")
        self._device, sensor, profile = make_device(rs, self._options, serial or "SOFTWARE")
        pipeline.set_device(self._device)
        feeder = threading.Thread(
            target=self._feed, args=(rs, sensor, profile), name="software-camera", daemon=True
        )
        feeder.start()

    def _is_plugged(self) -> bool:
        return self._script.plug is None or Path(self._script.plug).exists()

    def _feed(self, rs: Any, sensor: Any, profile: Any) -> None:  # noqa: ANN401
        o, script = self._options, self._script
        period_ns = round(1e9 / o.fps)
        t_ns = time.monotonic_ns()
        number = n_sent = 0
        while self._is_plugged():
            t_ns += period_ns
            time.sleep(max(0, t_ns - time.monotonic_ns()) / 1e9)
            number += 1
            n_sent += 1
            if script.skip_every and n_sent % script.skip_every == 0:
                number += 1
            stamp_ns = time.time_ns() - round(script.late_ms * 1e6)
            if script.domain == "hardware_clock":
                stamp_ns = time.monotonic_ns() % 10**12 + _DEVICE_EPOCH_NS
            push_frame(
                rs,
                sensor,
                profile,
                draw(number, o.width_px, o.height_px),
                stamp_ms=stamp_ns / 1e6,
                number=number,
                domain=script.domain,
            )


def make_device(rs: Any, options: RealSenseOptions, serial: str) -> tuple[Any, Any, Any]:  # noqa: ANN401
    """Return a software device with one colour stream: device, sensor, stream profile."""
    device = rs.software_device()
    device.register_info(rs.camera_info.serial_number, serial)
    device.register_info(rs.camera_info.name, "Software RealSense")
    sensor = device.add_sensor("RGB Camera")
    stream = rs.video_stream()
    stream.type, stream.uid = rs.stream.color, 1
    stream.width, stream.height, stream.fps = options.width_px, options.height_px, options.fps
    stream.bpp, stream.fmt = 3, rs.format.rgb8
    intrinsics = rs.intrinsics()
    intrinsics.width, intrinsics.height = options.width_px, options.height_px
    intrinsics.ppx, intrinsics.ppy = options.width_px / 2, options.height_px / 2
    intrinsics.fx = intrinsics.fy = float(options.width_px)
    intrinsics.model = rs.distortion.none
    intrinsics.coeffs = [0.0] * 5
    stream.intrinsics = intrinsics
    profile = sensor.add_video_stream(stream, is_default=True)
    device.create_matcher(rs.matchers.default)
    return device, sensor, profile.as_video_stream_profile()


def push_frame(
    rs: Any,  # noqa: ANN401
    sensor: Any,  # noqa: ANN401
    profile: Any,  # noqa: ANN401
    image: ImageArray,
    *,
    stamp_ms: float,
    number: int,
    domain: Domain,
) -> None:
    """Hand one picture, uint8 RGB, to the SDK as if the sensor had taken it."""
    frame = rs.software_video_frame()
    frame.pixels = image
    frame.stride, frame.bpp = image.shape[1] * 3, 3
    frame.timestamp, frame.domain = stamp_ms, getattr(rs.timestamp_domain, domain)
    frame.frame_number, frame.profile = number, profile
    sensor.on_video_frame(frame)
