"""Record a quantized linear layer: explicit QuantizeLinear and DequantizeLinear.

``native`` is what accelerators read: signed codes, zero point 0, the weight through one
DequantizeLinear for each output, its input through a QuantizeLinear and DequantizeLinear pair.

``portable`` is the same arithmetic in a form that ONNX Runtime computes exactly, and fast, on any
CPU. Both forms read the same stored bytes.

* int8: x86 kernels without VNNI add pairs of u8 * s8 products in saturating 16 bits, which loses
  most of a large sum. Kernels of u8 * u8 do not. So the stored signed bytes are read as unsigned,
  ``w xor 0x80 = w + 128`` turns them once, at load, into codes with zero point 128, and the input
  has zero point 128 as well. MatMulInteger leaves the library no choice: Q/DQ around a MatMul with
  a bias became a float product of weights dequantized in every run.
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
    QuantizedWeight,
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
        self._codes: dict[tuple[str | None, str], ir.Value] = {}
        self._values: dict[str | None, ir.Value] = {}

    def record(self, x: ir.Value, name: str, fmt: Format, order: Order | None) -> ir.Value:
        """Record ``x @ W + b`` of layer ``name`` in a quantized format; return (n, out)."""
        graph = self._graph
        d_out, d_in = graph.weights.shape(f"{name}.weight")
        scales = self._announce(name, (d_in, d_out), fmt, order)
        if fmt == "int8" and graph.form == "portable":
            y = self._integer_product(x, name, (d_in, d_out), scales)
        else:
            y = self._product(x, name, (d_in, d_out), fmt, scales)
        out = (shape_of(x)[0], d_out)
        return graph.emit("Add", [y, self._bias(name, fmt, order)], out, name=f"{name}.add")

    def _product(
        self, x: ir.Value, name: str, shape: tuple[int, int], fmt: Format, scales: ir.Value
    ) -> ir.Value:
        """MatMul of dequantized operands."""
        graph, block = self._graph, self._graph.recipe.block
        label, _, dtype = _STORED[fmt]
        out = (shape_of(x)[0], shape[1])
        if fmt in STATIC_FORMATS:
            x = self._dequantized_input(x, name, fmt)
        weight = graph.stored(f"{name}.weight.{label}", shape, dtype)
        one_scale = graph.form == "portable" and fmt != "w4"
        attributes = {} if one_scale else {"axis": 1}
        if fmt == "w4":
            graph.opset = INT4_OPSET
            attributes = {"axis": 0, "block_size": block}
        one = graph.constant("scale.one", np.array(1, np.float32))
        weight = graph.emit(
            "DequantizeLinear",
            [weight, one if one_scale else scales],
            shape,
            name=f"{name}.weight",
            attributes=attributes,
        )
        y = graph.emit("MatMul", [x, weight], out, name=name)
        return graph.emit("Mul", [y, scales], out, name=f"{name}.scale") if one_scale else y

    def _integer_product(
        self, x: ir.Value, name: str, shape: tuple[int, int], scales: ir.Value
    ) -> ir.Value:
        """Product of unsigned codes in 32-bit integers, exact on every CPU, then the scales."""
        graph = self._graph
        out = (shape_of(x)[0], shape[1])
        codes, step, middle = self._input_codes(x, name, "int8")
        stored = graph.stored(f"{name}.weight.int8", shape, ir.DataType.UINT8)
        flip = graph.constant("sign_bit", np.array(0x80, np.uint8))
        weight = graph.emit(
            "BitwiseXor", [stored, flip], shape, ir.DataType.UINT8, name=f"{name}.unsigned"
        )
        total = graph.emit(
            "MatMulInteger", [codes, weight, middle, middle], out, ir.DataType.INT32, name=name
        )
        # Both factors are known at load, so that one product is left at run time.
        scale = graph.emit("Mul", [scales, step], (shape[1],), name=f"{name}.scales")
        y = graph.cast(total, ir.DataType.FLOAT)
        return graph.emit("Mul", [y, scale], out, name=f"{name}.scale")

    def _input_codes(
        self, x: ir.Value, name: str, fmt: Format
    ) -> tuple[ir.Value, ir.Value, ir.Value]:
        """Return codes, scale and zero point of an input; layers that read it share the node."""
        graph, key = self._graph, f"{self._stage}.{input_name(name)}.{fmt}"
        step = activation_scale(graph.recipe.threshold(self._stage, name), fmt)
        scale = graph.constant(f"{key}.scale", np.array(step, np.float32))
        zero, dtype = self._zero_point(fmt)
        codes = self._codes.get((x.name, key))
        if codes is None:
            codes = graph.emit(
                "QuantizeLinear", [x, scale, zero], shape_of(x), dtype, name=f"{key}.quantize"
            )
            self._codes[x.name, key] = codes
        return codes, scale, zero

    def _dequantized_input(self, x: ir.Value, name: str, fmt: Format) -> ir.Value:
        codes, scale, zero = self._input_codes(x, name, fmt)
        value = self._values.get(codes.name)
        if value is None:
            key = f"{self._stage}.{input_name(name)}.{fmt}.dequantize"
            given = [codes, scale, zero]
            value = self._graph.emit("DequantizeLinear", given, shape_of(x), name=key)
            self._values[codes.name] = value
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

    def _quantized(
        self, name: str, fmt: Format, order: Order | None
    ) -> tuple[torch.Tensor, QuantizedWeight]:
        """Return a weight (in, out), and what its codes are."""

        def make() -> tuple[torch.Tensor, QuantizedWeight]:
            weight = self._load(name, order)
            return weight, quantize_weight(weight, fmt, self._graph.recipe.block)

        key = (name, fmt, None if order is None else order.tobytes())
        return self._graph.once(key, make)

    def _announce(
        self, name: str, shape: tuple[int, int], fmt: Format, order: Order | None
    ) -> ir.Value:
        """Announce codes and scales of a weight to the file; return the scales."""
        graph, block = self._graph, self._graph.recipe.block
        label, stored_as, _ = _STORED[fmt]
        is_packed = fmt == "w4"
        scale_name = f"{name}.weight.{label}_scale"
        scale_shape = (-(-shape[0] // block), shape[1]) if is_packed else (shape[1],)
        stored_shape = ((math.prod(shape) + 1) // 2,) if is_packed else shape

        def scale() -> torch.Tensor:
            return self._quantized(name, fmt, order)[1].scale

        def codes() -> torch.Tensor:
            found = self._quantized(name, fmt, order)[1].codes
            return pack_int4(found) if is_packed else found

        graph.keep(scale_name, torch.float32, scale_shape, scale)
        graph.keep(f"{name}.weight.{label}", stored_as, stored_shape, codes)
        return graph.stored(scale_name, scale_shape)

    def _bias(self, name: str, fmt: Format, order: Order | None) -> ir.Value:
        graph, block = self._graph, self._graph.recipe.block
        mean = graph.recipe.mean(self._stage, name)
        if mean is None:
            return graph.vector(f"{name}.bias", order=order)
        label = f"{name}.bias.{self._stage}.{_STORED[fmt][0]}"
        shape = tuple(graph.weights.shape(f"{name}.bias"))
        given = torch.from_numpy(np.array(mean))

        def corrected() -> torch.Tensor:
            weight, quantized = self._quantized(name, fmt, order)
            bias = graph.weights.load(f"{name}.bias").to(torch.float32)
            bias = bias if order is None else bias[torch.from_numpy(order)]
            return bias + bias_correction(weight, quantized, given, block)

        graph.keep(label, torch.float32, shape, corrected)
        return graph.stored(label, shape)
