"""Histograms, thresholds and observers: what must hold for every tensor."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from gwp_edge.calibration.arithmetic import fake_quantize, scale_for
from gwp_edge.calibration.histogram import Histogram
from gwp_edge.calibration.observers import ChannelObserver, TensorObserver
from gwp_edge.calibration.thresholds import choose_threshold
from gwp_edge.errors import SpecError

METHODS = ["minmax", "percentile", "mse", "entropy"]
FLOATS = st.floats(-(2.0**70), 2.0**70, width=32)
BATCH = hnp.arrays(np.float32, st.integers(1, 40), elements=FLOATS)
BATCHES = st.lists(BATCH, min_size=1, max_size=6)


def merged(batches):
    histogram = Histogram(256)
    for batch in batches:
        histogram.add(Histogram.of(batch, n_bins=256))
    return histogram


@settings(deadline=None)
@given(batches=BATCHES, seed=st.integers(0, 9))
def test_histogram_merge_equals_single_pass_in_any_order(batches, seed):
    order = np.random.default_rng(seed).permutation(len(batches))
    single = Histogram.of(np.concatenate(batches), n_bins=256).to_dict()
    assert merged(batches).to_dict() == single
    assert merged([batches[i] for i in order]).to_dict() == single


@settings(deadline=None)
@given(batches=BATCHES)
def test_histogram_counts_every_value_in_the_bin_that_holds_it(batches):
    histogram, values = merged(batches), np.abs(np.concatenate(batches)).astype(np.float64)
    assert histogram.n_values == values.size
    assert histogram.amax == values.max()
    nonzero = values[values > 0]
    assert histogram.n_zeros == values.size - nonzero.size
    if nonzero.size and histogram.amax > 2.0**-60:
        assert histogram.amax >= histogram.n_bins / 2 * histogram.bin_width
        edges = np.arange(257) * histogram.bin_width
        np.testing.assert_array_equal(histogram.counts, np.histogram(nonzero, edges)[0])


def test_histogram_of_a_batch_beyond_one_block_counts_all():
    x = np.random.default_rng(0).standard_normal(200_001).astype(np.float32)
    histogram = Histogram.of(x)
    edges = np.arange(4097) * histogram.bin_width
    np.testing.assert_array_equal(histogram.counts, np.histogram(np.abs(x), edges)[0])
    assert histogram.n_values == x.size


@settings(deadline=None)
@given(batches=BATCHES)
def test_histogram_json_round_trip_is_exact(batches):
    histogram = merged(batches)
    record = json.loads(json.dumps(histogram.to_dict()))
    assert Histogram.from_dict(record).to_dict() == histogram.to_dict()


@settings(deadline=None, max_examples=40)
@given(
    batches=BATCHES,
    method=st.sampled_from(METHODS),
    number_format=st.sampled_from(["int8", "fp8"]),
)
def test_threshold_lies_between_zero_and_amax(batches, method, number_format):
    histogram = merged(batches)
    t = choose_threshold(histogram, method, number_format=number_format)
    if histogram.amax == 0.0:
        assert t == 0.0
    else:
        assert 0.0 < t <= histogram.amax


@settings(deadline=None)
@given(batch=BATCH, percentile=st.floats(1.0, 100.0))
def test_percentile_threshold_keeps_the_share_to_one_bin(batch, percentile):
    histogram = Histogram.of(batch, n_bins=256)
    t = choose_threshold(histogram, "percentile", percentile=percentile)
    x = np.abs(batch)
    assert np.count_nonzero(x <= t) >= percentile / 100 * x.size - 0.5
    # One bin lower would keep too few.
    if t < histogram.amax and np.count_nonzero(x) == x.size:
        assert np.count_nonzero(x < t - histogram.bin_width) < percentile / 100 * x.size - 0.5 + 1


@settings(deadline=None)
@given(samples=st.lists(BATCH, min_size=2, max_size=10), cut=st.integers(1, 9))
def test_observer_merge_equals_one_run_over_both(samples, cut):
    whole, first, second = (TensorObserver("t", n_bins=256) for _ in range(3))
    for i, x in enumerate(samples):
        whole.observe(x, sample_idx=i, step_idx=i % 3)
        (first if i < cut else second).observe(x, sample_idx=i, step_idx=i % 3)
    first.merge(second)
    assert first.steps == whole.steps
    for step_idx in (None, *whole.steps):
        assert first.histogram(step_idx).to_dict() == whole.histogram(step_idx).to_dict()
    assert first.convergence() == whole.convergence()


def heavy_tailed(n=200_000):
    rng = np.random.default_rng(3)
    x = rng.standard_normal(n).astype(np.float32)
    x[:20] *= 60.0
    return x


@pytest.mark.parametrize("number_format", ["int8", "fp8"])
def test_mse_threshold_is_near_the_best_found_by_brute_force(number_format):
    x = heavy_tailed()
    histogram = Histogram.of(x)

    def error(t):
        return float(
            np.square(x - fake_quantize(x, scale_for(t, number_format), number_format)).mean()
        )

    t = choose_threshold(histogram, "mse", number_format=number_format)
    best = min(error(c) for c in np.geomspace(1.0, histogram.amax, 300))
    assert error(t) <= 1.05 * best
    assert error(t) <= error(histogram.amax)


def test_thresholds_with_outliers_clip_where_int8_needs_it():
    histogram = Histogram.of(heavy_tailed())
    chosen = {m: choose_threshold(histogram, m) for m in METHODS}
    assert chosen["minmax"] == histogram.amax
    assert chosen["percentile"] == pytest.approx(3.3, abs=0.15)
    assert 3.0 < chosen["entropy"] < 0.5 * histogram.amax
    assert 3.0 < chosen["mse"] <= histogram.amax


def test_entropy_threshold_of_a_uniform_tensor_clips_nothing():
    x = np.random.default_rng(0).uniform(-1, 1, 400_000)
    assert choose_threshold(Histogram.of(x), "entropy") > 0.97


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_observe_value_that_is_not_finite_names_the_tensor(bad):
    with pytest.raises(SpecError, match=r"blocks\.3\.ffn.*sample 5, step 2.*1 of 4"):
        TensorObserver("blocks.3.ffn").observe([0.0, bad, 1.0, 2.0], sample_idx=5, step_idx=2)
    with pytest.raises(SpecError, match=r"blocks\.3\.ffn.*channel 1"):
        ChannelObserver("blocks.3.ffn").observe([[0.0, bad], [1.0, 2.0]])


def test_observer_without_data_is_refused():
    observer = TensorObserver("t")
    with pytest.raises(SpecError, match="no activations"):
        observer.histogram()
    with pytest.raises(SpecError, match="empty"):
        observer.observe([], sample_idx=0)
    observer.observe([1.0], sample_idx=0, step_idx=1)
    with pytest.raises(SpecError, match="at step 0"):
        observer.histogram(0)


def test_choose_threshold_bad_arguments_are_refused():
    histogram = Histogram.of([1.0, 2.0])
    for percentile in (0.0, 100.1, float("nan")):
        with pytest.raises(SpecError, match="percentile"):
            choose_threshold(histogram, "percentile", percentile=percentile)
    with pytest.raises(SpecError, match="expected minmax"):
        choose_threshold(histogram, "median")
    with pytest.raises(SpecError, match="no activations"):
        choose_threshold(Histogram(), "minmax")
    with pytest.raises(SpecError, match="power of two"):
        Histogram(1000)
    with pytest.raises(SpecError, match="cannot be merged"):
        histogram.add(Histogram.of([1.0], n_bins=256))


def test_convergence_of_a_growing_tensor_is_flagged_and_of_a_settled_one_is_not():
    growing, settled = TensorObserver("a"), TensorObserver("b")
    rng = np.random.default_rng(1)
    for i in range(16):
        x = rng.standard_normal(4096)
        settled.observe(x, sample_idx=i)
        # Odd samples, the last half in the order of shares, reach three times further.
        growing.observe(x * (3 if i % 2 else 1), sample_idx=i)
    report = growing.convergence()
    assert report.is_growing
    assert report.growth > 1.0
    assert list(report.amax) == sorted(report.amax)
    assert report.amax[-1] == growing.histogram().amax
    assert not settled.convergence().is_growing


def test_convergence_shares_are_an_eighth_a_quarter_and_a_half():
    observer = TensorObserver("a")
    for i in range(64):
        observer.observe([1.0], sample_idx=i)
    counts = [observer.group_histograms[g].n_values for g in range(4)]
    assert counts == [8, 8, 16, 32]


def test_channel_observer_merge_equals_one_run():
    rng = np.random.default_rng(0)
    batches = [rng.standard_normal((2, 5, 7)) for _ in range(4)]
    whole, first, second = (ChannelObserver("t") for _ in range(3))
    for i, x in enumerate(batches):
        whole.observe(x, step_idx=i % 2)
        (first if i < 2 else second).observe(x, step_idx=i % 2)
    first.merge(second)
    for step_idx in (None, 0, 1):
        np.testing.assert_array_equal(first.amax(step_idx), whole.amax(step_idx))
    np.testing.assert_array_equal(
        whole.amax(), np.abs(np.array(batches)).max((0, 1, 2)).astype(np.float32)
    )
    with pytest.raises(SpecError, match="7 channels"):
        whole.observe(np.zeros((1, 6)))
