"""``gwp-edge run``: the robot."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gwp_edge.commands.execution import (
    ADVISORY_IN_SIMULATION,
    ExecutionOption,
    LeadOption,
    WarmStartOption,
    find_execution,
    find_skipped,
    lead_ns_of,
)
from gwp_edge.commands.options import (
    DriverOption,
    EngineOption,
    ProviderOption,
    RerunOption,
    TaskOption,
    ThreadsOption,
)
from gwp_edge.console import remark, require_writable, say, say_table, write_json
from gwp_edge.errors import SpecError

if TYPE_CHECKING:
    from gwp_edge.run_options import RunOptions, RunStatus
    from gwp_edge.telemetry import Distribution, RunSummary


def run(
    bundle: Annotated[Path, typer.Argument(help="Bundle folder.")] = Path("policy.gwp"),
    robot: Annotated[
        str,
        typer.Option(
            "--robot", help="sim, piper, piper-dual, kinematic, lerobot:TYPE, or a robot file."
        ),
    ] = ...,  # type: ignore[assignment]  # typer's way to ask for a value
    driver: DriverOption = None,
    task: TaskOption = None,
    duration: Annotated[
        float | None, typer.Option("--duration", help="Seconds of motion; until Ctrl-C otherwise.")
    ] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write the summary to this file.")
    ] = None,
    engine: EngineOption = "ort",
    provider: ProviderOption = "cpu",
    threads: ThreadsOption = None,
    execution: ExecutionOption = "soft",
    replan_hz: Annotated[
        float | None, typer.Option("--replan-hz", help="Chunks per second at most.")
    ] = None,
    lead_ms: LeadOption = 0.0,
    motor_hz: Annotated[float, typer.Option("--motor-hz", help="Motor loop rate.")] = 200.0,
    warm_start: WarmStartOption = 1.0,
    seed: Annotated[int | None, typer.Option("--seed", min=0, help="Of the noise.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Everything but sending.")] = False,
    realtime: Annotated[
        bool, typer.Option("--realtime/--no-realtime", help="Ask for real-time priority.")
    ] = True,
    motor_cpu: Annotated[
        int | None,
        typer.Option("--motor-cpu", min=0, help="Core for the motor loop alone; see jetson.md."),
    ] = None,
    record: Annotated[
        Path | None,
        typer.Option("--record", help="Record everything to this new folder; see replay."),
    ] = None,
    rerun: RerunOption = None,
    skip_check: Annotated[
        list[str] | None,
        typer.Option("--skip-check", help="Go on although this preflight check fails."),
    ] = None,
) -> None:
    """Run a policy on a robot until the duration, Ctrl-C or a fault ends it.

    Space holds, enter resumes, q parks and quits. However it ends, the arm is left holding.

    Example: gwp-edge run policy.gwp --robot sim --duration 10
    """
    from gwp_edge.chunking import Guidance
    from gwp_edge.manifest import read_spec
    from gwp_edge.motor import MotorOptions
    from gwp_edge.policy_options import PolicyOptions
    from gwp_edge.robots import load_robot, require_serials
    from gwp_edge.run_options import RunOptions

    require_writable(json_file)
    if motor_cpu is not None:
        _check_core(motor_cpu)
    method, blend, synchronous = find_execution(execution)
    lead_ns = lead_ns_of(lead_ms)
    skipped = find_skipped(skip_check)
    spec = read_spec(bundle)
    if task is not None and task not in spec.tasks:
        known = ", ".join(repr(name) for name in spec.tasks)
        raise SpecError(f"--task {task!r} is not in this bundle; it has {known}")
    config = load_robot(robot, spec, driver=driver)
    require_serials(config)
    simulated = config.is_simulated
    if simulated:
        # Nobody stands next to a simulated arm, and an untrained policy is a fair thing to try.
        skipped |= ADVISORY_IN_SIMULATION
    options = RunOptions(
        spec=spec,
        robot=config,
        policy=PolicyOptions(
            factory="gwp_edge.policy:load",
            kwargs={
                "path": str(bundle),
                "engine": engine,
                "task": task,
                "threads": threads,
                "provider": provider,
                "seed": seed,
                # The preflight runs it, so that its result is one of the lines.
                "check_golden": False,
            },
            guidance=Guidance(method=method, warm_start_sigma=warm_start),
            replan_hz=replan_hz,
            synchronous=synchronous,
        ),
        motor=MotorOptions(
            rate_hz=motor_hz,
            lead_ns=lead_ns,
            blend=blend,
            synchronous=synchronous,
            dry_run=dry_run,
            refuse_far=not simulated,
            realtime=realtime,
            cpu=motor_cpu,
        ),
        record=record,
        duration_s=duration,
        skip_checks=skipped,
    )
    _run(options, json_file, rerun)


def _check_core(core: int) -> None:
    """Check that this process may move to a core; isolated ones are not among those it is given."""
    before = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {core})
    except OSError as e:
        raise SpecError(
            f"--motor-cpu {core}: no program may use this core ({e.strerror}); "
            "see /sys/devices/system/cpu/online"
        ) from e
    os.sched_setaffinity(0, before)


def _run(options: RunOptions, json_file: Path | None, rerun: str | None) -> None:
    from gwp_edge.operator_input import TerminalKeys
    from gwp_edge.runtime import run as run_robot

    viewer = None
    if rerun is not None and options.record is not None:
        raise SpecError(
            "--record and --rerun both take every plan as it is made, and one alone can: record, "
            "and look at the session with gwp-edge replay, or leave --record away"
        )
    if rerun is not None:
        from gwp_edge.profiling.rerun_log import RerunLogger

        viewer = RerunLogger(rerun, options.spec)
        policy = dataclasses.replace(options.policy, tap=viewer.tap_name)
        options = dataclasses.replace(options, policy=policy)
    with TerminalKeys() as keys:
        options = dataclasses.replace(options, interactive=keys.available)
        summary = run_robot(options, on_status=_Display(), keys=keys, watcher=viewer)
    _say_summary(summary)
    for problem in viewer.problems if viewer is not None else ():
        remark(f"fault: {problem}")
    if summary.exit_code:
        remark(f"gwp-edge: {summary.message}")
    else:
        say(summary.message)
    # After it was said: a full disk must not take with it how the arm was left.
    if json_file is not None:
        write_json(json_file, summary.to_dict())
    if summary.exit_code:
        raise SystemExit(summary.exit_code)


class _Display:
    """Prints what changes. Threads: one owner."""

    def __init__(self) -> None:
        self._last = ""

    def __call__(self, status: RunStatus) -> None:
        for event in status.events:
            remark(f"{status.run_s:7.2f} s  {event.text}")
        line = status.mode.name
        if line != self._last:
            remark(f"{status.run_s:7.2f} s  {line}")
            self._last = line


def _row(name: str, unit: str, d: Distribution | None) -> list[tuple[Any, ...]]:
    if d is None or d.n == 0:
        return []
    return [(name, unit, d.n, *(round(v, 3) for v in (d.p50, d.p95, d.p99, d.max)))]


def _say_summary(summary: RunSummary) -> None:
    if summary.checks:
        failed = "FAIL" if summary.outcome == "refused" else "ignored"
        say_table(
            "Preflight",
            ("check", "", "detail"),
            [(c.name, "pass" if c.passed else failed, c.detail) for c in summary.checks],
        )
    rows: list[tuple[Any, ...]] = []
    for stage, latency in summary.latency_ms.items():
        rows += _row(stage, "ms", latency)
    for name, unit, values in (
        ("frame age", "ms", summary.frame_age_ms),
        ("feedback age", "ms", summary.feedback_age_ms),
        ("plan age", "ms", summary.chunk_age_ms),
        ("motor wake-up late", "us", summary.lateness_us),
        ("motor tick busy", "us", summary.busy_us),
    ):
        rows += _row(name, unit, values)
    if rows:
        say_table("Times", ("what", "unit", "n", "p50", "p95", "p99", "max"), rows)
    say(
        f"{summary.n_chunks} chunks, {summary.n_ticks} ticks, {summary.n_missed_ticks} missed, "
        f"{summary.n_stale_observations} stale observations, {summary.n_holds} holds"
    )
    acted = {
        channel: {kind: n for kind, n in kinds.items() if n}
        for channel, kinds in summary.interventions.items()
        if any(kinds.values())
    }
    for channel, kinds in acted.items():
        say(f"limited {channel}: " + ", ".join(f"{kind} {n}" for kind, n in kinds.items()))
    for name, health in summary.cameras.items():
        say(f"camera {name}: {health}")
    for fault in summary.faults:
        remark(f"fault: {fault}")
