"""Preflight lines about what the robot hangs on: buses, camera pictures, clocks and power.

They reuse ``gwp-edge doctor``'s checks. A line exists only where the fact is known here.
"""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Final

from gwp_edge.doctor import devices, judge, power
from gwp_edge.doctor.system import CheckResult as Finding
from gwp_edge.doctor.system import LocalSystem, System
from gwp_edge.robot_config import RobotConfig
from gwp_edge.telemetry import CheckResult

PICTURE_AGE_MAX_S: Final = 30 * 24 * 3600.0
_KERNEL_NAME: Final = re.compile(r"can\d+")
_BUS_KEYS: Final = ("can", "left", "right")


def check_machine(
    robot: RobotConfig, *, system: System | None = None, now_s: float | None = None
) -> tuple[CheckResult, ...]:
    """Return the lines for ``robot``; none for a simulated one.

    Args:
        robot: which.
        system: where facts come from; this machine by default.
        now_s: present time of the wall clock, as files are stamped with.
    """
    if robot.is_simulated:
        return ()
    system = LocalSystem() if system is None else system
    now_s = time.time() if now_s is None else now_s
    of_robot = (*check_buses(robot, system), *check_pictures(robot, now_s))
    return (*map(_line, of_robot), *check_clocks(system))


def can_interfaces(robot: RobotConfig) -> tuple[str, ...]:
    """Return the names of the network interfaces that the robot's PiPER arms hang on."""
    if robot.arm.kind != "piper":
        return ()
    names = [robot.arm.options.get(key) for key in _BUS_KEYS]
    if not any(names):
        names = ["can0"]
    return tuple(n for n in names if isinstance(n, str) and n and ":" not in n)


def check_buses(robot: RobotConfig, system: System) -> tuple[Finding, ...]:
    """Check state, queue, error counters and other receivers of every bus of the robot."""
    names = can_interfaces(robot)
    if not names:
        return ()
    found = {f.name: f for f in judge("can", devices.check_links, system)}
    general = [f for name, f in found.items() if name == "can"]
    lines = []
    for name in names:
        finding = found.get(f"can {name}")
        if finding is not None:
            lines.append(finding)
        elif general and _is_missing(name, system):
            detail = f"there is no network interface {name}; {general[0].detail}"
            lines.append(Finding(name=f"can {name}", status="fail", detail=detail))
        elif general:
            lines.append(replace(general[0], name=f"can {name}"))
        else:
            have = ", ".join(n.removeprefix("can ") for n in found)
            detail = f"there is no such interface; there are {have}"
            lines.append(Finding(name=f"can {name}", status="fail", detail=detail))
    lines += _check_names(names, len(found) - len(general))
    present = [name for name in names if f"can {name}" in found]
    # The vendor's library opens sockets like anybody's, and perhaps has by now.
    if robot.arm.options.get("driver") != "piper-sdk":
        lines += judge("can receivers", lambda s: devices.check_receivers(s, present), system)
    return tuple(lines)


def _check_names(names: Sequence[str], n_interfaces: int) -> list[Finding]:
    """Warn of names that the kernel gives in the order in which it finds the interfaces."""
    numbered = [name for name in names if _KERNEL_NAME.fullmatch(name)]
    if n_interfaces < 2 or not numbered:
        return []
    detail = (
        f"this machine has {n_interfaces} CAN interfaces, and which of them is "
        f"{' or '.join(numbered)} may change at every start"
    )
    fix = "name each by its USB path with udev (docs/jetson.md), and use that in the robot file"
    return [Finding(name="can names", status="warn", detail=detail, fix=fix)]


def _is_missing(interface: str, system: System) -> bool:
    """Whether the kernel lists its interfaces, and this one is not among them."""
    listed = system.glob("/sys/class/net/*")
    return bool(listed) and f"/sys/class/net/{interface}" not in listed


def check_pictures(robot: RobotConfig, now_s: float) -> tuple[Finding, ...]:
    """Check how old the pictures are by which a person told the cameras apart."""
    name = "camera pictures"
    parts: list[str] = []
    problems: list[str] = []
    for camera in robot.cameras:
        if camera.picture is None:
            continue
        path = Path(camera.picture)
        try:
            age_s = now_s - path.stat().st_mtime
        except OSError as e:
            problems.append(f"{camera.role}: {path}: {e.strerror}")
            continue
        text = f"{camera.role} {max(0.0, age_s) / 86400.0:.1f} days old"
        (problems if age_s > PICTURE_AGE_MAX_S else parts).append(text)
    if problems:
        fix = "look whether each camera is still who it was, take new ones with gwp-edge cameras"
        return (Finding(name=name, status="fail", detail="; ".join(problems), fix=fix),)
    bare = [c.role for c in robot.cameras if c.kind == "realsense" and c.picture is None]
    if bare:
        detail = f"none of {', '.join(bare)}: nobody has looked which camera is which"
        fix = (
            "gwp-edge cameras --write robot.toml takes them and makes a robot file that names them"
        )
        return (Finding(name=name, status="warn", detail=detail, fix=fix),)
    return (Finding(name=name, status="pass", detail=", ".join(parts)),) if parts else ()


def check_clocks(system: System) -> tuple[CheckResult, ...]:
    """Check power mode, clocks and throttling where the machine tells."""
    findings: Sequence[Finding] = [
        *judge("power mode", power.check_power_mode, system),
        *judge("cpu clocks", power.check_cpu_clocks, system),
        *judge("gpu clocks", power.check_gpu_clocks, system),
        *judge("throttling", power.check_throttling, system),
    ]
    return tuple(_line(f) for f in findings if f.status != "skip")


def _line(finding: Finding) -> CheckResult:
    """Return a finding as a preflight line: a warning costs margin and passes, but is said."""
    detail = f"{finding.detail}: {finding.fix}" if finding.fix else finding.detail
    if finding.status == "warn":
        detail = f"warning: {detail}"
    return CheckResult(name=finding.name, passed=finding.status != "fail", detail=detail)
