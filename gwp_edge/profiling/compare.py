"""Two reports side by side, with bootstrap confidence intervals and a verdict only where due.

Profiles and benches have the same columns and the same context, so either is compared with either,
in what both have.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import msgspec
import numpy as np

from gwp_edge import bench
from gwp_edge.bench import BenchReport
from gwp_edge.errors import SpecError
from gwp_edge.profiling import schema
from gwp_edge.profiling.columns import GROUPS, SEGMENTS
from gwp_edge.profiling.schema import ProfileReport
from gwp_edge.types import FloatArray

_N_RESAMPLES: Final = 2000
_LEVEL: Final = (2.5, 97.5)
# A percentile needs values beyond it: about this many over ten.
_MIN_VALUES: Final = {"mean": 10, "p50": 10, "p90": 40, "p95": 60, "p99": 100, "max": 2}
_QUANTILES: Final = {"p50": 50.0, "p90": 90.0, "p95": 95.0, "p99": 99.0, "max": 100.0}
_N_ENGINE_SEGMENTS: Final = sum(group == "engine" for group in GROUPS.values())
_MAX_CELLS: Final = 4_000_000


Report = ProfileReport | BenchReport
_LAYOUTS: Final[dict[tuple[str, int], type[Report]]] = {
    (schema.SCHEMA, schema.SCHEMA_VERSION): ProfileReport,
    (bench.SCHEMA, bench.SCHEMA_VERSION): BenchReport,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """One statistic of one quantity in both reports.

    Attributes:
        quantity: such as ``frame to command``.
        statistic: such as ``p99``.
        before_ms: in the first report.
        after_ms: in the second.
        change_percent: of the first.
        low_percent: lower end of the 95 % interval of the change.
        high_percent: upper end.
        verdict: "slower", "faster", "no difference shown", or "too few values".
    """

    quantity: str
    statistic: str
    before_ms: float
    after_ms: float
    change_percent: float
    low_percent: float
    high_percent: float
    verdict: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Gate:
    """A limit for the change of a statistic, such as ``p99=5%`` or ``prefill:p50=3%``."""

    statistic: str
    limit_percent: float
    quantity: str | None = None


def read_report(path: Path) -> Report:
    """Read a profile or a bench.

    Raises:
        SpecError: it is not there, neither of them, or of another layout.
    """
    try:
        data = path.read_bytes()
    except OSError as e:
        raise SpecError(f"{path}: cannot be read: {e.strerror}") from e
    try:
        head = msgspec.json.decode(data)
        schema, version = head["schema"], head["schema_version"]
    except (msgspec.DecodeError, KeyError, TypeError, UnicodeDecodeError) as e:
        raise SpecError(
            f"{path}: is no report; make one with gwp-edge profile --json, or bench --json-file"
        ) from e
    layout = _LAYOUTS.get((schema, version))
    if layout is None:
        known = ", ".join(f"{name!r} {number}" for name, number in _LAYOUTS)
        raise SpecError(f"{path}: is {schema!r} version {version!r}, expected one of {known}")
    try:
        return msgspec.json.decode(data, type=layout)
    except (msgspec.ValidationError, msgspec.DecodeError) as e:
        raise SpecError(f"{path}: {e}; measure again with this gwp-edge") from e


def parse_gate(text: str) -> Gate:
    """Read a gate.

    Raises:
        SpecError: not of the form ``[QUANTITY:]STATISTIC=N%``.
    """
    found = re.fullmatch(r"(?:([a-z ]+):)?(mean|p50|p90|p95|p99|max)=(\d+(?:\.\d+)?)%", text)
    if found is None:
        raise SpecError(
            f"--fail-on {text!r}: expected [QUANTITY:]STATISTIC=N%, such as p99=5% or "
            f"prefill:p50=3%; statistics are {', '.join(_MIN_VALUES)}"
        )
    return Gate(quantity=found[1], statistic=found[2], limit_percent=float(found[3]))


def differs_in(before: Report, after: Report) -> list[str]:
    """Return what else differs between two reports and may explain a difference of times."""
    found = []
    if before.schema != after.schema:
        found.append(f"kind: {before.schema} and {after.schema}")
    for name in (
        "robot", "bundle_id", "precision", "engine", "provider", "threads", "n_steps", "motor_hz",
        "execution", "disturbances", "watched_by", "power_mode",
    ):  # fmt: skip
        a, b = getattr(before.context, name), getattr(after.context, name)
        if a != b:
            found.append(f"{name}: {a} and {b}")
    for name in ("cpu", "n_cpus", "governor", "system", "versions", "commit"):
        a, b = getattr(before.context.machine, name), getattr(after.context.machine, name)
        if a != b:
            found.append(f"{name}: {a} and {b}")
    return found


def main_quantity(report: Report) -> str:
    """Return what a gate without a quantity is about."""
    known = _steady(report)
    names = ("frame to command", "predict", "chunk")
    return next(name for name in names if len(known.get(name, ())) or name == names[-1])


def compare(before: Report, after: Report, *, seed: int = 0) -> list[Difference]:
    """Return every statistic of every quantity that both reports have.

    Chunks are resampled in blocks, as neighbours resemble each other: the block is the cube root of
    the count, which keeps slow drifts from looking like many independent values.
    """
    rng = np.random.default_rng(seed)
    ours, theirs = _steady(before), _steady(after)
    found: list[Difference] = []
    for quantity in ours:
        a, b = ours[quantity], theirs.get(quantity, np.empty(0))
        if len(a) < 2 or len(b) < 2 or not np.any(a) or not np.any(b):
            continue
        samples_a, samples_b = _resampled(a, rng), _resampled(b, rng)
        for statistic, least in _MIN_VALUES.items():
            value_a, value_b = float(_value(a, statistic)), float(_value(b, statistic))
            if value_a <= 0:
                continue
            ratio = _value(samples_b, statistic) / _value(samples_a, statistic)
            low, high = (float(p) for p in np.percentile(100 * (ratio - 1), _LEVEL))
            found.append(
                Difference(
                    quantity=quantity,
                    statistic=statistic,
                    before_ms=value_a,
                    after_ms=value_b,
                    change_percent=100 * (value_b / value_a - 1),
                    low_percent=low,
                    high_percent=high,
                    verdict=_verdict(low, high, min(len(a), len(b)), least, statistic),
                )
            )
    return found


def _verdict(low: float, high: float, n: int, least: int, statistic: str) -> str:
    if n < least or statistic == "max":  # a bootstrap knows nothing beyond the largest value
        return "too few values" if n < least else "not judged"
    if low > 0:
        return "slower"
    return "faster" if high < 0 else "no difference shown"


def failed_gates(gates: list[Gate], differences: list[Difference], main: str) -> list[str]:
    """Return one line for each gate that does not hold.

    A gate fails when the change is above its limit and the data shows that it is slower at all: a
    difference that chance explains is no regression.

    Raises:
        SpecError: the reports do not hold what a gate asks for, so it would say nothing.
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
        shown = d.verdict == "slower" or gate.statistic == "max"
        if shown and d.change_percent > gate.limit_percent:
            failed.append(
                f"{quantity} {gate.statistic}: {d.before_ms:.2f} to {d.after_ms:.2f} ms, "
                f"{d.change_percent:+.1f} % (95 %: {d.low_percent:+.1f} to "
                f"{d.high_percent:+.1f}), allowed +{gate.limit_percent:g} %"
            )
    return failed


def _steady(report: Report) -> dict[str, FloatArray]:
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
    of_engine = [values[s] for s in SEGMENTS if GROUPS[s] == "engine" and s in values]
    # A bench has fewer segments than a profile, so their sum is another thing.
    total = "predict" if len(of_engine) == _N_ENGINE_SEGMENTS else "chunk"
    values[total] = np.sum(of_engine, axis=0)
    return {k: v[~np.isnan(v)] for k, v in values.items()}


def _value(values: FloatArray, statistic: str) -> FloatArray:
    if statistic == "mean":
        return np.asarray(values.mean(axis=-1))
    return np.asarray(np.percentile(values, _QUANTILES[statistic], axis=-1))


def _resampled(values: FloatArray, rng: np.random.Generator) -> FloatArray:
    """Return resamples in circular blocks, (resamples, n)."""
    n = len(values)
    block = max(1, round(n ** (1 / 3)))
    n_blocks = -(-n // block)
    n_resamples = max(200, min(_N_RESAMPLES, _MAX_CELLS // n))
    starts = rng.integers(0, n, (n_resamples, n_blocks))
    idx = (starts[:, :, None] + np.arange(block)).reshape(n_resamples, -1)[:, :n] % n
    sampled: FloatArray = values[idx]
    return sampled
