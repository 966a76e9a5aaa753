"""``gwp-edge doctor``: is this machine ready."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gwp_edge.commands.options import EngineOption, JsonFlag, ProviderOption
from gwp_edge.console import say, say_json, say_table

if TYPE_CHECKING:
    from gwp_edge.doctor import CheckResult, LocalSystem


def doctor(
    bundle: Annotated[
        Path | None,
        typer.Argument(help="Also check this bundle: hashes, engine, calibration, golden run."),
    ] = None,
    robot: Annotated[
        str | None,
        typer.Option("--robot", help="Also check what this robot or robot file hangs on."),
    ] = None,
    engine: EngineOption = "ort",
    provider: ProviderOption = "cpu",
    as_json: JsonFlag = False,
) -> None:
    """Check machine, bus and cameras, and what a run needs of bundle and robot; changes nothing.

    No arm is touched: its own checks are the preflight of a run. Exits with 1 when a check fails.

    Example: gwp-edge doctor policy.gwp --robot robot.toml
    """
    import dataclasses

    from gwp_edge.doctor import LocalSystem, run_checks, worst

    system = LocalSystem()
    results = run_checks(system)
    results += _of_a_run(bundle, robot, engine, provider, system, results)
    verdict = worst(results)
    if as_json:
        say_json({"verdict": verdict, "checks": [dataclasses.asdict(r) for r in results]})
    else:
        say_table("Doctor", ("check", "", "found"), [(r.name, r.status, r.detail) for r in results])
        for result in results:
            if result.fix:
                say(f"{result.name}: {result.fix}")
    if verdict == "fail":
        raise SystemExit(1)


def _of_a_run(
    bundle: Path | None,
    robot: str | None,
    engine: str,
    provider: str,
    system: LocalSystem,
    found: list[CheckResult],
) -> list[CheckResult]:
    import time

    from gwp_edge.doctor.bundle import check_bundle, check_robot
    from gwp_edge.manifest import read_spec

    results: list[CheckResult] = []
    spec = None
    if bundle is not None:
        results = check_bundle(bundle, engine=engine, provider=provider)
        if results[0].status == "pass":
            spec = read_spec(bundle)
    if robot is not None:
        results += check_robot(robot, spec, system, found, time.time())
    return results
