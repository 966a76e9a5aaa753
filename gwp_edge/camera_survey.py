"""Who is who among the attached cameras: a picture of each, and a robot file to fill in."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from PIL import Image

from gwp_edge.errors import DeviceError, SpecError
from gwp_edge.protocols import Camera
from gwp_edge.types import Frame

if TYPE_CHECKING:
    from gwp_edge.drivers.realsense import DeviceInfo

ROLES: Final = ("cam_high", "cam_left_wrist", "cam_right_wrist")
# Automatic exposure needs about so many frames to settle.
_N_SETTLE: Final = 15
_TIMEOUT_S: Final = 10.0
_POLL_S: Final = 0.01
_ARMS: Final = {
    "piper": '[arm]\nkind = "piper"\n\n[arm.options]\ncan = "can0"\n',
    "piper-dual": (
        '[arm]\nkind = "piper"\n\n[arm.options]\nleft = "can_left"\nright = "can_right"\n'
    ),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Picture:
    """What one camera showed: the file, or why there is none."""

    serial: str
    path: Path | None
    error: str | None


def take_pictures(
    serials: Sequence[str], folder: Path, make_camera: Callable[[str], Camera]
) -> tuple[Picture, ...]:
    """Write one picture of every camera to ``folder`` as SERIAL.png, one after the other.

    Args:
        serials: of the cameras.
        folder: made where it is missing.
        make_camera: makes the closed camera of a serial.

    Raises:
        SpecError: the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise SpecError(f"{folder}: cannot be made: {e.strerror}") from e
    return tuple(_take(serial, folder, make_camera(serial)) for serial in serials)


def _take(serial: str, folder: Path, camera: Camera) -> Picture:
    path = folder / f"{serial}.png"
    try:
        camera.open()
        Image.fromarray(_settled(camera).image).save(path)
    except DeviceError as e:
        return Picture(serial=serial, path=None, error=str(e))
    except OSError as e:
        raise SpecError(f"{path}: cannot be written: {e.strerror}") from e
    finally:
        camera.close()
    return Picture(serial=serial, path=path, error=None)


def _settled(camera: Camera) -> Frame:
    deadline_s = time.monotonic() + _TIMEOUT_S
    first: Frame | None = None
    while time.monotonic() < deadline_s:
        frame = camera.latest()
        first = first or frame
        if frame is not None and first and frame.frame_idx >= first.frame_idx + _N_SETTLE:
            return frame
        time.sleep(_POLL_S)
    if first is None:
        raise DeviceError(
            f"camera {camera.name}: opened but no frame came in {_TIMEOUT_S:g} s; use a USB 3 port"
        )
    raise DeviceError(f"camera {camera.name}: fewer than {_N_SETTLE} frames in {_TIMEOUT_S:g} s")


def assign_roles(devices: Sequence[DeviceInfo], given: Mapping[str, str]) -> dict[str, str]:
    """Return the serial of every role: those given, then the rest in order of their serials.

    Args:
        devices: attached.
        given: serial by role.

    Raises:
        SpecError: a given serial is not attached or given twice, or roles run out.
    """
    attached = [d.serial for d in devices]
    for role, serial in given.items():
        if serial not in attached:
            raise SpecError(
                f"--role {role}={serial}: no such camera; attached are "
                f"{', '.join(attached) or 'none'}"
            )
    if len(set(given.values())) != len(given):
        raise SpecError("--role: a serial is given to two roles")
    roles = dict(given)
    rest = [s for s in attached if s not in given.values()]
    free = [r for r in ROLES if r not in given]
    if len(rest) > len(free):
        raise SpecError(
            f"{len(attached)} cameras are attached, and roles are known for {len(ROLES)}; "
            "name each by --role ROLE=SERIAL"
        )
    return roles | dict(zip(free, rest, strict=False))


def robot_file(
    robot: str,
    devices: Sequence[DeviceInfo],
    roles: Mapping[str, str],
    *,
    guessed: set[str],
    pictures: Mapping[str, str] | None = None,
) -> str:
    """Return a robot file, TOML, for these cameras.

    Args:
        robot: ``piper`` or ``piper-dual``.
        devices: attached.
        roles: serial by role.
        guessed: roles that nobody gave; marked for the reader.
        pictures: path of the picture by serial, relative to the robot file.

    Raises:
        SpecError: another robot.
    """
    if robot not in _ARMS:
        raise SpecError(f"robot {robot!r}: expected one of {', '.join(_ARMS)}")
    names = {d.serial: d.name for d in devices}
    parts = [f'name = "{robot}"\n', _ARMS[robot]]
    for role, serial in roles.items():
        note = "guessed by serial order: check its picture" if role in guessed else "as given"
        parts.append(
            f"# {names[serial]}; {note}\n[[cameras]]\n"
            f'role = "{role}"\nkind = "realsense"\n{_picture_row(serial, pictures)}'
            f'\n[cameras.options]\nserial = "{serial}"\n'
            "width_px = 640\nheight_px = 480\nfps = 30\n"
            "# exposure_us = 8000  # left out: automatic\n"
        )
    return "\n".join(parts)


def _picture_row(serial: str, pictures: Mapping[str, str] | None) -> str:
    path = (pictures or {}).get(serial)
    return "" if path is None else f"picture = {json.dumps(path)}\n"
