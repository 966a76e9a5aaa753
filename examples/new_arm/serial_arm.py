# ruff: noqa: D102 - gwp_edge.protocols.Arm documents the members
"""A new arm in under 100 lines: six servos behind a bus that answers at once.

Registered in its own package's pyproject.toml:

    [project.entry-points."gwp_edge.arms"]
    serial-arm = "serial_arm:create_arm"
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import ClassVar

import numpy as np

from gwp_edge.errors import DeviceError, SafetyFault, SpecError
from gwp_edge.safety import with_margin
from gwp_edge.spec import Channel, PolicySpec
from gwp_edge.types import ArmState, FloatArray, JointLimits


class Bus:
    """Stands for the vendor's library: servos by port, which go where they are told."""

    ports: ClassVar[dict[str, FloatArray]] = {}

    def __init__(self, port: str, n_servos: int) -> None:
        self.servos = self.ports.setdefault(port, np.zeros(n_servos))


class SerialArm:
    """The arm. Threads: one owner."""

    def __init__(self, port: str, channels: tuple[Channel, ...]) -> None:
        self._port, self._channels = port, channels
        self._bus: Bus | None = None
        self._enabled, self._held = False, np.zeros(0)

    @property
    def channels(self) -> tuple[Channel, ...]:
        return self._channels

    @property
    def limits(self) -> JointLimits:
        D = len(self._channels)
        stops = JointLimits(
            position_min=np.full(D, -2.5),
            position_max=np.full(D, 2.5),
            velocity_max=np.full(D, 2.0),
            acceleration_max=np.full(D, 8.0),
        )
        return with_margin(stops, self._channels)  # the arm's own stops are never reached

    def open(self, *, enable: bool) -> None:
        if self._bus is not None:
            raise DeviceError("the arm is open already; close it first")
        self._bus, self._enabled = Bus(self._port, len(self._channels)), enable

    def state(self) -> ArmState:
        position = self._open_bus().servos
        return ArmState(
            position=position.copy(),
            velocity=np.full(len(position), np.nan),  # these servos do not measure it
            t_received_ns=time.monotonic_ns(),  # asked just now, and answered at once
            enabled=self._enabled,
        )

    def send(self, position: FloatArray) -> None:
        if self._bus is None or not self._enabled:
            raise DeviceError("the arm takes no commands: open it with enable")
        target = np.array(position, np.float64)
        if target.shape != (len(self._channels),) or not np.isfinite(target).all():
            raise SafetyFault(f"command {position} does not fit; nothing was sent")
        self._bus.servos[:] = target

    def hold(self) -> None:
        if not self._held.size:  # an arm that sags must not creep: the first pose is kept
            self._held = self.state().position
        self._open_bus().servos[:] = self._held

    def close(self) -> None:
        self._bus, self._enabled, self._held = None, False, np.zeros(0)

    def _open_bus(self) -> Bus:
        if self._bus is None:
            raise DeviceError("the arm is not open; call open first")
        return self._bus


def create_arm(options: Mapping[str, object], spec: PolicySpec) -> SerialArm:
    """Make the arm from the options in the robot file."""
    port = options.get("port")
    if set(options) != {"port"} or not isinstance(port, str):
        raise SpecError(f"serial-arm: expected the option port alone, got {sorted(options)}")
    return SerialArm(port, spec.channels)
