"""Which robot: robot files, the built-in robots, and the factories of arms, cameras and worlds.

A factory is named "module:function" so that nothing of a vendor is imported before it is used.
Third parties register theirs in the entry-point groups gwp_edge.arms and gwp_edge.cameras.
"""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final, cast

import msgspec

from gwp_edge.errors import SpecError
from gwp_edge.protocols import Arm, Camera, World
from gwp_edge.robot_config import (
    ArmConfig,
    CameraConfig,
    DeviceConfig,
    ObservationConfig,
    RobotConfig,
)
from gwp_edge.robot_limits import check_ranges
from gwp_edge.spec import PolicySpec
from gwp_edge.workspace import find_arms

ARMS: Final[dict[str, str]] = {
    "kinematic": "gwp_edge.drivers.kinematic:create_arm",
    "sim": "gwp_edge.drivers.sim:create_arm",
    "piper": "gwp_edge.drivers.piper:create_arm",
    "disturbed": "gwp_edge.drivers.disturbed:create_arm",
    "lerobot-robot": "gwp_edge.drivers.lerobot_bridge:create_arm",
}
CAMERAS: Final[dict[str, str]] = {
    "kinematic": "gwp_edge.drivers.kinematic:create_camera",
    "sim": "gwp_edge.drivers.sim:create_camera",
    "realsense": "gwp_edge.drivers.realsense:create_camera",
    "rs-file": "gwp_edge.drivers.recorded:create_rs_file_camera",
    "lerobot": "gwp_edge.drivers.recorded:create_lerobot_camera",
    "disturbed": "gwp_edge.drivers.disturbed:create_camera",
    "lerobot-robot": "gwp_edge.drivers.lerobot_bridge:create_camera",
}
WORLDS: Final[dict[str, str]] = {
    "kinematic": "gwp_edge.drivers.kinematic:create_world",
    "sim": "gwp_edge.drivers.sim:create_world",
    "lerobot-robot": "gwp_edge.drivers.lerobot_bridge:create_world",
}
BUILT_IN: Final = ("kinematic", "sim", "piper", "piper-dual")

# Whose devices may be told what their world may be told.
_OPTIONS_OF_WORLD: Final = ("kinematic", "sim")
# Whose options can be checked by making them: that opens nothing and needs no vendor's library.
_CHECKED_CAMERAS: Final = ("realsense", "rs-file", "lerobot")


# Software rendering on a busy machine is slow, and nobody stands next to a simulated arm.
# Pictures near the canvas's size, so that drawing leaves the policy its processor time.
_WORLD_OPTIONS: Final[dict[str, dict[str, int]]] = {
    "kinematic": {},
    "sim": {"width_px": 320, "height_px": 240},
}
_SIMULATED: Final = ObservationConfig(
    frame_age_ms=500.0, frame_skew_ms=500.0, state_age_ms=500.0, stall_ms=2000.0
)


def load_robot(name: str, spec: PolicySpec, *, driver: str | None = None) -> RobotConfig:
    """Return the robot that ``--robot`` names, driven by what ``--driver`` names if it is a PiPER.

    Raises:
        SpecError: no such robot, or its file does not fit; names the field.
    """
    robot = _find_robot(name, spec)
    if robot.arm.kind == "piper":
        from gwp_edge.drivers.piper_options import with_driver

        arm = msgspec.structs.replace(robot.arm, options=with_driver(robot.arm.options, driver))
        return msgspec.structs.replace(robot, arm=arm)
    if driver is not None:
        raise SpecError(f"--driver {driver}: only PiPER arms have a choice, {name} is none")
    return robot


def require_serials(robot: RobotConfig) -> None:
    """Check that several cameras can be told apart, before any process is started for them.

    Raises:
        SpecError: one has no serial number; says how to get a file that has.
    """
    unnamed = [
        c.role for c in robot.cameras if c.kind == "realsense" and not c.options.get("serial")
    ]
    if unnamed and len(robot.cameras) > 1:
        raise SpecError(
            f"robot {robot.name}: no serial number for {', '.join(unnamed)}; make a robot file "
            "that has with: gwp-edge cameras --write robot.toml"
        )


