"""The linter for TensorRT: our graphs pass, and each rule catches what it is for."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("torch")
onnx = pytest.importorskip("onnx")

import msgspec  # noqa: E402
import onnx_ir as ir  # noqa: E402
from onnx import TensorProto as T  # noqa: E402
from onnx import helper, numpy_helper  # noqa: E402

from gwp_edge.bundle import Bundle  # noqa: E402
from gwp_edge.errors import BuildError, SpecError  # noqa: E402
from gwp_edge.export.blueprint import record  # noqa: E402
from gwp_edge.export.trt_lint import (  # noqa: E402
    RELEASES,
    lint_bundle,
    lint_file,
    require_clean,
    support_table,
)

pytestmark = pytest.mark.export


def lint_recorded(folder, releases=RELEASES, **options):
    recorded = record(**options)
    found = []
    for graph in recorded.graphs:
        path = folder / f"{graph.stage}.onnx"
        ir.save(graph.model(recorded.bank), path)
        found += lint_file(path, releases)
    return found


def errors(findings):
    return [str(x) for x in findings if x.severity == "error"]


# -- our graphs ------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", ["gwp05-tiny", "gwp0-tiny"])
@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16", "int8", "fp8", "w8"])
def test_lint_graphs_of_every_precision_are_clean_for_jetpack_6_and_7(tmp_path, size, precision):
    assert errors(lint_recorded(tmp_path, size=size, precision=precision)) == []


def test_lint_int4_above_the_documented_opset_is_noted_for_jetpack_6(tmp_path):
    """Blocked DequantizeLinear is opset 21; 10.3's parser took INT4 and documents opset 20."""
    old = lint_recorded(tmp_path, ("10.3",), size="gwp05-wide4", precision="w4")
    assert errors(old) == []
    noted = {x.problem for x in old if x.node == "opset"}
    assert noted == {"21, TensorRT 10.3 is documented to read 9 to 20"}
    new = lint_recorded(tmp_path, ("10.13", "10.16"), size="gwp05-wide4", precision="w4")
    assert errors(new) == []
    assert not any(x.node == "opset" for x in new)


def test_lint_int4_blocks_that_tensorrt_does_not_have_are_an_error(tmp_path):
    """The default was 32, of which a note said that fast kernels are known for others."""
    found = errors(lint_recorded(tmp_path, size="gwp05-wide4", precision="w4", block=32))
    assert found
    assert all("int4 blocks of 32" in x and "--block 64 or 128" in x for x in found)
    for block in (64, 128):
        wide = lint_recorded(tmp_path, size="gwp05-wide4", precision="w4", block=block)
        assert errors(wide) == []


def test_lint_int4_weight_with_a_shorter_last_block_is_an_error(tmp_path):
    found = errors(lint_recorded(tmp_path, size="gwp05-tiny", precision="w4"))
    assert any("[48, 96] with scales [1, 96] is not in whole blocks of 64" in x for x in found)
    assert not any("net.2" in x and "visual" in x for x in found)  # 192 inputs: three blocks


def test_lint_weight_only_int8_is_called_what_it_is(tmp_path):
    found = lint_recorded(tmp_path, size="gwp05-tiny", precision="w8")
    assert any("expanded when building" in x.problem for x in found)


def test_lint_int8_with_16_bit_rest_leaves_few_float32_products(tmp_path):
    found = lint_recorded(tmp_path, size="gwp05-tiny", precision="int8", rest="fp16")
    slow = {x.node for x in found if "fp32" in x.problem}
    assert slow
    assert all("encoder." in name or "decoder." in name for name in slow)
    assert not any(name.startswith("encoder.") for name in slow)  # the vision encoder


def test_lint_bundle_of_a_real_export_is_clean(exported):
    bundle = Bundle.open(exported("gwp05", precision="bf16"))
    notes = require_clean(bundle)
    assert all(x.severity == "note" for x in notes)
    assert any("more" in x.node for x in lint_bundle(bundle))


def test_support_table_names_only_real_operators():
    table = support_table()
    assert set(RELEASES) <= set(table.releases)
    for name, rule in table.operators.items():
        newest = max(release.max_opset for release in table.releases.values())
        assert set(rule.attributes) <= set(onnx.defs.get_schema(name, newest).attributes), name


# -- each rule -------------------------------------------------------------------------------------


def save(
    path,
    nodes,
    initializers=(),
    *,
    inputs=(("x", T.FLOAT, (4, 8)),),
    out=(4, 8),
    opset=20,
    out_type=T.FLOAT,
    values=(),
    domain="",
):
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info(*i) for i in inputs],
        [helper.make_tensor_value_info("y", out_type, out)],
        [
            numpy_helper.from_array(v, n) if isinstance(v, np.ndarray) else v
            for n, v in initializers
        ],
        value_info=[helper.make_tensor_value_info(*v) for v in values],
    )
    opsets = [helper.make_opsetid("", opset)]
    if domain:
        opsets.append(helper.make_opsetid(domain, 1))
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), str(path))
    return path


