"""Any LeRobot robot as an arm and cameras: the robot lives in lerobot's own interpreter.

The world starts ``lerobot_server`` there, which owns the robot; arm, guardian and cameras are
clients of its socket and never wait for it. When the motor process dies, the server holds the
measured pose; when the server dies, the servos keep the last target that they got, which the
limiter had kept within one tick's motion, and the run ends with a fault.

``connect`` of most LeRobot arms cuts the torque for a moment while it configures the motors: the
arm must rest when a run starts. Tried with a robot of our own making; not yet run on hardware.
"""

from __future__ import annotations

import contextlib
import logging
import socket
import time
from collections.abc import Mapping, Sequence
from typing import Final

import numpy as np

from gwp_edge.drivers.lerobot_options import (
    SOCKET_KEY,
    FeatureMap,
    map_features,
    parse_options,
)
from gwp_edge.drivers.lerobot_server import LostConnectionError, Wire
from gwp_edge.drivers.lerobot_world import LerobotWorld
from gwp_edge.errors import DeviceError, DeviceTimeoutError, SafetyFault, SpecError
from gwp_edge.spec import Channel, PolicySpec
from gwp_edge.types import ArmState, FloatArray, Frame, JointLimits

logger = logging.getLogger(__name__)

_FIRST_STATE_S: Final = 5.0
_POLL_S: Final = 0.005
_FRESH_TO_HOLD_NS: Final = 500_000_000
# A normalised feature is rounded by the robot's own steps; less than this is not a clipped command.
_CLIPPED_BEYOND: Final = 0.01


def create_world(options: Mapping[str, object], spec: PolicySpec) -> LerobotWorld:
    """Make the process that owns the robot, not yet started.

    Raises:
        SpecError: an option does not fit the policy.
    """
    parsed = parse_options(options)
    return LerobotWorld(parsed, map_features(parsed, spec), spec)


def create_arm(options: Mapping[str, object], spec: PolicySpec) -> LerobotArm:
    """Make a connection to the arm of a started world.

    Raises:
        SpecError: an option does not fit the policy, or there is no world.
    """
    parsed = parse_options(options)
    features = map_features(parsed, spec)
    return LerobotArm(_socket_of(options), features, spec.channels, rate_hz=parsed.rate_hz)


def create_camera(role: str, options: Mapping[str, object], spec: PolicySpec) -> LerobotCamera:
    """Make a connection to one camera of a started world; the arm's options name its feature.

    Raises:
        SpecError: the policy has no such role, or there is no world.
    """
    if role not in spec.cameras:
        raise SpecError(f"camera {role}: the policy's cameras are {', '.join(spec.cameras)}")
    delay_ms = options.get("camera_delay_ms", 33.0)
    if not isinstance(delay_ms, int | float) or not 0.0 <= delay_ms < 1e4:
        raise SpecError(f"camera_delay_ms: expected 0 to 10000, got {delay_ms}")
    return LerobotCamera(role, _socket_of(options), round(delay_ms * 1e6))


