"""Quantize and dequantize: properties, and equality with ONNX Runtime's own operators."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from gwp_edge.calibration import arithmetic as qa
from gwp_edge.errors import SpecError

ONE_FORMAT = st.sampled_from(["int8", "fp8"])
VALUES = hnp.arrays(
    np.float32,
    st.integers(1, 60),
    elements=st.floats(-1000, 1000, width=32, allow_subnormal=False),
)
SCALES = st.floats(2.0**-10, 16.0, width=32)


@settings(deadline=None)
@given(x=VALUES, scale=SCALES)
def test_int8_error_inside_range_is_at_most_half_a_step(x, scale):
    back = qa.fake_quantize(x, scale, "int8")
    inside = np.abs(x) <= 127 * np.float32(scale)
    error = np.abs(back.astype(np.float64) - x)[inside]
    assert (error <= 0.5 * scale * (1 + 1e-5)).all()
    assert (back[x > 127.5 * scale] == np.float32(127) * np.float32(scale)).all()


@settings(deadline=None)
@given(x=VALUES, scale=SCALES)
def test_fp8_error_inside_range_is_at_most_a_sixteenth_or_half_a_subnormal(x, scale):
    back = qa.fake_quantize(x, scale, "fp8").astype(np.float64)
    inside = np.abs(x) <= 448 * np.float32(scale)
    bound = np.maximum(np.abs(x.astype(np.float64)) / 16, scale * 2.0**-10) * (1 + 1e-5)
    assert (np.abs(back - x) <= bound)[inside].all()
    assert np.isfinite(back).all()


@settings(deadline=None)
@given(x=VALUES, scale=SCALES, number_format=ONE_FORMAT)
def test_fake_quantize_is_monotone_and_idempotent(x, scale, number_format):
    x = np.sort(x)
    once = qa.fake_quantize(x, scale, number_format)
    assert (np.diff(once) >= 0).all()
    np.testing.assert_array_equal(qa.fake_quantize(once, scale, number_format), once)


@settings(deadline=None)
@given(x=VALUES, scale=SCALES, number_format=ONE_FORMAT)
def test_fake_quantize_is_symmetric_up_to_the_most_negative_code(x, scale, number_format):
    x = np.clip(x, -127 * np.float32(scale), 127 * np.float32(scale))
    a = qa.fake_quantize(x, scale, number_format)
    b = qa.fake_quantize(-x, scale, number_format)
    np.testing.assert_array_equal(a, -b)


@settings(deadline=None)
@given(
    w=hnp.arrays(np.float32, (13, 3), elements=st.floats(-8, 8, width=32)),
    block=st.integers(1, 16),
)
def test_int4_blocks_error_is_at_most_half_a_step_of_its_block(w, block):
    q, scales = qa.quantize_int4_blocks(w, block)
    back = qa.dequantize_int4_blocks(q, scales, block)
    step = np.repeat(scales, block, axis=0)[:13]
    assert q.min() >= -7
    assert q.max() <= 7
    assert (np.abs(back - w) <= 0.5 * step * (1 + 1e-5)).all()


@settings(deadline=None)
@given(w=hnp.arrays(np.float32, (5, 4), elements=st.floats(-1e4, 1e4, width=32)), fmt=ONE_FORMAT)
def test_weight_scales_map_each_channel_maximum_to_the_largest_code(w, fmt):
    scales = qa.weight_scales(w, axis=1, number_format=fmt)
    back = qa.fake_quantize(w, scales, fmt, axis=1)
    assert (scales > 0).all()
    np.testing.assert_allclose(np.abs(back).max(0), np.abs(w).max(0), rtol=1e-5, atol=1e-30)


def test_quantize_of_halves_rounds_to_even():
    q = qa.quantize_int8([0.5, 1.5, 2.5, -0.5, -1.5, 126.5, 127.5, -128.5, 1e9, -1e9], 1.0)
    assert q.tolist() == [0, 2, 2, 0, -2, 126, 127, -128, 127, -128]


@pytest.mark.parametrize("scale", [0.0, -1.0, np.nan, np.inf, [1.0, 2.0], []])
def test_quantize_bad_scale_is_refused(scale):
    with pytest.raises(SpecError, match="scale"):
        qa.quantize_int8([1.0, 2.0], scale)


def test_quantize_nan_is_refused():
    with pytest.raises(SpecError, match="NaN"):
        qa.quantize_int8([np.nan], 1.0)
    with pytest.raises(SpecError, match="NaN"):
        qa.quantize_fp8_e4m3([np.nan], 1.0)
    with pytest.raises(SpecError, match="finite"):
        qa.weight_scales([[np.nan, 1.0]], axis=0)


@pytest.mark.parametrize("threshold", [0.0, -1.0, float("nan"), float("inf")])
def test_scale_for_empty_range_is_refused(threshold):
    with pytest.raises(SpecError, match="high precision"):
        qa.scale_for(threshold, "int8")


def test_sqnr_of_int8_on_a_uniform_signal_is_near_six_db_per_bit():
    x = np.random.default_rng(0).uniform(-1, 1, 20000)
    db = qa.sqnr_db(x, qa.fake_quantize(x, 1 / 127, "int8"))
    assert 48 < db < 54
    assert qa.sqnr_db(x, x) == float("inf")


# --- equality with ONNX Runtime


def run_onnx(nodes, inputs, outputs, initializers=(), opset=21):
    onnx = pytest.importorskip("onnx")
    ort = pytest.importorskip("onnxruntime")
    graph = onnx.helper.make_graph(nodes, "g", inputs, outputs, list(initializers))
    model = onnx.helper.make_model(
        graph, opset_imports=[onnx.helper.make_opsetid("", opset)], ir_version=10
    )
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    return ort.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


def qdq(x, scale, kind, axis):
    """Return what ONNX Runtime's QuantizeLinear then DequantizeLinear make of ``x``."""
    onnx = pytest.importorskip("onnx")
    from onnx import TensorProto as T
    from onnx import helper as h

    del onnx
    elem = {"int8": T.INT8, "fp8": T.FLOAT8E4M3FN}[kind]
    scale = np.asarray(scale, np.float32)
    zero = h.make_tensor("z", elem, scale.shape, np.zeros(scale.size).tolist())
    s = h.make_tensor("s", T.FLOAT, scale.shape, scale.ravel().tolist())
    attributes = {} if axis is None else {"axis": axis}
    nodes = [
        h.make_node("QuantizeLinear", ["x", "s", "z"], ["q"], **attributes),
        h.make_node("DequantizeLinear", ["q", "s", "z"], ["y"], **attributes),
    ]
    value = [h.make_tensor_value_info("x", T.FLOAT, x.shape)]
    out = [h.make_tensor_value_info("y", T.FLOAT, x.shape)]
    session = run_onnx(nodes, value, out, (s, zero))
    return session.run(None, {"x": x})[0]


