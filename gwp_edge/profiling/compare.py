"""Two reports side by side, with bootstrap confidence intervals and a verdict only where due.

Two runs of one thing differ by more than the chunks inside of a run do: memory lies elsewhere, the
machine is warmer, another program wakes up. So a verdict needs at least three runs on either side,
of which whole runs are resampled, and it is given only for what was asked beforehand.

Profiles and benches have the same columns and the same context, so either is compared with either,
in what both have.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Final

import numpy as np
import numpy.typing as npt

from gwp_edge.errors import SpecError
from gwp_edge.profiling.columns import PREDICTION, SEGMENTS
from gwp_edge.profiling.reports import Report
from gwp_edge.types import FloatArray

_N_RESAMPLES: Final = 2000
_N_UNJUDGED: Final = 300
MIN_RUNS: Final = 3
_ERROR_PERCENT: Final = 5.0
# Chunks within some seconds of each other resemble each other: the same heat, the same neighbours.
_BLOCK_S: Final = 3.0
_MIN_BLOCKS: Final = 4
_N_DRAWS: Final = 200_000
# A percentile needs values beyond it: about this many over ten.
_MIN_VALUES: Final = {"mean": 10, "p50": 10, "p90": 40, "p95": 60, "p99": 100, "max": 2}
_QUANTILES: Final = {"p50": 50.0, "p90": 90.0, "p95": 95.0, "p99": 99.0, "max": 100.0}
_MAX_CELLS: Final = 4_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """One statistic of one quantity in both reports.

    Attributes:
        quantity: such as ``frame to command``.
        statistic: such as ``p99``.
        before_ms: in the first report.
        after_ms: in the second.
        change_percent: of the first.
        low_percent: lower end of the interval of the change.
        high_percent: upper end.
        level_percent: of the interval: 95, or more where several statistics are judged, so that all
            of their intervals together hold with 95 %.
        verdict: "slower", "faster", "no difference shown", "differs within these runs; repeat to
            know", "too few values", or "not judged": it was not asked for.
    """

    quantity: str
    statistic: str
    before_ms: float
    after_ms: float
    change_percent: float
    low_percent: float
    high_percent: float
    level_percent: float
    verdict: str


@dataclass(frozen=True, slots=True, kw_only=True)
class _Series:
    """Steady values of one quantity, ordered by run and time."""

    values: FloatArray
    run: npt.NDArray[np.int64]
    t_s: FloatArray

    @property
    def n_runs(self) -> int:
        return len(np.unique(self.run))


@dataclass(frozen=True, slots=True, kw_only=True)
class Gate:
    """A limit for the change of a statistic, such as ``p99=5%`` or ``prefill:p50=3%``."""

    statistic: str
    limit_percent: float
    quantity: str | None = None


def parse_gate(text: str) -> Gate:
    """Read a gate.

    Raises:
        SpecError: not of the form ``[QUANTITY:]STATISTIC=N%``.
    """
    found = re.fullmatch(r"(?:([a-z ]+):)?(mean|p50|p90|p95|p99)=(\d+(?:\.\d+)?)%", text)
    if found is None:
        raise SpecError(
            f"--fail-on {text!r}: expected [QUANTITY:]STATISTIC=N%, such as p99=5% or "
            "prefill:p50=3%; statistics are mean, p50, p90, p95, p99 (a run's max is chance)"
        )
    return Gate(quantity=found[1], statistic=found[2], limit_percent=float(found[3]))


def main_quantity(report: Report) -> str:
    """Return what a gate without a quantity is about."""
    known = _steady(report)
    names = ("frame to command", "predict", "chunk")
    return next(n for n in names if (n in known and len(known[n].values)) or n == names[-1])


def compare(
    before: Report, after: Report, *, gates: Sequence[Gate] = (), seed: int = 0
) -> list[Difference]:
    """Return every statistic of every quantity that both reports have.

    Judged are those of ``gates``, without any the p50 and p99 of the main quantity; among many
    that are looked at afterwards some always differ.

    Args:
        before: the first report.
        after: the second.
        gates: what is asked.
        seed: of the resampling.
    """
    rng = np.random.default_rng(seed)
    ours, theirs = _steady(before), _steady(after)
    main = main_quantity(after)
    judged = {(gate.quantity or main, gate.statistic) for gate in gates}
    judged = judged or {(main, "p50"), (main, "p99")}
    found: list[Difference] = []
    for quantity in ours:
        a, b = ours[quantity], theirs.get(quantity)
        if b is None or min(len(a.values), len(b.values)) < 2:
            continue
        if not np.any(a.values) or not np.any(b.values):
            continue
        n = _N_RESAMPLES if any(q == quantity for q, _ in judged) else _N_UNJUDGED
        samples = _statistics(_resampled(a, n, rng)), _statistics(_resampled(b, n, rng))
        for statistic in _MIN_VALUES:
            level = 100.0 - _ERROR_PERCENT
            if (quantity, statistic) in judged:
                level = 100.0 - _ERROR_PERCENT / len(judged)
            difference = _difference(quantity, statistic, (a, b), samples, level)
            if difference is not None:
                is_judged = (quantity, statistic) in judged
                verdict = _verdict(difference, a, b) if is_judged else "not judged"
                found.append(replace(difference, verdict=verdict))
    return found


def _difference(
    quantity: str,
    statistic: str,
    series: tuple[_Series, _Series],
    samples: tuple[dict[str, FloatArray], dict[str, FloatArray]],
    level_percent: float,
) -> Difference | None:
    """Return one difference without its verdict; None where the first is nothing."""
    before, after = (float(_statistics(s.values)[statistic]) for s in series)
    with np.errstate(divide="ignore", invalid="ignore"):
        # Ratios are even on a logarithmic scale: half and double are as far from no change.
        logs = np.log(samples[1][statistic] / samples[0][statistic])
    if before <= 0 or after <= 0 or not np.isfinite(logs).all():
        return None
    log_change = float(np.log(after / before))
    outside = (100 - level_percent) / 2
    low, high = (float(p) for p in np.percentile(logs, (outside, 100 - outside)))
    n_runs = [s.n_runs for s in series]
    if min(n_runs) >= MIN_RUNS:
        # Of few runs a resample repeats some, so its spread is too small by (n - 1) / n, and what
        # is left is as uncertain as a mean of few values: Student's distribution.
        n_least = min(n_runs)
        wide = _student(sum(n_runs) - 2, level_percent) * float(logs.std())
        wide *= (n_least / (n_least - 1)) ** 0.5
        low, high = log_change - wide, log_change + wide
    change, low, high = (100 * float(np.expm1(x)) for x in (log_change, low, high))
    return Difference(
        quantity=quantity,
        statistic=statistic,
        before_ms=before,
        after_ms=after,
        change_percent=change,
        low_percent=low,
        high_percent=high,
        level_percent=level_percent,
        verdict="not judged",
    )


@lru_cache
def _student(freedom: int, level_percent: float) -> float:
    """Return the half width of Student's distribution, by many draws: numpy has no inverse."""
    draws = np.abs(np.random.default_rng(0).standard_t(freedom, _N_DRAWS))
    return float(np.percentile(draws, level_percent))


