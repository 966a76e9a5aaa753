"""The one weight file of a bundle: what goes in, and writing it one tensor at a time."""

from __future__ import annotations

import hashlib
import json
import math
import os
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar, cast

import torch

from gwp_edge.errors import BuildError

T = TypeVar("T")

_SAFETENSORS_DTYPES = {
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.float8_e4m3fn: "F8_E4M3",
}


@dataclass(frozen=True, kw_only=True)
class StoredTensor:
    """A tensor that will be in the weight file.

    Attributes:
        name: name in the file and of the initializer.
        dtype: stored type.
        shape: stored shape; int4 codes are stored as packed bytes (uint8, one axis).
        produce: reads and transforms the checkpoint tensor; called once, while writing.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    produce: Callable[[], torch.Tensor]

    @property
    def n_bytes(self) -> int:
        """Size in the file."""
        return math.prod(self.shape) * self.dtype.itemsize


class WeightBank:
    """Collects stored tensors by name over all graphs, then writes them. Threads: one owner."""

    def __init__(self) -> None:
        self._tensors: dict[str, StoredTensor] = {}
        self._last: tuple[object, object] | None = None

    def once(self, key: object, make: Callable[[], T]) -> T:
        """Return ``make()``, or what it returned where the call before had the same key.

        Scales and biases of a quantized layer follow each other in the file, and each needs the
        whole weight: it is read and rounded once for all of them.
        """
        if self._last is None or self._last[0] != key:
            self._last = None  # two large weights would be in memory at a time
            self._last = (key, make())
        return cast("T", self._last[1])

    def add(self, tensor: StoredTensor) -> None:
        """Take ``tensor``; the same name again must mean the same tensor.

        Raises:
            BuildError: two graphs want different things under one name.
        """
        known = self._tensors.setdefault(tensor.name, tensor)
        if (known.dtype, known.shape) != (tensor.dtype, tensor.shape):
            raise BuildError(
                f"{tensor.name}: stored as {known.dtype} {known.shape} by one graph and as "
                f"{tensor.dtype} {tensor.shape} by another"
            )

    def layout(self) -> tuple[dict[str, tuple[int, int]], list[StoredTensor], bytes]:
        """Return (offset, length) of every tensor in the file, their order, and the header.

        Wider types come first, so that every tensor is aligned to its own type.
        """
        order = sorted(self._tensors.values(), key=lambda t: (-t.dtype.itemsize, t.name))
        entries: dict[str, object] = {}
        position = 0
        for tensor in order:
            end = position + tensor.n_bytes
            entries[tensor.name] = {
                "dtype": _SAFETENSORS_DTYPES[tensor.dtype],
                "shape": list(tensor.shape),
                "data_offsets": [position, end],
            }
            position = end
        header = json.dumps(entries, separators=(",", ":")).encode()
        header += b" " * (-(len(header) + 8) % 4096)
        start = 8 + len(header)
        places: dict[str, tuple[int, int]] = {}
        position = start
        for tensor in order:
            places[tensor.name] = (position, tensor.n_bytes)
            position += tensor.n_bytes
        return places, order, struct.pack("<Q", len(header)) + header

    @property
    def n_bytes(self) -> int:
        """Total size of the tensors."""
        return sum(t.n_bytes for t in self._tensors.values())

    @property
    def n_elements(self) -> int:
        """Total number of values."""
        return sum(math.prod(t.shape) for t in self._tensors.values())

    def write(self, path: Path, progress: Callable[[int], None] | None = None) -> str:
        """Write the safetensors file and return its SHA-256; one tensor is in memory at a time.

        Raises:
            BuildError: a tensor came out differently than announced.
        """
        _, order, header = self.layout()
        with path.open("wb") as file:
            file.write(header)
            digest = hashlib.sha256(header)
            for tensor in order:
                value = tensor.produce().contiguous()
                if tuple(value.shape) != tensor.shape or value.dtype != tensor.dtype:
                    raise BuildError(
                        f"{tensor.name}: announced {tensor.dtype} {tensor.shape}, "
                        f"got {value.dtype} {tuple(value.shape)}"
                    )
                data = value.reshape(-1).view(torch.uint8).numpy().data
                file.write(data)
                digest.update(data)
                if progress is not None:
                    progress(tensor.n_bytes)
            self._last = None
            file.flush()
            os.fsync(file.fileno())
        return digest.hexdigest()
