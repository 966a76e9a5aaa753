"""Wrappers that make a simulated robot's camera lose frames, or its bus slow, on purpose.

Made by ``gwp-edge profile --disturb`` (see ``gwp_edge.profiling.disturb``) and, with a switch that
is thrown from outside, by ``gwp-edge bench soak``.
"""

from __future__ import annotations

import mmap
import random
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import replace
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


# Time, ms, chance, 0 to 1, and how far the time varies to either side, ms.
Delay = tuple[float, float, float]


def draw_ms(delay: Delay, chance: random.Random) -> float:
    """Return how long it is this time, ms; 0 where it does not happen."""
    if chance.random() >= delay[1]:
        return 0.0
    return delay[0] + delay[2] * (2 * chance.random() - 1)


def is_lost(camera: str, frame_idx: int, drop: float) -> bool:
    """Return whether a frame is one of the lost ones: the same at every look, for each camera."""
    return random.Random(f"{camera} {frame_idx}").random() < drop


class DisturbedCamera:
    """A camera that loses frames, or delivers them late. Threads: as its inner one.

    Args:
        inner: the camera.
        drop: share of its frames to lose, 0 to 1.
        delays: ``transport`` holds every frame back, ``observe`` makes the caller wait for it.
    """

    def __init__(
        self, inner: Camera, drop: float, delays: Mapping[str, Delay] | None = None
    ) -> None:
        self._inner = inner
        self._drop = drop
        self._delays = delays or {}
        self._kept: Frame | None = None
        self._newest_idx = -1
        self._on_their_way: deque[tuple[int, Frame]] = deque()

    @property
    def name(self) -> str:
        """As the camera's."""
        return self._inner.name

    def open(self) -> None:
        """As the camera's."""
        self._inner.open()

    def latest(self) -> Frame | None:
        """Return the newest frame that was not lost and has arrived."""
        asked_ns = time.monotonic_ns()
        frame = self._inner.latest()
        if frame is not None and frame.frame_idx > self._newest_idx:
            self._newest_idx = frame.frame_idx
            # The first one is never lost, so that there is always one.
            if self._kept is None or not is_lost(self.name, frame.frame_idx, self._drop):
                self._take(frame, asked_ns)
        now_ns = time.monotonic_ns()
        while self._on_their_way and self._on_their_way[0][0] <= now_ns:
            self._kept = self._on_their_way.popleft()[1]
        return self._kept

    def _take(self, frame: Frame, asked_ns: int) -> None:
        chance = random.Random(f"{self.name} delay {frame.frame_idx}")
        if "observe" in self._delays:
            time.sleep(draw_ms(self._delays["observe"], chance) / 1e3)
        if "transport" not in self._delays:
            self._kept = frame
            return
        late_ns = round(draw_ms(self._delays["transport"], chance) * 1e6)
        # One that is made when it is asked for has no time of arrival of its own.
        is_asked = frame.t_received_ns >= asked_ns
        there_ns = (frame.t_captured_ns if is_asked else frame.t_received_ns) + late_ns
        if not is_asked:
            frame = replace(frame, t_received_ns=there_ns)
        self._on_their_way.append((there_ns, frame))

    def close(self) -> None:
        """As the camera's."""
        self._inner.close()


class DisturbedArm:
    """An arm on a bus that is slow now and then. Threads: as its inner one."""

    def __init__(self, inner: Arm, bus: Delay) -> None:
        self._inner = inner
        self._bus = bus
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
        extra_ms = draw_ms(self._bus, self._random)
        if extra_ms > 0:
            time.sleep(extra_ms / 1e3)
        self._inner.send(position)

    def hold(self) -> None:
        """As the arm's, at once."""
        self._inner.hold()

    def close(self) -> None:
        """As the arm's."""
        self._inner.close()


def create_camera(role: str, options: Mapping[str, object], spec: PolicySpec) -> Camera:
    """Make the camera ``disturbed_kind`` that loses the share ``disturbed_drop`` of its frames.

    ``disturbed_delays`` says how late its frames are; see ``DisturbedCamera``. With
    ``disturbed_switch``, a file, it fails as the ``Switch`` there says instead.
    """
    key = "disturbed_switch" if "disturbed_switch" in options else "disturbed_drop"
    kind, how, rest = _unwrapped(options, key)
    inner = cast(Camera, import_callable(CAMERAS[kind], "camera driver")(role, rest, spec))
    if key == "disturbed_switch":
        return SwitchedCamera(inner, Switch(str(how)))
    delays = cast(Mapping[str, list[float]], options.get("disturbed_delays", {}))
    return DisturbedCamera(inner, float(how), {k: _delay(v) for k, v in delays.items()})


def create_arm(options: Mapping[str, object], spec: PolicySpec) -> DisturbedArm:
    """Make the arm ``disturbed_arm_kind`` whose sends take ``disturbed_bus`` longer."""
    kind, bus, rest = _unwrapped(options, "disturbed_bus")
    inner = import_callable(ARMS[kind], "arm driver")(rest, spec)
    return DisturbedArm(cast(Arm, inner), _delay(bus))


def _delay(values: Sequence[Any]) -> Delay:
    ms, chance, varies_ms = values
    return float(ms), float(chance), float(varies_ms)


def _unwrapped(options: Mapping[str, object], key: str) -> tuple[str, Any, dict[str, object]]:
    rest = {k: v for k, v in options.items() if not k.startswith("disturbed_")}
    try:
        return str(options["disturbed_kind"]), options[key], rest
    except KeyError as e:
        raise SpecError(f"a disturbed device needs {e}; see gwp_edge.drivers.disturbed") from e
