"""A profile as a trace for ui.perfetto.dev or chrome://tracing, in the trace event format.

Processes and threads are named, an arrow leads from each frame to the first command made of it,
and the motor's lateness and what the system did are counters. Moments are on the monotonic clock.
"""

from __future__ import annotations

import shlex
from typing import Final

import numpy as np

from gwp_edge.profiling.chunks import COLD, ChunkTable, chunk_table, moving
from gwp_edge.profiling.columns import PREDICTION, SEGMENTS
from gwp_edge.profiling.context import Context
from gwp_edge.profiling.motion import starts_of
from gwp_edge.profiling.raw import Raw, Records
from gwp_edge.spec import PolicySpec

Event = dict[str, object]
_POLICY, _MOTOR, _SYSTEM = 1, 2, 3
# Thread number of the first lane of frames; there may be more.
_FRAMES: Final = 3
_THREADS: Final = {
    (_POLICY, 1): "chunks",
    (_POLICY, 2): "stages",
    (_POLICY, _FRAMES): "frames",
    (_MOTOR, 1): "ticks",
    (_MOTOR, 2): "starts from rest",
    (_SYSTEM, 1): "counters",
}
_PROCESSES: Final = {_POLICY: "policy process", _MOTOR: "motor process", _SYSTEM: "system"}
_STAGES: Final = ("observe", *PREDICTION)
_BEFORE: Final = ("frame age", "transport", "frame wait")
_MAX_TICKS: Final = 200_000


def to_trace(
    raw: Raw, spec: PolicySpec, context: Context, *, run: int = 0, n_runs: int = 1
) -> dict[str, object]:
    """Return the trace of run number ``run`` of ``n_runs``, for ``json``."""
    table = chunk_table(raw, spec, warmup_s=context.warmup_s or 0.0)
    events: list[Event] = []
    for pid, name in _PROCESSES.items():
        events.append(_meta("process_name", pid, 0, name))
        events.append(
            {
                "name": "process_sort_index",
                "ph": "M",
                "pid": pid,
                "tid": 0,
                "args": {"sort_index": pid},
            }
        )
    events += [_meta("thread_name", pid, tid, name) for (pid, tid), name in _THREADS.items()]
    ticks = moving(raw.ticks)[-_MAX_TICKS:]
    lanes = _lanes(table)
    for lane in range(1, max(lanes, default=0) + 1):
        events.append(_meta("thread_name", _POLICY, _FRAMES + lane, f"frames {lane + 1}"))
    first_tick_ns = int(ticks["t_woke_ns"][0]) if len(ticks) else 0
    for i in range(len(table.t_ns)):
        # An arrow needs the tick that it ends in, and the oldest ticks may have been left out.
        ends = int(table.t_adopted_ns[i]) >= first_tick_ns and table.t_sent_ns[i] > 0
        events += _chunk_events(table, i, lanes[i], ends=ends)
    events += _tick_events(ticks)
    events += [
        _slice(
            "command to first motion",
            _MOTOR,
            2,
            start.t_commanded_ns / 1e3,
            (start.t_moved_ns - start.t_commanded_ns) / 1e3,
        )
        for start in starts_of(raw)
    ]
    events += _system_events(raw)
    return {
        "traceEvents": events,
        "displayTimeUnit": "ms",
        "otherData": {
            "bundle_id": context.bundle_id,
            "robot": context.robot,
            "run": f"{run + 1} of {n_runs}",
            "command_line": shlex.join(context.command_line),
            "clock": "CLOCK_MONOTONIC",
        },
    }


def _meta(kind: str, pid: int, tid: int, name: str) -> Event:
    return {"name": kind, "ph": "M", "pid": pid, "tid": tid, "args": {"name": name}}


def _lanes(table: ChunkTable) -> list[int]:
    """Return a lane for each chunk's frame: slices of one thread must not overlap.

    The next frame may have been captured, and be on its way, while one is still waiting.
    """
    free_ns: list[float] = []
    lanes = []
    ages_ms = np.nansum([table.segment(name) for name in _BEFORE], axis=0)
    for t_ns, age_ms in zip(table.t_ns, ages_ms, strict=True):
        captured_ns = float(t_ns) - age_ms * 1e6
        lane = next((k for k, free in enumerate(free_ns) if free <= captured_ns), len(free_ns))
        free_ns[lane:] = [float(t_ns), *free_ns[lane + 1 :]]
        lanes.append(lane)
    return lanes


