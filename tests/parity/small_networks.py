"""Small random networks of both families, as weight sources and as the unreduced original."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from gwp_edge.export import tables
from gwp_edge.export.accounting import expected_tensors
from gwp_edge.export.network import ActionPath, KeyValue, streams
from gwp_edge.export.precision import Recipe, make_recipe
from gwp_edge.export.prompt_cache import N_PROMPT_ROWS, prompt_cache
from gwp_edge.export.sizes import NetworkSizes
from gwp_edge.export.synthetic import random_tensor
from gwp_edge.export.torch_ops import TorchOps
from gwp_edge.export.unreduced import UnreducedNetwork
from gwp_edge.export.unreduced_serving import make_vae
from gwp_edge.sampler import make_schedule
from gwp_edge.spec import (
    CameraView,
    CanvasSpec,
    Channel,
    PolicySpec,
    SamplerSpec,
    Statistics,
)

# Threads cost more than they give on tensors this small.
torch.set_num_threads(1)

REFERENCE = Path(__file__).parents[1] / "data" / "reference"
FAMILIES = ("gwp05", "gwp0")

_BASE = NetworkSizes(
    family="gwp-0.5",
    n_layers=2,
    n_heads=3,
    head_dim=32,
    visual_dim=96,
    action_dim=48,
    visual_ffn_dim=192,
    action_ffn_dim=96,
    n_action_channels=32,
    latent_channels=48,
    freq_dim=64,
    text_dim=64,
    n_embodiments=2,
)
# Head size 14 splits into (6, 4, 4) rotary dimensions, 22 into (10, 6, 6).
NETWORKS = {
    "mot": _BASE,
    "mot_one_layer": replace(
        _BASE, n_layers=1, n_heads=1, head_dim=64, visual_dim=64, action_dim=72, n_embodiments=3
    ),
    "mot_odd": replace(
        _BASE,
        n_layers=3,
        n_heads=5,
        head_dim=14,
        visual_dim=70,
        action_dim=36,
        visual_ffn_dim=100,
        action_ffn_dim=52,
        n_action_channels=20,
        latent_channels=16,
        freq_dim=30,
        text_dim=24,
        eps=1e-5,
    ),
    "dense": replace(_BASE, family="gwp-0", action_dim=96, action_ffn_dim=192),
    "dense_one_layer": replace(
        _BASE,
        family="gwp-0",
        n_layers=1,
        n_heads=2,
        head_dim=22,
        visual_dim=44,
        action_dim=44,
        visual_ffn_dim=60,
        action_ffn_dim=60,
        n_action_channels=14,
        latent_channels=16,
    ),
    "dense_deep": replace(
        _BASE,
        family="gwp-0",
        n_layers=4,
        n_heads=4,
        head_dim=16,
        visual_dim=64,
        action_dim=64,
        visual_ffn_dim=96,
        action_ffn_dim=96,
        n_embodiments=1,
    ),
}


class RandomWeights:
    """A weight source with random values that also remembers what was read."""

    def __init__(self, shapes: dict[str, tuple[int, ...]], seed: int) -> None:
        self.shapes = shapes
        self.seed = seed
        self.read: set[str] = set()

    def shape(self, name: str) -> tuple[int, ...]:
        return self.shapes[name]

    def load(self, name: str) -> torch.Tensor:
        self.read.add(name)
        return random_tensor(name, self.shapes[name], seed=self.seed)

    def state_dict(self) -> dict[str, torch.Tensor]:
        return {name: random_tensor(name, s, seed=self.seed) for name, s in self.shapes.items()}


def network_weights(sizes: NetworkSizes, seed: int = 0) -> RandomWeights:
    return RandomWeights(expected_tensors(sizes), seed)


def unreduced(sizes: NetworkSizes, weights: RandomWeights) -> UnreducedNetwork:
    network = UnreducedNetwork(sizes)
    network.load_state_dict(weights.state_dict(), strict=True)
    return network.eval().requires_grad_(False)


def vae_config(z_dim: int = 48, **changes: object) -> dict[str, object]:
    rng = np.random.default_rng(z_dim)
    config: dict[str, object] = {
        "_class_name": "AutoencoderKLWan",
        "base_dim": 4,
        "decoder_base_dim": 4,
        "z_dim": z_dim,
        "dim_mult": [1, 2, 4, 4],
        "num_res_blocks": 2,
        "attn_scales": [],
        "temperal_downsample": [False, True, True],
        "dropout": 0.0,
        "latents_mean": rng.normal(0, 0.3, z_dim).tolist(),
        "latents_std": rng.uniform(0.5, 1.0, z_dim).tolist(),
        "is_residual": True,
        "in_channels": 12,
        "out_channels": 12,
        "patch_size": 2,
        "scale_factor_temporal": 4,
        "scale_factor_spatial": 16,
    }
    return {**config, **changes}


def vae_weights(config: dict[str, object], seed: int = 0) -> RandomWeights:
    with torch.device("meta"):
        model = make_vae(config)
    return RandomWeights({k: tuple(v.shape) for k, v in model.state_dict().items()}, seed)


def make_spec(
    sizes: NetworkSizes,
    *,
    n_text_rows: int = 16,
    n_rows: int = 12,
    width_px: int = 96,
    height_px: int = 64,
    embodiment: int = 0,
    sampler: SamplerSpec | None = None,
) -> PolicySpec:
    n = min(7, sizes.n_action_channels)
    return PolicySpec(
        network=sizes.network_spec(n_text_rows=n_text_rows),
        sampler=sampler or make_schedule(4),
        canvas=CanvasSpec(
            width_px=width_px,
            height_px=height_px,
            views=(
                CameraView(
                    camera="cam_high", x_px=0, y_px=0, width_px=width_px, height_px=height_px
                ),
            ),
        ),
        channels=tuple(Channel(name=f"j{i}", unit="rad", kind="delta") for i in range(n)),
        statistics=Statistics(
            state_q01=(-1.0,) * n,
            state_q99=(1.0,) * n,
            action_q01=(-1.0,) * n,
            action_q99=(1.0,) * n,
        ),
        n_rows=n_rows,
        period_ns=33_333_333,
        tasks=("task",),
        embodiment=embodiment,
    )


def prompt_rows(text_dim: int, n_kept: int = 11, seed: int = 0) -> torch.Tensor:
    """A padded prompt (64, text_dim) with ``n_kept`` non-zero rows in front."""
    rows = torch.zeros(N_PROMPT_ROWS, text_dim)
    rows[:n_kept] = torch.randn(n_kept, text_dim, generator=_generator(seed))
    return rows


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """What one chunk of a small network starts from; no batch axis but the latent's."""

    latent: torch.Tensor
    state: torch.Tensor
    noise: torch.Tensor
    prompt: torch.Tensor


