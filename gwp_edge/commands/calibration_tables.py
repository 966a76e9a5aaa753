"""What ``gwp-edge inspect`` shows of a calibration: samples, the search, the costliest parts."""

from __future__ import annotations

from gwp_edge.console import say, say_table
from gwp_edge.manifest import Calibration

_N_PARTS = 16


def say_calibration(calibration: Calibration | None) -> None:
    """Print how ranges were found and what the budget search measured."""
    if calibration is None:
        return
    episodes = sorted({sample.episode for sample in calibration.samples})
    shown = ", ".join(map(str, episodes[:12])) + (", ..." if len(episodes) > 12 else "")
    smoothed = ", factors folded" if calibration.is_smoothed else ""
    say(
        f"calibration  {calibration.n_samples} samples of {calibration.dataset}, episodes {shown}, "
        f"ranges by {calibration.observer}{smoothed}; record {calibration.record_sha256[:12]}"
    )
    if calibration.curve:
        say_table(
            "Budget search: p99 of the action error by share of weight bytes quantized",
            ("quantized", "joints mrad", "grippers mm"),
            [
                (f"{p.quantized_share:.0%}", _milli(p.joints_rad_p99), _milli(p.grippers_m_p99))
                for p in calibration.curve
            ],
        )
    if calibration.sensitivity:
        ranked = sorted(calibration.sensitivity, key=lambda c: -(c.joints_rad_p99 or 0.0))
        say_table(
            f"Parts that cost most, each quantized alone, {min(_N_PARTS, len(ranked))} of "
            f"{len(ranked)}",
            ("part", "joints mrad", "grippers mm", "saves MB", "GFLOP", "now"),
            [
                (
                    cost.name,
                    _milli(cost.joints_rad_p99),
                    _milli(cost.grippers_m_p99),
                    round(cost.saved_bytes / 1e6, 3),
                    round(cost.flops / 1e9, 3),
                    cost.format if cost.is_quantized else "high",
                )
                for cost in ranked[:_N_PARTS]
            ],
        )


def _milli(value: float | None) -> str:
    return "" if value is None else f"{value * 1e3:.3g}"
