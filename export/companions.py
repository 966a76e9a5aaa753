"""Find what belongs to a checkpoint: statistics, VAE, prompts, a dataset.

What is passed is taken. What is not is looked for in the checkpoint's own folder, beside it and in
the folder above, and two different finds are an error: a policy with another run's statistics
moves the arm to wrong places.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from gwp_edge.errors import SpecError
from gwp_edge.export._locate import read_json
from gwp_edge.spec import Statistics

logger = logging.getLogger(__name__)

PROMPT_SUFFIXES = frozenset({".pt", ".npy", ".safetensors"})
_VAE_CLASS = "AutoencoderKLWan"
_STATE, _ACTION = "observation.state", "action"


@dataclass(frozen=True, slots=True, kw_only=True)
class Companions:
    """Where the parts beside a checkpoint are.

    Attributes:
        norm_stats: the statistics file.
        vae: the VAE's folder, with config.json and weights.
        base_model: the folder that may hold ``text_encoder`` and ``tokenizer``, or None.
        prompt_files: prompt embeddings, sorted by name; empty where the prompt is given as text.
        dataset: root of a LeRobot dataset, or None.
    """

    norm_stats: Path
    vae: Path
    base_model: Path | None
    prompt_files: tuple[Path, ...]
    dataset: Path | None


def find_companions(
    checkpoint: Path,
    *,
    norm_stats: Path | None = None,
    base_model: Path | None = None,
    prompt_embeddings: Sequence[Path] = (),
    has_prompt_text: bool = False,
    calibration: Path | None = None,
    need_dataset: bool = False,
) -> Companions:
    """Locate everything that an export needs.

    Args:
        checkpoint: file or folder of the checkpoint.
        norm_stats: what ``--norm-stats`` gave: a file, or a folder that holds norm_stats.json.
        base_model: what ``--base-model`` gave: a diffusers folder with ``vae/``, or a VAE folder.
        prompt_embeddings: what ``--prompt-embedding`` gave; found ones are then not used.
        has_prompt_text: ``--prompt`` was given, so embeddings are not needed.
        calibration: what ``--calibration`` gave: the root of a LeRobot dataset.
        need_dataset: without a dataset the export cannot go on.

    Raises:
        SpecError: a part is missing, names the flag that gives it; or two different ones were
            found.
    """
    roots = _search_roots(Path(checkpoint))
    vae, base = _find_vae(roots, base_model)
    return Companions(
        norm_stats=_find_statistics(roots, norm_stats),
        vae=vae,
        base_model=base,
        prompt_files=_find_prompts(roots, prompt_embeddings, has_prompt_text=has_prompt_text),
        dataset=find_dataset(checkpoint, given=calibration, needed=need_dataset),
    )


def find_dataset(
    checkpoint: Path, *, given: Path | None = None, needed: bool = False
) -> Path | None:
    """Return the root of a LeRobot dataset (it has meta/info.json), or None.

    Raises:
        SpecError: ``given`` is none; or ``needed`` and there is none, or more than one.
    """
    if given is not None:
        if not (Path(given) / "meta" / "info.json").is_file():
            raise SpecError(f"--calibration {given}: not a LeRobot dataset, no meta/info.json")
        return Path(given)
    found = []
    for root in _search_roots(Path(checkpoint)):
        candidates = [root, *(p for p in sorted(root.iterdir()) if p.is_dir())]
        found += [p for p in candidates if (p / "meta" / "info.json").is_file()]
    found = _distinct(found)
    if len(found) == 1:
        return found[0]
    if not needed:
        if found:
            logger.warning("several datasets beside %s; none is taken", checkpoint)
        return None
    if found:
        raise SpecError(f"two datasets, {found[0]} and {found[1]}: choose one with --calibration")
    raise SpecError(f"no LeRobot dataset beside {checkpoint}: give one with --calibration")


def read_statistics(path: Path, n_channels: int, *, embodiment: str | None = None) -> Statistics:
    """Read q01 and q99 of the first ``n_channels`` channels; rad and m.

    Args:
        path: norm_stats.json as upstream writes it.
        n_channels: number D of joints and grippers.
        embodiment: which group to take from a file that holds one group per embodiment.

    Raises:
        SpecError: the structure is another, a list is too short, a value is not a finite number,
            or a q99 is below its q01. Names the list and the channel.
    """
    groups = read_json(path).get("norm_stats")
    if not isinstance(groups, dict):
        raise SpecError(f"{path}: expected an object under norm_stats")
    group = _choose_group(groups, embodiment, path)
    values = {
        f"{short}_{q}": _channels(group, name, q, n_channels, path)
        for short, name in (("state", _STATE), ("action", _ACTION))
        for q in ("q01", "q99")
    }
    _warn_of_rest(group, n_channels, path)
    for short, name in (("state", _STATE), ("action", _ACTION)):
        pairs = list(zip(values[f"{short}_q01"], values[f"{short}_q99"], strict=True))
        still = [str(i) for i, (low, high) in enumerate(pairs) if low == high]
        if still:
            logger.warning(
                "%s: %s channels %s never moved in training (q01 equals q99); the policy cannot "
                "move them",
                path,
                name,
                ", ".join(still),
            )
    try:
        return Statistics(**values)
    except (ValueError, msgspec.ValidationError) as e:
        raise SpecError(f"{path}: {e}") from e


def _warn_of_rest(group: dict[str, Any], n_channels: int, path: Path) -> None:
    """Say so where actions beyond the layout's channels moved: padding never does."""
    low, high = (group[_ACTION][q][n_channels:] for q in ("q01", "q99"))
    for i, (a, b) in enumerate(zip(low, high, strict=False)):
        if isinstance(a, float) and isinstance(b, float) and a < b:
            logger.warning(
                "%s: %s channel %d moved in training, but the layout has %d channels: is it that "
                "of the robot it was trained on? See --layout",
                path,
                _ACTION,
                n_channels + i,
                n_channels,
            )
            return


