"""What a robot file says; docs/robot-file.md lists every key."""

from __future__ import annotations

import math
from typing import Any, Final

import msgspec

from gwp_edge.workspace import WorkspaceBox

_SIMULATED_WORLDS: Final = ("kinematic", "sim")


class DeviceConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A kind of device and what its factory is told."""

    kind: str
    options: dict[str, Any] = msgspec.field(default_factory=dict)


class ArmConfig(DeviceConfig, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The arm. ``guardian`` false: the arm takes one connection only, so nobody else can hold it.

    Without a guardian a killed motor process leaves the arm at its last target.
    """

    guardian: bool = True


class CameraConfig(DeviceConfig, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One camera.

    Attributes:
        role: the policy's name for it, such as ``cam_high``.
        picture: what it showed when a person checked who is who; relative to the robot file.
    """

    role: str
    picture: str | None = None


class ChannelLimits(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Tighter limits of one channel; rad or m, per s, per s^2."""

    position_min: float | None = None
    position_max: float | None = None
    velocity_max: float | None = None
    acceleration_max: float | None = None

    @property
    def problem(self) -> str | None:
        """What cannot be meant so, or None."""
        for name in self.__struct_fields__:
            value = getattr(self, name)
            is_rate = name in ("velocity_max", "acceleration_max")
            if value is not None and not (0.0 if is_rate else -math.inf) < value < math.inf:
                what = "a positive" if is_rate else "a finite"
                return f"{name}: expected {what} number, got {value}"
        low, high = self.position_min, self.position_max
        if low is not None and high is not None and not low < high:
            return f"position_min {low} is not below position_max {high}"
        return None


class ObservationConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """When what the cameras show is too old; see ``observe.ObservationLimits``."""

    frame_age_ms: float = 100.0
    frame_skew_ms: float = 50.0
    state_age_ms: float = 100.0
    stall_ms: float = 500.0

    def __post_init__(self) -> None:
        for name in self.__struct_fields__:
            value = getattr(self, name)
            if not 0.0 < value < 1e6:
                raise ValueError(f"{name}: expected a positive time, got {value}")


class RobotConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A robot file.

    Attributes:
        name: for messages.
        arm: the arm.
        cameras: one for each camera role of the policy.
        world: what simulated devices share.
        limits: by channel name; only ever tighten the arm's own.
        observation: when frames and state are too old to act on.
        park: pose to park in by channel name, rad and m; without, parking is holding.
        workspace: box that a tool must not leave, by arm: ``arm``, or ``left`` and ``right``.
    """

    name: str
    arm: ArmConfig
    cameras: tuple[CameraConfig, ...] = ()
    world: DeviceConfig | None = None
    limits: dict[str, ChannelLimits] = msgspec.field(default_factory=dict)
    observation: ObservationConfig = msgspec.field(default_factory=ObservationConfig)
    park: dict[str, float] = msgspec.field(default_factory=dict)
    workspace: dict[str, WorkspaceBox] = msgspec.field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, limits in self.limits.items():
            if limits.problem is not None:
                raise ValueError(f"limits of {name}: {limits.problem}")
        for name, value in self.park.items():
            if not math.isfinite(value):
                raise ValueError(f"park: {name} is {value}, not a finite number")

    @property
    def is_simulated(self) -> bool:
        """Whether nothing real moves: the arm itself, not only a camera, lives in a simulation."""
        arm_kind = self.arm.options.get("disturbed_kind", self.arm.kind)  # what a wrapper holds
        return (
            self.world is not None
            and self.world.kind in _SIMULATED_WORLDS
            and arm_kind == self.world.kind
        )
