"""Check ONNX files against what TensorRT imports, without TensorRT.

The table is export/trt_support.toml, with its sources. An ``error`` would fail or compute
something else; a ``note`` would be slower or larger than its format promises.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterable, Iterator
from importlib.resources import files
from pathlib import Path
from typing import Final

import msgspec
import onnx
from google.protobuf.message import DecodeError

from gwp_edge.bundle import Bundle
from gwp_edge.errors import BuildError, SpecError
from gwp_edge.export.trt_lint_graph import FLOATS, LintGraph, Problems, Severity
from gwp_edge.export.trt_lint_qdq import PRODUCTS, product_rules, quantization_rules
from gwp_edge.manifest import STAGES

RELEASES: Final = ("10.3", "10.13", "10.16")
# A protobuf message cannot exceed this; weights are external, so that it never comes near.
MAX_PROTO_BYTES: Final = 2_000_000_000
# The first with int4 and with blocks of scales.
_INT4_OPSET: Final = 21


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
    decisions: dict[str, str]
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
        graph = LintGraph(path)
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
    graph: LintGraph, table: Support, releases: Iterable[str]
) -> Iterator[tuple[Severity, str, str]]:
    for release in releases:
        limits = table.releases[release]
        if not limits.min_opset <= graph.opset <= limits.max_opset:
            # int4 came to the parser before the opset of it did; no refusal is known.
            early = graph.opset == _INT4_OPSET and "int4" in graph.types.values()
            yield (
                "note" if early else "error",
                "opset",
                f"{graph.opset}, TensorRT {release} is documented to read {limits.min_opset} to "
                f"{limits.max_opset}",
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
        if graph.types[value.name] not in (*FLOATS, "uint8"):
            yield "error", value.name, f"{graph.types[value.name]} crosses the graph's border"


def _node_rules(graph: LintGraph, node: onnx.NodeProto, table: Support) -> Problems:
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
        yield from quantization_rules(graph, node)
    if node.op_type in PRODUCTS:
        yield from product_rules(graph, node)


def _type_rules(graph: LintGraph, node: onnx.NodeProto, rule: Operator) -> Problems:
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
