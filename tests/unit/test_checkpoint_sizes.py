import json
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("torch")

import torch
from safetensors.torch import load_file, save_file

from gwp_edge.errors import SpecError
from gwp_edge.export.checkpoint import (
    account,
    expected_tensors,
    network_sizes,
    open_checkpoint,
    unused_tensors,
)
from gwp_edge.export.synthetic import SIZES

pytestmark = pytest.mark.export

REFERENCE = Path(__file__).parents[1] / "data" / "reference"
WEIGHTS = "diffusion_pytorch_model.safetensors"
PRESETS = {"gwp05": SIZES["gwp05-tiny"], "gwp0": SIZES["gwp0-tiny"]}


@pytest.fixture
def edit(tmp_path):
    """Return a function that writes a changed copy of a reference checkpoint and opens it."""
    opened = []

    def write(family="gwp05", *, config=None, tensors=None):
        source = REFERENCE / family / "checkpoint"
        weights = load_file(source / WEIGHTS)
        (tensors or (lambda w: None))(weights)
        save_file({n: t.contiguous() for n, t in weights.items()}, tmp_path / WEIGHTS)
        settings = json.loads((source / "config.json").read_text())
        if config == "none":
            (tmp_path / "config.json").unlink(missing_ok=True)
        else:
            (config or (lambda c: None))(settings)
            (tmp_path / "config.json").write_text(json.dumps(settings))
        opened.append(open_checkpoint(tmp_path))
        return opened[-1]

    yield write
    for checkpoint in opened:
        checkpoint.close()


@pytest.mark.parametrize("family", ["gwp05", "gwp0"])
def test_network_sizes_reference_from_config_and_from_tensors(edit, family):
    assert network_sizes(edit(family)) == PRESETS[family]
    assert network_sizes(edit(family, config="none"), head_dim=32) == PRESETS[family]


def test_network_sizes_without_config_assumes_heads_of_128(edit):
    with pytest.raises(SpecError, match=r"width 96 does not divide into heads of 128"):
        network_sizes(edit(config="none"))


def test_network_sizes_state_the_network_spec():
    spec = SIZES["gwp05-full"].network_spec(n_text_rows=12)
    assert (spec.visual_dim, spec.action_dim, spec.n_text_rows) == (3072, 1024, 12)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"qk_norm": "layer_norm"}, "qk_norm"),
        ({"cross_attn_norm": False}, "cross_attn_norm"),
        ({"image_dim": 1280}, "image_dim"),
        ({"added_kv_proj_dim": 96}, "added_kv_proj_dim"),
        ({"patch_size": [1, 1, 1]}, "patch_size"),
        ({"num_layers": 3}, r"num_layers 3, the tensors say 2"),
        ({"ffn_dim": 200}, r"ffn_dim 200, the tensors say 192"),
        ({"action_expert_dim": 64}, r"action_expert_dim 64, the tensors say 48"),
        ({"text_dim": 4096}, r"text_dim 4096, the tensors say 64"),
        ({"num_attention_heads": 4}, r"4 heads of 32 make 128, but the network is 96"),
        ({"attention_head_dim": 28}, r"width 96 does not divide into heads of 28"),
        ({"attention_head_dim": "32"}, "attention_head_dim"),
        ({"attention_head_dim": 3, "num_attention_heads": 32}, "head_dim must be even"),
        ({"eps": 0}, "eps must be positive"),
        ({"eps": "small"}, "eps"),
        ({"_class_name": "CasualWorldActionTransformer"}, r"gwp-0\), but the tensors are gwp-0\.5"),
        ({"_class_name": "WanTransformer3DModel"}, "WanTransformer3DModel"),
    ],
)
def test_network_sizes_contradicting_config_refuses(edit, change, words):
    checkpoint = edit(config=lambda c: c.update(change))
    with pytest.raises(SpecError, match=words) as caught:
        network_sizes(checkpoint)
    assert "\n" not in str(caught.value)


def test_network_sizes_action_channels_of_the_config_lose(edit, caplog):
    """Training configs are known to say 16 where the checkpoint has 32."""
    checkpoint = edit(config=lambda c: c.update(in_action_channels=16, out_action_channels=16))
    assert network_sizes(checkpoint).n_action_channels == 32
    assert "in_action_channels 16, the tensors say 32" in caplog.text


def test_network_sizes_training_config_loses_but_not_on_layers(edit, caplog):
    def training(c):
        del c["_class_name"]
        c.update(ffn_dim=200)

    assert network_sizes(edit(config=training)) == SIZES["gwp05-tiny"]
    assert "ffn_dim 200" in caplog.text
    with pytest.raises(SpecError, match="num_layers 30"):
        network_sizes(edit(config=lambda c: (training(c), c.update(num_layers=30))))


