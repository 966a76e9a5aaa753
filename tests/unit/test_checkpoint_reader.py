import hashlib
import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch")

import torch
from safetensors.torch import load_file, save_file

from gwp_edge.errors import SpecError
from gwp_edge.export.checkpoint import open_checkpoint, open_module

pytestmark = pytest.mark.export

REFERENCE = Path(__file__).parents[1] / "data" / "reference"
WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def tensors():
    return load_file(REFERENCE / "gwp05" / "checkpoint" / WEIGHTS)


@pytest.fixture
def small(tensors):
    """Return a few tensors that pass for a network."""
    keep = ("patch_embedding", "blocks.0.visual_expert.attn1", "scale_shift_table")
    return {n: t.clone() for n, t in tensors.items() if n.startswith(keep)}


def assert_same(path, expected, **kwargs):
    with open_checkpoint(path, **kwargs) as checkpoint:
        assert set(checkpoint.names()) == set(expected)
        for name, tensor in expected.items():
            loaded = checkpoint.load(name)
            assert loaded.dtype == tensor.dtype
            assert torch.equal(loaded, tensor), name
            info = checkpoint.info(name)
            assert info.shape == tuple(tensor.shape)
            assert info.dtype == str(tensor.dtype).removeprefix("torch.")


def write_sharded(folder, tensors, suffix="safetensors"):
    folder.mkdir(parents=True, exist_ok=True)
    where = {}
    names = sorted(tensors)
    for i in range(3):
        file = f"diffusion_pytorch_model-{i + 1:05d}-of-00003.{suffix}"
        part = {n: tensors[n] for n in names[i::3]}
        save_file(part, folder / file) if suffix == "safetensors" else torch.save(
            part, folder / file
        )
        where |= dict.fromkeys(part, file)
    index = folder / f"diffusion_pytorch_model.{suffix}.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return index


@pytest.mark.parametrize("family", ["gwp05", "gwp0"])
def test_open_diffusers_folder_reads_every_tensor(family):
    folder = REFERENCE / family / "checkpoint"
    assert_same(folder, load_file(folder / WEIGHTS))
    assert_same(folder / WEIGHTS, load_file(folder / WEIGHTS))
    with open_checkpoint(folder) as checkpoint:
        assert checkpoint.config["num_layers"] == 2


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_open_sharded_folder_reads_every_tensor(tmp_path, tensors, suffix):
    index = write_sharded(tmp_path / "a", tensors, suffix)
    assert_same(tmp_path / "a", tensors)
    assert_same(index, tensors)


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".bin", ".ckpt"])
def test_open_torch_file_reads_every_tensor(tmp_path, small, suffix):
    path = tmp_path / f"model{suffix}"
    torch.save(small, path)
    assert_same(path, small)


def test_open_legacy_torch_file_reads_every_tensor(tmp_path, small, caplog):
    path = tmp_path / "old.pt"
    torch.save(small, path, _use_new_zipfile_serialization=False)
    assert_same(path, small)
    assert "cannot be mapped" in caplog.text


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_load_keeps_the_stored_element_type(tmp_path, small, dtype, suffix):
    cast = {n: t.to(dtype) for n, t in small.items()}
    path = tmp_path / f"model{suffix}"
    torch.save(cast, path) if suffix == ".pt" else save_file(cast, path)
    assert_same(path, cast)


def test_load_view_of_shared_storage_reads_its_own_values(tmp_path, small):
    base = torch.arange(96.0 * 192).reshape(96, 192)
    small["patch_embedding.extra"] = base.T[3:9]
    torch.save(small, tmp_path / "views.pt")
    with open_checkpoint(tmp_path / "views.pt") as checkpoint:
        for _ in range(2):  # the second time its pages come back from the file
            loaded = checkpoint.load("patch_embedding.extra")
            assert torch.equal(loaded, base.T[3:9])
            assert loaded.is_contiguous()


def test_loaded_tensor_is_writable_and_independent(tmp_path, small):
    torch.save(small, tmp_path / "a.pt")
    save_file(small, tmp_path / "b.safetensors")
    for path in (tmp_path / "a.pt", tmp_path / "b.safetensors"):
        with open_checkpoint(path) as checkpoint:
            first = checkpoint.load("patch_embedding.bias")
            first.fill_(7.0)
            second = checkpoint.load("patch_embedding.bias")
        assert torch.equal(second, small["patch_embedding.bias"])
        assert (first == 7.0).all()  # valid after close


