"""What counts of successes allow to say: intervals, paired differences, shared seeds."""

from __future__ import annotations

import pytest

from gwp_edge.errors import SpecError
from gwp_edge.evaluation.statistics import (
    agresti_min_interval,
    compare_pairs,
    design_effect,
    sign_flip_p,
    wilson_interval,
)


def test_wilson_interval_equals_published_values() -> None:
    # Wilson (1927) by hand: 10 of 10 gives 0.7225, 0 of 10 mirrors it, 50 of 100 is symmetric.
    low, high = wilson_interval(10, 10)
    assert (low, high) == pytest.approx((0.72246, 1.0), abs=1e-5)
    assert wilson_interval(0, 10) == pytest.approx((0.0, 0.27754), abs=1e-5)
    assert wilson_interval(50, 100) == pytest.approx((0.40383, 0.59617), abs=1e-5)
    assert wilson_interval(0, 0) == (0.0, 1.0)
    assert wilson_interval(0, 25)[0] == 0.0  # was 1.4e-17
    assert wilson_interval(25, 25)[1] == 1.0


def test_wilson_interval_of_impossible_counts_is_refused() -> None:
    with pytest.raises(SpecError, match="expected 0 to 3 successes, got 4"):
        wilson_interval(4, 3)


def test_paired_interval_equals_published_values_and_is_never_of_width_zero() -> None:
    # Cavo et al. (2012) in Fagerland et al., "Statistical Analysis of Contingency Tables", 8.3:
    # 6 and 16 discordant of 161 pairs, -0.0621 (-0.1182 to -0.0045).
    assert agresti_min_interval(16, 6, 161) == pytest.approx((-0.1182, -0.0045), abs=5e-5)
    low, high = agresti_min_interval(0, 0, 200)
    assert high == -low == pytest.approx(1.959964 / 202, abs=1e-6)
    assert agresti_min_interval(0, 3, 3)[1] == 1.0  # the formula alone would go beyond


def test_no_discordant_pair_leaves_an_interval() -> None:
    """The bootstrap gave +0.0 to +0.0 here, as if two runs of 100 episodes proved equality."""
    same = compare_pairs([True] * 90 + [False] * 10, [True] * 90 + [False] * 10)
    assert (same.n_only_first, same.n_only_second, same.difference) == (0, 0, 0.0)
    assert same.low == pytest.approx(-0.0192, abs=1e-4)
    assert same.is_within(0.02)
    assert not same.is_within(0.01)
    assert not compare_pairs([True] * 10, [True] * 10).is_within(0.03)


def test_sign_flips_of_single_pairs_are_mcnemar_s_exact_test() -> None:
    assert sign_flip_p([]) == sign_flip_p([0, 0]) == 1.0
    assert sign_flip_p([-1] * 5) == pytest.approx(2 / 2**5)
    assert sign_flip_p([1] * 8 + [-1] * 2) == pytest.approx(2 * (1 + 10 + 45) / 2**10)
    assert sign_flip_p([-1] * 8 + [1] * 2 + [0]) == sign_flip_p([1] * 8 + [-1] * 2)
    assert sign_flip_p([1, -1] * 4) == 1.0
    # Sums of +-2 +-2 +-1: 5, 3, 1, 1 and their opposites; only 5 is as far as 5.
    assert sign_flip_p([2, 2, 1]) == pytest.approx(2 / 8)


def test_episodes_that_share_a_seed_count_for_fewer() -> None:
    seeds = [*range(20), *range(20)]
    alike = [True] * 10 + [False] * 10
    # Twins say nothing new: 40 values are worth 20, up to the n - 1 of the two estimates.
    assert design_effect([*alike, *alike], seeds) == pytest.approx(2.0, rel=0.06)
    assert design_effect([*alike, *alike], range(40)) == pytest.approx(1.0)
    # Opposites would even count for more; they are not allowed to.
    assert design_effect([*alike, *(not x for x in alike)], seeds) == 1.0
    assert design_effect([True] * 40, seeds) == 1.0

    first, second = [True] * 40, [*([False] * 4 + [True] * 16)] * 2
    own, shared = compare_pairs(first, second), compare_pairs(first, second, seeds)
    assert own.difference == shared.difference == pytest.approx(-0.2)
    assert shared.low < own.low
    assert shared.high > own.high
    assert own.p == pytest.approx(2 / 2**8)
    assert shared.p == pytest.approx(2 / 2**4)
    assert (own.verdict, shared.verdict) == ("worse", "no difference shown")
    with pytest.raises(SpecError, match="a seed for each of 2 episodes, got 1"):
        compare_pairs([True, True], [True, True], [0])


def test_pairs_with_a_clear_difference_are_judged_and_others_are_not() -> None:
    first = [True] * 40 + [False] * 10
    worse = compare_pairs(first, [True] * 20 + [False] * 30)
    assert (worse.n_both, worse.n_only_first, worse.n_only_second) == (20, 20, 0)
    assert worse.difference == pytest.approx(-0.4)
    assert worse.low < -0.4 < worse.high < 0
    assert worse.verdict == "worse"
    same = compare_pairs(first, [True] * 39 + [False] + [True] + [False] * 9)
    assert same.difference == 0
    assert same.low < 0 < same.high
    assert same.verdict == "no difference shown"
    assert compare_pairs(first, [True] * 50).verdict == "better"
    with pytest.raises(SpecError, match="equally many"):
        compare_pairs([True], [])
