"""Load the original network and VAE whole, and serve them as upstream does."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from gwp_edge.errors import SpecError
from gwp_edge.export.checkpoint import network_sizes, open_checkpoint, open_module
from gwp_edge.export.unreduced import UnreducedNetwork

N_PROMPT_ROWS = 64


def pad_prompt(embedding: torch.Tensor) -> torch.Tensor:
    """Return (1, 64, text_dim) with zero rows after the prompt's rows (n, text_dim).

    Raises:
        SpecError: the prompt is not 1 to 64 rows.
    """
    if embedding.ndim != 2 or not 1 <= len(embedding) <= N_PROMPT_ROWS:
        raise SpecError(
            f"prompt embedding: expected 1 to {N_PROMPT_ROWS} rows (n, text_dim), "
            f"got {tuple(embedding.shape)}"
        )
    padded = torch.zeros((1, N_PROMPT_ROWS, embedding.shape[1]))
    padded[0, : len(embedding)] = embedding
    return padded


def load_network(path: Path) -> UnreducedNetwork:
    """Load a checkpoint whole; its names must be exactly the network's.

    Raises:
        SpecError: the checkpoint is not one of the two families, or its tensors do not fit.
    """
    with open_checkpoint(path) as checkpoint:
        with torch.device("meta"):
            network = UnreducedNetwork(network_sizes(checkpoint))
        tensors = {name: checkpoint.load(name).float() for name in checkpoint.names()}
    try:
        network.load_state_dict(tensors, strict=True, assign=True)
    except RuntimeError as e:
        raise SpecError(f"{path}: {' '.join(str(e).split())}") from e
    return network.eval()


class WanVae:
    """The VAE as diffusers has it, with its latents normalised. Threads: one owner."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        config = cast("Any", model).config
        shape = (1, -1, 1, 1, 1)
        self._mean = torch.tensor(config.latents_mean).reshape(shape)
        self._std = torch.tensor(config.latents_std).reshape(shape)

    def encode(self, frames: torch.Tensor) -> torch.Tensor:
        """Return the normalised posterior mode (B, C, f, h/16, w/16).

        Args:
            frames: uint8 RGB, (B, 1 + 4 (f - 1), h, w, 3); the first frame is encoded alone.
        """
        pixels = frames.float().permute(0, 4, 1, 2, 3) * 2 / 255 - 1
        mode: torch.Tensor = cast("Any", self.model).encode(pixels).latent_dist.mode()
        return (mode - self._mean) / self._std


def make_vae(config: Mapping[str, object]) -> nn.Module:
    """Build diffusers' VAE from the fields of its config.json."""
    from diffusers import AutoencoderKLWan

    fields = {name: value for name, value in config.items() if not name.startswith("_")}
    vae: nn.Module = cast("Any", AutoencoderKLWan)(**fields).eval()
    return vae


def load_vae(folder: Path) -> WanVae:
    """Load a VAE folder; its names must be exactly diffusers' own.

    Raises:
        SpecError: there is no such folder, or its tensors do not fit its config.json.
    """
    with open_module(folder) as module:
        with torch.device("meta"):
            vae = make_vae(json.loads((folder / "config.json").read_text(encoding="utf-8")))
        tensors = {name: module.load(name).float() for name in module.names()}
    try:
        vae.load_state_dict(tensors, strict=True, assign=True)
    except RuntimeError as e:
        raise SpecError(f"{folder}: {' '.join(str(e).split())}") from e
    return WanVae(vae)


def sample(
    network: UnreducedNetwork,
    *,
    state: torch.Tensor,
    reference: torch.Tensor,
    prompt: torch.Tensor,
    noise: torch.Tensor,
    timesteps: Sequence[float],
    sigmas: Sequence[float],
    embodiment: int = 0,
    cached: bool | None = None,
) -> tuple[torch.Tensor, list[torch.Tensor], list[torch.Tensor]]:
    """Denoise a chunk as upstream serves the family.

    Args:
        network: either family.
        state: (B, 1, A).
        reference: (B, C, 1, h, w).
        prompt: (B, 64, text_dim).
        noise: (B, H, A).
        timesteps: t of the N steps.
        sigmas: N + 1 values down to 0.
        embodiment: which per-embodiment weights.
        cached: keep the prefix's K/V over the steps; None for the family's own way, which is
            yes for GWP-0.5 and no for GWP-0 (all tokens in every step).

    Returns:
        The clean normalised actions (B, H, A), the velocity at every step, and the sample
        after every step.
    """
    cached = network.two_streams if cached is None else cached
    past = network.prefix(state, reference, prompt, embodiment=embodiment) if cached else None
    x = noise.float()
    velocities, samples = [], []
    for i, t in enumerate(timesteps):
        timestep = torch.full((len(x),), float(t))
        if past is not None:
            v = network.cached_step(x, timestep, prompt, past, embodiment=embodiment)
        else:
            v, _ = network(
                state=state,
                reference=reference,
                actions=x,
                action_timestep=timestep,
                prompt=prompt,
                embodiment=embodiment,
            )
        x = x + (sigmas[i + 1] - sigmas[i]) * v.float()
        velocities.append(v)
        samples.append(x)
    return x, velocities, samples
