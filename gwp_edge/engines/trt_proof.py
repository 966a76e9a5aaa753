"""What a built engine really computes in, from the inspector's own words. Needs no GPU.

TensorRT reports each layer of an engine as JSON: the graph nodes that were fused into it
(``Metadata``), types of inputs and outputs, of the weights, and the kernel's name. From these a
product is said to run as asked, to have fallen back, or not to be shown.
Not yet run on hardware: the words are those of the documentation and of published outputs.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

import msgspec

from gwp_edge.errors import BuildError
from gwp_edge.manifest import Layer, Stage

Outcome = Literal["as asked", "fell back", "not shown"]
QUANTIZED: Final = frozenset({"int8", "fp8", "w8", "w4"})
# Weights alone: such a product computes in the type of its inputs, float32 in our graphs, so only
# the weights' type tells.
_WEIGHT_ONLY: Final[Mapping[str, str]] = {"w8": "int8", "w4": "int4"}

_ONNX_LAYER = re.compile(r"\[ONNX Layer: ([^\]]+)\]")
# Kernel names carry operand types: i8i8_i8i32, e4m3, f16f16, h16816, s16816, tf32.
_KERNEL_TYPES: Final[tuple[tuple[str, re.Pattern[str]], ...]] = (
    ("int8", re.compile(r"i8i8|_i8|int8|imma|i16832")),
    ("fp8", re.compile(r"e4m3|fp8|qmma|f8f8")),
    ("int4", re.compile(r"int4|_i4|w4a")),
    ("bf16", re.compile(r"bf16")),
    ("fp16", re.compile(r"f16f16|fp16|_h16816|h884|hmma|_f16")),
    ("fp32", re.compile(r"tf32|f32f32|fp32|sgemm|ffma|s1688")),
)
_WORDS: Final[tuple[tuple[str, re.Pattern[str]], ...]] = (
    ("int8", re.compile(r"\bint8\b")),
    ("fp8", re.compile(r"\bfp8\b|\bfloat8|\be4m3")),
    ("int4", re.compile(r"\bint4\b")),
    ("bf16", re.compile(r"\bbf16\b|\bbfloat16\b")),
    ("fp16", re.compile(r"\bfp16\b|\bhalf\b|\bfloat16\b")),
    ("fp32", re.compile(r"\bfp32\b|\bfloat\b|\bfloat32\b")),
)
# Sums kept in 16 bits: h16816 multiplies so, s16816 adds in 32; A and B, C and the sum of xmma.
_NARROW_SUM: Final = re.compile(r"h16816|h884|h1688|f16f16_f16f16")
_PRODUCT: Final = re.compile(r"gemm|matmul|matrixmultiply|conv|xmma|mma|cask|fc|mha|cublas")


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineLayer:
    """One layer of an engine.

    Attributes:
        name: its own name.
        nodes: graph nodes that it computes.
        operands: types of its inputs and weights, one each.
        kernel_type: what the kernel's name says it multiplies, or None.
        is_product: it looks like a matrix product or convolution.
        sums_narrow: its kernel adds up in fp16.
    """

    name: str
    nodes: tuple[str, ...]
    operands: tuple[str, ...]
    kernel_type: str | None
    is_product: bool
    sums_narrow: bool


class Proof(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One layer of the manifest and what became of it."""

    stage: Stage
    name: str
    asked: str
    got: str
    outcome: Outcome


def _match(text: str, table: Sequence[tuple[str, re.Pattern[str]]]) -> str | None:
    return next((name for name, pattern in table if pattern.search(text)), None)


def _tensor_types(tensors: object) -> Iterable[str]:
    for tensor in tensors if isinstance(tensors, list) else ():
        if isinstance(tensor, dict):
            # 10.x says Format/Datatype; later releases split it.
            text = str(tensor.get("Format/Datatype") or tensor.get("Datatype") or "")
            found = _match(text.lower(), _WORDS)
            if found is not None:
                yield found


def parse_inspector(text: str) -> tuple[EngineLayer, ...]:
    """Read what ``EngineInspector.get_engine_information(JSON)`` returned.

    Raises:
        BuildError: it has no layers in detail, so nothing can be proven.
    """
    try:
        layers = json.loads(text)["Layers"]
    except (ValueError, KeyError, TypeError) as e:
        raise BuildError(
            "the engine inspector's answer has no Layers: this TensorRT speaks another dialect; "
            "report its version"
        ) from e
    if not isinstance(layers, list) or not any(isinstance(x, dict) for x in layers):
        raise BuildError(
            "the engine inspector lists names only; build with detailed profiling verbosity"
        )
    return tuple(_parse_layer(x) for x in layers if isinstance(x, dict))


