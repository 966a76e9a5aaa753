"""Wrappers that make a simulated robot's camera lose frames, or its bus slow, on purpose.

Made by ``gwp-edge profile --disturb``; see ``gwp_edge.profiling.disturb``.
"""

from __future__ import annotations

import random
import time
from collections.abc import Mapping
from typing import Any, cast

from gwp_edge.errors import SpecError
from gwp_edge.protocols import Arm, Camera
from gwp_edge.robots import ARMS, CAMERAS, import_callable
from gwp_edge.spec import Channel, PolicySpec
from gwp_edge.types import ArmState, FloatArray, Frame, JointLimits


class DisturbedCamera:
    """A camera that loses frames. Threads: as its inner one."""

    def __init__(self, inner: Camera, drop: float) -> None:
        self._inner = inner
        self._drop = drop
        self._kept: Frame | None = None

    @property
    def name(self) -> str:
        """As the camera's."""
        return self._inner.name

    def open(self) -> None:
        """As the camera's."""
        self._inner.open()

    def latest(self) -> Frame | None:
        """Return the newest frame that was not lost."""
        frame = self._inner.latest()
        if frame is None or (self._kept is not None and self._is_lost(frame.frame_idx)):
            return self._kept
        self._kept = frame
        return frame

    def _is_lost(self, frame_idx: int) -> bool:
        # The same answer at every look at the same frame.
        return random.Random(frame_idx).random() < self._drop

    def close(self) -> None:
        """As the camera's."""
        self._inner.close()


class DisturbedArm:
    """An arm on a bus that is slow now and then. Threads: as its inner one."""

    def __init__(self, inner: Arm, bus: tuple[float, float]) -> None:
        self._inner = inner
        self._extra_ms, self._chance = bus
        self._random = random.Random(0)

    @property
    def channels(self) -> tuple[Channel, ...]:
        """As the arm's."""
        return self._inner.channels

    @property
    def limits(self) -> JointLimits:
        """As the arm's."""
        return self._inner.limits

    def open(self, *, enable: bool) -> None:
        """As the arm's."""
        self._inner.open(enable=enable)

    def state(self) -> ArmState:
        """As the arm's."""
        return self._inner.state()

    def send(self, position: FloatArray) -> None:
        """As the arm's, later."""
        if self._random.random() < self._chance:
            time.sleep(self._extra_ms / 1e3)
        self._inner.send(position)

    def hold(self) -> None:
        """As the arm's, at once."""
        self._inner.hold()

    def close(self) -> None:
        """As the arm's."""
        self._inner.close()


def create_camera(role: str, options: Mapping[str, object], spec: PolicySpec) -> DisturbedCamera:
    """Make the camera ``disturbed_kind`` that loses the share ``disturbed_drop`` of its frames."""
    kind, drop, rest = _unwrapped(options, "disturbed_drop")
    inner = import_callable(CAMERAS[kind], "camera driver")(role, rest, spec)
    return DisturbedCamera(cast(Camera, inner), float(drop))


def create_arm(options: Mapping[str, object], spec: PolicySpec) -> DisturbedArm:
    """Make the arm ``disturbed_arm_kind`` whose sends take ``disturbed_bus`` longer."""
    kind, bus, rest = _unwrapped(options, "disturbed_bus")
    inner = import_callable(ARMS[kind], "arm driver")(rest, spec)
    return DisturbedArm(cast(Arm, inner), (float(bus[0]), float(bus[1])))


def _unwrapped(options: Mapping[str, object], key: str) -> tuple[str, Any, dict[str, object]]:
    rest = {k: v for k, v in options.items() if not k.startswith("disturbed_")}
    try:
        return str(options["disturbed_kind"]), options[key], rest
    except KeyError as e:
        raise SpecError(f"a disturbed device needs {e}; it is made by profile --disturb") from e
