"""Does a process grow? Its private memory, sampled, and one slope over all of its lives."""

from __future__ import annotations

import contextlib
from array import array
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np

WARM_UP_S: Final = 60.0
_LIFE_S: Final = 60.0
_PERIOD_S: Final = 2.0


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryGrowth:
    """Private memory (anonymous pages) of one process, or of one after another.

    Attributes:
        role: which process.
        slope_mb_per_10min: least-squares slope common to all lives, each with a level of its
            own; None where no life was long enough to tell.
        grown_mb: most that one life has gained at any time, single steps included; None where no
            life was longer than its warm-up.
        observed_s: length of the lives that count, warm-up left out.
        n_lives: how many those were.
        peak_mb: highest sample of all.
    """

    role: str
    slope_mb_per_10min: float | None
    grown_mb: float | None
    observed_s: float
    n_lives: int
    peak_mb: float


class MemoryWatch:
    """Samples processes by role. Threads: one owner."""

    def __init__(self, *, warm_up_s: float = WARM_UP_S, life_s: float = _LIFE_S) -> None:
        self._warm_up_s = warm_up_s
        self._life_s = life_s
        self._lives: dict[str, dict[int, tuple[array[float], array[float]]]] = {}
        self._t_next_s = 0.0

    def sample(self, now_s: float, pids: dict[str, int]) -> None:
        """Sample every process of ``pids``, by role, unless that was done a moment ago."""
        if now_s < self._t_next_s:
            return
        self._t_next_s = now_s + _PERIOD_S
        for role, pid in pids.items():
            kb = private_kb(pid) if pid else None
            if kb is not None:
                self.add(role, pid, now_s, kb)

    def add(self, role: str, life: int, t_s: float, kb: float) -> None:
        """Add one sample of the process that is known as ``life``."""
        times, values = self._lives.setdefault(role, {}).setdefault(life, (array("d"), array("d")))
        times.append(t_s)
        values.append(kb)

    def growth(self) -> tuple[MemoryGrowth, ...]:
        """Return the growth of every role."""
        return tuple(self._growth_of(role) for role in sorted(self._lives))

    def _growth_of(self, role: str) -> MemoryGrowth:
        sxx = sxy = observed_s = 0.0
        n_lives = 0
        gains_kb: list[float] = []
        for times, values in self._lives[role].values():
            t, kb = np.array(times), np.array(values)
            steady = t >= t[0] + self._warm_up_s
            t, kb = t[steady], kb[steady]
            if len(t):
                gains_kb.append(float(kb.max() - kb[0]))
            if len(t) < 3 or t[-1] - t[0] < self._life_s:
                continue
            n_lives += 1
            observed_s += float(t[-1] - t[0])
            sxx += float(((t - t.mean()) ** 2).sum())
            sxy += float(((t - t.mean()) * (kb - kb.mean())).sum())
        slope = sxy / sxx * 600.0 / 1024.0 if n_lives else None
        peak = max(max(values) for _, values in self._lives[role].values())
        return MemoryGrowth(
            role=role,
            slope_mb_per_10min=slope,
            grown_mb=max(gains_kb) / 1024.0 if gains_kb else None,
            observed_s=observed_s,
            n_lives=n_lives,
            peak_mb=peak / 1024.0,
        )


def private_kb(pid: int) -> float | None:
    """Return the anonymous resident memory of a process in kB, or None when it is gone."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        for line in Path(f"/proc/{pid}/status").read_text("ascii").splitlines():
            if line.startswith("RssAnon:"):
                return float(line.split()[1])
    return None
