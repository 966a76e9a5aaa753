"""Benchmarks of the run loop: how chunks follow each other, deadlines, faults for minutes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gwp_edge.commands.benching import bench
from gwp_edge.commands.methods import methods
from gwp_edge.commands.options import group_with_default
from gwp_edge.console import remark, require_writable, say, say_table, write_json

if TYPE_CHECKING:
    from gwp_edge.bench_soak import SoakReport


def execution(
    duration: Annotated[float, typer.Option("--duration", help="Simulated seconds.")] = 60.0,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of the toy policy's noise.")] = 0,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write the figures to this file.")
    ] = None,
) -> None:
    """Compare ways of following one chunk with the next, on a toy whose right answer is known.

    Example: gwp-edge bench execution --duration 60
    """
    from gwp_edge.bench_execution import compare

    require_writable(json_file)
    results = compare(duration_s=duration, seed=seed)
    say_table(
        f"Chunk execution, {duration:g} simulated s",
        (
            "latency ms",
            "method",
            "seam p95 mrad",
            "jerk rms rad/s3",
            "obstacles cleared %",
            "changes of mind",
            "age ms",
            "reaction ms",
        ),
        [
            (
                f"{r.latency_ms:.0f}",
                r.method,
                f"{r.seam_p95_mrad:.0f}",
                f"{r.jerk_rms_rad_s3:.0f}",
                f"{100 * r.cleared_share:.0f}",
                f"{r.changes_of_mind:.2f}",
                f"{r.age_mean_ms:.0f}",
                f"{r.reaction_p50_ms:.0f}",
            )
            for r in results
        ],
    )
    say("Simulated time: the figures are the same on every machine.")
    if json_file is not None:
        write_json(json_file, [result.to_dict() for result in results])


def loop(
    duration: Annotated[float, typer.Option("--duration", help="Seconds of motion.")] = 10.0,
    kills: Annotated[int, typer.Option("--kills", help="Motor processes to kill.")] = 100,
    realtime: Annotated[
        bool, typer.Option("--realtime/--no-realtime", help="Ask for SCHED_FIFO.")
    ] = True,
    check: Annotated[bool, typer.Option("--check", help="Fail when a budget is not kept.")] = False,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write the figures to this file.")
    ] = None,
) -> None:
    """Measure the motor loop beside a bare C loop, the guardian's answer to a kill, the driver.

    Two fake PiPER arms at 200 Hz while a policy process computes without a pause; no robot needed.

    Example: gwp-edge bench loop --duration 10 --json loop.json
    """
    from gwp_edge.bench_loop import measure_loop

    require_writable(json_file)
    report = measure_loop(duration_s=duration, n_kills=kills, realtime=realtime)
    bare = "bare C loop late" if report.bare_is_c else "bare Python loop late (no gcc)"
    say_table(
        f"Motor loop, {report.duration_s:g} s",
        ("what", "unit", "n", "p50", "p95", "p99", "max"),
        [
            (name, unit, d.n, *(round(v, 2) for v in (d.p50, d.p95, d.p99, d.max)))
            for name, unit, d in (
                ("motor loop late", "us", report.motor_late_us),
                (bare, "us", report.bare_late_us),
                ("motor tick, wake-up to sent", "us", report.busy_us),
                ("kill to hold on the bus", "ms", report.kill_to_hold_ms),
            )
        ]
        + [
            (name, "us", report.driver.n_ticks, *(round(v, 2) for v in values))
            for name, values in (
                ("driver tick: receive to send", report.driver.tick_us),
                ("its processor time", report.driver.cpu_us),
                ("the same again at once, few frames", report.driver.again_us),
                ("its part in C alone", report.driver.bare_us),
                ("driver tick, no policy beside it", report.driver_alone.tick_us),
            )
        ],
    )
    scheduling = "SCHED_FIFO" if report.realtime else "no real-time scheduling"
    say(
        f"p99 of the motor loop is {report.p99_ratio:.2f} times the bare loop's, {scheduling}; "
        f"{report.n_ticks} ticks, {report.n_missed} missed, {report.n_chunks} chunks"
    )
    for line in report.misses:
        remark(f"over budget: {line}")
    # After it was said: a full disk must not take the figures with it.
    if json_file is not None:
        write_json(json_file, report.to_dict())
    if check and report.misses:
        raise SystemExit(1)


def soak(
    minutes: Annotated[float, typer.Option("--minutes", help="How long, in all.")] = 30.0,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of faults, order and pauses.")] = 0,
    realtime: Annotated[
        bool, typer.Option("--realtime/--no-realtime", help="Ask for SCHED_FIFO.")
    ] = True,
    patience: Annotated[
        float, typer.Option("--patience", help="Seconds added to deadlines on a busy machine.")
    ] = 0.0,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write the report to this file.")
    ] = None,
) -> None:
    """Inject faults at random for minutes; fails on an unsafe command, a leak or a missing hold.

    Two fake PiPER arms judge every command at their end of the bus; no robot needed.

    Example: gwp-edge bench soak --minutes 30 --json soak.json
    """
    from gwp_edge.bench_soak import soak as run_soak

    require_writable(json_file)
    report = run_soak(
        duration_s=60.0 * minutes,
        seed=seed,
        realtime=realtime,
        patience_s=patience,
        progress=lambda name: remark(f"fault: {name}"),
    )
    _say_soak(report)
    if not report.passed:
        remark("gwp-edge: the soak failed; see the lines above")
    if json_file is not None:
        write_json(json_file, report.to_dict())
    if not report.passed:
        raise SystemExit(1)


def _say_soak(report: SoakReport) -> None:
    say_table(
        f"Faults, {report.duration_s / 60:.1f} min, seed {report.seed}",
        ("fault", "then", "n", "hold p50 ms", "hold max ms", "resume p50 s", "resume max s"),
        [
            (
                t.name,
                t.after,
                t.n,
                *(round(v) for v in (t.hold_ms.p50, t.hold_ms.max)),
                *(round(v, 1) for v in (t.resume_s.p50, t.resume_s.max)),
            )
            for t in report.faults
        ],
    )
    say_table(
        "Private memory",
        ("process", "MB in 10 min", "grown MB", "seen s", "lives", "peak MB"),
        [
            (
                m.role,
                "too short" if m.slope_mb_per_10min is None else f"{m.slope_mb_per_10min:.3f}",
                "too short" if m.grown_mb is None else f"{m.grown_mb:.2f}",
                round(m.observed_s),
                m.n_lives,
                round(m.peak_mb, 1),
            )
            for m in report.memory
        ],
    )
    for m in report.undecided:
        remark(
            f"memory: {m.role} grew by {m.grown_mb:.1f} MB, which may be a single step or a leak: "
            "give it 30 minutes to tell"
        )
    for text in report.unsafe:
        remark(f"UNSAFE: {text}")
    for text in report.problems:
        remark(f"problem: {text}")
    for text in report.unprovoked:
        remark(f"unprovoked: {text}")
    say(
        f"{report.n_runs} runs, {report.n_faults} faults, {report.n_commands} commands, "
        f"{report.n_unsafe} unsafe; fastest {report.worst_speed:.2f} and hardest "
        f"{report.worst_acceleration:.2f} of the limits; {len(report.problems)} problems, "
        f"{len(report.leaks)} leaks, {len(report.unprovoked)} unprovoked stops"
    )


app = typer.Typer(
    cls=group_with_default("engine"),
    help="Time the engine beside this machine's limits and the eager original; or the motor "
    "loop, or ways of following one chunk with the next. Options: gwp-edge bench engine --help"
    "\n\nExample: gwp-edge bench --size gwp05-wide4",
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("engine")(bench)
app.command("loop")(loop)
app.command("execution")(execution)
app.command("methods")(methods)
app.command("soak")(soak)