def _parse_layer(raw: Mapping[str, Any]) -> EngineLayer:
    name, tactic = str(raw.get("Name", "")), str(raw.get("TacticName", ""))
    kind = f"{raw.get('LayerType', '')} {raw.get('ParameterType', '')} {tactic}".lower()
    nodes = tuple(_ONNX_LAYER.findall(str(raw.get("Metadata", ""))))
    operands = list(_tensor_types(raw.get("Inputs")))
    weights = raw.get("Weights")
    if isinstance(weights, dict):
        found = _match(str(weights.get("Type", "")).lower(), _WORDS)
        operands += [found] if found is not None else []
    return EngineLayer(
        name=name,
        nodes=nodes or tuple(part.strip() for part in name.split(" + ")),
        operands=tuple(operands),
        kernel_type=_match(tactic.lower(), _KERNEL_TYPES),
        is_product=_PRODUCT.search(kind) is not None,
        sums_narrow=_NARROW_SUM.search(tactic.lower()) is not None,
    )


def _runs_as(layer: EngineLayer, asked: str) -> str | None:
    """Return the type that an engine layer multiplies in, or None where it does not say."""
    wanted = _WEIGHT_ONLY.get(asked, asked)
    n_wanted = layer.operands.count(wanted)
    if asked in _WEIGHT_ONLY and n_wanted:
        return wanted
    if layer.kernel_type is not None:
        return layer.kernel_type
    if asked in QUANTIZED and n_wanted == 1:
        # Such as int8 weights and a float input: the kernel may round the one or widen the other.
        return None
    return wanted if n_wanted else min(layer.operands, default=None)


def prove(
    stage: Stage, layers: Iterable[Layer], engine: Sequence[EngineLayer]
) -> tuple[Proof, ...]:
    """Compare the manifest's layers of one stage with what the engine does."""
    by_node: dict[str, list[EngineLayer]] = {}
    for found in engine:
        for node in found.nodes:
            by_node.setdefault(node, []).append(found)
    return tuple(
        _prove_layer(stage, layer, by_node.get(layer.name, []))
        for layer in layers
        if layer.stage == stage
    )


def _prove_layer(stage: Stage, layer: Layer, places: Sequence[EngineLayer]) -> Proof:
    # A node may appear in a copy kernel beside its product, which says nothing about that.
    kinds = {_runs_as(x, layer.format) for x in places if x.is_product}
    wanted = _WEIGHT_ONLY.get(layer.format, layer.format)
    outcome: Outcome = "not shown"
    if kinds == {wanted}:
        outcome = "as asked"
    elif kinds and None not in kinds and wanted not in kinds:
        outcome = "fell back"
    return Proof(
        stage=stage,
        name=layer.name,
        asked=layer.format,
        got=", ".join(sorted(kind or "not shown" for kind in kinds)) or "not shown",
        outcome=outcome,
    )


def summarize(proofs: Sequence[Proof]) -> tuple[str, ...]:
    """Return one line for each stage and format: how many layers ended how."""
    groups: dict[tuple[str, str], dict[Outcome, int]] = {}
    for proof in proofs:
        counts = groups.setdefault((proof.stage, proof.asked), {})
        counts[proof.outcome] = counts.get(proof.outcome, 0) + 1
    return tuple(
        f"{stage} {asked}: " + ", ".join(f"{n} {outcome}" for outcome, n in counts.items())
        for (stage, asked), counts in groups.items()
    )


def narrow_sums(stage: Stage, engine: Sequence[EngineLayer]) -> tuple[str, ...]:
    """Return a line about products that add up in fp16, which long rows may not bear."""
    found = [x.nodes[0] for x in engine if x.is_product and x.sums_narrow]
    return (f"{stage}: {len(found)} products add up in fp16, first {found[0]}",) if found else ()


def require_proof(proofs: Sequence[Proof], *, allow_unproven: bool = False) -> None:
    """Fail a build whose quantized layers did not all become quantized kernels.

    Args:
        proofs: of all stages.
        allow_unproven: accept quantized layers that the inspector does not show; those that it
            shows in another type are refused in any case.

    Raises:
        BuildError: a quantized layer fell back, or is not shown.
    """
    quantized = [x for x in proofs if x.asked in QUANTIZED]
    fallen = [x for x in quantized if x.outcome == "fell back"]
    if fallen:
        first = fallen[0]
        raise BuildError(
            f"{len(fallen)} of {len(quantized)} quantized layers fell back, first "
            f"{first.stage} {first.name}: {first.got} instead of {first.asked}; export with "
            "another --precision or keep that layer in 16 bits"
        )
    hidden = [x for x in quantized if x.outcome == "not shown"]
    if hidden and not allow_unproven:
        raise BuildError(
            f"{len(hidden)} of {len(quantized)} quantized layers are not shown by the engine "
            f"inspector, first {hidden[0].stage} {hidden[0].name}: nothing proves that they run "
            "quantized; report the TensorRT version, or build with --allow-unproven"
        )
