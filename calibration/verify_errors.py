"""Errors of chunks in the robot's own units: by channel, by row, first rows apart."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from gwp_edge.calibration.verify_schema import (
    ChannelReport,
    Comparison,
    FlipReport,
    RowReport,
)
from gwp_edge.errors import SpecError
from gwp_edge.export.errors_measured import measure_error
from gwp_edge.manifest import ChannelError
from gwp_edge.spec import Channel, PolicySpec, Unit
from gwp_edge.types import FloatArray

# A plan is in use from its own latency until the next one lands: twice 200 ms, which is slow.
DEFAULT_REPLAN_NS = 400_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Ruler:
    """How chunks are compared.

    Attributes:
        channels: the D channels.
        n_first_rows: rows that are executed before the next chunk.
        thresholds_m: opening above which each gripper counts as open, by channel name.
    """

    channels: tuple[Channel, ...]
    n_first_rows: int
    thresholds_m: dict[str, float]


def make_ruler(
    spec: PolicySpec, *, n_first_rows: int | None = None, threshold_m: float | None = None
) -> Ruler:
    """Return how to compare chunks of a policy.

    Args:
        spec: channels, and statistics for the gripper thresholds (the middle of q01 and q99).
        n_first_rows: rows that one replan executes; those of 0.4 s by default.
        threshold_m: threshold of every gripper in place of the statistics'.

    Raises:
        SpecError: more first rows than a chunk has, or a threshold that is no number.
    """
    if n_first_rows is None:
        n_first_rows = min(max(1, round(DEFAULT_REPLAN_NS / spec.period_ns)), spec.n_rows)
    if not 1 <= n_first_rows <= spec.n_rows:
        raise SpecError(f"--first-rows: expected 1 to {spec.n_rows}, got {n_first_rows}")
    if threshold_m is not None and not np.isfinite(threshold_m):
        raise SpecError(f"--gripper-threshold: expected metres, got {threshold_m}")
    stats = spec.statistics
    return Ruler(
        channels=spec.channels,
        n_first_rows=n_first_rows,
        thresholds_m={
            c.name: (stats.action_q01[i] + stats.action_q99[i]) / 2
            if threshold_m is None
            else threshold_m
            for i, c in enumerate(spec.channels)
            if c.unit == "m"
        },
    )


def summarise(values: FloatArray) -> ChannelError:
    """Summarise magnitudes of any shape."""
    p50, p99 = np.percentile(values, [50, 99])
    return ChannelError(
        mean=float(values.mean()), p50=float(p50), p99=float(p99), max=float(values.max())
    )


def compare(
    actions: Sequence[FloatArray],
    expected: Sequence[FloatArray],
    ruler: Ruler,
    *,
    of: str,
    against: str,
) -> Comparison:
    """Compare chunks (H, D) with what they should be, sample by sample.

    Raises:
        SpecError: nothing to compare, or different numbers of chunks.
    """
    if not actions or len(actions) != len(expected):
        raise SpecError(f"cannot compare {len(actions)} chunks with {len(expected)}")
    first = slice(0, ruler.n_first_rows)
    inputs = f"{of} against {against}"
    given, wanted = np.stack(actions), np.stack(expected)
    difference = np.abs(given - wanted)
    return Comparison(
        of=of,
        against=against,
        all_rows=measure_error(actions, expected, ruler.channels, inputs),
        first_rows=measure_error(
            [a[first] for a in actions],
            [e[first] for e in expected],
            ruler.channels,
            f"{inputs}, first {ruler.n_first_rows} rows",
        ),
        channels=tuple(
            ChannelReport(
                name=channel.name,
                unit=channel.unit,
                all_rows=summarise(difference[:, :, i]),
                first_rows=summarise(difference[:, first, i]),
            )
            for i, channel in enumerate(ruler.channels)
        ),
        rows=tuple(
            RowReport(
                joints_rad=_row(difference, row, ruler.channels, "rad"),
                grippers_m=_row(difference, row, ruler.channels, "m"),
            )
            for row in range(difference.shape[1])
        ),
        worst=tuple(tuple(map(float, row)) for row in difference.max(axis=0)),
        flips=_flips(given, wanted, ruler),
    )


def _row(
    difference: FloatArray, row: int, channels: Sequence[Channel], unit: Unit
) -> ChannelError | None:
    columns = [i for i, channel in enumerate(channels) if channel.unit == unit]
    return summarise(difference[:, row, columns]) if columns else None


def _flips(given: FloatArray, wanted: FloatArray, ruler: Ruler) -> tuple[FlipReport, ...]:
    reports = []
    for i, channel in enumerate(ruler.channels):
        if channel.name not in ruler.thresholds_m:
            continue
        threshold = ruler.thresholds_m[channel.name]
        differs: npt.NDArray[np.bool_] = (given[:, :, i] > threshold) != (
            wanted[:, :, i] > threshold
        )
        first = differs[:, : ruler.n_first_rows]
        reports.append(
            FlipReport(
                name=channel.name,
                threshold_m=threshold,
                all_rows=int(differs.sum()),
                n_all_rows=int(differs.size),
                first_rows=int(first.sum()),
                n_first_rows=int(first.size),
            )
        )
    return tuple(reports)
