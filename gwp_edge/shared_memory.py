"""Shared memory between the processes of one run: named segments and latest-wins records.

A segment is a plain file in /dev/shm that is mapped, not ``multiprocessing.shared_memory``: the
resource tracker of the latter removes segments that other processes still use on Python < 3.13.
Every user of a segment holds a shared ``flock`` on its file; the kernel drops it when the process
dies, however it dies. So a file that nobody locks is a leftover, and ``remove_leftovers`` may take
it away even where process ids of several containers overlap.
"""

from __future__ import annotations

import fcntl
import logging
import mmap
import os
import re
import secrets
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from gwp_edge.errors import DeviceError

logger = logging.getLogger(__name__)

SHM_DIR = Path("/dev/shm")
PREFIX = "gwp-"
CACHE_LINE_BYTES = 64
_NAME = re.compile(r"[A-Za-z0-9._-]{1,200}")
_FENCE_LOCK = threading.Lock()
# A reader meets a half-written record only when the writer laps it; again and again means a writer
# far faster than any camera or motor loop, and then the caller's previous value is new enough.
_READ_ATTEMPTS = 64


def fence() -> None:
    """Order every load and store before this call against every one after it.

    Python has no memory barrier, and aarch64 reorders. Nothing may sink below a lock's release or
    rise above an acquire, and a release is ordered against a later acquire; so two rounds of an
    uncontended lock are a full barrier (about 0.1 us).
    """
    with _FENCE_LOCK:
        pass
    with _FENCE_LOCK:
        pass


def unique_name(label: str) -> str:
    """Return a segment name that no other run has, such as ``gwp-cam_high-1f0c9a52b7e4``."""
    return f"{PREFIX}{label}-{secrets.token_hex(6)}"


