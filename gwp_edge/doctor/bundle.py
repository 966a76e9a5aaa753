"""What a run checks before its first motion and needs no arm for: bundle and robot file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Final

from gwp_edge.doctor.system import CheckResult, Status, System, failed, passed
from gwp_edge.engines import create_engine
from gwp_edge.errors import GwpError, SpecError
from gwp_edge.preflight import check_golden, check_loaded
from gwp_edge.preflight_machine import check_buses, check_pictures
from gwp_edge.robot_config import RobotConfig
from gwp_edge.robots import load_robot, read_robot_file
from gwp_edge.spec import PolicySpec
from gwp_edge.telemetry import CheckResult as Line

_FIXES: Final = {"golden": "do not run it here; see gwp-edge verify"}


def check_bundle(path: Path, *, engine: str = "ort", provider: str = "cpu") -> list[CheckResult]:
    """Check files, engine, calibration and golden run, by the lines of a run's preflight.

    Args:
        path: bundle folder.
        engine: ``ort`` or ``trt``.
        provider: for ``ort``.
    """
    from gwp_edge.bundle import Bundle
    from gwp_edge.policy import BundlePolicy

    try:
        bundle = Bundle.open(path)
    except GwpError as e:
        return failed("bundle", str(e), "copy the bundle again, or export it anew")
    loaded_with = {"path": path, "engine": engine, "provider": provider}
    lines = [_result(line) for line in check_loaded(loaded_with)]
    try:
        policy = BundlePolicy(bundle, create_engine(engine, bundle, provider=provider))
    except GwpError as e:
        (gone,) = failed("engine", str(e), "name another one by --engine or --provider")
        return [gone if line.name == "engine" else line for line in lines]
    try:
        golden = check_golden(policy)
    finally:
        policy.close()
    return [*lines, _result(golden)]


def _result(line: Line) -> CheckResult:
    status: Status = "pass" if line.passed else "fail"
    fix = "" if line.passed else _FIXES.get(line.name, "")
    return CheckResult(name=line.name, status=status, detail=line.detail, fix=fix)


def check_robot(
    name: str, spec: PolicySpec | None, system: System, found: Sequence[CheckResult], now_s: float
) -> list[CheckResult]:
    """Check that the robot file fits the policy, its buses, its cameras and their pictures.

    Args:
        name: as for ``run --robot``.
        spec: of the policy; without one only a robot file can be looked at.
        system: where facts come from.
        found: results of the machine's checks, which list the cameras.
        now_s: present time of the wall clock.
    """
    try:
        robot = _read(name, spec)
    except SpecError as e:
        return failed("robot", str(e), "correct the robot file, or name another --robot")
    results = passed("robot", f"{robot.name}: {robot.arm.kind} arm, {len(robot.cameras)} cameras")
    results += _check_serials(robot, found)
    findings = (*check_buses(robot, system), *check_pictures(robot, now_s))
    return [*results, *(replace(f, name=f"robot: {f.name}") for f in findings)]


def _read(name: str, spec: PolicySpec | None) -> RobotConfig:
    if spec is not None:
        return load_robot(name, spec)
    path = Path(name)
    if path.suffix != ".toml" and not path.exists():
        raise SpecError(f"robot {name!r}: without a bundle expected the path of a robot file")
    return read_robot_file(path)


def _check_serials(robot: RobotConfig, found: Sequence[CheckResult]) -> list[CheckResult]:
    attached = [r.name.removeprefix("camera ") for r in found if r.name.startswith("camera ")]
    results: list[CheckResult] = []
    for camera in robot.cameras:
        if camera.kind != "realsense":
            continue
        serial = camera.options.get("serial")
        title = f"robot: {camera.role}"
        if serial is None and len(robot.cameras) == 1:
            continue  # whichever camera is attached
        if serial is None:
            fix = "gwp-edge cameras --write makes a robot file that names it"
            results += failed(title, "the robot file names no serial", fix)
        elif str(serial) in attached:
            results += passed(title, f"camera {serial} is attached")
        else:
            have = ", ".join(attached) or "none"
            fix = "plug it in, or see who is who by gwp-edge cameras"
            results += failed(title, f"camera {serial} is not attached; there are: {have}", fix)
    return results