@pytest.mark.parametrize(
    "wrap",
    [
        lambda t: {"model": t},
        lambda t: {"state_dict": t, "epoch": 3, "optimizer": {"state": {0: {"m": torch.ones(2)}}}},
        lambda t: {"module": {f"module._orig_mod.{n}": v for n, v in t.items()}},
        lambda t: {"model": {"state_dict": {f"transformer.{n}": v for n, v in t.items()}}},
        lambda t: {
            n.replace("blocks.0.", "blocks.0._checkpoint_wrapped_module."): v for n, v in t.items()
        },
        lambda t: {f"model.transformer.module.{n}": v for n, v in t.items()},
        lambda t: {**{f"transformer.{n}": v for n, v in t.items()}, "vae.x": torch.ones(1)},
        lambda t: {"n_averaged": torch.tensor(5), **{f"module.{n}": v for n, v in t.items()}},
    ],
)
def test_open_wrapped_names_strips_them(tmp_path, small, wrap):
    torch.save(wrap(small), tmp_path / "x.pt")
    assert_same(tmp_path / "x.pt", small)


def test_open_drops_other_tensors_with_a_reason(tmp_path, small):
    extra = {"optimizer": {"exp_avg": torch.ones(1)}, "model": small, "vae.w": torch.ones(1)}
    torch.save(extra, tmp_path / "x.pt")
    with open_checkpoint(tmp_path / "x.pt") as checkpoint:
        assert checkpoint.dropped == {
            "optimizer.exp_avg": "training state",
            "vae.w": "belongs to another module, vae",
        }


def test_open_with_ema_copy_takes_what_was_asked_for(tmp_path, small, caplog):
    ema = {n: t + 1 for n, t in small.items()}
    path = tmp_path / "x.pt"
    torch.save({"model": small, "ema": ema}, path)
    assert_same(path, small)
    assert not caplog.records
    assert_same(path, ema, use_ema=True)
    assert "EMA" in caplog.text
    with open_checkpoint(path, use_ema=True) as checkpoint:
        assert checkpoint.is_ema
        assert len(checkpoint.dropped) == len(small)


def test_open_only_ema_takes_it_and_says_so(tmp_path, small, caplog):
    torch.save({"ema_model": small}, tmp_path / "x.pt")
    assert_same(tmp_path / "x.pt", small)
    assert "EMA" in caplog.text


def test_open_without_ema_refuses_to_use_it(tmp_path, small):
    torch.save(small, tmp_path / "x.pt")
    with pytest.raises(SpecError, match="EMA"):
        open_checkpoint(tmp_path / "x.pt", use_ema=True)


def test_open_ema_folder_beside_the_plain_one(tmp_path, small):
    ema = {n: t + 1 for n, t in small.items()}
    for name, value in (("transformer", small), ("transformer_ema", ema)):
        (tmp_path / name).mkdir()
        save_file(value, tmp_path / name / WEIGHTS)
    assert_same(tmp_path, small)
    assert_same(tmp_path, ema, use_ema=True)


def test_open_same_name_twice_refuses(tmp_path, small):
    twice = {**small, "module.patch_embedding.bias": small["patch_embedding.bias"]}
    torch.save(twice, tmp_path / "x.pt")
    with pytest.raises(SpecError, match=r"twice.*module\.patch_embedding\.bias"):
        open_checkpoint(tmp_path / "x.pt")


def test_open_deepspeed_folder_follows_its_tag(tmp_path, small):
    tag = tmp_path / "run" / "pytorch_model"
    tag.mkdir(parents=True)
    (tmp_path / "run" / "latest").write_text("pytorch_model\n")
    state = {
        "module": {f"module.{n}": t for n, t in small.items()},
        "ds_config": {"zero_optimization": {"stage": 2}},
        "global_steps": 10,
    }
    file = tag / "mp_rank_00_model_states.pt"
    torch.save(state, file)
    for path in (tmp_path / "run", tag, file):
        assert_same(path, small)
    shutil.copytree(tag, tmp_path / "elsewhere")
    (tmp_path / "run" / "latest").write_text("../elsewhere")
    with pytest.raises(SpecError, match="expected the name of a folder beside it"):
        open_checkpoint(tmp_path / "run")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("zero_pp_rank_0_mp_rank_00_model_states.pt", "zero_to_fp32"),
        ("mp_rank_01_model_states.pt", "tensor-parallel"),
    ],
)
def test_open_split_deepspeed_folder_refuses(tmp_path, small, name, words):
    torch.save({"module": small}, tmp_path / "mp_rank_00_model_states.pt")
    torch.save({"module": small}, tmp_path / name)
    with pytest.raises(SpecError, match=words):
        open_checkpoint(tmp_path)


