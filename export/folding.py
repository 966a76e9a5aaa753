"""Move the scale of channels from activations into weights, at no cost at run time.

A factor s > 0 for each channel of a layer's input leaves the layer's output as it is when the
input is divided by s and the weight's column multiplied by s. The division is free where something
before the layer can take it:

* an adaptive norm: its scale and shift rows, which are tables (``attn1.qkv``, ``ffn.net.0.proj``);
* the affine of ``norm2`` (``attn2.to_q``);
* the rows of ``attn1.to_v``, whose values reach ``attn1.to_out.0`` by sums over tokens only; both
  experts read the same values and so share one factor;
* the rows of ``attn2.to_v``, applied to the prompt cache (``attn2.to_out.0``).

The input of ``ffn.net.2`` comes out of a GELU, which no factor passes: it stays as it is.

A factor for each *step* on top is not free in the same way. The weight is one for all steps, so a
step's factor must be a single number and be undone after the product, once for each output. Only
RMS-normed q and k would forget it, and not with their bias.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch

from gwp_edge.export.network import streams
from gwp_edge.export.ops import WeightSource
from gwp_edge.spec import NetworkSpec
from gwp_edge.types import Float32Array

_NORM_ROWS = {"attn1.qkv": (0, 1), "ffn.net.0.proj": (3, 4)}
_LAYER = re.compile(r"^(blocks\.\d+\.)((?:\w+_expert\.)?)(.+)\.(weight|bias)$")
_QKV = ("attn1.to_q", "attn1.to_k", "attn1.to_v")
_SAME = ("ffn.net.0.proj", "attn2.to_q", "attn2.to_out.0")


class FoldedWeights:
    """A checkpoint with factors folded in: the same function, other channels. Threads: one owner.

    Args:
        weights: the checkpoint.
        factors: what each layer's input is divided by, (in,), by the input's name, such as
            ``blocks.0.action_expert.attn1.qkv``; ``blocks.0.attn1.values`` for the input of
            ``attn1.to_out.0`` of all experts of a block.
    """

    def __init__(self, weights: WeightSource, factors: Mapping[str, Float32Array]) -> None:
        self._weights = weights
        self._factors = {k: torch.tensor(v, dtype=torch.float32) for k, v in factors.items()}

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor; folding changes none."""
        return self._weights.shape(name)

    def load(self, name: str) -> torch.Tensor:
        """Return a tensor with its factors applied, float32 where there are any."""
        tensor = self._weights.load(name)
        match = _LAYER.match(name)
        if match is None:
            return tensor
        block, expert, layer, kind = match.groups()
        column = self._column(block, expert, layer) if kind == "weight" else None
        if column is not None:
            tensor = tensor.to(torch.float32) * column
        row = self._row(block, expert, layer)
        if row is not None:
            tensor = tensor.to(torch.float32) / (row if tensor.ndim == 1 else row[:, None])
        return tensor

    def _column(self, block: str, expert: str, layer: str) -> torch.Tensor | None:
        """Return the factor on the inputs of a layer."""
        if layer in _QKV:
            return self._factors.get(f"{block}{expert}attn1.qkv")
        if layer in _SAME:
            return self._factors.get(f"{block}{expert}{layer}")
        if layer == "attn1.to_out.0":
            return self._factors.get(f"{block}attn1.values")
        return None

    def _row(self, block: str, expert: str, layer: str) -> torch.Tensor | None:
        """Return what the outputs of a layer, or an affine norm, are divided by."""
        if layer == "norm2":
            return self._factors.get(f"{block}{expert}attn2.to_q")
        if layer == "attn1.to_v":
            return self._factors.get(f"{block}attn1.values")
        if layer == "attn2.to_v":
            return self._factors.get(f"{block}{expert}attn2.to_out.0")
        return None

    def fold_rows(self, block: str, rows: torch.Tensor) -> torch.Tensor:
        """Return the modulation rows (6, C) of a block, divided; ``block`` is its prefix."""
        for layer, indices in _NORM_ROWS.items():
            factor = self._factors.get(f"{block}{layer}")
            if factor is not None:
                rows = rows.clone()
                rows[list(indices)] /= factor
        return rows


def factor_name(layer: str) -> str | None:
    """Return the name of the factor that divides the input of ``layer``; None where none can."""
    match = _LAYER.match(f"{layer}.weight")
    if match is None:
        return None
    block, expert, kind, _ = match.groups()
    if kind in _QKV:
        return f"{block}{expert}attn1.qkv"
    if kind in _SAME:
        return f"{block}{expert}{kind}"
    return f"{block}attn1.values" if kind == "attn1.to_out.0" else None


def unfold_prompt(
    cache: Mapping[str, torch.Tensor], factors: Mapping[str, Float32Array], network: NetworkSpec
) -> dict[str, torch.Tensor]:
    """Return a prompt cache as it was before the rows of ``attn2.to_v`` were divided.

    Args:
        cache: ``prompt_k.S.i``, ``prompt_v.S.i`` and ``prompt_bias`` of a folded network.
        factors: as of :class:`FoldedWeights`; powers of two, so that this is exact.
        network: sizes.
    """
    plain = dict(cache)
    for stream in streams(network):
        for i in range(network.n_layers):
            factor = factors.get(f"{stream.block.format(i)}attn2.to_out.0")
            name = f"prompt_v.{stream.name}.{i}"
            if factor is not None and name in plain:
                rows = torch.tensor(factor).reshape(network.n_heads, 1, network.head_dim)
                plain[name] = (plain[name].to(torch.float32) * rows).to(plain[name].dtype)
    return plain
