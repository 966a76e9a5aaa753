import logging
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

import torch
from safetensors.torch import save_file

from gwp_edge.errors import SpecError
from gwp_edge.export import prompts
from gwp_edge.export.prompts import (
    clean_prompt,
    encode_prompt,
    pad_rows,
    read_prompt_embedding,
    task_name,
)

pytestmark = pytest.mark.export

EPISODE = Path(__file__).parents[1] / "data/reference/gwp05/t5_embedding/episode_000000.pt"


def write(path, rows):
    if path.suffix == ".npy":
        np.save(path, np.asarray(rows, np.float32))
    elif path.suffix == ".safetensors":
        save_file({"t5_embedding": torch.as_tensor(rows)}, path)
    else:
        torch.save({"t5_embedding": torch.as_tensor(rows)}, path)
    return path


def rows_of(n, width=64):
    return np.random.default_rng(n).normal(size=(n, width)).astype(np.float32)


def test_read_prompt_embedding_reference():
    expected = torch.load(EPISODE, weights_only=True)["t5_embedding"].numpy()
    got = read_prompt_embedding(EPISODE, text_dim=64)
    assert got.dtype == np.float32
    np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("suffix", [".pt", ".npy", ".safetensors"])
@pytest.mark.parametrize("n", [1, 64])
def test_read_prompt_embedding_any_container_same_rows(tmp_path, suffix, n):
    path = write(tmp_path / f"p{suffix}", rows_of(n))
    np.testing.assert_array_equal(read_prompt_embedding(path, text_dim=64), rows_of(n))
    batched = write(tmp_path / f"b{suffix}", rows_of(n)[None])
    np.testing.assert_array_equal(read_prompt_embedding(batched, text_dim=64), rows_of(n))


def test_read_prompt_embedding_bare_tensor_and_bfloat16(tmp_path):
    rows = torch.from_numpy(rows_of(5)).bfloat16()
    torch.save(rows, tmp_path / "bare.pt")
    got = read_prompt_embedding(tmp_path / "bare.pt", text_dim=64)
    np.testing.assert_array_equal(got, rows.float().numpy())


def test_read_prompt_embedding_zero_padding_beyond_64_is_cut(tmp_path):
    padded = np.zeros((512, 64), np.float32)
    padded[:20] = rows_of(20)
    got = read_prompt_embedding(write(tmp_path / "p.pt", padded), text_dim=64)
    np.testing.assert_array_equal(got, padded[:64])


@pytest.mark.parametrize("suffix", [".pt", ".npy", ".safetensors"])
@pytest.mark.parametrize(
    ("rows", "words"),
    [
        (rows_of(5, 32), r"expected a prompt of shape \(rows, 64\), got \(5, 32\)"),
        (np.zeros((0, 64), np.float32), r"got \(0, 64\)"),
        (np.zeros((3, 64), np.float32), "all zero"),
        (np.full((3, 64), np.nan, np.float32), "NaN"),
        (np.full((3, 64), np.inf, np.float32), "infinite"),
        (rows_of(65), "65 rows, the network takes 64"),
        (rows_of(6)[0], r"got \(64,\)"),
        (np.stack([rows_of(6), rows_of(6)]), r"got \(2, 6, 64\)"),
    ],
)
def test_read_prompt_embedding_that_does_not_fit_refuses(tmp_path, suffix, rows, words):
    path = write(tmp_path / f"p{suffix}", rows)
    with pytest.raises(SpecError, match=words):
        read_prompt_embedding(path, text_dim=64)


def test_read_prompt_embedding_integers_and_objects_refuse(tmp_path):
    np.save(tmp_path / "i.npy", np.ones((3, 64), np.int64))
    np.save(tmp_path / "o.npy", np.array([{}], dtype=object), allow_pickle=True)
    torch.save(torch.ones(3, 64, dtype=torch.int64), tmp_path / "i.pt")
    torch.save({"a": torch.ones(3, 64), "b": torch.ones(3, 64)}, tmp_path / "two.pt")
    for name, words in (
        ("i.npy", "int64"),
        ("o.npy", "readable"),
        ("i.pt", "int64"),
        ("two.pt", "holds a, b"),
        ("absent.npy", "absent"),
        ("absent.pt", "absent"),
    ):
        with pytest.raises(SpecError, match=words):
            read_prompt_embedding(tmp_path / name, text_dim=64)


def test_pad_rows_fills_with_zeros():
    padded = pad_rows(rows_of(5))
    assert padded.shape == (64, 64)
    np.testing.assert_array_equal(padded[:5], rows_of(5))
    assert not padded[5:].any()
    with pytest.raises(SpecError, match="65"):
        pad_rows(rows_of(65))


