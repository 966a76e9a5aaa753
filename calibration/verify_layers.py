"""Run chunks in float32 and in a bundle's formats side by side, in torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

from gwp_edge.calibration.pair_ops import LayerMeter, Pair, PairOps, same
from gwp_edge.calibration.verify_reference import FloatReference, PromptCache
from gwp_edge.calibration.verify_schema import LayerReport
from gwp_edge.export import tables
from gwp_edge.export.network import ActionPath, KeyValue, streams
from gwp_edge.export.precision import Recipe, make_recipe
from gwp_edge.export.reference import ChunkInput
from gwp_edge.export.torch_ops import TorchOps
from gwp_edge.export.vision_encoder import VisionEncoder
from gwp_edge.preprocess import actions_from_network, normalise_state
from gwp_edge.types import FloatArray


def measure_layers(
    reference: FloatReference,
    recipe: Recipe,
    inputs: Sequence[ChunkInput],
    caches: Sequence[tuple[PromptCache, PromptCache]],
    progress: Callable[[], None] | None = None,
) -> tuple[tuple[LayerReport, ...], list[FloatArray], list[FloatArray]]:
    """Run chunks with two recipes side by side and judge every layer.

    Args:
        reference: weights and spec; where the bundle has factors folded in, so must the weights,
            or its layers would differ in scale alone.
        recipe: what to hold against float32.
        inputs: what to answer.
        caches: text K/V of each input, from those weights in float32 and as the bundle holds them.
        progress: called after each input.

    Returns:
        The layers, and the absolute actions (H, D) of float32 and of ``recipe``.
    """
    meter = LayerMeter()
    exact: list[FloatArray] = []
    reduced: list[FloatArray] = []
    with torch.inference_mode():
        for one, cache in zip(inputs, caches, strict=True):
            x = _run(reference, recipe, one, cache, meter)
            for part, found in ((x.exact, exact), (x.reduced, reduced)):
                found.append(actions_from_network(part.numpy(), one.state, reference.spec))
            if progress is not None:
                progress()
    return meter.reports(recipe.of), exact, reduced


def _run(
    reference: FloatReference,
    recipe: Recipe,
    inputs: ChunkInput,
    caches: tuple[PromptCache, PromptCache],
    meter: LayerMeter,
) -> Pair:
    spec, plain, eps = reference.spec, make_recipe("fp32"), reference.spec.network.eps
    vae = (TorchOps(reference.vae_weights, plain), TorchOps(reference.vae_weights, recipe))
    meter.stage, meter.step = "vision", 0
    latent = VisionEncoder(PairOps(*vae, meter), reference.vae).encode(
        same(torch.from_numpy(np.array(inputs.canvas))),
        spec.canvas.height_px,
        spec.canvas.width_px,
    )
    both = tuple(TorchOps(reference.weights, r, eps=eps) for r in (plain, recipe))
    path = ActionPath(PairOps(both[0], both[1], meter), spec)
    prompt = {s.name: _prompt(caches, s.name, spec.network.n_layers) for s in streams(spec.network)}
    bias = same(caches[0]["prompt_bias"].to(torch.float32))
    rows = {
        s.name: [
            [same(row) for row in block] for block in tables.prefix_rows(reference.weights, spec, s)
        ]
        for s in streams(spec.network)
    }
    meter.stage = "prefill"
    state = same(torch.from_numpy(normalise_state(inputs.state, spec)))
    prefix = path.prefill(latent, state, rows, prompt, bias)
    meter.stage = both[1].stage = "denoise"
    modulation = tables.denoise_rows(reference.weights, spec)
    x = same(torch.from_numpy(np.array(inputs.noise)))
    sigmas = torch.tensor(spec.sampler.sigmas, dtype=torch.float32)
    for step in range(spec.sampler.n_steps):
        meter.step = step
        velocity = path.velocity(
            x, [same(row) for row in modulation[step]], prefix, prompt[path.action.name], bias
        )
        delta = sigmas[step + 1] - sigmas[step]
        x = Pair(x.exact + delta * velocity.exact, x.reduced + delta * velocity.reduced)
    return x


def _prompt(
    caches: tuple[PromptCache, PromptCache], stream: str, n_layers: int
) -> list[KeyValue[Pair]]:
    found = []
    for i in range(n_layers):
        if f"prompt_k.{stream}.{i}" not in caches[0]:
            break
        k, v = (
            Pair(*(cache[f"prompt_{which}.{stream}.{i}"].to(torch.float32) for cache in caches))
            for which in "kv"
        )
        found.append(KeyValue(k=k, v=v))
    return found