class LerobotArm:
    """One connection to the arm. Threads: one owner; one object commands, others read and hold."""

    def __init__(
        self, path: str, features: FeatureMap, channels: tuple[Channel, ...], *, rate_hz: float
    ) -> None:
        self._path = path
        self._rate_hz = rate_hz
        self._features = features
        self._channels = channels
        self._wire: Wire | None = None
        self._state: ArmState | None = None
        self._sent: FloatArray | None = None
        self._enabled = False
        self._commands = False
        self._asked: FloatArray | None = None
        #: Commands that the robot changed before it sent them.
        self.n_clipped = 0

    @property
    def channels(self) -> tuple[Channel, ...]:
        """The D channels in the order of every array."""
        return self._channels

    @property
    def limits(self) -> JointLimits:
        """As given in the options."""
        return self._features.limits

    @property
    def feedback_period_ns(self) -> int:
        """Time between two observations of the robot."""
        return round(1e9 / self._rate_hz)

    @property
    def sent(self) -> FloatArray | None:
        """What the robot last sent to its motors, after its own clipping; rad and m, (D,)."""
        return self._sent

    def open(self, *, enable: bool) -> None:
        """Connect; with ``enable`` become the one who commands, from the measured pose.

        Raises:
            DeviceError: the world is gone, or somebody else commands.
        """
        if self._wire is not None:
            raise DeviceError("the LeRobot arm is open already; close it first")
        self._wire = _connect(self._path)
        try:
            self._send({"op": "command" if enable else "read"})
            self._enabled = enable
            deadline_s = time.monotonic() + _FIRST_STATE_S
            while self._state is None or (enable and not self._commands):
                self._receive()
                if time.monotonic() > deadline_s:
                    raise DeviceTimeoutError(
                        f"no state of the LeRobot robot in {_FIRST_STATE_S:g} s; does it answer?"
                    )
                time.sleep(_POLL_S)
        except DeviceError:
            self.close()
            raise

    def state(self) -> ArmState:
        """Return the newest measured state without blocking.

        Raises:
            DeviceError: not open, or the connection has failed for good.
        """
        self._receive()
        if self._state is None:
            raise DeviceError("the LeRobot arm is not open; call open first")
        return self._state

    def send(self, position: FloatArray) -> None:
        """Send one command; (D,), rad and m.

        Raises:
            DeviceTimeoutError: the connection is full and the command was dropped.
            DeviceError: not open, not enabled, or the connection failed.
            SafetyFault: not finite or of another shape; nothing was sent.
        """
        if self._wire is None or not self._enabled:
            raise DeviceError("the LeRobot arm does not take commands: open it with enable")
        target = np.array(position, np.float64)
        if target.shape != (len(self._channels),) or not np.isfinite(target).all():
            raise SafetyFault(f"command {position} does not fit the robot; nothing was sent")
        self._asked = target
        self._send({"op": "action"}, [self._features.to_features(target)])

    def hold(self) -> None:
        """Have the measured pose commanded; it takes the right to command from everybody.

        Raises:
            DeviceError: not open, no fresh state, or the connection failed.
        """
        age_ns = time.monotonic_ns() - self.state().t_received_ns
        if age_ns > _FRESH_TO_HOLD_NS:
            raise DeviceError(f"cannot hold: the newest state is {age_ns / 1e6:.0f} ms old")
        self._send({"op": "hold"})

    def close(self) -> None:
        """Disconnect and leave the arm at its last target; safe to call twice."""
        if self._wire is not None:
            with contextlib.suppress(LostConnectionError):
                deadline_s = time.monotonic() + 0.5
                while not self._wire.send({"op": "bye"}) and time.monotonic() < deadline_s:
                    time.sleep(_POLL_S)
            self._wire.close()
        self._wire = self._state = self._sent = self._asked = None
        self._enabled = self._commands = False

    def _send(self, header: dict[str, object], arrays: Sequence[FloatArray] = ()) -> None:
        if self._wire is None:
            raise DeviceError("the LeRobot arm is not open; call open first")
        try:
            if not self._wire.send(header, arrays):
                raise DeviceTimeoutError("the LeRobot process does not read; command dropped")
        except LostConnectionError as e:
            raise _gone(e) from e

    def _receive(self) -> None:
        if self._wire is None:
            return
        try:
            for header, arrays in self._wire.receive():
                if header["op"] == "error":
                    raise DeviceError(f"LeRobot robot: {header['text']}")
                self._take(header, arrays[0], arrays[1])
        except LostConnectionError as e:
            raise _gone(e) from e

    def _take(self, header: dict[str, object], measured: FloatArray, sent: FloatArray) -> None:
        had, self._commands = self._commands, bool(header["commands"])
        lost = self._enabled and had and not self._commands
        fault = "another process made the LeRobot robot hold" if lost else None
        if self._state is not None and self._state.fault is not None:
            fault = self._state.fault
        position = self._features.to_channels(measured)
        if self._enabled and np.isfinite(sent).all():
            self._note_sent(self._features.to_channels(sent))
        self._state = ArmState(
            position=position,
            velocity=np.full(len(position), np.nan),
            t_received_ns=int(str(header["t_ns"])),
            enabled=self._commands,
            fault=fault,
        )

    def _note_sent(self, sent: FloatArray) -> None:
        is_new = self._sent is None or not np.array_equal(sent, self._sent)
        self._sent = sent
        limits = self._features.limits
        # The newest command may still be on its way: one tick's motion is no clipping.
        slack = _CLIPPED_BEYOND + 0.1 * limits.velocity_max
        if is_new and self._asked is not None and (np.abs(sent - self._asked) > slack).any():
            self.n_clipped += 1
            if self.n_clipped == 1:
                i = int(np.argmax(np.abs(sent - self._asked) / slack))
                logger.warning(
                    "the LeRobot robot clips commands: %s asked %.3f, sent %.3f",
                    self._channels[i].name,
                    self._asked[i],
                    sent[i],
                )


class LerobotCamera:
    """One camera of the robot. Threads: one owner."""

    def __init__(self, role: str, path: str, delay_ns: int) -> None:
        self._role = role
        self._path = path
        self._delay_ns = delay_ns
        self._wire: Wire | None = None
        self._frame: Frame | None = None

    @property
    def name(self) -> str:
        """Role name as in the spec."""
        return self._role

    def open(self) -> None:
        """Connect.

        Raises:
            DeviceError: the world is gone.
        """
        if self._wire is None:
            self._wire = _connect(self._path)
            self._wire.send({"op": "camera", "role": self._role})

    def latest(self) -> Frame | None:
        """Return the newest frame without blocking, or None before the first one.

        LeRobot does not say when a picture was taken: the time is that of the observation less the
        option ``camera_delay_ms``.

        Raises:
            DeviceError: not open, or the camera has failed for good.
        """
        if self._wire is None:
            raise DeviceError(f"camera {self._role} is not open; call open first")
        try:
            for header, arrays in self._wire.receive():
                if header["op"] == "error":
                    raise DeviceError(f"camera {self._role}: {header['text']}")
                self._frame = Frame(
                    camera=self._role,
                    image=arrays[0],
                    t_captured_ns=header["t_ns"] - self._delay_ns,
                    t_received_ns=time.monotonic_ns(),
                    frame_idx=header["idx"],
                    domain="host",
                )
        except LostConnectionError as e:
            raise _gone(e) from e
        return self._frame

    def close(self) -> None:
        """Disconnect; safe to call twice."""
        if self._wire is not None:
            self._wire.close()
        self._wire = self._frame = None


def _connect(path: str) -> Wire:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.connect(path)
    except OSError as e:
        sock.close()
        raise DeviceError(f"the LeRobot process is not there ({e.strerror})") from e
    return Wire(sock)


def _gone(error: LostConnectionError) -> DeviceError:
    return DeviceError(f"the LeRobot process is gone ({error}); the arm keeps its last target")


def _socket_of(options: Mapping[str, object]) -> str:
    path = options.get(SOCKET_KEY)
    if not isinstance(path, str):
        raise SpecError(f"a LeRobot robot needs a started world ({SOCKET_KEY}); add [world]")
    return path
