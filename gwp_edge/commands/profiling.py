"""``gwp-edge profile``: where every millisecond goes, and whether it got better."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gwp_edge.commands.comparing import compare
from gwp_edge.commands.execution import (
    ExecutionOption,
    LeadOption,
    WarmStartOption,
    find_skipped,
)
from gwp_edge.commands.live_view import LiveView
from gwp_edge.commands.options import (
    EngineOption,
    ProviderOption,
    RerunOption,
    TaskOption,
    ThreadsOption,
    group_with_default,
)
from gwp_edge.commands.profiling_robot import RobotRun, profile_on_robot
from gwp_edge.commands.profiling_tables import say_report
from gwp_edge.console import remark, require_writable, write_file, write_json
from gwp_edge.errors import SpecError

if TYPE_CHECKING:
    from gwp_edge.profiling.disturb import Disturbances
    from gwp_edge.profiling.raw import Raw
    from gwp_edge.profiling.run import ProfileOptions
    from gwp_edge.profiling.schema import ProfileReport
    from gwp_edge.spec import PolicySpec

app = typer.Typer(
    cls=group_with_default("run"),
    help="Measure where every millisecond goes on this robot, or with the engine alone. "
    "Options: gwp-edge profile run --help\n\n"
    "Example: gwp-edge profile policy.gwp --robot sim --duration 30 --html profile.html",
    no_args_is_help=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


# What is asked of a robot means nothing to the engine alone.
_OF_ROBOT = (
    "replan_hz",
    "motor_hz",
    "dry_run",
    "realtime",
    "execution",
    "lead_ms",
    "warm_start",
    "rerun",
    "skip_check",
)


@app.command("run")
def profile(
    context: typer.Context,
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
    execution: ExecutionOption = "soft",
    lead_ms: LeadOption = 0.0,
    warm_start: WarmStartOption = 1.0,
    rerun: RerunOption = None,
    roofline: Annotated[
        bool,
        typer.Option(
            "--roofline/--no-roofline",
            help="Measure this machine's limits before (about 10 s, kept for the next time).",
        ),
    ] = True,
    remeasure: Annotated[
        bool, typer.Option("--remeasure", help="Measure them although they are kept.")
    ] = False,
    system: Annotated[
        bool, typer.Option("--system/--no-system", help="Follow load, clocks, memory, heat.")
    ] = True,
    disturb: Annotated[
        list[str] | None,
        typer.Option(
            "--disturb",
            help="For simulated robots: a stage as prefill=40ms, denoise=5+-2ms@10%, "
            "transport=20ms, observe=5ms, drop=10%, bus=3ms@5%, stall=20ms/1s, cpu=2, mem=2; "
            "several times.",
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
    from gwp_edge.manifest import read_spec
    from gwp_edge.profiling.disturb import parse_disturbances
    from gwp_edge.profiling.run import ProfileOptions

    spec = read_spec(bundle)
    if task is not None and task not in spec.tasks:
        known = ", ".join(repr(name) for name in spec.tasks)
        raise SpecError(f"--task {task!r} is not in this bundle; it has {known}")
    require_writable(json_file, html, trace)
    if robot is None:
        _refuse_robot_options(context)
    disturbances: Disturbances = parse_disturbances(disturb or ())
    options = ProfileOptions(
        duration_s=duration,
        warmup_s=warmup,
        repeat=repeat,
        sample_system=system,
        limits=roofline,
        remeasure=remeasure,
        disturbances=disturbances,
    )
    exit_code = 0
    if robot is None:
        report, raws = _engine_alone(bundle, options, engine, provider, threads, task)
    else:
        given = RobotRun(
            bundle=bundle,
            robot=robot,
            policy={"engine": engine, "task": task, "threads": threads, "provider": provider},
            execution=execution,
            lead_ms=lead_ms,
            warm_start=warm_start,
            replan_hz=replan_hz,
            motor_hz=motor_hz,
            dry_run=dry_run,
            realtime=realtime,
            skipped=find_skipped(skip_check),
            rerun=rerun,
        )
        report, raws, exit_code = profile_on_robot(given, spec, options)
    # Said first: a full disk must not take the figures with it.
    say_report(report)
    _write(report, raws, spec, json_file, html, trace)
    if exit_code:
        raise typer.Exit(exit_code)


def _refuse_robot_options(context: typer.Context) -> None:
    """Refuse what would be ignored.

    Raises:
        SpecError: an option concerns a robot, and there is none.
    """
    for parameter in context.command.params:
        name = str(parameter.name)
        source = context.get_parameter_source(name)
        if name in _OF_ROBOT and source is not None and source.name == "COMMANDLINE":
            raise SpecError(f"{parameter.opts[0]} concerns a robot: add --robot")


def _engine_alone(
    bundle: Path,
    options: ProfileOptions,
    engine: str,
    provider: str,
    threads: int | None,
    task: str | None,
) -> tuple[ProfileReport, list[Raw]]:
    from gwp_edge.profiling.run import profile_engine

    with LiveView(draw_taken=True) as view:
        return profile_engine(
            str(bundle),
            options,
            engine=engine,
            provider=provider,
            threads=threads,
            task=task,
            progress=view.progress,
            on_live=view.take,
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

        last = len(raws) - 1
        if last:
            remark(f"{trace}: holds the last of {len(raws)} runs")
        write_json(trace, to_trace(raws[last], spec, report.context, run=last, n_runs=len(raws)))


app.command("compare")(compare)