def test_task_name_is_the_text_or_the_stem():
    assert task_name(text=" fold  the\ntowel ") == "fold the towel"
    assert task_name(path=Path("a/b/pick.up.pt")) == "pick.up"
    assert task_name(text="x", path=Path("b.pt")) == "x"
    for bad in ({}, {"text": " "}):
        with pytest.raises(SpecError, match="text or a file"):
            task_name(**bad)


def test_clean_prompt_undoes_entities_and_white_space():
    assert clean_prompt(" pick&amp;amp; place\t the\n cup ") == "pick& place the cup"


def test_clean_prompt_warns_when_ftfy_is_missing_and_might_matter(monkeypatch, caplog):
    monkeypatch.setattr(prompts.importlib.util, "find_spec", lambda name: None)
    clean_prompt("pick up the cup\n")
    assert not caplog.records
    assert clean_prompt("le caf\u00e9") == "le caf\u00e9"
    assert "ftfy" in caplog.text


@pytest.fixture(scope="module")
def base_model(tmp_path_factory):
    """Return a base model folder with a random umT5 and a small unigram tokenizer."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

    folder = tmp_path_factory.mktemp("base_model")
    words = ["\u2581" + w for w in ("pick", "up", "the", "red", "cup", "fold", "towel")]
    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -20.0), *((w, -2.0) for w in words)]
    tokenizer = Tokenizer(models.Unigram(vocabulary, unk_id=2))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder / "tokenizer")
    torch.manual_seed(0)
    config = UMT5Config(
        vocab_size=16, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, dropout_rate=0.0
    )
    UMT5EncoderModel(config).eval().save_pretrained(folder / "text_encoder")
    return folder


def test_encode_prompt_equals_the_encoder_without_padding(base_model):
    from transformers import UMT5EncoderModel

    rows = encode_prompt("  pick up the\n red cup", base_model, dtype="float32")
    encoder = UMT5EncoderModel.from_pretrained(base_model / "text_encoder").eval()
    with torch.no_grad():
        # pick up the red cup </s>: no padding, so no mask is needed
        alone = encoder(torch.tensor([[3, 4, 5, 6, 7, 1]])).last_hidden_state[0].numpy()
    assert rows.shape == (64, 32)
    assert rows.dtype == np.float32
    assert not rows[6:].any()
    np.testing.assert_allclose(rows[:6], alone, atol=1e-5)
    assert np.abs(alone).max() > 0.1


def test_encode_prompt_differs_with_the_text_and_not_much_with_bfloat16(base_model):
    rows = encode_prompt("pick up the red cup", base_model, dtype="float32")
    other = encode_prompt("fold the towel", base_model, dtype="float32")
    half = encode_prompt("pick up the red cup", base_model)
    assert np.abs(rows - other).max() > 0.1
    assert 0 < np.abs(rows - half).max() < 0.1


def test_encode_prompt_bad_text_refuses(base_model):
    with pytest.raises(SpecError, match="blank"):
        encode_prompt(" \n", base_model)
    with pytest.raises(SpecError, match="71 tokens"):
        encode_prompt("cup " * 70, base_model)


def test_encode_prompt_incomplete_base_model_names_the_part(base_model, tmp_path):
    with pytest.raises(SpecError, match=r"no tokenizer/.*--prompt-embedding"):
        encode_prompt("cup", tmp_path)
    (tmp_path / "tokenizer").mkdir()
    with pytest.raises(SpecError, match="tokenizer"):
        encode_prompt("cup", tmp_path)
    (tmp_path / "tokenizer").rmdir()
    (tmp_path / "tokenizer").symlink_to(base_model / "tokenizer")
    with pytest.raises(SpecError, match="no text_encoder/"):
        encode_prompt("cup", tmp_path)


def test_encode_prompt_encoder_with_missing_tensors_refuses(base_model, tmp_path):
    """transformers fills them with random numbers, which would move the arm."""
    import shutil

    from safetensors.torch import load_file

    shutil.copytree(base_model, tmp_path / "b")
    path = tmp_path / "b" / "text_encoder" / "model.safetensors"
    weights = load_file(path)
    del weights["encoder.block.1.layer.0.SelfAttention.q.weight"]
    save_file(weights, path, metadata={"format": "pt"})
    logging.getLogger("transformers").setLevel(logging.CRITICAL)
    with pytest.raises(SpecError, match=r"block\.1\.layer\.0\.SelfAttention\.q"):
        encode_prompt("cup", tmp_path / "b")
