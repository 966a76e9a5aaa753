"""Find the weight files of a checkpoint in what the user named."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from gwp_edge.errors import SpecError

_SHARD = re.compile(r"-\d{5}-of-\d{5}\.(safetensors|bin)$")
_EMA_PART = re.compile(r"(^|[^a-z])ema([^a-z]|$)")
_DEEPSPEED = "mp_rank_00_model_states.pt"
# Files of trainers that carry a weight suffix but no network.
_NOT_WEIGHTS = re.compile(
    r"^(optimizer|scheduler|training_args|random_states|rng_state|scaler|custom_checkpoint|"
    r"norm_stats|episode_|zero_pp_rank|bf16_zero|.*_optim_states)"
)
_CHILDREN = ("transformer", "checkpoint", "model", "pytorch_model")
_EMA_CHILDREN = ("transformer_ema", "ema", "ema_model", "model_ema")
_STEPS = re.compile(r"^(checkpoint[-_]|step_|global_step|epoch)")
_MAX_DEPTH = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Located:
    """The files of a checkpoint.

    Attributes:
        files: weight files.
        shard_of: file name by tensor name as the index has it, or None without an index.
        index: the index file, if any.
        folder: where config.json is looked for.
    """

    files: tuple[Path, ...]
    shard_of: dict[str, str] | None = None
    index: Path | None = None
    folder: Path


def locate(path: Path, *, use_ema: bool = False) -> Located:
    """Resolve a file or folder to the weight files of one network.

    Raises:
        SpecError: nothing there, several candidates, missing shards, or a layout that cannot be
            read (a ZeRO-3 or tensor-parallel training folder).
    """
    if path.is_dir():
        found = _in_folder(path, use_ema=use_ema, depth=0)
        if found is None:
            listing = ", ".join(sorted(p.name for p in path.iterdir())[:8]) or "nothing"
            raise SpecError(
                f"{path}: no weights found; expected a diffusers folder, .safetensors, .pt or a "
                f"DeepSpeed {_DEEPSPEED}; it holds {listing}"
            )
        return found
    if not path.exists():
        raise SpecError(f"{path}: no such file or folder")
    if path.name.endswith(".index.json"):
        return _from_index(path)
    if _SHARD.search(path.name):
        raise SpecError(f"{path}: one shard of several; pass its folder or its .index.json")
    if path.name == _DEEPSPEED:
        return _deepspeed(path.parent)
    return Located(files=(path,), folder=path.parent)


def is_named_ema(path: Path, located: Located) -> bool:
    """Tell whether the file, or a folder on the way from ``path`` to it, is called an EMA copy."""
    file = located.files[0]
    inside = file.relative_to(path).parts if path.is_dir() else (file.name,)
    return any(_EMA_PART.search(part.lower()) for part in (path.name, *inside))


def _in_folder(folder: Path, *, use_ema: bool, depth: int) -> Located | None:
    if any(folder.glob("*mp_rank_*_model_states.pt")):
        return _deepspeed(folder)
    if (folder / "latest").is_file():
        return _deepspeed(_tagged(folder))
    found = _weights_in(folder, use_ema=use_ema)
    if found is not None or depth >= _MAX_DEPTH:
        return found
    names = (*_EMA_CHILDREN, *_CHILDREN) if use_ema else _CHILDREN
    children = [folder / n for n in names if (folder / n).is_dir()]
    hits = [
        hit
        for c in children
        if (hit := _in_folder(c, use_ema=use_ema, depth=depth + 1)) is not None
    ]
    if use_ema and len(hits) > 1 and children[0].name in _EMA_CHILDREN:
        return hits[0]
    if len(hits) > 1:
        _refuse_several(folder, [h.folder for h in hits])
    if hits:
        return hits[0]
    steps = [p for p in sorted(folder.iterdir()) if p.is_dir() and _STEPS.match(p.name)]
    if len(steps) > 1:
        _refuse_several(folder, steps)
    return _in_folder(steps[0], use_ema=use_ema, depth=depth + 1) if steps else None


def _weights_in(folder: Path, *, use_ema: bool) -> Located | None:
    for suffixes in ((".safetensors",), (".bin",), (".pt", ".pth", ".ckpt")):
        candidates = [
            p
            for p in sorted(folder.iterdir())
            if p.is_file()
            and not _NOT_WEIGHTS.match(p.name)
            and (
                (p.suffix in suffixes and not _SHARD.search(p.name))
                or any(p.name.endswith(f"{s}.index.json") for s in suffixes)
            )
        ]
        matching = [p for p in candidates if bool(_EMA_PART.search(p.name.lower())) == use_ema]
        candidates = matching or candidates
        if len(candidates) > 1:
            _refuse_several(folder, candidates)
        if candidates:
            only = candidates[0]
            if only.name.endswith(".index.json"):
                return _from_index(only)
            return Located(files=(only,), folder=folder)
        if any(_SHARD.search(p.name) and p.suffix in suffixes for p in folder.iterdir()):
            raise SpecError(f"{folder}: shards without their .index.json; copy it too")
    return None


def _refuse_several(folder: Path, candidates: list[Path]) -> None:
    names = ", ".join(str(p.relative_to(folder)) for p in candidates[:6])
    raise SpecError(f"{folder}: {len(candidates)} candidates, pass one of them: {names}")


def _tagged(folder: Path) -> Path:
    try:
        tag = (folder / "latest").read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as e:
        raise SpecError(f"{folder / 'latest'}: not a DeepSpeed tag file") from e
    if not tag or len(PurePosixPath(tag).parts) != 1 or tag in {".", ".."}:
        raise SpecError(f"{folder / 'latest'}: expected the name of a folder beside it")
    if not (folder / tag).is_dir():
        raise SpecError(f"{folder / 'latest'} names {tag}, which is not a folder here")
    return folder / tag


def _deepspeed(folder: Path) -> Located:
    file = folder / _DEEPSPEED
    if any(folder.glob("zero_pp_rank_*_model_states.pt")):
        raise SpecError(
            f"{folder}: a ZeRO-3 checkpoint, its weights are split over ranks; "
            "merge them with DeepSpeed's zero_to_fp32.py first"
        )
    ranks = sorted(folder.glob("mp_rank_*_model_states.pt"))
    if len(ranks) > 1:
        raise SpecError(
            f"{folder}: {len(ranks)} tensor-parallel parts; merge them into one state dict first"
        )
    if not file.is_file():
        raise SpecError(f"{folder}: no {_DEEPSPEED} in it")
    return Located(files=(file,), folder=folder)


def _from_index(index: Path) -> Located:
    shard_of = read_json(index).get("weight_map")
    if (
        not isinstance(shard_of, dict)
        or not shard_of
        or not all(isinstance(v, str) for v in shard_of.values())
    ):
        raise SpecError(f"{index}: expected a non-empty weight_map of tensor name to file name")
    names = sorted(set(shard_of.values()))
    for name in names:
        # Lexical on purpose: a hub cache holds links that point out of the folder.
        if len(PurePosixPath(name).parts) != 1 or name in {"", ".", ".."} or "\\" in name:
            raise SpecError(f"{index}: names {name!r}, which is not a file of its own folder")
    missing = [name for name in names if not (index.parent / name).is_file()]
    if missing:
        raise SpecError(
            f"{index}: {len(missing)} of {len(names)} shards are missing: {', '.join(missing[:6])}"
        )
    return Located(
        files=tuple(index.parent / name for name in names),
        shard_of=shard_of,
        index=index,
        folder=index.parent,
    )


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        SpecError: the file is missing, not UTF-8, not JSON, or not an object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as e:
        raise SpecError(f"{path}: not readable JSON ({' '.join(str(e).split())[:120]})") from e
    if not isinstance(value, dict):
        raise SpecError(f"{path}: expected a JSON object, got {type(value).__name__}")
    return value
