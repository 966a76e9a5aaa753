"""Quantized arithmetic in plain numpy: the reference that graphs and engines are held against.

Everything here rounds as ONNX QuantizeLinear does: divide in float32, round half to even,
saturate. An engine whose answer differs from these functions has a fault of its own; an answer
that equals them shows the cost of quantization alone.
"""

from __future__ import annotations

from typing import Any, Literal

import ml_dtypes
import numpy as np
import numpy.typing as npt

from gwp_edge.errors import SpecError
from gwp_edge.types import Float32Array

NumberFormat = Literal["int8", "fp8"]

INT8_MIN, INT8_MAX = -128, 127
INT4_MIN, INT4_MAX = -8, 7
# E4M3FN has no infinity: the largest finite value is where saturation ends.
FP8_MAX = 448.0
FORMAT_MAX: dict[NumberFormat, float] = {"int8": float(INT8_MAX), "fp8": FP8_MAX}

# A scale below the smallest normal float32 would make x / scale overflow.
_SCALE_MIN = float(np.finfo(np.float32).tiny)


def _as_float32(x: npt.ArrayLike, what: str) -> Float32Array:
    array = np.asarray(x, dtype=np.float32)
    if np.isnan(array).any():
        raise SpecError(f"{what}: cannot quantize NaN; look for the layer that made it")
    return array


def _spread(scale: npt.ArrayLike, ndim: int, axis: int | None) -> Float32Array:
    """Return ``scale`` shaped to broadcast over ``axis`` of an array with ``ndim`` axes."""
    array = np.asarray(scale, dtype=np.float32)
    if array.size == 0 or not (np.isfinite(array).all() and (array > 0).all()):
        raise SpecError("scale: expected positive finite numbers")
    if axis is None:
        if array.size != 1:
            raise SpecError(f"scale: expected one number, got shape {array.shape}; pass axis")
        return array.reshape(())
    if array.ndim != 1:
        raise SpecError(f"scale: expected shape (channels,), got {array.shape}")
    shape = [1] * ndim
    shape[axis] = array.size
    return array.reshape(shape)


def quantize_int8(
    x: npt.ArrayLike, scale: npt.ArrayLike, *, axis: int | None = None
) -> npt.NDArray[np.int8]:
    """Quantize to int8 with zero point 0.

    q = clip(round_half_to_even(x / scale), -128, 127).

    Args:
        x: values, any shape, not NaN.
        scale: one number, or shape (channels,) together with ``axis``.
        axis: channel axis of ``x``; None for one scale.

    Raises:
        SpecError: NaN in ``x``, a scale that is not positive and finite, or of a wrong shape.
    """
    values = _as_float32(x, "int8")
    with np.errstate(over="ignore"):  # overflow to infinity saturates below, as it should
        steps = np.rint(values / _spread(scale, values.ndim, axis))
    q: npt.NDArray[np.int8] = np.clip(steps, INT8_MIN, INT8_MAX).astype(np.int8)
    return q


def quantize_fp8_e4m3(
    x: npt.ArrayLike, scale: npt.ArrayLike, *, axis: int | None = None
) -> npt.NDArray[Any]:
    """Quantize to FP8 E4M3FN with saturation at 448.

    Args:
        x: values, any shape, not NaN.
        scale: one number, or shape (channels,) together with ``axis``.
        axis: channel axis of ``x``; None for one scale.

    Returns:
        array of dtype ``ml_dtypes.float8_e4m3fn``.

    Raises:
        SpecError: NaN in ``x``, a scale that is not positive and finite, or of a wrong shape.
    """
    values = _as_float32(x, "fp8")
    with np.errstate(over="ignore"):
        scaled = values / _spread(scale, values.ndim, axis)
    # ml_dtypes turns what is beyond the range into NaN, so saturate first.
    q: npt.NDArray[Any] = np.clip(scaled, -FP8_MAX, FP8_MAX).astype(ml_dtypes.float8_e4m3fn)
    return q


def dequantize(
    q: npt.NDArray[Any], scale: npt.ArrayLike, *, axis: int | None = None
) -> Float32Array:
    """Return q * scale in float32; ``q`` is int8, uint8, int4 or float8_e4m3fn."""
    values = q.astype(np.float32)
    return np.asarray(values * _spread(scale, values.ndim, axis), dtype=np.float32)


def fake_quantize(
    x: npt.ArrayLike, scale: npt.ArrayLike, number_format: NumberFormat, *, axis: int | None = None
) -> Float32Array:
    """Quantize and dequantize: the values that a quantized graph computes with."""
    quantize = quantize_int8 if number_format == "int8" else quantize_fp8_e4m3
    return dequantize(quantize(x, scale, axis=axis), scale, axis=axis)


