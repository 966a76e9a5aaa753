"""Where built engines live. Needs no GPU and no TensorRT.

Beside the bundle, not in it: ``policy.gwp.engines/NAME/`` with three engines and ``build.json``.
Engines that do not fit are refused with what differs.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

import msgspec

from gwp_edge.bundle import Bundle, hash_file
from gwp_edge.engines.trt_proof import Proof
from gwp_edge.engines.trt_record import EngineKey, EngineRecord, read_record
from gwp_edge.errors import BuildError, PerformanceIssue
from gwp_edge.manifest import STAGES, Stage

_UNFINISHED: Final = ".building-"


def engines_root(bundle_root: Path) -> Path:
    """Return the folder that holds a bundle's engines."""
    root = bundle_root.resolve()
    return root.with_name(root.name + ".engines")


def engine_file(folder: Path, stage: Stage) -> Path:
    """Return the path of one stage's engine."""
    return folder / f"{stage}.engine"


def timing_cache_file(bundle_root: Path, key: EngineKey) -> Path:
    """Return the timing cache: kernels timed once serve every later build on this device."""
    gpu = f"sm{key.compute_capability.replace('.', '')}x{key.n_multiprocessors}"
    return engines_root(bundle_root) / f"timing-trt{key.tensorrt}-{gpu}.cache"


def failure_file(bundle_root: Path, key: EngineKey) -> Path:
    """Return where the last failed build of a key says what was found."""
    return engines_root(bundle_root) / f"failed-{key.folder()}.json"


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


def find_engines(
    bundle: Bundle, key: EngineKey, *, any_flags: bool = False
) -> tuple[Path, EngineRecord]:
    """Return folder and record of engines that fit exactly, with their files checked.

    Args:
        bundle: whose engines.
        key: what is wanted.
        any_flags: take engines of any builder flags, the newest of those that fit.

    Raises:
        PerformanceIssue: none were built.
        BuildError: those that were built do not fit, or a file was altered; says what differs.
    """
    listed = [x for x in list_engines(bundle.root) if not x[0].name.startswith(_UNFINISHED)]
    known = [(f, r) for f, r in listed if r is not None]
    fitting = [
        (folder, record)
        for folder, record in known
        if _wanted(key, record.key, any_flags=any_flags) == record.key
    ]
    if fitting:
        folder, record = max(fitting, key=lambda found: found[1].created_at)
        _check_files(folder, record)
        return folder, record
    if not known and listed:
        raise BuildError(
            f"{bundle.root}: the engines beside it were built by another gwp-edge; "
            f"run: gwp-edge build {bundle.root}"
        )
    if not known:
        raise PerformanceIssue(
            f"{bundle.root}: no TensorRT engines were built; run: gwp-edge build {bundle.root}"
        )
    nearest = min(
        (
            _wanted(key, record.key, any_flags=any_flags).differences(record.key)
            for _, record in known
        ),
        key=len,
    )
    raise BuildError(
        f"{bundle.root}: the engines do not fit: {', '.join(nearest)}; "
        f"run: gwp-edge build {bundle.root}"
    )


def _wanted(key: EngineKey, found: EngineKey, *, any_flags: bool) -> EngineKey:
    return msgspec.structs.replace(key, flags=found.flags) if any_flags else key


def _check_files(folder: Path, record: EngineRecord) -> None:
    for stage in STAGES:
        path, entry = engine_file(folder, stage), record.files.get(stage)
        if entry is None or not path.is_file():
            raise BuildError(f"{path} is missing; build again")
        if path.stat().st_size != entry.n_bytes or hash_file(path) != entry.sha256:
            raise BuildError(f"{path} was altered since it was built; build again")


def clean(bundle_root: Path, keep: EngineKey | None = None) -> tuple[Path, ...]:
    """Remove sets of engines and unfinished builds, all but the set of ``keep``.

    Timing caches and reports of failures stay while a set is kept; a build that is running stays
    in any case. Returns what was removed.
    """
    root = engines_root(bundle_root)
    removed: list[Path] = []
    for folder, record in list_engines(bundle_root):
        if folder.name.startswith(_UNFINISHED):
            gone = _sweep(folder)
        else:
            gone = keep is None or record is None or record.key != keep
            if gone:
                shutil.rmtree(folder)
        removed += [folder] if gone else []
    if keep is None and root.is_dir():
        for path in sorted((*root.glob("timing-*.cache"), *root.glob("failed-*.json"))):
            path.unlink()
            removed.append(path)
        if not any(root.iterdir()):
            root.rmdir()
    return tuple(removed)


def _sweep(folder: Path) -> bool:
    """Remove an unfinished build unless it is running; return whether it was removed."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except FileNotFoundError:
        return False
    try:
        # A killed process no longer holds its lock, whatever has its number now.
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    else:
        shutil.rmtree(folder, ignore_errors=True)
        return True
    finally:
        os.close(descriptor)


@contextmanager
def building(bundle_root: Path, key: EngineKey) -> Iterator[Path]:
    """Give a folder to build in; it appears under its name only when everything succeeded.

    Whatever ends the build early, Ctrl-C included, leaves nothing behind; what a kill that cannot
    be caught left is removed by the next build.

    Raises:
        BuildError: the place cannot be written.
    """
    root = engines_root(bundle_root)
    with _work_folder(root) as work:
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
            # Another build may be at work there, or a report may stand there.
            with suppress(OSError):
                root.rmdir()
            raise


@contextmanager
def _work_folder(root: Path) -> Iterator[Path]:
    """Make a folder that is locked while it is built in, and sweep what others left."""
    try:
        root.mkdir(exist_ok=True)
        for left in root.glob(_UNFINISHED + "*"):
            _sweep(left)
        work = Path(tempfile.mkdtemp(prefix=_UNFINISHED, dir=root))
        descriptor = os.open(work, os.O_RDONLY)
    except OSError as e:
        raise BuildError(f"{root}: cannot be written: {e.strerror}") from e
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield work
    finally:
        os.close(descriptor)


def write_failure(
    bundle_root: Path, key: EngineKey, problem: str, summary: Sequence[str], proofs: Sequence[Proof]
) -> Path:
    """Write what a failed build had found out; return the file."""
    path = failure_file(bundle_root, key)
    report = {
        "problem": problem,
        "key": msgspec.to_builtins(key),
        "proof": list(summary),
        "not_as_asked": msgspec.to_builtins([x for x in proofs if x.outcome != "as asked"]),
    }
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return path
