"""Benchmarks of the run loop: how chunks follow each other, deadlines, faults for minutes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from gwp_edge.console import say, say_table, write_json


def execution(
    duration: Annotated[float, typer.Option("--duration", help="Simulated seconds.")] = 60.0,
    seed: Annotated[int, typer.Option("--seed", help="Of the toy policy's noise.")] = 0,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write the figures to this file.")
    ] = None,
) -> None:
    """Compare ways of following one chunk with the next, on a toy whose right answer is known.

    Example: gwp-edge bench execution --duration 60
    """
    from gwp_edge.bench_execution import compare

    results = compare(duration_s=duration, seed=seed)
    if json_file is not None:
        write_json(json_file, [result.to_dict() for result in results])
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
