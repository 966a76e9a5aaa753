"""Intel RealSense colour cameras through pyrealsense2, one process for each.

The SDK's pipeline, playback and clock domains are exercised without a camera through its own
``software_device``; finding, exposure and unplugging of a real one are not yet run on hardware.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Final, Protocol

import msgspec
import numpy as np

from gwp_edge.drivers.camera_clock import CameraClock, StampClock
from gwp_edge.drivers.camera_host import HostedCamera, HostOptions, SourceConfig
from gwp_edge.drivers.camera_process import FrameSource, RawFrame
from gwp_edge.errors import DeviceError, SpecError
from gwp_edge.protocols import Camera
from gwp_edge.spec import PolicySpec
from gwp_edge.types import ClockDomain

logger = logging.getLogger(__name__)

_SOURCE: Final = "gwp_edge.drivers.realsense:create_source"


class RealSenseOptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One camera in a robot file.

    Attributes:
        serial: serial number on the device; may be left out where only one is attached.
        width_px: of the colour stream.
        height_px: of the colour stream.
        fps: of the colour stream.
        exposure_us: fixed exposure; None leaves it to the camera.
        gain: fixed gain, in the camera's own steps; None leaves it to the camera.
        steady_fps: forbid the camera to slow down in poor light.
    """

    serial: str | None = None
    width_px: int = 640
    height_px: int = 480
    fps: int = 30
    exposure_us: int | None = None
    gain: int | None = None
    steady_fps: bool = True

    def __post_init__(self) -> None:
        for name in ("width_px", "height_px", "fps"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        for name in ("exposure_us", "gain"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"{name} must be positive or left out, got {value}")


class DeviceInfo(msgspec.Struct, frozen=True, kw_only=True):
    """A device that is attached; ``usb`` such as ``3.2``, empty where the SDK does not know."""

    serial: str
    name: str
    usb: str
    firmware: str


class DeviceLookup(Protocol):
    """How a pipeline finds its device. The SDK cannot list software devices, so tests bring one."""

    def bind(
        self,
        rs: Any,  # noqa: ANN401 - pyrealsense2 has no types
        pipeline: Any,  # noqa: ANN401
        config: Any,  # noqa: ANN401
        serial: str | None,
    ) -> None:
        """Make ``pipeline.start(config)`` open the device of this serial.

        Raises:
            DeviceError: it is not there; says which are.
        """
        ...


def create_camera(role: str, options: Mapping[str, object], spec: PolicySpec) -> Camera:
    """Make the camera ``role`` of a robot file.

    Raises:
        SpecError: an option is wrong, or no serial tells several cameras apart.
    """
    parsed = parse_options(role, options)
    if parsed.serial is None and len(spec.cameras) > 1:
        raise SpecError(
            f"camera {role}: expected a serial in the robot file, as the policy has "
            f"{len(spec.cameras)} cameras; `gwp-edge cameras --write robot.toml` makes one"
        )
    source = SourceConfig(factory=_SOURCE, kwargs=msgspec.structs.asdict(parsed))
    return HostedCamera(role, source, HostOptions())


def parse_options(role: str, options: Mapping[str, object]) -> RealSenseOptions:
    """Check the options of one camera.

    Raises:
        SpecError: an option is unknown or wrong.
    """
    try:
        return msgspec.convert(dict(options), RealSenseOptions)
    except (msgspec.ValidationError, ValueError) as e:
        raise SpecError(f"camera {role}: {e}") from e


def create_source(role: str, **options: object) -> FrameSource:
    """Make what runs in the camera's process."""
    return RealSenseSource(role, parse_options(role, options), HardwareLookup(role))


def import_sdk() -> Any:  # noqa: ANN401 - pyrealsense2 has no types
    """Return the module pyrealsense2.

    Raises:
        DeviceError: it is missing or does not load.
    """
    try:
        import pyrealsense2 as rs
    except ImportError as e:
        raise DeviceError(
            f"pyrealsense2 cannot be loaded ({e}); pip install 'gwp-edge[realsense]', and on "
            "Debian or Ubuntu apt install libusb-1.0-0"
        ) from e
    return rs


def list_devices() -> tuple[DeviceInfo, ...]:
    """Return the attached devices in order of their serials.

    Raises:
        DeviceError: the SDK is missing or cannot look.
    """
    rs = import_sdk()
    try:
        devices = list(rs.context().query_devices())
        found = [_describe(rs, d) for d in devices]
    except RuntimeError as e:
        raise DeviceError(f"librealsense cannot list devices: {_line(e)}") from e
    return tuple(sorted((d for d in found if d.serial), key=lambda d: d.serial))


class HardwareLookup:
    """Finds attached devices. Not yet run on hardware. Threads: one owner."""

    def __init__(self, role: str) -> None:
        self._role = role

    def bind(
        self,
        rs: Any,  # noqa: ANN401
        pipeline: Any,  # noqa: ANN401
        config: Any,  # noqa: ANN401
        serial: str | None,
    ) -> None:
        """Enable the device of this serial; see ``DeviceLookup``.

        Raises:
            DeviceError: it is not attached.
        """
        # Starting a pipeline without this check blocks for 15 s when the device is absent.
        devices = list_devices()
        have = ", ".join(f"{d.serial} ({d.name})" for d in devices) or "none"
        advice = "check cable and power, run gwp-edge cameras"
        if serial is None:
            if len(devices) != 1:
                raise DeviceError(
                    f"camera {self._role}: expected one attached RealSense or a serial in the "
                    f"robot file, found {have}; {advice}"
                )
            serial = devices[0].serial
        matching = [d for d in devices if d.serial == serial]
        if not matching:
            raise DeviceError(
                f"camera {self._role}: no RealSense with serial {serial}; found {have}; {advice}"
            )
        if matching[0].usb.startswith("2"):
            logger.warning(
                "camera %s: RealSense %s runs at USB %s; use a USB 3 port and cable",
                self._role,
                serial,
                matching[0].usb,
            )
        config.enable_device(serial)


class RealSenseSource:
    """The colour stream of one device. Threads: one owner, in a process of its own."""

    def __init__(self, role: str, options: RealSenseOptions, lookup: DeviceLookup) -> None:
        self._role = role
        self._options = options
        self._lookup = lookup
        self._pipeline: Any = None
        self._clock = CameraClock()
        self._domains: dict[Any, tuple[StampClock, ClockDomain]] = {}

    @property
    def n_implausible_stamps(self) -> int:
        """Frames whose time stamp could not be true."""
        return self._clock.n_implausible

    def open(self) -> tuple[int, int]:
        """Start the stream; return its width and height, px.

        Raises:
            DeviceError: the device is absent, or does not offer this stream.
        """
        rs = import_sdk()
        o = self._options
        domains = rs.timestamp_domain
        self._domains = {
            domains.system_time: ("wall", "host"),
            domains.global_time: ("wall", "global"),
            domains.hardware_clock: ("device", "hardware"),
        }
        pipeline, config = rs.pipeline(), rs.config()
        self._lookup.bind(rs, pipeline, config, o.serial)
        config.enable_stream(rs.stream.color, o.width_px, o.height_px, rs.format.rgb8, o.fps)
        wanted = f"colour at {o.width_px}x{o.height_px}, {o.fps} fps"
        try:
            if not config.can_resolve(pipeline):
                raise DeviceError(
                    f"camera {self._role}: the device does not offer {wanted}, or another program "
                    "uses it; see realsense-viewer for its streams"
                )
            profile = pipeline.start(config)
            self._pipeline = pipeline
            self._set_up(rs, profile.get_stream(rs.stream.color), profile.get_device())
        except RuntimeError as e:
            raise DeviceError(f"camera {self._role}: cannot start {wanted}: {_line(e)}") from e
        return o.width_px, o.height_px

    def read(self, timeout_ns: int) -> RawFrame | None:
        """Return the next colour frame, or None when none came in time.

        Raises:
            DeviceError: not open, or the SDK reports a failure.
        """
        if self._pipeline is None:
            raise DeviceError(f"camera {self._role} is not open; call open first")
        try:
            ok, frames = self._pipeline.try_wait_for_frames(max(1, timeout_ns // 1_000_000))
            t_received_ns = time.monotonic_ns()
            color = frames.get_color_frame() if ok else None
        except RuntimeError as e:
            raise DeviceError(f"camera {self._role}: {_line(e)}") from e
        if not color:
            return None
        clock, domain = self._domains[color.get_frame_timestamp_domain()]
        t_captured_ns, domain = self._clock.capture_time_ns(
            round(color.get_timestamp() * 1e6), clock, t_received_ns, domain
        )
        return RawFrame(
            image=np.asanyarray(color.get_data()),
            t_captured_ns=t_captured_ns,
            t_received_ns=t_received_ns,
            frame_idx=color.get_frame_number(),
            domain=domain,
        )

    def close(self) -> None:
        """Stop the stream; safe to call twice."""
        pipeline, self._pipeline = self._pipeline, None
        if pipeline is not None:
            try:
                pipeline.stop()
            except RuntimeError as e:
                logger.info("camera %s: stop: %s", self._role, _line(e))

    def _set_up(self, rs: Any, stream: Any, device: Any) -> None:  # noqa: ANN401
        if stream.format() != rs.format.rgb8:
            raise DeviceError(
                f"camera {self._role}: expected rgb8 pictures, got {stream.format()}; "
                "update pyrealsense2"
            )
        sensors = [
            s
            for s in device.query_sensors()
            if any(p.stream_type() == rs.stream.color for p in s.get_stream_profiles())
        ]
        if not sensors:
            raise DeviceError(f"camera {self._role}: the device has no colour sensor")
        o, sensor = self._options, sensors[0]
        if o.steady_fps and sensor.supports(rs.option.auto_exposure_priority):
            sensor.set_option(rs.option.auto_exposure_priority, 0)
        if o.exposure_us is None and o.gain is None:
            # A device keeps what another program, or an earlier robot file, has set.
            if sensor.supports(rs.option.enable_auto_exposure):
                self._set(rs, sensor, rs.option.enable_auto_exposure, 1)
            return
        self._set(rs, sensor, rs.option.enable_auto_exposure, 0)
        if o.exposure_us is not None:
            # A stereo module (D405) counts microseconds, an RGB module 100 of them, as UVC does.
            unit_us = 1 if sensor.is_depth_sensor() else 100
            self._set(rs, sensor, rs.option.exposure, round(o.exposure_us / unit_us))
        if o.gain is not None:
            self._set(rs, sensor, rs.option.gain, o.gain)

    def _set(self, rs: Any, sensor: Any, option: Any, value: int) -> None:  # noqa: ANN401
        name = str(option).rsplit(".", 1)[-1].lower()
        if not sensor.supports(option):
            raise DeviceError(f"camera {self._role}: its colour sensor has no option {name}")
        allowed = sensor.get_option_range(option)
        if not allowed.min <= value <= allowed.max:
            raise DeviceError(
                f"camera {self._role}: {name} {value} is outside {allowed.min:g} to "
                f"{allowed.max:g} (in the sensor's own steps); change it in the robot file"
            )
        sensor.set_option(option, value)


def _describe(rs: Any, device: Any) -> DeviceInfo:  # noqa: ANN401
    def info(key: Any) -> str:  # noqa: ANN401
        return str(device.get_info(key)) if device.supports(key) else ""

    keys = rs.camera_info
    return DeviceInfo(
        serial=info(keys.serial_number),
        name=info(keys.name),
        usb=info(keys.usb_type_descriptor),
        firmware=info(keys.firmware_version),
    )


def _line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


if TYPE_CHECKING:
    _FACTORY: Callable[..., Camera] = create_camera
