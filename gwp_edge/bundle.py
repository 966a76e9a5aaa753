"""The bundle: a folder that says everything the robot must know about a policy.

Nothing in it is used before it has been checked against the manifest, and nothing is ever
unpickled.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping
from pathlib import Path, PurePosixPath
from types import MappingProxyType
from typing import Any

import numpy.typing as npt

from gwp_edge.errors import SpecError
from gwp_edge.manifest import MANIFEST, Manifest, bundle_id, read_manifest, referenced_files
from gwp_edge.spec import PolicySpec

_READ_BYTES = 4 << 20


def hash_file(path: Path, progress: Callable[[int], None] | None = None) -> str:
    """Return the SHA-256 of a file, read in pieces."""
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        while data := file.read(_READ_BYTES):
            digest.update(data)
            if progress is not None:
                progress(len(data))
    return digest.hexdigest()


class Bundle:
    """A checked bundle on disk. Threads: any, it is read-only."""

    def __init__(self, root: Path, manifest: Manifest) -> None:
        self.root = root
        self.manifest = manifest

    @property
    def spec(self) -> PolicySpec:
        """The policy's specification."""
        return self.manifest.spec

    @property
    def n_bytes(self) -> int:
        """Size of all files."""
        return sum(entry.n_bytes for entry in self.manifest.files.values())

    def file(self, name: str) -> Path:
        """Return the path of a file that the manifest lists.

        Raises:
            SpecError: the manifest lists no such file.
        """
        if name not in self.manifest.files:
            raise SpecError(f"{self.root}: manifest lists no file {name}; export the policy again")
        return self.root / name

    def arrays(self, name: str) -> Mapping[str, npt.NDArray[Any]]:
        """Read a safetensors file of the bundle; bfloat16 arrays come as ml_dtypes."""
        from safetensors.numpy import load_file

        return MappingProxyType(load_file(self.file(name)))

    def weight(self, name: str) -> npt.NDArray[Any]:
        """Read one array of the weight file.

        Raises:
            SpecError: there is none of that name.
        """
        from safetensors import SafetensorError, safe_open

        path = self.file(self.manifest.weights)
        try:
            with safe_open(path, "numpy") as file:
                array: npt.NDArray[Any] = file.get_tensor(name)
        except SafetensorError as e:
            raise SpecError(f"{path}: {e}; export the policy again") from e
        return array

    @classmethod
    def open(
        cls, path: Path | str, *, progress: Callable[[str, int, int], None] | None = None
    ) -> Bundle:
        """Open a bundle and check every file against the manifest.

        Args:
            path: the bundle folder.
            progress: called with what is done, bytes done and bytes in all.

        Raises:
            SpecError: not a bundle, a newer layout, or a file missing, truncated, altered or
                outside the folder; says which.
        """
        root = Path(path)
        manifest = read_manifest(root)
        for name in referenced_files(manifest):
            if name not in manifest.files:
                raise SpecError(
                    f"{root}: manifest uses {name} but does not list it; export the policy again"
                )
        places = {name: _contained(root, name) for name in manifest.files}
        for name, entry in manifest.files.items():
            found = places[name].stat().st_size
            if found != entry.n_bytes:
                raise SpecError(
                    f"{root}: {name} has {found} bytes, expected {entry.n_bytes}; "
                    "copy or export the bundle again"
                )
        total, done = sum(entry.n_bytes for entry in manifest.files.values()), 0

        def advance(n_bytes: int) -> None:
            nonlocal done
            done += n_bytes
            if progress is not None:
                progress("check bundle", done, total)

        for name, entry in manifest.files.items():
            if hash_file(places[name], advance) != entry.sha256:
                raise SpecError(
                    f"{root}: {name} was altered (its SHA-256 differs from the manifest); "
                    "copy or export the bundle again"
                )
        expected = bundle_id(manifest.spec, manifest.files)
        if manifest.bundle_id != expected:
            raise SpecError(
                f"{root}: {MANIFEST} was altered (bundle_id does not match spec and files); "
                "copy or export the bundle again"
            )
        return cls(root, manifest)


def _contained(root: Path, name: str) -> Path:
    """Return the path of ``name``, which must be a plain file inside ``root``."""
    pure = PurePosixPath(name)
    if pure.is_absolute() or ".." in pure.parts or not pure.parts:
        raise SpecError(f"{root}: manifest names {name}, which is outside the bundle")
    path = root / name
    if not os.path.lexists(path):
        raise SpecError(f"{root}: {name} is missing; copy or export the bundle again")
    if path.resolve().parent != (root.resolve() / pure).parent or path.is_symlink():
        raise SpecError(f"{root}: {name} is a link that leaves the bundle")
    if not path.is_file():
        raise SpecError(f"{root}: {name} is not a file")
    return path
