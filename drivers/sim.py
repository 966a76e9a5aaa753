"""The simulated PiPER robot behind the runtime's protocols: world, arm, cameras.

The world runs in processes of its own (``sim_process``); arms and cameras are thin ends of its
shared memory and may be opened in any process of the run. For faster than real time, and for the
same pictures from the same seed, use ``sim_world.SimWorld`` instead.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Final

import numpy as np

from gwp_edge.drivers import piper_model
from gwp_edge.drivers.sim_options import RINGS_KEY, SEGMENT_KEY, count_arms, parse_options
from gwp_edge.drivers.sim_process import SimProcesses
from gwp_edge.drivers.sim_segment import SimSegment
from gwp_edge.drivers.sim_world import check_command
from gwp_edge.errors import DeviceError, DeviceTimeoutError, SpecError
from gwp_edge.frame_ring import FrameRing
from gwp_edge.protocols import Arm, Camera, World
from gwp_edge.spec import Channel, PolicySpec
from gwp_edge.types import ArmState, FloatArray, Frame, JointLimits

# Physics publishes every 2 ms; a second of silence means that it is gone, not late.
_GONE_AFTER_NS: Final = 1_000_000_000
_OPEN_TIMEOUT_NS: Final = 2_000_000_000
_POLL_S: Final = 0.002


def create_world(options: Mapping[str, object], spec: PolicySpec) -> SimProcesses:
    """Make the world of a policy: as many arms and cameras as its spec names.

    Raises:
        SpecError: the spec is not of one or two PiPER arms, or an option is wrong.
    """
    return SimProcesses(count_arms(spec), spec.cameras, parse_options(options))


def create_arm(options: Mapping[str, object], spec: PolicySpec) -> SimArm:
    """Make the arm's end of a running world.

    Raises:
        SpecError: the spec is not of one or two PiPER arms, or no world is named in ``options``.
    """
    parse_options(options)  # a field that nobody knows is a mistake here as well
    name = options.get(SEGMENT_KEY)
    if not isinstance(name, str):
        raise SpecError(
            'an arm of kind "sim" needs its world in the robot file: [world] kind = "sim"'
        )
    return SimArm(name, spec.channels, count_arms(spec))


def create_camera(role: str, options: Mapping[str, object], spec: PolicySpec) -> SimCamera:
    """Make the end of one camera of a running world.

    Raises:
        SpecError: the running world has no camera of this role.
    """
    parse_options(options)
    rings = options.get(RINGS_KEY)
    if not isinstance(rings, Mapping):
        raise SpecError(
            'cameras of kind "sim" need their world in the robot file: [world] kind = "sim"'
        )
    name = rings.get(role)
    if not isinstance(name, str) or role not in spec.cameras:
        have = ", ".join(str(r) for r in rings) or "none"
        raise SpecError(f"the sim runs no camera {role}; it has {have}")
    return SimCamera(role, name)


class SimArm:
    """One or two simulated PiPER arms as one robot of D channels. Threads: one owner.

    Like the real one it holds its last target when commands stop.
    """

    def __init__(self, segment_name: str, channels: tuple[Channel, ...], n_arms: int) -> None:
        self._segment_name = segment_name
        self._channels = channels
        self._n_arms = n_arms
        self._range = piper_model.command_range(n_arms)
        self._limits = piper_model.joint_limits(n_arms)
        self._segment: SimSegment | None = None
        self._enabled = False
        self._held: FloatArray | None = None

    @property
    def channels(self) -> tuple[Channel, ...]:
        """The D channels in the order of every array."""
        return self._channels

    @property
    def limits(self) -> JointLimits:
        """PiPER's limits; see ``piper_model.joint_limits``."""
        return self._limits

    def open(self, *, enable: bool) -> None:
        """Attach to the world; with ``enable`` hold the measured pose, without only read.

        Raises:
            DeviceError: the world is not running.
            DeviceTimeoutError: it does not answer.
        """
        if self._segment is not None:
            raise DeviceError("the sim's arm is open already; close it first")
        self._segment = SimSegment.attach(self._segment_name, self._n_arms)
        try:
            state = self.state()
            if enable:
                # A closed gripper measures a hair below zero.
                self._publish(np.clip(state.position, *self._range), enabled=True)
                self._await_enabled()
                self._enabled = True
        except BaseException:
            self.close()
            raise

    def state(self) -> ArmState:
        """Return the newest measured state.

        Raises:
            DeviceError: not open, or the physics process is gone.
        """
        newest = self._opened().states.latest()
        age_ns = time.monotonic_ns() - int(newest[0]["t_ns"]) if newest else None
        if newest is None or age_ns is None or age_ns > _GONE_AFTER_NS:
            age = "none yet" if age_ns is None else f"the last {age_ns / 1e6:.0f} ms ago"
            raise DeviceError(f"the sim sends no joint states ({age}); its process has ended")
        record = newest[0]
        return ArmState(
            position=record["position"],
            velocity=record["velocity"],
            t_received_ns=int(record["t_ns"]),
            enabled=bool(record["enabled"]),
        )

    def send(self, position: FloatArray) -> None:
        """Send absolute targets, shape (D,), rad and m.

        Raises:
            DeviceError: not open, or not enabled.
            SafetyFault: not finite, wrong shape or beyond the controller's range; nothing sent.
        """
        self._opened()
        command = check_command(position, self._range)
        if not self._enabled:
            raise DeviceError("the sim's arm is open for reading only; open it with enable")
        self._publish(command, enabled=True)

    def hold(self) -> None:
        """Command the pose measured at the first call; needs no ``enable`` and changes no mode.

        Raises:
            DeviceError: not open, or there is no fresh measurement.
        """
        state = self.state()
        if self._held is None:
            self._held = np.clip(state.position, *self._range)
        self._publish(self._held, enabled=state.enabled)

    def close(self) -> None:
        """Detach; the arm holds the last target. Safe to call twice."""
        self._enabled = False
        self._held = None
        if self._segment is not None:
            self._segment.close()
            self._segment = None

    def _opened(self) -> SimSegment:
        if self._segment is None:
            raise DeviceError("the sim's arm is not open; call open first")
        return self._segment

    def _publish(self, position: FloatArray, *, enabled: bool) -> None:
        with self._opened().commands.writing() as slot:
            slot["enabled"] = enabled
            slot["position"][...] = position

    def _await_enabled(self) -> None:
        deadline_ns = time.monotonic_ns() + _OPEN_TIMEOUT_NS
        while not self.state().enabled:
            if time.monotonic_ns() > deadline_ns:
                raise DeviceTimeoutError(
                    "the sim's arm does not enable; is the machine overloaded?"
                )
            time.sleep(_POLL_S)


class SimCamera:
    """One camera of a running world. Threads: one owner."""

    def __init__(self, role: str, ring_name: str) -> None:
        self._role = role
        self._ring_name = ring_name
        self._ring: FrameRing | None = None

    @property
    def name(self) -> str:
        """Role name as in the spec."""
        return self._role

    @property
    def ring_name(self) -> str:
        """Name of the ring that holds its frames, for other readers."""
        return self._ring_name

    def open(self) -> None:
        """Attach to the world's frames.

        Raises:
            DeviceError: the world is not running.
        """
        if self._ring is None:
            self._ring = FrameRing.attach(self._ring_name)

    def latest(self) -> Frame | None:
        """Return the newest frame, or None before the first.

        Raises:
            DeviceError: not open, or the renderer has failed.
        """
        if self._ring is None:
            raise DeviceError(f"camera {self._role} is not open; call open first")
        return self._ring.latest(self._role)

    def close(self) -> None:
        """Detach; safe to call twice."""
        if self._ring is not None:
            self._ring.close()
            self._ring = None


if TYPE_CHECKING:
    _FACTORIES: tuple[Callable[..., World], Callable[..., Arm], Callable[..., Camera]] = (
        create_world,
        create_arm,
        create_camera,
    )
