"""Check ONNX files against what TensorRT imports, without TensorRT.

The table is export/trt_support.toml, with its sources. An ``error`` would fail or compute
something else; a ``note`` would be slower or larger than its format promises.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterable, Iterator, Mapping
from importlib.resources import files
from pathlib import Path
from typing import Final, Literal

import msgspec
import numpy as np
import onnx
from google.protobuf.message import DecodeError
from onnx import TensorProto, external_data_helper, numpy_helper

from gwp_edge.bundle import STAGES, Bundle
from gwp_edge.errors import BuildError, SpecError

Severity = Literal["error", "note"]
RELEASES: Final = ("10.3", "10.13")
# A protobuf message cannot exceed this; weights are external, so that it never comes near.
MAX_PROTO_BYTES: Final = 2_000_000_000

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
_FLOATS: Final = frozenset({"fp32", "fp16", "bf16"})
# Operators between a DequantizeLinear and the product that consumes it would break the fusion.
_PRODUCTS: Final = frozenset({"MatMul", "Conv"})
_INT4_BLOCKS: Final = (64, 128)


class Release(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A release of the parser."""

    min_opset: int
    max_opset: int
    jetpack: str


class Operator(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What the parser takes of one operator."""

    types: tuple[str, ...]
    const: tuple[int, ...] = ()
    attributes: tuple[str, ...] = ()
    outputs: int = 0
    note: str = ""


class Support(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The table."""

    releases: dict[str, Release]
    operators: dict[str, Operator]


class Finding(msgspec.Struct, frozen=True, kw_only=True):
    """Something that TensorRT would not do as the graph says."""

    severity: Severity
    graph: str
    node: str
    problem: str

    def __str__(self) -> str:
        """Return it as one line."""
        return f"{self.severity}: {self.graph}: {self.node}: {self.problem}"


@functools.cache
def support_table() -> Support:
    """Return the support table."""
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    text = files("gwp_edge.export").joinpath("trt_support.toml").read_text(encoding="utf-8")
    return msgspec.convert(tomllib.loads(text), Support)


class _Graph:
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
        return max(int(x.version) for x in self.model.opset_import if x.domain in ("", "ai.onnx"))

    def values(self, name: str) -> np.ndarray | None:
        """Return a small initializer's values; None where they are in the weight file."""
        tensor = self.initializers.get(name)
        if tensor is None or external_data_helper.uses_external_data(tensor):
            return None
        return numpy_helper.to_array(tensor)


def _type_name(elem_type: int) -> str:
    return _TYPES.get(elem_type, f"type {elem_type}")


def lint_file(path: Path, releases: Iterable[str] = RELEASES) -> tuple[Finding, ...]:
    """Check one ONNX file against the given TensorRT releases.

    Raises:
        SpecError: the file is not readable, or a release is not in the table.
    """
    table = support_table()
    unknown = [x for x in releases if x not in table.releases]
    if unknown:
        raise SpecError(f"TensorRT {unknown[0]} is not in the table: {', '.join(table.releases)}")
    try:
        graph = _Graph(path)
    except (OSError, ValueError, DecodeError) as e:
        raise SpecError(f"{path}: cannot be read as ONNX: {e}") from e
    findings: list[Finding] = []

    def report(severity: Severity, node: str, problem: str) -> None:
        findings.append(Finding(severity=severity, graph=graph.name, node=node, problem=problem))

    for severity, node, problem in _file_rules(graph, table, releases):
        report(severity, node, problem)
    for proto in graph.model.graph.node:
        for severity, problem in _node_rules(graph, proto, table):
            report(severity, proto.name or proto.op_type, problem)
    return tuple(findings)


def _file_rules(
    graph: _Graph, table: Support, releases: Iterable[str]
) -> Iterator[tuple[Severity, str, str]]:
    for release in releases:
        limits = table.releases[release]
        if not limits.min_opset <= graph.opset <= limits.max_opset:
            yield (
                "error",
                "opset",
                f"{graph.opset}, TensorRT {release} reads {limits.min_opset} to {limits.max_opset}",
            )
    for imported in graph.model.opset_import:
        if imported.domain not in ("", "ai.onnx"):
            yield "error", "opset", f"domain {imported.domain} needs a plugin"
    if graph.model.functions:
        yield "error", "graph", "local functions are not used by this project"
    if graph.path.stat().st_size > MAX_PROTO_BYTES:
        yield "error", "graph", f"{graph.path.stat().st_size} bytes do not fit one protobuf"
    for value in (*graph.model.graph.input, *graph.model.graph.output):
        sides = graph.shapes[value.name]
        if not sides and value.type.tensor_type.HasField("shape"):
            continue
        if sides is None or not sides or min(sides) <= 0:
            yield "error", value.name, f"shape {sides} is not static"
        if graph.types[value.name] not in (*_FLOATS, "uint8"):
            yield "error", value.name, f"{graph.types[value.name]} crosses the graph's border"


def _node_rules(
    graph: _Graph, node: onnx.NodeProto, table: Support
) -> Iterator[tuple[Severity, str]]:
    rule = table.operators.get(node.op_type)
    if rule is None:
        yield "error", f"operator {node.op_type} is not in the support table"
        return
    yield from _type_rules(graph, node, rule)
    known = set(rule.attributes)
    for attribute in node.attribute:
        if attribute.name not in known:
            yield "error", f"attribute {attribute.name} of {node.op_type} is not in the table"
    for index in rule.const:
        given = node.input[index] if index < len(node.input) else ""
        if given and given not in graph.initializers:
            yield "error", f"input {index} of {node.op_type} must be an initializer"
    if rule.outputs and len([x for x in node.output if x]) > rule.outputs:
        yield "error", f"{node.op_type}: only {rule.outputs} output is supported"
    if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
        yield from _quantization_rules(graph, node)
    if node.op_type in _PRODUCTS:
        yield from _product_rules(graph, node)


def _type_rules(
    graph: _Graph, node: onnx.NodeProto, rule: Operator
) -> Iterator[tuple[Severity, str]]:
    found = graph.types.get(node.input[0])
    if found is None:
        yield "error", f"{node.input[0]} has no type; run shape inference when exporting"
        return
    if found not in rule.types:
        yield "error", f"{node.op_type} of {found}; TensorRT takes {', '.join(rule.types)}"
    if found == "uint8" and graph.producers.get(node.input[0]) is not None:
        yield "error", "uint8 is allowed for network inputs and outputs only"
    # A strongly typed network never casts: both sides of an operator must agree.
    if node.op_type in ("Add", "Sub", "Mul", "Div", "Max", "Pow", "MatMul", "Conv", "Concat"):
        types = {graph.types.get(name) for name in node.input if name}
        if len(types) > 1:
            yield "error", f"{node.op_type} mixes {', '.join(sorted(str(t) for t in types))}"
    for name in (*node.output,):
        sides = graph.shapes.get(name)
        if sides is None or any(side <= 0 for side in sides):
            yield "error", f"{name}: shape {sides} is not static"
        if graph.types.get(name) == "int64":
            yield "error", f"{name} is computed in int64"


def _attributes(node: onnx.NodeProto) -> Mapping[str, int]:
    return {a.name: a.i for a in node.attribute if a.type == onnx.AttributeProto.INT}


def _quantization_rules(graph: _Graph, node: onnx.NodeProto) -> Iterator[tuple[Severity, str]]:
    attributes = _attributes(node)
    shape = graph.shapes.get(node.input[0]) or []
    scales = graph.shapes.get(node.input[1]) or []
    n_scales = int(np.prod(scales)) if scales else 1
    weight = node.input[0] in graph.initializers
    if graph.types.get(node.input[1]) not in _FLOATS:
        yield "error", "the scale must be a float"
    if len(node.input) > 2 and node.input[2]:
        yield from _zero_point_rules(graph, node.input[2], n_scales)
    if not weight and n_scales != 1:
        yield "error", "activations take one scale for the whole tensor"
    axis = attributes.get("axis", 1)
    if n_scales != 1 and len(scales) == 1 and shape and shape[axis] != n_scales:
        yield "error", f"{n_scales} scales on axis {axis} of size {shape[axis]}"
    known = graph.values(node.input[1])
    if known is not None and not (np.isfinite(known).all() and (known > 0).all()):
        yield "error", "scales must be positive and finite"
    if node.op_type == "QuantizeLinear":
        if len(node.input) < 3 or not node.input[2]:
            yield "error", "without a zero point ONNX means uint8; give one of the wanted type"
        users = graph.consumers.get(node.output[0], [])
        if not users or any(u.op_type != "DequantizeLinear" for u in users):
            yield "error", "must be followed by DequantizeLinear and nothing else"
        if weight:
            yield "error", "weights are stored quantized; QuantizeLinear on one is not wanted"
        return
    source = graph.producers.get(node.input[0])
    if source is not None and source.op_type != "QuantizeLinear":
        yield "error", f"dequantizes the result of {source.op_type}, not of QuantizeLinear"
    if graph.types.get(node.input[0]) == "int4":
        block = attributes.get("block_size", 0)
        if block not in _INT4_BLOCKS:
            yield "note", f"int4 blocks of {block}: fast kernels are known for 64 and 128"


def _zero_point_rules(graph: _Graph, name: str, n_scales: int) -> Iterator[tuple[Severity, str]]:
    if graph.types.get(name) == "uint8":
        yield "error", "a uint8 zero point is read as int8, which changes the result"
    values = graph.values(name)
    if values is None:
        yield "error", "the zero point must be a small constant in the graph"
        return
    if np.asarray(values, np.float32).any():
        yield "error", "the zero point must be 0: TensorRT quantizes symmetrically"
    if values.size != n_scales:
        yield "error", f"{values.size} zero points for {n_scales} scales"


def _product_rules(graph: _Graph, node: onnx.NodeProto) -> Iterator[tuple[Severity, str]]:
    """Both operands of a quantized product come straight from DequantizeLinear."""
    sources = [graph.producers.get(name) for name in node.input[:2]]
    quantized = [s for s in sources if s is not None and s.op_type == "DequantizeLinear"]
    if not quantized:
        if all(graph.types.get(name) == "fp32" for name in node.input[:2]):
            yield "note", f"{node.op_type} in fp32: TF32 at best; 16 bits would be faster"
        return
    codes = [graph.types.get(s.input[0]) for s in quantized]
    if len(quantized) == 2:
        if codes[0] != codes[1]:
            yield "error", f"{node.op_type} of {codes[0]} and {codes[1]} has no kernel"
        return
    if codes[0] == "int4":
        other = graph.types.get(node.input[0])
        if other not in ("fp16", "bf16"):
            yield "note", f"int4 weights with {other} inputs: the fused kernels take 16-bit inputs"
    else:
        yield "note", f"{codes[0]} weights without a quantized input are expanded when building"


def lint_bundle(bundle: Bundle, releases: Iterable[str] = RELEASES) -> tuple[Finding, ...]:
    """Check the native graphs of a bundle; findings that repeat are kept once, with a count."""
    graphs = bundle.manifest.graphs["native"]
    found = [
        finding
        for stage in STAGES
        for finding in lint_file(bundle.file(getattr(graphs, stage)), releases)
    ]
    groups: dict[tuple[Severity, str, str], list[Finding]] = {}
    for finding in found:
        groups.setdefault((finding.severity, finding.graph, finding.problem), []).append(finding)
    return tuple(
        msgspec.structs.replace(
            same[0], node=same[0].node + (f" and {len(same) - 1} more" if len(same) > 1 else "")
        )
        for same in groups.values()
    )


def require_clean(bundle: Bundle, releases: Iterable[str] = RELEASES) -> tuple[Finding, ...]:
    """Return the notes of a bundle.

    Raises:
        BuildError: TensorRT would refuse or misread a graph; names the first finding.
    """
    findings = lint_bundle(bundle, releases)
    errors = [x for x in findings if x.severity == "error"]
    if errors:
        more = f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
        raise BuildError(f"{bundle.root}: not for TensorRT: {errors[0]}{more}")
    return findings
