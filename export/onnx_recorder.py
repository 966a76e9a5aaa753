"""Nodes, values and weights of an ONNX graph in the making.

Weights are only announced here; the weight bank streams them from the checkpoint when the bundle
is written, so that a graph of any size is built in little memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, TypeVar

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import torch

from gwp_edge.errors import BuildError
from gwp_edge.export.ops import Order, WeightSource
from gwp_edge.export.precision import Format, Recipe
from gwp_edge.export.weight_bank import StoredTensor, WeightBank

T = TypeVar("T")

# Below this, memory that is held once per session is not worth an input.
LARGE_BYTES = 1 << 20
OPSET = 20
IR_VERSION = 10

Form = Literal["native", "portable"]

INT4_OPSET = 21  # blocked DequantizeLinear

IR_TYPES: dict[Format, ir.DataType] = {
    "fp32": ir.DataType.FLOAT,
    "fp16": ir.DataType.FLOAT16,
    "bf16": ir.DataType.BFLOAT16,
}
STORED_TYPES: dict[Format, torch.dtype] = {
    "fp32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
}
_TORCH_TO_IR = {
    torch.float32: ir.DataType.FLOAT,
    torch.float16: ir.DataType.FLOAT16,
    torch.bfloat16: ir.DataType.BFLOAT16,
}


def shape_of(value: ir.Value) -> list[int]:
    """Return the static shape of a value."""
    if value.shape is None:
        raise BuildError(f"{value.name} has no shape")
    return list(value.shape.numpy())


def dtype_of(value: ir.Value) -> ir.DataType:
    """Return the element type of a value."""
    if value.dtype is None:
        raise BuildError(f"{value.name} has no type")
    return value.dtype


class GraphRecorder:
    """Nodes, values and weights of a graph in the making. Threads: one owner.

    Args:
        weights: where shapes and, later, values come from.
        recipe: format of every layer.
        bank: takes the weights.
        form: ``native`` computes reduced precision in its own type, as an accelerator does;
            ``portable`` rounds operands and results to that type and multiplies in float32,
            which is the same arithmetic for engines without such kernels.
        eps: epsilon of every norm.
    """

    def __init__(
        self,
        weights: WeightSource,
        recipe: Recipe,
        bank: WeightBank,
        *,
        form: Form,
        eps: float = 1e-6,
    ) -> None:
        self.weights = weights
        self.recipe = recipe
        self._bank = bank
        self.form = form
        self.eps = eps
        self.opset = OPSET
        self._nodes: list[ir.Node] = []
        self._inputs: list[ir.Value] = []
        self._outputs: list[ir.Value] = []
        self._stored: dict[str, ir.Value] = {}
        self._constants: dict[str, ir.Value] = {}
        self._given: list[str] = []
        self._names: dict[str, int] = {}

    # -- graph -------------------------------------------------------------------------------

    def input(
        self, name: str, shape: Sequence[int], dtype: ir.DataType = ir.DataType.FLOAT
    ) -> ir.Value:
        """Declare a graph input."""
        value = ir.Value(name=name, shape=ir.Shape(list(shape)), type=ir.TensorType(dtype))
        self._inputs.append(value)
        return value

    def output(self, value: ir.Value, name: str) -> None:
        """Declare a graph output and name it.

        Raises:
            BuildError: the value is an input or an output already.
        """
        if any(value is known for known in (*self._inputs, *self._outputs)):
            raise BuildError(f"{name}: {value.name} is an input or output already")
        value.name = name
        self._outputs.append(value)

    def reduced_input(self, name: str, shape: Sequence[int], fmt: Format) -> ir.Value:
        """Declare an input that holds values of ``fmt``; float32 in the portable form."""
        if self.form == "portable" or fmt == "fp32":
            return self.input(name, shape)
        return self.input(name, shape, IR_TYPES[fmt])

    def reduced_output(self, value: ir.Value, name: str, fmt: Format) -> None:
        """Declare an output rounded to ``fmt``; float32 in the portable form."""
        if fmt != "fp32":
            value = self.cast(value, IR_TYPES[fmt])
            if self.form == "portable":
                value = self.cast(value, ir.DataType.FLOAT)
        self.output(value, name)

    def build(self, name: str) -> ir.Model:
        """Return the model; initializers point into the bank's file (see ``attach``)."""
        graph = ir.Graph(
            [*self._inputs, *(self._stored[name] for name in self._given)],
            self._outputs,
            nodes=self._nodes,
            initializers=[*self._stored.values(), *self._constants.values()],
            opset_imports={"": self.opset},
            name=name,
        )
        return ir.Model(graph, ir_version=IR_VERSION, producer_name="gwp-edge")

    def large_matrices(self) -> set[str]:
        """Return the names of float32 weights of products, of ``LARGE_BYTES`` or more.

        Scales of codes are none: what fuses them with their codes wants constants.
        """
        factors = {id(node.inputs[1]) for node in self._nodes if node.op_type == "MatMul"}
        return {
            name
            for name, value in self._stored.items()
            if id(value) in factors
            and dtype_of(value) == ir.DataType.FLOAT
            and 4 * math.prod(shape_of(value)) >= LARGE_BYTES
        }

    def take_as_inputs(self, names: Sequence[str]) -> None:
        """Make weights inputs with their stored values as defaults, as ONNX allows.

        An engine may then be given its caller's memory for them.
        """
        self._given = list(names)

    def attach(self, places: Mapping[str, tuple[int, int]], location: str) -> None:
        """Point every stored initializer at its bytes in the weight file."""
        for name, value in self._stored.items():
            offset, length = places[name]
            value.const_value = ir.ExternalTensor(
                location,
                offset,
                length,
                dtype_of(value),
                shape=ir.Shape(shape_of(value)),
                name=name,
            )

    def _unique(self, name: str) -> str:
        count = self._names.get(name, 0)
        self._names[name] = count + 1
        return name if count == 0 else f"{name}.{count}"

    def emit_many(
        self,
        op: str,
        inputs: Sequence[ir.Value | None],
        shapes: Sequence[Sequence[int]],
        dtype: ir.DataType,
        *,
        name: str | None = None,
        attributes: Mapping[str, int | float | str | Sequence[int]] | None = None,
    ) -> list[ir.Value]:
        """Append a node with several outputs of one type; names are made unique."""
        unique = self._unique(name or op)
        outputs = [
            ir.Value(
                name=f"{unique}:{i}" if len(shapes) > 1 else f"{unique}:out",
                shape=ir.Shape(list(shape)),
                type=ir.TensorType(dtype),
            )
            for i, shape in enumerate(shapes)
        ]
        node = ir.node(op, inputs, attributes or {}, outputs=outputs, name=unique)
        self._nodes.append(node)
        return outputs

    def emit(
        self,
        op: str,
        inputs: Sequence[ir.Value | None],
        shape: Sequence[int],
        dtype: ir.DataType = ir.DataType.FLOAT,
        *,
        name: str | None = None,
        attributes: Mapping[str, int | float | str | Sequence[int]] | None = None,
    ) -> ir.Value:
        """Append a node with one output."""
        return self.emit_many(op, inputs, [shape], dtype, name=name, attributes=attributes)[0]

    def cast(self, x: ir.Value, dtype: ir.DataType) -> ir.Value:
        """Cast unless the type is right already."""
        if dtype_of(x) == dtype:
            return x
        return self.emit("Cast", [x], shape_of(x), dtype, attributes={"to": int(dtype)})

    # -- weights -----------------------------------------------------------------------------

    def store(
        self,
        name: str,
        shape: Sequence[int],
        fmt: Format,
        transform: Callable[[torch.Tensor], torch.Tensor],
        source: str,
    ) -> ir.Value:
        """Announce a weight: ``transform`` of checkpoint tensor ``source``, in ``fmt``."""
        if name in self._stored:
            return self._stored[name]
        dtype, source_weights = STORED_TYPES[fmt], self.weights

        def produce() -> torch.Tensor:
            tensor = source_weights.load(source)
            # Converting there and back would cost more time than reading and writing.
            if tensor.dtype == dtype:
                return transform(tensor)
            return transform(tensor.to(torch.float32)).to(dtype)

        self._bank.add(StoredTensor(name=name, dtype=dtype, shape=tuple(shape), produce=produce))
        value = ir.Value(
            name=name, shape=ir.Shape(list(shape)), type=ir.TensorType(_TORCH_TO_IR[dtype])
        )
        self._stored[name] = value
        return value

    def once(self, key: object, make: Callable[[], T]) -> T:
        """Return ``make()``, once for calls in a row with one key; see ``WeightBank.once``."""
        return self._bank.once(key, make)

    def keep(
        self,
        name: str,
        dtype: torch.dtype,
        shape: Sequence[int],
        produce: Callable[[], torch.Tensor],
    ) -> None:
        """Announce bytes for the weight file; ``stored`` makes them an initializer."""
        self._bank.add(StoredTensor(name=name, dtype=dtype, shape=tuple(shape), produce=produce))

    def stored(
        self, name: str, shape: Sequence[int], dtype: ir.DataType = ir.DataType.FLOAT
    ) -> ir.Value:
        """Return an initializer whose bytes the bank holds under ``name``, read as ``dtype``."""
        value = self._stored.get(name)
        if value is None:
            value = ir.Value(name=name, shape=ir.Shape(list(shape)), type=ir.TensorType(dtype))
            self._stored[name] = value
        return value

    def vector(
        self,
        name: str,
        *,
        order: Order | None = None,
        gain: float = 1.0,
        pick: int | None = None,
        shape: Sequence[int] | None = None,
    ) -> ir.Value:
        """A float32 vector of the checkpoint, reordered and scaled."""
        full = self.weights.shape(name)
        final = tuple(shape) if shape is not None else (full[1:] if pick is not None else full)

        def transform(t: torch.Tensor) -> torch.Tensor:
            t = t if pick is None else t[pick]
            t = t if order is None else t[torch.from_numpy(order)]
            return (t * gain).reshape(final)

        label = name
        if gain != 1.0:
            label += f".x{gain:.9g}"
        if pick is not None:
            label += f".{pick}"
        return self.store(label, final, "fp32", transform, name)

    def parameter(self, name: str) -> ir.Value:
        """Return a checkpoint tensor as a float32 initializer."""
        return self.vector(name)

    def constant(self, name: str, value: npt.NDArray[Any]) -> ir.Value:
        """Return a small array that is kept inside the graph file."""
        known = self._constants.get(name)
        if known is None:
            tensor = ir.Tensor(np.asarray(value, order="C"), name=name)
            known = ir.Value(
                name=name,
                shape=ir.Shape(list(value.shape)),
                type=ir.TensorType(tensor.dtype),
                const_value=tensor,
            )
            self._constants[name] = known
        return known

    def indices(self, values: Sequence[int]) -> ir.Value:
        """Return an int64 vector, as shapes and axes are given to operators."""
        name = "i64." + "_".join(str(v) for v in values)
        known = self._constants.get(name)
        if known is None:
            tensor = ir.Tensor(np.array(values, dtype=np.int64), name=name)
            known = ir.Value(
                name=name,
                shape=ir.Shape([len(values)]),
                type=ir.TensorType(ir.DataType.INT64),
                const_value=tensor,
            )
            self._constants[name] = known
        return known
