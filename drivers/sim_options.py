"""Options of the simulated robot, as a robot file or the command line gives them."""

from __future__ import annotations

import math
from collections.abc import Mapping

import msgspec

from gwp_edge.drivers.piper_model import N_CHANNELS
from gwp_edge.drivers.sim_model import CUBES
from gwp_edge.errors import SpecError
from gwp_edge.spec import PolicySpec

#: What the running world adds for arms and cameras.
SEGMENT_KEY = "sim_segment"
RINGS_KEY = "sim_rings"

_MAX_SIDE_PX = 4096


class SimOptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What may be chosen about the simulated world.

    Attributes:
        seed: places the cubes that ``objects`` leaves out, and the light.
        physics_hz: physics and control steps per second.
        fps: pictures per second and camera.
        width_px: image width of every camera.
        height_px: image height of every camera.
        objects: pose of a cube on the table by name: x, y (m, world), yaw (rad).
        object_area_m: x_min, x_max, y_min, y_max in which cubes are placed.
        lighting: how far brightness, colour and direction of the light vary with the seed, 0 to 1.
        mounts: where a camera role is mounted; see ``sim_model.camera_mounts``. A real-time world
            takes no role that it has no camera for: in a robot file that is a mistyped name.
        start_position: joints and openings at the start, D values, rad and m.
        renderer_nice: niceness of the rendering process, so that the policy goes first.
    """

    seed: int = 0
    physics_hz: float = 500.0
    fps: float = 30.0
    width_px: int = 640
    height_px: int = 480
    objects: dict[str, tuple[float, float, float]] = {}
    object_area_m: tuple[float, float, float, float] = (0.22, 0.38, -0.17, 0.17)
    lighting: float = 0.0
    mounts: dict[str, str] = {}
    start_position: tuple[float, ...] | None = None
    renderer_nice: int = 5

    def __post_init__(self) -> None:
        for name, low, high in (
            ("seed", 0, 2**63 - 1),
            ("physics_hz", 100.0, 5000.0),
            ("fps", 0.1, 240.0),
            ("width_px", 16, _MAX_SIDE_PX),
            ("height_px", 16, _MAX_SIDE_PX),
            ("lighting", 0.0, 1.0),
            ("renderer_nice", 0, 19),
        ):
            value = getattr(self, name)
            if not low <= value <= high:
                raise ValueError(f"{name}: expected {low} to {high}, got {value}")
        for name, pose in self.objects.items():
            if name not in CUBES:
                raise ValueError(f"objects: no {name}; the table has {', '.join(CUBES)}")
            if not all(math.isfinite(v) for v in pose):
                raise ValueError(f"objects: the pose of {name} must be finite, got {pose}")
        x_min, x_max, y_min, y_max = self.object_area_m
        if not (-0.2 <= x_min < x_max <= 0.7 and -0.65 <= y_min < y_max <= 0.65):
            raise ValueError(
                "object_area_m: expected x_min < x_max within -0.2 to 0.7 and "
                f"y_min < y_max within -0.65 to 0.65 (the table), got {self.object_area_m}"
            )


def parse_options(options: Mapping[str, object]) -> SimOptions:
    """Check ``options``; what the running world added is left aside.

    Raises:
        SpecError: an option is unknown, of another type, or out of range.
    """
    given = {k: v for k, v in options.items() if k not in (SEGMENT_KEY, RINGS_KEY)}
    try:
        return msgspec.convert(given, SimOptions, strict=False)
    except msgspec.ValidationError as e:
        known = ", ".join(SimOptions.__struct_fields__)
        raise SpecError(f"option of the sim: {e}; options are {known}") from e


def count_arms(spec: PolicySpec) -> int:
    """Return how many PiPER arms the channels of ``spec`` stand for: 1 or 2.

    Raises:
        SpecError: not six angles (rad) and an opening (m) for each of one or two arms.
    """
    units = [c.unit for c in spec.channels]
    arm = ["rad"] * (N_CHANNELS - 1) + ["m"]
    for n_arms in (1, 2):
        if units == arm * n_arms:
            return n_arms
    raise SpecError(
        f"the sim has one or two PiPER arms, six joints (rad) then the gripper (m) each; the "
        f"policy's {len(units)} channels have the units {' '.join(units)}"
    )
