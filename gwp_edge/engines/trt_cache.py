"""Where built engines live, and what they were built for. Needs no GPU and no TensorRT.

Beside the bundle, not in it: ``policy.gwp.engines/NAME/`` with three engines and ``build.json``.
An engine fits exactly one graph, one TensorRT, one GPU and one set of flags; anything else is
refused with what differs.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import msgspec

from gwp_edge.bundle import STAGES, Bundle, Stage, hash_file
from gwp_edge.engines.trt_timing import StageTiming
from gwp_edge.errors import BuildError, PerformanceIssue, SpecError

SCHEMA: Final = "gwp-edge.engines"
SCHEMA_VERSION: Final = 1
RECORD: Final = "build.json"
_UNFINISHED: Final = ".building-"
_DIGEST_CHARS: Final = 12


class EngineKey(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What an engine is good for.

    Attributes:
        graphs: SHA-256 of each stage's native graph.
        weights: SHA-256 of the weight file.
        precision: precision of the bundle.
        tensorrt: version that built it; engines are not portable between versions.
        compute_capability: of the GPU, such as ``8.7``.
        device: name of the GPU: same capability with other units needs other kernels.
        flags: builder options that change the engine.
    """

    graphs: dict[str, str]
    weights: str
    precision: str
    tensorrt: str
    compute_capability: str
    device: str
    flags: dict[str, str]

    def digest(self) -> str:
        """Return a short name for everything in the key."""
        content = json.dumps(msgspec.to_builtins(self), sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()[:_DIGEST_CHARS]

    def folder(self) -> str:
        """Return the folder name, readable first."""
        device = re.sub(r"[^a-z0-9]+", "-", self.device.lower()).strip("-")
        return f"{device}-sm{self.compute_capability.replace('.', '')}-{self.digest()}"

    def differences(self, other: EngineKey) -> tuple[str, ...]:
        """Say what of ``other`` (an engine) differs from this key (what is wanted)."""
        found = [
            f"{label} {theirs!r} instead of {ours!r}"
            for label, ours, theirs in (
                ("TensorRT", self.tensorrt, other.tensorrt),
                ("GPU", self.device, other.device),
                ("compute capability", self.compute_capability, other.compute_capability),
                ("precision", self.precision, other.precision),
            )
            if ours != theirs
        ]
        for stage, sha in self.graphs.items():
            if other.graphs.get(stage) != sha:
                found.append(f"another {stage} graph")
        if self.weights != other.weights:
            found.append("other weights")
        for flag in sorted({*self.flags, *other.flags}):
            ours, theirs = self.flags.get(flag, "unset"), other.flags.get(flag, "unset")
            if ours != theirs:
                found.append(f"flag {flag} {theirs} instead of {ours}")
        return tuple(found)


class EngineFile(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One engine on disk."""

    sha256: str
    n_bytes: int
    build_s: float


class EngineRecord(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The content of build.json.

    Attributes:
        schema: always ``gwp-edge.engines``.
        schema_version: of this layout.
        key: what the engines are for.
        bundle_id: of the bundle they were built from.
        created_at: UTC, ISO 8601.
        files: by stage.
        proof: lines of the precision report.
        golden_error: largest distance from the golden actions, rad and m.
        timing: measured stage times against the planner's.
    """

    schema: str
    schema_version: int
    key: EngineKey
    bundle_id: str
    created_at: str
    files: dict[Stage, EngineFile]
    proof: tuple[str, ...]
    golden_error: float | None
    timing: tuple[StageTiming, ...] = ()


def make_key(
    bundle: Bundle, *, tensorrt: str, compute_capability: str, device: str, flags: dict[str, str]
) -> EngineKey:
    """Return the key of a bundle's engines on a device."""
    manifest = bundle.manifest
    if "native" not in manifest.graphs:
        raise SpecError(f"{bundle.root}: has no native graphs; export the policy again")
    names = {stage: getattr(manifest.graphs["native"], stage) for stage in STAGES}
    return EngineKey(
        graphs={stage: manifest.files[name].sha256 for stage, name in names.items()},
        weights=manifest.files[manifest.weights].sha256,
        precision=manifest.precision.name,
        tensorrt=tensorrt,
        compute_capability=compute_capability,
        device=device,
        flags=flags,
    )


def engines_root(bundle_root: Path) -> Path:
    """Return the folder that holds a bundle's engines."""
    root = bundle_root.resolve()
    return root.with_name(root.name + ".engines")


def engine_file(folder: Path, stage: Stage) -> Path:
    """Return the path of one stage's engine."""
    return folder / f"{stage}.engine"


def timing_cache_file(bundle_root: Path, key: EngineKey) -> Path:
    """Return the timing cache: kernels timed once serve every later build on this device."""
    name = f"timing-trt{key.tensorrt}-sm{key.compute_capability.replace('.', '')}.cache"
    return engines_root(bundle_root) / name


def read_record(folder: Path) -> EngineRecord:
    """Read what a folder of engines says about itself.

    Raises:
        BuildError: it says nothing readable, or was written by another version.
    """
    path = folder / RECORD
    try:
        record = msgspec.json.decode(path.read_bytes(), type=EngineRecord)
    except OSError as e:
        raise BuildError(f"{path}: {e.strerror}; run: gwp-edge build --clean") from e
    except (msgspec.DecodeError, UnicodeDecodeError) as e:
        raise BuildError(f"{path}: {e}; run: gwp-edge build --clean") from e
    if record.schema != SCHEMA or record.schema_version != SCHEMA_VERSION:
        raise BuildError(
            f"{path}: layout {record.schema} {record.schema_version}, this gwp-edge reads "
            f"{SCHEMA} {SCHEMA_VERSION}; build again"
        )
    return record


def list_engines(bundle_root: Path) -> tuple[tuple[Path, EngineRecord | None], ...]:
    """Return every set of engines of a bundle; None where its record cannot be read."""
    root = engines_root(bundle_root)
    if not root.is_dir():
        return ()
    return tuple((x, _record_or_none(x)) for x in sorted(root.iterdir()) if x.is_dir())


def _record_or_none(folder: Path) -> EngineRecord | None:
    try:
        return read_record(folder)
    except BuildError:
        return None


def find_engines(bundle: Bundle, key: EngineKey) -> tuple[Path, EngineRecord]:
    """Return folder and record of engines that fit exactly, with their files checked.

    Raises:
        PerformanceIssue: none were built.
        BuildError: those that were built do not fit, or a file was altered; says what differs.
    """
    known = [(f, r) for f, r in list_engines(bundle.root) if r is not None]
    for folder, record in known:
        if record.key == key:
            _check_files(folder, record)
            return folder, record
    if not known:
        raise PerformanceIssue(
            f"{bundle.root}: no TensorRT engines were built; run: gwp-edge build {bundle.root}"
        )
    nearest = min((key.differences(record.key) for _, record in known), key=len)
    raise BuildError(
        f"{bundle.root}: the engines do not fit: {', '.join(nearest)}; "
        f"run: gwp-edge build {bundle.root}"
    )


def _check_files(folder: Path, record: EngineRecord) -> None:
    for stage in STAGES:
        path, entry = engine_file(folder, stage), record.files.get(stage)
        if entry is None or not path.is_file():
            raise BuildError(f"{path} is missing; build again")
        if path.stat().st_size != entry.n_bytes or hash_file(path) != entry.sha256:
            raise BuildError(f"{path} was altered since it was built; build again")


def clean(bundle_root: Path, keep: EngineKey | None = None) -> tuple[Path, ...]:
    """Remove sets of engines and unfinished builds, all but the set of ``keep``.

    Timing caches stay while a set is kept. Returns what was removed.
    """
    root = engines_root(bundle_root)
    removed: list[Path] = []
    for folder, record in list_engines(bundle_root):
        if keep is None or record is None or record.key != keep:
            shutil.rmtree(folder)
            removed.append(folder)
    if keep is None and root.is_dir():
        for path in sorted(root.glob("timing-*.cache")):
            path.unlink()
            removed.append(path)
        if not any(root.iterdir()):
            root.rmdir()
    return tuple(removed)


@contextmanager
def building(bundle_root: Path, key: EngineKey) -> Iterator[Path]:
    """Give a folder to build in; it appears under its name only when everything succeeded.

    Whatever ends the build early, Ctrl-C included, leaves nothing behind.

    Raises:
        BuildError: the place cannot be written.
    """
    root = engines_root(bundle_root)
    try:
        root.mkdir(exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=_UNFINISHED, dir=root))
    except OSError as e:
        raise BuildError(f"{root}: cannot be written: {e.strerror}") from e
    try:
        yield work
        final = root / key.folder()
        if final.exists():
            # The old set must be gone before the rename; a reader in between finds none.
            shutil.rmtree(final)
        work.chmod(0o755)
        os.replace(work, final)
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        if root.is_dir() and not any(root.iterdir()):
            root.rmdir()
        raise


def write_record(folder: Path, record: EngineRecord) -> None:
    """Write build.json into a folder under construction."""
    text = json.dumps(msgspec.to_builtins(record), indent=1)
    (folder / RECORD).write_text(text + "\n", encoding="utf-8")
