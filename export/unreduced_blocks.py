"""Modules of the unreduced network; names follow the checkpoint's.

Nothing is shared with :mod:`gwp_edge.export.network`: this is the second opinion that the reduced
action path is checked against.

Source: arXiv 2603.17240 and 2607.13960; the block is Wan2.2's, with adaLN per token.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own convention
from torch import nn

N_MODULATION_ROWS = 6
CODER_NARROW = 128
CODER_WIDE = 256
MAX_PERIOD = 10000.0


def time_sinusoid(timestep: torch.Tensor, width: int) -> torch.Tensor:
    """Return sinusoids (..., width) of timesteps (...), cosines first."""
    half = width // 2
    index = torch.arange(half, dtype=torch.float32, device=timestep.device)
    angle = timestep.float()[..., None] * torch.exp(index * (-math.log(MAX_PERIOD) / half))
    return torch.cat((torch.cos(angle), torch.sin(angle)), dim=-1)


def rotary_angles(positions: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Return rotary angles (n, head_dim / 2), rad, for positions (n, 3) as (t, y, x).

    y and x take ``2 (head_dim // 6)`` dimensions each, t the rest.
    """
    side = 2 * (head_dim // 6)
    parts = []
    for axis, width in enumerate((head_dim - 2 * side, side, side)):
        index = torch.arange(0, width, 2, dtype=torch.float64)
        frequency = torch.pow(torch.tensor(MAX_PERIOD, dtype=torch.float64), -index / width)
        parts.append(torch.outer(positions[:, axis].double(), frequency))
    return torch.cat(parts, dim=1)


def line_angles(positions: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Return rotary angles (n, head_dim / 2), rad, for 1-D positions (n,): state and actions."""
    index = torch.arange(0, head_dim, 2, dtype=torch.float64)
    frequency = torch.pow(torch.tensor(MAX_PERIOD, dtype=torch.float64), -index / head_dim)
    return torch.outer(positions.double(), frequency)


def rotate(x: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    """Rotate the interleaved pairs of x (B, n, heads, head_dim) by angles (n, head_dim / 2)."""
    pairs = x.float().reshape(*x.shape[:-1], -1, 2)
    cos, sin = angles.cos().float()[:, None, :], angles.sin().float()[:, None, :]
    first, second = pairs[..., 0], pairs[..., 1]
    turned = torch.stack((first * cos - second * sin, first * sin + second * cos), dim=-1)
    return turned.flatten(-2).to(x.dtype)


class Attention(nn.Module):
    """Projections of one attention: q and k normed over all heads at once."""

    def __init__(self, dim: int, inner_dim: int, n_heads: int, eps: float) -> None:
        super().__init__()
        self.n_heads = n_heads
        self.to_q = nn.Linear(dim, inner_dim)
        self.to_k = nn.Linear(dim, inner_dim)
        self.to_v = nn.Linear(dim, inner_dim)
        self.to_out = nn.ModuleList([nn.Linear(inner_dim, dim)])
        self.norm_q = nn.RMSNorm(inner_dim, eps=eps)
        self.norm_k = nn.RMSNorm(inner_dim, eps=eps)

    def heads(self, x: torch.Tensor) -> torch.Tensor:
        """(B, n, heads * d) to (B, n, heads, d)."""
        return x.reshape(*x.shape[:-1], self.n_heads, -1)

    def queries(self, x: torch.Tensor) -> torch.Tensor:
        """Return q (B, n, heads, d)."""
        return self.heads(self.norm_q(self.to_q(x)))

    def keys(self, x: torch.Tensor) -> torch.Tensor:
        """Return k (B, n, heads, d)."""
        return self.heads(self.norm_k(self.to_k(x)))

    def values(self, x: torch.Tensor) -> torch.Tensor:
        """Return v (B, n, heads, d)."""
        return self.heads(self.to_v(x))

    def project(self, x: torch.Tensor) -> torch.Tensor:
        """Return the output projection of (B, n, heads, d)."""
        y: torch.Tensor = self.to_out[0](x.flatten(-2))
        return y


def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None = None
) -> torch.Tensor:
    """Softmax attention over (B, n, heads, d); mask (n_q, n_k) is true where q may see k."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)


class FeedForwardIn(nn.Module):
    """First half of the feed-forward: linear and tanh GELU."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.proj = nn.Linear(dim, hidden_dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return gelu_tanh(W x + b)."""
        return F.gelu(self.proj(x), approximate="tanh")


class FeedForward(nn.Module):
    """Linear, tanh GELU, linear; the checkpoint counts a dropout between them."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.net = nn.Sequential(
            FeedForwardIn(dim, hidden_dim), nn.Identity(), nn.Linear(hidden_dim, dim)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the transformed tokens."""
        y: torch.Tensor = self.net(x)
        return y


def modulated(
    x: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor, eps: float
) -> torch.Tensor:
    """LN(x) (1 + scale) + shift in float32, every argument (B, n, C)."""
    y = F.layer_norm(x.float(), x.shape[-1:], eps=eps) * (1 + scale) + shift
    return y.to(x.dtype)


class Expert(nn.Module):
    """What one token stream has in a block: adaLN, both attentions, feed-forward."""

    def __init__(self, dim: int, inner_dim: int, ffn_dim: int, n_heads: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.attn1 = Attention(dim, inner_dim, n_heads, eps)
        self.attn2 = Attention(dim, inner_dim, n_heads, eps)
        self.norm2 = nn.LayerNorm(dim, eps=eps)
        self.ffn = FeedForward(dim, ffn_dim)
        self.scale_shift_table = nn.Parameter(torch.zeros(1, N_MODULATION_ROWS, dim))

    def modulation(self, projected: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return the six rows (B, n, C) from the time projection (B, n, 6, C)."""
        rows: tuple[torch.Tensor, ...]
        rows = torch.unbind(self.scale_shift_table.float() + projected.float(), dim=2)
        return rows

    def before_attention(
        self, x: torch.Tensor, rows: Sequence[torch.Tensor], angles: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return rotated q, k and plain v, (B, n, heads, d) each."""
        y = modulated(x, rows[1], rows[0], self.eps)
        q = rotate(self.attn1.queries(y), angles)
        k = rotate(self.attn1.keys(y), angles)
        return q, k, self.attn1.values(y)

    def after_attention(
        self,
        x: torch.Tensor,
        attended: torch.Tensor,
        rows: Sequence[torch.Tensor],
        text: torch.Tensor,
    ) -> torch.Tensor:
        """Finish the block: residual, cross-attention to text (no mask), feed-forward."""
        x = (x.float() + rows[2] * self.attn1.project(attended).float()).to(x.dtype)
        norm = F.layer_norm(
            x.float(), x.shape[-1:], self.norm2.weight.float(), self.norm2.bias.float(), self.eps
        ).to(x.dtype)
        q, k, v = self.attn2.queries(norm), self.attn2.keys(text), self.attn2.values(text)
        x = x + self.attn2.project(attend(q, k, v))
        y = self.ffn(modulated(x, rows[4], rows[3], self.eps))
        out: torch.Tensor = (x.float() + rows[5] * y.float()).to(x.dtype)
        return out


class ExpertPair(nn.Module):
    """A block of GWP-0.5: one expert for each stream."""

    def __init__(self, visual: Expert, action: Expert) -> None:
        super().__init__()
        self.visual_expert = visual
        self.action_expert = action


class TimeEmbedder(nn.Module):
    """Sinusoid, linear, SiLU, linear."""

    def __init__(self, freq_dim: int, dim: int) -> None:
        super().__init__()
        self.freq_dim = freq_dim
        self.linear_1 = nn.Linear(freq_dim, dim)
        self.linear_2 = nn.Linear(dim, dim)

    def forward(self, timestep: torch.Tensor) -> torch.Tensor:
        """Return temb (..., C) of timesteps (...)."""
        sinusoid = time_sinusoid(timestep, self.freq_dim).to(self.linear_1.weight.dtype)
        y: torch.Tensor = self.linear_2(F.silu(self.linear_1(sinusoid)))
        return y


class TextEmbedder(nn.Module):
    """Linear, tanh GELU, linear."""

    def __init__(self, text_dim: int, dim: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(text_dim, dim)
        self.linear_2 = nn.Linear(dim, dim)

    def forward(self, text: torch.Tensor) -> torch.Tensor:
        """Return embedded rows (B, n, C)."""
        y: torch.Tensor = self.linear_2(F.gelu(self.linear_1(text), approximate="tanh"))
        return y


class ConditionEmbedder(nn.Module):
    """Time and text embedders of one stream."""

    def __init__(self, freq_dim: int, text_dim: int, dim: int) -> None:
        super().__init__()
        self.time_embedder = TimeEmbedder(freq_dim, dim)
        self.time_proj = nn.Linear(dim, N_MODULATION_ROWS * dim)
        self.text_embedder = TextEmbedder(text_dim, dim)

    def forward(self, timestep: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return temb (B, n, C) and its projection (B, n, 6, C) for timesteps (B, n)."""
        temb = self.time_embedder(timestep)
        projected = self.time_proj(F.silu(temb))
        return temb, projected.reshape(*temb.shape[:-1], N_MODULATION_ROWS, -1)


class EmbodimentLinear(nn.Module):
    """A linear layer for each embodiment, stored [embodiment, in, out]."""

    def __init__(self, n_embodiments: int, d_in: int, d_out: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(n_embodiments, d_in, d_out))
        self.bias = nn.Parameter(torch.zeros(n_embodiments, d_out))

    def forward(self, x: torch.Tensor, embodiment: torch.Tensor) -> torch.Tensor:
        """Return x (B, n, in) through the layer of each batch entry's embodiment (B,)."""
        return torch.baddbmm(self.bias[embodiment][:, None], x, self.weight[embodiment])


@dataclass(frozen=True, slots=True, kw_only=True)
class CoderSizes:
    """Outer sizes of an encoder or decoder."""

    n_embodiments: int
    channels: int
    dim: int


class ActionEncoder(nn.Module):
    """State or actions to tokens."""

    def __init__(self, sizes: CoderSizes) -> None:
        super().__init__()
        self.in_proj = EmbodimentLinear(sizes.n_embodiments, sizes.channels, CODER_NARROW)
        self.mid_proj = nn.Linear(CODER_NARROW, CODER_WIDE)
        self.out_proj = nn.Linear(CODER_WIDE, sizes.dim)

    def forward(self, x: torch.Tensor, embodiment: torch.Tensor) -> torch.Tensor:
        """Return tokens (B, n, C) of values (B, n, A)."""
        y = F.gelu(self.in_proj(x, embodiment))
        tokens: torch.Tensor = self.out_proj(F.gelu(self.mid_proj(y)))
        return tokens


class ActionDecoder(nn.Module):
    """Tokens to velocities of actions."""

    def __init__(self, sizes: CoderSizes) -> None:
        super().__init__()
        self.in_proj = nn.Linear(sizes.dim, CODER_WIDE)
        self.mid_proj = nn.Linear(CODER_WIDE, CODER_NARROW)
        self.out_proj = EmbodimentLinear(sizes.n_embodiments, CODER_NARROW, sizes.channels)

    def forward(self, x: torch.Tensor, embodiment: torch.Tensor) -> torch.Tensor:
        """Return values (B, n, A) of tokens (B, n, C)."""
        y: torch.Tensor = F.gelu(self.mid_proj(F.gelu(self.in_proj(x))))
        out: torch.Tensor = self.out_proj(y, embodiment)
        return out