def aligned(n_bytes: int) -> int:
    """Round a size up to whole cache lines, bytes."""
    return -(-n_bytes // CACHE_LINE_BYTES) * CACHE_LINE_BYTES


class SharedSegment:
    """A named piece of shared memory, zeroed when created. Threads: any; processes: any."""

    def __init__(self, name: str, fd: int, n_bytes: int) -> None:
        self.name = name
        self.n_bytes = n_bytes
        self._fd = fd
        self._map: mmap.mmap | None = mmap.mmap(fd, n_bytes)

    @classmethod
    def create(cls, name: str, n_bytes: int) -> SharedSegment:
        """Make a new segment of ``n_bytes``.

        Raises:
            DeviceError: the name is bad or taken, or /dev/shm is missing or too small.
        """
        path = _path(name)
        try:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        except FileExistsError as e:
            raise DeviceError(
                f"shared memory {name} exists already; another run uses it: pick another name"
            ) from e
        except OSError as e:
            raise DeviceError(f"shared memory {path}: cannot create it: {e.strerror}") from e
        try:
            fcntl.flock(fd, fcntl.LOCK_SH)
            # Reserve the pages now: a full tmpfs would otherwise kill a later writer by SIGBUS.
            os.posix_fallocate(fd, 0, n_bytes)
            return cls(name, fd, n_bytes)
        except OSError as e:
            os.close(fd)
            path.unlink(missing_ok=True)
            raise DeviceError(
                f"shared memory {name}: cannot reserve {n_bytes} bytes in {SHM_DIR}: {e.strerror}; "
                "free some or enlarge it (docker run --shm-size)"
            ) from e

    @classmethod
    def attach(cls, name: str) -> SharedSegment:
        """Map a segment that another process made.

        Raises:
            DeviceError: there is none of this name.
        """
        path = _path(name)
        try:
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except OSError as e:
            raise DeviceError(
                f"shared memory {name} is not there ({e.strerror}); "
                "the process that owns it has ended or was never started"
            ) from e
        fcntl.flock(fd, fcntl.LOCK_SH)
        n_bytes = os.fstat(fd).st_size
        if n_bytes == 0:
            os.close(fd)
            raise DeviceError(
                f"shared memory {name} is empty; its owner has not finished making it"
            )
        return cls(name, fd, n_bytes)

    @property
    def buffer(self) -> memoryview:
        """The whole segment as writable bytes."""
        if self._map is None:
            raise DeviceError(f"shared memory {self.name} is closed; attach it again")
        return memoryview(self._map)

    def close(self) -> None:
        """Unmap; safe to call twice. Views that are still held keep the memory until they go."""
        if self._map is None:
            return
        try:
            self._map.close()
        except BufferError:
            logger.debug("shared memory %s: views outlive close()", self.name)
        self._map = None
        os.close(self._fd)

    def unlink(self) -> None:
        """Remove the name; processes that have it mapped keep it. Safe to call twice."""
        _path(self.name).unlink(missing_ok=True)


class LatestRing:
    """Latest-wins records of one numpy dtype in shared memory; never blocks, never torn.

    ``n_slots`` records are written in turn, each guarded by a sequence number that is odd while
    the record changes. A writer that dies half-way leaves the record before it readable.

    Threads: one writer at a time; any number of readers, each with its own object.
    """

    def __init__(self, buffer: memoryview, dtype: npt.DTypeLike, n_slots: int) -> None:
        if n_slots < 2:
            raise DeviceError(f"a ring needs at least 2 slots, got {n_slots}")
        self._n_slots = n_slots
        n_words = self._header_bytes(n_slots)
        # Single words go through memoryview: one aligned 64-bit store, which numpy also makes but
        # struct's "<q" does not.
        self._words = buffer[:n_words].cast("q")
        dtype = np.dtype(dtype)
        stride = aligned(dtype.itemsize)
        self._slots: list[npt.NDArray[Any]] = [
            np.ndarray((), dtype, buffer, offset=n_words + i * stride) for i in range(n_slots)
        ]

    @staticmethod
    def _header_bytes(n_slots: int) -> int:
        return aligned(8 * (1 + n_slots))

    @classmethod
    def size_bytes(cls, dtype: npt.DTypeLike, n_slots: int) -> int:
        """Return the bytes of buffer that a ring needs."""
        return cls._header_bytes(n_slots) + n_slots * aligned(np.dtype(dtype).itemsize)

    @property
    def count(self) -> int:
        """Number of records published so far."""
        return self._words[0]

    @contextmanager
    def writing(self) -> Iterator[npt.NDArray[Any]]:
        """Give the next slot to fill; it is published when the block ends without an error."""
        count = self._words[0]
        slot_idx, round_idx = count % self._n_slots, count // self._n_slots
        self._words[1 + slot_idx] = 2 * round_idx + 1
        fence()
        yield self._slots[slot_idx]
        fence()
        self._words[1 + slot_idx] = 2 * round_idx + 2
        fence()
        self._words[0] = count + 1

    def latest(self) -> tuple[npt.NDArray[Any], int] | None:
        """Return a copy of the newest record and its number (from 1), without blocking.

        None before the first record, and in the (not observed) case that the writer lapped this
        reader on every one of its attempts.
        """
        for _ in range(_READ_ATTEMPTS):
            count = self._words[0]
            if count == 0:
                return None
            slot_idx, round_idx = (count - 1) % self._n_slots, (count - 1) // self._n_slots
            fence()
            if self._words[1 + slot_idx] != 2 * round_idx + 2:
                continue
            fence()
            record = self._slots[slot_idx].copy()
            fence()
            if self._words[1 + slot_idx] == 2 * round_idx + 2:
                return record, count
        return None

    def release(self) -> None:
        """Let go of the buffer, so that its segment can be unmapped."""
        self._slots.clear()
        self._words.release()


def remove_leftovers() -> list[str]:
    """Remove segments whose processes were all killed before they could; return their names."""
    removed: list[str] = []
    if not SHM_DIR.is_dir():
        return removed
    for path in SHM_DIR.glob(f"{PREFIX}*"):
        try:
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except OSError:
            continue  # another user's, or gone in this moment
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            continue  # in use
        else:
            # A segment in the moment between its creation and its lock is still empty.
            if os.fstat(fd).st_size > 0:
                path.unlink(missing_ok=True)
                removed.append(path.name)
        finally:
            os.close(fd)
    return removed


def _path(name: str) -> Path:
    if not _NAME.fullmatch(name):
        raise DeviceError(
            f"shared memory name {name!r}: expected 1 to 200 of letters, digits, '.', '_' and '-'"
        )
    if not SHM_DIR.is_dir():
        raise DeviceError(f"{SHM_DIR} is missing; gwp-edge needs Linux with a tmpfs mounted there")
    return SHM_DIR / name
