"""The errors that docs/quantization.md promises of the default recipes, on several seeds.

A seed decides which episodes calibrate and which judge, and the noise. What the page shows is
printed, in minutes, by

    python tests/parity/test_error_figures.py
"""

from __future__ import annotations

import pytest

pytest.importorskip("torch")
pytest.importorskip("onnx_ir")
pytest.importorskip("av")

from calibration_rig import CASES, opened

from gwp_edge.calibration.choice import choose_ranges, recipe_with_ranges
from gwp_edge.calibration.collect import CollectOptions, collect
from gwp_edge.calibration.judge import Judge, layer_sizes
from gwp_edge.export.folding import FoldedWeights
from gwp_edge.export.precision import make_recipe

pytestmark = pytest.mark.export

# p99 and largest error on joints, mrad, with the defaults of export.
ALLOWED = {"int8": (5.0, 20.0), "fp8": (10.0, 40.0), "w8": (1.0, 4.0)}


# The tests calibrate on a few samples, with ranges that are quick to choose.
QUICK = {"n_samples": 24, "n_held_out": 6, "observer": "mse", "smoothing": False}
SLACK = 1.3


def errors_mrad(name, seed, n_samples=64, n_held_out=16, observer="auto", smoothing=True):
    """Return p99 and largest error by format, of the whole default recipe."""
    how = CollectOptions(n_samples=n_samples, n_held_out=n_held_out, seed=seed, smoothing=smoothing)
    with opened(name, how) as case:
        network, sizes = case.network, layer_sizes(case.network)
        record = collect(network, case.seen, how, is_synthetic=False, provenance={})
        judge = Judge(network, case.unseen, "cpu", name)
        found = {}
        for precision in ALLOWED:
            base = make_recipe(precision)
            choice = choose_ranges(
                network, base, sizes, record, judge, observer=observer, percentile=99.9,
                budget=None, device="cpu", notes=[], progress=None,
            )  # fmt: skip
            recipe = recipe_with_ranges(base, record, choice, tuple(sizes), 99.9)
            weights = network.weights
            if choice.is_smoothed:
                weights = FoldedWeights(weights, record.smoothing)
            error = judge.measure(recipe, weights).joints_rad
            found[precision] = (1e3 * error.p99, 1e3 * error.max)
        return found


def words(found):
    return ", ".join(f"{k} {p99:.2f} (max {most:.1f})" for k, (p99, most) in found.items())


@pytest.mark.parametrize(
    ("name", "seed"), [("random GWP-0.5", 0), ("random GWP-0.5", 1), ("random GWP-0", 0)]
)
def test_default_recipes_keep_what_is_promised(name, seed):
    found = errors_mrad(name, seed, **QUICK)
    for precision, (p99, most) in found.items():
        assert 0.0 < p99 <= SLACK * ALLOWED[precision][0], words(found)
        assert most <= SLACK * ALLOWED[precision][1], words(found)


if __name__ == "__main__":
    for case in CASES:
        for number in range(3):
            print(f"{case}, seed {number}: {words(errors_mrad(case, number))} mrad", flush=True)
