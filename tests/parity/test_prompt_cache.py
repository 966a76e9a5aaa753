"""Zero rows of a prompt merge exactly into few rows with a logit bias."""

from __future__ import annotations

import dataclasses
import math

import pytest

torch = pytest.importorskip("torch")

from small_networks import (  # noqa: E402
    NETWORKS,
    ReducedPath,
    make_inputs,
    make_spec,
    network_weights,
    prompt_rows,
    relative,
)

from gwp_edge.errors import SpecError  # noqa: E402
from gwp_edge.export.precision import make_recipe  # noqa: E402
from gwp_edge.export.prompt_cache import (  # noqa: E402
    collapse_padding,
    needed_rows,
    prompt_cache,
    read_blocks,
)

pytestmark = pytest.mark.export


def _scattered(kept, text_dim=8):
    rows = torch.zeros(64, text_dim)
    generator = torch.Generator().manual_seed(1)
    rows[list(kept)] = torch.randn(len(kept), text_dim, generator=generator)
    return rows


def _attention(rows, bias):
    """One cross-attention to ``rows`` with a K and V that are never zero."""
    g = torch.Generator().manual_seed(0)
    wk, wv, bk, bv = (
        torch.randn(8, 8, generator=g),
        torch.randn(8, 8, generator=g),
        torch.randn(8, generator=g),
        torch.randn(8, generator=g),
    )
    q = torch.randn(5, 8, generator=g)
    return torch.softmax(q @ (rows @ wk + bk).T + bias, -1) @ (rows @ wv + bv)


CASES = {
    "front": (range(11), 12),
    "front_more_rows": (range(11), 16),
    "all_64_rows": (range(11), 64),
    "scattered": ((0, 5, 6, 40, 63), 6),
    "empty_prompt": ((), 1),
    "one_zero_row": (range(63), 64),
    "no_zero_row": (range(64), 64),
    "no_zero_row_but_padding": (range(64), 70),
}


@pytest.mark.parametrize("name", CASES)
def test_collapse_padding_leaves_attention_as_it_is(name):
    kept, n_rows = CASES[name]
    full = _scattered(kept)
    rows, bias = collapse_padding(full, n_rows)
    assert rows.shape == (n_rows, 8)
    assert bias.shape == (n_rows,)
    assert relative(_attention(rows, bias), _attention(full, torch.zeros(64))) < 1e-5


def test_collapse_padding_without_its_bias_is_another_prompt():
    full = _scattered(range(11))
    rows, bias = collapse_padding(full, 12)
    assert bias[-1] == pytest.approx(math.log(53))
    want = _attention(full, torch.zeros(64))
    assert relative(_attention(rows, torch.zeros(12)), want) > 1e-2


def test_collapse_padding_too_few_rows_is_refused():
    with pytest.raises(SpecError, match="need 12 text rows; the graphs have 11"):
        collapse_padding(_scattered(range(11)), 11)


def test_collapse_padding_wrong_length_is_refused():
    with pytest.raises(SpecError, match=r"expected shape \(64, text_dim\)"):
        collapse_padding(torch.zeros(11, 8), 12)


def test_collapse_padding_nan_is_refused():
    full = _scattered(range(3))
    full[2, 1] = torch.nan
    with pytest.raises(SpecError, match="NaN"):
        collapse_padding(full, 12)


@pytest.mark.parametrize(("kept", "want"), [((), 1), (range(11), 12), (range(64), 64)])
def test_needed_rows_is_the_smallest_that_fits(kept, want):
    full = _scattered(kept)
    assert needed_rows([full, _scattered(())]) == want
    collapse_padding(full, want)
    with pytest.raises(SpecError):
        collapse_padding(full, want - 1)


@pytest.mark.parametrize("name", ["mot", "dense"])
@pytest.mark.parametrize("n_text_rows", [12, 20, 64])
def test_actions_do_not_depend_on_the_number_of_text_rows(name, n_text_rows):
    sizes = NETWORKS[name]
    weights = network_weights(sizes)
    whole = make_spec(sizes, n_text_rows=64)
    inputs = make_inputs(whole)
    # The same prompt with its zero rows elsewhere.
    moved = dataclasses.replace(inputs, prompt=inputs.prompt.flip(0))
    want = ReducedPath(weights, whole, inputs).velocity(inputs.noise, 1)
    spec = make_spec(sizes, n_text_rows=n_text_rows)
    got = ReducedPath(weights, spec, moved).velocity(inputs.noise, 1)
    assert relative(got, want) < 1e-5


@pytest.mark.parametrize("name", NETWORKS)
def test_prompt_cache_holds_what_graphs_read_and_no_more(name):
    sizes = NETWORKS[name]
    spec = make_spec(sizes)
    cache = prompt_cache(
        network_weights(sizes), spec, prompt_rows(sizes.text_dim), make_recipe("fp32")
    )
    want = {"prompt_bias"}
    last = sizes.n_layers - 1
    for i in range(sizes.n_layers):
        kinds = ["visual"] if sizes.family == "gwp-0" else ["action"] + ["visual"] * (i < last)
        want |= {f"prompt_{x}.{kind}.{i}" for kind in kinds for x in "kv"}
    assert set(cache) == want
    heads, d, T = sizes.n_heads, sizes.head_dim, 16
    assert all(t.shape == (heads, d, T) for n, t in cache.items() if n.startswith("prompt_k"))
    assert all(t.shape == (heads, T, d) for n, t in cache.items() if n.startswith("prompt_v"))


def test_read_blocks_single_block_reads_no_visual_text():
    sizes = NETWORKS["mot_one_layer"]
    spec, weights = make_spec(sizes), network_weights(sizes)
    assert read_blocks(spec.network) == {"visual": 0, "action": 1}
    prompt_cache(weights, spec, prompt_rows(sizes.text_dim), make_recipe("fp32"))
    assert not any(n.startswith("condition_embedder") for n in weights.read)


@pytest.mark.parametrize(("precision", "dtype"), [("fp16", "float16"), ("bf16", "bfloat16")])
def test_prompt_cache_reduced_precision_is_stored_in_it(precision, dtype):
    sizes = NETWORKS["mot"]
    spec, rows = make_spec(sizes), prompt_rows(sizes.text_dim)
    weights = network_weights(sizes)
    cache = prompt_cache(weights, spec, rows, make_recipe(precision))
    exact = prompt_cache(weights, spec, rows, make_recipe("fp32"))
    assert cache["prompt_bias"].dtype == torch.float32
    for name, tensor in cache.items():
        if name != "prompt_bias":
            assert tensor.dtype == getattr(torch, dtype)
            assert 0 < relative(tensor.float(), exact[name]) < 0.02


def test_prompt_cache_other_text_width_is_refused():
    sizes = NETWORKS["mot"]
    with pytest.raises(SpecError, match="32 wide, the network takes 64"):
        prompt_cache(network_weights(sizes), make_spec(sizes), prompt_rows(32), make_recipe("fp32"))
