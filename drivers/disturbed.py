"""Wrappers that make a simulated robot's camera lose frames, or its bus slow, on purpose.

Made by ``gwp-edge profile --disturb`` (see ``gwp_edge.profiling.disturb``) and, with a switch that
is thrown from outside, by ``gwp-edge bench soak``.
"""

from __future__ import annotations

import mmap
import random
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from gwp_edge.errors import DeviceError, SpecError
from gwp_edge.protocols import Arm, Camera
from gwp_edge.robots import ARMS, CAMERAS, import_callable
from gwp_edge.spec import Channel, PolicySpec
from gwp_edge.types import ArmState, FloatArray, Frame, JointLimits


class Switch:
    """A few bytes in a file that one process sets and others look at. Threads: any.

    Args:
        path: of the file; made where it is missing.
    """

    N_BYTES = 8

    def __init__(self, path: str) -> None:
        file = Path(path)
        if not file.exists():
            file.write_bytes(bytes(self.N_BYTES))
        with file.open("r+b") as f:
            self._map = mmap.mmap(f.fileno(), self.N_BYTES)

    def __getitem__(self, i: int) -> int:
        return self._map[i]

    def __setitem__(self, i: int, value: int) -> None:
        self._map[i] = value

    def close(self) -> None:
        """Let go of the file; it stays."""
        self._map.close()


CAMERA_BYTE = 0
CAMERA_GOOD, CAMERA_FROZEN, CAMERA_GONE = 0, 1, 2


class SwitchedCamera:
    """A camera that freezes or fails when its switch says so. Threads: as its inner one."""

    def __init__(self, inner: Camera, switch: Switch) -> None:
        self._inner = inner
        self._switch = switch
        self._kept: Frame | None = None

    @property
    def name(self) -> str:
        """As the camera's."""
        return self._inner.name

    def open(self) -> None:
        """As the camera's."""
        self._inner.open()

    def latest(self) -> Frame | None:
        """Return the newest frame, or while frozen the last one.

        Raises:
            DeviceError: the switch says that it is gone.
        """
        how = self._switch[CAMERA_BYTE]
        if how == CAMERA_GONE:
            raise DeviceError(f"camera {self.name}: unplugged (switched off on purpose)")
        if how != CAMERA_FROZEN or self._kept is None:
            self._kept = self._inner.latest()
        return self._kept

    def close(self) -> None:
        """As the camera's."""
        self._inner.close()
        self._switch.close()


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


def create_camera(role: str, options: Mapping[str, object], spec: PolicySpec) -> Camera:
    """Make the camera ``disturbed_kind`` that loses the share ``disturbed_drop`` of its frames.

    With ``disturbed_switch``, a file, it fails as the ``Switch`` there says instead.
    """
    key = "disturbed_switch" if "disturbed_switch" in options else "disturbed_drop"
    kind, how, rest = _unwrapped(options, key)
    inner = cast(Camera, import_callable(CAMERAS[kind], "camera driver")(role, rest, spec))
    if key == "disturbed_switch":
        return SwitchedCamera(inner, Switch(str(how)))
    return DisturbedCamera(inner, float(how))


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
        raise SpecError(f"a disturbed device needs {e}; see gwp_edge.drivers.disturbed") from e
