"""Draw loss curves of trainings, or success by execution method and latency.

    python examples/reach/plots.py losses losses.svg build/reach/policy build/reach/no-video
    python examples/reach/plots.py methods methods.svg methods.json

The second reads what ``gwp-edge bench methods --json`` wrote.
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl
import numpy as np
from arguments import file_to_write
from matplotlib.figure import Figure

from gwp_edge.errors import GwpError, SpecError
from gwp_edge.types import FloatArray

_WINDOW_STEPS = 50
_SIZE_INCH = (8.0, 4.2)


def losses(policies: Sequence[Path]) -> Figure:
    """Return the loss curves of trainings, smoothed over 50 steps.

    Raises:
        SpecError: a folder has no losses.csv of enough steps.
    """
    figure = Figure(figsize=_SIZE_INCH, layout="constrained")
    axes = figure.subplots()
    for policy in policies:
        path = policy / "losses.csv"
        if not path.is_file():
            raise SpecError(f"{path}: not there; give folders that train.py wrote")
        rows = _read_losses(path)
        if len(rows) < 2 * _WINDOW_STEPS:
            raise SpecError(f"{path}: {len(rows)} steps, too few for a curve")
        step = rows[_WINDOW_STEPS - 1 :, 0]
        window = np.full(_WINDOW_STEPS, 1.0 / _WINDOW_STEPS)
        for name, column in (("action", rows[:, 1]), ("video", rows[:, 2])):
            if column.any():
                smooth = np.convolve(column, window, mode="valid")
                axes.plot(step, smooth, label=f"{policy.name}: {name}", linewidth=1.2)
    axes.set(xlabel="step", ylabel="flow loss", yscale="log")
    axes.grid(visible=True, alpha=0.3)
    axes.legend()
    return figure


def _read_losses(path: Path) -> FloatArray:
    """Return step, action loss and video loss of every step, (n, 3)."""
    try:
        with path.open(newline="") as file:
            rows = np.array(list(csv.reader(file))[1:], float).reshape(-1, 3)
    except (ValueError, csv.Error) as e:
        raise SpecError(f"{path}: not what train.py wrote ({e})") from e
    return rows


def methods(report: Path) -> Figure:
    """Return success by method over latency, with 95 % intervals.

    Raises:
        SpecError: not a report of ``gwp-edge bench methods``.
    """
    try:
        document = json.loads(report.read_bytes())
        rows, n = document["rows"], document["rows"][0]["n"]
    except (OSError, ValueError, LookupError, TypeError) as e:
        raise SpecError(f"{report}: not a report of gwp-edge bench methods ({e})") from e
    figure = Figure(figsize=_SIZE_INCH, layout="constrained")
    axes = figure.subplots()
    names = list(dict.fromkeys(row["method"] for row in rows))
    for k, name in enumerate(names):
        mine = [row for row in rows if row["method"] == name]
        # Side by side, so that intervals can be told apart.
        at_ms = np.array([row["latency_ms"] for row in mine]) + 4.0 * (k - len(names) / 2)
        rate = np.array([row["success_rate"] for row in mine])
        below = rate - [row["success_low"] for row in mine]
        above = np.array([row["success_high"] for row in mine]) - rate
        bars = np.vstack((below, above)) * 100
        axes.errorbar(at_ms, rate * 100, yerr=bars, label=name, marker="o", capsize=2, linewidth=1)
    axes.set(
        xlabel="injected latency from observation to chunk, ms",
        ylabel=f"success, % of {n} episodes",
        ylim=(0, 102),
        xticks=sorted({row["latency_ms"] for row in rows}),
    )
    axes.grid(visible=True, alpha=0.3)
    axes.legend(ncols=3)
    return figure


def main(words: Sequence[str] | None = None) -> None:
    """Read the command line and draw."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("what", choices=("losses", "methods"))
    parser.add_argument("picture", type=file_to_write(".svg", ".png"), help="SVG or PNG to write")
    parser.add_argument("sources", type=Path, nargs="+", help="policy folders, or one JSON report")
    args = parser.parse_args(words)
    # The same picture again is the same file.
    mpl.rcParams["svg.hashsalt"] = "gwp-edge"
    metadata = {"Date": None} if args.picture.suffix == ".svg" else None
    try:
        figure = losses(args.sources) if args.what == "losses" else methods(args.sources[0])
        figure.savefig(args.picture, metadata=metadata)
    except (GwpError, OSError) as e:
        sys.exit(f"error: {e}")


if __name__ == "__main__":
    main()
