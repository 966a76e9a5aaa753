"""The action path of GWP-0.5 and GWP-0, written once over :class:`gwp_edge.export.ops.Ops`.

Four functions, one for each thing that is computed at a different time:

* :func:`prompt_kv`: text K/V of every block; once for each prompt, at export.
* :func:`prefill`: prefix K/V of every block; once for each observation.
* :func:`denoise`: one Euler step; N times for each chunk.
* the vision encoder is in :mod:`gwp_edge.export.vision_encoder`.

What action-only inference does not need is not here: future-video tokens, the video head, the
prefix stream of the last block after its K/V, time embedders (tables, see
:mod:`gwp_edge.export.tables`), and text K/V inside the robot's loop.

Source: arXiv 2603.17240 and 2607.13960; open-gigaai/giga-world-policy at f3d5a88.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic

import numpy as np
import numpy.typing as npt

from gwp_edge.export.ops import Ops, Order, V
from gwp_edge.spec import NetworkSpec, PolicySpec

ROPE_THETA = 10000.0


@dataclass(frozen=True, kw_only=True)
class KeyValue(Generic[V]):
    """K transposed to (heads, head_dim, tokens) and V (heads, tokens, head_dim) of one block."""

    k: V
    v: V


@dataclass(frozen=True, slots=True, kw_only=True)
class Stream:
    """Names of one token stream's weights.

    Attributes:
        name: ``visual`` or ``action``.
        block: format string of a block's prefix.
        condition: prefix of its text and time embedders.
        dim: width.
    """

    name: str
    block: str
    condition: str
    dim: int


def visual_stream(network: NetworkSpec) -> Stream:
    """Return the stream of the visual tokens."""
    block = "blocks.{}.visual_expert." if network.family == "gwp-0.5" else "blocks.{}."
    return Stream(
        name="visual", block=block, condition="condition_embedder", dim=network.visual_dim
    )


def action_stream(network: NetworkSpec) -> Stream:
    """Return the stream of state and actions; the visual one itself in the dense family."""
    if network.family == "gwp-0":
        return visual_stream(network)
    return Stream(
        name="action",
        block="blocks.{}.action_expert.",
        condition="action_condition_embedder",
        dim=network.action_dim,
    )


def streams(network: NetworkSpec) -> tuple[Stream, ...]:
    """Return the distinct streams: two experts, or one dense network."""
    visual, action = visual_stream(network), action_stream(network)
    return (visual,) if action == visual else (visual, action)


def state_encoder(network: NetworkSpec) -> str:
    """Return the name of the encoder that serves the state."""
    return "state_encoder" if network.family == "gwp-0.5" else "action_encoder"


def head_table(network: NetworkSpec) -> str:
    """Return the name of the output head's modulation table."""
    return "action_scale_shift_table" if network.family == "gwp-0.5" else "scale_shift_table"


def split_half_order(network: NetworkSpec) -> Order:
    """Return the output order that makes rotary pairs (2i, 2i+1) into halves (i, i + d/2).

    Applied to q and k alike it leaves every dot product unchanged and turns the strided rotation
    into two contiguous halves.
    """
    head = np.concatenate([np.arange(0, network.head_dim, 2), np.arange(1, network.head_dim, 2)])
    offsets = np.arange(network.n_heads)[:, None] * network.head_dim
    order: Order = (offsets + head[None, :]).reshape(-1)
    return order


def rope_angles(positions: npt.NDArray[np.float64], dim: int) -> npt.NDArray[np.float64]:
    """Return the angles of ``dim / 2`` rotary pairs, shape (n, dim / 2), rad."""
    frequency = ROPE_THETA ** (-np.arange(0, dim, 2, dtype=np.float64) / dim)
    return positions[:, None] * frequency[None, :]


def action_angles(network: NetworkSpec, n_rows: int) -> npt.NDArray[np.float64]:
    """Return the rotary angles of actions 1..H; the state sits at 0 and does not rotate."""
    return rope_angles(np.arange(1, n_rows + 1, dtype=np.float64), network.head_dim)


