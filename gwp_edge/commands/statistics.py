"""``gwp-edge stats``: normalisation statistics of datasets, as training computes them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from gwp_edge.commands.options import JsonFlag
from gwp_edge.console import progress_bars, require_writable, say, say_json, say_table
from gwp_edge.errors import BuildError, SpecError


def stats(
    datasets: Annotated[list[Path], typer.Argument(help="Roots of LeRobot v3.0 datasets; pooled.")],
    out: Annotated[Path, typer.Option("--out", help="File to write.")] = Path("norm_stats.json"),
    horizon: Annotated[int, typer.Option("--horizon", min=1, help="Rows of a chunk.")] = 48,
    width: Annotated[int, typer.Option("--width", min=1, help="Action width of the model.")] = 32,
    delta_mask: Annotated[
        str | None,
        typer.Option(
            "--delta-mask", help="1 for each delta channel, 0 for others, as 1111110; from names."
        ),
    ] = None,
    as_json: JsonFlag = False,
) -> None:
    """Compute norm_stats.json over one or several datasets, exactly as training does.

    Example: gwp-edge stats DATASET --out norm_stats.json
    """
    try:
        from gwp_edge.calibration.statistics import (
            compute_statistics,
            delta_mask_from_names,
            write_statistics,
        )
        from gwp_edge.lerobot.dataset import LeRobotDataset
    except ModuleNotFoundError as e:
        raise BuildError(
            f"stats needs {e.name}, which is not installed: pip install 'gwp-edge[export]'"
        ) from e
    mask = _mask(delta_mask)
    require_writable(out)
    with progress_bars() as bars:
        found = compute_statistics(
            datasets,
            n_rows=horizon,
            width=width,
            delta_mask=mask,
            progress=lambda done, total: bars("statistics", done, total),
        )
    write_statistics(out, found)
    opened = [LeRobotDataset.open(root) for root in datasets]
    names = opened[0].action_names
    mask = mask if mask is not None else delta_mask_from_names(names)
    groups = found["norm_stats"]
    if as_json:
        say_json(
            {
                "out": str(out),
                "datasets": [str(root) for root in datasets],
                "n_episodes": sum(d.n_episodes for d in opened),
                "n_frames": sum(d.n_frames for d in opened),
                "horizon": horizon,
                "width": width,
                "channels": list(names),
                "delta": list(mask),
                "norm_stats": groups,
            }
        )
        return
    state, action = groups["observation.state"], groups["action"]
    rows = [
        (
            names[i] if names else str(i),
            "delta" if is_delta else "absolute",
            *(f"{group[q][i]:+.4f}" for group in (state, action) for q in ("q01", "q99")),
        )
        for i, is_delta in enumerate(mask)
    ]
    head = ("channel", "action", "state q01", "state q99", "action q01", "action q99")
    say_table("Statistics", head, rows)
    say(
        f"{out}: {sum(d.n_episodes for d in opened)} episodes, "
        f"{sum(d.n_frames for d in opened)} frames, windows of {horizon} rows, width {width}"
    )


def _mask(text: str | None) -> tuple[bool, ...] | None:
    if text is None:
        return None
    if not text or set(text) - set("01"):
        raise SpecError(f"--delta-mask {text!r}: expected one 0 or 1 for each channel")
    return tuple(digit == "1" for digit in text)
