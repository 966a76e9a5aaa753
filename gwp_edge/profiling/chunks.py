"""From stamps and ticks to one row per chunk: where each spent its time up to the motors."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from gwp_edge.profiling.columns import PREDICTION, SEGMENTS, Chunks, Phase
from gwp_edge.profiling.raw import Raw, Records
from gwp_edge.profiling.schema import Summary
from gwp_edge.profiling.stamps import MAX_STEPS
from gwp_edge.spec import PolicySpec
from gwp_edge.status import Mode, TickFlag
from gwp_edge.types import FloatArray

PHASES: Final[tuple[Phase, ...]] = ("cold", "warm", "steady")
COLD, WARM, STEADY = range(3)
MOVING: Final = (Mode.APPROACH, Mode.RUN)
_MAX_CHUNKS_KEPT: Final = 4000
_N_EXTREME: Final = 40
_STAGES: Final = tuple(name for name in PREDICTION if name != "unaccounted")
# One that pushes can look as if it were asked only in the moment of the look itself.
_ASKED_SHARE: Final = 0.1


@dataclass(frozen=True, slots=True, kw_only=True)
class ChunkTable:
    """One row per chunk, n in all; times in ms, NaN where a thing did not happen.

    Attributes:
        t_ns: start of the chunk.
        phase: index into ``PHASES``.
        run: which repetition.
        segments: (n, len(SEGMENTS)).
        steps: (n, MAX_STEPS), NaN beyond the last.
        cpu: processor time of the prediction, all threads of its process.
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
    cpu: FloatArray
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
            *_before_start(stamps),
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
    # Of the engine alone, and of the golden run, no picture was ever captured.
    uncaptured = (stamps["n_cameras"] == 0) | (not len(raw.ticks))
    around = np.array([name not in PREDICTION for name in SEGMENTS])
    segments[np.ix_(uncaptured, around)] = np.nan
    frame_to_chunk[uncaptured] = np.nan
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
        cpu=np.where(stamps["cpu_ns"] > 0, _ms(stamps["cpu_ns"]), np.nan),
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


def asked_cameras(stamps: Records) -> npt.NDArray[np.bool_]:
    """Return which cameras have a frame when they are asked for it, and no time of arrival.

    Such a frame is received after the look has begun; one that was pushed lay there before.
    """
    used = np.arange(stamps["t_captured_ns"].shape[1]) < stamps["n_cameras"][:, None]
    after = used & (stamps["t_received_ns"] > stamps["t_started_ns"][:, None])
    asked: npt.NDArray[np.bool_] = after.sum(axis=0) > _ASKED_SHARE * used.sum(axis=0)
    return asked


def _before_start(stamps: Records) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Return frame age, transport and frame wait, ms: either the first or both of the others.

    A set of frames is there once the last of them is received; from then on it waits for the loop.
    """
    age = _ms(stamps["t_started_ns"] - stamps["t_observed_ns"])
    used = np.arange(stamps["t_captured_ns"].shape[1]) < stamps["n_cameras"][:, None]
    received_ns = np.where(used, stamps["t_received_ns"], 0).max(axis=1)
    there_ns = np.clip(received_ns, stamps["t_observed_ns"], stamps["t_started_ns"])
    pushed = ~(used & asked_cameras(stamps[stamps["chunk_idx"] >= 0])).any(axis=1)
    transport = np.where(pushed, _ms(there_ns - stamps["t_observed_ns"]), np.nan)
    return np.where(pushed, np.nan, age), transport, age - transport


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
            "predict": part.predict,
            "processor time of predict": part.cpu,
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
    even = np.ones(len(table.t_ns), bool)
    extreme = ~even
    if len(even) > _MAX_CHUNKS_KEPT:
        even[:] = False
        even[np.linspace(0, len(even) - 1, _MAX_CHUNKS_KEPT).astype(int)] = True
        extreme[np.argsort(table.predict)[-_N_EXTREME:]] = True
    keep = even | extreme
    part = table.rows(keep)
    return Chunks(
        t_s=[round(float(t - t0_ns) / 1e9, 4) for t in part.t_ns],
        phase=[PHASES[p] for p in part.phase],
        run=[int(r) for r in part.run],
        segments_ms={name: column(part.segment(name)) for name in SEGMENTS},
        steps_ms=[[round(float(v), 4) for v in row[~np.isnan(row)]] for row in part.steps],
        cpu_ms=column(part.cpu),
        frame_to_chunk_ms=column(part.frame_to_chunk),
        frame_to_command_ms=column(part.frame_to_command),
        interval_ms=column(part.interval),
        slack_ms=column(part.slack),
        n_decimated=int((~keep).sum()),
        extreme_rows=tuple(int(i) for i in np.flatnonzero(~even[keep])),
    )


def column(values: npt.NDArray[Any]) -> list[float | None]:
    """Return values for JSON, which knows no NaN."""
    return [None if np.isnan(v) else round(float(v), 4) for v in values]
