"""``gwp-edge profile``: where every millisecond goes, and whether it got better."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gwp_edge.commands.options import (
    EngineOption,
    JsonFlag,
    ProviderOption,
    TaskOption,
    ThreadsOption,
    group_with_default,
)
from gwp_edge.commands.profiling_tables import say_report
from gwp_edge.console import (
    EXIT_FAILED,
    progress_bars,
    remark,
    say_json,
    say_table,
    write_file,
    write_json,
)
from gwp_edge.errors import SpecError

if TYPE_CHECKING:
    from gwp_edge.profiling.collect import Raw
    from gwp_edge.profiling.disturb import Disturbances
    from gwp_edge.profiling.run import ProfileOptions
    from gwp_edge.profiling.schema import ProfileReport
    from gwp_edge.run_options import RunOptions, RunStatus
    from gwp_edge.spec import PolicySpec

_ADVISORY_IN_SIMULATION = frozenset({"statistics", "first action"})


app = typer.Typer(
    cls=group_with_default("run"),
    help="Measure where every millisecond goes on this robot, or with the engine alone. "
    "Options: gwp-edge profile run --help\n\n"
    "Example: gwp-edge profile policy.gwp --robot sim --duration 30 --html profile.html",
    no_args_is_help=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.command("run")
def profile(
    bundle: Annotated[Path, typer.Argument(help="Bundle folder.")] = Path("policy.gwp"),
    robot: Annotated[
        str | None,
        typer.Option("--robot", help="As for run; without, the engine alone is measured."),
    ] = None,
    task: TaskOption = None,
    duration: Annotated[
        float, typer.Option("--duration", help="Seconds to measure, after the warm-up.")
    ] = 30.0,
    warmup: Annotated[
        float, typer.Option("--warmup", help="Seconds at the beginning that are kept apart.")
    ] = 1.0,
    repeat: Annotated[int, typer.Option("--repeat", min=1, help="Times to do it all.")] = 1,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the report.")] = None,
    html: Annotated[Path | None, typer.Option("--html", help="Write a page with plots.")] = None,
    trace: Annotated[
        Path | None, typer.Option("--trace", help="Write a trace for ui.perfetto.dev.")
    ] = None,
    engine: EngineOption = "ort",
    provider: ProviderOption = "cpu",
    threads: ThreadsOption = None,
    replan_hz: Annotated[
        float | None, typer.Option("--replan-hz", help="Chunks per second at most.")
    ] = None,
    motor_hz: Annotated[float, typer.Option("--motor-hz", help="Motor loop rate.")] = 200.0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Everything but sending.")] = False,
    realtime: Annotated[
        bool, typer.Option("--realtime/--no-realtime", help="Ask for real-time priority.")
    ] = True,
    roofline: Annotated[
        bool,
        typer.Option(
            "--roofline/--no-roofline",
            help="Measure this machine's limits before (about 10 s, kept for the next time).",
        ),
    ] = True,
    system: Annotated[
        bool, typer.Option("--system/--no-system", help="Follow load, clocks, memory, heat.")
    ] = True,
    disturb: Annotated[
        list[str] | None,
        typer.Option(
            "--disturb",
            help="For simulated robots: prefill=40ms, denoise=5ms@10%, drop=10%, bus=3ms@5%, "
            "stall=20ms/1s, cpu=2; several times.",
        ),
    ] = None,
    skip_check: Annotated[
        list[str] | None,
        typer.Option("--skip-check", help="Go on although this preflight check fails."),
    ] = None,
) -> None:
    """Measure every stage from frame to motor, on a robot or with the engine alone.

    Example: gwp-edge profile policy.gwp --robot sim --duration 30 --html profile.html
    """
    from gwp_edge.bundle import read_spec
    from gwp_edge.profiling.disturb import parse_disturbances
    from gwp_edge.profiling.run import ProfileOptions

    spec = read_spec(bundle)
    if task is not None and task not in spec.tasks:
        known = ", ".join(repr(name) for name in spec.tasks)
        raise SpecError(f"--task {task!r} is not in this bundle; it has {known}")
    for path in (json_file, html, trace):
        if path is not None and not path.resolve().parent.is_dir():
            raise SpecError(f"{path}: folder {path.resolve().parent} does not exist")
    disturbances: Disturbances = parse_disturbances(disturb or ())
    options = ProfileOptions(
        duration_s=duration,
        warmup_s=warmup,
        repeat=repeat,
        sample_system=system,
        limits=roofline,
        disturbances=disturbances,
    )
    exit_code = 0
    if robot is None:
        report, raws = _engine_alone(bundle, options, engine, provider, threads, task)
    else:
        run_options = _run_options(
            bundle,
            spec,
            robot,
            {"engine": engine, "task": task, "threads": threads, "provider": provider},
            replan_hz=replan_hz,
            motor_hz=motor_hz,
            dry_run=dry_run,
            realtime=realtime,
            skipped=frozenset(skip_check or ()),
        )
        report, raws, exit_code = _on_robot(run_options, options)
    _write(report, raws, spec, json_file, html, trace)
    say_report(report)
    if exit_code:
        raise typer.Exit(exit_code)


def _engine_alone(
    bundle: Path,
    options: ProfileOptions,
    engine: str,
    provider: str,
    threads: int | None,
    task: str | None,
) -> tuple[ProfileReport, list[Raw]]:
    from gwp_edge.profiling.run import profile_engine

    with progress_bars() as bars:
        return profile_engine(
            str(bundle),
            options,
            engine=engine,
            provider=provider,
            threads=threads,
            task=task,
            progress=bars,
        )


def _run_options(
    bundle: Path,
    spec: PolicySpec,
    robot: str,
    kwargs: dict[str, object],
    *,
    replan_hz: float | None,
    motor_hz: float,
    dry_run: bool,
    realtime: bool,
    skipped: frozenset[str],
) -> RunOptions:
    from gwp_edge.motor_options import MotorOptions
    from gwp_edge.policy_process import PolicyOptions
    from gwp_edge.robots import load_robot
    from gwp_edge.run_options import RunOptions

    config = load_robot(robot, spec)
    if config.is_simulated:
        # Nobody stands next to a simulated arm, and an untrained policy is a fair thing to try.
        skipped |= _ADVISORY_IN_SIMULATION
    return RunOptions(
        spec=spec,
        robot=config,
        policy=PolicyOptions(
            factory="gwp_edge.policy:load",
            kwargs={"path": str(bundle), **kwargs, "seed": None, "check_golden": False},
            replan_hz=replan_hz,
        ),
        motor=MotorOptions(
            rate_hz=motor_hz,
            dry_run=dry_run,
            refuse_far=not config.is_simulated,
            realtime=realtime,
        ),
        skip_checks=skipped,
    )


def _on_robot(
    run_options: RunOptions, options: ProfileOptions
) -> tuple[ProfileReport, list[Raw], int]:
    from gwp_edge.operator_input import TerminalKeys
    from gwp_edge.profiling.run import profile_robot

    with TerminalKeys() as keys, _Live() as live:
        run_options = dataclasses.replace(run_options, interactive=keys.available)
        report, summary, raws = profile_robot(run_options, options, on_status=live, keys=keys)
    for fault in summary.faults:
        remark(f"fault: {fault}")
    remark(f"gwp-edge: {summary.message}" if summary.exit_code else summary.message)
    return report, raws, summary.exit_code


class _Live:
    """One line on stderr that follows the run. Threads: one owner."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.status import Status

        self._status = Status("starting", console=Console(stderr=True))

    def __enter__(self) -> _Live:
        self._status.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._status.stop()

    def __call__(self, status: RunStatus) -> None:
        for event in status.events:
            self._status.console.print(f"{status.run_s:7.2f} s  {event.text}", highlight=False)
        self._status.update(
            f"{status.run_s:6.1f} s  {status.mode.name}  {status.n_chunks} chunks  "
            f"{status.n_ticks} ticks  {status.n_missed} missed"
        )


