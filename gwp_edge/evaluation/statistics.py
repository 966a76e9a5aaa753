"""Statistics of successes: how sure a rate is, and whether two bundles differ."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from gwp_edge.errors import SpecError

_Z95: Final = 1.959963984540054
_N_RESAMPLES: Final = 10_000
_SIGNIFICANT: Final = 0.05


def wilson_interval(n_success: int, n: int) -> tuple[float, float]:
    """Return the 95 % interval of a success rate (Wilson's score); (0, 1) where n is 0.

    Raises:
        SpecError: counts that make no sense.
    """
    if not 0 <= n_success <= n:
        raise SpecError(f"expected 0 to {n} successes, got {n_success}")
    if n == 0:
        return 0.0, 1.0
    p, z2 = n_success / n, _Z95**2
    centre = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = _Z95 * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n)) / (1 + z2 / n)
    return max(0.0, centre - half), min(1.0, centre + half)


def mcnemar_p(n_only_first: int, n_only_second: int) -> float:
    """Return the two-sided exact p-value of McNemar's test on discordant pairs."""
    n = n_only_first + n_only_second
    if n == 0:
        return 1.0
    tail = sum(math.comb(n, k) for k in range(min(n_only_first, n_only_second) + 1))
    return min(1.0, 2.0 * tail / 2.0**n)


@dataclass(frozen=True, slots=True, kw_only=True)
class PairedComparison:
    """Two bundles on the same episodes.

    Attributes:
        n: episodes.
        n_both: both succeeded.
        n_only_first: only the first did.
        n_only_second: only the second did.
        difference: success rate of the second minus that of the first.
        low: of its 95 % interval (bootstrap over pairs).
        high: of it.
        p: exact McNemar.
    """

    n: int
    n_both: int
    n_only_first: int
    n_only_second: int
    difference: float
    low: float
    high: float
    p: float

    @property
    def verdict(self) -> str:
        """What the data allows to say."""
        if self.p < _SIGNIFICANT:
            return "better" if self.difference > 0 else "worse"
        return "no difference shown"


def compare_pairs(first: Sequence[bool], second: Sequence[bool]) -> PairedComparison:
    """Compare successes of two bundles, episode by episode.

    Raises:
        SpecError: different numbers of episodes, or none.
    """
    if len(first) != len(second) or not first:
        raise SpecError(f"expected equally many episodes, got {len(first)} and {len(second)}")
    a, b = np.array(first, bool), np.array(second, bool)
    change = b.astype(np.float64) - a
    rng = np.random.default_rng(0)
    # Resampled in slices, so that thousands of episodes need little memory.
    means = np.concatenate(
        [
            change[rng.integers(len(change), size=(_N_RESAMPLES // 10, len(change)))].mean(axis=1)
            for _ in range(10)
        ]
    )
    low, high = np.quantile(means, (0.025, 0.975))
    only_first, only_second = int((a & ~b).sum()), int((b & ~a).sum())
    return PairedComparison(
        n=len(a),
        n_both=int((a & b).sum()),
        n_only_first=only_first,
        n_only_second=only_second,
        difference=float(change.mean()),
        low=float(low),
        high=float(high),
        p=mcnemar_p(only_first, only_second),
    )
