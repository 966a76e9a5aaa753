"""From stamps and ticks to one row per chunk: where each spent its time up to the motors."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from gwp_edge.profiling.collect import Raw, Records
from gwp_edge.profiling.schema import GROUPS, SEGMENTS, CameraReport, Chunks, Phase, Summary
from gwp_edge.profiling.stamps import MAX_STEPS
from gwp_edge.spec import PolicySpec
from gwp_edge.status import Mode, TickFlag
from gwp_edge.types import FloatArray

PHASES: Final[tuple[Phase, ...]] = ("cold", "warm", "steady")
COLD, WARM, STEADY = range(3)
MOVING: Final = (Mode.APPROACH, Mode.RUN)
_MAX_CHUNKS_KEPT: Final = 4000
_IN_STEP_NS: Final = 2e6
_STAGES: Final = ("preprocess", "vision", "prefill", "denoise", "postprocess")


@dataclass(frozen=True, slots=True, kw_only=True)
class ChunkTable:
    """One row per chunk, n in all; times in ms, NaN where a thing did not happen.

    Attributes:
        t_ns: start of the chunk.
        phase: index into ``PHASES``.
        run: which repetition.
        segments: (n, len(SEGMENTS)).
        steps: (n, MAX_STEPS), NaN beyond the last.
        transport: capture to received, oldest frame.
        predict: from the complete observation to the prediction.
        frame_to_chunk: capture to published.
        frame_to_command: capture to first command sent.
        age: observation to adoption.
        interval: from the adoption before.
        slack: what was left of the plan before.
        chunk_idx: number of the chunk.
        t_sent_ns: first command, 0 for none.
        t_adopted_ns: first tick on it, 0 for none.
    """

    t_ns: npt.NDArray[np.int64]
    phase: npt.NDArray[np.int64]
    run: npt.NDArray[np.int64]
    segments: FloatArray
    steps: FloatArray
    transport: FloatArray
    predict: FloatArray
    frame_to_chunk: FloatArray
    frame_to_command: FloatArray
    age: FloatArray
    interval: FloatArray
    slack: FloatArray
    chunk_idx: npt.NDArray[np.int64]
    t_sent_ns: npt.NDArray[np.int64]
    t_adopted_ns: npt.NDArray[np.int64]

    def rows(self, mask: npt.NDArray[np.bool_]) -> ChunkTable:
        """Return the rows of ``mask``."""
        return ChunkTable(**{f.name: getattr(self, f.name)[mask] for f in fields(self)})

    @property
    def steady(self) -> ChunkTable:
        """The rows of the steady phase."""
        return self.rows(self.phase == STEADY)

    def segment(self, name: str) -> FloatArray:
        """Return one segment, ms, (n,)."""
        values: FloatArray = self.segments[:, SEGMENTS.index(name)]
        return values


def joined(tables: list[ChunkTable]) -> ChunkTable:
    """Return the rows of several runs."""
    return ChunkTable(
        **{f.name: np.concatenate([getattr(t, f.name) for t in tables]) for f in fields(ChunkTable)}
    )


def moving(ticks: Records) -> Records:
    """Return the ticks that followed a plan."""
    moved: Records = ticks[np.isin(ticks["mode"], MOVING)]
    return moved


def steady_window_ns(raw: Raw, warmup_s: float) -> tuple[int, int]:
    """Return begin and end of the steady phase: while a plan is followed, less the warm-up."""
    running = moving(raw.ticks)
    warmup_ns = round(warmup_s * 1e9)
    if len(running):
        return int(running["t_woke_ns"][0]) + warmup_ns, int(running["t_woke_ns"][-1])
    if len(raw.ticks):  # there was a robot, but it never ran
        return np.iinfo(np.int64).max, np.iinfo(np.int64).max
    live = raw.stamps[raw.stamps["chunk_idx"] >= 0]
    begin_ns = int(live["t_started_ns"][0]) + warmup_ns if len(live) else 0
    return begin_ns, np.iinfo(np.int64).max


def chunk_table(raw: Raw, spec: PolicySpec, *, warmup_s: float, run: int = 0) -> ChunkTable:
    """Return the table of one run.

    Args:
        raw: what was collected.
        spec: of the policy.
        warmup_s: at the beginning of the motion, kept out of the steady phase.
        run: number of the repetition.
    """
    begin_ns, end_ns = steady_window_ns(raw, warmup_s)
    stamps = raw.stamps[raw.stamps["t_published_ns"] <= end_ns]
    n = len(stamps)
    adopted_ns, sent_ns, tick_ms, send_ms = _first_ticks(raw.ticks, stamps["chunk_idx"])
    predict = _ms(stamps["t_predicted_ns"] - stamps["t_built_ns"])
    stages = np.zeros((n, len(_STAGES)))
    steps = _steps(stamps)
    for i, name in enumerate(_STAGES):
        stages[:, i] = (
            np.nansum(steps, axis=1) + _ms(stamps["denoise_rest_ns"])
            if name == "denoise"
            else _ms(stamps[f"{name}_ns"])
        )
    segments = np.column_stack(
        [
            _ms(stamps["t_started_ns"] - stamps["t_observed_ns"]),
            _ms(stamps["t_built_ns"] - stamps["t_started_ns"]),
            predict - stages.sum(axis=1),
            stages,
            _ms(stamps["t_published_ns"] - stamps["t_predicted_ns"]),
            _since(adopted_ns, stamps["t_published_ns"]),
            tick_ms - send_ms,
            send_ms,
        ]
    )
    frame_to_chunk = _ms(stamps["t_published_ns"] - stamps["t_observed_ns"])
    transport = _transport(stamps)
    if not len(raw.ticks):  # the engine alone: its pictures are noise and were never captured
        engine = np.array([GROUPS[name] == "engine" for name in SEGMENTS])
        segments[:, ~engine] = np.nan
        frame_to_chunk, transport = np.full(n, np.nan), np.full(n, np.nan)
    phase = np.full(n, WARM)
    phase[(stamps["chunk_idx"] >= 0) & (stamps["t_started_ns"] >= begin_ns)] = STEADY
    phase[stamps["chunk_idx"] == -1] = COLD
    interval, slack = _hand_overs(adopted_ns, stamps, spec)
    return ChunkTable(
        t_ns=stamps["t_started_ns"].copy(),
        phase=phase,
        run=np.full(n, run),
        segments=segments,
        steps=steps,
        transport=transport,
        predict=predict,
        frame_to_chunk=frame_to_chunk,
        frame_to_command=_since(sent_ns, stamps["t_observed_ns"]),
        age=_since(adopted_ns, stamps["t_observed_ns"]),
        interval=interval,
        slack=slack,
        chunk_idx=stamps["chunk_idx"].copy(),
        t_sent_ns=sent_ns,
        t_adopted_ns=adopted_ns,
    )


def _ms(times_ns: npt.NDArray[np.int64]) -> FloatArray:
    return np.asarray(times_ns, np.float64) / 1e6


def _since(t_ns: npt.NDArray[np.int64], from_ns: npt.NDArray[np.int64]) -> FloatArray:
    """Return ms from ``from_ns`` to ``t_ns``; NaN where ``t_ns`` is 0."""
    return np.where(t_ns > 0, (t_ns - from_ns) / 1e6, np.nan)


def _steps(stamps: Records) -> FloatArray:
    steps = _ms(stamps["denoise_ns"])
    steps[np.arange(MAX_STEPS) >= stamps["n_steps"][:, None]] = np.nan
    return steps


def _transport(stamps: Records) -> FloatArray:
    """Return capture to received of the oldest frame, ms."""
    used = np.arange(stamps["t_captured_ns"].shape[1]) < stamps["n_cameras"][:, None]
    captured = np.where(used, stamps["t_captured_ns"], np.iinfo(np.int64).max)
    oldest = captured.argmin(axis=1)[:, None]
    received = np.take_along_axis(stamps["t_received_ns"], oldest, axis=1)[:, 0]
    took = _ms(received - np.take_along_axis(captured, oldest, axis=1)[:, 0])
    return np.where(stamps["n_cameras"] > 0, took, np.nan)


def _first_ticks(
    ticks: Records, chunk_idx: npt.NDArray[np.int64]
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], FloatArray, FloatArray]:
    """Return adoption and first command, ns or 0, wake-up to sent and the driver's share, ms."""
    adopted = np.zeros(len(chunk_idx), np.int64)
    sent = np.zeros(len(chunk_idx), np.int64)
    took = np.full(len(chunk_idx), np.nan)
    send = np.full(len(chunk_idx), np.nan)
    followed = moving(ticks)
    followed = followed[followed["chunk_idx"] >= 0]
    went_out = followed[(followed["flags"] & int(TickFlag.NOT_SENT)) == 0]
    at = {int(k): i for i, k in enumerate(chunk_idx)}
    for records, is_sent in ((followed, False), (went_out, True)):
        for k, first in zip(*np.unique(records["chunk_idx"], return_index=True), strict=True):
            i, tick = at.get(int(k)), records[first]
            if i is None:
                continue
            adopted[i] = tick["t_woke_ns"]
            if is_sent:
                sent[i] = tick["t_sent_ns"]
                took[i] = (tick["t_sent_ns"] - tick["t_woke_ns"]) / 1e6
                send[i] = tick["send_ns"] / 1e6
    return adopted, sent, took, send


