"""Prompt embeddings: read from files, or made from text with the base model's umT5 encoder."""

from __future__ import annotations

import html
import importlib.util
import logging
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from gwp_edge.errors import SpecError
from gwp_edge.export._containers import open_source
from gwp_edge.types import Float32Array

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

N_PROMPT_ROWS = 64
_KEY = "t5_embedding"


def read_prompt_embedding(path: Path, *, text_dim: int) -> Float32Array:
    """Read one prompt's rows.

    Args:
        path: ``.pt`` (key ``t5_embedding``, or one tensor), ``.npy`` or ``.safetensors``.
        text_dim: width that the network takes.

    Returns:
        rows of the prompt, shape (n, text_dim), float32, 1 <= n <= 64.

    Raises:
        SpecError: unreadable, not floating point, another width, non-finite, all zero, or more
            than 64 rows that are not padding.
    """
    path = Path(path)
    rows = _read_npy(path) if path.suffix == ".npy" else _read_tensor(path)
    if rows.ndim == 3 and rows.shape[0] == 1:
        rows = rows[0]
    if rows.ndim != 2 or rows.shape[1] != text_dim or not len(rows):
        raise SpecError(
            f"{path}: expected a prompt of shape (rows, {text_dim}), got {rows.shape}; "
            "it must come from the text encoder that the policy was trained with"
        )
    if not np.isfinite(rows).all():
        raise SpecError(f"{path}: the prompt embedding has NaN or infinite values; make it again")
    if not rows.any():
        raise SpecError(f"{path}: the prompt embedding is all zero; make it again")
    if rows[N_PROMPT_ROWS:].any():
        n = int(np.flatnonzero(rows.any(axis=1))[-1]) + 1
        raise SpecError(
            f"{path}: the prompt has {n} rows, the network takes {N_PROMPT_ROWS}; shorten the text"
        )
    return np.ascontiguousarray(rows[:N_PROMPT_ROWS])


def pad_rows(embedding: Float32Array, n_rows: int = N_PROMPT_ROWS) -> Float32Array:
    """Return ``embedding`` with rows of zeros up to ``n_rows``.

    The padding takes part in attention as the network was trained with it.

    Raises:
        SpecError: there are more rows than ``n_rows``.
    """
    if len(embedding) > n_rows:
        raise SpecError(f"a prompt of {len(embedding)} rows does not fit {n_rows}")
    padded = np.zeros((n_rows, embedding.shape[1]), np.float32)
    padded[: len(embedding)] = embedding
    return padded


def task_name(*, text: str | None = None, path: Path | None = None) -> str:
    """Return the name of a prompt in the bundle: its text, or else its file's stem.

    Raises:
        SpecError: neither is given, or the text is blank.
    """
    name = clean_prompt(text) if text is not None else (Path(path).stem if path else "")
    if not name:
        raise SpecError("a prompt needs a text or a file")
    return name


def clean_prompt(text: str) -> str:
    """Clean a prompt as the training code does: mojibake, HTML entities, white space.

    ftfy repairs mojibake where it is installed. It leaves printable ASCII alone (entities are
    undone here in any case), so only other text is warned about when it is missing.
    """
    if importlib.util.find_spec("ftfy") is not None:
        import ftfy

        text = str(ftfy.fix_text(text))
    elif any(not (" " <= c <= "~" or c in "\t\n") for c in text):
        logger.warning(
            "the prompt has characters outside printable ASCII, which training cleaned with ftfy; "
            "install ftfy to be sure of the same embedding"
        )
    return re.sub(r"\s+", " ", html.unescape(html.unescape(text))).strip()