def make_inputs(spec: PolicySpec, seed: int = 0) -> Inputs:
    g, net = _generator(seed), spec.network
    return Inputs(
        latent=torch.randn(spec.latent_shape, generator=g),
        state=torch.randn((1, net.n_action_channels), generator=g),
        noise=torch.randn((spec.n_rows, net.n_action_channels), generator=g),
        prompt=prompt_rows(net.text_dim, seed=seed),
    )


class ReducedPath:
    """The reduced network in eager torch, ready to denoise one input."""

    def __init__(
        self,
        weights: RandomWeights,
        spec: PolicySpec,
        inputs: Inputs,
        recipe: Recipe | None = None,
    ) -> None:
        recipe = recipe or make_recipe("fp32")
        self.spec, self.inputs = spec, inputs
        self.path = ActionPath(TorchOps(weights, recipe, eps=spec.network.eps), spec)
        self.cache = prompt_cache(weights, spec, inputs.prompt, recipe)
        self.bias = self.cache["prompt_bias"]
        self.prompt = {s.name: self._prompt(s.name) for s in streams(spec.network)}
        rows = {
            s.name: [list(block) for block in tables.prefix_rows(weights, spec, s)]
            for s in streams(spec.network)
        }
        self.prefix = self.path.prefill(inputs.latent, inputs.state, rows, self.prompt, self.bias)
        self.modulation = tables.denoise_rows(weights, spec)

    def _prompt(self, stream: str) -> list[KeyValue[torch.Tensor]]:
        blocks = range(self.spec.network.n_layers)
        return [
            KeyValue(
                k=self.cache[f"prompt_k.{stream}.{i}"].float(),
                v=self.cache[f"prompt_v.{stream}.{i}"].float(),
            )
            for i in blocks
            if f"prompt_k.{stream}.{i}" in self.cache
        ]

    def velocity(self, x: torch.Tensor, step: int) -> torch.Tensor:
        text = self.prompt[self.path.action.name]
        return self.path.velocity(x, list(self.modulation[step]), self.prefix, text, self.bias)

    def denoise(
        self,
        x: torch.Tensor,
        step: int,
        target: torch.Tensor | None = None,
        gain: torch.Tensor | None = None,
    ) -> torch.Tensor:
        sigma = torch.tensor(self.spec.sampler.sigmas, dtype=torch.float32)
        return self.path.denoise(
            x,
            sigma[step],
            sigma[step + 1] - sigma[step],
            torch.zeros_like(x) if target is None else target,
            torch.zeros(len(x), 1) if gain is None else gain,
            list(self.modulation[step]),
            self.prefix,
            self.prompt[self.path.action.name],
            self.bias,
        )

    def sample(self) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Return the velocity at every step and the sample after it."""
        x, velocities, samples = self.inputs.noise, [], []
        for i in range(self.spec.sampler.n_steps):
            velocities.append(self.velocity(x, i))
            x = self.denoise(x, i)
            samples.append(x)
        return velocities, samples


def relative(a: torch.Tensor | np.ndarray, b: torch.Tensor | np.ndarray) -> float:
    """Largest difference over the largest value of ``b``."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    assert a.shape == b.shape, (a.shape, b.shape)
    return float(np.abs(a - b).max() / np.abs(b).max())


def reference_arrays(family: str) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """The observation and the expected values of a reference case."""
    with (
        np.load(REFERENCE / family / "observation.npz") as observation,
        np.load(REFERENCE / family / "expected.npz") as expected,
    ):
        return dict(observation), dict(expected)


def reference_statistics(family: str) -> dict[str, np.ndarray]:
    """q01 and q99 of the 14 real channels: state_q01, state_q99, action_q01, action_q99."""
    stats = json.loads((REFERENCE / family / "norm_stats.json").read_text())["norm_stats"]
    return {
        f"{name}_{q}": np.array(stats[key][q][:14])
        for name, key in (("state", "observation.state"), ("action", "action"))
        for q in ("q01", "q99")
    }


def scrambled(
    network: UnreducedNetwork, chosen: Callable[[str], bool] | Sequence[str]
) -> UnreducedNetwork:
    """Return a copy of ``network`` with other values in the chosen tensors."""
    pick = chosen if callable(chosen) else set(chosen).__contains__
    tensors = {
        name: torch.randn(t.shape, generator=_generator(7)) if pick(name) else t
        for name, t in network.state_dict().items()
    }
    copy = UnreducedNetwork(network.sizes)
    copy.load_state_dict(tensors, strict=True)
    return copy.eval().requires_grad_(False)
