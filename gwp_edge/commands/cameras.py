"""``gwp-edge cameras``."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from gwp_edge.commands.options import JsonFlag
from gwp_edge.console import (
    EXIT_FAILED,
    remark,
    require_writable,
    say,
    say_json,
    say_table,
    write_file,
)
from gwp_edge.errors import SpecError


def cameras(
    out: Annotated[
        Path, typer.Option("--out", help="Folder for one picture of each camera.")
    ] = Path("cameras"),
    write: Annotated[
        Path | None, typer.Option("--write", help="Write a robot file for these cameras.")
    ] = None,
    role: Annotated[
        list[str] | None,
        typer.Option("--role", help="ROLE=SERIAL, such as cam_high=1234; once for each camera."),
    ] = None,
    robot: Annotated[
        str, typer.Option("--robot", help="Arms in the robot file: piper or piper-dual.")
    ] = "piper",
    list_only: Annotated[bool, typer.Option("--list", help="Take no pictures.")] = False,
    as_json: JsonFlag = False,
) -> None:
    """List the attached RealSense cameras and take a picture of each.

    Example: gwp-edge cameras --out cameras --write robot.toml
    """
    from gwp_edge.camera_survey import assign_roles, robot_file, take_pictures
    from gwp_edge.drivers.camera_host import HostedCamera, SourceConfig
    from gwp_edge.drivers.realsense import list_devices

    given = dict(_split(text) for text in role or [])
    require_writable(write)
    if write is not None and write.is_file():
        raise SpecError(
            f"{write} is there already, perhaps with limits of yours; name another file, and copy "
            "what you need"
        )
    devices = list_devices()
    if write is not None:
        roles = assign_roles(devices, given)
        robot_file(robot, devices, roles, guessed=set())  # refuses before anything is opened

    def make_camera(serial: str) -> HostedCamera:
        factory = "gwp_edge.drivers.realsense:create_source"
        return HostedCamera(serial, SourceConfig(factory=factory, kwargs={"serial": serial}))

    serials = [] if list_only else [d.serial for d in devices]
    pictures = {p.serial: p for p in take_pictures(serials, out, make_camera)} if serials else {}
    failed = [p for p in pictures.values() if p.error is not None]
    if as_json:
        say_json(
            [
                {
                    "serial": d.serial,
                    "name": d.name,
                    "usb": d.usb,
                    "firmware": d.firmware,
                    "picture": str(p.path) if (p := pictures.get(d.serial)) and p.path else None,
                    "error": p.error if p else None,
                }
                for d in devices
            ]
        )
    elif devices:
        rows = [
            (d.serial, d.name, d.usb, d.firmware, _shown(pictures.get(d.serial))) for d in devices
        ]
        say_table("RealSense cameras", ("serial", "name", "USB", "firmware", "picture"), rows)
    else:
        remark(
            "no RealSense camera is attached; check cable and power, and librealsense's udev rules"
        )
    for picture in failed:
        remark(f"{picture.serial}: {picture.error}")
    if write is not None and devices:
        paths = {
            p.serial: os.path.relpath(p.path, write.parent)
            for p in pictures.values()
            if p.path is not None
        }
        guessed = set(roles) - set(given)
        text = robot_file(robot, devices, roles, guessed=guessed, pictures=paths)
        write_file(write, lambda file: file.write(text.encode()))
        say(f"{write}: check every role against its picture, then run --robot {write}")
    if failed or not devices:
        raise typer.Exit(EXIT_FAILED)


def _shown(picture: object) -> str:
    path = getattr(picture, "path", None)
    return "none" if path is None else str(path)


def _split(text: str) -> tuple[str, str]:
    role, separator, serial = text.partition("=")
    if not (role and separator and serial):
        raise SpecError(f"--role {text}: expected ROLE=SERIAL, such as cam_high=1234")
    return role, serial
