"""The original network, whole: what exports are checked against and what training trains.

Nothing is saved away: time embedders run for every token of every step, text K/V are recomputed in
every call from all 64 rows, every embodiment and the video head are there, the last block runs to
its end. Tokens are ``[state][reference][actions][future]``; state and reference see each other,
actions see those and themselves, future tokens see everything. Loading, the VAE
and the denoising loop are in :mod:`gwp_edge.export.unreduced_serving`.

Source: arXiv 2603.17240 and 2607.13960; open-gigaai/giga-world-policy at f3d5a88.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from gwp_edge.errors import SpecError
from gwp_edge.export.sizes import NetworkSizes
from gwp_edge.export.unreduced_blocks import (
    ActionDecoder,
    ActionEncoder,
    CoderSizes,
    ConditionEmbedder,
    Expert,
    ExpertPair,
    attend,
    line_angles,
    modulated,
    rotary_angles,
)

_PREFIX, _ACTIONS, _FUTURE = 0, 1, 2
_LATENT_PER_TOKEN = 2

KeyValues = list[tuple[torch.Tensor, torch.Tensor]]


@dataclass(frozen=True, kw_only=True)
class Tokens:
    """A run of tokens of one kind.

    Attributes:
        stream: ``visual`` or ``action``: which expert and embedders serve them.
        group: 0 prefix, 1 actions, 2 future; a token sees its own group and those below.
        x: values, (B, n, C).
        timestep: t of every token, (B, n), on a scale of 1000.
        angles: rotary angles, (n, head_dim / 2), rad.
    """

    stream: str
    group: int
    x: torch.Tensor
    timestep: torch.Tensor
    angles: torch.Tensor

    @property
    def n(self) -> int:
        """Number of tokens."""
        return self.x.shape[1]


@dataclass(frozen=True, kw_only=True)
class _Stream:
    """All tokens that one expert serves, with what does not change from block to block."""

    name: str
    parts: tuple[Tokens, ...]
    temb: torch.Tensor
    projected: torch.Tensor
    text: torch.Tensor
    angles: torch.Tensor


def causal_mask(groups_q: torch.Tensor, groups_k: torch.Tensor) -> torch.Tensor:
    """Return (n_q, n_k), true where a token of group q may see one of group k."""
    return groups_k[None, :] <= groups_q[:, None]


class UnreducedNetwork(nn.Module):
    """The transformer with every weight of the checkpoint. Threads: one owner."""

    def __init__(self, sizes: NetworkSizes) -> None:
        super().__init__()
        s = self.sizes = sizes
        D, E = s.visual_dim, s.action_dim
        self.two_streams = s.family == "gwp-0.5"
        self.patch_embedding = nn.Conv3d(s.latent_channels, D, (1, 2, 2), stride=(1, 2, 2))
        self.condition_embedder = ConditionEmbedder(s.freq_dim, s.text_dim, D)
        self.scale_shift_table = nn.Parameter(torch.zeros(1, 2, D))
        self.proj_out = nn.Linear(D, s.latent_channels * _LATENT_PER_TOKEN**2)
        coder = CoderSizes(n_embodiments=s.n_embodiments, channels=s.n_action_channels, dim=E)
        self.action_encoder = ActionEncoder(coder)
        self.action_decoder = ActionDecoder(coder)
        if self.two_streams:
            self.state_encoder = ActionEncoder(coder)
            self.action_condition_embedder = ConditionEmbedder(s.freq_dim, s.text_dim, E)
            self.action_scale_shift_table = nn.Parameter(torch.zeros(1, 2, E))
        self.blocks = nn.ModuleList([self._block() for _ in range(s.n_layers)])

    def _block(self) -> nn.Module:
        s = self.sizes
        visual = Expert(s.visual_dim, s.visual_dim, s.visual_ffn_dim, s.n_heads, s.eps)
        if not self.two_streams:
            return visual
        action = Expert(s.action_dim, s.visual_dim, s.action_ffn_dim, s.n_heads, s.eps)
        return ExpertPair(visual, action)

    def _expert(self, i: int, stream: str) -> Expert:
        block = self.blocks[i]
        if isinstance(block, ExpertPair):
            return block.visual_expert if stream == "visual" else block.action_expert
        if not isinstance(block, Expert):
            raise TypeError(f"block {i} is a {type(block).__name__}")
        return block

    # -- tokens ------------------------------------------------------------------------------

    def _embodiments(self, batch: int, embodiment: int) -> torch.Tensor:
        if not 0 <= embodiment < self.sizes.n_embodiments:
            raise SpecError(
                f"embodiment {embodiment} is not in the network; it has "
                f"0 to {self.sizes.n_embodiments - 1}"
            )
        return torch.full((batch,), embodiment, dtype=torch.long)

    def state_tokens(self, state: torch.Tensor, *, embodiment: int = 0) -> Tokens:
        """Return the token of a normalised, padded state (B, 1, A)."""
        encoder = self.state_encoder if self.two_streams else self.action_encoder
        return Tokens(
            stream="action",
            group=_PREFIX,
            x=encoder(state, self._embodiments(len(state), embodiment)),
            timestep=torch.zeros(state.shape[:2]),
            angles=line_angles(torch.zeros(1), self.sizes.head_dim),
        )

    def action_tokens(
        self, actions: torch.Tensor, timestep: torch.Tensor, *, embodiment: int = 0
    ) -> Tokens:
        """Return the tokens of noisy actions (B, H, A) at timesteps (B,)."""
        batch, rows = actions.shape[:2]
        return Tokens(
            stream="action",
            group=_ACTIONS,
            x=self.action_encoder(actions, self._embodiments(batch, embodiment)),
            timestep=timestep[:, None].expand(batch, rows),
            angles=line_angles(torch.arange(1, rows + 1), self.sizes.head_dim),
        )

    def visual_tokens(self, latent: torch.Tensor, timestep: torch.Tensor | None) -> Tokens:
        """Return the tokens of latent frames (B, C, f, h, w).

        Args:
            latent: normalised latent; the reference frame, or the future frames.
            timestep: (B,) for noisy future frames at positions t = 1, 2, ...; None for the clean
                reference frame at position t = 0.
        """
        x = self.patch_embedding(latent)
        batch, _, frames, h, w = x.shape
        first = 0 if timestep is None else 1
        grid = torch.cartesian_prod(
            torch.arange(first, first + frames), torch.arange(h), torch.arange(w)
        )
        n = frames * h * w
        t = torch.zeros(batch) if timestep is None else timestep
        return Tokens(
            stream="visual",
            group=_PREFIX if timestep is None else _FUTURE,
            x=x.flatten(2).transpose(1, 2),
            timestep=t[:, None].expand(batch, n),
            angles=rotary_angles(grid, self.sizes.head_dim),
        )

    # -- blocks ------------------------------------------------------------------------------

    def _streams(self, tokens: Sequence[Tokens], prompt: torch.Tensor) -> list[_Stream]:
        names = ("action", "visual") if self.two_streams else ("all",)
        streams = []
        for name in names:
            parts = tuple(t for t in tokens if name in (t.stream, "all"))
            if not parts:
                continue
            embedder = (
                self.action_condition_embedder if name == "action" else self.condition_embedder
            )
            temb, projected = embedder(torch.cat([p.timestep for p in parts], dim=1))
            streams.append(
                _Stream(
                    name=name,
                    parts=parts,
                    temb=temb,
                    projected=projected,
                    text=embedder.text_embedder(prompt),
                    angles=torch.cat([p.angles for p in parts]),
                )
            )
        return streams

    def run(
        self,
        tokens: Sequence[Tokens],
        prompt: torch.Tensor,
        *,
        past: KeyValues | None = None,
        mask: torch.Tensor | None = None,
    ) -> tuple[list[tuple[Tokens, torch.Tensor, torch.Tensor]], KeyValues]:
        """Run every block entirely.

        Args:
            tokens: runs of tokens.
            prompt: (B, 64, text_dim), zero rows included.
            past: K/V of prefix tokens of every block; every token here sees them.
            mask: (n, n) over the tokens in the order of the result; the causal mask if None.

        Returns:
            For every run: the run, its final values (B, n, C) and temb (B, n, C); and the K/V of
            all tokens, (B, n, heads, head_dim) each, for every block.
        """
        streams = self._streams(tokens, prompt)
        order = [part for stream in streams for part in stream.parts]
        if mask is None:
            groups = torch.cat([torch.full((p.n,), p.group) for p in order])
            mask = causal_mask(groups, groups)
        if past is not None:
            seen = torch.ones((mask.shape[0], past[0][0].shape[1]), dtype=torch.bool)
            mask = torch.cat((seen, mask), dim=1)
        visible = None if bool(mask.all()) else mask
        values = [torch.cat([p.x for p in stream.parts], dim=1) for stream in streams]
        cache: KeyValues = []
        for i in range(self.sizes.n_layers):
            values, kv = self._run_block(i, streams, values, visible, past[i] if past else None)
            cache.append(kv)
        result: list[tuple[Tokens, torch.Tensor, torch.Tensor]] = []
        for stream, x in zip(streams, values, strict=True):
            sizes = [p.n for p in stream.parts]
            finals, tembs = torch.split(x, sizes, 1), torch.split(stream.temb, sizes, 1)
            result.extend(zip(stream.parts, finals, tembs, strict=True))
        return result, cache

    def _run_block(
        self,
        i: int,
        streams: Sequence[_Stream],
        values: Sequence[torch.Tensor],
        mask: torch.Tensor | None,
        past: tuple[torch.Tensor, torch.Tensor] | None,
    ) -> tuple[list[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]:
        experts = [self._expert(i, stream.name) for stream in streams]
        rows = [e.modulation(s.projected) for e, s in zip(experts, streams, strict=True)]
        qkv = [
            e.before_attention(x, r, s.angles)
            for e, x, r, s in zip(experts, values, rows, streams, strict=True)
        ]
        q, k, v = (torch.cat(parts, dim=1) for parts in zip(*qkv, strict=True))
        own = (k, v)
        if past is not None:
            k, v = torch.cat((past[0], k), dim=1), torch.cat((past[1], v), dim=1)
        attended = torch.split(attend(q, k, v, mask), [x.shape[1] for x in values], dim=1)
        out = [
            e.after_attention(x, a, r, s.text)
            for e, x, a, r, s in zip(experts, values, attended, rows, streams, strict=True)
        ]
        return out, own

    # -- heads -------------------------------------------------------------------------------

    def _head(self, x: torch.Tensor, temb: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
        shift, scale = (table.float() + temb.float()[:, :, None]).unbind(dim=2)
        return modulated(x, scale, shift, self.sizes.eps)

    def action_velocity(
        self, x: torch.Tensor, temb: torch.Tensor, *, embodiment: int = 0
    ) -> torch.Tensor:
        """Return the velocities (B, H, A) of action tokens (B, H, C)."""
        table = self.action_scale_shift_table if self.two_streams else self.scale_shift_table
        y = self._head(x, temb, table)
        out: torch.Tensor = self.action_decoder(y, self._embodiments(len(x), embodiment))
        return out

    def video_velocity(
        self, x: torch.Tensor, temb: torch.Tensor, shape: Sequence[int]
    ) -> torch.Tensor:
        """Return the velocities of future tokens, un-patched to ``shape`` (B, C, f, h, w)."""
        batch, channels, frames, h, w = shape
        p = _LATENT_PER_TOKEN
        y = self.proj_out(self._head(x, temb, self.scale_shift_table))
        y = y.reshape(batch, frames, h // p, w // p, p, p, channels)
        frames_first: torch.Tensor = y.permute(0, 6, 1, 2, 4, 3, 5)
        return frames_first.reshape(batch, channels, frames, h, w)

    # -- passes ------------------------------------------------------------------------------

    def forward(
        self,
        *,
        state: torch.Tensor,
        reference: torch.Tensor,
        actions: torch.Tensor,
        action_timestep: torch.Tensor,
        prompt: torch.Tensor,
        future: torch.Tensor | None = None,
        future_timestep: torch.Tensor | None = None,
        embodiment: int = 0,
        mask: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Predict velocities (noise - clean) of actions and, in training, of future frames.

        Args:
            state: (B, 1, A), normalised and padded.
            reference: clean latent of the present frame, (B, C, 1, h, w).
            actions: noisy actions, (B, H, A).
            action_timestep: (B,), on a scale of 1000.
            prompt: (B, 64, text_dim).
            future: noisy latent of the future frames, (B, C, f, h, w), or None.
            future_timestep: (B,), given with ``future``.
            embodiment: which per-embodiment weights.
            mask: in place of the causal mask; for experiments.

        Returns:
            Velocities of actions (B, H, A) and of ``future``, in its shape, or None.

        Raises:
            SpecError: ``future`` and ``future_timestep`` are not given together.
        """
        if (future is None) != (future_timestep is None):
            raise SpecError("future and future_timestep go together; give both or none")
        tokens = [
            self.state_tokens(state, embodiment=embodiment),
            self.visual_tokens(reference, None),
            self.action_tokens(actions, action_timestep, embodiment=embodiment),
        ]
        if future is not None:
            tokens.append(self.visual_tokens(future, future_timestep))
        result, _ = self.run(tokens, prompt, mask=mask)
        by_group = {(run.stream, run.group): (x, temb) for run, x, temb in result}
        x, temb = by_group["action", _ACTIONS]
        velocity = self.action_velocity(x, temb, embodiment=embodiment)
        if future is None:
            return velocity, None
        x, temb = by_group["visual", _FUTURE]
        return velocity, self.video_velocity(x, temb, future.shape)

    def prefix(
        self,
        state: torch.Tensor,
        reference: torch.Tensor,
        prompt: torch.Tensor,
        *,
        embodiment: int = 0,
    ) -> KeyValues:
        """Return the K/V of state and reference tokens of every block, as GWP-0.5 is served."""
        tokens = [
            self.state_tokens(state, embodiment=embodiment),
            self.visual_tokens(reference, None),
        ]
        return self.run(tokens, prompt)[1]

    def cached_step(
        self,
        actions: torch.Tensor,
        timestep: torch.Tensor,
        prompt: torch.Tensor,
        past: KeyValues,
        *,
        embodiment: int = 0,
    ) -> torch.Tensor:
        """Return the velocities (B, H, A) of noisy actions given the prefix's K/V."""
        tokens = self.action_tokens(actions, timestep, embodiment=embodiment)
        ((_, x, temb),) = self.run([tokens], prompt, past=past)[0]
        return self.action_velocity(x, temb, embodiment=embodiment)
