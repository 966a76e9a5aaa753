"""Choose the clipping threshold of a tensor from the histogram of its magnitudes.

Every method answers with a threshold t, 0 < t <= amax, for symmetric ranges [-t, t]. Methods:

- ``minmax``: amax. Nothing is clipped; one outlier costs everyone resolution.
- ``percentile``: the smallest t that keeps the given share of all values, zeros included.
- ``mse``: the t with the least squared error of the quantized values, clipping included.
- ``entropy``: the t whose quantized distribution is nearest to the original one (KL divergence),
  as TensorRT's and MXNet's calibrators do; zeros do not count.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from typing import Literal

import ml_dtypes
import numpy as np
import numpy.typing as npt

from gwp_edge.calibration.arithmetic import FORMAT_MAX, NumberFormat
from gwp_edge.calibration.histogram import Histogram
from gwp_edge.errors import SpecError
from gwp_edge.types import FloatArray

Method = Literal["minmax", "percentile", "mse", "entropy"]

_N_CANDIDATES = 256
_TINY = 1e-12


@lru_cache(maxsize=2)
def _levels(number_format: NumberFormat) -> FloatArray:
    """Return the non-negative values of a format, ascending, scaled so that the last is 1."""
    if number_format == "int8":
        levels = np.arange(128, dtype=np.float64)
    else:
        codes = np.arange(127, dtype=np.uint8)  # 0x00 to 0x7e; 0x7f is NaN
        levels = codes.view(ml_dtypes.float8_e4m3fn).astype(np.float64)
    return levels / FORMAT_MAX[number_format]


def choose_threshold(
    histogram: Histogram,
    method: Method,
    *,
    percentile: float = 99.9,
    number_format: NumberFormat = "int8",
) -> float:
    """Return the clipping threshold; 0 only when nothing but zeros was seen.

    Args:
        histogram: magnitudes of the tensor.
        method: see the module.
        percentile: share of values kept by ``percentile``, percent in (0, 100].
        number_format: grid that ``mse`` and ``entropy`` minimise for.

    Raises:
        SpecError: an empty histogram, an unknown method or a percentile out of range.
    """
    if histogram.n_values == 0:
        raise SpecError("range: no activations were collected; run the calibration first")
    if histogram.exponent is None:
        return 0.0
    if method == "minmax":
        return histogram.amax
    if method == "percentile":
        return _percentile(histogram, percentile)
    if method == "mse":
        return _least(histogram, number_format, _squared_error)
    if method == "entropy":
        return _least(histogram, number_format, _divergence)
    raise SpecError(f"range: expected minmax, percentile, mse or entropy, got {method}")


def _percentile(histogram: Histogram, percentile: float) -> float:
    if not 0.0 < percentile <= 100.0:
        raise SpecError(f"percentile: expected a number in (0, 100], got {percentile}")
    cumulative = np.cumsum(histogram.counts) + histogram.n_zeros
    idx = int(np.searchsorted(cumulative, percentile / 100.0 * histogram.n_values - 0.5))
    # With zeros in the majority the rank may fall before the first bin in use.
    idx = max(idx, int(np.flatnonzero(histogram.counts)[0]))
    return min((idx + 1) * histogram.bin_width, histogram.amax)


def _least(
    histogram: Histogram,
    number_format: NumberFormat,
    cost: Callable[[Histogram, int, float, NumberFormat], float],
) -> float:
    """Return the threshold of least cost among candidates on bin edges and amax."""
    n_used = int(np.flatnonzero(histogram.counts)[-1]) + 1
    # Below 128 bins the histogram is coarser than the codes and cannot judge a candidate.
    n_kept = np.unique(np.linspace(min(128, n_used), n_used, _N_CANDIDATES).astype(np.int64))
    best, best_cost = histogram.amax, math.inf
    # Widest first and strictly better: on a tie nothing is clipped.
    for n in n_kept[::-1]:
        threshold = min(float(n) * histogram.bin_width, histogram.amax)
        if (value := cost(histogram, int(n), threshold, number_format)) < best_cost:
            best, best_cost = threshold, value
    return best


def _code(
    histogram: Histogram, threshold: float, number_format: NumberFormat
) -> npt.NDArray[np.intp]:
    """Return the index of the nearest level for every bin's centre; saturates at the last."""
    levels = _levels(number_format)
    return np.searchsorted((levels[1:] + levels[:-1]) / 2, histogram.centers / threshold)


def _squared_error(
    histogram: Histogram, n_kept: int, threshold: float, number_format: NumberFormat
) -> float:
    del n_kept
    back = _levels(number_format)[_code(histogram, threshold, number_format)] * threshold
    return float((histogram.counts * (histogram.centers - back) ** 2).sum())


def _divergence(
    histogram: Histogram, n_kept: int, threshold: float, number_format: NumberFormat
) -> float:
    """Return KL(P || Q): P piles clipped values up at the threshold, Q spreads every code's mass.

    Q spreads over those bins of a code that hold anything, and knows nothing of what was clipped:
    that difference is what clipping costs.
    """
    kept = histogram.counts[:n_kept].astype(np.float64)
    p = kept.copy()
    p[-1] += float(histogram.counts[n_kept:].sum())
    code = _code(histogram, threshold, number_format)[:n_kept]
    filled = (kept > 0).astype(np.float64)
    mass, width = np.bincount(code, weights=kept), np.bincount(code, weights=filled)
    q = np.where(filled > 0, (mass / np.maximum(width, 1.0))[code], 0.0)
    if q.sum() == 0.0:
        return math.inf
    p, q = p / p.sum(), np.maximum(q / q.sum(), _TINY)
    used = p > 0
    return float((p[used] * np.log(p[used] / q[used])).sum())