def problems(path):
    return "; ".join(errors(lint_file(path)))


node = helper.make_node


def test_lint_unknown_operator_is_an_error(tmp_path):
    path = save(tmp_path / "a.onnx", [node("BitwiseNot", ["x"], ["y"])])
    assert "BitwiseNot is not in the support table" in problems(path)


def test_lint_unknown_attribute_is_an_error(tmp_path):
    path = save(tmp_path / "a.onnx", [node("Softmax", ["x"], ["y"], axis=-1, extra=1)])
    assert "attribute extra of Softmax" in problems(path)


def test_lint_dynamic_shape_is_an_error(tmp_path):
    path = save(
        tmp_path / "a.onnx",
        [node("Sqrt", ["x"], ["y"])],
        inputs=(("x", T.FLOAT, ("n", 8)),),
        out=("n", 8),
    )
    assert "not static" in problems(path)


def test_lint_integers_at_the_border_are_an_error(tmp_path):
    path = save(
        tmp_path / "a.onnx",
        [node("Add", ["x", "x"], ["y"])],
        inputs=(("x", T.INT64, (4, 8)),),
        out_type=T.INT64,
    )
    assert "int64 crosses the graph's border" in problems(path)
    assert "computed in int64" in problems(path)


def test_lint_uint8_inside_the_graph_is_an_error(tmp_path):
    path = save(
        tmp_path / "a.onnx",
        [node("Cast", ["x"], ["c"], to=T.UINT8), node("Cast", ["c"], ["y"], to=T.FLOAT)],
        values=(("c", T.UINT8, (4, 8)),),
    )
    assert "uint8 is allowed for network inputs" in problems(path)


def test_lint_mixed_types_are_an_error(tmp_path):
    path = save(
        tmp_path / "a.onnx",
        [node("Add", ["x", "h"], ["y"])],
        inputs=(("x", T.FLOAT, (4, 8)), ("h", T.FLOAT16, (4, 8))),
    )
    assert "Add mixes fp16, fp32" in problems(path)


def test_lint_axes_that_are_computed_are_an_error(tmp_path):
    path = save(
        tmp_path / "a.onnx",
        [node("Cast", ["x"], ["axes"], to=T.INT64), node("ReduceL2", ["x", "axes"], ["y"])],
        values=(("axes", T.INT64, (4, 8)),),
    )
    assert "input 1 of ReduceL2 must be an initializer" in problems(path)


def test_lint_foreign_domain_and_old_or_new_opsets_are_errors(tmp_path):
    path = save(tmp_path / "a.onnx", [node("Sqrt", ["x"], ["y"])], opset=24, domain="ai.other")
    assert "24, TensorRT 10.3 is documented to read 9 to 20" in problems(path)
    assert "domain ai.other" in problems(path)


def qdq(tmp_path, *, zero=None, scale=None, weight_scale=None, middle=None, weight=None):
    """Save a quantized product, with one thing changed."""
    zero = np.zeros((), np.int8) if zero is None else zero
    scale = np.array(0.1, np.float32) if scale is None else scale
    weight_scale = np.full(8, 0.1, np.float32) if weight_scale is None else weight_scale
    weight = np.ones((8, 8), np.int8) if weight is None else weight
    code = T.UINT8 if zero.dtype == np.uint8 else T.INT8
    nodes = [node("QuantizeLinear", ["x", "s", "z"], ["q"])]
    values = [("q", code, (4, 8)), ("d", T.FLOAT, (4, 8)), ("w", T.FLOAT, (8, 8))]
    source = "q"
    if middle is not None:
        nodes.append(node(middle, ["q"], ["m"]))
        values.append(("m", code, (4, 8)))
        source = "m"
    nodes += [
        node("DequantizeLinear", [source, "s", "z"], ["d"]),
        node("DequantizeLinear", ["wq", "ws"], ["w"], axis=1),
        node("MatMul", ["d", "w"], ["y"]),
    ]
    initializers = [("s", scale), ("z", zero), ("wq", weight), ("ws", weight_scale)]
    return save(tmp_path / "a.onnx", nodes, initializers, values=values)


def test_lint_quantized_product_passes(tmp_path):
    assert problems(qdq(tmp_path)) == ""


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"zero": np.array(3, np.int8)}, "zero point must be 0"),
        ({"zero": np.zeros((), np.uint8)}, "uint8 zero point is read as int8"),
        ({"scale": np.full(8, 0.1, np.float32)}, "activations take one scale"),
        ({"scale": np.array(0.0, np.float32)}, "scales must be positive"),
        ({"scale": np.array(np.nan, np.float32)}, "scales must be positive"),
        ({"weight_scale": np.full(5, 0.1, np.float32)}, "5 scales on axis 1 of size 8"),
        ({"middle": "Identity"}, "must be followed by DequantizeLinear"),
    ],
)
def test_lint_quantization_rule_catches_its_fault(tmp_path, change, problem):
    assert problem in problems(qdq(tmp_path, **change))


