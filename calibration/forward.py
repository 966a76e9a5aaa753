"""Run the policy in torch on a set of dataset samples, every weight read once for all of them.

The first half turns samples into what the network sees, as the robot does; the second runs the
prefix and every denoising step under any recipe. Latents and prompt K/V do not depend on the
recipe's quantized layers, so they are computed once and shared by all runs.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import msgspec
import numpy as np
import torch

from gwp_edge.errors import SpecError
from gwp_edge.export import tables
from gwp_edge.export.batch_ops import Batch, BatchOps
from gwp_edge.export.network import ActionPath, KeyValue, Stream, streams
from gwp_edge.export.ops import WeightSource
from gwp_edge.export.precision import Recipe, make_recipe
from gwp_edge.export.prompt_cache import needed_rows, prompt_cache
from gwp_edge.export.prompts import pad_rows, read_prompt_embedding, task_name
from gwp_edge.export.torch_ops import TorchOps
from gwp_edge.export.vision_encoder import VaeConfig, VisionEncoder
from gwp_edge.lerobot.dataset import Sample
from gwp_edge.preprocess import actions_from_network, compose_canvas, normalise_state
from gwp_edge.spec import PolicySpec
from gwp_edge.types import Float32Array, FloatArray, Frame, Observation

# Called with stage, denoising step, layer, sample index and the layer's input (n, in).
Observe = Callable[[str, int, str, int, torch.Tensor], None]
Progress = Callable[[str, int, int], None]

# The action expert in bfloat16; the visual expert, read once for all samples, streams past it.
KEPT_BYTES = 1_800_000_000


@runtime_checkable
class KeepingSource(Protocol):
    """A weight source that can hold what every denoising step reads. Threads: one owner."""

    def keeping(self, budget_bytes: int) -> AbstractContextManager[None]:
        """Hold weights in memory inside this block, at most ``budget_bytes`` of them."""
        ...


def default_device() -> str:
    """Return ``cuda`` when torch sees a GPU (not yet run on hardware), else ``cpu``."""
    return "cuda" if torch.cuda.is_available() else "cpu"


@dataclass(frozen=True, kw_only=True)
class Network:
    """A checkpoint with its VAE, and what it is exported as."""

    weights: WeightSource
    vae_weights: WeightSource
    vae: VaeConfig
    spec: PolicySpec


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """Samples as the network sees them.

    Attributes:
        latents: (1, C, h/16, w/16) of each sample.
        states: measured states (D,), rad and m.
        states_norm: normalised states (1, A).
        noises: (H, A).
        prompts: embeddings (64, text_dim), each different one once.
        prompt_idx: which prompt each sample has.
    """

    latents: tuple[torch.Tensor, ...]
    states: tuple[FloatArray, ...]
    states_norm: tuple[torch.Tensor, ...]
    noises: tuple[torch.Tensor, ...]
    prompts: tuple[torch.Tensor, ...]
    prompt_idx: tuple[int, ...]

    def __len__(self) -> int:
        """Return the number of samples."""
        return len(self.latents)


def _noise(spec: PolicySpec, seed: int, sample: Sample) -> torch.Tensor:
    rng = np.random.default_rng([seed, sample.episode, sample.frame])
    shape = (spec.n_rows, spec.network.n_action_channels)
    return torch.from_numpy(rng.standard_normal(shape, dtype=np.float32))


def _observation(sample: Sample) -> Observation:
    frames = tuple(
        Frame(camera=name, image=image, t_captured_ns=0, t_received_ns=0, frame_idx=sample.frame)
        for name, image in sample.images.items()
    )
    return Observation(frames=frames, state=np.asarray(sample.state, np.float64), t_state_ns=0)


def _embedding(sample: Sample, spec: PolicySpec, known: Mapping[str, Float32Array]) -> Float32Array:
    """Return the prompt of a sample: its dataset's embedding, else the bundle's of that text."""
    if sample.prompt_path is not None:
        rows = read_prompt_embedding(sample.prompt_path, text_dim=spec.network.text_dim)
        return pad_rows(rows)
    name = task_name(text=sample.task)
    if name not in known:
        raise SpecError(
            f"{sample.dataset}: episode {sample.episode} ({sample.task!r}) has no t5_embedding "
            f"file, and no prompt of the bundle has that text; pass --prompt {sample.task!r}"
        )
    return known[name]


def prepare(
    network: Network,
    samples: Iterable[Sample],
    *,
    seed: int,
    known_prompts: Mapping[str, Float32Array],
    device: str = "cpu",
) -> Prepared:
    """Preprocess samples as the robot does, encode their pictures, and draw their noise.

    Args:
        network: the checkpoint.
        samples: what to prepare, of a dataset that was checked against the spec; one is in memory
            at a time.
        seed: of the noise; each sample's noise follows from it and from the sample's place.
        known_prompts: embeddings (64, text_dim) by task, for datasets without t5_embedding.
        device: where torch computes.

    Raises:
        SpecError: a sample has no prompt, or there is no sample.
    """
    spec = network.spec
    encoder = VisionEncoder(TorchOps(network.vae_weights, device=device), network.vae)
    latents: list[torch.Tensor] = []
    prompts: list[torch.Tensor] = []
    indices: list[int] = []
    states: list[FloatArray] = []
    noises: list[torch.Tensor] = []
    seen: dict[str, int] = {}
    for sample in samples:
        canvas = compose_canvas(_observation(sample), spec.canvas)
        with torch.inference_mode():
            pixels = torch.from_numpy(np.array(canvas)).to(device)
            latents.append(encoder.encode(pixels, spec.canvas.height_px, spec.canvas.width_px))
        rows = _embedding(sample, spec, known_prompts)
        key = hashlib.sha256(rows.tobytes()).hexdigest()
        if key not in seen:
            seen[key] = len(prompts)
            prompts.append(torch.from_numpy(rows))
        indices.append(seen[key])
        states.append(np.asarray(sample.state, np.float64))
        noises.append(_noise(spec, seed, sample).to(device))
    if not latents:
        raise SpecError("calibration: expected at least one sample")
    return Prepared(
        latents=tuple(latents),
        states=tuple(states),
        states_norm=tuple(torch.from_numpy(normalise_state(s, spec)).to(device) for s in states),
        noises=tuple(noises),
        prompts=tuple(prompts),
        prompt_idx=tuple(indices),
    )


class BatchRunner:
    """Answers all prepared samples under a recipe. Threads: one owner.

    Args:
        network: the checkpoint.
        prepared: samples, on ``device``.
        device: where torch computes; a GPU has not yet been run on hardware.
        kept_bytes: weights that stay in memory from the prefix to the last step, at most.
    """

    def __init__(
        self,
        network: Network,
        prepared: Prepared,
        *,
        device: str = "cpu",
        kept_bytes: int = KEPT_BYTES,
    ) -> None:
        spec = network.spec
        # Merging padding rows is exact for any number of rows, so one number serves all prompts.
        rows = needed_rows(prepared.prompts)
        self.spec = msgspec.structs.replace(
            spec, network=msgspec.structs.replace(spec.network, n_text_rows=rows)
        )
        self.network = network
        self.prepared = prepared
        self._device = device
        self._kept_bytes = kept_bytes
        self._text: tuple[WeightSource, list[dict[str, torch.Tensor]]] | None = None

    def _prompts(self, weights: WeightSource) -> list[dict[str, torch.Tensor]]:
        """Return the text K/V of every prompt, on the device; the last weights' are remembered."""
        if self._text is None or self._text[0] is not weights:
            recipe = make_recipe("fp32")
            caches = (prompt_cache(weights, self.spec, p, recipe) for p in self.prepared.prompts)
            found = [{k: v.to(self._device) for k, v in cache.items()} for cache in caches]
            self._text = (weights, found)
        return self._text[1]

    def run(
        self,
        recipe: Recipe,
        *,
        weights: WeightSource | None = None,
        observe: Observe | None = None,
        progress: Progress | None = None,
    ) -> list[Float32Array]:
        """Return the network's answers x (H, A), one for each sample.

        Args:
            recipe: what each layer computes in.
            weights: taken in place of the network's own, such as folded ones.
            observe: sees the input of every linear layer.
            progress: called with stage, done and total.
        """
        source = self.network.weights if weights is None else weights
        with torch.inference_mode():
            return self._run(recipe, source, observe, progress)

    def _keeping(self) -> AbstractContextManager[None]:
        """Keep the network's own weights, which folded ones are made from, for all steps."""
        if isinstance(self.network.weights, KeepingSource):
            return self.network.weights.keeping(self._kept_bytes)
        return nullcontext()

    def _run(
        self,
        recipe: Recipe,
        weights: WeightSource,
        observe: Observe | None,
        progress: Progress | None,
    ) -> list[Float32Array]:
        spec, prepared, net = self.spec, self.prepared, self.spec.network
        step = 0

        def watch(name: str, sample: int, x: torch.Tensor) -> None:
            if observe is not None:
                observe(torch_ops.stage, step, name, sample, x)

        torch_ops = TorchOps(weights, recipe, eps=net.eps, device=self._device)
        ops = BatchOps(torch_ops, len(prepared), watch if observe is not None else None)
        path = ActionPath(ops, spec)
        caches = self._prompts(weights)
        chosen = [caches[i] for i in prepared.prompt_idx]
        prompt = {s.name: _key_values(chosen, s.name, net.n_layers) for s in streams(net)}
        bias = tuple(cache["prompt_bias"] for cache in chosen)
        modulation = {s.name: self._prefix_rows(weights, s, ops) for s in streams(net)}
        rows = tables.denoise_rows(weights, spec).to(self._device)
        sigmas = torch.tensor(spec.sampler.sigmas, dtype=torch.float32).to(self._device)
        x = prepared.noises
        # Text and time were read before: what is kept is what the steps read again.
        with self._keeping():
            torch_ops.stage = "prefill"
            prefix = path.prefill(prepared.latents, prepared.states_norm, modulation, prompt, bias)
            torch_ops.stage = "denoise"
            for step in range(spec.sampler.n_steps):
                if progress is not None:
                    progress(recipe.name, step, spec.sampler.n_steps)
                step_rows = [ops.shared(row) for row in rows[step]]
                velocity = path.velocity(x, step_rows, prefix, prompt[path.action.name], bias)
                delta = sigmas[step + 1] - sigmas[step]
                x = tuple(a + delta * v for a, v in zip(x, velocity, strict=True))
        if progress is not None:
            progress(recipe.name, spec.sampler.n_steps, spec.sampler.n_steps)
        return [part.cpu().numpy() for part in x]

    def _prefix_rows(
        self, weights: WeightSource, stream: Stream, ops: BatchOps
    ) -> list[list[Batch]]:
        blocks = tables.prefix_rows(weights, self.spec, stream).to(self._device)
        return [[ops.shared(row) for row in block] for block in blocks]

    def actions(self, answers: Sequence[Float32Array]) -> list[FloatArray]:
        """Return absolute actions (H, D), rad and m, of answers of ``run``."""
        pairs = zip(answers, self.prepared.states, strict=True)
        return [actions_from_network(x, state, self.spec) for x, state in pairs]


def _key_values(
    caches: Sequence[Mapping[str, torch.Tensor]], stream: str, n_layers: int
) -> list[KeyValue[tuple[torch.Tensor, ...]]]:
    found = []
    for i in range(n_layers):
        if f"prompt_k.{stream}.{i}" not in caches[0]:
            break
        k, v = (tuple(c[f"prompt_{x}.{stream}.{i}"] for c in caches) for x in "kv")
        found.append(KeyValue(k=k, v=v))
    return found