def visual_angles(network: NetworkSpec, height: int, width: int) -> npt.NDArray[np.float64]:
    """Return the rotary angles of a (height, width) grid of tokens at positions (0, y, x)."""
    side = 2 * (network.head_dim // 6)
    time_pairs = (network.head_dim - 2 * side) // 2
    y, x = np.meshgrid(np.arange(height), np.arange(width), indexing="ij")
    return np.concatenate(
        [
            np.zeros((height * width, time_pairs)),
            rope_angles(y.reshape(-1).astype(np.float64), side),
            rope_angles(x.reshape(-1).astype(np.float64), side),
        ],
        axis=1,
    )


class ActionPath(Generic[V]):
    """The network bound to one set of operators. Threads: one owner."""

    def __init__(self, ops: Ops[V], spec: PolicySpec) -> None:
        self.ops = ops
        self.spec = spec
        self.network = spec.network
        self.visual = visual_stream(spec.network)
        self.action = action_stream(spec.network)
        self._order = split_half_order(spec.network)
        # The softmax scale rides on the RMS-norm weight of q.
        self._scale = float(spec.network.head_dim**-0.5)

    # -- pieces of a block -------------------------------------------------------------------

    def _heads(self, x: V, n: int) -> V:
        """(n, heads * d) to (heads, n, d)."""
        net = self.network
        return self.ops.transpose(self.ops.reshape(x, (n, net.n_heads, net.head_dim)), (1, 0, 2))

    def _keys(self, x: V, n: int) -> V:
        """(n, heads * d) to (heads, d, n)."""
        net = self.network
        return self.ops.transpose(self.ops.reshape(x, (n, net.n_heads, net.head_dim)), (1, 2, 0))

    def _merge(self, x: V, n: int) -> V:
        """(heads, n, d) to (n, heads * d)."""
        net = self.network
        merged = self.ops.transpose(x, (1, 0, 2))
        return self.ops.reshape(merged, (n, net.n_heads * net.head_dim))

    def _rotate(self, x: V, n: int, angles: npt.NDArray[np.float64] | None, name: str) -> V:
        """Rotate (n, heads * d), pairs already in halves; None for position 0."""
        if angles is None:
            return x
        net, ops = self.network, self.ops
        cos = ops.constant(f"rope.{name}.cos", np.cos(angles).astype(np.float32)[:, None, :])
        sin = ops.constant(f"rope.{name}.sin", np.sin(angles).astype(np.float32)[:, None, :])
        x = ops.reshape(x, (n, net.n_heads, net.head_dim))
        even, odd = ops.split(x, (net.head_dim // 2, net.head_dim // 2), axis=2)
        turned = ops.concat(
            [
                ops.sub(ops.mul(even, cos), ops.mul(odd, sin)),
                ops.add(ops.mul(odd, cos), ops.mul(even, sin)),
            ],
            axis=2,
        )
        return ops.reshape(turned, (n, net.n_heads * net.head_dim))

    def _self_qk(
        self, x: V, which: str, block: str, n: int, rope: tuple[str, npt.NDArray[np.float64] | None]
    ) -> V:
        ops, order = self.ops, self._order
        y = ops.linear(x, f"{block}attn1.to_{which}", order=order)
        gain = self._scale if which == "q" else 1.0
        y = ops.rms_norm(y, f"{block}attn1.norm_{which}", order=order, gain=gain)
        return self._rotate(y, n, rope[1], rope[0])

    def _attend(self, q: V, sources: Sequence[KeyValue[V]], sizes: Sequence[int], name: str) -> V:
        """Softmax attention of scaled q (heads, n, d) over several K/V sources.

        The logits are joined, not the keys and values: K/V that live outside the graph are read
        in place and never copied.
        """
        ops = self.ops
        logits = [ops.matmul(q, kv.k, f"{name}.qk.{i}") for i, kv in enumerate(sources)]
        joined = logits[0] if len(logits) == 1 else ops.concat(logits, axis=2)
        weights = ops.softmax(joined)
        parts = [weights] if len(sources) == 1 else ops.split(weights, sizes, axis=2)
        out = ops.matmul(parts[0], sources[0].v, f"{name}.pv.0")
        for i, (part, kv) in enumerate(zip(parts[1:], sources[1:], strict=True), start=1):
            out = ops.add(out, ops.matmul(part, kv.v, f"{name}.pv.{i}"))
        return out

    def _cross_attention(self, x: V, block: str, n: int, prompt: KeyValue[V], bias: V) -> V:
        ops = self.ops
        y = ops.layer_norm_affine(x, f"{block}norm2")
        q = ops.linear(y, f"{block}attn2.to_q")
        q = self._heads(ops.rms_norm(q, f"{block}attn2.norm_q", gain=self._scale), n)
        logits = ops.add(ops.matmul(q, prompt.k, f"{block}attn2.qk"), bias)
        out = ops.matmul(ops.softmax(logits), prompt.v, f"{block}attn2.pv")
        return ops.add(x, ops.linear(self._merge(out, n), f"{block}attn2.to_out.0"))

    def _gated(self, x: V, gate: V, y: V) -> V:
        return self.ops.add(x, self.ops.mul(y, gate))

    def _feed_forward(self, x: V, block: str, rows: Sequence[V]) -> V:
        ops = self.ops
        shift, scale, gate = rows[3], rows[4], rows[5]
        y = ops.layer_norm(x, scale, shift)
        y = ops.gelu(ops.linear(y, f"{block}ffn.net.0.proj"), "tanh")
        return self._gated(x, gate, ops.linear(y, f"{block}ffn.net.2"))

    def _encode(self, x: V, name: str) -> V:
        """State or action encoder: linear per embodiment, gelu, linear, gelu, linear."""
        ops = self.ops
        y = ops.gelu(ops.projection(x, f"{name}.in_proj", self.spec.embodiment), "none")
        y = ops.gelu(ops.linear(y, f"{name}.mid_proj"), "none")
        return ops.linear(y, f"{name}.out_proj")

    # -- the functions -----------------------------------------------------------------------

    def prompt_kv(
        self, text: V, n_text: int, stream: Stream, n_blocks: int | None = None
    ) -> Iterator[KeyValue[V]]:
        """Yield the text K/V of each block from prompt rows (n_text, text_dim)."""
        ops = self.ops
        embedder = f"{stream.condition}.text_embedder"
        text = ops.gelu(ops.linear(text, f"{embedder}.linear_1"), "tanh")
        text = ops.linear(text, f"{embedder}.linear_2")
        for i in range(self.network.n_layers if n_blocks is None else n_blocks):
            block = stream.block.format(i)
            k = ops.rms_norm(ops.linear(text, f"{block}attn2.to_k"), f"{block}attn2.norm_k")
            v = ops.linear(text, f"{block}attn2.to_v")
            yield KeyValue(k=self._keys(k, n_text), v=self._heads(v, n_text))

    def prefill(
        self,
        latent: V,
        state: V,
        modulation: Mapping[str, Sequence[Sequence[V]]],
        prompt: Mapping[str, Sequence[KeyValue[V]]],
        prompt_bias: V,
    ) -> list[KeyValue[V]]:
        """Return the prefix K/V of every block; tokens are [state, visual...].

        Args:
            latent: (1, C, h, w), normalised.
            state: (1, A), normalised and padded.
            modulation: six rows (C,) at t = 0 of every block, by stream name; scales include
                their 1 +.
            prompt: text K/V of every block, by stream name.
            prompt_bias: (n_text,) logits of the text rows.
        """
        ops, net = self.ops, self.network
        _, channels, h, w = self.spec.latent_shape
        h, w = h // 2, w // 2
        n_visual = h * w
        grid = ops.reshape(latent, (channels, h, 2, w, 2))
        patches = ops.reshape(ops.transpose(grid, (1, 3, 0, 2, 4)), (n_visual, channels * 4))
        visual = ops.patch_projection(patches, "patch_embedding")
        action = self._encode(state, state_encoder(net))
        angles = visual_angles(net, h, w)
        result: list[KeyValue[V]] = []
        for i in range(net.n_layers):
            last = i == net.n_layers - 1
            visual, action, kv = self._prefix_block(
                i, visual, action, n_visual, angles, modulation, prompt, prompt_bias, last=last
            )
            result.append(kv)
        return result

    def _prefix_block(
        self,
        i: int,
        visual: V,
        action: V,
        n_visual: int,
        angles: npt.NDArray[np.float64],
        modulation: Mapping[str, Sequence[Sequence[V]]],
        prompt: Mapping[str, Sequence[KeyValue[V]]],
        prompt_bias: V,
        *,
        last: bool,
    ) -> tuple[V, V, KeyValue[V]]:
        ops = self.ops
        if self.visual == self.action:
            return self._dense_prefix_block(
                i, visual, action, n_visual, angles, modulation, prompt, prompt_bias, last=last
            )
        tokens = {"visual": visual, "action": action}
        sizes = {"action": 1, "visual": n_visual}
        ropes: dict[str, tuple[str, npt.NDArray[np.float64] | None]]
        ropes = {"action": ("state", None), "visual": ("visual", angles)}
        parts: dict[str, dict[str, V]] = {"q": {}, "k": {}, "v": {}}
        for stream in (self.action, self.visual):
            block, n = stream.block.format(i), sizes[stream.name]
            rows = modulation[stream.name][i]
            y = ops.layer_norm(tokens[stream.name], rows[1], rows[0])
            for which in ("k",) if last else ("q", "k"):
                parts[which][stream.name] = self._self_qk(y, which, block, n, ropes[stream.name])
            parts["v"][stream.name] = ops.linear(y, f"{block}attn1.to_v")
        n_prefix = 1 + n_visual
        k = ops.concat([parts["k"]["action"], parts["k"]["visual"]], axis=0)
        v = ops.concat([parts["v"]["action"], parts["v"]["visual"]], axis=0)
        kv = KeyValue(k=self._keys(k, n_prefix), v=self._heads(v, n_prefix))
        if last:
            return visual, action, kv
        q = ops.concat([parts["q"]["action"], parts["q"]["visual"]], axis=0)
        q = self._heads(q, n_prefix)
        out = self._merge(self._attend(q, [kv], [n_prefix], f"blocks.{i}.prefix"), n_prefix)
        attended = dict(
            zip(("action", "visual"), ops.split(out, (1, n_visual), axis=0), strict=True)
        )
        for stream in (self.action, self.visual):
            block, name = stream.block.format(i), stream.name
            rows = modulation[name][i]
            x = self._gated(
                tokens[name], rows[2], ops.linear(attended[name], f"{block}attn1.to_out.0")
            )
            x = self._cross_attention(x, block, sizes[name], prompt[name][i], prompt_bias)
            tokens[name] = self._feed_forward(x, block, rows)
        return tokens["visual"], tokens["action"], kv

    def _dense_prefix_block(
        self,
        i: int,
        visual: V,
        action: V,
        n_visual: int,
        angles: npt.NDArray[np.float64],
        modulation: Mapping[str, Sequence[Sequence[V]]],
        prompt: Mapping[str, Sequence[KeyValue[V]]],
        prompt_bias: V,
        *,
        last: bool,
    ) -> tuple[V, V, KeyValue[V]]:
        """One width for every token: state and visual tokens go through as one batch of rows."""
        ops = self.ops
        n = 1 + n_visual
        x = ops.concat([action, visual], axis=0)
        all_angles = np.concatenate([np.zeros((1, angles.shape[1])), angles])
        block, rows = self.visual.block.format(i), modulation[self.visual.name][i]
        y = ops.layer_norm(x, rows[1], rows[0])
        k = self._self_qk(y, "k", block, n, ("prefix", all_angles))
        v = ops.linear(y, f"{block}attn1.to_v")
        kv = KeyValue(k=self._keys(k, n), v=self._heads(v, n))
        if last:
            return visual, action, kv
        q = self._self_qk(y, "q", block, n, ("prefix", all_angles))
        q = self._heads(q, n)
        out = self._merge(self._attend(q, [kv], [n], f"blocks.{i}.prefix"), n)
        x = self._gated(x, rows[2], ops.linear(out, f"{block}attn1.to_out.0"))
        x = self._cross_attention(x, block, n, prompt[self.visual.name][i], prompt_bias)
        x = self._feed_forward(x, block, rows)
        action, visual = ops.split(x, (1, n_visual), axis=0)
        return visual, action, kv

    def velocity(
        self,
        x: V,
        modulation: Sequence[V],
        prefix: Sequence[KeyValue[V]],
        prompt: Sequence[KeyValue[V]],
        prompt_bias: V,
    ) -> V:
        """Return the predicted velocity (H, A) of noisy actions x (H, A).

        Args:
            x: noisy actions, (H, A).
            modulation: 6 rows for each block, then shift and scale of the head; (E,) each.
            prefix: prefix K/V of every block.
            prompt: text K/V of every block, action stream.
            prompt_bias: (n_text,) logits of the text rows.
        """
        ops, net, n = self.ops, self.network, self.spec.n_rows
        angles = ("action", action_angles(net, n))
        tokens = self._encode(x, "action_encoder")
        for i in range(net.n_layers):
            block, rows = self.action.block.format(i), modulation[6 * i : 6 * i + 6]
            y = ops.layer_norm(tokens, rows[1], rows[0])
            q = self._self_qk(y, "q", block, n, angles)
            k = self._self_qk(y, "k", block, n, angles)
            v = ops.linear(y, f"{block}attn1.to_v")
            own = KeyValue(k=self._keys(k, n), v=self._heads(v, n))
            out = self._attend(
                self._heads(q, n),
                [prefix[i], own],
                [self.spec.n_prefix, n],
                f"{block}attn1",
            )
            tokens = self._gated(
                tokens, rows[2], ops.linear(self._merge(out, n), f"{block}attn1.to_out.0")
            )
            tokens = self._cross_attention(tokens, block, n, prompt[i], prompt_bias)
            tokens = self._feed_forward(tokens, block, rows)
        y = ops.layer_norm(tokens, modulation[-1], modulation[-2])
        y = ops.gelu(ops.linear(y, "action_decoder.in_proj"), "none")
        y = ops.gelu(ops.linear(y, "action_decoder.mid_proj"), "none")
        return ops.projection(y, "action_decoder.out_proj", self.spec.embodiment)

    def denoise(
        self,
        x: V,
        sigma: V,
        sigma_step: V,
        prefix_norm: V,
        prefix_gain: V,
        modulation: Sequence[V],
        prefix: Sequence[KeyValue[V]],
        prompt: Sequence[KeyValue[V]],
        prompt_bias: V,
    ) -> V:
        """Take one Euler step from x (H, A), guided towards ``prefix_norm`` by ``prefix_gain``.

        ``v' = v - gain * (prefix - (x - sigma v))``; ``x_next = x + sigma_step v'``.
        A gain of 0 leaves v as it is, W / sigma blends softly, 1 / sigma pins the row.
        """
        ops = self.ops
        v = self.velocity(x, modulation, prefix, prompt, prompt_bias)
        clean = ops.sub(x, ops.mul(v, sigma))
        v = ops.sub(v, ops.mul(ops.sub(prefix_norm, clean), prefix_gain))
        return ops.add(x, ops.mul(v, sigma_step))
