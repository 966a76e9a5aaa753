"""What an engine is said to compute in, read from the inspector's words."""

from __future__ import annotations

import json

import pytest

from gwp_edge.engines.trt_proof import (
    narrow_sums,
    parse_inspector,
    prove,
    require_proof,
    summarize,
)
from gwp_edge.errors import BuildError
from gwp_edge.manifest import Layer


def layer(name="ffn", fmt="int8", stage="prefill") -> Layer:
    return Layer(stage=stage, name=name, format=fmt, reason="", flops=1, weight_bytes=1)


def engine_layer(name="ffn", tactic="", word="Float", words=(), kind="gemm", **more) -> dict:
    return {
        "Name": f"__myl_{name}",
        "LayerType": kind,
        "Inputs": [{"Name": "x", "Format/Datatype": x} for x in words or (word,)],
        "TacticName": tactic,
        "Metadata": f"[ONNX Layer: {name}]\x1e[ONNX Layer: {name}.add]",
        **more,
    }


def outcome(layers, asked="int8"):
    (found,) = prove("prefill", [layer(fmt=asked)], parse_inspector(json.dumps({"Layers": layers})))
    return found.outcome, found.got


@pytest.mark.parametrize(
    ("asked", "raw", "wanted"),
    [
        ("int8", {"tactic": "sm80_xmma_gemm_i8i8_i8i32_f32_tn"}, ("as asked", "int8")),
        ("int8", {"word": "Int8", "Weights": {"Type": "Int8"}}, ("as asked", "int8")),
        ("int8", {"words": ["Int8", "Row major linear INT8 format"]}, ("as asked", "int8")),
        # A kernel without types in its name, and one operand alone quantized: it may widen it.
        ("int8", {"words": ["Float", "Int8"], "tactic": "__myl_CastMatMul"}, ("not shown",) * 2),
        ("fp8", {"words": ["Half", "FP8"], "tactic": "__myl_Fc"}, ("not shown",) * 2),
        ("int8", {"word": "Half", "tactic": "__myl_Fc"}, ("fell back", "fp16")),
        ("int8", {"tactic": "sm80_xmma_gemm_f16f16_f16f32_f32"}, ("fell back", "fp16")),
        # Quantized inputs into a float kernel: a published engine did exactly this.
        ("int8", {"word": "Int8", "tactic": "f32f32_tf32f32"}, ("fell back", "fp32")),
        ("fp8", {"tactic": "sm89_xmma_gemm_e4m3e4m3_e4m3f32_f32"}, ("as asked", "fp8")),
        ("fp16", {"tactic": "ampere_h16816gemm_128x64"}, ("as asked", "fp16")),
        ("bf16", {"tactic": "sm80_xmma_gemm_bf16bf16_bf16f32"}, ("as asked", "bf16")),
        ("fp32", {"tactic": "sm80_xmma_gemm_f32f32_f32f32"}, ("as asked", "fp32")),
        ("w4", {"word": "Half", "Weights": {"Type": "Int4"}}, ("as asked", "int4")),
        # Weights alone are quantized: such a product computes in 16 bits.
        (
            "w4",
            {"word": "Half", "Weights": {"Type": "Int4"}, "tactic": "sm80_xmma_gemm_f16f16_f16f32"},
            ("as asked", "int4"),
        ),
        ("w4", {"word": "Half", "tactic": "sm80_xmma_gemm_f16f16_f16f32"}, ("fell back", "fp16")),
        ("w8", {"word": "Half", "Weights": {"Type": "Int8"}}, ("as asked", "int8")),
        ("w8", {"word": "Float"}, ("fell back", "fp32")),
    ],
)
def test_proof_reads_kernels_types_and_weights(asked, raw, wanted):
    assert outcome([engine_layer(**raw)], asked) == wanted


def test_proof_product_decides_over_copies_beside_it():
    copy = engine_layer(kind="kgen", word="Int8", tactic="__myl_MoveConc")
    product = engine_layer(tactic="sm80_xmma_gemm_f16f16_f16f32_f32")
    assert outcome([copy, product]) == ("fell back", "fp16")


def test_proof_copies_alone_show_nothing():
    copy = engine_layer(kind="kgen", words=["Int8", "Int8"], tactic="__myl_QuanMove")
    assert outcome([copy]) == ("not shown", "not shown")


def test_proof_two_products_that_differ_are_not_as_asked():
    quantized = engine_layer(tactic="sm80_xmma_gemm_i8i8_i8i32_f32_tn")
    half = engine_layer(tactic="sm80_xmma_gemm_f16f16_f16f32_f32")
    assert outcome([quantized, half]) == ("not shown", "fp16, int8")
    assert outcome([quantized, quantized]) == ("as asked", "int8")


def test_proof_layer_that_is_nowhere_is_not_shown():
    assert outcome([engine_layer(name="other")]) == ("not shown", "not shown")


def test_proof_newer_dialect_with_split_datatype_is_understood():
    raw = engine_layer(word="")
    raw["Inputs"] = [{"Name": x, "Datatype": "Int8", "Format": "row major"} for x in "xw"]
    assert outcome([raw]) == ("as asked", "int8")


@pytest.mark.parametrize("text", ["", "{}", '{"Layers": ["a", "b"]}', '{"Layers": 3}', "[]"])
def test_inspector_without_detail_is_refused(text):
    with pytest.raises(BuildError, match="inspector"):
        parse_inspector(text)


def test_require_proof_fails_on_fallback_and_on_no_proof_at_all():
    good = prove("prefill", [layer()], parse_inspector(_json(engine_layer(words=["Int8"] * 2))))
    bad = prove("prefill", [layer()], parse_inspector(_json(engine_layer(word="Half"))))
    none = prove("prefill", [layer()], parse_inspector(_json(engine_layer(name="other"))))
    require_proof(good)
    # One layer that is not shown proves nothing about itself, however many others are.
    with pytest.raises(BuildError, match=r"1 of 300 quantized layers are not shown.*prefill ffn"):
        require_proof([*good * 299, *none])
    require_proof([*good * 299, *none], allow_unproven=True)
    with pytest.raises(
        BuildError, match=r"1 of 2 quantized layers fell back.*fp16 instead of int8"
    ):
        require_proof([*good, *bad])
    with pytest.raises(BuildError, match="fell back"):
        require_proof([*good, *bad], allow_unproven=True)
    with pytest.raises(BuildError, match="nothing proves"):
        require_proof(none)
    assert summarize([*good, *bad]) == ("prefill int8: 1 as asked, 1 fell back",)


@pytest.mark.parametrize(
    ("tactic", "narrow"),
    [
        ("ampere_h16816gemm_128x64", True),
        ("sm80_xmma_gemm_f16f16_f16f16_f16_tn_n", True),
        ("ampere_fp16_s16816gemm_128x64", False),
        ("sm80_xmma_gemm_f16f16_f16f32_f32_tn_n", False),
        ("sm80_xmma_gemm_i8i8_i8i32_f32_tn", False),
    ],
)
def test_narrow_sums_tells_products_that_add_up_in_16_bits(tactic, narrow):
    layers = parse_inspector(_json(engine_layer(tactic=tactic)))
    line = ("prefill: 1 products add up in fp16, first ffn",)
    assert narrow_sums("prefill", layers) == (line if narrow else ())


def _json(*layers) -> str:
    return json.dumps({"Layers": layers})
