"""Files that hold tensors, read one tensor at a time.

Both readers copy: a tensor that is loaded owns its memory, and nothing else of the file stays in
the resident set. (A safetensors handle that stays open, and a mapped ``.pt``, keep every page that
was ever touched.)
"""

from __future__ import annotations

import ctypes
import json
import logging
import math
import mmap
import os
import pickle
import re
import struct
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from gwp_edge.errors import SpecError

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

# Names as torch prints them; what is not here cannot be a weight of these networks.
_SAFETENSORS_DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U8": "uint8",
    "BOOL": "bool",
}
_HEADER_LENGTH_BYTES = 8
_MADV_DONTNEED = 4
_MAX_NESTING = 12
_CONVERT = (
    "if you trust it, convert it on a machine you can afford to lose: torch.load it there and "
    "write its state dict with safetensors.torch.save_file"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorInfo:
    """What is known of a tensor before it is read.

    Attributes:
        name: its name, prefixes removed.
        shape: its shape.
        dtype: torch's name of its element type, such as ``bfloat16``.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def n_elements(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


class Source(Protocol):
    """One file of tensors. Any thread may call ``load``."""

    path: Path

    def infos(self) -> dict[str, TensorInfo]:
        """Return every tensor of the file by its name there."""
        ...

    def load(self, name: str) -> torch.Tensor:
        """Read one tensor into memory of its own."""
        ...

    def close(self) -> None:
        """Release the file."""
        ...


def open_source(path: Path) -> Source:
    """Open a weight file by its suffix.

    Raises:
        SpecError: it is missing, empty, damaged, of an unknown kind, or not plain weights.
    """
    if not path.is_file():
        raise SpecError(f"{path}: no such file")
    if path.stat().st_size == 0:
        raise SpecError(f"{path}: the file is empty; copy it again")
    if path.suffix == ".safetensors":
        return SafetensorsFile(path)
    if path.suffix in {".pt", ".pth", ".bin", ".ckpt"}:
        return TorchFile(path)
    raise SpecError(
        f"{path}: expected .safetensors, .pt, .pth, .bin, .ckpt or a .index.json, "
        f"got {path.suffix or 'no suffix'}"
    )


class SafetensorsFile:
    """A ``.safetensors`` file, read with positioned reads. Any thread may call ``load``."""

    def __init__(self, path: Path) -> None:
        from safetensors import SafetensorError, safe_open

        self.path = path
        try:
            # The library checks the header: offsets without holes, shapes, length of the file.
            with safe_open(str(path), framework="pt"):
                pass
        except (SafetensorError, OSError, ValueError) as e:
            raise SpecError(
                f"{path}: not a readable safetensors file ({_line(e)}); copy it again"
            ) from e
        with path.open("rb") as file:
            (n_bytes,) = struct.unpack("<Q", file.read(_HEADER_LENGTH_BYTES))
            header = json.loads(file.read(n_bytes))
        self._infos: dict[str, TensorInfo] = {}
        self._ranges: dict[str, tuple[int, int]] = {}
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            kind = entry["dtype"]
            self._infos[name] = TensorInfo(
                name=name,
                shape=tuple(entry["shape"]),
                dtype=_SAFETENSORS_DTYPES.get(kind, kind.lower()),
            )
            begin, end = entry["data_offsets"]
            self._ranges[name] = (_HEADER_LENGTH_BYTES + n_bytes + begin, end - begin)
        self._fd = os.open(path, os.O_RDONLY)

    def infos(self) -> dict[str, TensorInfo]:
        """Return every tensor of the file by its name there."""
        return self._infos

    def load(self, name: str) -> torch.Tensor:
        """Read one tensor into memory of its own."""
        import torch

        info = self._infos[name]
        dtype = getattr(torch, info.dtype, None)
        if not isinstance(dtype, torch.dtype):
            raise SpecError(f"{self.path}: {name} has the unknown element type {info.dtype}")
        begin, n_bytes = self._ranges[name]
        if n_bytes == 0:
            return torch.empty(info.shape, dtype=dtype)
        buffer = torch.empty(n_bytes, dtype=torch.uint8)
        view = buffer.numpy().data
        done = 0
        while done < n_bytes:
            # One call reads at most 2 GiB on Linux.
            n = os.preadv(self._fd, [view[done:]], begin + done)
            if n == 0:
                raise SpecError(f"{self.path}: the file shrank while {name} was read")
            done += n
        return buffer.view(dtype).reshape(info.shape)

    def close(self) -> None:
        """Release the file."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


class TorchFile:
    """A file of ``torch.save``, unpickled weights-only and mapped. Any thread may call ``load``."""

    def __init__(self, path: Path) -> None:
        self.path = path
        mapped = _is_whole_zip(path)
        self._tensors: dict[str, torch.Tensor] = dict(_flatten(_unpickle(path, mapped=mapped)))
        self._infos = {
            name: TensorInfo(
                name=name, shape=tuple(t.shape), dtype=str(t.dtype).removeprefix("torch.")
            )
            for name, t in self._tensors.items()
        }
        self._mappings = _mappings_of(path) if mapped else []
        if not mapped:
            logger.warning(
                "%s: an old torch format that cannot be mapped; the whole file is in memory", path
            )

    def infos(self) -> dict[str, TensorInfo]:
        """Return every tensor of the file by its dotted name there."""
        return self._infos

    def load(self, name: str) -> torch.Tensor:
        """Read one tensor into memory of its own."""
        import torch

        tensor = self._tensors[name].detach()
        if tensor.layout != torch.strided or tensor.is_quantized:
            raise SpecError(f"{self.path}: {name} is not a plain dense tensor")
        copy = tensor.clone(memory_format=torch.contiguous_format)
        storage = tensor.untyped_storage()
        self._release(storage.data_ptr(), storage.nbytes())
        return copy

    def _release(self, address: int, n_bytes: int) -> None:
        """Drop the clean pages of a storage; they come back from the file when read again."""
        page = mmap.PAGESIZE
        for begin, end in self._mappings:
            if n_bytes and begin <= address and address + n_bytes <= end:
                first = address // page * page
                last = min(end, -(-(address + n_bytes) // page) * page)
                libc = ctypes.CDLL(None, use_errno=True)
                libc.madvise(ctypes.c_void_p(first), ctypes.c_size_t(last - first), _MADV_DONTNEED)

    def close(self) -> None:
        """Release the file."""
        self._tensors = {}
        self._mappings = []


def _is_whole_zip(path: Path) -> bool:
    """Tell torch's zip format from its old one.

    Raises:
        SpecError: a zip that is cut off, or one written on a big-endian machine (unpickling swaps
            bytes in the mapped pages, which are dropped after use).
    """
    with path.open("rb") as file:
        magic = file.read(2)
    if magic != b"PK":
        return False
    try:
        with zipfile.ZipFile(path) as archive:
            for name in archive.namelist():
                if name.endswith("/byteorder") and archive.read(name) != b"little":
                    raise SpecError(f"{path}: written on a big-endian machine; convert it there")
    except (zipfile.BadZipFile, OSError, EOFError) as e:
        raise SpecError(f"{path}: truncated or damaged ({_line(e)}); copy it again") from e
    return True


def _unpickle(path: Path, *, mapped: bool) -> object:
    import torch

    try:
        with warnings.catch_warnings():
            # "Might not support" this pickle protocol: what it does not support raises below.
            warnings.simplefilter("ignore", UserWarning)
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as e:
        found = re.search(r"GLOBAL ([\w.]+)", str(e))
        why = f"it holds the Python object {found[1]}" if found else "damaged, or not plain weights"
        raise SpecError(f"{path}: refused, {why}; {_CONVERT}") from e
    except (
        RuntimeError,
        EOFError,
        OSError,
        ValueError,
        LookupError,
        TypeError,
        AttributeError,
        ArithmeticError,
        AssertionError,
        struct.error,
    ) as e:  # what a damaged pickle can raise
        raise SpecError(f"{path}: damaged or not a torch file ({_line(e)})") from e


def _flatten(value: object, prefix: str = "", depth: int = 0) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield every tensor of nested mappings under its dotted name."""
    import torch

    if isinstance(value, torch.Tensor):
        yield prefix, value
    elif isinstance(value, Mapping) and depth < _MAX_NESTING:
        for key, item in value.items():
            yield from _flatten(item, f"{prefix}.{key}" if prefix else str(key), depth + 1)


def _mappings_of(path: Path) -> list[tuple[int, int]]:
    """Return the address ranges at which this process has ``path`` mapped; none without /proc."""
    maps = Path("/proc/self/maps")
    if not maps.exists():
        return []
    real = str(path.resolve())
    ranges = []
    for line in maps.read_text(encoding="utf-8", errors="replace").splitlines():
        fields = line.split(maxsplit=5)
        if len(fields) == 6 and fields[5] == real:
            begin, end = fields[0].split("-")
            ranges.append((int(begin, 16), int(end, 16)))
    return ranges


def _line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return text[:160] if text else type(error).__name__
