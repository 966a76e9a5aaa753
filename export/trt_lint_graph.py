"""A loaded ONNX graph as the linter for TensorRT looks at it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final, Literal

import numpy as np
import onnx
from onnx import TensorProto, external_data_helper, numpy_helper

Severity = Literal["error", "note"]
Problems = Iterator[tuple[Severity, str]]
FLOATS: Final = frozenset({"fp32", "fp16", "bf16"})
_TYPES: Final[dict[int, str]] = {
    TensorProto.FLOAT: "fp32",
    TensorProto.FLOAT16: "fp16",
    TensorProto.BFLOAT16: "bf16",
    TensorProto.INT8: "int8",
    TensorProto.UINT8: "uint8",
    TensorProto.INT4: "int4",
    TensorProto.FLOAT8E4M3FN: "fp8",
    TensorProto.INT32: "int32",
    TensorProto.INT64: "int64",
    TensorProto.BOOL: "bool",
}


class LintGraph:
    """One loaded model and what is needed to judge a node."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.name = path.name
        self.model = onnx.load(str(path), load_external_data=False)
        graph = self.model.graph
        self.initializers = {x.name: x for x in graph.initializer}
        self.producers = {out: node for node in graph.node for out in node.output}
        self.types: dict[str, str] = {}
        self.shapes: dict[str, list[int] | None] = {}
        for value in (*graph.input, *graph.output, *graph.value_info):
            tensor = value.type.tensor_type
            self.types[value.name] = _type_name(tensor.elem_type)
            sides = [d.dim_value if d.HasField("dim_value") else -1 for d in tensor.shape.dim]
            self.shapes[value.name] = sides
        for name, tensor in self.initializers.items():
            self.types[name] = _type_name(tensor.data_type)
            self.shapes[name] = list(tensor.dims)
        self.consumers: dict[str, list[onnx.NodeProto]] = {}
        for node in graph.node:
            for name in node.input:
                self.consumers.setdefault(name, []).append(node)

    @property
    def opset(self) -> int:
        """Opset of the standard operators."""
        return max(int(x.version) for x in self.model.opset_import if x.domain in ("", "ai.onnx"))

    def values(self, name: str) -> np.ndarray | None:
        """Return a small initializer's values; None where they are in the weight file."""
        tensor = self.initializers.get(name)
        if tensor is None or external_data_helper.uses_external_data(tensor):
            return None
        return numpy_helper.to_array(tensor)


def _type_name(elem_type: int) -> str:
    return _TYPES.get(elem_type, f"type {elem_type}")


def attributes_of(node: onnx.NodeProto) -> Mapping[str, int]:
    """Return the integer attributes of a node."""
    return {a.name: a.i for a in node.attribute if a.type == onnx.AttributeProto.INT}
