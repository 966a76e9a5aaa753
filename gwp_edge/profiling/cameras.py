"""What the stamps say about every camera: its clock, its transport, and frames that were lost."""

from __future__ import annotations

import math
from typing import Final, get_args

import numpy as np
import numpy.typing as npt

from gwp_edge.profiling.chunks import steady_window_ns
from gwp_edge.profiling.raw import Raw, Records
from gwp_edge.profiling.schema import CameraReport, Summary
from gwp_edge.types import ClockDomain, FloatArray

_IN_STEP_NS: Final = 2e6
_DOMAINS: Final[tuple[ClockDomain, ...]] = get_args(ClockDomain)


def camera_reports(
    raw: Raw, cameras: tuple[str, ...], *, warmup_s: float, every_frame: bool
) -> tuple[CameraReport, ...]:
    """Judge every camera by its own frame numbers, over the steady phase.

    A frame counts as expected when the loop was waiting for it, or when it was the newest one at
    the moment the loop became free; by a regular camera's clock it is known when that was. Frames
    that came and went during an inference are nobody's loss.

    Args:
        raw: what was collected of one run.
        cameras: names in the order of the stamps.
        warmup_s: at the beginning, left out.
        every_frame: the loop begins with every new frame; nothing limits its rate.
    """
    begin_ns, end_ns = steady_window_ns(raw, warmup_s)
    stamps = raw.stamps
    stamps = stamps[(stamps["chunk_idx"] >= 0) & (stamps["t_started_ns"] >= begin_ns)]
    stamps = stamps[stamps["t_published_ns"] <= end_ns]
    # Cameras in step act like one; others make the loop wait for each other.
    used = stamps["t_captured_ns"][:, : len(cameras)]
    apart_ns = float(np.median(np.ptp(used, axis=1))) if used.size else 0.0
    every_frame = every_frame and apart_ns < _IN_STEP_NS
    return tuple(
        judge_camera(name, stamps, i, every_frame=every_frame) for i, name in enumerate(cameras)
    )


def judge_camera(name: str, stamps: Records, i: int, *, every_frame: bool) -> CameraReport:
    """Judge the camera of column ``i`` by consecutive chunks; see ``camera_reports``."""
    captured, idx = stamps["t_captured_ns"][:, i], stamps["frame_idx"][:, i]
    transport = _in_ms(stamps["t_received_ns"][:, i] - captured)
    steps = np.diff(idx)
    each = np.diff(captured)[steps > 0] / steps[steps > 0]
    regular = len(each) >= 8
    period_ns = float(np.median(each)) if regular else 0.0
    if regular and np.median(np.abs(each - period_ns)) > 0.1 * period_ns:
        regular = False  # its clock does not tell when a frame is due
    n_expected = n_missing = 0
    if regular:
        n_expected, n_missing = _missing_frames(
            stamps, captured, idx, period_ns, float(transport.min()) * 1e6, every_frame=every_frame
        )
    # Frames the camera numbered from the first one used to the last one used.
    n_made = int(idx[-1] - idx[0]) + 1 if len(idx) else 0
    return CameraReport(
        name=name,
        clock=_DOMAINS[int(stamps["domain"][-1, i])] if len(stamps) else None,
        n_made=n_made,
        n_used=len(np.unique(idx)),
        period_ms=period_ns / 1e6 if regular else None,
        n_expected=n_expected,
        n_missing=n_missing,
        transport_ms=Summary.of(transport),
    )


def _missing_frames(
    stamps: Records,
    captured: npt.NDArray[np.int64],
    idx: npt.NDArray[np.int64],
    period_ns: float,
    delay_ns: float,
    *,
    every_frame: bool,
) -> tuple[int, int]:
    """Return how many frames should have begun a plan, and how many of those were not there."""
    slack_ns = 0.25 * period_ns
    n_expected = n_missing = 0
    for j in range(1, len(stamps)):
        started_ns, free_ns = (
            int(stamps["t_started_ns"][j]),
            int(stamps["t_published_ns"][j - 1]),
        )
        due_ns = int(captured[j]) + delay_ns
        used = int(idx[j])
        # Frames that were the newest one for long enough while the loop was free to take them.
        last = math.floor((started_ns - slack_ns - due_ns) / period_ns) + used
        first = used + 1
        if every_frame:
            first = math.floor((free_ns + slack_ns - due_ns) / period_ns) + used
        first = max(first, int(idx[j - 1]) + 1)
        missing = sum(1 for k in range(first, last + 1) if k != used)
        n_missing += missing
        n_expected += missing + 1
    return n_expected, n_missing


def _in_ms(times_ns: npt.NDArray[np.int64]) -> FloatArray:
    return np.asarray(times_ns, np.float64) / 1e6
