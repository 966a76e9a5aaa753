"""``gwp-edge bench methods``: a real policy's success by execution method and injected latency."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from gwp_edge.commands.execution import find_execution
from gwp_edge.commands.options import BundleArgument, EngineOption, ProviderOption, ThreadsOption
from gwp_edge.console import progress_bars, remark, say_table, write_json

SCHEMA = "gwp-edge/methods/1"
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
    from gwp_edge.bundle import Bundle
    from gwp_edge.evaluation.episode import ChunkPolicy, EpisodeOptions, check_fits
    from gwp_edge.evaluation.evaluate import evaluate
    from gwp_edge.evaluation.tasks import find_task
    from gwp_edge.policy import BundlePolicy, load

    chosen = find_task(task)
    names = execution or list(_METHODS)
    plans = [(name, find_execution(name)) for name in names]
    latencies_ms = latency_ms or list(_LATENCIES_MS)
    cells = [
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
    check_fits(Bundle.open(bundle).spec, chosen)
    opened: list[BundlePolicy] = []
    policies: dict[str, ChunkPolicy] = {}
    rows: list[dict[str, Any]] = []
    try:
        for instruction in chosen.instructions:
            policy = load(
                bundle, engine=engine, task=instruction, threads=threads, provider=provider
            )
            opened.append(policy)
            policies[instruction] = policy
        with progress_bars() as report:
            for done, (name, options) in enumerate(cells):
                report("methods and latencies", done, len(cells))
                found = evaluate(name, policies, chosen, range(episodes), options)
                if len(found.results) < len(policies) * episodes:
                    remark("interrupted; what follows is about the finished rows")
                    break
                summary = found.summaries()[-1]
                rows.append({"method": name, "latency_ms": options.latency_ms, **asdict(summary)})
            else:
                report("methods and latencies", len(cells), len(cells))
    finally:
        for policy in opened:
            policy.close()
        if json_file is not None and rows:
            document = {"schema": SCHEMA, "bundle": str(bundle), "task": task}
            write_json(
                json_file,
                {**document, "episodes": episodes, "replan_hz": replan_hz, "rows": rows},
            )
    _say(rows, episodes * len(policies))


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
                _seconds(row["time_to_success_p50_s"]),
                f"{row['jerk_rms_rad_s3']:.0f}",
                f"{100 * row['limited_share']:.0f} %",
            )
            for row in rows
        ],
    )


def _seconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"
