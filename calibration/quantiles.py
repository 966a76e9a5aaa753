"""Exact order statistics of a stream of float32 rows, in two passes and bounded memory.

A float32 maps to a 32-bit key of the same order. The first pass counts the upper 16 bits of every
key; that tells which block of keys holds each wanted rank. The second pass counts the lower
16 bits inside those blocks, which leaves the exact value. Memory is a few megabytes however long
the stream is, and nothing is approximated.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from gwp_edge.errors import SpecError
from gwp_edge.types import Float32Array, FloatArray

_N_HALF = 1 << 16


def _keys(rows: Float32Array) -> npt.NDArray[np.uint32]:
    """Return unsigned keys in the order of the floats."""
    bits = np.ascontiguousarray(rows, dtype=np.float32).view(np.uint32)
    # Negative floats sort backwards by their bits: invert them; put positive ones above.
    sign = bits >> np.uint32(31)
    flip = np.where(sign == 1, np.uint32(0xFFFFFFFF), np.uint32(0x80000000))
    return np.asarray(bits ^ flip, dtype=np.uint32)


def _values(keys: npt.NDArray[np.uint32]) -> Float32Array:
    sign = keys >> np.uint32(31)
    flip = np.where(sign == 1, np.uint32(0x80000000), np.uint32(0xFFFFFFFF))
    values: Float32Array = np.asarray(keys ^ flip, dtype=np.uint32).view(np.float32)
    return values


class QuantileSelector:
    """Quantiles of D columns. Threads: one owner.

    Feed all rows to :meth:`count`, then the same rows, in any order and batching, to
    :meth:`refine`, then ask :meth:`quantiles`.
    """

    def __init__(self, n_channels: int, quantiles: Sequence[float]) -> None:
        self._quantiles = tuple(quantiles)
        self._upper = np.zeros((n_channels, _N_HALF), np.int64)
        # One table of lower halves for every block that holds a wanted rank, by channel.
        self._blocks: list[dict[int, npt.NDArray[np.int64]]] = []
        self._n_refined = 0

    @property
    def n_rows(self) -> int:
        """Rows counted in the first pass."""
        return int(self._upper[0].sum())

    def count(self, rows: Float32Array) -> None:
        """First pass over ``rows``, shape (n, D), finite."""
        upper = (_keys(rows) >> np.uint32(16)).astype(np.int64)
        for channel in range(upper.shape[1]):
            self._upper[channel] += np.bincount(upper[:, channel], minlength=_N_HALF)

    def refine(self, rows: Float32Array) -> None:
        """Second pass over the same rows."""
        if not self._blocks:
            self._blocks = [
                {int(b): np.zeros(_N_HALF, np.int64) for b in self._block_of(channel)}
                for channel in range(len(self._upper))
            ]
        keys = _keys(rows)
        upper, lower = keys >> np.uint32(16), (keys & np.uint32(0xFFFF)).astype(np.int64)
        for channel, blocks in enumerate(self._blocks):
            for block, table in blocks.items():
                inside = lower[upper[:, channel] == block, channel]
                table += np.bincount(inside, minlength=_N_HALF)
        self._n_refined += len(rows)

    def quantiles(self) -> FloatArray:
        """Return the quantiles, shape (quantiles, D), linearly interpolated as numpy does.

        Raises:
            SpecError: nothing was counted, or the two passes saw different rows.
        """
        if self.n_rows == 0 or self._n_refined != self.n_rows:
            raise SpecError(
                f"quantiles: counted {self.n_rows} rows, then {self._n_refined}; "
                "the data changed between the passes"
            )
        out = np.empty((len(self._quantiles), len(self._upper)), np.float64)
        for i, q in enumerate(self._quantiles):
            low, high, share = self._ranks(q)
            for channel in range(len(self._upper)):
                a, b = self._select(channel, low), self._select(channel, high)
                out[i, channel] = np.float32(a + (b - a) * share)
        return out

    def _ranks(self, q: float) -> tuple[int, int, float]:
        position = q * (self.n_rows - 1)
        low = int(np.floor(position))
        return low, min(low + 1, self.n_rows - 1), position - low

    def _block_of(self, channel: int) -> npt.NDArray[np.intp]:
        ranks = sorted({r for q in self._quantiles for r in self._ranks(q)[:2]})
        return np.unique(np.searchsorted(np.cumsum(self._upper[channel]), ranks, side="right"))

    def _select(self, channel: int, rank: int) -> float:
        """Return the value of a rank, counted from 0."""
        cumulative = np.cumsum(self._upper[channel])
        block = int(np.searchsorted(cumulative, rank, side="right"))
        inside = np.cumsum(self._blocks[channel][block])
        offset = rank - (int(cumulative[block]) - int(self._upper[channel][block]))
        lower = int(np.searchsorted(inside, offset, side="right"))
        if lower >= _N_HALF:
            raise SpecError("quantiles: the data changed between the two passes")
        key = np.array([(block << 16) | lower], dtype=np.uint32)
        return float(_values(key)[0])
