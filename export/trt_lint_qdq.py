"""Where Q/DQ may stand, so that TensorRT fuses it into products and nothing is computed twice.

Products alone are quantized, and straight: DequantizeLinear feeds MatMul, Gemm or Conv and nothing
else. The residual stream stays high. NVIDIA advises to quantize a residual input where the sum is
quantized again (its example is a ResNet, int8 from layer to layer); here every block normalises the
stream first and quantizes that, a sum in int8 would round the stream once a block, and at these
sizes the stream is a few megabytes against gigabytes of weights.

Source: TensorRT documentation, "Explicit Quantization", Q/DQ Layer-Placement Recommendations.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import numpy as np
import onnx

from gwp_edge.export.precision import TENSORRT_INT4_BLOCKS
from gwp_edge.export.trt_lint_graph import FLOATS, LintGraph, Problems, attributes_of

PRODUCTS: Final = frozenset({"MatMul", "Gemm", "Conv"})


def quantization_rules(graph: LintGraph, node: onnx.NodeProto) -> Problems:
    """Codes, scales, zero points and neighbours of a QuantizeLinear or DequantizeLinear."""
    attributes = attributes_of(node)
    shape = graph.shapes.get(node.input[0]) or []
    scales = graph.shapes.get(node.input[1]) or []
    n_scales = int(np.prod(scales)) if scales else 1
    weight = node.input[0] in graph.initializers
    if graph.types.get(node.input[1]) not in FLOATS:
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
    yield from _consumer_rules(graph, node)
    source = graph.producers.get(node.input[0])
    if source is not None and source.op_type != "QuantizeLinear":
        yield "error", f"dequantizes the result of {source.op_type}, not of QuantizeLinear"
    if graph.types.get(node.input[0]) == "int4":
        yield from _block_rules(shape, scales, attributes)


def _block_rules(shape: list[int], scales: list[int], attributes: Mapping[str, int]) -> Problems:
    """Whole blocks, of a size that TensorRT has: it knows the size by dividing the two shapes."""
    block, axis = attributes.get("block_size", 0), attributes.get("axis", 1)
    if block not in TENSORRT_INT4_BLOCKS:
        known = " or ".join(map(str, TENSORRT_INT4_BLOCKS))
        yield (
            "error",
            f"int4 blocks of {block}, TensorRT has none such; export with --block {known}",
        )
    elif len(scales) != len(shape) or shape[axis] != block * scales[axis]:
        yield (
            "error",
            f"int4 weight {shape} with scales {scales} is not in whole blocks of {block} along "
            f"axis {axis}; keep that layer higher with --recipe",
        )


def _consumer_rules(graph: LintGraph, node: onnx.NodeProto) -> Problems:
    """What reads a dequantized value must multiply it, along the axis that the scales allow."""
    scales = graph.shapes.get(node.input[1]) or []
    per_channel = len(scales) == 1 and scales[0] != 1
    for user in graph.consumers.get(node.output[0], []):
        if user.op_type == "Add":
            yield "error", "feeds Add: sums stay high, only products are quantized"
        elif user.op_type not in PRODUCTS:
            yield (
                "error",
                f"feeds {user.op_type}: it would be computed in floats; quantize the inputs of "
                "products only, and store weights as they are multiplied",
            )
        elif per_channel:
            yield from _axis_rules(graph, node, user)


def _axis_rules(graph: LintGraph, node: onnx.NodeProto, user: onnx.NodeProto) -> Problems:
    """Scales of a weight run along the product's outputs: the sum could not be scaled else."""
    n_axes = len(graph.shapes.get(node.output[0]) or graph.shapes.get(node.input[0]) or [])
    axis = attributes_of(node).get("axis", 1) % max(n_axes, 1)
    wanted = 0
    if user.op_type != "Conv":
        first = user.input[0] == node.output[0]
        turned = attributes_of(user).get("transA" if first else "transB", 0)
        wanted = n_axes - (2 if first != bool(turned) else 1)
    if axis != wanted:
        yield (
            "error",
            f"scales on axis {axis} of a {user.op_type} operand, which is summed over; axis "
            f"{wanted} has the outputs",
        )


def _zero_point_rules(graph: LintGraph, name: str, n_scales: int) -> Problems:
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


def product_rules(graph: LintGraph, node: onnx.NodeProto) -> Problems:
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
