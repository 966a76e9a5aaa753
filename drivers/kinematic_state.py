"""What the kinematic robot's ends share: options, planned faults, the last command, the pose."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Final, Literal

import msgspec
import numpy as np

from gwp_edge.drivers import piper_model
from gwp_edge.errors import SpecError
from gwp_edge.shared_memory import LatestRing, SharedSegment, aligned
from gwp_edge.spec import PolicySpec
from gwp_edge.types import FloatArray, JointLimits

SEGMENT_KEY: Final = "kinematic_segment"
WORD_T0_NS, WORD_FIRST_SEND_NS = 0, 1
_WORDS_BYTES: Final = 64

FaultKind = Literal[
    "feedback-silence",
    "feedback-error",
    "driver-bug",
    "nan-state",
    "arm-fault",
    "send-failure",
    "send-dropped",
    "stuck",
    "camera-freeze",
    "camera-failure",
]


class Fault(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A planned fault: what, when after the first command, and for how long."""

    kind: FaultKind
    at_s: float
    for_s: float = math.inf


class KinematicOptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What may be chosen.

    Attributes:
        lag_s: time constant of every joint.
        enable_s: how long it takes until all motors have power.
        start_position: D values; by default the middle of the policy's state statistics.
        fps: pictures per second.
        width_px: image width.
        height_px: image height.
        faults: planned faults.
        command_log: every command is appended to files that begin with this path; see
            ``gwp_edge.testing.read_commands``.
    """

    lag_s: float = 0.04
    enable_s: float = 0.0
    start_position: tuple[float, ...] | None = None
    fps: float = 30.0
    width_px: int = 160
    height_px: int = 120
    faults: tuple[Fault, ...] = ()
    command_log: str | None = None

    def __post_init__(self) -> None:
        for name, low, high in (
            ("lag_s", 1e-4, 10.0),
            ("enable_s", 0.0, 600.0),
            ("fps", 0.1, 1000.0),
            ("width_px", 16, 4096),
            ("height_px", 16, 4096),
        ):
            value = getattr(self, name)
            if not low <= value <= high:
                raise ValueError(f"{name}: expected {low} to {high}, got {value}")


def channel_limits(spec: PolicySpec) -> JointLimits:
    """Return PiPER's limits where the channels are one or two PiPER arms, else generic ones."""
    units = [c.unit for c in spec.channels]
    for n_arms in (1, 2):
        if units == (["rad"] * 6 + ["m"]) * n_arms:
            return piper_model.joint_limits(n_arms)
    is_rad = np.array([u == "rad" for u in units])
    return JointLimits(
        position_min=np.where(is_rad, -math.pi, 0.0),
        position_max=np.where(is_rad, math.pi, 0.1),
        velocity_max=np.where(is_rad, 3.0, 0.1),
        acceleration_max=np.where(is_rad, 5.0, 1.0),
    )


class KinematicState:
    """Last command and the pose at that moment, one ring per commanding process.

    Threads: one writer per ring, any readers, each with its own object.
    """

    def __init__(
        self,
        segment: SharedSegment,
        n_channels: int,
        options: KinematicOptions,
        limits: JointLimits,
    ) -> None:
        buffer = segment.buffer
        size = aligned(LatestRing.size_bytes(_dtype(n_channels), 4))
        self.words = buffer[:_WORDS_BYTES].cast("q")
        self._rings = {
            writer: LatestRing(
                buffer[_WORDS_BYTES + i * size : _WORDS_BYTES + (i + 1) * size],
                _dtype(n_channels),
                4,
            )
            for i, writer in enumerate(("motor", "guardian"))
        }
        self._lag_s = options.lag_s
        self._speed = limits.velocity_max
        self._faults = options.faults

    def write(self, writer: str, q: FloatArray, target: FloatArray, t_ns: int) -> None:
        """Note a command ``target`` and the pose ``q`` at its time; (D,), rad and m."""
        with self._rings[writer].writing() as slot:
            slot["t_ns"] = t_ns
            slot["q"][...] = q
            slot["target"][...] = target

    def at(self, t_ns: int) -> tuple[FloatArray, FloatArray]:
        """Return pose and velocity at ``t_ns`` from the newest command of anybody."""
        records = [newest[0] for ring in self._rings.values() if (newest := ring.latest())]
        record: Any = max(records, key=lambda r: int(r["t_ns"]))
        q, target = record["q"], record["target"]
        dt_s = max(0.0, (t_ns - int(record["t_ns"])) / 1e9)
        error = np.abs(target - q)
        # At full speed while the error is larger than speed x lag, exponential from there on.
        full_s = np.maximum(error - self._speed * self._lag_s, 0.0) / self._speed
        rest = error - self._speed * np.minimum(dt_s, full_s)
        rest = rest * np.exp(-np.maximum(dt_s - full_s, 0.0) / self._lag_s)
        side = np.sign(target - q)
        return target - side * rest, side * np.minimum(rest / self._lag_s, self._speed)

    def fault_since_ns(self, kind: FaultKind, now_ns: int) -> int | None:
        """Return when the planned fault ``kind`` began, or None while it is not on."""
        first_ns = self.words[WORD_FIRST_SEND_NS]
        if first_ns == 0:
            return None
        since_s = (now_ns - first_ns) / 1e9
        for fault in self._faults:
            if fault.kind == kind and fault.at_s <= since_s < fault.at_s + fault.for_s:
                return first_ns + round(fault.at_s * 1e9)
        return None

    def release(self) -> None:
        """Let go of the segment, so that it can be unmapped."""
        for ring in self._rings.values():
            ring.release()
        self.words.release()


def parse_options(options: Mapping[str, object]) -> KinematicOptions:
    """Check ``options``; what the world added is left aside.

    Raises:
        SpecError: an option is unknown, of another type, or out of range.
    """
    given = {k: v for k, v in options.items() if k != SEGMENT_KEY}
    try:
        return msgspec.convert(given, KinematicOptions, strict=False)
    except msgspec.ValidationError as e:
        known = ", ".join(KinematicOptions.__struct_fields__)
        raise SpecError(f"option of the kinematic robot: {e}; options are {known}") from e


def segment_name(options: Mapping[str, object]) -> str:
    """Return the name of the world's memory.

    Raises:
        SpecError: there is none: the world was not started.
    """
    name = options.get(SEGMENT_KEY)
    if not isinstance(name, str):
        raise SpecError(f"the kinematic robot needs a started world ({SEGMENT_KEY})")
    return name


def _dtype(n_channels: int) -> np.dtype[np.void]:
    shape = (n_channels,)
    return np.dtype([("t_ns", np.int64), ("q", np.float64, shape), ("target", np.float64, shape)])


def segment_bytes(n_channels: int) -> int:
    """Return the size of the shared memory."""
    return _WORDS_BYTES + 2 * aligned(LatestRing.size_bytes(_dtype(n_channels), 4))
