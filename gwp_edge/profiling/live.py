"""Figures of a profile so far, kept up to date by the thread that drains the rings."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from gwp_edge.profiling.cameras import judge_camera
from gwp_edge.profiling.chunks import MOVING, moving
from gwp_edge.profiling.motor_report import skipped_periods
from gwp_edge.profiling.raw import LIMIT_FLAGS, Records
from gwp_edge.profiling.stamps import STAMP_DTYPE
from gwp_edge.status import TickFlag

# A wake-up later than this is counted as this late; the report at the end is exact.
_MAX_LATE_US: Final = 50_000
MAX_LATE_MS: Final = _MAX_LATE_US / 1e3
_LIMITED: Final = sum(int(flag) for flag in LIMIT_FLAGS)
# A camera's clock is known after some frames.
_MIN_STAMPS: Final = 30


@dataclass(frozen=True, slots=True, kw_only=True)
class Spread:
    """Percentiles of what was seen so far, ms."""

    n: int
    p50_ms: float
    p99_ms: float
    max_ms: float


@dataclass(frozen=True, slots=True, kw_only=True)
class LiveFigures:
    """A profile so far.

    Attributes:
        chunk: capture to published; the prediction where there is no camera.
        lateness: wake-up of the motor loop after its deadline, to 1 us; what is later than
            ``MAX_LATE_MS`` counts as that late.
        n_ticks: of the motor loop, on a plan.
        n_missed: periods that it skipped.
        n_limited: ticks in which a limit acted.
        n_not_sent: ticks without a command.
        missing: per camera, frames that were due and not there, and all that were due.
        hottest: name and degrees C of the hottest part, None where nothing tells.
        busiest_percent: load of the busiest core.
    """

    chunk: Spread | None
    lateness: Spread | None
    n_ticks: int
    n_missed: int
    n_limited: int
    n_not_sent: int
    missing: Mapping[str, tuple[int, int]]
    hottest: tuple[str, float] | None
    busiest_percent: float | None


LiveCallback = Callable[[LiveFigures], None]


class LiveFeed:
    """Takes records as they come and sums them up. Threads: one owner.

    Args:
        cameras: names in the order of the stamps; empty for the engine alone.
        motor_hz: asked rate of the motor loop.
    """

    def __init__(self, cameras: Sequence[str] = (), *, motor_hz: float = 200.0) -> None:
        self._period_ms = 1e3 / motor_hz
        self._t_planned_ns = 0
        self._cameras = tuple(cameras)
        self._chunk_ms: list[float] = []
        self._late_us = np.zeros(_MAX_LATE_US + 1, np.int64)
        self._n_ticks = self._n_missed = self._n_limited = self._n_not_sent = 0
        self._missing = dict.fromkeys(self._cameras, (0, 0))
        self._waiting = np.empty(0, STAMP_DTYPE)
        self._running = False

    def take_stamps(self, stamps: Records) -> None:
        """Take new chunks; those of the preflight are left out."""
        live = stamps[stamps["chunk_idx"] >= 0]
        begin = live["t_observed_ns"] if self._cameras else live["t_built_ns"]
        self._chunk_ms += ((live["t_published_ns"] - begin) / 1e6).tolist()
        if not self._running:
            return  # the loop waits for the arm, not for its cameras
        self._waiting = np.concatenate([self._waiting, live])
        if len(self._waiting) < _MIN_STAMPS:
            return
        for i, name in enumerate(self._cameras):
            judged = judge_camera(name, self._waiting, i)
            missing, expected = self._missing[name]
            self._missing[name] = (missing + judged.n_missing, expected + judged.n_expected)
        self._waiting = self._waiting[-1:]

    def take_ticks(self, ticks: Records) -> None:
        """Take new ticks; only those on a plan count."""
        all_ticks, ticks = ticks, moving(ticks)
        self._running = self._running or len(ticks) > 0
        late_us = np.clip((ticks["t_woke_ns"] - ticks["t_planned_ns"]) // 1000, 0, _MAX_LATE_US)
        np.add.at(self._late_us, late_us, 1)
        self._n_ticks += len(ticks)
        self._count_missed(all_ticks)
        flags = ticks["flags"]
        self._n_limited += int(((flags & _LIMITED) != 0).sum())
        self._n_not_sent += int(((flags & int(TickFlag.NOT_SENT)) != 0).sum())

    def _count_missed(self, ticks: Records) -> None:
        """Count between ticks that both followed a plan; a hold in between is no gap."""
        running = np.isin(ticks["mode"], MOVING)
        planned_ns = ticks["t_planned_ns"]
        if self._t_planned_ns:
            planned_ns = np.append(self._t_planned_ns, planned_ns)
            running = np.append(True, running)
        both = running[1:] & running[:-1]
        self._n_missed += int(skipped_periods(planned_ns, self._period_ms)[both].sum())
        self._t_planned_ns = int(planned_ns[-1]) if len(running) and running[-1] else 0

    def figures(self, system: Mapping[str, float]) -> LiveFigures:
        """Return what is known; ``system`` is the newest sample."""
        heat = {k[:-2]: v for k, v in system.items() if k.endswith("_c")}
        loads = [v for k, v in system.items() if k.startswith("cpu") and k.endswith("_percent")]
        hottest = max(heat, key=lambda k: heat[k]) if heat else None
        return LiveFigures(
            chunk=_spread(self._chunk_ms),
            lateness=_spread_of_counts(self._late_us),
            n_ticks=self._n_ticks,
            n_missed=self._n_missed,
            n_limited=self._n_limited,
            n_not_sent=self._n_not_sent,
            missing=dict(self._missing),
            hottest=(hottest, heat[hottest]) if hottest is not None else None,
            busiest_percent=max(loads, default=None),
        )


def _spread(values_ms: list[float]) -> Spread | None:
    if not values_ms:
        return None
    p50, p99, top = (float(p) for p in np.percentile(values_ms, (50, 99, 100)))
    return Spread(n=len(values_ms), p50_ms=p50, p99_ms=p99, max_ms=top)


def _spread_of_counts(counts_us: npt.NDArray[np.int64]) -> Spread | None:
    """Return it from counts of whole us: the value at each rank, nothing in between."""
    total = np.cumsum(counts_us)
    n = int(total[-1])
    if n == 0:
        return None
    ranks = [int(np.ceil(q * n)) for q in (0.5, 0.99, 1.0)]
    p50, p99, top = (float(np.searchsorted(total, rank)) / 1e3 for rank in ranks)
    return Spread(n=n, p50_ms=p50, p99_ms=p99, max_ms=top)
