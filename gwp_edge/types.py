"""Values that cross module borders at run time.

Dimension letters, the same everywhere: B batch, H rows of a chunk, D joints and grippers of the
robot, A padded action width of the network, C h w image. All times are int nanoseconds of
``time.monotonic_ns`` (CLOCK_MONOTONIC, one clock for every process of the machine).
Arrays inside these values are made read-only.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from gwp_edge.errors import SpecError

FloatArray = npt.NDArray[np.float64]
Float32Array = npt.NDArray[np.float32]
ImageArray = npt.NDArray[np.uint8]

ClockDomain = Literal["host", "hardware", "global", "sim", "recorded"]


def frozen_array(value: npt.ArrayLike, dtype: npt.DTypeLike) -> npt.NDArray[Any]:
    """Return ``value`` as a read-only array of ``dtype``; copies unless already both."""
    array = np.asarray(value, dtype=dtype)
    if array.flags.writeable:
        array = array.copy() if array is value or array.base is not None else array
        array.setflags(write=False)
    return array


@dataclass(frozen=True, slots=True, kw_only=True)
class Frame:
    """One picture of one camera.

    Attributes:
        camera: role name as in the spec, such as ``cam_high``.
        image: uint8 RGB, shape (h, w, 3).
        t_captured_ns: exposure or capture time on the monotonic clock.
        t_received_ns: time at which this process had the frame.
        frame_idx: the camera's own counter; gaps are dropped frames.
        domain: where ``t_captured_ns`` comes from.
    """

    camera: str
    image: ImageArray
    t_captured_ns: int
    t_received_ns: int
    frame_idx: int
    domain: ClockDomain = "host"

    def __post_init__(self) -> None:
        image = np.asarray(self.image)
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape:
            raise SpecError(
                f"camera {self.camera}: expected a uint8 RGB image of shape (h, w, 3), "
                f"got {image.dtype} {image.shape}"
            )
        object.__setattr__(self, "image", frozen_array(image, np.uint8))


@dataclass(frozen=True, slots=True, kw_only=True)
class Observation:
    """What the policy sees at one moment.

    Attributes:
        frames: one frame per camera of the spec, any order.
        state: measured joint angles and gripper openings, shape (D,), rad and m.
        t_state_ns: time of the measurement of ``state``.
    """

    frames: tuple[Frame, ...]
    state: FloatArray
    t_state_ns: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "state", frozen_array(self.state, np.float64))
        if self.state.ndim != 1:
            raise SpecError(f"state: expected shape (D,), got {self.state.shape}")
        names = [frame.camera for frame in self.frames]
        if len(set(names)) != len(names):
            raise SpecError(f"observation has a camera twice: {', '.join(sorted(names))}")

    @property
    def t_observed_ns(self) -> int:
        """Capture time of the oldest frame, ns; the state's time where there is no frame."""
        return min((f.t_captured_ns for f in self.frames), default=self.t_state_ns)

    def frame(self, camera: str) -> Frame:
        """Return the frame of ``camera``.

        Raises:
            SpecError: the observation has no such camera.
        """
        for frame in self.frames:
            if frame.camera == camera:
                return frame
        have = ", ".join(f.camera for f in self.frames) or "none"
        raise SpecError(f"observation has no camera {camera}; it has {have}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunk:
    """A plan: H absolute commands, stamped.

    Row i is meant for ``t_observed_ns + i * period_ns``. Nobody counts delay steps.

    Attributes:
        actions: absolute joint angles and gripper openings, shape (H, D), rad and m.
        t_observed_ns: the observation's time (its oldest frame).
        period_ns: time between rows.
        chunk_idx: counts up from 0 within a run.
    """

    actions: FloatArray
    t_observed_ns: int
    period_ns: int
    chunk_idx: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "actions", frozen_array(self.actions, np.float64))
        if self.actions.ndim != 2 or 0 in self.actions.shape:
            raise SpecError(f"chunk: expected actions of shape (H, D), got {self.actions.shape}")
        if self.period_ns <= 0:
            raise SpecError(f"chunk: period must be positive, got {self.period_ns} ns")

    @property
    def t_end_ns(self) -> int:
        """Time of the last row, ns."""
        return self.t_observed_ns + (len(self.actions) - 1) * self.period_ns


class _ArmStateFields(NamedTuple):
    position: FloatArray
    velocity: FloatArray
    t_received_ns: int
    enabled: bool
    fault: str | None
    caution: str | None
    drifted: bool


class ArmState(_ArmStateFields):
    """What the arm says about itself.

    One is made at every tick, so it is a tuple: a frozen dataclass costs several times as much. A
    driver whose arrays are read-only float64 already may use ``_make``, which looks at nothing.

    Attributes:
        position: shape (D,), rad and m.
        velocity: shape (D,), rad/s and m/s; NaN where the arm does not measure it.
        t_received_ns: time at which the oldest part of ``position`` arrived.
        enabled: every motor is powered and follows commands.
        fault: one line for the operator, or None while all is well.
        caution: one line about something that passes, such as a target that the arm's own
            controller refuses: reason to hold, not to give up. None while there is nothing.
        drifted: ``position`` is or may be wrong: nothing may be commanded by it.
    """

    __slots__ = ()

    def __new__(
        cls,
        *,
        position: npt.ArrayLike,
        velocity: npt.ArrayLike,
        t_received_ns: int,
        enabled: bool,
        fault: str | None = None,
        caution: str | None = None,
        drifted: bool = False,
    ) -> ArmState:
        """Return a state; its arrays are read-only float64 copies unless they are so already."""
        fields = (
            frozen_array(position, np.float64),
            frozen_array(velocity, np.float64),
            t_received_ns,
            enabled,
            fault,
            caution,
            drifted,
        )
        return tuple.__new__(cls, fields)

    def __getnewargs_ex__(self) -> tuple[tuple[()], dict[str, Any]]:
        return (), self._asdict()


@dataclass(frozen=True, slots=True, kw_only=True)
class JointLimits:
    """Limits of every channel of a robot, each of shape (D,); rad or m, per s, per s^2."""

    position_min: FloatArray
    position_max: FloatArray
    velocity_max: FloatArray
    acceleration_max: FloatArray

    def __post_init__(self) -> None:
        for name in ("position_min", "position_max", "velocity_max", "acceleration_max"):
            object.__setattr__(self, name, frozen_array(getattr(self, name), np.float64))
        arrays = (self.position_min, self.position_max, self.velocity_max, self.acceleration_max)
        if any(a.ndim != 1 or a.shape != self.position_min.shape for a in arrays):
            raise SpecError(f"limits differ in length: {[a.shape for a in arrays]}")
        if not all(np.isfinite(a).all() for a in arrays):
            raise SpecError("limits must be finite")
        if (self.position_min >= self.position_max).any():
            raise SpecError("limits: position_min must be below position_max in every channel")
        if (self.velocity_max <= 0).any() or (self.acceleration_max <= 0).any():
            raise SpecError("limits: velocity_max and acceleration_max must be positive")
