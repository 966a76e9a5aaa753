"""One chunk in eager torch, weight by weight: the reference that a bundle is judged by.

With a reduced-precision recipe the same pass rounds as that recipe says, so its answer is what an
engine should give, and its distance from the float32 pass is what the precision costs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from gwp_edge.export import tables
from gwp_edge.export.network import ActionPath, KeyValue, Stream, streams
from gwp_edge.export.ops import WeightSource
from gwp_edge.export.precision import Recipe
from gwp_edge.export.torch_ops import TorchOps
from gwp_edge.export.vision_encoder import VaeConfig, VisionEncoder
from gwp_edge.preprocess import actions_from_network, normalise_state
from gwp_edge.spec import PolicySpec
from gwp_edge.types import Float32Array, FloatArray, ImageArray

Prompt = Mapping[str, torch.Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class ChunkInput:
    """Everything that one chunk depends on, beside weights and prompt.

    Attributes:
        canvas: uint8 RGB (h, w, 3).
        state: (D,), rad and m.
        noise: (H, A).
    """

    canvas: ImageArray
    state: FloatArray
    noise: Float32Array


@dataclass(frozen=True, slots=True, kw_only=True)
class ChunkOutput:
    """What one chunk gives.

    Attributes:
        latent: (1, C, h/16, w/16).
        x: network output, (H, A).
        actions: absolute, (H, D), rad and m.
    """

    latent: Float32Array
    x: Float32Array
    actions: FloatArray


class Reference:
    """The policy in eager torch, with any recipe. Threads: one owner."""

    def __init__(
        self,
        weights: WeightSource,
        vae_weights: WeightSource,
        vae: VaeConfig,
        spec: PolicySpec,
        recipe: Recipe,
    ) -> None:
        self._spec = spec
        self._vision = VisionEncoder(TorchOps(vae_weights, recipe), vae)
        self._ops = TorchOps(weights, recipe, eps=spec.network.eps)
        self._path = ActionPath(self._ops, spec)
        self._prefix_rows = {
            s.name: tables.prefix_rows(weights, spec, s) for s in streams(spec.network)
        }
        self._denoise_rows = tables.denoise_rows(weights, spec)

    def _cache(self, prompt: Prompt, stream: Stream) -> list[KeyValue[torch.Tensor]]:
        found = []
        for i in range(self._spec.network.n_layers):
            key = f"prompt_k.{stream.name}.{i}"
            if key not in prompt:
                break
            k, v = prompt[key], prompt[f"prompt_v.{stream.name}.{i}"]
            found.append(KeyValue(k=k.to(torch.float32), v=v.to(torch.float32)))
        return found

    def run(
        self,
        inputs: Sequence[ChunkInput],
        prompt: Prompt,
        progress: Callable[[], None] | None = None,
    ) -> list[ChunkOutput]:
        """Return the answers to ``inputs``, all under one prompt.

        Args:
            inputs: what to answer.
            prompt: ``prompt_k.S.i``, ``prompt_v.S.i`` and ``prompt_bias`` as in a bundle.
            progress: called after each prefill and each step.
        """
        caches = {s.name: self._cache(prompt, s) for s in streams(self._spec.network)}
        with torch.inference_mode():
            return [self._run_one(one, prompt, caches, progress) for one in inputs]

    def _run_one(
        self,
        inputs: ChunkInput,
        prompt: Prompt,
        caches: Mapping[str, Sequence[KeyValue[torch.Tensor]]],
        progress: Callable[[], None] | None,
    ) -> ChunkOutput:
        spec, bias = self._spec, prompt["prompt_bias"]
        canvas = torch.from_numpy(np.array(inputs.canvas))
        latent = self._vision.encode(canvas, spec.canvas.height_px, spec.canvas.width_px)
        state = torch.from_numpy(normalise_state(inputs.state, spec))
        rows = {name: [list(block) for block in table] for name, table in self._prefix_rows.items()}
        self._ops.stage = "prefill"
        prefix = self._path.prefill(latent, state, rows, caches, bias)
        if progress is not None:
            progress()
        self._ops.stage = "denoise"
        x = torch.from_numpy(np.array(inputs.noise))
        zeros, no_gain = torch.zeros_like(x), torch.zeros(spec.n_rows, 1)
        sigmas = torch.tensor(spec.sampler.sigmas, dtype=torch.float32)
        for i in range(spec.sampler.n_steps):
            x = self._path.denoise(
                x,
                sigmas[i],
                sigmas[i + 1] - sigmas[i],
                zeros,
                no_gain,
                list(self._denoise_rows[i]),
                prefix,
                caches[self._path.action.name],
                bias,
            )
            if progress is not None:
                progress()
        final: npt.NDArray[np.float32] = x.numpy()
        return ChunkOutput(
            latent=latent.numpy(),
            x=final,
            actions=actions_from_network(final, inputs.state, spec),
        )


def golden_input(spec: PolicySpec, seed: int) -> ChunkInput:
    """Return a reproducible input: a smooth picture with texture, a state inside the statistics."""
    rng = np.random.default_rng(seed)
    h, w = spec.canvas.height_px, spec.canvas.width_px
    y, x = np.mgrid[0:h, 0:w]
    phase = rng.uniform(0, 2 * np.pi, (3, 2))
    waves = np.stack([np.sin(y / 37 + a) * np.cos(x / 53 + b) for a, b in phase], axis=-1)
    picture = 127.5 + 90 * waves + rng.normal(0, 12, (h, w, 3))
    low, high = np.array(spec.statistics.state_q01), np.array(spec.statistics.state_q99)
    shape = (spec.n_rows, spec.network.n_action_channels)
    return ChunkInput(
        canvas=np.clip(np.rint(picture), 0, 255).astype(np.uint8),
        state=(low + (high - low) * rng.uniform(0.2, 0.8, len(low)))
        .astype(np.float32)
        .astype(float),
        noise=rng.standard_normal(shape, dtype=np.float32),
    )