def _write(
    report: ProfileReport,
    raws: list[Raw],
    spec: PolicySpec,
    json_file: Path | None,
    html: Path | None,
    trace: Path | None,
) -> None:
    import msgspec

    if json_file is not None:
        text = msgspec.json.format(msgspec.json.encode(report), indent=1) + b"\n"
        write_file(json_file, lambda file: file.write(text))
    if html is not None:
        from gwp_edge.profiling.html_report import to_html

        page = to_html(report).encode()
        write_file(html, lambda file: file.write(page))
    if trace is not None:
        from gwp_edge.profiling.trace import to_trace

        write_json(trace, to_trace(raws[-1], spec, report.context))


@app.command("compare")
def compare(
    before: Annotated[Path, typer.Argument(help="JSON of a profile.")],
    after: Annotated[Path, typer.Argument(help="JSON of the other.")],
    fail_on: Annotated[
        list[str] | None,
        typer.Option(
            "--fail-on",
            help="Exit with 1 when this got slower: p99=5%, prefill:p50=3%; several times.",
        ),
    ] = None,
    as_json: JsonFlag = False,
) -> None:
    """Compare two profiles, with 95 % confidence intervals.

    Example: gwp-edge profile compare before.json after.json --fail-on p99=5%
    """
    from gwp_edge.profiling import compare as comparing

    gates = [comparing.parse_gate(text) for text in fail_on or ()]
    reports = [comparing.read_report(path) for path in (before, after)]
    others = comparing.differs_in(*reports)
    differences = comparing.compare(*reports)
    failed = comparing.failed_gates(gates, differences, comparing.main_quantity(reports[1]))
    if as_json:
        say_json(
            {
                "differences": [dataclasses.asdict(d) for d in differences],
                "context": others,
                "failed": failed,
            }
        )
    else:
        rows = [
            (
                d.quantity,
                d.statistic,
                f"{d.before_ms:.2f}",
                f"{d.after_ms:.2f}",
                f"{d.change_percent:+.1f} %",
                f"{d.low_percent:+.1f} to {d.high_percent:+.1f}",
                d.verdict,
            )
            for d in differences
            if d.statistic in ("p50", "p99")
        ]
        head = ("stage", "", "before ms", "after ms", "change", "95 %", "")
        say_table("Profiles compared", head, rows)
        for line in others:
            remark(f"differs as well: {line}")
    for line in failed:
        remark(f"gwp-edge: {line}")
    if failed:
        raise typer.Exit(EXIT_FAILED)
