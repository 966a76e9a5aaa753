"""All operands of calibration are on its device. The device itself: not yet run on hardware."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from other_device import DEVICE, Elsewhere, OtherDevice  # noqa: E402
from small_networks import (  # noqa: E402
    NETWORKS,
    make_inputs,
    make_spec,
    network_weights,
    prompt_rows,
    vae_config,
    vae_weights,
)

from gwp_edge.calibration.collect import _Channels, _Ranges, quantizable_layers  # noqa: E402
from gwp_edge.calibration.forward import BatchRunner, Network, Prepared, prepare  # noqa: E402
from gwp_edge.calibration.smooth import smoothing_factors  # noqa: E402
from gwp_edge.export.folding import FoldedWeights  # noqa: E402
from gwp_edge.export.precision import make_recipe  # noqa: E402
from gwp_edge.export.vision_encoder import VaeConfig  # noqa: E402
from gwp_edge.lerobot.dataset import Sample  # noqa: E402
from gwp_edge.sampler import make_schedule  # noqa: E402

pytestmark = pytest.mark.export


def moved(x):
    return x.to(DEVICE)


def make_network(name):
    sizes = NETWORKS[name]
    weights = network_weights(sizes, 0)
    spec = make_spec(sizes, sampler=make_schedule(2))
    return Network(weights=weights, vae_weights=weights, vae=None, spec=spec)


def make_prepared(network, move=lambda x: x):
    """Return samples as ``prepare`` leaves them: prompts on the CPU, the rest on the device."""
    inputs = [make_inputs(network.spec, seed) for seed in range(2)]
    return Prepared(
        latents=tuple(move(i.latent) for i in inputs),
        states=tuple(np.zeros(network.spec.n_channels) for _ in inputs),
        states_norm=tuple(move(i.state) for i in inputs),
        noises=tuple(move(i.noise) for i in inputs),
        prompts=(inputs[0].prompt, prompt_rows(network.spec.network.text_dim, 7, seed=99)),
        prompt_idx=(0, 1),
    )


def test_the_other_device_refuses_what_a_gpu_refuses():
    """The spy itself: a weight that stays on the CPU is told, and so is one in a sum."""
    with OtherDevice() as device:
        x = torch.ones(2, 3).to(DEVICE)
        assert isinstance(x, Elsewhere)
        assert x.device.type == DEVICE
        y = torch.nn.functional.linear(x, torch.ones(4, 3).to(DEVICE)) + torch.tensor(1.0)
        assert not device.mixed
        assert y.cpu().tolist() == [[4.0] * 4] * 2
        torch.nn.functional.linear(x, torch.ones(4, 3))
        y + torch.ones(4)
        y[..., np.array([1, 0])]
    assert len(device.mixed) == 2


@pytest.mark.parametrize(
    ("name", "fmt"),
    [("mot_odd", "int8"), *(("dense_one_layer", fmt) for fmt in ("bf16", "fp8", "w8", "w4"))],
)
def test_calibration_has_every_operand_on_its_device(name, fmt):
    """Weights stayed on the CPU, and blocks of int4 were made there: no GPU could calibrate.

    Ranges, means, smoothing and every format run on a device that keeps a record of mixtures; its
    answers are those of the CPU to the bit.
    """
    network = make_network(name)
    exact = BatchRunner(network, make_prepared(network))
    ranges, channels = _Ranges(), _Channels()

    def both(*seen):
        ranges(*seen)
        channels(*seen)

    exact.run(make_recipe("fp32"), observe=both)
    factors, _ = smoothing_factors(network.weights, channels.moments, quantizable_layers(network))
    recipe = dataclasses.replace(
        make_recipe(fmt),
        thresholds={key: seen.threshold("minmax") for key, seen in ranges.tensors.items()},
        means=ranges.means(),
        block=32,
    )
    folded = FoldedWeights(network.weights, factors)
    want = exact.run(recipe, weights=folded)
    with OtherDevice() as device:
        there = _Ranges()
        runner = BatchRunner(network, make_prepared(network, moved), device=DEVICE)
        got = runner.run(recipe, weights=folded, observe=there)
    assert device.n_ops > 300
    assert not device.mixed, device.mixed[:3]
    for a, b in zip(got, want, strict=True):
        assert np.array_equal(a, b)
    assert there.tensors.keys() == ranges.tensors.keys()


def test_samples_are_prepared_on_the_device():
    """Pictures are encoded there; states and noise follow; prompts stay where K/V are computed."""
    pytest.importorskip("diffusers")
    sizes, config = NETWORKS["dense_one_layer"], vae_config(16)
    spec = make_spec(sizes)
    network = Network(
        weights=network_weights(sizes, 0),
        vae_weights=vae_weights(config),
        vae=VaeConfig.from_json(config),
        spec=spec,
    )
    rng = np.random.default_rng(0)
    sample = Sample(
        dataset="dataset",
        episode=0,
        frame=3,
        images={
            view.camera: rng.integers(0, 256, (view.height_px, view.width_px, 3), np.uint8)
            for view in spec.canvas.views
        },
        state=np.zeros(spec.n_channels, np.float32),
        actions=np.zeros((spec.n_rows, spec.n_channels), np.float32),
        task="fold",
        prompt_path=None,
    )
    known = {"fold": prompt_rows(spec.network.text_dim).numpy()}
    want = prepare(network, [sample], seed=0, known_prompts=known)
    with OtherDevice() as device:
        got = prepare(network, [sample], seed=0, known_prompts=known, device=DEVICE)
        assert not device.mixed, device.mixed[:3]
        assert device.n_ops > 50
        for name in ("latents", "states_norm", "noises"):
            (there,), (here,) = getattr(got, name), getattr(want, name)
            assert there.device.type == DEVICE
            assert torch.equal(there.cpu(), here), name
        assert got.prompts[0].device.type == "cpu"