def encode_prompt(
    text: str, base_model: Path, *, dtype: Literal["float32", "bfloat16"] = "bfloat16"
) -> Float32Array:
    """Encode a prompt with the umT5 encoder and tokenizer of the base model.

    The encoder is freed before returning. umT5-xxl needs 11.4 GB in bfloat16 and twice that in
    float32; training used bfloat16.

    Args:
        text: the instruction.
        base_model: diffusers folder with ``text_encoder/`` and ``tokenizer/``.
        dtype: element type of the encoder's weights and arithmetic.

    Returns:
        rows of the tokens, then zeros, shape (64, text_dim), float32.

    Raises:
        SpecError: the text is blank or longer than 64 tokens, or a part of the base model is
            missing or unreadable.

    Source: huggingface/diffusers, pipelines/wan/pipeline_wan.py, v0.35.
    """
    import torch

    base_model = Path(base_model)
    prompt = clean_prompt(text)
    if not prompt:
        raise SpecError("the prompt is blank; say what the robot must do")
    ids, mask = _tokenize(prompt, base_model)
    encoder = _load_encoder(base_model, getattr(torch, dtype))
    with torch.inference_mode():
        hidden = encoder(input_ids=ids, attention_mask=mask).last_hidden_state
    rows = (hidden[0].float() * mask[0, :, None]).numpy()
    if not np.isfinite(rows).all():
        raise SpecError(
            f"{base_model}: the text encoder answers NaN or infinity; its weights are damaged"
        )
    return np.ascontiguousarray(rows, dtype=np.float32)


def _tokenize(prompt: str, base_model: Path) -> tuple[torch.Tensor, torch.Tensor]:
    from transformers import AutoTokenizer

    folder = _part(base_model, "tokenizer")
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError, ImportError) as e:
        raise SpecError(f"{folder}: not a readable tokenizer ({_line(e)})") from e
    n = len(tokenizer(prompt, add_special_tokens=True).input_ids)
    if n > N_PROMPT_ROWS:
        raise SpecError(
            f"the prompt has {n} tokens, the network takes {N_PROMPT_ROWS}; shorten the text"
        )
    tokens = tokenizer(
        [prompt],
        padding="max_length",
        max_length=N_PROMPT_ROWS,
        truncation=True,
        add_special_tokens=True,
        return_attention_mask=True,
        return_tensors="pt",
    )
    return tokens.input_ids, tokens.attention_mask


def _load_encoder(base_model: Path, dtype: torch.dtype) -> Any:  # noqa: ANN401 - untyped library
    from transformers import UMT5EncoderModel

    folder = _part(base_model, "text_encoder")
    loader: Any = UMT5EncoderModel  # its stubs do not know output_loading_info
    try:
        model, report = loader.from_pretrained(
            str(folder), local_files_only=True, dtype=dtype, output_loading_info=True
        )
    except (OSError, ValueError, KeyError, TypeError, RuntimeError) as e:
        raise SpecError(f"{folder}: not a readable umT5 encoder ({_line(e)})") from e
    # transformers fills what it does not find with random numbers.
    if report["missing_keys"] or report["mismatched_keys"]:
        lost = sorted(map(str, [*report["missing_keys"], *report["mismatched_keys"]]))
        raise SpecError(f"{folder}: {len(lost)} tensors are missing or misshapen, first {lost[0]}")
    return model.eval()


def _part(base_model: Path, name: str) -> Path:
    folder = base_model / name
    if not folder.is_dir():
        raise SpecError(
            f"{base_model}: no {name}/ in it, which --prompt needs; give the whole base model "
            "with --base-model, or an embedding with --prompt-embedding"
        )
    return folder


def _read_npy(path: Path) -> Float32Array:
    try:
        rows = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as e:
        raise SpecError(f"{path}: not a readable .npy ({_line(e)})") from e
    if not isinstance(rows, np.ndarray) or not np.issubdtype(rows.dtype, np.floating):
        kind = rows.dtype if isinstance(rows, np.ndarray) else type(rows).__name__
        raise SpecError(f"{path}: expected floating point rows, got {kind}")
    return rows.astype(np.float32)


def _read_tensor(path: Path) -> Float32Array:
    source = open_source(path)
    try:
        names = list(source.infos())
        wanted = [n for n in names if n.rpartition(".")[2] == _KEY] or names
        if len(wanted) != 1:
            raise SpecError(
                f"{path}: expected one tensor, or one named {_KEY}; "
                f"it holds {', '.join(names[:6]) or 'none'}"
            )
        tensor = source.load(wanted[0])
    finally:
        source.close()
    if not tensor.is_floating_point():
        raise SpecError(f"{path}: expected floating point rows, got {tensor.dtype}")
    return np.asarray(tensor.float().numpy(), dtype=np.float32)


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:160]