def _verdict(d: Difference, a: _Series, b: _Series) -> str:
    if min(len(a.values), len(b.values)) < _MIN_VALUES[d.statistic]:
        return "too few values"
    if d.low_percent <= 0 <= d.high_percent:
        return "no difference shown"
    if min(a.n_runs, b.n_runs) < MIN_RUNS:
        return "differs within these runs; repeat to know"
    return "slower" if d.low_percent > 0 else "faster"


def failed_gates(gates: list[Gate], differences: list[Difference], main: str) -> list[str]:
    """Return one line for each gate that does not hold.

    A gate fails when the change is above its limit and the data shows that it is slower at all: a
    difference that chance explains is no regression.

    Raises:
        SpecError: the reports do not hold what a gate asks for, or too few runs of it, so it would
            say nothing.
    """
    failed = []
    if gates and not differences:
        raise SpecError("--fail-on: one of the reports has no steady chunks; measure longer")
    for gate in gates:
        quantity = gate.quantity or main
        match = [d for d in differences if (d.quantity, d.statistic) == (quantity, gate.statistic)]
        if not match:
            known = ", ".join(dict.fromkeys(d.quantity for d in differences))
            raise SpecError(f"--fail-on: no {gate.statistic} of {quantity!r} in both; try {known}")
        d = match[0]
        if d.verdict == "too few values":
            raise SpecError(
                f"--fail-on {gate.statistic}: {_MIN_VALUES[gate.statistic]} chunks are needed in "
                "each report; measure longer"
            )
        if d.verdict not in ("slower", "faster", "no difference shown"):
            raise SpecError(
                f"--fail-on {gate.statistic}: {quantity} differs by {d.change_percent:+.1f} %, and "
                f"two runs of one thing may, too; {MIN_RUNS} runs are needed in each report: "
                f"measure both with --repeat {MIN_RUNS}"
            )
        if d.verdict == "slower" and d.change_percent > gate.limit_percent:
            failed.append(
                f"{quantity} {gate.statistic}: {d.before_ms:.2f} to {d.after_ms:.2f} ms, "
                f"{d.change_percent:+.1f} % ({d.level_percent:g} %: {d.low_percent:+.1f} to "
                f"{d.high_percent:+.1f}), allowed +{gate.limit_percent:g} %"
            )
    return failed


