"""Write a bundle: everything into a folder beside the target, then one rename."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

from gwp_edge.errors import SpecError
from gwp_edge.manifest import MANIFEST

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2


def check_target(out: Path) -> None:
    """Refuse a target that must not be replaced.

    Raises:
        SpecError: ``out`` exists and is not a bundle, or its folder cannot be written.
    """
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        raise SpecError(f"--out {out}: is not a folder; choose another name")
    if out.exists() and any(out.iterdir()) and not (out / MANIFEST).is_file():
        raise SpecError(f"--out {out}: is a folder that is not a bundle; choose another name")
    parent = out.resolve().parent
    if not parent.is_dir():
        raise SpecError(f"--out {out}: folder {parent} does not exist")
    if not os.access(parent, os.W_OK):
        raise SpecError(f"--out {out}: folder {parent} cannot be written")


def check_space(out: Path, n_bytes: int) -> None:
    """Refuse to start what the disk cannot hold.

    Raises:
        SpecError: less than ``n_bytes`` are free.
    """
    free = shutil.disk_usage(out.resolve().parent).free
    if free < n_bytes:
        raise SpecError(
            f"--out {out}: needs {n_bytes / 1e9:.1f} GB, the disk has {free / 1e9:.1f} GB free"
        )


@contextlib.contextmanager
def replacing(out: Path) -> Iterator[Path]:
    """Give a new folder that takes the place of ``out`` if the block ends well.

    If it does not, the new folder is removed and ``out`` stays as it was. A bundle in the place
    of ``out`` is exchanged in one step where the kernel can.
    """
    out = Path(os.path.abspath(out))
    for stale in out.parent.glob(f".{out.name}.*.tmp"):
        if not _alive(stale):
            shutil.rmtree(stale, ignore_errors=True)
    work = out.parent / f".{out.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp"
    work.mkdir()
    try:
        yield work
        _open_to_readers(work)
        _sync(work)
        if out.exists() and any(out.iterdir()):
            _exchange(work, out)
        else:
            os.rename(work, out)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _alive(folder: Path) -> bool:
    """Is the process that made this folder still there?"""
    try:
        os.kill(int(folder.name.rsplit(".", 2)[1].split("-")[0]), 0)
    except ProcessLookupError:
        return False
    except (ValueError, IndexError, PermissionError):
        return True
    return True


def _open_to_readers(folder: Path) -> None:
    """Give every file the mode of a newly made one; some writers make theirs private."""
    mask = os.umask(0)
    os.umask(mask)
    for path in folder.rglob("*"):
        path.chmod((0o777 if path.is_dir() else 0o666) & ~mask)


def _sync(folder: Path) -> None:
    for path in [*folder.rglob("*"), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _exchange(new: Path, old: Path) -> None:
    """Swap two folders; afterwards ``new`` holds the old content."""
    libc = ctypes.CDLL(None, use_errno=True)
    if hasattr(libc, "renameat2"):
        code = libc.renameat2(
            _AT_FDCWD, os.fsencode(new), _AT_FDCWD, os.fsencode(old), _RENAME_EXCHANGE
        )
        if code == 0:
            return
        if ctypes.get_errno() not in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(old))
    # A file system without exchange: for an instant the name is free, but nothing is lost.
    aside = new.with_name(new.name + ".old")
    os.rename(old, aside)
    os.rename(new, old)
    shutil.rmtree(aside, ignore_errors=True)
