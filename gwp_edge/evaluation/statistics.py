"""Statistics of successes: how sure a rate is, and whether two bundles differ.

Episodes of one seed share scene and start pose, so they are not independent: intervals count as
many episodes as the design effect leaves, and the test turns whole seeds around.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from gwp_edge.errors import SpecError

_Z95: Final = 1.959963984540054
_SIGNIFICANT: Final = 0.05


def wilson_interval(n_success: float, n: float) -> tuple[float, float]:
    """Return the 95 % interval of a success rate (Wilson's score); (0, 1) where n is 0.

    Args:
        n_success: successes; a fraction where episodes count for less than one.
        n: episodes.

    Raises:
        SpecError: counts that make no sense.
    """
    if not 0 <= n_success <= n:
        raise SpecError(f"expected 0 to {n:g} successes, got {n_success:g}")
    if n == 0:
        return 0.0, 1.0
    p, z2 = n_success / n, _Z95**2
    centre = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = _Z95 * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n)) / (1 + z2 / n)
    low = 0.0 if n_success == 0 else max(0.0, centre - half)
    return low, 1.0 if n_success == n else min(1.0, centre + half)


def agresti_min_interval(n_lost: float, n_won: float, n: float) -> tuple[float, float]:
    """Return the 95 % interval of a difference of paired rates, won minus lost over n.

    Half a pair is added to each of the four cells before Wald's formula, so that few discordant
    pairs, or none, do not make the difference look certain.

    Args:
        n_lost: pairs in which only the first succeeded.
        n_won: pairs in which only the second did.
        n: pairs.

    Source: Agresti and Min (2005), Statistics in Medicine 24, 729-740, "Wald+2".
    """
    centre = (n_won - n_lost) / (n + 2)
    spread = math.sqrt(n_won + n_lost + 1 - (n_won - n_lost) ** 2 / (n + 2)) / (n + 2)
    return max(-1.0, centre - _Z95 * spread), min(1.0, centre + _Z95 * spread)


def design_effect(values: Sequence[float], clusters: Sequence[int]) -> float:
    """Return by how much clusters widen the variance of the mean of ``values``; at least 1.

    The ratio of the variance between sums over clusters to that of independent values (Kish).
    n values tell as much as n over this many independent ones.

    Args:
        values: one for each episode.
        clusters: which episodes belong together, by equal numbers.
    """
    x = np.asarray(values, np.float64)
    rest = x - x.mean()
    independent = float((rest**2).sum()) * len(x) / max(len(x) - 1, 1)
    _, which = np.unique(np.asarray(clusters), return_inverse=True)
    sums = np.bincount(which, weights=rest)
    if independent == 0 or len(sums) < 2:
        return 1.0
    clustered = float((sums**2).sum()) * len(sums) / (len(sums) - 1)
    return max(1.0, clustered / independent)


def sign_flip_p(changes: Sequence[int]) -> float:
    """Return the two-sided exact p-value of changes whose signs could as well be turned around.

    Where each change is -1, 0 or 1 it is McNemar's exact test.

    Args:
        changes: second minus first of each cluster, in successes.
    """
    ways = {0: 1}
    for size in (abs(change) for change in changes if change):
        longer: dict[int, int] = defaultdict(int)
        for total, n_ways in ways.items():
            longer[total + size] += n_ways
            longer[total - size] += n_ways
        ways = longer
    seen = abs(sum(changes))
    as_far = sum(n_ways for total, n_ways in ways.items() if abs(total) >= seen)
    return as_far / sum(ways.values())


@dataclass(frozen=True, slots=True, kw_only=True)
class PairedComparison:
    """Two bundles on the same episodes.

    Attributes:
        n: episodes.
        n_both: both succeeded.
        n_only_first: only the first did.
        n_only_second: only the second did.
        difference: success rate of the second minus that of the first.
        low: of its 95 % interval (Agresti-Min, with the design effect of the seeds).
        high: of it.
        p: exact, by turning around the signs of whole seeds.
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

    def is_within(self, margin: float) -> bool:
        """Return whether the whole interval lies within ``margin`` of 0: shown to be as good."""
        return -margin <= self.low and self.high <= margin


def compare_pairs(
    first: Sequence[bool], second: Sequence[bool], seeds: Sequence[int] | None = None
) -> PairedComparison:
    """Compare successes of two bundles, episode by episode.

    Args:
        first: successes of the bundle that is compared to.
        second: successes of the other one in the same episodes.
        seeds: of the episodes; None where each has its own.

    Raises:
        SpecError: different numbers of episodes, or none.
    """
    if len(first) != len(second) or not first:
        raise SpecError(f"expected equally many episodes, got {len(first)} and {len(second)}")
    if seeds is None:
        seeds = range(len(first))
    if len(seeds) != len(first):
        raise SpecError(f"expected a seed for each of {len(first)} episodes, got {len(seeds)}")
    a, b = np.array(first, bool), np.array(second, bool)
    change = b.astype(np.int64) - a
    by_seed: dict[int, int] = defaultdict(int)
    for seed, one in zip(seeds, change.tolist(), strict=True):
        by_seed[seed] += one
    n_lost, n_won = int((a & ~b).sum()), int((b & ~a).sum())
    effect = design_effect(change.tolist(), seeds)
    low, high = agresti_min_interval(n_lost / effect, n_won / effect, len(a) / effect)
    return PairedComparison(
        n=len(a),
        n_both=int((a & b).sum()),
        n_only_first=n_lost,
        n_only_second=n_won,
        difference=float(change.mean()),
        low=low,
        high=high,
        p=sign_flip_p(list(by_seed.values())),
    )
