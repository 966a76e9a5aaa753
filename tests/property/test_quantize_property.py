"""Quantization of streamed tensors equals the reference arithmetic, whatever the values."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")
from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from hypothesis.extra import numpy as hnp  # noqa: E402

from gwp_edge.calibration import arithmetic  # noqa: E402
from gwp_edge.errors import BuildError  # noqa: E402
from gwp_edge.export.precision import INT4_BLOCKS  # noqa: E402
from gwp_edge.export.quantize import (  # noqa: E402
    activation_codes,
    activation_scale,
    bias_correction,
    dequantize_weight,
    pack_int4,
    quantize_weight,
    quantized_product,
)

pytestmark = pytest.mark.export

FLOATS = st.floats(-1e4, 1e4, width=32)
MATRICES = hnp.arrays(
    np.float32, hnp.array_shapes(min_dims=2, max_dims=2, max_side=40), elements=FLOATS
)


@given(x=MATRICES, threshold=st.floats(1e-3, 1e4), fmt=st.sampled_from(["int8", "fp8"]))
def test_activation_codes_equal_the_reference(x, threshold, fmt):
    scale = activation_scale(threshold, fmt)
    assert scale == arithmetic.scale_for(threshold, fmt)
    got = activation_codes(torch.from_numpy(x), scale, fmt).numpy()
    quantize = arithmetic.quantize_int8 if fmt == "int8" else arithmetic.quantize_fp8_e4m3
    assert np.array_equal(got, quantize(x, scale).astype(np.float32))


@given(w=MATRICES, fmt=st.sampled_from(["int8", "w8", "fp8"]))
def test_weight_codes_equal_the_reference(w, fmt):
    kind = "fp8" if fmt == "fp8" else "int8"
    got = quantize_weight(torch.from_numpy(w), fmt, 32)
    scales = arithmetic.weight_scales(w, axis=1, number_format=kind)
    assert np.array_equal(got.scale.numpy(), scales)
    quantize = arithmetic.quantize_int8 if kind == "int8" else arithmetic.quantize_fp8_e4m3
    want = quantize(w, scales, axis=1).astype(np.float32)
    assert np.array_equal(got.codes.to(torch.float32).numpy(), want)
    assert want.min(initial=0) >= -448
    assert kind == "fp8" or want.min(initial=0) >= -127


@given(w=MATRICES, block=st.sampled_from(INT4_BLOCKS))
def test_int4_blocks_equal_the_reference(w, block):
    got = quantize_weight(torch.from_numpy(w), "w4", block)
    codes, scales = arithmetic.quantize_int4_blocks(w, block)
    assert np.array_equal(got.codes.numpy(), codes)
    assert np.array_equal(got.scale.numpy(), scales)
    back = dequantize_weight(got, block).numpy()
    assert np.array_equal(back, arithmetic.dequantize_int4_blocks(codes, scales, block))


@given(
    codes=hnp.arrays(
        np.int8, st.tuples(st.integers(1, 9), st.integers(1, 9)), elements=st.integers(-8, 7)
    )
)
def test_packed_int4_unpacks_to_its_codes(codes):
    packed = pack_int4(torch.from_numpy(codes)).numpy()
    nibbles = np.stack([packed & 0xF, packed >> 4], axis=1).ravel()[: codes.size].astype(np.int8)
    assert np.array_equal(np.where(nibbles > 7, nibbles - 16, nibbles), codes.ravel())


@settings(deadline=None)
@given(seed=st.integers(0, 2**31), fmt=st.sampled_from(["int8", "fp8", "w8", "w4"]))
def test_corrected_bias_keeps_the_mean_output(seed, fmt):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn((64, 24), generator=g) + torch.randn(24, generator=g)
    weight = torch.randn((24, 8), generator=g)
    quantized = quantize_weight(weight, fmt, 32)
    threshold = float(x.abs().max())
    y = quantized_product(x, quantized, fmt, threshold=threshold, block=32)
    exact = (x @ weight).mean(0)
    corrected = y.mean(0) + bias_correction(weight, quantized, x.mean(0), 32)
    # What is left comes from rounding the activations: none, where they are not rounded.
    limit = {"w8": 1e-5, "w4": 1e-5, "int8": 0.1, "fp8": 0.5}[fmt]
    assert (corrected - exact).abs().max() < limit


@pytest.mark.parametrize("threshold", [0.0, -1.0, float("nan"), float("inf")])
def test_range_that_is_no_range_is_refused(threshold):
    with pytest.raises(BuildError, match="cannot be quantized"):
        activation_scale(threshold, "int8")


def test_float_format_is_no_quantized_format():
    with pytest.raises(BuildError, match="fp16 is not"):
        quantize_weight(torch.ones(2, 2), "fp16", 32)
