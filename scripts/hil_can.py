"""Read a PiPER over CAN without a bundle, a camera or motion; print what it says as JSON.

    python scripts/hil_can.py robot.toml

The arm is asked for firmware and limits, as at the start of every run, and listened to. It is not
enabled and gets no target. Not yet run on hardware.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gwp_edge.drivers.piper import PiperArm
from gwp_edge.drivers.piper_options import parse_options
from gwp_edge.drivers.piper_unit import N_CHANNELS
from gwp_edge.errors import GwpError, SpecError
from gwp_edge.robots import read_robot_file
from gwp_edge.spec import Channel


def read_arm(path: Path) -> dict[str, Any]:
    """Return firmware and pose (rad, m) of the arms of a robot file.

    Raises:
        SpecError: the robot file names another kind of arm.
        DeviceError: an arm does not answer; says why.
    """
    robot = read_robot_file(path)
    if robot.arm.kind != "piper":
        raise SpecError(f"{path}: the arm is {robot.arm.kind!r}, this test reads 'piper' only")
    options = parse_options(robot.arm.options)
    channels = [
        Channel(name=f"{name}_{i}", unit="m" if i == N_CHANNELS - 1 else "rad", kind="delta")
        for name, _ in options.arms
        for i in range(N_CHANNELS)
    ]
    arm = PiperArm(channels, options)
    try:
        arm.open(enable=False)
        position = arm.state().position.tolist()
        return {
            "arms": [{"name": unit.name, "firmware": unit.firmware} for unit in arm.units],
            "position": dict(zip((c.name for c in channels), position, strict=True)),
        }
    finally:
        arm.close()


def main(arguments: Sequence[str]) -> int:
    """Entry point."""
    if len(arguments) != 1:
        sys.stderr.write("usage: hil_can.py ROBOT\n")
        return 2
    try:
        found = read_arm(Path(arguments[0]))
    except GwpError as e:
        sys.stderr.write(f"hil_can: {e}\n")
        return 1
    sys.stdout.write(json.dumps(found) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