def _slice(name: str, pid: int, tid: int, begin_us: float, took_us: float, **args: object) -> Event:
    # Whole ns at both ends, as the viewer counts them, so that what nests here nests there.
    begin_ns, end_ns = round(begin_us * 1e3), round((begin_us + max(took_us, 0.0)) * 1e3)
    return {
        "name": name,
        "ph": "X",
        "pid": pid,
        "tid": tid,
        "ts": begin_ns / 1e3,
        "dur": (end_ns - begin_ns) / 1e3,
        "args": args,
    }


def _chunk_events(table: ChunkTable, i: int, lane: int, *, ends: bool) -> list[Event]:
    """Return the slices of one chunk and the arrow from its frame to its first command."""
    known = {name: table.segments[i, k] * 1e3 for k, name in enumerate(SEGMENTS)}
    spent_us = {k: 0.0 if np.isnan(v) else float(v) for k, v in known.items()}
    idx, start_us = int(table.chunk_idx[i]), table.t_ns[i] / 1e3
    label = f"chunk {idx}" if idx >= 0 else f"warm-up call {-idx}"
    if table.phase[i] == COLD:
        label += " (cold)"
    begun_us = start_us
    inside: list[Event] = []
    for stage in _STAGES:
        if not np.isnan(known[stage]):
            inside.append(_slice(stage, _POLICY, 2, begun_us, spent_us[stage], chunk=idx))
        if stage == "denoise":
            inside += _steps(table, i, begun_us, idx)
        begun_us += spent_us[stage]
    published_us = begun_us + spent_us["publish"]
    events = [_slice(label, _POLICY, 1, start_us, published_us - start_us, chunk=idx), *inside]
    age_us, frames = sum(spent_us[name] for name in _BEFORE), _FRAMES + lane
    if age_us > 0:
        events.append(_slice("frame", _POLICY, frames, start_us - age_us, age_us, chunk=idx))
    if ends:
        sent_us = table.t_sent_ns[i] / 1e3
        begin = (frames, start_us - age_us) if age_us > 0 else (1, start_us)
        events += [
            _flow("s", idx, _POLICY, *begin),
            _flow("t", idx, _POLICY, 1, (start_us + published_us) / 2),
            # The arrow ends inside the tick that sent the command.
            _flow("f", idx, _MOTOR, 1, sent_us - spent_us["tick"] / 2),
        ]
    return events


def _steps(table: ChunkTable, i: int, begun_us: float, idx: int) -> list[Event]:
    events = []
    for step_idx, took_ms in enumerate(table.steps[i][~np.isnan(table.steps[i])]):
        events.append(
            _slice(f"step {step_idx}", _POLICY, 2, begun_us, float(took_ms) * 1e3, chunk=idx)
        )
        begun_us += float(took_ms) * 1e3
    return events


def _flow(phase: str, idx: int, pid: int, tid: int, t_us: float) -> Event:
    event: Event = {
        "name": "frame to command",
        "cat": "chunk",
        "ph": phase,
        "id": idx,
        "pid": pid,
        "tid": tid,
        "ts": round(t_us * 1e3) / 1e3,
    }
    if phase == "f":
        event["bp"] = "e"
    return event


def _tick_events(ticks: Records) -> list[Event]:
    events: list[Event] = []
    for tick in ticks:
        woke_us, sent_us = int(tick["t_woke_ns"]) / 1e3, int(tick["t_sent_ns"]) / 1e3
        events.append(
            _slice(
                "tick",
                _MOTOR,
                1,
                woke_us,
                sent_us - woke_us,
                chunk=int(tick["chunk_idx"]),
                row=round(float(tick["row"]), 2),
            )
        )
        late_us = max(0, int(tick["t_woke_ns"]) - int(tick["t_planned_ns"])) / 1e3
        events.append(_counter("wake-up lateness (us)", _MOTOR, woke_us, late_us))
    return events


def _counter(name: str, pid: int, t_us: float, value: float) -> Event:
    return {"name": name, "ph": "C", "pid": pid, "tid": 0, "ts": t_us, "args": {"value": value}}


def _system_events(raw: Raw) -> list[Event]:
    if raw.system is None:
        return []
    return [
        _counter(name, _SYSTEM, t_ns / 1e3, value)
        for t_ns, row in zip(raw.system.t_ns, raw.system.rows, strict=True)
        for name, value in row.items()
    ]
