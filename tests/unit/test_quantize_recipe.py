"""Recipes: what each layer computes in and why, by default, by file and by target."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

pytest.importorskip("torch")

from gwp_edge.errors import SpecError
from gwp_edge.export.precision import (
    QUANTIZED_FORMATS,
    Recipe,
    cache_format,
    input_name,
    is_quantizable,
    make_recipe,
    scale_key,
)
from gwp_edge.export.recipe_file import read_recipe
from gwp_edge.export.targets import (
    TARGETS,
    check_target_precision,
    rest_format,
    with_whole_blocks,
)

pytestmark = pytest.mark.export

QUANTIZED = ("attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0", "attn2.to_q")
QUANTIZED += ("attn2.to_out.0", "ffn.net.0.proj", "ffn.net.2")
HIGH = (
    "patch_embedding",
    "state_encoder.mid_proj",
    "action_encoder.out_proj",
    "action_decoder.in_proj",
    "condition_embedder.text_embedder.linear_1",
    "encoder.conv_in",
    "quant_conv",
    "blocks.0.attn2.to_k",
    "blocks.0.visual_expert.attn2.to_v",
    "blocks.0.attn1.qk.0",
    "blocks.0.action_expert.attn2.pv",
    "blocks.0.prefix.qk.0",
)
# Kept high where codes are coarse, in the stream that carries the actions.
SENSITIVE = {
    "int8": ("attn2.to_out.0",),
    "fp8": ("attn1.to_out.0", "attn2.to_out.0"),
    "w8": ("attn2.to_q", "attn2.to_out.0"),
}
LAYERS = tuple(f"blocks.{i}.{kind}" for i in range(3) for kind in QUANTIZED)


@pytest.mark.parametrize("fmt", QUANTIZED_FORMATS)
def test_quantized_recipe_touches_linear_layers_of_blocks_only(fmt):
    recipe = make_recipe(fmt)
    assert {recipe.of("blocks.29.visual_expert." + kind) for kind in QUANTIZED} == {fmt}
    kept = SENSITIVE.get(fmt, ())
    for block in ("blocks.0.", "blocks.7.action_expert."):
        for kind in QUANTIZED:
            assert recipe.of(block + kind) == ("fp32" if kind in kept else fmt)
            if kind in kept:
                assert "action stream" in recipe.explain(block + kind)[1]
    for layer in HIGH:
        assert recipe.of(layer) == "fp32"
        assert recipe.explain(layer)[1]
        assert not is_quantizable(layer)
    assert cache_format(recipe) == "fp32"


def test_rest_of_a_recipe_is_float16_but_for_the_ends():
    recipe = Recipe(name="int8", default="int8", rest="fp16")
    assert recipe.of("patch_embedding") == recipe.of("encoder.conv_in") == "fp16"
    assert cache_format(recipe) == "fp16"
    assert recipe.of("action_decoder.in_proj") == "fp32"


def test_q_k_and_v_share_one_input():
    names = {input_name(f"blocks.1.action_expert.attn1.to_{x}") for x in "qkv"}
    assert names == {"blocks.1.action_expert.attn1.qkv"}
    assert input_name("blocks.1.attn2.to_q") == "blocks.1.attn2.to_q"
    assert scale_key("denoise", "blocks.1.attn1.to_k") == "denoise/blocks.1.attn1.qkv"


def test_layer_without_a_range_is_named():
    with pytest.raises(SpecError, match=r"blocks\.0\.ffn\.net\.2.*prefill.*--calibration"):
        make_recipe("int8").threshold("prefill", "blocks.0.ffn.net.2")


@pytest.mark.parametrize("suffix", [".json", ".toml"])
def test_recipe_file_overrides_by_pattern_and_the_last_wins(tmp_path, suffix):
    path = tmp_path / f"mine{suffix}"
    if suffix == ".json":
        given = {"rest": "fp16", "layers": {"blocks.*.ffn.net.2": "fp32", "blocks.1.*": "w8"}}
        path.write_text(json.dumps(given))
    else:
        path.write_text(
            'rest = "fp16"\n[layers]\n"blocks.*.ffn.net.2" = "fp32"\n"blocks.1.*" = "w8"\n'
        )
    recipe = read_recipe(path, make_recipe("int8"), LAYERS)
    assert recipe.of("blocks.0.ffn.net.2") == "fp32"
    assert recipe.explain("blocks.0.ffn.net.2")[1] == f"mine{suffix}: blocks.*.ffn.net.2"
    assert recipe.of("blocks.1.ffn.net.2") == "w8"
    assert recipe.of("blocks.0.attn1.to_q") == "int8"
    assert recipe.of("patch_embedding") == "fp16"


@pytest.mark.parametrize(
    ("name", "text"), [("a.json", '{"rest": "fp16"}'), ("a.toml", 'rest = "fp16"')]
)
def test_recipe_file_with_a_byte_order_mark_is_read(tmp_path, name, text):
    (tmp_path / name).write_text(text, "utf-8-sig")
    assert read_recipe(tmp_path / name, make_recipe("int8"), LAYERS).rest == "fp16"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "Expecting"),
        ('{"layers": {"blocks.9.*": "fp32"}}', "no layer is called"),
        ('{"layers": {"blocks.0.*": "int3"}}', "int3"),
        ('{"rest": "int8"}', "rest must be"),
        ('{"block": 48}', "block must be"),
        ('{"layer": {}}', "unknown field"),
    ],
)
def test_recipe_file_with_a_fault_is_refused(tmp_path, content, message):
    path = tmp_path / "recipe.json"
    path.write_text(content)
    with pytest.raises(SpecError, match=message):
        read_recipe(path, make_recipe("int8"), LAYERS)


def test_recipe_file_that_is_missing_is_refused(tmp_path):
    with pytest.raises(SpecError, match="recipe"):
        read_recipe(tmp_path / "none.toml", make_recipe("int8"), LAYERS)


def test_orin_refuses_fp8_and_says_int8():
    with pytest.raises(SpecError, match=r"orin.*--precision int8"):
        check_target_precision("orin", "fp8")
    for target in ("thor", "ada", "hopper", "blackwell", "cpu"):
        check_target_precision(target, "fp8")
    for target in TARGETS:
        check_target_precision(target, "int8")


@pytest.mark.parametrize("target", [t for t in TARGETS if t != "cpu"])
def test_gpu_targets_refuse_weights_only_int8_and_say_what_they_have(target):
    with pytest.raises(SpecError, match=r"not --precision w8.*expands.*--precision int8"):
        check_target_precision(target, "w8")


def test_orin_takes_int4_weights_as_no_refusal_of_its_parser_is_known():
    for target in ("orin", "thor"):
        check_target_precision(target, "w4")


def test_gpu_targets_take_int4_blocks_of_64_and_128_alone():
    """Blocks of 32, once the default, are none that TensorRT documents."""
    widths = dict.fromkeys(LAYERS, 256)
    old = replace(make_recipe("w4"), block=32)
    with pytest.raises(SpecError, match=r"--target orin.*int4 blocks of 32; use --block 64 or 128"):
        with_whole_blocks(old, "orin", widths)
    assert with_whole_blocks(old, "cpu", widths) is old
    int8 = replace(make_recipe("int8"), block=32)
    assert with_whole_blocks(int8, "orin", widths) is int8
    for block in (64, 128):
        recipe = replace(make_recipe("w4"), block=block)
        assert with_whole_blocks(recipe, "thor", widths) == recipe


def test_layers_that_are_not_whole_int4_blocks_stay_high_on_gpu_targets():
    widths = dict.fromkeys(LAYERS, 128) | {LAYERS[0]: 96}
    recipe = replace(make_recipe("w4"), rest="fp16")
    found = with_whole_blocks(recipe, "orin", widths)
    assert {layer: found.of(layer) for layer in LAYERS} == {
        layer: "w4" if layer != LAYERS[0] else "fp16" for layer in LAYERS
    }
    assert "96 inputs are not whole blocks of 64" in found.explain(LAYERS[0])[1]
    assert with_whole_blocks(recipe, "cpu", widths) is recipe
    asked = replace(recipe, overrides={LAYERS[0]: ("w4", "mine.json: *")})
    with pytest.raises(SpecError, match=r"96 inputs.*whole blocks of 64; give that layer another"):
        with_whole_blocks(asked, "orin", widths)


@pytest.mark.parametrize(
    ("precision", "instead"), [("nvfp4", "fp8"), ("fp4", "fp8"), ("int4", "w4"), ("int3", "int8")]
)
def test_precision_that_no_graph_carries_names_what_to_export(precision, instead):
    with pytest.raises(SpecError, match=rf"--precision {precision} .*{instead}"):
        check_target_precision("thor", precision)


def test_rest_of_a_quantized_recipe_is_16_bits_on_gpus_alone():
    assert rest_format("cpu") == "fp32"
    assert {rest_format(target) for target in TARGETS if target != "cpu"} == {"fp16"}


def test_unknown_target_lists_the_known_ones():
    with pytest.raises(SpecError, match=r"nano.*orin"):
        check_target_precision("nano", "int8")
