"""``gwp-edge profile compare``: did it get slower?"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import typer

from gwp_edge.commands.options import JsonFlag
from gwp_edge.console import EXIT_FAILED, remark, say_json, say_table


def compare(
    before: Annotated[Path, typer.Argument(help="JSON of a profile or bench.")],
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
    """Compare two reports of profile or bench, with confidence intervals.

    A verdict needs three runs on either side (profile --repeat 3), and is given for what --fail-on
    names, else for the p50 and p99 of frame to command.

    Example: gwp-edge profile compare before.json after.json --fail-on p99=5%
    """
    from gwp_edge.profiling import compare as comparing
    from gwp_edge.profiling.reports import differs_in, read_report

    gates = [comparing.parse_gate(text) for text in fail_on or ()]
    reports = [read_report(path) for path in (before, after)]
    others = differs_in(*reports)
    differences = comparing.compare(*reports, gates=gates)
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
                f"{d.low_percent:+.1f} to {d.high_percent:+.1f} ({d.level_percent:g} %)",
                "" if d.verdict == "not judged" else d.verdict,
            )
            for d in differences
            if d.statistic in ("p50", "p99") or d.verdict != "not judged"
        ]
        head = ("stage", "", "before ms", "after ms", "change", "interval", "verdict")
        say_table("Reports compared", head, rows)
        for line in others:
            remark(f"differs as well: {line}")
    for line in failed:
        remark(f"gwp-edge: {line}")
    if failed:
        raise typer.Exit(EXIT_FAILED)
