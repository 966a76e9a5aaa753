"""Folding changes no answer, and pays where channels stand out."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from small_networks import (  # noqa: E402
    NETWORKS,
    ReducedPath,
    make_inputs,
    make_spec,
    network_weights,
    prompt_rows,
)

from gwp_edge.calibration.collect import quantizable_layers  # noqa: E402
from gwp_edge.calibration.forward import BatchRunner, Network, Prepared  # noqa: E402
from gwp_edge.calibration.smooth import ChannelMoments, smoothing_factors  # noqa: E402
from gwp_edge.export.folding import FoldedWeights, factor_name  # noqa: E402
from gwp_edge.export.precision import (  # noqa: E402
    is_quantizable,
    make_recipe,
    scale_key,
)

pytestmark = pytest.mark.export


class Planted:
    """A network with a few large channels in the input of some layers."""

    def __init__(self, weights, factor):
        self._weights = weights
        self._factor = factor

    def shape(self, name):
        return self._weights.shape(name)

    def load(self, name):
        tensor = self._weights.load(name)
        if name.startswith("blocks.") and name.endswith("scale_shift_table"):
            tensor = tensor.clone()
            # Scale rows hold no 1 + here: these channels become `factor` times as large.
            tensor[:, [1, 4], 3] += self._factor
            tensor[:, [1, 4], 11] -= self._factor
        if name.endswith((".norm2.weight",)):
            tensor = tensor.clone()
            tensor[5] *= self._factor
        return tensor


def network(name, seed=0, planted=None):
    sizes = NETWORKS[name]
    spec = make_spec(sizes)
    weights = network_weights(sizes, seed)
    source = weights if planted is None else Planted(weights, planted)
    return Network(weights=source, vae_weights=weights, vae=None, spec=spec)


def prepared(net, n=4):
    inputs = [make_inputs(net.spec, seed) for seed in range(n)]
    return Prepared(
        latents=tuple(i.latent for i in inputs),
        states=tuple(np.zeros(net.spec.n_channels) for _ in inputs),
        states_norm=tuple(i.state for i in inputs),
        noises=tuple(i.noise for i in inputs),
        prompts=(inputs[0].prompt, prompt_rows(net.spec.network.text_dim, 7, seed=99)),
        prompt_idx=tuple(i % 2 for i in range(n)),
    )


class Seen:
    """Maxima of tensors, and moments of channels."""

    def __init__(self):
        self.thresholds = {}
        self.moments = {}

    def __call__(self, stage, step, name, sample, x):
        del step, sample
        if is_quantizable(name):
            key = scale_key(stage, name)
            self.thresholds[key] = max(self.thresholds.get(key, 0.0), float(x.abs().max()))
            self.moments.setdefault(key, ChannelMoments()).observe(x.numpy())


def test_batch_equals_one_sample_at_a_time():
    net = network("mot_odd")
    samples = prepared(net)
    got = BatchRunner(net, samples).run(make_recipe("fp32"))
    for i, answer in enumerate(got):
        inputs = dataclasses.replace(
            make_inputs(net.spec, i), prompt=samples.prompts[samples.prompt_idx[i]]
        )
        path = ReducedPath(net.weights, net.spec, inputs)
        x = inputs.noise
        for step in range(net.spec.sampler.n_steps):
            x = path.denoise(x, step)
        # Rows of several samples in one product are summed in another order.
        assert np.abs(answer - x.numpy()).max() < 1e-5


@pytest.mark.parametrize("name", ["mot", "mot_odd", "dense", "dense_deep", "dense_one_layer"])
def test_folded_network_answers_the_same(name):
    """Random factors in every place: norm rows, norm2, values of both attentions."""
    net = network(name)
    runner = BatchRunner(net, prepared(net))
    rng = np.random.default_rng(0)
    factors = {}
    for layer in quantizable_layers(net):
        kind = factor_name(layer)
        if kind is not None:
            width = net.weights.shape(f"{layer}.weight")[1]
            factors[kind] = np.exp2(rng.integers(-3, 4, width)).astype(np.float32)
    folded = FoldedWeights(net.weights, factors)
    for layer in quantizable_layers(net):
        if factor_name(layer):
            changed = folded.load(f"{layer}.weight")
            assert not torch.equal(changed, net.weights.load(f"{layer}.weight")), layer
    exact = runner.run(make_recipe("fp32"))
    got = runner.run(make_recipe("fp32"), weights=folded)
    # Powers of two change no bit of a product; only sums over channels are in other units.
    assert np.abs(np.stack(got) - np.stack(exact)).max() < 2e-5


def test_gelu_lets_no_factor_through():
    assert factor_name("blocks.0.action_expert.ffn.net.2") is None
    assert factor_name("patch_embedding") is None


@pytest.mark.parametrize("name", ["mot", "dense"])
def test_smoothing_pays_where_channels_stand_out(name):
    """Planted outliers, layer by layer; test_planted_outliers.py has them in a whole export."""
    net = network(name, planted=40.0)
    runner = BatchRunner(net, prepared(net))
    plain = Seen()
    exact = np.stack(runner.run(make_recipe("fp32"), observe=plain))
    factors, gains = smoothing_factors(net.weights, plain.moments, quantizable_layers(net))
    folded = FoldedWeights(net.weights, factors)
    smooth = Seen()
    runner.run(make_recipe("fp32"), weights=folded, observe=smooth)

    def error(seen, weights):
        recipe = dataclasses.replace(make_recipe("int8"), thresholds=seen.thresholds)
        answer = np.stack(runner.run(recipe, weights=weights))
        return float(np.sqrt(np.square(answer - exact).mean()))

    assert min(gains.values()) < 0.2
    assert error(smooth, folded) < 0.6 * error(plain, net.weights)


def test_smoothing_leaves_even_channels_alone():
    """Where nothing stands out, no factor is predicted to help much."""
    rng = np.random.default_rng(0)
    moments = ChannelMoments()
    moments.observe(rng.uniform(-1, 1, (2000, 32)).astype(np.float32))

    class Even:
        def load(self, name):
            return torch.from_numpy(rng.uniform(-1, 1, (64, 32)).astype(np.float32))

    layer = "blocks.0.attn2.to_q"
    seen = {scale_key("denoise", layer): moments}
    factors, gains = smoothing_factors(Even(), seen, [layer])
    assert all(gain > 0.9 for gain in gains.values())
    assert all(np.array_equal(f, np.exp2(np.rint(np.log2(f)))) for f in factors.values())