def _hand_overs(
    adopted_ns: npt.NDArray[np.int64], stamps: Records, spec: PolicySpec
) -> tuple[FloatArray, FloatArray]:
    """Return the interval since the adoption before and what was left of the plan before, ms."""
    interval, slack = np.full(len(stamps), np.nan), np.full(len(stamps), np.nan)
    taken = np.flatnonzero(adopted_ns)
    before, now = taken[:-1], taken[1:]
    interval[now] = (adopted_ns[now] - adopted_ns[before]) / 1e6
    plan_ns = (spec.n_rows - 1) * spec.period_ns
    slack[now] = (stamps["t_observed_ns"][before] + plan_ns - adopted_ns[now]) / 1e6
    return interval, slack


def phase_summaries(table: ChunkTable) -> dict[Phase, dict[str, Summary]]:
    """Return the distribution of every stage and of every way through them, phase by phase."""
    result: dict[Phase, dict[str, Summary]] = {}
    for code, name in enumerate(PHASES):
        part = table.rows(table.phase == code)
        columns = {segment: part.segment(segment) for segment in SEGMENTS}
        columns |= {
            "denoise step": part.steps,
            "transport": part.transport,
            "predict": part.predict,
            "frame to chunk": part.frame_to_chunk,
            "frame to command": part.frame_to_command,
            "plan age at adoption": part.age,
            "replan interval": part.interval,
            "plan left at adoption": part.slack,
        }
        summaries = {key: Summary.of(values) for key, values in columns.items()}
        found = {key: s for key, s in summaries.items() if s is not None}
        if found:
            result[name] = found
    return result


