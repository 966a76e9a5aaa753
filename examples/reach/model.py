"""The example's network: GWP-0.5 at a small size, its joint training loss, its files."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn
from vae import LATENT_CHANNELS
from words import TEXT_DIM

from gwp_edge.export.sizes import NetworkSizes
from gwp_edge.export.unreduced import Tokens, UnreducedNetwork
from gwp_edge.export.unreduced_blocks import EmbodimentLinear
from gwp_edge.export.unreduced_serving import pad_prompt

SIZES = NetworkSizes(
    family="gwp-0.5",
    n_layers=5,
    n_heads=4,
    head_dim=32,
    visual_dim=128,
    action_dim=96,
    visual_ffn_dim=384,
    action_ffn_dim=384,
    n_action_channels=8,
    latent_channels=LATENT_CHANNELS,
    freq_dim=128,
    text_dim=TEXT_DIM,
    n_embodiments=1,
)
ACTION_SHIFT = 5.0
VIDEO_SHIFT = 2.0
_CLASS = "CasualWorldActionTransformer_MoT"


def make_network(seed: int) -> UnreducedNetwork:
    """Return the untrained network: small random weights, gates nearly shut."""
    torch.manual_seed(seed)
    network = UnreducedNetwork(SIZES)
    for name, module in network.named_modules():
        if isinstance(module, EmbodimentLinear):
            nn.init.normal_(module.weight, std=1.0 / math.sqrt(module.weight.shape[1]))
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
        if name.endswith("time_proj"):
            nn.init.normal_(module.weight, std=0.02)
    for name, parameter in network.named_parameters():
        if name.endswith("scale_shift_table"):
            nn.init.normal_(parameter, std=0.02)
            if parameter.shape[1] == 6:  # the two gates
                with torch.no_grad():
                    parameter[:, 2] += 0.3
                    parameter[:, 5] += 0.3
    nn.init.zeros_(network.proj_out.weight)
    nn.init.zeros_(network.action_decoder.out_proj.weight)
    return network


def draw_timesteps(n: int, shift: float, generator: torch.Generator) -> torch.Tensor:
    """Draw n timesteps 0 to 1000 of the shifted schedule, as the network is trained with them."""
    r = torch.rand(n, generator=generator)
    return torch.round(1000.0 * shift * r / (1.0 + (shift - 1.0) * r))


def told(timestep: torch.Tensor) -> torch.Tensor:
    """Return what the network is told of ``timestep``: rounded to bfloat16, as served."""
    return timestep.bfloat16().float()


def noised(
    clean: torch.Tensor, timestep: torch.Tensor, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the noisy values at ``timestep`` (B,), and the velocity that leads from clean."""
    noise = torch.randn(clean.shape, generator=generator)
    sigma = (timestep / 1000.0).reshape(-1, *[1] * (clean.ndim - 1))
    return (1.0 - sigma) * clean + sigma * noise, noise - clean


@dataclass(frozen=True, kw_only=True)
class Batch:
    """What a step trains on.

    Attributes:
        state: (B, 1, A), normalised.
        actions: clean, (B, H, A).
        reference: latent of the present frame, (B, C, 1, h, w), normalised.
        future: latent of the future frames, the same, or None to train actions alone.
        prompt: (B, 64, text).
    """

    state: torch.Tensor
    actions: torch.Tensor
    reference: torch.Tensor
    future: torch.Tensor | None
    prompt: torch.Tensor


def replica_mask(parts: list[tuple[int, int, int]]) -> torch.Tensor:
    """Return which token sees which, when one prefix serves several noisy copies of the actions.

    Args:
        parts: tokens, group (0 prefix, 1 actions, 2 future) and copy of each run of tokens. A
            copy of the actions sees the prefix and itself; the future sees the first copy.
    """
    groups = torch.cat([torch.full((n,), group) for n, group, _ in parts])
    copies = torch.cat([torch.full((n,), copy) for n, _, copy in parts])
    below = groups[None, :] < groups[:, None]
    same = (groups[None, :] == groups[:, None]) & (copies[None, :] == copies[:, None])
    hidden = (groups[None, :] == 1) & (groups[:, None] == 2) & (copies[None, :] > 0)
    return (below | same) & ~hidden


def losses(
    network: UnreducedNetwork, batch: Batch, generator: torch.Generator, *, n_copies: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the flow losses of actions and of the future video (0 without one).

    The prefix is computed once and serves ``n_copies`` noisy copies of the actions at timesteps
    of their own: the same loss in the mean as that many passes, for less.
    """
    n = len(batch.state)
    tokens: list[Tokens] = [network.state_tokens(batch.state)]
    targets = []
    for _ in range(n_copies):
        t = draw_timesteps(n, ACTION_SHIFT, generator)
        x, target = noised(batch.actions, t, generator)
        tokens.append(network.action_tokens(x, told(t)))
        targets.append(target)
    tokens.append(network.visual_tokens(batch.reference, None))
    parts = [(1, 0, 0), *((targets[0].shape[1], 1, i) for i in range(n_copies))]
    parts.append((tokens[-1].n, 0, 0))
    if batch.future is not None:
        t = draw_timesteps(n, VIDEO_SHIFT, generator)
        x, video_target = noised(batch.future, t, generator)
        tokens.append(network.visual_tokens(x, told(t)))
        parts.append((tokens[-1].n, 2, 0))
    result, _ = network.run(tokens, batch.prompt, mask=replica_mask(parts))
    action_loss = torch.zeros(())
    for (_, x, temb), target in zip(result[1 : 1 + n_copies], targets, strict=True):
        action_loss = action_loss + (network.action_velocity(x, temb) - target).square().mean()
    video_loss = torch.zeros(())
    if batch.future is not None:
        _, x, temb = result[-1]
        velocity = network.video_velocity(x, temb, batch.future.shape)
        video_loss = (velocity - video_target).square().mean()
    return action_loss / n_copies, video_loss


def prompts(tasks: list[str]) -> torch.Tensor:
    """Return the padded prompt of every instruction, (n, 64, text)."""
    from words import embed

    return torch.cat([pad_prompt(embed(task)) for task in tasks])


def write_checkpoint(weights: Mapping[str, torch.Tensor], folder: Path) -> None:
    """Write ``weights`` in bfloat16 as a diffusers folder."""
    folder.mkdir(parents=True, exist_ok=True)
    s = SIZES
    config = {
        "_class_name": _CLASS,
        "action_expert_dim": s.action_dim,
        "action_ffn_dim": s.action_ffn_dim,
        "attention_head_dim": s.head_dim,
        "cross_attn_norm": True,
        "eps": s.eps,
        "ffn_dim": s.visual_ffn_dim,
        "freq_dim": s.freq_dim,
        "in_action_channels": s.n_action_channels,
        "in_channels": s.latent_channels,
        "num_attention_heads": s.n_heads,
        "num_embodiments": s.n_embodiments,
        "num_layers": s.n_layers,
        "out_action_channels": s.n_action_channels,
        "out_channels": s.latent_channels,
        "patch_size": [1, 2, 2],
        "qk_norm": "rms_norm_across_heads",
        "text_dim": s.text_dim,
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    save_file(
        {k: v.detach().to(torch.bfloat16).contiguous() for k, v in weights.items()},
        folder / "diffusion_pytorch_model.safetensors",
    )
