"""What a profile and a bench both report: distributions, and stages against a machine's limits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import msgspec
import numpy as np
import numpy.typing as npt

from gwp_edge.machine_limits import Limits

_MIN_FOR_P999 = 1000


class Struct(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A frozen record that JSON can hold."""


class Summary(Struct, frozen=True, kw_only=True):
    """Exact percentiles of n values, ms. ``p999`` is None below 1000 values."""

    n: int
    mean: float
    p50: float
    p90: float
    p95: float
    p99: float
    p999: float | None
    max: float

    @classmethod
    def of(cls, values: npt.ArrayLike) -> Summary | None:
        """Compute it; NaN is no value, and None comes where there is none."""
        array = np.asarray(values, np.float64).ravel()
        array = array[~np.isnan(array)]
        if array.size == 0:
            return None
        p50, p90, p95, p99 = (float(p) for p in np.percentile(array, (50, 90, 95, 99)))
        enough = array.size >= _MIN_FOR_P999
        return cls(
            n=array.size,
            mean=float(array.mean()),
            p50=p50,
            p90=p90,
            p95=p95,
            p99=p99,
            p999=float(np.percentile(array, 99.9)) if enough else None,
            max=float(array.max()),
        )


class Times(msgspec.Struct, frozen=True, kw_only=True):
    """Distribution of n measured times, ms."""

    n: int
    p50_ms: float
    p95_ms: float
    p99_ms: float
    min_ms: float
    max_ms: float

    @classmethod
    def of(cls, times_ns: Sequence[int]) -> Times:
        """Compute it from times, ns."""
        ms = np.asarray(times_ns, dtype=np.float64) / 1e6
        p50, p95, p99 = (float(p) for p in np.percentile(ms, (50, 95, 99)))
        return cls(
            n=len(ms),
            p50_ms=p50,
            p95_ms=p95,
            p99_ms=p99,
            min_ms=float(ms.min()),
            max_ms=float(ms.max()),
        )


class StageReport(msgspec.Struct, frozen=True, kw_only=True):
    """One stage, or the whole chunk, against its limits.

    Attributes:
        times: what it took.
        gflop: operations, counted from the layers of the manifest.
        int8_gflop: those of them in int8 layers.
        mbyte: bytes read, counted likewise: weights and K/V caches, no activations.
        gflop_s: counted operations over measured time, at p50.
        gbyte_s: counted bytes over measured time, at p50.
        gemm_floor_ms: operations of every layer at the best measured rate of its format.
        memory_floor_ms: bytes at the measured streaming rate.
        ratio_to_gemm_floor: p50 over ``gemm_floor_ms``.
        percent_of_limit: the larger floor over p50; 100 is as fast as this machine can.
    """

    times: Times
    gflop: float
    int8_gflop: float
    mbyte: float
    gflop_s: float
    gbyte_s: float
    gemm_floor_ms: float
    memory_floor_ms: float
    ratio_to_gemm_floor: float
    percent_of_limit: float


class RooflineStage(Struct, frozen=True, kw_only=True):
    """One stage against the machine's limits.

    Attributes:
        bound: by the larger floor.
        ceiling_ms: that floor.
        left_ms: p50 less that.
        report: what it took and what it must do.
    """

    bound: Literal["compute", "memory"]
    ceiling_ms: float
    left_ms: float
    report: StageReport


class Roofline(Struct, frozen=True, kw_only=True):
    """Stages against the measured limits; ``why_not`` says why there is none."""

    limits: Limits | None
    stages: dict[str, RooflineStage]
    why_not: str | None = None
