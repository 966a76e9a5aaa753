"""The budget search, on networks whose error is known by construction."""

from __future__ import annotations

import math

import pytest

pytest.importorskip("torch")

from gwp_edge.calibration.sensitivity import (
    MAX_UNITS,
    Budget,
    make_units,
    search,
    sweep,
)
from gwp_edge.errors import SpecError
from gwp_edge.export.precision import make_recipe
from gwp_edge.manifest import ChannelError, MeasuredError

pytestmark = pytest.mark.export

LAYERS = tuple(f"blocks.{i}.{kind}" for i in range(4) for kind in ("attn1.to_q", "ffn.net.2"))


def channel_error(x):
    return ChannelError(mean=x / 3, p50=x / 3, p99=x, max=2 * x)


class AddsVariances:
    """A network where quantizing a layer adds a known variance to joints and grippers."""

    def __init__(self, rad, metres=None):
        self.rad = rad
        self.metres = metres or dict.fromkeys(rad, 0.0)
        self.n_runs = 0

    def __call__(self, recipe):
        self.n_runs += 1
        quantized = [layer for layer in self.rad if recipe.of(layer) == recipe.default]
        joints = math.sqrt(sum(self.rad[layer] ** 2 for layer in quantized))
        grippers = math.sqrt(sum(self.metres[layer] ** 2 for layer in quantized))
        return MeasuredError(
            inputs="made up",
            n_chunks=1,
            joints_rad=channel_error(joints),
            grippers_m=channel_error(grippers),
        )


def units(layers=LAYERS, size=1000):
    return make_units(layers, dict.fromkeys(layers, size), dict.fromkeys(layers, 1))


def test_recipe_that_fits_at_once_is_taken_without_a_sweep():
    measure = AddsVariances(dict.fromkeys(LAYERS, 1e-4))
    found = search(make_recipe("int8"), units(), measure, Budget())
    assert found.sweep == ()
    assert measure.n_runs == 1
    assert {found.recipe.of(layer) for layer in LAYERS} == {"int8"}
    assert "all layers together" in found.recipe.explain(LAYERS[0])[1]


def test_search_keeps_the_bad_layer_high_and_says_why():
    errors = dict.fromkeys(LAYERS, 1e-4)
    errors["blocks.2.ffn.net.2"] = 8e-3
    found = search(make_recipe("int8"), units(), AddsVariances(errors), Budget())
    high = [layer for layer in LAYERS if found.recipe.of(layer) == "fp32"]
    assert high == ["blocks.2.ffn.net.2"]
    assert "kept high" in found.recipe.explain(high[0])[1]
    assert "8 mrad" in found.recipe.explain(high[0])[1]
    assert "within the budget" in found.recipe.explain(LAYERS[0])[1]
    assert len(found.sweep) == len(LAYERS)


def test_search_minds_grippers_as_well_as_joints():
    metres = dict.fromkeys(LAYERS, 1e-6)
    metres["blocks.1.attn1.to_q"] = 1e-3
    measure = AddsVariances(dict.fromkeys(LAYERS, 1e-5), metres)
    found = search(make_recipe("int8"), units(), measure, Budget())
    assert [layer for layer in LAYERS if found.recipe.of(layer) == "fp32"] == [
        "blocks.1.attn1.to_q"
    ]


def test_search_gives_up_small_layers_before_large_ones():
    errors = dict.fromkeys(LAYERS, 1e-3)
    saved = dict.fromkeys(LAYERS, 10)
    saved["blocks.0.attn1.to_q"] = 1_000_000
    given = make_units(LAYERS, saved, dict.fromkeys(LAYERS, 1))
    found = search(make_recipe("int8"), given, AddsVariances(errors), Budget())
    assert found.recipe.of("blocks.0.attn1.to_q") == "int8"
    assert sum(found.recipe.of(layer) == "fp32" for layer in LAYERS) == 4


def test_result_of_a_search_was_measured_within_the_budget():
    errors = {layer: 4e-4 * (1 + i) for i, layer in enumerate(LAYERS)}
    measure = AddsVariances(errors)
    found = search(make_recipe("int8"), units(), measure, Budget())
    assert Budget().use(measure(found.recipe)) <= 1.0
    shares = [p.quantized_share for p in found.curve]
    assert shares == sorted(shares, reverse=True)
    assert shares[0] == 1.0


def test_search_without_any_fitting_layer_finds_no_recipe():
    found = search(
        make_recipe("int8"), units(), AddsVariances(dict.fromkeys(LAYERS, 0.1)), Budget()
    )
    assert found.recipe is None
    assert len(found.curve) >= 2


def test_sweep_quantizes_one_unit_at_a_time():
    errors = {layer: 1e-3 * (1 + i) for i, layer in enumerate(LAYERS)}
    found = sweep(make_recipe("int8"), units(), AddsVariances(errors))
    assert [c.error.joints_rad.p99 for c in found] == pytest.approx(list(errors.values()))


def test_sweep_leaves_layers_of_a_recipe_file_alone():
    recipe = make_recipe("int8")
    errors = dict.fromkeys(LAYERS, 8e-3)
    found = search(recipe, units(LAYERS[1:]), AddsVariances(errors), Budget(joints_rad=1.2e-2))
    assert found.recipe is not None
    assert found.recipe.of(LAYERS[0]) == "int8"


def test_deep_network_is_swept_in_groups_that_cover_every_layer_once():
    kinds = [f"{e}_expert.{k}" for e in ("visual", "action") for k in "abcdefgh"]
    layers = tuple(f"blocks.{i}.{kind}" for i in range(30) for kind in kinds)
    groups = units(layers)
    assert len(groups) <= MAX_UNITS
    assert sorted(layer for u in groups for layer in u.layers) == sorted(layers)
    assert sum(u.saved_bytes for u in groups) == 1000 * len(layers)
    assert groups[0].name.startswith("blocks.0-")


def test_budget_caps_the_largest_error_too():
    """One chunk in a hundred that goes anywhere does not show in a 99th percentile."""
    far = ChannelError(mean=1e-4, p50=1e-4, p99=1e-3, max=0.072)
    error = MeasuredError(inputs="made up", n_chunks=1, joints_rad=far, grippers_m=None)
    assert Budget(joints_rad=2e-3).use(error) == pytest.approx(3.6)
    near = ChannelError(mean=1e-4, p50=1e-4, p99=1e-3, max=0.009)
    error = MeasuredError(inputs="made up", n_chunks=1, joints_rad=near, grippers_m=None)
    assert Budget(joints_rad=2e-3).use(error) == pytest.approx(0.5)


@pytest.mark.parametrize("bad", [{"joints_rad": 0.0}, {"joints_rad": math.nan}, {"grippers_m": -1}])
def test_budget_that_is_no_limit_is_refused(bad):
    with pytest.raises(SpecError, match="expected a positive number"):
        Budget(**bad)
