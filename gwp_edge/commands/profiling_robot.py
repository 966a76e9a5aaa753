"""``gwp-edge profile --robot``: the run that is measured, and what is shown meanwhile."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from gwp_edge.commands.execution import ADVISORY_IN_SIMULATION, find_execution, lead_ns_of
from gwp_edge.commands.live_view import LiveView
from gwp_edge.console import remark

if TYPE_CHECKING:
    from gwp_edge.profiling.raw import Raw
    from gwp_edge.profiling.run import ProfileOptions
    from gwp_edge.profiling.schema import ProfileReport
    from gwp_edge.run_options import RunOptions
    from gwp_edge.spec import PolicySpec


@dataclass(frozen=True, slots=True, kw_only=True)
class RobotRun:
    """What the command line asks of the robot; names as its options."""

    bundle: Path
    robot: str
    policy: dict[str, object]
    execution: str
    lead_ms: float
    warm_start: float
    replan_hz: float | None
    motor_hz: float
    dry_run: bool
    realtime: bool
    skipped: frozenset[str]
    rerun: str | None


def profile_on_robot(
    given: RobotRun, spec: PolicySpec, options: ProfileOptions
) -> tuple[ProfileReport, list[Raw], int]:
    """Run and measure; return report, what was collected, and the run's exit code."""
    from gwp_edge.operator_input import TerminalKeys
    from gwp_edge.profiling.run import profile_robot

    run_options = _run_options(given, spec)
    logger = None
    if given.rerun is not None:
        from gwp_edge.profiling.rerun_log import RerunLogger

        logger = RerunLogger(given.rerun, spec)
        policy = dataclasses.replace(run_options.policy, tap=logger.tap_name)
        run_options = dataclasses.replace(run_options, policy=policy)
    with TerminalKeys() as keys, LiveView() as view:
        run_options = dataclasses.replace(run_options, interactive=keys.available)
        report, summary, raws = profile_robot(
            run_options,
            options,
            on_status=view,
            keys=keys,
            progress=view.progress,
            on_live=view.take,
            watchers=() if logger is None else (logger,),
            watched_by=() if logger is None else ("rerun",),
            execution=given.execution,
        )
    for fault in (*summary.faults, *(logger.problems if logger is not None else ())):
        remark(f"fault: {fault}")
    remark(f"gwp-edge: {summary.message}" if summary.exit_code else summary.message)
    return report, raws, summary.exit_code


def _run_options(given: RobotRun, spec: PolicySpec) -> RunOptions:
    from gwp_edge.chunking import Guidance
    from gwp_edge.motor_options import MotorOptions
    from gwp_edge.policy_options import PolicyOptions
    from gwp_edge.robots import load_robot
    from gwp_edge.run_options import RunOptions

    method, blend, synchronous = find_execution(given.execution)
    config = load_robot(given.robot, spec)
    skipped = given.skipped
    if config.is_simulated:
        # Nobody stands next to a simulated arm, and an untrained policy is a fair thing to try.
        skipped |= ADVISORY_IN_SIMULATION
    return RunOptions(
        spec=spec,
        robot=config,
        policy=PolicyOptions(
            factory="gwp_edge.policy:load",
            kwargs={
                "path": str(given.bundle),
                **given.policy,
                "seed": None,
                # The preflight runs it, so that its result is one of the lines.
                "check_golden": False,
            },
            guidance=Guidance(method=method, warm_start_sigma=given.warm_start),
            replan_hz=given.replan_hz,
            synchronous=synchronous,
        ),
        motor=MotorOptions(
            rate_hz=given.motor_hz,
            lead_ns=lead_ns_of(given.lead_ms),
            blend=blend,
            synchronous=synchronous,
            dry_run=given.dry_run,
            refuse_far=not config.is_simulated,
            realtime=given.realtime,
        ),
        skip_checks=skipped,
    )
