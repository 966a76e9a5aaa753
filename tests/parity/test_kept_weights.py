"""The action expert stays in memory over the denoising steps; the visual expert streams past."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from small_networks import NETWORKS, make_inputs, make_spec, network_weights  # noqa: E402

from gwp_edge.calibration.forward import BatchRunner, KeepingSource, Network, Prepared  # noqa: E402
from gwp_edge.export.folding import FoldedWeights  # noqa: E402
from gwp_edge.export.inputs import Source  # noqa: E402
from gwp_edge.export.precision import make_recipe  # noqa: E402

pytestmark = pytest.mark.export

EXPERT = "blocks.0.action_expert."
LAYER = f"{EXPERT}ffn.net.0.proj.weight"


class CountingCheckpoint:
    """Random weights that count how often each was read."""

    def __init__(self, sizes):
        self.weights = network_weights(sizes)
        self.n_reads = Counter()

    def load(self, name):
        self.n_reads[name] += 1
        return self.weights.load(name)

    load_finite = load


def make_runner(kept_bytes):
    sizes = NETWORKS["mot"]
    spec = make_spec(sizes)
    checkpoint = CountingCheckpoint(sizes)
    source = Source(checkpoint)
    network = Network(weights=source, vae_weights=source, vae=None, spec=spec)
    inputs = make_inputs(spec)
    prepared = Prepared(
        latents=(inputs.latent,),
        states=(np.zeros(spec.n_channels),),
        states_norm=(inputs.state,),
        noises=(inputs.noise,),
        prompts=(inputs.prompt,),
        prompt_idx=(0,),
    )
    return BatchRunner(network, prepared, kept_bytes=kept_bytes), checkpoint, source


def test_denoise_weights_are_read_once_for_all_steps():
    """Every step read the action expert from disk again: 1.7 GB, as often as there are steps."""
    streaming, streamed, _ = make_runner(0)
    keeping, kept, source = make_runner(1 << 30)
    assert isinstance(source, KeepingSource)
    n_steps = streaming.spec.sampler.n_steps
    assert n_steps > 2
    want = streaming.run(make_recipe("fp32"))
    got = keeping.run(make_recipe("fp32"))
    assert np.array_equal(got, want)
    assert streamed.n_reads[LAYER] == n_steps + 1  # and once in the prefix
    assert kept.n_reads[LAYER] == 1
    repeated = {name for name, n in kept.n_reads.items() if n > 1 and EXPERT in name}
    assert repeated <= {f"{EXPERT}scale_shift_table"}  # tables are made before the steps
    assert source._kept == {}


def test_visual_expert_is_never_kept_and_the_limit_holds(monkeypatch):
    """Full-size weights do not fit in memory: what is kept ends at the limit."""
    runner, checkpoint, source = make_runner(100_000)
    largest = 0

    def watch(*_):
        nonlocal largest
        assert not any(".visual_expert." in name for name in source._kept)
        largest = max(largest, sum(tensor.nbytes for tensor in source._kept.values()))

    runner.run(make_recipe("fp32"), observe=watch)
    assert 50_000 < largest <= 100_000
    n_steps = runner.spec.sampler.n_steps
    often = [name for name, n in checkpoint.n_reads.items() if n > n_steps and EXPERT[8:] in name]
    assert often  # what did not fit


def test_folded_weights_are_made_from_kept_ones():
    runner, checkpoint, source = make_runner(1 << 30)
    width = checkpoint.weights.shape(LAYER)[1]
    factors = {f"{EXPERT}ffn.net.0.proj": np.full(width, 2.0, np.float32)}
    plain = runner.run(make_recipe("fp32"))
    checkpoint.n_reads.clear()
    folded = runner.run(make_recipe("fp32"), weights=FoldedWeights(source, factors))
    assert np.abs(np.stack(folded) - np.stack(plain)).max() < 2e-5
    assert checkpoint.n_reads[LAYER] == 1


def test_prompts_are_computed_once_for_the_same_weights():
    runner, checkpoint, _ = make_runner(0)
    name = f"{EXPERT}attn2.to_k.weight"
    for _ in range(3):
        runner.run(make_recipe("fp32"))
    assert checkpoint.n_reads[name] == 1
