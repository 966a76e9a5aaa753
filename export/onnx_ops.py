"""Record the action path as a standard ONNX graph with static shapes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import onnx_ir as ir
import torch

from gwp_edge.errors import BuildError
from gwp_edge.export.onnx_recorder import (
    IR_TYPES,
    Form,
    GraphRecorder,
    dtype_of,
    shape_of,
)
from gwp_edge.export.ops import Order, WeightSource
from gwp_edge.export.precision import QUANTIZED_FORMATS, Format, Recipe
from gwp_edge.export.quantized_linear import QuantizedLinear, weight_bytes
from gwp_edge.export.torch_ops import last_tap
from gwp_edge.export.weight_bank import WeightBank


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerCost:
    """What one layer costs in one pass.

    Attributes:
        name: layer name; activation products carry the block and ``qk`` or ``pv``.
        format: what it computes in.
        flops: floating-point operations, a multiply-add counted as two.
        weight_bytes: weights read.
    """

    name: str
    format: Format
    flops: int
    weight_bytes: int


class OnnxOps(GraphRecorder):
    """The vocabulary of ``export/ops.py``, recorded. Threads: one owner.

    Args:
        weights: where shapes and, later, values come from.
        recipe: format of every layer.
        bank: takes the weights.
        form: see :class:`GraphRecorder`.
        stage: which graph this is: which calibrated range a layer's input has.
        eps: epsilon of every norm.
    """

    def __init__(
        self,
        weights: WeightSource,
        recipe: Recipe,
        bank: WeightBank,
        *,
        form: Form,
        stage: str = "vision",
        eps: float = 1e-6,
    ) -> None:
        super().__init__(weights, recipe, bank, form=form, eps=eps)
        self._quantized = QuantizedLinear(self, stage)
        self.costs: list[LayerCost] = []

    # -- layers ------------------------------------------------------------------------------

    def _operand(self, x: ir.Value, fmt: Format) -> ir.Value:
        """Bring an operand to ``fmt``."""
        if fmt == "fp32":
            return self.cast(x, ir.DataType.FLOAT)
        x = self.cast(x, IR_TYPES[fmt])
        return self.cast(x, ir.DataType.FLOAT) if self.form == "portable" else x

    def _result(self, y: ir.Value, fmt: Format) -> ir.Value:
        """Bring a product back to float32, rounded to ``fmt`` on the way."""
        if fmt == "fp32":
            return y
        return self.cast(self.cast(y, IR_TYPES[fmt]), ir.DataType.FLOAT)

    def _product(
        self,
        op: str,
        name: str,
        operands: Sequence[ir.Value],
        shape: Sequence[int],
        fmt: Format,
        attributes: Mapping[str, int | float | str | Sequence[int]] | None = None,
    ) -> ir.Value:
        parts = [self._operand(x, fmt) for x in operands]
        y = self.emit(op, parts, shape, dtype_of(parts[0]), name=name, attributes=attributes)
        return self._result(y, fmt)

    def _cost(self, name: str, fmt: Format, flops: int, weight: ir.Value | None = None) -> None:
        n_bytes = 0
        if weight is not None:
            n_bytes = weight_bytes(math.prod(shape_of(weight)), fmt)
        self.costs.append(LayerCost(name=name, format=fmt, flops=flops, weight_bytes=n_bytes))

    def _affine(
        self, x: ir.Value, name: str, weight: ir.Value, bias: ir.Value, fmt: Format
    ) -> ir.Value:
        n, (d_in, d_out) = shape_of(x)[0], shape_of(weight)
        self._cost(name, fmt, 2 * n * d_in * d_out, weight)
        y = self._product("MatMul", name, [x, weight], (n, d_out), fmt)
        return self.emit("Add", [y, bias], (n, d_out), name=f"{name}.add")

    def linear(self, x: ir.Value, name: str, *, order: Order | None = None) -> ir.Value:
        fmt = self.recipe.of(name)
        d_out, d_in = self.weights.shape(f"{name}.weight")
        if fmt in QUANTIZED_FORMATS:
            flops = 2 * shape_of(x)[0] * d_in * d_out
            n_bytes = weight_bytes(d_in * d_out, fmt)
            self.costs.append(LayerCost(name=name, format=fmt, flops=flops, weight_bytes=n_bytes))
            return self._quantized.record(x, name, fmt, order)

        def transform(w: torch.Tensor) -> torch.Tensor:
            w = w if order is None else w[torch.from_numpy(order)]
            return w.t()

        weight = self.store(f"{name}.weight", (d_in, d_out), fmt, transform, f"{name}.weight")
        return self._affine(x, name, weight, self.vector(f"{name}.bias", order=order), fmt)

    def projection(self, x: ir.Value, name: str, embodiment: int) -> ir.Value:
        fmt = self.recipe.of(name)
        _, d_in, d_out = self.weights.shape(f"{name}.weight")
        weight = self.store(
            f"{name}.weight.{embodiment}",
            (d_in, d_out),
            fmt,
            lambda w: w[embodiment],
            f"{name}.weight",
        )
        return self._affine(x, name, weight, self.vector(f"{name}.bias", pick=embodiment), fmt)

    def patch_projection(self, x: ir.Value, name: str) -> ir.Value:
        fmt = self.recipe.of(name)
        d_out, *rest = self.weights.shape(f"{name}.weight")
        weight = self.store(
            f"{name}.weight",
            (math.prod(rest), d_out),
            fmt,
            lambda w: w.flatten(1).t(),
            f"{name}.weight",
        )
        return self._affine(x, name, weight, self.vector(f"{name}.bias"), fmt)

    def conv2d(self, x: ir.Value, name: str, *, stride: int = 1, padding: int = 0) -> ir.Value:
        fmt = self.recipe.of(name)
        full = self.weights.shape(f"{name}.weight")
        shape = (*full[:2], *full[-2:])
        weight = self.store(f"{name}.weight", shape, fmt, last_tap, f"{name}.weight")
        _, _, h, w = shape_of(x)
        out_h = (h + 2 * padding - shape[2]) // stride + 1
        out_w = (w + 2 * padding - shape[3]) // stride + 1
        out = (1, shape[0], out_h, out_w)
        attributes = {
            "kernel_shape": list(shape[2:]),
            "strides": [stride, stride],
            "pads": [padding] * 4,
        }
        self._cost(name, fmt, 2 * math.prod(shape) * out_h * out_w, weight)
        if fmt == "fp32":
            bias = self.vector(f"{name}.bias")
            return self.emit("Conv", [x, weight, bias], out, name=name, attributes=attributes)
        y = self._product("Conv", name, [x, weight], out, fmt, attributes)
        bias = self.vector(f"{name}.bias", shape=(1, shape[0], 1, 1))
        return self.emit("Add", [y, bias], out, name=f"{name}.add")

    def layer_norm(self, x: ir.Value, scale: ir.Value, shift: ir.Value) -> ir.Value:
        return self.emit(
            "LayerNormalization",
            [x, scale, shift],
            shape_of(x),
            attributes={"axis": -1, "epsilon": self.eps},
        )

    def layer_norm_affine(self, x: ir.Value, name: str) -> ir.Value:
        return self.layer_norm(x, self.vector(f"{name}.weight"), self.vector(f"{name}.bias"))

    def rms_norm(
        self, x: ir.Value, name: str, *, order: Order | None = None, gain: float = 1.0
    ) -> ir.Value:
        # The form that engines recognise as one operator; RMSNormalization itself needs opset 23.
        shape = shape_of(x)
        row = (*shape[:-1], 1)
        two = self.constant("rms_norm.two", np.array(2, np.float32))
        eps = self.constant("rms_norm.eps", np.array(self.eps, np.float32))
        square = self.emit("Pow", [x, two], shape, name=f"{name}.square")
        mean = self.emit(
            "ReduceMean",
            [square, self.indices([-1])],
            row,
            name=f"{name}.mean",
            attributes={"keepdims": 1},
        )
        root = self.emit("Sqrt", [self.emit("Add", [mean, eps], row)], row, name=f"{name}.root")
        y = self.emit("Div", [x, root], shape, name=f"{name}.div")
        weight = self.vector(f"{name}.weight", order=order, gain=gain)
        return self.emit("Mul", [y, weight], shape, name=name)

    def channel_norm(self, x: ir.Value, name: str) -> ir.Value:
        shape = shape_of(x)
        row = (1, 1, *shape[2:])
        norm = self.emit(
            "ReduceL2",
            [x, self.indices([1])],
            row,
            name=f"{name}.norm",
            attributes={"keepdims": 1},
        )
        floor = self.constant("channel_norm.floor", np.array(1e-12, np.float32))
        norm = self.emit("Max", [norm, floor], row, name=f"{name}.floor")
        y = self.emit("Div", [x, norm], shape, name=f"{name}.div")
        gamma = self.vector(f"{name}.gamma", gain=shape[1] ** 0.5, shape=(1, shape[1], 1, 1))
        return self.emit("Mul", [y, gamma], shape, name=name)

    def matmul(self, a: ir.Value, b: ir.Value, name: str) -> ir.Value:
        fmt = self.recipe.of(name)
        left, right = shape_of(a), shape_of(b)
        shape = (*left[:-1], right[-1])
        self._cost(name, fmt, 2 * math.prod(shape) * left[-1])
        return self._product("MatMul", name, [a, b], shape, fmt)

    # -- elementwise and layout --------------------------------------------------------------

    def softmax(self, x: ir.Value) -> ir.Value:
        return self.emit("Softmax", [x], shape_of(x), attributes={"axis": -1})

    def gelu(self, x: ir.Value, approximate: Literal["tanh", "none"]) -> ir.Value:
        return self.emit("Gelu", [x], shape_of(x), attributes={"approximate": approximate})

    def silu(self, x: ir.Value) -> ir.Value:
        return self.mul(x, self.emit("Sigmoid", [x], shape_of(x)))

    def _binary(self, op: str, a: ir.Value, b: ir.Value) -> ir.Value:
        shape = np.broadcast_shapes(tuple(shape_of(a)), tuple(shape_of(b)))
        return self.emit(op, [a, b], shape)

    def add(self, a: ir.Value, b: ir.Value) -> ir.Value:
        return self._binary("Add", a, b)

    def sub(self, a: ir.Value, b: ir.Value) -> ir.Value:
        return self._binary("Sub", a, b)

    def mul(self, a: ir.Value, b: ir.Value) -> ir.Value:
        return self._binary("Mul", a, b)

    def reshape(self, x: ir.Value, shape: Sequence[int]) -> ir.Value:
        if math.prod(shape) != math.prod(shape_of(x)):
            raise BuildError(f"cannot reshape {shape_of(x)} to {list(shape)}")
        return self.emit("Reshape", [x, self.indices(shape)], shape, dtype_of(x))

    def transpose(self, x: ir.Value, axes: Sequence[int]) -> ir.Value:
        shape = shape_of(x)
        return self.emit(
            "Transpose",
            [x],
            [shape[a] for a in axes],
            dtype_of(x),
            attributes={"perm": list(axes)},
        )

    def concat(self, parts: Sequence[ir.Value], axis: int) -> ir.Value:
        shape = list(shape_of(parts[0]))
        shape[axis] = sum(shape_of(p)[axis] for p in parts)
        return self.emit("Concat", parts, shape, attributes={"axis": axis})

    def split(self, x: ir.Value, sizes: Sequence[int], axis: int) -> list[ir.Value]:
        shapes = []
        for size in sizes:
            shape = list(shape_of(x))
            shape[axis] = size
            shapes.append(shape)
        return self.emit_many(
            "Split", [x, self.indices(sizes)], shapes, dtype_of(x), attributes={"axis": axis}
        )

    def average_pool2(self, x: ir.Value) -> ir.Value:
        n, c, h, w = shape_of(x)
        return self.emit(
            "AveragePool",
            [x],
            (n, c, h // 2, w // 2),
            attributes={"kernel_shape": [2, 2], "strides": [2, 2]},
        )

    def pad_zeros(self, x: ir.Value, before: Sequence[int], after: Sequence[int]) -> ir.Value:
        shape = [a + s + b for a, s, b in zip(before, shape_of(x), after, strict=True)]
        pads = self.indices([*before, *after])
        return self.emit("Pad", [x, pads], shape, attributes={"mode": "constant"})

    def to_float(self, x: ir.Value) -> ir.Value:
        return self.cast(x, ir.DataType.FLOAT)