def test_network_sizes_head_size_against_config_refuses(edit):
    with pytest.raises(SpecError, match="heads of 32, but 48"):
        network_sizes(edit(), head_dim=48)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8])
def test_network_sizes_quantized_checkpoint_refuses(edit, dtype):
    name = "blocks.0.action_expert.attn1.to_q.weight"
    checkpoint = edit(tensors=lambda w: w.update({name: w[name].to(dtype)}))
    with pytest.raises(SpecError, match=rf"{name} \({str(dtype)[6:]}\)"):
        network_sizes(checkpoint)


def test_network_sizes_missing_block_names_it(edit):
    def drop(w):
        for name in [n for n in w if n.startswith("blocks.0.")]:
            del w[name]

    with pytest.raises(SpecError, match="blocks are missing: 0"):
        network_sizes(edit(tensors=drop))


def test_network_sizes_video_model_refuses(edit):
    def drop(w):
        for name in [n for n in w if n.startswith("action_encoder.")]:
            del w[name]

    with pytest.raises(SpecError, match="a video model is not a policy"):
        network_sizes(edit("gwp0", tensors=drop))


@pytest.mark.parametrize("family", ["gwp05", "gwp0"])
def test_expected_tensors_equal_the_reference(family):
    weights = load_file(REFERENCE / family / "checkpoint" / WEIGHTS)
    assert expected_tensors(PRESETS[family]) == {n: tuple(t.shape) for n, t in weights.items()}


@pytest.mark.parametrize(("preset", "billions"), [("gwp05-full", 6.02), ("gwp0-full", 5.0)])
def test_expected_tensors_full_size_has_the_published_parameters(preset, billions):
    n = sum(torch.Size(s).numel() for s in expected_tensors(SIZES[preset]).values())
    assert round(n / 1e9, 2) == pytest.approx(billions, abs=0.02)


def test_unused_tensors_mot_are_the_video_head_and_the_last_prefix_block():
    unused = unused_tensors(SIZES["gwp05-tiny"])
    last = {n.removeprefix("blocks.1.visual_expert.") for n in unused if n.startswith("blocks.1.")}
    assert {"proj_out.weight", "proj_out.bias", "scale_shift_table"} <= set(unused)
    assert {"attn1.to_q.weight", "attn1.to_out.0.bias", "norm2.weight", "ffn.net.2.bias"} <= last
    kept = {"attn1.to_k.weight", "attn1.to_v.bias", "attn1.norm_k.weight", "scale_shift_table"}
    assert not kept & last
    assert len(unused) == 3 + len(last)
    assert all(".action_expert." not in n for n in unused)


def test_unused_tensors_dense_is_the_video_head_alone():
    assert set(unused_tensors(SIZES["gwp0-tiny"])) == {"proj_out.weight", "proj_out.bias"}


def test_account_reference_splits_every_tensor(edit):
    checkpoint = edit()
    accounting = account(checkpoint, SIZES["gwp05-tiny"])
    assert {*accounting.used, *accounting.unused} == set(checkpoint.names())
    assert not set(accounting.used) & set(accounting.unused)


def test_account_lists_everything_wrong_at_once(edit):
    def damage(w):
        del w["proj_out.bias"]
        del w["blocks.1.action_expert.norm2.weight"]
        w["lora.up"] = torch.ones(3)
        w["action_decoder.mid_proj.bias"] = torch.ones(5)

    checkpoint = edit(tensors=damage)
    with pytest.raises(SpecError) as caught:
        account(checkpoint, network_sizes(checkpoint))
    first, *rest = str(caught.value).splitlines()
    assert first.endswith("2 tensors missing, 1 unexpected, 1 wrongly shaped")
    assert set(rest) == {
        "missing proj_out.bias: expected (192,), found nothing",
        "missing blocks.1.action_expert.norm2.weight: expected (48,), found nothing",
        "unexpected lora.up: expected nothing, found (3,)",
        "wrong shape action_decoder.mid_proj.bias: expected (128,), found (5,)",
    }


def test_sizes_refuse_what_cannot_be():
    with pytest.raises(SpecError, match="one width"):
        replace(SIZES["gwp0-tiny"], action_dim=48)
    with pytest.raises(SpecError, match="n_layers"):
        replace(SIZES["gwp0-tiny"], n_layers=0)
    with pytest.raises(SpecError, match="freq_dim"):
        replace(SIZES["gwp0-tiny"], freq_dim=63)
