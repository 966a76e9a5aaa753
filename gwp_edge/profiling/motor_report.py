"""What the tick log says about the motor loop: lateness, jitter, gaps and who made them."""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt

from gwp_edge.profiling.chunks import MOVING, steady_window_ns
from gwp_edge.profiling.motion import command_to_motion, start_to_motion
from gwp_edge.profiling.raw import LIMIT_FLAGS, Raw, Records
from gwp_edge.profiling.schema import MotorReport, Summary
from gwp_edge.spec import PolicySpec
from gwp_edge.status import TickFlag
from gwp_edge.types import FloatArray

_LATE_MS: Final = 1.0
# A gap is long when a command more could have been sent in it.
_GAP_PERIODS: Final = 1.5
_EDGES_US: Final = np.concatenate([[0.0], 2.0 ** (np.arange(41) / 2)])


def motor_report(
    raws: list[Raw], spec: PolicySpec, *, motor_hz: float, warmup_s: float
) -> MotorReport | None:
    """Return the report over the steady phases of all runs, or None where no motor ran."""
    period_ms = 1e3 / motor_hz
    parts = [part for raw in raws for part in _running(raw, warmup_s)]
    if not parts:
        return None
    ticks = np.concatenate(parts)
    late = np.maximum(0, ticks["t_woke_ns"] - ticks["t_planned_ns"]) / 1e6
    gap, causes = _gaps(parts, period_ms)
    missed = np.concatenate([skipped_periods(part["t_planned_ns"], period_ms) for part in parts])
    sent = (ticks["flags"] & int(TickFlag.NOT_SENT)) == 0
    lateness, periods = Summary.of(late), Summary.of(gap)
    jitter, busy = Summary.of(np.abs(gap - period_ms)), Summary.of(_busy(ticks))
    if lateness is None or periods is None or jitter is None or busy is None:
        return None
    lost = {name: round(float(values.sum()), 4) for name, values in causes.items()}
    planned = ticks[ticks["chunk_idx"] >= 0]
    return MotorReport(
        n_ticks=len(ticks),
        lateness_ms=lateness,
        period_ms=periods,
        jitter_ms=jitter,
        busy_ms=busy,
        send_ms=Summary.of(ticks["send_ns"][sent] / 1e6),
        lateness_histogram=_histogram(late),
        jitter_histogram=_histogram(np.abs(gap - period_ms)),
        n_late=int((late > _LATE_MS).sum()),
        n_missed=int(missed.sum()),
        longest_miss=int(missed.max(initial=0)),
        n_long_gaps=int((gap > _GAP_PERIODS * period_ms).sum()),
        tail=max(lost, key=lambda k: lost[k]) if any(lost.values()) else None,
        tail_shares=lost,
        n_not_sent=int((~sent).sum()),
        chunk_age_ms=Summary.of((planned["t_woke_ns"] - planned["t_observed_ns"]) / 1e6),
        feedback_age_ms=Summary.of(
            # Feedback may come in between waking up and reading it.
            np.maximum(ticks["t_woke_ns"] - ticks["t_feedback_ns"], 0) / 1e6
        ),
        used_up_ms=float((planned["row"] >= spec.n_rows - 1).sum() * period_ms),
        limited_ticks={
            flag.name.lower(): int(((ticks["flags"] & int(flag)) != 0).sum())
            for flag in LIMIT_FLAGS
            if flag.name is not None
        },
        command_to_motion_ms=command_to_motion(raws, warmup_s),
        start_to_motion_ms=start_to_motion(raws),
        series=_series(parts, raws, period_ms),
    )


def skipped_periods(t_planned_ns: npt.NDArray[np.int64], period_ms: float) -> npt.NDArray[np.int64]:
    """Return how many deadlines were given up between each two, as the loop itself counts them.

    A loop that wakes late and meets the next deadline has skipped nothing, however uneven its
    wake-ups are; it moves its deadlines on only when it is behind by more than a period.
    """
    period_ns = round(period_ms * 1e6)
    skipped: npt.NDArray[np.int64] = np.maximum(np.diff(t_planned_ns) // period_ns - 1, 0)
    return skipped


def _running(raw: Raw, warmup_s: float) -> list[Records]:
    """Return the stretches of ticks on a plan; a hold in between is no gap."""
    begin_ns, _ = steady_window_ns(raw, warmup_s)
    ticks = raw.ticks
    at = np.flatnonzero(np.isin(ticks["mode"], MOVING) & (ticks["t_woke_ns"] >= begin_ns))
    stretches = np.split(at, np.flatnonzero(np.diff(at) > 1) + 1)
    return [ticks[stretch] for stretch in stretches if len(stretch) > 2]


def _histogram(values_ms: FloatArray) -> list[tuple[float, int]]:
    counts, _ = np.histogram(values_ms * 1e3, _EDGES_US)
    return [(float(edge), int(n)) for edge, n in zip(_EDGES_US, counts, strict=False) if n]


def _busy(ticks: Records) -> FloatArray:
    busy: FloatArray = (ticks["t_sent_ns"] - ticks["t_woke_ns"]) / 1e6
    return busy


def _gaps(parts: list[Records], period_ms: float) -> tuple[FloatArray, dict[str, FloatArray]]:
    """Return the time from wake-up to wake-up, and what each part lost in the long ones, ms.

    ``bus`` is the driver's excess over its median, ``compute`` that of the rest of the tick, and
    ``loop`` what is left: the time in which this process was not run at all.
    """
    gaps, bus, compute = [], [], []
    for ticks in parts:
        send = ticks["send_ns"] / 1e6
        own = _busy(ticks) - send
        gap = np.diff(ticks["t_woke_ns"]) / 1e6
        gaps.append(gap)
        bus.append(np.maximum(0.0, send - np.median(send))[:-1])
        compute.append(np.maximum(0.0, own - np.median(own))[:-1])
    gap, by_bus, by_compute = (np.concatenate(x) for x in (gaps, bus, compute))
    lost = np.where(gap > _GAP_PERIODS * period_ms, gap - period_ms, 0.0)
    by_bus = np.minimum(by_bus, lost)
    by_compute = np.minimum(by_compute, lost - by_bus)
    return gap, {"loop": lost - by_bus - by_compute, "bus": by_bus, "compute": by_compute}


def _series(
    parts: list[Records], raws: list[Raw], period_ms: float
) -> list[tuple[float, float, float]]:
    """Return the worst lateness and jitter of every stretch of at least 0.1 s."""
    t0_ns = first_ns(raws[0])
    rows = []
    for ticks in parts:
        woke = ticks["t_woke_ns"]
        late = np.maximum(0, woke - ticks["t_planned_ns"])[1:] / 1e6
        jitter = np.abs(np.diff(woke) / 1e6 - period_ms)
        seconds = (woke[1:] - t0_ns) / 1e9
        width = max(0.1, float(seconds[-1] - seconds[0]) / 600)
        starts = np.flatnonzero(np.diff(np.floor(seconds / width), prepend=-np.inf))
        rows += [
            (round(float(s), 3), round(float(a), 4), round(float(b), 4))
            for s, a, b in zip(
                seconds[starts],
                np.maximum.reduceat(late, starts),
                np.maximum.reduceat(jitter, starts),
                strict=True,
            )
        ]
    return rows


def first_ns(raw: Raw) -> int:
    """Return the moment from which a report counts."""
    return int(raw.stamps["t_started_ns"][0]) if len(raw.stamps) else 0