@pytest.mark.export
@pytest.mark.parametrize("axis", [None, 1])
@pytest.mark.parametrize("kind", ["int8", "fp8"])
@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 2**31))
def test_fake_quantize_equals_onnxruntime(kind, axis, seed):
    rng = np.random.default_rng(seed)
    x = (rng.standard_normal((7, 6)) * 10 ** rng.uniform(-3, 3)).astype(np.float32)
    x[0] = [0.0, -0.0, 1e30, -1e30, 1e-30, 3.0]
    scale = rng.uniform(0.01, 2.0, 6 if axis else ()).astype(np.float32)
    # Exact halves, where rounding modes differ.
    x[1] = (np.arange(6) - 2.5) * scale
    np.testing.assert_array_equal(
        qa.fake_quantize(x, scale, kind, axis=axis), qdq(x, scale, kind, axis)
    )


@pytest.mark.export
@pytest.mark.parametrize(("k", "block"), [(64, 32), (64, 16), (256, 128)])
def test_int4_blocks_equal_onnxruntime(k, block):
    pytest.importorskip("onnx")
    from onnx import TensorProto as T
    from onnx import helper as h

    w = np.random.default_rng(k).standard_normal((k, 5)).astype(np.float32)
    q, scales = qa.quantize_int4_blocks(w, block)
    attributes = {"axis": 0, "block_size": block}
    nodes = [
        h.make_node("DequantizeLinear", ["c", "s"], ["y"], **attributes),
        h.make_node("QuantizeLinear", ["w", "s", "z"], ["q"], **attributes),
        h.make_node("Cast", ["q"], ["q8"], to=T.INT8),
    ]
    constants = [
        h.make_tensor("c", T.INT4, q.shape, q.ravel().tolist()),
        h.make_tensor("z", T.INT4, scales.shape, np.zeros(scales.size).tolist()),
        h.make_tensor("s", T.FLOAT, scales.shape, scales.ravel().tolist()),
    ]
    out = [
        h.make_tensor_value_info("y", T.FLOAT, w.shape),
        h.make_tensor_value_info("q8", T.INT8, w.shape),
    ]
    value = [h.make_tensor_value_info("w", T.FLOAT, w.shape)]
    y, q8 = run_onnx(nodes, value, out, constants).run(None, {"w": w})
    np.testing.assert_array_equal(q8, q)
    np.testing.assert_array_equal(y, qa.dequantize_int4_blocks(q, scales, block))