def chunk_columns(table: ChunkTable, t0_ns: int) -> Chunks:
    """Return the columns of the report: all chunks, or an even choice and every extreme one."""
    keep = np.ones(len(table.t_ns), bool)
    if len(keep) > _MAX_CHUNKS_KEPT:
        keep[:] = False
        keep[np.linspace(0, len(keep) - 1, _MAX_CHUNKS_KEPT).astype(int)] = True
        keep[np.argsort(table.predict)[-40:]] = True
    part = table.rows(keep)
    return Chunks(
        t_s=[round(float(t - t0_ns) / 1e9, 4) for t in part.t_ns],
        phase=[PHASES[p] for p in part.phase],
        segments_ms={name: column(part.segment(name)) for name in SEGMENTS},
        steps_ms=[[round(float(v), 4) for v in row[~np.isnan(row)]] for row in part.steps],
        transport_ms=column(part.transport),
        frame_to_chunk_ms=column(part.frame_to_chunk),
        frame_to_command_ms=column(part.frame_to_command),
        interval_ms=column(part.interval),
        slack_ms=column(part.slack),
        n_decimated=int((~keep).sum()),
    )


def column(values: npt.NDArray[Any]) -> list[float | None]:
    """Return values for JSON, which knows no NaN."""
    return [None if np.isnan(v) else round(float(v), 4) for v in values]


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
        _camera_report(name, stamps, i, every_frame=every_frame) for i, name in enumerate(cameras)
    )


def _camera_report(name: str, stamps: Records, i: int, *, every_frame: bool) -> CameraReport:
    captured, idx = stamps["t_captured_ns"][:, i], stamps["frame_idx"][:, i]
    transport = _ms(stamps["t_received_ns"][:, i] - captured)
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
    return CameraReport(
        name=name,
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