def _choose_group(groups: dict[str, Any], embodiment: str | None, path: Path) -> dict[str, Any]:
    named = {k: v for k, v in groups.items() if isinstance(v, dict) and _STATE in v}
    if embodiment is not None:
        if embodiment not in named:
            have = ", ".join(named) or "one unnamed group"
            raise SpecError(f"{path}: no statistics of embodiment {embodiment!r}; it has {have}")
        return dict(named[embodiment])
    if _STATE in groups:
        return groups
    if len(named) == 1:
        return dict(next(iter(named.values())))
    if named:
        raise SpecError(f"{path}: several embodiments, {', '.join(named)}; name one")
    have = ", ".join(map(str, list(groups)[:6])) or "nothing"
    raise SpecError(f"{path}: no {_STATE} under norm_stats; it has {have}")


def _channels(
    group: dict[str, Any], name: str, quantile: str, n_channels: int, path: Path
) -> tuple[float, ...]:
    entry = group.get(name)
    values = entry.get(quantile) if isinstance(entry, dict) else None
    where = f"{path}: {name}.{quantile}"
    if not isinstance(values, list):
        raise SpecError(f"{where}: expected a list of numbers, got {type(values).__name__}")
    if len(values) < n_channels:
        raise SpecError(
            f"{where}: the layout has {n_channels} channels, got {len(values)} values; give the "
            "layout of this robot with --layout"
        )
    for i, value in enumerate(values[:n_channels]):
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise SpecError(f"{where}: channel {i} is {value!r}, not a number")
        if not math.isfinite(value):
            raise SpecError(f"{where}: channel {i} is {value}, not finite")
    return tuple(float(v) for v in values[:n_channels])


def _search_roots(checkpoint: Path) -> list[Path]:
    """Return the checkpoint's own folder, the one that it is in, and the one above."""
    if not checkpoint.exists():
        raise SpecError(f"{checkpoint}: no such file or folder")
    own = checkpoint.resolve()
    own = own if own.is_dir() else own.parent
    roots = [own, own.parent, own.parent.parent]
    if own != checkpoint.resolve():
        roots = roots[:2]
    return _distinct(roots)


def _find_statistics(roots: list[Path], given: Path | None) -> Path:
    if given is not None:
        path = Path(given)
        path = path / "norm_stats.json" if path.is_dir() else path
        if not path.is_file():
            raise SpecError(f"--norm-stats {given}: no such file")
        return path
    found = [p for r in roots if (p := r / "norm_stats.json").is_file()]
    for other in found[1:]:
        if other.read_bytes() != found[0].read_bytes():
            raise SpecError(
                f"two different statistics, {found[0]} and {other}: choose one with --norm-stats"
            )
    if not found:
        raise SpecError(f"no norm_stats.json in {_listed(roots)}: give it with --norm-stats FILE")
    return found[0]


def _find_vae(roots: list[Path], given: Path | None) -> tuple[Path, Path | None]:
    if given is not None:
        base = Path(given)
        if (base / "vae" / "config.json").is_file():
            _check_vae(base / "vae")
            return base / "vae", base
        if (base / "config.json").is_file():
            _check_vae(base)
            return base, base.parent if base.name == "vae" else None
        raise SpecError(
            f"--base-model {given}: expected a diffusers folder with vae/config.json in it"
        )
    found = _distinct(
        [
            p
            for r in roots
            for p in (r / "base_model" / "vae", r / "vae")
            if (p / "config.json").is_file()
        ]
    )
    if len(found) > 1:
        raise SpecError(f"two VAEs, {found[0]} and {found[1]}: choose one with --base-model")
    if not found:
        raise SpecError(
            f"no base_model/vae or vae in {_listed(roots)}: give the base model's folder "
            "(Wan2.2-TI2V-5B in diffusers layout) with --base-model DIR"
        )
    _check_vae(found[0])
    return found[0], found[0].parent


def _check_vae(folder: Path) -> None:
    name = read_json(folder / "config.json").get("_class_name")
    if name != _VAE_CLASS:
        raise SpecError(f"{folder}: expected the config of an {_VAE_CLASS}, got {name}")


def _find_prompts(
    roots: list[Path], given: Sequence[Path], *, has_prompt_text: bool
) -> tuple[Path, ...]:
    for path in given:
        if not Path(path).is_file():
            raise SpecError(f"--prompt-embedding {path}: no such file")
    if given or has_prompt_text:
        return tuple(Path(p) for p in given)
    folders = _distinct([p for r in roots if (p := r / "t5_embedding").is_dir()])
    if len(folders) > 1:
        raise SpecError(
            f"two prompt folders, {folders[0]} and {folders[1]}: "
            "choose prompts with --prompt-embedding FILE"
        )
    files = (
        [p for p in sorted(folders[0].iterdir()) if p.is_file() and p.suffix in PROMPT_SUFFIXES]
        if folders
        else []
    )
    if not files:
        raise SpecError(
            f"no t5_embedding/ with .pt, .npy or .safetensors in {_listed(roots)}: "
            "give a prompt with --prompt TEXT or --prompt-embedding FILE"
        )
    return tuple(files)


def _distinct(paths: list[Path]) -> list[Path]:
    return list({p.resolve(): p for p in reversed(paths)}.values())[::-1]


def _listed(roots: list[Path]) -> str:
    return ", ".join(map(str, roots))
