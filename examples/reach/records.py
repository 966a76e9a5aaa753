"""What the files of a training were made from, and how long that took.

A stage's file is used again only where its record says that it was made from the same; a rerun
with the same ``training.json`` proves itself.
"""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from gwp_edge.errors import SpecError
from gwp_edge.lerobot.dataset import LeRobotDataset

_PACKAGES = ("gwp-edge", "torch", "diffusers", "numpy", "mujoco")


def data_fingerprint(roots: Sequence[Path]) -> list[dict[str, Any]]:
    """Return what tells datasets apart: counts, and hashes of description and statistics.

    Raises:
        SpecError: a dataset is not there or damaged.
    """
    found = []
    for root in roots:
        with LeRobotDataset.open(root) as dataset:
            lengths = [dataset.episode(i).n_frames for i in range(dataset.n_episodes)]
        found.append(
            {
                "n_episodes": len(lengths),
                "n_frames": sum(lengths),
                "info_sha256": file_hash(root / "meta" / "info.json"),
                "stats_sha256": file_hash(root / "meta" / "stats.json"),
            }
        )
    return found


def file_hash(path: Path) -> str:
    """Return the SHA-256 of a file in hexadecimal digits."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def is_made_from(path: Path, source: Mapping[str, Any]) -> bool:
    """Return whether ``path`` is there and was made from ``source``; False where it is not there.

    Raises:
        SpecError: it is there and was made from something else, or nobody knows from what.
    """
    if not path.exists():
        return False
    record = _record_of(path)
    try:
        known = json.loads(record.read_text())
    except (OSError, ValueError) as e:
        raise SpecError(
            f"{path}: {record.name} beside it does not say what it was made from ({e}); remove "
            f"{path.name} to make it again, or choose another folder"
        ) from e
    check_same(path, known, source)
    return True


def check_same(path: Path, known: Mapping[str, Any], source: Mapping[str, Any]) -> None:
    """Check that what ``path`` was made from is what it would be made from now.

    Raises:
        SpecError: it is not.
    """
    wanted = json.loads(json.dumps(source))
    differ = [key for key in sorted({*known, *wanted}) if known.get(key) != wanted.get(key)]
    if differ:
        then, now = known.get(differ[0]), wanted.get(differ[0])
        values = "" if isinstance(then, (list, dict)) else f": {then} then, {now} now"
        raise SpecError(
            f"{path}: was made from something else ({', '.join(differ)} differ{values}); remove it "
            "to make it again, or choose another folder"
        )


def write_made(path: Path, source: Mapping[str, Any], write: Callable[[Path], object]) -> None:
    """Write ``path`` beside its place, whole or not at all, and what it was made from."""
    beside = path.with_name(path.name + ".part")
    write(beside)
    record = _record_of(path)
    record.write_text(json.dumps(source, indent=2) + "\n")
    beside.replace(path)


def _record_of(path: Path) -> Path:
    return path.with_name(f"{path.name}.made-from.json")


class TrainingLog:
    """``training.json``: command, data, versions, and the seconds of each stage. One owner.

    Args:
        path: of the file; stages of a run before are kept.
        command: options of this run.
    """

    def __init__(self, path: Path, command: Mapping[str, Any]) -> None:
        self._path = path
        try:
            stages = json.loads(path.read_text())["stages"]
        except FileNotFoundError:
            stages = {}
        except (ValueError, LookupError, TypeError) as e:
            raise SpecError(f"{path}: not what train.py wrote ({e}); remove it") from e
        self._document = {
            "command": dict(command),
            "versions": {"python": platform.python_version()} | {p: version(p) for p in _PACKAGES},
            "system": f"{platform.system()} {platform.machine()}",
            "n_threads": torch.get_num_threads(),
            "stages": stages,
        }

    def note(self, stage: str, *, seconds: float, **facts: object) -> None:
        """Write how long a stage took and what it did."""
        stages = self._document["stages"]
        stages[stage] = {"seconds": round(seconds, 1), **facts}
        self._document["seconds_in_all"] = round(sum(s["seconds"] for s in stages.values()), 1)
        beside = self._path.with_name(self._path.name + ".part")
        beside.write_text(json.dumps(self._document, indent=2) + "\n")
        beside.replace(self._path)
