"""``gwp-edge bench methods``: a real policy's success by execution method and injected latency."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gwp_edge.commands.closed_loop import (
    EngineChoice,
    check_outputs,
    make_report_context,
    open_policies,
    seconds_text,
)
from gwp_edge.commands.execution import find_execution
from gwp_edge.commands.options import BundleArgument, EngineOption, ProviderOption, ThreadsOption
from gwp_edge.console import (
    EXIT_INTERRUPTED,
    progress_bars,
    raise_on_signals,
    remark,
    say_table,
    write_json,
)

if TYPE_CHECKING:
    from gwp_edge.evaluation.evaluate import Evaluation
    from gwp_edge.evaluation.options import EpisodeOptions

SCHEMA = "gwp-edge/methods/2"
_METHODS = ("soft", "hard", "identity", "naive", "ensemble", "sync")
_LATENCIES_MS = (0.0, 100.0, 200.0, 400.0)


def methods(
    bundle: BundleArgument,
    task: Annotated[str, typer.Option("--task", help="What is done: touch.")] = "touch",
    episodes: Annotated[
        int, typer.Option("--episodes", min=1, help="Seeds for each instruction.")
    ] = 50,
    execution: Annotated[
        list[str] | None, typer.Option("--execution", help="Only this one; several times.")
    ] = None,
    latency_ms: Annotated[
        list[float] | None, typer.Option("--latency-ms", help="Only this one; several times.")
    ] = None,
    replan_hz: Annotated[
        float, typer.Option("--replan-hz", help="Chunks per second at most.")
    ] = 5.0,
    engine: EngineOption = "ort",
    provider: ProviderOption = "cpu",
    threads: ThreadsOption = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write the report to this file.")
    ] = None,
) -> None:
    """Compare ways of following chunks by how often a policy then does its task in the simulator.

    Time is simulated: results do not depend on how fast this machine is. The same seeds for all.

    Example: gwp-edge bench methods policy.gwp --episodes 50 --latency-ms 200 --json methods.json
    """
    import msgspec

    from gwp_edge.bundle import Bundle
    from gwp_edge.evaluation.episode import check_fits
    from gwp_edge.evaluation.evaluate import evaluate
    from gwp_edge.evaluation.tasks import find_task

    chosen = find_task(task)
    cells = _cells(execution or list(_METHODS), latency_ms or list(_LATENCIES_MS), replan_hz)
    opened = Bundle.open(bundle)
    check_fits(opened.spec, chosen)
    check_outputs(json_file)
    raise_on_signals(KeyboardInterrupt)  # a kill keeps the finished rows like Ctrl-C does
    choice = EngineChoice(engine=engine, provider=provider, threads=threads)
    document = {
        "schema": SCHEMA,
        "context": msgspec.to_builtins(make_report_context(opened, bundle, choice, None)),
        "task": task,
        "episodes": episodes,
        "replan_hz": replan_hz,
    }
    rows: list[dict[str, Any]] = []
    stage = "methods and latencies"
    with open_policies(bundle, chosen.instructions, choice) as policies, progress_bars() as report:
        for done, (name, options) in enumerate(cells):
            report(stage, done, len(cells))
            found = evaluate(name, policies, chosen, range(episodes), options)
            if len(found.results) < len(policies) * episodes:
                remark("interrupted; what follows is about the finished rows")
                break
            rows.append(_row(name, options, found))
            if json_file is not None:  # after every row: the whole table takes an hour
                write_json(json_file, {**document, "rows": rows})
        else:
            report(stage, len(cells), len(cells))
    _say(rows, episodes * len(chosen.instructions))
    if len(rows) < len(cells):
        raise typer.Exit(EXIT_INTERRUPTED)


def _cells(
    names: list[str], latencies_ms: list[float], replan_hz: float
) -> list[tuple[str, EpisodeOptions]]:
    from gwp_edge.evaluation.options import EpisodeOptions

    plans = [(name, find_execution(name)) for name in names]
    return [
        (
            name,
            EpisodeOptions(
                guidance=guidance,
                blend=blend,
                synchronous=synchronous,
                replan_hz=replan_hz,
                latency_ms=ms,
            ),
        )
        for ms in latencies_ms
        for name, (guidance, blend, synchronous) in plans
    ]


def _row(name: str, options: EpisodeOptions, found: Evaluation) -> dict[str, Any]:
    """Return a row of the report: summary of all episodes, and which failed and how."""
    failed: dict[str, dict[str, list[int]]] = {}
    for r in found.results:
        if r.outcome != "success":
            failed.setdefault(r.instruction, {}).setdefault(r.outcome, []).append(r.seed)
    summary = asdict(found.summaries()[-1])
    return {"method": name, "latency_ms": options.latency_ms, **summary, "failed_seeds": failed}


def _say(rows: list[dict[str, Any]], n: int) -> None:
    say_table(
        f"Success by execution method, {n} episodes each",
        ("latency ms", "method", "success (95 %)", "p50 s", "jerk rad/s3", "limited"),
        [
            (
                f"{row['latency_ms']:.0f}",
                row["method"],
                f"{100 * row['success_rate']:.0f} % ({100 * row['success_low']:.0f} to "
                f"{100 * row['success_high']:.0f})",
                seconds_text(row["time_to_success_p50_s"]),
                f"{row['jerk_rms_rad_s3']:.0f}",
                f"{100 * row['limited_share']:.0f} %",
            )
            for row in rows
        ],
    )
