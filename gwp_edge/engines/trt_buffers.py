"""Device buffers and what crosses between host and device. Not yet run on hardware.

On an integrated GPU the small things that cross (canvas, state, noise, chunk) live in pinned host
memory that the GPU reads where it is: a copy would move the same bytes in the same memory chips. A
discrete GPU gets copies on the stream. Weights, K/V and tables are ordinary device memory in
either case: mapped memory is not cached for the GPU, and those are read again and again.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, cast

import ml_dtypes
import numpy as np
import numpy.typing as npt

from gwp_edge.engines.trt_device import cuda_errors, require_driver
from gwp_edge.errors import BuildError, SpecError

if TYPE_CHECKING:
    import pycuda.driver as drv

# Tensor addresses must be aligned to this.
ALIGNMENT: Final = 256
# TensorRT's names of the types that our graphs have at their borders.
_DTYPES: Final[dict[str, npt.DTypeLike]] = {
    "FLOAT": np.float32,
    "HALF": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "UINT8": np.uint8,
}


def dtype_of(kind: str, name: str) -> np.dtype[Any]:
    """Return the numpy type of TensorRT's ``kind``, such as ``HALF``, of tensor ``name``.

    Raises:
        BuildError: no tensor of ours has it.
    """
    if kind not in _DTYPES:
        raise BuildError(f"engine tensor {name} is {kind}; build again from a current bundle")
    return np.dtype(_DTYPES[kind])


def padded_bytes(n_bytes: int) -> int:
    """Return ``n_bytes`` rounded up to the alignment of tensor addresses."""
    return -(-n_bytes // ALIGNMENT) * ALIGNMENT


def stacked(rows: npt.NDArray[Any]) -> tuple[npt.NDArray[np.uint8], int]:
    """Return rows (N, ...) as bytes with every row aligned, and the distance between rows."""
    flat = np.ascontiguousarray(rows).reshape(len(rows), -1).view(np.uint8)
    stride = padded_bytes(flat.shape[1])
    table = np.zeros((len(rows), stride), np.uint8)
    table[:, : flat.shape[1]] = flat
    return table, stride


@dataclass(frozen=True, slots=True, kw_only=True)
class Crossing:
    """A tensor that the host writes or reads every chunk.

    Attributes:
        host: pinned array.
        address: where the GPU finds it.
        mapped: ``address`` is ``host`` itself.
    """

    host: npt.NDArray[Any]
    address: int
    mapped: bool


class Buffers:
    """Every allocation of an engine. Threads: one owner, with its context current.

    Args:
        integrated: the GPU shares the processor's memory.
        stream: on which copies happen.
    """

    def __init__(self, *, integrated: bool, stream: drv.Stream) -> None:
        require_driver()
        self._integrated = integrated
        self._stream = stream
        self._allocations: list[drv.DeviceAllocation] = []
        self._crossings: dict[str, Crossing] = {}

    def device(self, n_bytes: int) -> int:
        """Allocate device memory; return its address."""
        import pycuda.driver

        with cuda_errors(f"allocating {n_bytes} bytes"):
            allocation: drv.DeviceAllocation = pycuda.driver.mem_alloc(padded_bytes(n_bytes))
        self._allocations.append(allocation)
        return int(allocation)

    def upload(self, array: npt.NDArray[Any], address: int) -> None:
        """Copy an array to the device and wait."""
        import pycuda.driver

        with cuda_errors("copying to the device"):
            # ml_dtypes are strangers to PyCUDA's buffer interface; bytes are not.
            pycuda.driver.memcpy_htod(address, np.ascontiguousarray(array).view(np.uint8))

    def download(
        self, address: int, shape: tuple[int, ...], dtype: np.dtype[Any]
    ) -> npt.NDArray[Any]:
        """Copy an array from the device and wait; the streams must be done."""
        import pycuda.driver

        raw = np.empty(math.prod(shape) * dtype.itemsize, np.uint8)
        with cuda_errors("copying from the device"):
            pycuda.driver.memcpy_dtoh(raw, address)
        return raw.view(dtype).reshape(shape)

    def table(self, rows: npt.NDArray[Any]) -> tuple[int, ...]:
        """Put rows (N, ...) on the device; return the address of each."""
        data, stride = stacked(rows)
        address = self.device(data.nbytes)
        self.upload(data, address)
        return tuple(address + i * stride for i in range(len(rows)))

    def crossing(self, name: str, shape: tuple[int, ...], dtype: npt.DTypeLike) -> Crossing:
        """Allocate a tensor that crosses, once for each name."""
        import pycuda.driver

        known = self._crossings.get(name)
        if known is not None:
            return known
        n_bytes = math.prod(shape) * np.dtype(dtype).itemsize
        flags = pycuda.driver.host_alloc_flags.DEVICEMAP if self._integrated else 0
        with cuda_errors(f"pinning {name}"):
            host = pycuda.driver.pagelocked_empty(shape, dtype, mem_flags=flags)
            if self._integrated:
                owner = cast("pycuda.driver.PagelockedHostAllocation", host.base)
                address = int(owner.get_device_pointer())
            else:
                address = self.device(n_bytes)
        host[...] = 0
        made = Crossing(host=host, address=address, mapped=self._integrated)
        self._crossings[name] = made
        return made

    def put(self, name: str, value: npt.NDArray[Any]) -> None:
        """Write a crossing tensor; on a discrete GPU its copy is only enqueued by ``send``."""
        host = self._crossings[name].host
        if value.shape != host.shape or value.dtype != host.dtype:
            raise SpecError(
                f"{name}: expected {host.dtype} {host.shape}, got {value.dtype} {value.shape}"
            )
        host[...] = value

    def send(self, name: str) -> None:
        """Enqueue the copy to the device, where one is needed."""
        import pycuda.driver

        crossing = self._crossings[name]
        if not crossing.mapped:
            with cuda_errors(f"sending {name}"):
                pycuda.driver.memcpy_htod_async(crossing.address, crossing.host, self._stream)

    def fetch(self, name: str) -> None:
        """Enqueue the copy to the host, where one is needed."""
        import pycuda.driver

        crossing = self._crossings[name]
        if not crossing.mapped:
            with cuda_errors(f"fetching {name}"):
                pycuda.driver.memcpy_dtoh_async(crossing.host, crossing.address, self._stream)

    def address(self, name: str) -> int:
        """Return where the GPU finds a crossing tensor."""
        return self._crossings[name].address

    def host(self, name: str) -> npt.NDArray[Any]:
        """Return the host's side of a crossing tensor."""
        return self._crossings[name].host

    def close(self) -> None:
        """Free everything; safe to call twice."""
        self._crossings.clear()
        while self._allocations:
            with cuda_errors("freeing memory"):
                self._allocations.pop().free()