def scale_for(threshold: float, number_format: NumberFormat) -> float:
    """Return the activation scale that maps ``threshold`` to the largest code.

    Raises:
        SpecError: the threshold is not positive and finite, as for a tensor that was always
            zero; such a tensor stays in high precision.
    """
    if not (np.isfinite(threshold) and threshold > 0):
        raise SpecError(
            f"range: expected a positive threshold, got {threshold}; "
            "keep this tensor in high precision"
        )
    return max(float(np.float32(threshold / FORMAT_MAX[number_format])), _SCALE_MIN)


def weight_scales(
    w: npt.ArrayLike, *, axis: int, number_format: NumberFormat = "int8"
) -> Float32Array:
    """Return symmetric scales per output channel, shape (channels,).

    A channel of zeros gets scale 1: any scale represents it exactly.

    Args:
        w: weights, at least one axis, finite.
        axis: output channel axis.
        number_format: ``int8`` (max / 127) or ``fp8`` (max / 448).

    Raises:
        SpecError: a weight is not finite.
    """
    values = np.asarray(w, dtype=np.float32)
    other = tuple(i for i in range(values.ndim) if i != axis % values.ndim)
    amax: Float32Array = np.abs(values).max(axis=other)
    return _scales_from_amax(amax, FORMAT_MAX[number_format])


def _scales_from_amax(amax: npt.NDArray[np.float32], largest: float) -> Float32Array:
    if not np.isfinite(amax).all():
        raise SpecError("weights: expected finite numbers; the checkpoint is damaged")
    scales = np.maximum(amax / np.float32(largest), np.float32(_SCALE_MIN))
    return np.asarray(np.where(amax == 0, 1.0, scales), dtype=np.float32)


def quantize_int4_blocks(
    w: npt.ArrayLike, block: int, *, axis: int = 0
) -> tuple[npt.NDArray[np.int8], Float32Array]:
    """Quantize weights to int4 in blocks along ``axis``, symmetric, zero point 0.

    Block b covers rows b * block to (b + 1) * block of ``axis``; the last may be shorter. These
    are the arrays of a blocked ONNX DequantizeLinear.

    Args:
        w: weights, finite.
        block: entries that share a scale.
        axis: axis that is cut into blocks: the input channels of a MatMul.

    Returns:
        codes in [-8, 7] of the shape of ``w``, and scales whose ``axis`` counts blocks.

    Raises:
        SpecError: ``block`` below 1 or a weight that is not finite.
    """
    values = np.asarray(w, dtype=np.float32)
    if block < 1:
        raise SpecError(f"int4: expected a block of at least 1, got {block}")
    starts = np.arange(0, values.shape[axis], block)
    amax: Float32Array = np.maximum.reduceat(np.abs(values), starts, axis=axis)
    scales = _scales_from_amax(amax, float(INT4_MAX))
    steps = np.rint(values / _spread_blocks(scales, block, values.shape[axis], axis))
    return np.clip(steps, INT4_MIN, INT4_MAX).astype(np.int8), scales


def dequantize_int4_blocks(
    q: npt.NDArray[Any], scales: npt.ArrayLike, block: int, *, axis: int = 0
) -> Float32Array:
    """Return the float32 weights of :func:`quantize_int4_blocks`."""
    spread = _spread_blocks(np.asarray(scales, dtype=np.float32), block, q.shape[axis], axis)
    return np.asarray(q.astype(np.float32) * spread, dtype=np.float32)


def _spread_blocks(scales: Float32Array, block: int, n: int, axis: int) -> Float32Array:
    if scales.shape[axis] != -(-n // block):
        raise SpecError(
            f"int4: {n} rows in blocks of {block} need {-(-n // block)} scales, "
            f"got {scales.shape[axis]}"
        )
    index: list[slice] = [slice(None)] * scales.ndim
    index[axis] = slice(0, n)
    spread: Float32Array = np.repeat(scales, block, axis=axis)[tuple(index)]
    return spread


def sqnr_db(reference: npt.ArrayLike, got: npt.ArrayLike) -> float:
    """Return the signal to quantization-noise ratio in dB; infinite where both are equal."""
    a = np.asarray(reference, dtype=np.float64)
    noise = float(np.square(a - np.asarray(got, dtype=np.float64)).sum())
    signal = float(np.square(a).sum())
    if noise == 0.0:
        return float("inf")
    return float(10.0 * np.log10(signal / noise)) if signal > 0.0 else float("-inf")
