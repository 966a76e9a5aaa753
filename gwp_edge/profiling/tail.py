"""Where the slowest chunks lose their time, and whom that blames."""

from __future__ import annotations

from typing import Final

import numpy as np

from gwp_edge.profiling.chunks import ChunkTable
from gwp_edge.profiling.columns import GROUPS, PREDICTION, SEGMENTS
from gwp_edge.profiling.schema import TailReport, Verdict
from gwp_edge.types import FloatArray

_MIN_FOR_TAIL: Final = 30
# A tail this much over the median is not worth a sentence.
_TAIL_MATTERS: Final = 0.15
_CLEAR_SHARE: Final = 0.5
# A process that computes for longer takes about as much more processor time.
_IDLE_SHARE: Final = 0.25
# Where time goes that no part of the robot is to blame for.
_NOBODY: Final = {
    "phase": "frames that waited for the end of the inference before: camera and loop are not in "
    "step, and both may be fine",
    "undivided": "the age of frames from cameras that are asked: what of it is the camera's and "
    "what is the loop's wait cannot be told",
    "unaccounted": "between the stages of the prediction, where nothing is computed: the process "
    "was not run, or waited",
}


def tail(steady: ChunkTable) -> TailReport | None:
    """Return where the slowest 1 % of the chunks lose their time against the median chunk.

    At least three chunks are looked at, and at least 30 must be there.
    """
    total, name = steady.frame_to_command, "frame to command"
    if np.isnan(total).all():
        total, name = steady.predict, "predict"
    known = np.flatnonzero(~np.isnan(total))
    if len(known) < _MIN_FOR_TAIL:
        return None
    slowest = known[np.argsort(total[known])[-max(3, round(0.01 * len(known))) :]]
    by_segment = _shares(steady, name, slowest, known)
    by_group = {
        g: sum(share for s, share in by_segment.items() if GROUPS[s] == g)
        for g in dict.fromkeys(GROUPS[s] for s in by_segment)
    }
    group: str | None = max(by_group, key=lambda g: by_group[g])
    over_ms = _over(total, slowest, known)
    segment: str | None = None
    if over_ms < _TAIL_MATTERS * float(np.median(total[known])):
        group = None
    else:
        segment = max((s for s in by_segment if GROUPS[s] == group), key=lambda s: by_segment[s])
    has_cpu = not np.isnan(steady.cpu[known]).any()
    return TailReport(
        of=name,
        n=len(slowest),
        excess_ms=over_ms,
        predict_excess_ms=_over(steady.predict, slowest, known),
        cpu_excess_ms=_over(steady.cpu, slowest, known) if has_cpu else None,
        by_segment=by_segment,
        by_group=by_group,
        group=group,
        segment=segment,
    )


def _over(values: FloatArray, slowest: np.ndarray, known: np.ndarray) -> float:
    return float(values[slowest].mean() - np.median(values[known]))


def _shares(
    steady: ChunkTable, name: str, slowest: np.ndarray, known: np.ndarray
) -> dict[str, float]:
    """Return the share of the excess that each segment made."""
    used = PREDICTION if name == "predict" else SEGMENTS
    # A segment that does not apply took nothing.
    spent = np.nan_to_num(steady.segments[:, [SEGMENTS.index(s) for s in used]])
    excess = np.maximum(spent[slowest] - np.median(spent[known], axis=0), 0.0).mean(axis=0)
    whole = float(excess.sum()) or 1.0
    return {s: float(e) / whole for s, e in zip(used, excess, strict=True)}


def tail_verdict(report: TailReport | None) -> Verdict:
    """Return the sentence about it."""
    if report is None:
        text = f"too few chunks for a word about the tail: {_MIN_FOR_TAIL} are needed"
        return Verdict(topic="tail", level="warn", text=text)
    head = f"the {report.n} slowest chunks take {report.excess_ms:.1f} ms more than the median"
    if report.group is None or report.segment is None:
        return Verdict(topic="tail", level="good", text=f"no tail to speak of: {head}")
    share = report.by_group[report.group]
    blames: str | None = report.group
    if share < _CLEAR_SHARE:
        parts = ", ".join(f"{g} {100 * s:.0f} %" for g, s in report.by_group.items() if s > 0)
        where, blames = f"no single part is to blame ({parts})", None
    elif report.group in _NOBODY:
        where = f"{100 * share:.0f} % of that is {_NOBODY[report.group]}"
        blames = "phase" if report.group == "phase" else None
    else:
        where = f"{100 * share:.0f} % of that is the {report.group}, mostly {report.segment}"
    return Verdict(
        topic="tail", level="warn", text=f"{head}; {where}{_idle(report)}", blames=blames
    )


def _idle(report: TailReport) -> str:
    """Say so where slow predictions were not busy ones."""
    mine = report.by_group.get("engine", 0.0) + report.by_group.get("unaccounted", 0.0)
    if report.cpu_excess_ms is None or mine < _CLEAR_SHARE:
        return ""
    if report.cpu_excess_ms > _IDLE_SHARE * report.predict_excess_ms:
        return ""
    return (
        f"; their predictions took {report.predict_excess_ms:.1f} ms longer but only "
        f"{max(report.cpu_excess_ms, 0.0):.1f} ms more processor time: the process waited for a "
        "device, or was not run"
    )