def placed(folder, product, *, weight_shape=(8, 8), axis=1, out=(4, 8), after=(), inputs=None):
    """Save Q/DQ around ``product``, a node that reads d (the input) and w (the weight)."""
    scales = np.full(weight_shape[axis], 0.1, np.float32)
    shape = (4, 8) if inputs is None else inputs
    nodes = [
        node("QuantizeLinear", ["x", "s", "z"], ["q"]),
        node("DequantizeLinear", ["q", "s", "z"], ["d"]),
        node("DequantizeLinear", ["wq", "ws"], ["w"], axis=axis),
        product,
        *after,
    ]
    return save(
        folder / "a.onnx",
        nodes,
        [
            ("s", np.array(0.1, np.float32)),
            ("z", np.zeros((), np.int8)),
            ("wq", np.ones(weight_shape, np.int8)),
            ("ws", scales),
        ],
        inputs=(("x", T.FLOAT, shape),),
        out=out,
        values=[
            ("q", T.INT8, shape),
            ("d", T.FLOAT, shape),
            ("w", T.FLOAT, weight_shape),
            ("t", T.FLOAT, weight_shape[::-1]),
        ],
    )


def test_lint_residual_sum_of_dequantized_values_is_an_error(tmp_path):
    path = placed(tmp_path, node("Add", ["d", "w"], ["y"]), weight_shape=(4, 8))
    assert "feeds Add: sums stay high" in problems(path)


@pytest.mark.parametrize("op", ["Gelu", "Softmax", "Transpose"])
def test_lint_dequantized_value_that_feeds_no_product_is_an_error(tmp_path, op):
    path = placed(tmp_path, node(op, ["d"], ["y"]))
    assert f"feeds {op}: it would be computed in floats" in problems(path)


def test_lint_weight_that_is_turned_after_dequantizing_is_an_error(tmp_path):
    path = placed(
        tmp_path,
        node("Transpose", ["w"], ["t"], perm=[1, 0]),
        weight_shape=(6, 8),
        axis=0,
        out=(4, 6),
        after=[node("MatMul", ["d", "t"], ["y"])],
    )
    assert "feeds Transpose: it would be computed in floats" in problems(path)


@pytest.mark.parametrize(
    ("product", "axis", "good"),
    [
        (node("MatMul", ["d", "w"], ["y"]), 1, True),
        (node("MatMul", ["d", "w"], ["y"]), 0, False),
        (node("MatMul", ["w", "d"], ["y"]), 0, True),
        (node("MatMul", ["w", "d"], ["y"]), 1, False),
    ],
)
def test_lint_scales_of_a_matmul_weight_run_along_its_outputs(tmp_path, product, axis, good):
    path = placed(tmp_path, product, axis=axis, inputs=(8, 8), out=(8, 8))
    found = problems(path)
    assert ("which is summed over" in found) != good
    assert not good or found == ""


@pytest.mark.parametrize(("axis", "good"), [(0, True), (1, False)])
def test_lint_scales_of_a_convolution_weight_run_along_its_outputs(tmp_path, axis, good):
    path = placed(
        tmp_path,
        node("Conv", ["d", "w"], ["y"], kernel_shape=[1, 1]),
        weight_shape=(6, 8, 1, 1),
        axis=axis,
        inputs=(1, 8, 4, 4),
        out=(1, 6, 4, 4),
    )
    found = problems(path)
    assert ("axis 0 has the outputs" in found) != good
    assert not good or found == ""


def test_lint_quantize_without_zero_point_means_uint8_and_is_an_error(tmp_path):
    path = save(
        tmp_path / "a.onnx",
        [node("QuantizeLinear", ["x", "s"], ["q"]), node("DequantizeLinear", ["q", "s"], ["y"])],
        [("s", np.array(0.1, np.float32))],
        values=[("q", T.UINT8, (4, 8))],
    )
    assert "without a zero point" in problems(path)


def test_lint_unknown_release_and_broken_file_are_refused(tmp_path):
    with pytest.raises(SpecError, match=r"TensorRT 9\.9 is not in the table"):
        lint_file(qdq(tmp_path), ("9.9",))
    (tmp_path / "b.onnx").write_bytes(b"\xff\xff nonsense")
    with pytest.raises(SpecError, match="cannot be read as ONNX"):
        lint_file(tmp_path / "b.onnx")
    with pytest.raises(SpecError, match="cannot be read as ONNX"):
        lint_file(tmp_path / "missing.onnx")


def test_require_clean_names_the_first_error(exported, tmp_path, monkeypatch):
    import gwp_edge.export.trt_lint as module

    table = module.support_table()
    fewer = {k: v for k, v in table.operators.items() if k != "Softmax"}
    changed = msgspec.structs.replace(table, operators=fewer)
    monkeypatch.setattr(module, "support_table", lambda: changed)
    with pytest.raises(BuildError, match="Softmax is not in the support table"):
        require_clean(Bundle.open(exported("gwp05", precision="bf16")))