def _steady(report: Report) -> dict[str, _Series]:
    """Return the steady chunks' values of every quantity."""
    chunks = report.chunks
    steady = np.array([phase == "steady" for phase in chunks.phase], bool)
    steady[list(chunks.extreme_rows)] = False
    columns = {
        "frame to command": chunks.frame_to_command_ms,
        "frame to chunk": chunks.frame_to_chunk_ms,
        **{name: chunks.segments_ms[name] for name in SEGMENTS if name in chunks.segments_ms},
        "replan interval": chunks.interval_ms,
    }
    values = {k: np.array(v, np.float64)[steady] for k, v in columns.items()}
    of_engine = [values[s] for s in PREDICTION if s in values]
    # A bench has fewer segments than a profile, so their sum is another thing.
    total = "predict" if len(of_engine) == len(PREDICTION) else "chunk"
    values[total] = np.sum(of_engine, axis=0)
    run, t_s = np.array(chunks.run, np.int64)[steady], np.array(chunks.t_s, np.float64)[steady]
    found = {}
    for name, column in values.items():
        known = ~np.isnan(column)
        order = np.lexsort((t_s[known], run[known]))
        found[name] = _Series(
            values=column[known][order], run=run[known][order], t_s=t_s[known][order]
        )
    return found


def _statistics(values: FloatArray) -> dict[str, FloatArray]:
    """Return every statistic over the last axis."""
    quantiles = np.percentile(values, list(_QUANTILES.values()), axis=-1)
    return {
        "mean": np.asarray(values.mean(axis=-1)),
        **dict(zip(_QUANTILES, quantiles, strict=True)),
    }


def _resampled(series: _Series, n_wanted: int, rng: np.random.Generator) -> FloatArray:
    """Return resamples, (resamples, n): whole runs, and within each of them circular blocks.

    Of fewer than ``MIN_RUNS`` every run is taken, so that only what is within them varies.
    """
    n, n_runs = len(series.values), series.n_runs
    n_resamples = max(200, min(n_wanted, _MAX_CELLS // n))
    begin, length = np.unique(series.run, return_index=True, return_counts=True)[1:]
    chosen = np.broadcast_to(np.arange(n_runs), (n_resamples, n_runs))
    if n_runs >= MIN_RUNS:
        chosen = rng.integers(0, n_runs, (n_resamples, n_runs))
    n_each = -(-n // n_runs)
    block = _block(series, int(length.min()))
    n_blocks = -(-n_each // block)
    # (resamples, runs, blocks, values of a block)
    of_run, first = length[chosen][:, :, None, None], begin[chosen][:, :, None, None]
    starts = (rng.random((n_resamples, n_runs, n_blocks, 1)) * of_run).astype(np.int64)
    idx = first + (starts + np.arange(block)) % of_run
    idx = idx.reshape(n_resamples, n_runs, -1)[:, :, :n_each].reshape(n_resamples, -1)
    sampled: FloatArray = series.values[idx]
    return sampled


def _block(series: _Series, n_least: int) -> int:
    """Return the chunks of some seconds, so few that the shortest run has several blocks."""
    apart_s = np.diff(series.t_s)[np.diff(series.run) == 0]
    each_s = float(np.median(apart_s)) if len(apart_s) else 0.0
    wanted = round(_BLOCK_S / each_s) if each_s > 0 else 1
    return max(1, min(wanted, n_least // _MIN_BLOCKS))
