"""What the stamps say about every camera: its clock, its transport, and frames that were lost."""

from __future__ import annotations

import math
from typing import Final, get_args

import numpy as np
import numpy.typing as npt

from gwp_edge.profiling.chunks import asked_cameras, steady_window_ns
from gwp_edge.profiling.raw import Raw, Records
from gwp_edge.profiling.schema import CameraReport, Summary
from gwp_edge.types import ClockDomain, FloatArray

_DOMAINS: Final[tuple[ClockDomain, ...]] = get_args(ClockDomain)
_REGULAR: Final = 0.1
# Share of a period after which a frame is late.
_SLACK: Final = 0.25


def camera_reports(
    raw: Raw, cameras: tuple[str, ...], *, warmup_s: float
) -> tuple[CameraReport, ...]:
    """Judge every camera by its own frame numbers, over the steady phase.

    A frame is missing where the loop looked for it after it was due, by a regular camera's clock,
    and found an older one. Frames that come and go between two looks are nobody's loss: the loop
    was computing, or was not run.

    Args:
        raw: what was collected of one run.
        cameras: names in the order of the stamps.
        warmup_s: at the beginning, left out.
    """
    stamps = _steady(raw, warmup_s)
    return tuple(judge_camera(name, stamps, i) for i, name in enumerate(cameras))


def transports(
    raws: list[Raw], cameras: tuple[str, ...], *, warmup_s: float
) -> dict[str, Summary | None]:
    """Return capture to received over all runs, by camera; None for one that is asked."""
    stamps = np.concatenate([_steady(raw, warmup_s) for raw in raws])
    asked = asked_cameras(stamps)
    return {
        name: None
        if asked[i]
        else Summary.of(_in_ms(stamps["t_received_ns"][:, i] - stamps["t_captured_ns"][:, i]))
        for i, name in enumerate(cameras)
    }


def _steady(raw: Raw, warmup_s: float) -> Records:
    begin_ns, end_ns = steady_window_ns(raw, warmup_s)
    stamps = raw.stamps
    stamps = stamps[(stamps["chunk_idx"] >= 0) & (stamps["t_started_ns"] >= begin_ns)]
    steady: Records = stamps[stamps["t_published_ns"] <= end_ns]
    return steady


def judge_camera(name: str, stamps: Records, i: int) -> CameraReport:
    """Judge the camera of column ``i`` by consecutive chunks; see ``camera_reports``."""
    captured, idx = stamps["t_captured_ns"][:, i], stamps["frame_idx"][:, i]
    transport = _in_ms(stamps["t_received_ns"][:, i] - captured)
    steps = np.diff(idx)
    each = np.diff(captured)[steps > 0] / steps[steps > 0]
    regular = len(each) >= 8
    period_ns = float(np.median(each)) if regular else 0.0
    if regular:
        # Else its clock does not tell when a frame is due: not on the whole, or not well enough to
        # call one late.
        middle, most = np.percentile(np.abs(each - period_ns), (50, 90))
        regular = bool(middle <= _REGULAR * period_ns and most <= _SLACK * period_ns)
    n_late = n_missing = 0
    if regular:
        absent = _absent_frames(stamps, i, period_ns, float(transport.min()) * 1e6)
        n_late = len(absent & set(idx.tolist()))
        n_missing = len(absent) - n_late
    # Frames the camera numbered from the first one used to the last one used.
    n_made = int(idx[-1] - idx[0]) + 1 if len(idx) else 0
    asked = bool(len(stamps) and asked_cameras(stamps)[i])
    return CameraReport(
        name=name,
        clock=_DOMAINS[int(stamps["domain"][-1, i])] if len(stamps) else None,
        n_made=n_made,
        n_used=len(np.unique(idx)),
        period_ms=period_ns / 1e6 if regular else None,
        n_expected=len(np.unique(idx[1:])) + n_missing if regular else 0,
        n_missing=n_missing,
        n_late=n_late,
        transport_ms=None if asked else Summary.of(transport),
    )


def _absent_frames(stamps: Records, i: int, period_ns: float, delay_ns: float) -> set[int]:
    """Return the numbers of the frames that were due at a look and not there.

    The looks that are known are the one that began each chunk and the last one before it that
    found no new frames. ``latest`` gives the newest frame there is, so at a look every frame that
    was due and has a higher number than the newest one was absent.
    """
    absent: set[int] = set()
    slack_ns = _SLACK * period_ns
    for j in range(1, len(stamps)):
        captured_ns, used = int(stamps["t_captured_ns"][j, i]), int(stamps["frame_idx"][j, i])
        before = int(stamps["frame_idx"][j - 1, i])
        for t_look_ns, newest in (
            (int(stamps["t_looked_ns"][j]), int(stamps["looked_idx"][j, i])),
            (int(stamps["t_started_ns"][j]), used),
        ):
            if t_look_ns == 0:
                continue
            since_ns = t_look_ns - slack_ns - delay_ns - captured_ns
            due = used + math.floor(since_ns / period_ns)
            absent.update(range(max(newest, before) + 1, due + 1))
    return absent


def _in_ms(times_ns: npt.NDArray[np.int64]) -> FloatArray:
    return np.asarray(times_ns, np.float64) / 1e6
