"""Record a quantized linear layer: explicit QuantizeLinear and DequantizeLinear.

``native`` is what accelerators read: signed codes, zero point 0, the weight through one
DequantizeLinear for each output, its input through a QuantizeLinear and DequantizeLinear pair.

``portable`` is the same arithmetic in a form that ONNX Runtime computes exactly, and fast, on any
CPU. Both forms read the same stored bytes.

* int8: x86 kernels without VNNI add pairs of u8 * s8 products in saturating 16 bits, which loses
  most of a large sum. Kernels of u8 * u8 do not. So the stored signed bytes are read as unsigned,
  ``w xor 0x80 = w + 128`` turns them once, at load, into codes with zero point 128, and the input
  has zero point 128 as well. No float copy of a weight is ever made.
* fp8, w8: DequantizeLinear with one scale for a whole weight is several times faster than with one
  for each output; the scales of the outputs are applied to the product instead.
* w4: as native.
"""

from __future__ import annotations

import math

import ml_dtypes
import numpy as np
import onnx_ir as ir
import torch

from gwp_edge.export.onnx_recorder import INT4_OPSET, GraphRecorder, shape_of
from gwp_edge.export.ops import Order
from gwp_edge.export.precision import STATIC_FORMATS, Format, input_name
from gwp_edge.export.quantize import (
    activation_scale,
    bias_correction,
    pack_int4,
    quantize_weight,
)

_STORED: dict[Format, tuple[str, torch.dtype, ir.DataType]] = {
    "int8": ("int8", torch.int8, ir.DataType.INT8),
    "w8": ("int8", torch.int8, ir.DataType.INT8),
    "fp8": ("fp8", torch.float8_e4m3fn, ir.DataType.FLOAT8E4M3FN),
    "w4": ("int4", torch.uint8, ir.DataType.INT4),
}
_BYTES: dict[Format, float] = {"fp32": 4, "fp16": 2, "bf16": 2, "int8": 1, "w8": 1, "fp8": 1}


def weight_bytes(n_values: int, fmt: Format) -> int:
    """Return the bytes of a weight's codes."""
    return int(n_values * _BYTES.get(fmt, 0.5) + 0.5)


