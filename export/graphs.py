"""The three graphs of a bundle.

===========  ==========================================================================
graph        inputs to outputs
===========  ==========================================================================
vision       ``canvas`` uint8 (h, w, 3) to ``latent`` (1, C, h/16, w/16)
prefill      ``latent``, ``state`` (1, A), ``prompt_k.S.i``, ``prompt_v.S.i``,
             ``prompt_bias`` to ``prefix_k.i``, ``prefix_v.i``
denoise      ``x`` (H, A), ``sigma``, ``sigma_step``, ``prefix_norm`` (H, A),
             ``prefix_gain`` (H, 1), ``modulation`` (6 L + 2, E), ``prefix_k.i``,
             ``prefix_v.i``, ``prompt_k.S.i``, ``prompt_v.S.i``, ``prompt_bias`` to ``x_next``
===========  ==========================================================================

S is the stream (``visual``, ``action``), i the block. Prompt and prefix K/V are in the format that
attention computes in.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import onnx_ir as ir
import torch

from gwp_edge.export import tables
from gwp_edge.export.network import ActionPath, KeyValue, Stream, action_stream, streams
from gwp_edge.export.onnx_ops import LayerCost, OnnxOps
from gwp_edge.export.onnx_recorder import Form
from gwp_edge.export.ops import WeightSource
from gwp_edge.export.precision import Format, Recipe, cache_format
from gwp_edge.export.vision_encoder import VaeConfig, VisionEncoder
from gwp_edge.export.weight_bank import StoredTensor, WeightBank
from gwp_edge.manifest import Stage
from gwp_edge.spec import PolicySpec

WEIGHTS_FILE = "weights.safetensors"


@dataclass(frozen=True, kw_only=True)
class Graph:
    """A recorded graph and what it costs."""

    stage: Stage
    form: Form
    ops: OnnxOps
    costs: tuple[LayerCost, ...]

    def model(self, bank: WeightBank) -> ir.Model:
        """Return the model with its initializers pointing into the weight file."""
        places, _, _ = bank.layout()
        self.ops.attach(places, WEIGHTS_FILE)
        return self.ops.build(self.stage)


def share_matrices(one: Graph, other: Graph) -> None:
    """Let an engine hold large float32 matrices that both graphs read once for both of them.

    ONNX Runtime packs a constant factor for each session anew; an input with a default it does not.
    """
    names = sorted(one.ops.large_matrices() & other.ops.large_matrices())
    for graph in (one, other):
        graph.ops.take_as_inputs(names)


def _key_values(
    ops: OnnxOps, spec: PolicySpec, kind: str, tokens: int, fmt: Format, n_blocks: int
) -> list[KeyValue[ir.Value]]:
    net = spec.network
    result = []
    for i in range(n_blocks):
        k_name, v_name = (f"prompt_{x}.{kind}.{i}" if kind else f"prefix_{x}.{i}" for x in "kv")
        result.append(
            KeyValue(
                k=ops.reduced_input(k_name, (net.n_heads, net.head_dim, tokens), fmt),
                v=ops.reduced_input(v_name, (net.n_heads, tokens, net.head_dim), fmt),
            )
        )
    return result


def vision_graph(
    weights: WeightSource,
    config: VaeConfig,
    spec: PolicySpec,
    recipe: Recipe,
    bank: WeightBank,
    form: Form,
) -> Graph:
    """Record the vision encoder."""
    ops = OnnxOps(weights, recipe, bank, form=form)
    shape = (spec.canvas.height_px, spec.canvas.width_px)
    canvas = ops.input("canvas", (*shape, 3), ir.DataType.UINT8)
    ops.output(VisionEncoder(ops, config).encode(canvas, *shape), "latent")
    return Graph(stage="vision", form=form, ops=ops, costs=tuple(ops.costs))


def _constant_rows(
    ops: OnnxOps, bank: WeightBank, weights: WeightSource, spec: PolicySpec, stream: Stream
) -> list[list[ir.Value]]:
    """The prefix modulation of a stream as initializers, computed when the file is written."""
    n = spec.network.n_layers
    computed: list[torch.Tensor] = []

    def rows() -> torch.Tensor:
        if not computed:
            computed.append(tables.prefix_rows(weights, spec, stream))
        return computed[0]

    result = []
    for i in range(n):
        block = []
        # The last block ends with its K/V, which only the first norm precedes.
        for j in range(tables.N_BLOCK_ROWS if i < n - 1 else 2):
            name = f"prefix_modulation.{stream.name}.{i}.{j}"

            def produce(i: int = i, j: int = j) -> torch.Tensor:
                return rows()[i, j].clone()

            bank.add(
                StoredTensor(name=name, dtype=torch.float32, shape=(stream.dim,), produce=produce)
            )
            block.append(ops.stored(name, (stream.dim,)))
        result.append(block)
    return result


def prefill_graph(
    weights: WeightSource, spec: PolicySpec, recipe: Recipe, bank: WeightBank, form: Form
) -> Graph:
    """Record the prefix pass."""
    net, fmt = spec.network, cache_format(recipe)
    ops = OnnxOps(weights, recipe, bank, form=form, stage="prefill", eps=net.eps)
    latent = ops.input("latent", spec.latent_shape)
    state = ops.input("state", (1, net.n_action_channels))
    bias = ops.input("prompt_bias", (net.n_text_rows,))
    # The last block stops after its K/V, so its text is never read.
    prompt = {
        s.name: _key_values(ops, spec, s.name, net.n_text_rows, fmt, net.n_layers - 1)
        for s in streams(net)
    }
    modulation = {s.name: _constant_rows(ops, bank, weights, spec, s) for s in streams(net)}
    path = ActionPath(ops, spec)
    for i, kv in enumerate(path.prefill(latent, state, modulation, prompt, bias)):
        ops.reduced_output(kv.k, f"prefix_k.{i}", fmt)
        ops.reduced_output(kv.v, f"prefix_v.{i}", fmt)
    return Graph(stage="prefill", form=form, ops=ops, costs=tuple(ops.costs))


def denoise_graph(
    weights: WeightSource, spec: PolicySpec, recipe: Recipe, bank: WeightBank, form: Form
) -> Graph:
    """Record one Euler step."""
    net, fmt = spec.network, cache_format(recipe)
    ops = OnnxOps(weights, recipe, bank, form=form, stage="denoise", eps=net.eps)
    stream = action_stream(net)
    rows = (spec.n_rows, net.n_action_channels)
    x = ops.input("x", rows)
    sigma, sigma_step = ops.input("sigma", (1,)), ops.input("sigma_step", (1,))
    prefix_norm = ops.input("prefix_norm", rows)
    prefix_gain = ops.input("prefix_gain", (spec.n_rows, 1))
    n_modulation = tables.N_BLOCK_ROWS * net.n_layers + tables.N_HEAD_ROWS
    modulation = ops.input("modulation", (n_modulation, stream.dim))
    bias = ops.input("prompt_bias", (net.n_text_rows,))
    prefix = _key_values(ops, spec, "", spec.n_prefix, fmt, net.n_layers)
    prompt = _key_values(ops, spec, stream.name, net.n_text_rows, fmt, net.n_layers)
    x_next = ActionPath(ops, spec).denoise(
        x,
        sigma,
        sigma_step,
        prefix_norm,
        prefix_gain,
        _rows(ops, modulation, n_modulation, stream.dim),
        prefix,
        prompt,
        bias,
    )
    ops.output(x_next, "x_next")
    return Graph(stage="denoise", form=form, ops=ops, costs=tuple(ops.costs))


def _rows(ops: OnnxOps, table: ir.Value, n: int, dim: int) -> Sequence[ir.Value]:
    return [ops.reshape(row, (dim,)) for row in ops.split(table, [1] * n, axis=0)]
