"""Quantized arithmetic in torch: what the graphs compute, tensor by tensor.

Codes and scales are those of :mod:`gwp_edge.calibration.arithmetic`, which is the reference; this
is the same arithmetic on torch tensors of any size, for weights that stream through.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from gwp_edge.errors import BuildError
from gwp_edge.export.precision import Format

_TINY = torch.finfo(torch.float32).tiny
_LARGEST: dict[Format, float] = {"int8": 127.0, "w8": 127.0, "fp8": 448.0, "w4": 7.0}


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizedWeight:
    """Codes of a weight and what they stand for.

    Attributes:
        codes: (in, out); int8, or float8 E4M3FN; int4 codes come as int8 in -8 to 7.
        scale: float32; (out,), or (blocks, out) for int4.
    """

    codes: torch.Tensor
    scale: torch.Tensor


def activation_scale(threshold: float, fmt: Format) -> float:
    """Return the scale, a float32 value, that maps ``threshold`` to the largest code.

    Raises:
        BuildError: the threshold is not positive and finite.
    """
    scale = float(torch.tensor(threshold / _LARGEST[fmt], dtype=torch.float32))
    if not 0.0 < scale < float("inf"):
        raise BuildError(f"range {threshold} cannot be quantized; keep that layer in fp32")
    return max(scale, _TINY)


def activation_codes(x: torch.Tensor, scale: float, fmt: Format) -> torch.Tensor:
    """Return the codes of ``x`` as float32: divide, round half to even, saturate."""
    steps = x / scale
    if fmt == "fp8":
        return steps.clamp(-448.0, 448.0).to(torch.float8_e4m3fn).to(torch.float32)
    return steps.round().clamp(-128.0, 127.0)


def _scales(amax: torch.Tensor, fmt: Format) -> torch.Tensor:
    """Return amax / largest code; 1 for all-zero channels, which any scale represents."""
    scale = (amax / _LARGEST[fmt]).clamp_min(_TINY)
    return torch.where(amax == 0, torch.ones_like(scale), scale)


def quantize_weight(weight: torch.Tensor, fmt: Format, block: int) -> QuantizedWeight:
    """Quantize a weight (in, out), symmetric for each output, or each block of inputs (w4).

    Args:
        weight: float32, finite.
        fmt: a quantized format.
        block: inputs that share a scale in w4; the last block may be shorter.

    Raises:
        BuildError: ``fmt`` is not a quantized format.
    """
    if fmt == "w4":
        return _quantize_blocks(weight, block)
    if fmt not in _LARGEST:
        raise BuildError(f"{fmt} is not a quantized format")
    scale = _scales(weight.abs().amax(dim=0), fmt)
    steps = weight / scale
    if fmt == "fp8":
        codes = steps.clamp(-448.0, 448.0).to(torch.float8_e4m3fn)
    else:
        codes = steps.round().clamp(-127.0, 127.0).to(torch.int8)
    return QuantizedWeight(codes=codes, scale=scale)


def _quantize_blocks(weight: torch.Tensor, block: int) -> QuantizedWeight:
    n, d_out = weight.shape
    n_blocks = -(-n // block)
    padded = weight.new_zeros((n_blocks * block, d_out))
    padded[:n] = weight
    blocks = padded.reshape(n_blocks, block, d_out)
    scale = _scales(blocks.abs().amax(dim=1), "w4")
    codes = (blocks / scale[:, None]).round().clamp(-8.0, 7.0).to(torch.int8)
    return QuantizedWeight(codes=codes.reshape(-1, d_out)[:n], scale=scale)


def dequantize_weight(quantized: QuantizedWeight, block: int) -> torch.Tensor:
    """Return the float32 weights that the codes stand for, (in, out)."""
    codes, scale = quantized.codes.to(torch.float32), quantized.scale
    if scale.ndim == 1:
        return codes * scale
    spread = scale.repeat_interleave(block, dim=0)[: len(codes)]
    return codes * spread


def bias_correction(
    weight: torch.Tensor, quantized: QuantizedWeight, mean: torch.Tensor, block: int
) -> torch.Tensor:
    """Return what the bias must take up so that the mean output stays, ``mean @ (W - W_q)``."""
    return mean @ (weight - dequantize_weight(quantized, block))


def pack_int4(codes: torch.Tensor) -> torch.Tensor:
    """Return ONNX's packing: two codes to a byte, the first in the low half; uint8, (n / 2,)."""
    flat = codes.reshape(-1).to(torch.int16) & 0xF
    if len(flat) % 2:
        flat = torch.cat([flat, flat.new_zeros(1)])
    return (flat[0::2] | (flat[1::2] << 4)).to(torch.uint8)


def quantized_product(
    x: torch.Tensor, quantized: QuantizedWeight, fmt: Format, *, threshold: float, block: int
) -> torch.Tensor:
    """Return ``x @ W`` as a quantized graph computes it, in float32.

    Args:
        x: (n, in).
        quantized: the weight.
        fmt: its format.
        threshold: clipping threshold of ``x``; unused for weight-only formats.
        block: as in ``quantize_weight``.
    """
    if fmt in ("w8", "w4"):
        return x @ dequantize_weight(quantized, block)
    scale = activation_scale(threshold, fmt)
    codes = activation_codes(x, scale, fmt)
    return (codes @ quantized.codes.to(torch.float32)) * (quantized.scale * scale)
