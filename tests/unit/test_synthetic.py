import json
import os
from dataclasses import replace

import pytest

pytest.importorskip("torch")
pytest.importorskip("diffusers")

import torch

from gwp_edge.errors import SpecError
from gwp_edge.export import synthetic
from gwp_edge.export.checkpoint import account, network_sizes, open_checkpoint, open_module
from gwp_edge.export.companions import find_companions, read_statistics
from gwp_edge.export.prompts import read_prompt_embedding
from gwp_edge.export.synthetic import SIZES, checkpoint_bytes, write_checkpoint

pytestmark = pytest.mark.export


@pytest.mark.parametrize("preset", ["gwp05-tiny", "gwp0-tiny"])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_write_checkpoint_is_read_back_whole(tmp_path, preset, dtype):
    sizes = replace(SIZES[preset], n_layers=3)
    path = write_checkpoint(tmp_path / "c", sizes, dtype=dtype)
    with open_checkpoint(path) as checkpoint:
        assert network_sizes(checkpoint) == sizes
        account(checkpoint, sizes)
        for name in checkpoint.names():
            assert checkpoint.info(name).dtype == dtype
            tensor = checkpoint.load_finite(name)
            assert tensor.float().std() > 0.01, f"{name} would not be missed"
    found = find_companions(path)
    read_statistics(found.norm_stats, 14)
    read_prompt_embedding(found.prompt_files[0], text_dim=sizes.text_dim)


def test_write_checkpoint_vae_is_loaded_by_diffusers(tmp_path):
    from diffusers import AutoencoderKLWan

    path = write_checkpoint(tmp_path / "c", SIZES["gwp05-tiny"])
    folder = find_companions(path).vae
    model, report = AutoencoderKLWan.from_pretrained(folder, output_loading_info=True)
    assert not any(report[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    with open_module(folder) as vae:
        assert torch.equal(vae.load("quant_conv.weight"), model.quant_conv.weight)
    with torch.inference_mode():
        latent = model.encode(torch.zeros(1, 3, 1, 64, 64)).latent_dist.mode()
    assert 0.05 < latent.std() < 20


def test_full_vae_has_the_size_of_the_released_one():
    tiny = SIZES["gwp05-tiny"]
    n_bytes = checkpoint_bytes(tiny, dtype="float32", vae="full")
    n_bytes -= checkpoint_bytes(tiny, dtype="float32", vae=None)
    assert n_bytes / 4e6 == pytest.approx(704.7, abs=0.1)


def test_write_checkpoint_sharded_holds_the_same_values(tmp_path):
    whole = write_checkpoint(tmp_path / "a", SIZES["gwp05-tiny"], dtype="float32", vae=None)
    parts = write_checkpoint(
        tmp_path / "b", SIZES["gwp05-tiny"], dtype="float32", vae=None, shard_bytes=300_000
    )
    assert len(list(parts.glob("*.safetensors"))) > 5
    assert max(p.stat().st_size for p in parts.glob("*.safetensors")) < 310_000
    with open_checkpoint(whole) as a, open_checkpoint(parts) as b:
        assert a.names() == b.names()
        assert all(torch.equal(a.load(n), b.load(n)) for n in a.names())


def test_write_checkpoint_depends_on_the_seed(tmp_path):
    paths = [
        write_checkpoint(tmp_path / str(i), SIZES["gwp0-tiny"], seed=i, vae=None) for i in (1, 2)
    ]
    with open_checkpoint(paths[0]) as a, open_checkpoint(paths[1]) as b:
        assert not any(torch.equal(a.load(n), b.load(n)) for n in a.names())
    stats = [json.loads((p.parent / "norm_stats.json").read_text()) for p in paths]
    assert stats[0] != stats[1]


def test_write_checkpoint_progress_sums_up(tmp_path):
    seen = []
    write_checkpoint(tmp_path / "c", SIZES["gwp0-tiny"], dtype="float16", progress=seen.append)
    assert sum(seen) == checkpoint_bytes(SIZES["gwp0-tiny"], dtype="float16", vae="small")
    assert len(seen) > 100


def test_write_checkpoint_interrupted_leaves_nothing(tmp_path):
    def interrupt(n_bytes):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_checkpoint(tmp_path / "c", SIZES["gwp0-tiny"], progress=interrupt)
    assert os.listdir(tmp_path) == []


def test_write_checkpoint_bad_target_refuses(tmp_path, monkeypatch):
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "mine.txt").write_text("keep")
    with pytest.raises(SpecError, match="not an empty folder"):
        write_checkpoint(tmp_path / "c", SIZES["gwp0-tiny"])
    with pytest.raises(SpecError, match="int8"):
        write_checkpoint(tmp_path / "d", SIZES["gwp0-tiny"], dtype="int8")
    monkeypatch.setattr(
        synthetic.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1000})
    )
    with pytest.raises(SpecError, match=r"the disk has 0\.0 GB"):
        write_checkpoint(tmp_path / "d", SIZES["gwp0-tiny"])
    assert [p.name for p in tmp_path.iterdir()] == ["c"]