class QuantizedLinear:
    """Writes quantized layers into a graph. Threads: one owner."""

    def __init__(self, graph: GraphRecorder, stage: str) -> None:
        self._graph = graph
        self._stage = stage
        self._inputs: dict[tuple[str | None, str], ir.Value] = {}

    def record(self, x: ir.Value, name: str, fmt: Format, order: Order | None) -> ir.Value:
        """Record ``x @ W + b`` of layer ``name`` in a quantized format; return (n, out)."""
        graph = self._graph
        d_out, d_in = graph.weights.shape(f"{name}.weight")
        out = (shape_of(x)[0], d_out)
        if fmt in STATIC_FORMATS:
            x = self._input(x, name, fmt)
        weight, scale = self._weight(name, (d_in, d_out), fmt, order)
        y = graph.emit("MatMul", [x, weight], out, name=name)
        if scale is not None:
            y = graph.emit("Mul", [y, scale], out, name=f"{name}.scale")
        return graph.emit("Add", [y, self._bias(name, fmt, order)], out, name=f"{name}.add")

    def _input(self, x: ir.Value, name: str, fmt: Format) -> ir.Value:
        """Quantize and dequantize an input; layers that read the same one share the nodes."""
        graph, key = self._graph, f"{self._stage}.{input_name(name)}"
        known = self._inputs.get((x.name, f"{key}.{fmt}"))
        if known is not None:
            return known
        step = activation_scale(graph.recipe.threshold(self._stage, name), fmt)
        scale = graph.constant(f"{key}.{fmt}.scale", np.array(step, np.float32))
        zero, dtype = self._zero_point(fmt)
        codes = graph.emit(
            "QuantizeLinear", [x, scale, zero], shape_of(x), dtype, name=f"{key}.quantize"
        )
        value = graph.emit(
            "DequantizeLinear", [codes, scale, zero], shape_of(x), name=f"{key}.dequantize"
        )
        self._inputs[x.name, f"{key}.{fmt}"] = value
        return value

    def _zero_point(self, fmt: Format) -> tuple[ir.Value, ir.DataType]:
        graph = self._graph
        if fmt == "fp8":
            zero = np.zeros((), ml_dtypes.float8_e4m3fn)
            return graph.constant("zero_point.fp8", zero), ir.DataType.FLOAT8E4M3FN
        if graph.form == "portable":
            middle = np.array(128, np.uint8)
            return graph.constant("zero_point.uint8", middle), ir.DataType.UINT8
        return graph.constant("zero_point.int8", np.array(0, np.int8)), ir.DataType.INT8

    def _load(self, name: str, order: Order | None) -> torch.Tensor:
        """Read a weight as (in, out)."""
        weight = self._graph.weights.load(f"{name}.weight").to(torch.float32)
        return (weight if order is None else weight[torch.from_numpy(order)]).t()

    def _weight(
        self, name: str, shape: tuple[int, int], fmt: Format, order: Order | None
    ) -> tuple[ir.Value, ir.Value | None]:
        """Return the dequantized weight, and a scale that the product still has to take."""
        graph, block = self._graph, self._graph.recipe.block
        label, stored_as, dtype = _STORED[fmt]
        codes_name, scale_name = f"{name}.weight.{label}", f"{name}.weight.{label}_scale"
        n_blocks = -(-shape[0] // block)
        scale_shape = (n_blocks, shape[1]) if fmt == "w4" else (shape[1],)
        stored_shape = ((math.prod(shape) + 1) // 2,) if fmt == "w4" else shape

        def scale() -> torch.Tensor:
            return quantize_weight(self._load(name, order), fmt, block).scale

        def codes() -> torch.Tensor:
            found = quantize_weight(self._load(name, order), fmt, block).codes
            return pack_int4(found) if fmt == "w4" else found

        graph.keep(scale_name, torch.float32, scale_shape, scale)
        graph.keep(codes_name, stored_as, stored_shape, codes)
        scales = graph.stored(scale_name, scale_shape)
        if graph.form == "native" or fmt == "w4":
            stored = graph.stored(codes_name, shape, dtype)
            attributes = {"axis": 1}
            if fmt == "w4":
                graph.opset = INT4_OPSET
                attributes = {"axis": 0, "block_size": block}
            return self._dequantized([stored, scales], name, shape, attributes), None
        if fmt == "int8":
            return self._unsigned(codes_name, scales, name, shape), None
        stored = graph.stored(codes_name, shape, dtype)
        one = graph.constant("scale.one", np.array(1, np.float32))
        return self._dequantized([stored, one], name, shape, {}), scales

    def _unsigned(
        self, codes_name: str, scales: ir.Value, name: str, shape: tuple[int, int]
    ) -> ir.Value:
        graph = self._graph
        stored = graph.stored(codes_name, shape, ir.DataType.UINT8)
        flip = graph.constant("sign_bit", np.array(0x80, np.uint8))
        unsigned = graph.emit(
            "BitwiseXor", [stored, flip], shape, ir.DataType.UINT8, name=f"{name}.unsigned"
        )
        middle = graph.constant(f"zero_point.uint8.{shape[1]}", np.full(shape[1], 128, np.uint8))
        return self._dequantized([unsigned, scales, middle], name, shape, {"axis": 1})

    def _dequantized(
        self,
        inputs: list[ir.Value],
        name: str,
        shape: tuple[int, int],
        attributes: dict[str, int],
    ) -> ir.Value:
        return self._graph.emit(
            "DequantizeLinear", inputs, shape, name=f"{name}.weight", attributes=attributes
        )

    def _bias(self, name: str, fmt: Format, order: Order | None) -> ir.Value:
        graph, block = self._graph, self._graph.recipe.block
        mean = graph.recipe.mean(self._stage, name)
        if mean is None:
            return graph.vector(f"{name}.bias", order=order)
        label = f"{name}.bias.{self._stage}.{_STORED[fmt][0]}"
        shape = tuple(graph.weights.shape(f"{name}.bias"))
        given = torch.from_numpy(np.array(mean))

        def corrected() -> torch.Tensor:
            weight = self._load(name, order)
            bias = graph.weights.load(f"{name}.bias").to(torch.float32)
            bias = bias if order is None else bias[torch.from_numpy(order)]
            quantized = quantize_weight(weight, fmt, block)
            return bias + bias_correction(weight, quantized, given, block)

        graph.keep(label, torch.float32, shape, corrected)
        return graph.stored(label, shape)