def test_open_training_folder_finds_the_child(tmp_path, small):
    child = tmp_path / "checkpoint_epoch_1_step_50" / "transformer"
    child.mkdir(parents=True)
    save_file(small, child / WEIGHTS)
    torch.save({"x": torch.ones(1)}, child.parent / "optimizer.bin")
    assert_same(tmp_path, small)
    (tmp_path / "checkpoint_epoch_2_step_100").mkdir()
    with pytest.raises(SpecError, match=r"2 candidates.*step_50"):
        open_checkpoint(tmp_path)


def test_open_two_children_refuses(tmp_path, small):
    for name in ("transformer", "checkpoint"):
        (tmp_path / name).mkdir()
        save_file(small, tmp_path / name / WEIGHTS)
    with pytest.raises(SpecError, match=r"2 candidates.*transformer, checkpoint"):
        open_checkpoint(tmp_path)


def test_open_two_weight_files_refuses(tmp_path, small):
    save_file(small, tmp_path / "a.safetensors")
    save_file(small, tmp_path / "b.safetensors")
    with pytest.raises(SpecError, match=r"a\.safetensors, b\.safetensors"):
        open_checkpoint(tmp_path)


class Malice:
    def __reduce__(self):
        return (print, ("this must not run",))


@pytest.mark.parametrize("zipped", [True, False])
def test_open_pickle_with_code_refuses_and_does_not_run_it(tmp_path, capsys, zipped):
    path = tmp_path / "x.pt"
    torch.save({"model": Malice()}, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(SpecError, match=r"object print.*safetensors"):
        open_checkpoint(path)
    path.write_bytes(pickle.dumps(Malice()))
    with pytest.raises(SpecError, match="safetensors"):
        open_checkpoint(path)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
@pytest.mark.parametrize("keep", [0, 5, 1000, -100])
def test_open_truncated_file_names_it(tmp_path, small, suffix, keep):
    path = tmp_path / f"cut{suffix}"
    torch.save(small, path) if suffix == ".pt" else save_file(small, path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(SpecError, match=f"cut{suffix}") as caught:
        open_checkpoint(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".bin"])
def test_open_garbage_names_it(tmp_path, suffix):
    path = tmp_path / f"noise{suffix}"
    path.write_bytes(hashlib.sha256(b"noise").digest() * 100)
    with pytest.raises(SpecError, match=f"noise{suffix}"):
        open_checkpoint(path)


def test_open_nothing_useful_says_what_was_expected(tmp_path):
    with pytest.raises(SpecError, match="no such file"):
        open_checkpoint(tmp_path / "absent.pt")
    with pytest.raises(SpecError, match="no weights found"):
        open_checkpoint(tmp_path)
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(SpecError, match=r"notes\.txt"):
        open_checkpoint(tmp_path)
    with pytest.raises(SpecError, match=r"expected \.safetensors"):
        open_checkpoint(tmp_path / "notes.txt")
    with pytest.raises(SpecError, match="not a GigaWorld-Policy network"):
        open_checkpoint(REFERENCE / "gwp05" / "base_model" / "vae")


def test_open_shards_that_do_not_fit_their_index_refuses(tmp_path, small):
    index = write_sharded(tmp_path, small)
    good = json.loads(index.read_text())
    shard = sorted(set(good["weight_map"].values()))[0]
    with pytest.raises(SpecError, match="one shard"):
        open_checkpoint(tmp_path / shard)

    def rewrite(change):
        bad = json.loads(json.dumps(good))
        change(bad["weight_map"])
        index.write_text(json.dumps(bad))

    rewrite(lambda m: m.update({"patch_embedding.bias": "../secret.safetensors"}))
    with pytest.raises(SpecError, match="not a file of its own folder"):
        open_checkpoint(tmp_path)
    rewrite(lambda m: m.update({"patch_embedding.bias": "/etc/passwd"}))
    with pytest.raises(SpecError, match="not a file of its own folder"):
        open_checkpoint(tmp_path)
    rewrite(lambda m: m.update({"ghost": shard}))
    with pytest.raises(SpecError, match=r"ghost.*no shard"):
        open_checkpoint(tmp_path)
    rewrite(lambda m: m.pop("patch_embedding.bias"))
    with pytest.raises(SpecError, match=r"patch_embedding\.bias"):
        open_checkpoint(tmp_path)
    index.write_text(json.dumps(good))
    (tmp_path / shard).unlink()
    with pytest.raises(SpecError, match=f"1 of 3 shards are missing: {shard}"):
        open_checkpoint(tmp_path)
    index.unlink()
    with pytest.raises(SpecError, match="without their"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[1]", '{"weight_map": 3}', '{"weight_map": {"a": 1}}'])
def test_open_bad_index_names_it(tmp_path, small, text):
    write_sharded(tmp_path, small).write_text(text)
    with pytest.raises(SpecError, match=r"index\.json"):
        open_checkpoint(tmp_path)


def test_open_bad_config_names_it(tmp_path, small):
    save_file(small, tmp_path / WEIGHTS)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(SpecError, match=r"config\.json"):
        open_checkpoint(tmp_path)


def test_load_of_short_reads_is_whole(tmp_path, small, monkeypatch):
    """Linux reads at most 2 GiB in one call."""
    save_file(small, tmp_path / WEIGHTS)
    preadv = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, views, at: preadv(fd, [views[0][:1000]], at))
    assert_same(tmp_path, small)


def test_load_of_a_file_that_shrank_names_it(tmp_path, small):
    save_file(small, tmp_path / WEIGHTS)
    with open_checkpoint(tmp_path) as checkpoint:
        os.truncate(tmp_path / WEIGHTS, 4000)
        with pytest.raises(SpecError, match="shrank while"):
            [checkpoint.load(n) for n in checkpoint.names()]


def test_load_finite_names_the_tensor(tmp_path, small):
    small["patch_embedding.bias"][3] = float("nan")
    save_file(small, tmp_path / WEIGHTS)
    with open_checkpoint(tmp_path) as checkpoint:
        checkpoint.load_finite("patch_embedding.weight")
        with pytest.raises(SpecError, match=r"patch_embedding\.bias has 1 of 96"):
            checkpoint.load_finite("patch_embedding.bias")
        with pytest.raises(SpecError, match="no tensor nobody"):
            checkpoint.load("nobody")


def test_source_hashes_cover_every_file(tmp_path, small):
    index = write_sharded(tmp_path, small)
    (tmp_path / "config.json").write_text("{}")
    seen = []
    with open_checkpoint(tmp_path) as checkpoint:
        hashes = checkpoint.source_hashes(seen.append)
    assert hashes == {
        p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in tmp_path.iterdir()
    }
    assert index.name in hashes
    assert sum(seen) == sum(p.stat().st_size for p in tmp_path.iterdir())


def test_open_module_reads_a_vae_as_it_stands(tmp_path):
    folder = REFERENCE / "gwp05" / "base_model" / "vae"
    with open_module(folder) as vae:
        assert vae.config["_class_name"] == "AutoencoderKLWan"
        expected = load_file(folder / WEIGHTS)
        assert set(vae.names()) == set(expected)
        assert torch.equal(vae.load("quant_conv.bias"), expected["quant_conv.bias"])
    shutil.copy(folder / WEIGHTS, tmp_path)
    with pytest.raises(SpecError, match=r"config\.json"):
        open_module(tmp_path)


RESIDENT = """
import sys, psutil
from pathlib import Path
import torch
from gwp_edge.export.checkpoint import open_checkpoint
with open_checkpoint(Path(sys.argv[1])) as checkpoint:
    checkpoint.load("patch_embedding.a0")
    rss = psutil.Process().memory_info
    before, peak = rss().rss, 0
    for name in checkpoint.names():
        checkpoint.load(name).sum()
        peak = max(peak, rss().rss)
print((peak - before) // 2**20)
"""


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_load_every_tensor_keeps_one_resident(tmp_path, suffix):
    """A handle that stays open keeps every page it touched: 320 MB here, 12 GB at full size."""
    big = {f"patch_embedding.a{i}": torch.full((16, 1024, 256), float(i)) for i in range(20)}
    big["blocks.0.x"] = torch.ones(1)
    path = tmp_path / f"big{suffix}"
    torch.save(big, path) if suffix == ".pt" else save_file(big, path)
    del big
    run = subprocess.run(
        [sys.executable, "-c", RESIDENT, str(path)], capture_output=True, text=True, check=True
    )
    assert int(run.stdout) < 128, f"{run.stdout} MiB more than after the first tensor"