def _find_robot(name: str, spec: PolicySpec) -> RobotConfig:
    if name in BUILT_IN:
        return built_in_robot(name, spec)
    if name.startswith("lerobot:"):
        return _lerobot_robot(name, spec)
    path = Path(name)
    if path.suffix != ".toml" and not path.exists():
        near = difflib.get_close_matches(name, BUILT_IN, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise SpecError(
            f"robot {name!r}: expected {', '.join(BUILT_IN)}, lerobot:TYPE or the path of a "
            f"robot file{hint}"
        )
    robot = read_robot_file(path)
    _check_fits(robot, spec, str(path))
    return robot


def read_robot_file(path: Path) -> RobotConfig:
    """Read a TOML robot file.

    Raises:
        SpecError: it cannot be read, a field is missing, unknown or of the wrong type, or nobody
            has a driver for a device.
    """
    try:
        # Decoded here and not by msgspec.toml, whose import of a TOML library differs by Python.
        # Some editors put a byte order mark in front, which TOML and JSON do not know.
        robot = msgspec.convert(_toml_loads(path.read_text("utf-8-sig")), RobotConfig)
    except OSError as e:
        raise SpecError(f"robot file {path}: cannot read it: {e.strerror}") from e
    except (msgspec.ValidationError, ValueError) as e:
        raise SpecError(f"robot file {path}: {e}") from e
    _check_kinds(robot, f"robot file {path}")
    cameras = tuple(
        camera
        if camera.picture is None
        else msgspec.structs.replace(camera, picture=str(path.parent / camera.picture))
        for camera in robot.cameras
    )
    return msgspec.structs.replace(robot, cameras=cameras)


def built_in_robot(name: str, spec: PolicySpec) -> RobotConfig:
    """Return a built-in robot with a camera for every role of ``spec``.

    Raises:
        SpecError: the policy drives another number of arms.
    """
    if name in ("kinematic", "sim"):
        return RobotConfig(
            name=name,
            arm=ArmConfig(kind=name),
            cameras=tuple(CameraConfig(role=r, kind=name) for r in spec.cameras),
            world=DeviceConfig(kind=name, options=dict(_WORLD_OPTIONS[name])),
            observation=_SIMULATED,
        )
    n_arms = 2 if name == "piper-dual" else 1
    if spec.n_channels != 7 * n_arms:
        other = "piper" if n_arms == 2 else "piper-dual"
        raise SpecError(
            f"robot {name} has {7 * n_arms} channels, the policy {spec.n_channels}; "
            f"use --robot {other} or a bundle for this robot"
        )
    buses = {"left": "can_left", "right": "can_right"} if n_arms == 2 else {"can": "can0"}
    return RobotConfig(
        name=name,
        arm=ArmConfig(kind="piper", options=dict(buses)),
        cameras=tuple(CameraConfig(role=r, kind="realsense") for r in spec.cameras),
    )


def _lerobot_robot(name: str, spec: PolicySpec) -> RobotConfig:
    """Return the robot ``lerobot:TYPE[,key=value...]``, whose cameras are named like the roles."""
    from gwp_edge.drivers.lerobot_options import parse_name

    options = {"cameras": {role: role for role in spec.cameras}, **parse_name(name)}
    return RobotConfig(
        name=name.partition(",")[0],
        arm=ArmConfig(kind="lerobot-robot"),
        cameras=tuple(CameraConfig(role=role, kind="lerobot-robot") for role in spec.cameras),
        world=DeviceConfig(kind="lerobot-robot", options=options),
    )


def create_arm(robot: RobotConfig, spec: PolicySpec, extra: Mapping[str, object]) -> Arm:
    """Make the arm of ``robot``; ``extra`` options win over the file's.

    Raises:
        SpecError: an unknown kind or options that do not fit.
        DeviceError: from the factory.
    """
    factory = _factory(robot.arm.kind, ARMS, "gwp_edge.arms", "arm")
    shared = world_options(robot, robot.arm, extra)
    return cast(Arm, factory({**robot.arm.options, **shared}, spec))


def create_camera(camera: CameraConfig, spec: PolicySpec, extra: Mapping[str, object]) -> Camera:
    """Make one camera; ``extra`` options win over the file's.

    Raises:
        SpecError: an unknown kind or options that do not fit.
        DeviceError: from the factory.
    """
    factory = _factory(camera.kind, CAMERAS, "gwp_edge.cameras", "camera")
    return cast(Camera, factory(camera.role, {**camera.options, **extra}, spec))


def world_options(
    robot: RobotConfig, device: DeviceConfig, extra: Mapping[str, object]
) -> Mapping[str, object]:
    """Return what the robot's world adds to the options of a device: only to those of its kind.

    A real or recorded camera may look at an arm that lives in a world.
    """
    kind = device.options.get("disturbed_kind", device.kind)  # what a wrapper holds
    return extra if robot.world is not None and kind == robot.world.kind else {}


def create_world(robot: RobotConfig, spec: PolicySpec) -> World | None:
    """Make the world that the robot's simulated devices share, or None for a real robot.

    Raises:
        SpecError: an unknown kind or options that do not fit.
        DeviceError: from the factory.
    """
    if robot.world is None:
        return None
    factory = _factory(robot.world.kind, WORLDS, None, "world")
    return cast(World, factory(robot.world.options, spec))


def import_callable(reference: str, what: str) -> Callable[..., object]:
    """Return the function that "module:function" names.

    Raises:
        SpecError: there is no such module or function.
    """
    module_name, _, function_name = reference.partition(":")
    try:
        function = getattr(importlib.import_module(module_name), function_name)
    except (ImportError, AttributeError, ValueError) as e:
        raise SpecError(f"{what} {reference!r} cannot be loaded: {e}") from e
    if not callable(function):
        raise SpecError(f"{what} {reference!r} is not a function")
    return cast(Callable[..., object], function)


def _check_fits(robot: RobotConfig, spec: PolicySpec, where: str) -> None:
    roles = [c.role for c in robot.cameras]
    if sorted(roles) != sorted(spec.cameras):
        raise SpecError(
            f"{where}: expected one camera for each role {', '.join(spec.cameras)}, "
            f"got {', '.join(roles) or 'none'}"
        )
    try:
        check_ranges(robot, spec.channels)
        find_arms(robot.workspace, spec.channels, robot.arm.kind)
        _check_options(robot, spec)
    except SpecError as e:
        raise SpecError(f"{where}: {e}") from e


def _check_options(robot: RobotConfig, spec: PolicySpec) -> None:
    """Check what the devices are told, as far as that needs no vendor's library and no world.

    Making a device opens nothing.

    Raises:
        SpecError: an option is unknown or wrong, or a simulated device has no world.
    """
    create_world(robot, spec)
    for device in (robot.arm, *robot.cameras):
        if device.kind in WORLDS:
            if robot.world is None or robot.world.kind != device.kind:
                raise SpecError(
                    f'{device.kind}: lives in a world: add [world] kind = "{device.kind}"'
                )
            if device.options and device.kind in _OPTIONS_OF_WORLD:
                import_callable(WORLDS[device.kind], "world driver")(device.options, spec)
    if robot.arm.kind == "piper":
        create_arm(robot, spec, {})
    for camera in robot.cameras:
        # Without a serial: require_serials has the better words.
        is_named = camera.kind != "realsense" or camera.options.get("serial")
        if camera.kind in _CHECKED_CAMERAS and is_named:
            create_camera(camera, spec, {})


def _check_kinds(robot: RobotConfig, where: str) -> None:
    """Check that there is a driver for each device, without importing any."""
    devices: list[tuple[DeviceConfig, Mapping[str, str], str | None, str]] = [
        (robot.arm, ARMS, "gwp_edge.arms", "arm"),
        *((camera, CAMERAS, "gwp_edge.cameras", "camera") for camera in robot.cameras),
    ]
    if robot.world is not None:
        devices.append((robot.world, WORLDS, None, "world"))
    try:
        for device, registry, group, what in devices:
            _reference(device.kind, registry, group, what)
    except SpecError as e:
        raise SpecError(f"{where}: {e}") from e


def _factory(
    kind: str, registry: Mapping[str, str], group: str | None, what: str
) -> Callable[..., object]:
    return import_callable(_reference(kind, registry, group, what), f"{what} driver")


def _reference(kind: str, registry: Mapping[str, str], group: str | None, what: str) -> str:
    """Return "module:function" of a driver.

    Raises:
        SpecError: nobody has one of this kind.
    """
    if kind in registry:
        return registry[kind]
    # Slow to import, and needed for third parties' devices only.
    from importlib.metadata import entry_points

    found = {e.name: e for e in entry_points(group=group)} if group else {}
    if kind in found:
        return found[kind].value
    have = ", ".join(sorted([*registry, *found]))
    raise SpecError(f"{what} kind {kind!r} is not known; there are {have}")


def _toml_loads(text: str) -> dict[str, Any]:
    try:
        toml = importlib.import_module("tomllib")
    except ImportError:  # Python 3.10
        toml = importlib.import_module("tomli")
    return cast(dict[str, Any], toml.loads(text))
