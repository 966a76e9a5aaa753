"""A histogram of magnitudes whose range grows without losing a count.

The bin width is always a power of two, so that growing the range adds up neighbouring bins and
nothing is ever moved across an edge. The counts therefore do not depend on the order in which
values came, and merging the histograms of two runs equals one run over both.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from gwp_edge.errors import SpecError
from gwp_edge.types import Float32Array, FloatArray

N_BINS = 4096
# Values below 2**-60 share the first bin; they are zero to every number format we quantize to.
_EXPONENT_MIN = -60
# Values are counted in blocks that stay in the cache: ten times faster than all at once.
_BLOCK = 1 << 16


class Histogram:
    """Counts of |x| over ``n_bins`` bins of [0, 2**exponent). Threads: one owner.

    The largest value seen always lies in the upper half of the range, so at least n_bins / 2
    bins resolve it. Zeros are counted apart: they are exact in every format.

    Attributes:
        n_bins: number of bins, a power of two.
        exponent: the range ends at 2**exponent; None until a value other than zero was seen.
        counts: int64, shape (n_bins,).
        n_zeros: values that were exactly zero.
        amax: largest magnitude seen.
    """

    def __init__(self, n_bins: int = N_BINS) -> None:
        if n_bins < 256 or n_bins & (n_bins - 1):
            raise SpecError(f"histogram: expected a power of two from 256 bins up, got {n_bins}")
        self.n_bins = n_bins
        self.exponent: int | None = None
        self.counts: npt.NDArray[np.int64] = np.zeros(n_bins, np.int64)
        self.n_zeros = 0
        self.amax = 0.0

    @classmethod
    def of(cls, x: npt.ArrayLike, *, name: str = "tensor", n_bins: int = N_BINS) -> Histogram:
        """Return the histogram of one batch.

        Args:
            x: values of any shape; converted to float32.
            name: the tensor's name, for the error.
            n_bins: number of bins.

        Raises:
            SpecError: the batch is empty or holds NaN or infinity.
        """
        histogram = cls(n_bins)
        values = np.asarray(x, dtype=np.float32).ravel()
        if values.size == 0:
            raise SpecError(f"{name}: expected activations, got an empty batch")
        # NaN and infinity both survive max, so no pass of its own looks for them.
        amax = float(np.maximum(values.max(), -values.min()))
        if not math.isfinite(amax):
            n_bad = int(np.count_nonzero(~np.isfinite(values)))
            raise SpecError(
                f"{name}: {n_bad} of {values.size} activations are not finite; "
                "check the checkpoint and the sample before calibrating"
            )
        histogram.n_zeros = values.size - int(np.count_nonzero(values))
        if amax > 0.0:
            histogram.amax = amax
            # frexp: amax = m * 2**e with 0.5 <= m < 1, so amax lies strictly inside.
            exponent = histogram.exponent = max(math.frexp(amax)[1], _EXPONENT_MIN)
            histogram.counts = _count(values, n_bins, exponent)
            histogram.counts[0] -= histogram.n_zeros
        return histogram

    @property
    def n_values(self) -> int:
        """Number of values seen, zeros included."""
        return int(self.counts.sum()) + self.n_zeros

    @property
    def bin_width(self) -> float:
        """Width of a bin; 0 while only zeros were seen."""
        return 0.0 if self.exponent is None else 2.0**self.exponent / self.n_bins

    @property
    def centers(self) -> FloatArray:
        """Middle of every bin, shape (n_bins,)."""
        return np.asarray((np.arange(self.n_bins) + 0.5) * self.bin_width, dtype=np.float64)

    def add(self, other: Histogram) -> None:
        """Add the counts of ``other``; exact, whatever the two ranges are.

        Raises:
            SpecError: the numbers of bins differ.
        """
        if other.n_bins != self.n_bins:
            raise SpecError(
                f"histograms of {self.n_bins} and {other.n_bins} bins cannot be merged; "
                "collect both with the same number"
            )
        self.n_zeros += other.n_zeros
        self.amax = max(self.amax, other.amax)
        if other.exponent is None:
            return
        counts = other.counts
        if self.exponent is None:
            self.exponent, self.counts = other.exponent, counts.copy()
            return
        grown = max(self.exponent, other.exponent)
        self.counts = _coarsen(self.counts, grown - self.exponent) + _coarsen(
            counts, grown - other.exponent
        )
        self.exponent = grown

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-ready record; trailing empty bins are left out."""
        used = int(np.flatnonzero(self.counts)[-1]) + 1 if self.counts.any() else 0
        return {
            "n_bins": self.n_bins,
            "exponent": self.exponent,
            "n_zeros": self.n_zeros,
            "amax": self.amax,
            "counts": self.counts[:used].tolist(),
        }

    @classmethod
    def from_dict(cls, record: dict[str, Any]) -> Histogram:
        """Read what :meth:`to_dict` wrote.

        Raises:
            SpecError: the record contradicts itself.
        """
        try:
            histogram = cls(int(record["n_bins"]))
            counts = np.asarray(record["counts"], dtype=np.int64)
            exponent, amax = record["exponent"], float(record["amax"])
            histogram.n_zeros = int(record["n_zeros"])
        except (KeyError, TypeError, ValueError, OverflowError) as e:
            raise SpecError(
                f"calibration record: unreadable histogram ({e}); calibrate again"
            ) from e
        histogram.exponent, histogram.amax = None if exponent is None else int(exponent), amax
        limit = 0.0 if exponent is None else 2.0 ** int(exponent)
        if (
            counts.ndim != 1
            or counts.size > histogram.n_bins
            or (counts < 0).any()
            or histogram.n_zeros < 0
            or (exponent is None) != (counts.size == 0)
            or not (0 < amax < limit or (exponent is None and amax == 0))
        ):
            raise SpecError("calibration record: a histogram contradicts itself; calibrate again")
        histogram.counts[: counts.size] = counts
        return histogram


def _count(values: Float32Array, n_bins: int, exponent: int) -> npt.NDArray[np.int64]:
    """Return the counts of |values|, all below 2**exponent, zeros in the first bin."""
    # Multiplying by a power of two is exact, so no value crosses an edge by rounding.
    scale = np.float32(2.0 ** (n_bins.bit_length() - 1 - exponent))
    counts = np.zeros(n_bins, np.int64)
    scaled = np.empty(_BLOCK, np.float32)
    bins = np.empty(_BLOCK, np.intp)
    for start in range(0, values.size, _BLOCK):
        block = values[start : start + _BLOCK]
        n = block.size
        np.abs(block, out=scaled[:n])
        np.multiply(scaled[:n], scale, out=scaled[:n])
        bins[:n] = scaled[:n]
        counts += np.bincount(bins[:n], minlength=n_bins)
    return counts


def _coarsen(counts: npt.NDArray[np.int64], doublings: int) -> npt.NDArray[np.int64]:
    """Return the counts over a range 2**doublings times as wide."""
    n_bins = counts.size
    # From here on everything lies in the first bin.
    doublings = min(doublings, n_bins.bit_length() - 1)
    if doublings == 0:
        same: npt.NDArray[np.int64] = counts.copy()
        return same
    out = np.zeros(n_bins, np.int64)
    out[: n_bins >> doublings] = counts.reshape(-1, 1 << doublings).sum(axis=1)
    return out
