"""What the samples of the system say: its columns, its buses, and who kept the cores busy."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

from gwp_edge.profiling.chunks import steady_window_ns
from gwp_edge.profiling.motor_report import first_ns
from gwp_edge.profiling.raw import Raw
from gwp_edge.profiling.schema import BusReport, LoadReport, SystemReport
from gwp_edge.profiling.system_sampler import CAN_COUNTERS, SystemSamples

_CORE = re.compile(r"cpu\d+_percent")
# Of these the smallest value is the one to look at.
_SCARCE = ("MemAvailable_mb", "SwapFree_mb")


def system_report(raws: list[Raw], *, warmup_s: float) -> SystemReport | None:
    """Return what the system did over all runs, or None where nothing was sampled."""
    samples = [raw.system for raw in raws if raw.system is not None and raw.system.t_ns]
    if not samples:
        return None
    t0_ns = first_ns(raws[0])
    rows = [row for s in samples for row in s.rows]
    names = sorted({name for row in rows for name in row})
    columns = {
        name: [round(row[name], 3) if name in row else None for row in rows] for name in names
    }
    return SystemReport(
        t_s=[round((t - t0_ns) / 1e9, 3) for s in samples for t in s.t_ns],
        columns=columns,
        worst={name: _worst(name, values) for name, values in columns.items()},
        load=load_report(raws, warmup_s=warmup_s),
        throttled=tuple(dict.fromkeys(part for s in samples for part in s.throttled)),
        buses=_buses(samples),
        source=samples[-1].sources,
    )


def _worst(name: str, values: Sequence[float | None]) -> float:
    known = [v for v in values if v is not None]
    return min(known) if name in _SCARCE or name.endswith("_mhz") else max(known)


def load_report(raws: list[Raw], *, warmup_s: float) -> LoadReport | None:
    """Return who kept the cores busy in the steady phases; None without samples of them."""
    total, own, n_cores = [], [], 0
    for raw in raws:
        if raw.system is None:
            continue
        begin_ns, end_ns = steady_window_ns(raw, warmup_s)
        for t_ns, row in zip(raw.system.t_ns, raw.system.rows, strict=True):
            cores = [v for k, v in row.items() if _CORE.fullmatch(k)]
            mine = [v for k, v in row.items() if k.endswith("_cpu_percent")]
            if begin_ns <= t_ns <= end_ns and cores and mine:
                n_cores = max(n_cores, len(cores))
                total.append(sum(cores))
                own.append(sum(mine))
    if not total:
        return None
    # The kernel rounds a process's time to ticks, so single samples may come out below nothing.
    mean_total, mean_own = float(np.mean(total)), float(np.mean(own))
    return LoadReport(
        n_cores=n_cores,
        total_percent=mean_total,
        own_percent=mean_own,
        others_percent=max(0.0, mean_total - mean_own),
    )


def _buses(samples: Sequence[SystemSamples]) -> tuple[BusReport, ...]:
    """Return how much every counter of every bus grew, runs added up."""
    grown: dict[str, dict[str, int]] = {}
    for run in samples:
        first, last = run.rows[0], run.rows[-1]
        for key in last:
            name, _, counter = key.partition("_")
            if counter in CAN_COUNTERS and key in first:
                counts = grown.setdefault(name, {})
                counts[counter] = counts.get(counter, 0) + int(last[key] - first[key])
    return tuple(BusReport(name=name, counts=counts) for name, counts in grown.items())
