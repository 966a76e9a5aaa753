"""Modulation tables: all that the network derives from time alone.

The timesteps of a bundle are fixed, so the time embedders never reach the robot. Scale rows hold
their ``1 +``, which turns an adaptive norm into one LayerNormalization.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own convention

from gwp_edge.export.folding import FoldedWeights
from gwp_edge.export.network import Stream, action_stream, head_table
from gwp_edge.export.ops import WeightSource
from gwp_edge.spec import PolicySpec

N_BLOCK_ROWS = 6
N_HEAD_ROWS = 2


def sinusoid(timestep: float, width: int) -> torch.Tensor:
    """Return the sinusoid of one timestep, cosines first, shape (1, width)."""
    half = width // 2
    exponent = -math.log(10000.0) * torch.arange(half, dtype=torch.float32) / half
    angles = torch.tensor([timestep], dtype=torch.float32)[:, None] * exponent.exp()[None, :]
    return torch.cat([angles.cos(), angles.sin()], dim=1)


class TimeEmbedder:
    """The time embedder of one stream, its weights held in float32. Threads: one owner."""

    def __init__(self, weights: WeightSource, stream: Stream, freq_dim: int) -> None:
        def load(name: str) -> torch.Tensor:
            return weights.load(f"{stream.condition}.{name}").to(torch.float32)

        self._freq_dim = freq_dim
        self._layers = [
            (load(f"{layer}.weight"), load(f"{layer}.bias"))
            for layer in ("time_embedder.linear_1", "time_embedder.linear_2", "time_proj")
        ]

    def __call__(self, timestep: float) -> tuple[torch.Tensor, torch.Tensor]:
        """Return temb (C,) and its projection (6, C) for one timestep."""
        (w1, b1), (w2, b2), (w3, b3) = self._layers
        x = F.silu(F.linear(sinusoid(timestep, self._freq_dim), w1, b1))
        temb = F.linear(x, w2, b2)
        return temb[0], F.linear(F.silu(temb), w3, b3).reshape(N_BLOCK_ROWS, -1)


def _load_table(weights: WeightSource, name: str) -> torch.Tensor:
    return weights.load(name).to(torch.float32)[0]


def _folded(weights: WeightSource, stream: Stream, i: int, rows: torch.Tensor) -> torch.Tensor:
    """Divide the rows of block ``i`` by the factors that its weights were multiplied with."""
    if isinstance(weights, FoldedWeights):
        return weights.fold_rows(stream.block.format(i), rows)
    return rows


def prefix_rows(weights: WeightSource, spec: PolicySpec, stream: Stream) -> torch.Tensor:
    """Return the prefix modulation at t = 0, shape (n_layers, 6, C)."""
    _, projected = TimeEmbedder(weights, stream, spec.network.freq_dim)(0.0)
    rows = torch.stack(
        [
            _load_table(weights, f"{stream.block.format(i)}scale_shift_table") + projected
            for i in range(spec.network.n_layers)
        ]
    )
    rows[:, [1, 4]] += 1.0
    return torch.stack([_folded(weights, stream, i, block) for i, block in enumerate(rows)])


def denoise_rows(weights: WeightSource, spec: PolicySpec) -> torch.Tensor:
    """Return the modulation of every step, shape (N, 6 * n_layers + 2, E).

    Row order: shift1, scale1, gate1, shift2, scale2, gate2 of every block, then shift and scale
    of the output head.
    """
    stream, n = action_stream(spec.network), spec.network.n_layers
    embed = TimeEmbedder(weights, stream, spec.network.freq_dim)
    tables = [_load_table(weights, f"{stream.block.format(i)}scale_shift_table") for i in range(n)]
    head = _load_table(weights, head_table(spec.network))
    steps = []
    for timestep in spec.sampler.timesteps:
        temb, projected = embed(timestep)
        blocks = torch.stack(tables) + projected
        blocks[:, [1, 4]] += 1.0
        blocks = torch.stack([_folded(weights, stream, i, rows) for i, rows in enumerate(blocks)])
        out = head + temb
        out[1] += 1.0
        steps.append(torch.cat([blocks.flatten(0, 1), out]))
    return torch.stack(steps)
