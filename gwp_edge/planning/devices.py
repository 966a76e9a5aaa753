"""The device table, and this machine's processor as a device."""

from __future__ import annotations

import functools
import sys
from importlib.resources import files
from typing import TYPE_CHECKING, Any

import msgspec

from gwp_edge.errors import SpecError

if TYPE_CHECKING:
    from gwp_edge.machine_limits import Limits

_GB = 1_000_000_000
_TABLE = "devices.toml"
# What a system reports of its nominal memory: less what firmware keeps, more where GB means GiB.
_MEMORY_SHARE = (0.8, 1.1)


class Device(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a device can do; the fields are explained in devices.toml.

    Attributes:
        id: name on the command line.
        row_tops: for a measured processor, (rows of a product, rate) instead of one rate.
    """

    id: str
    name: str
    compute_capability: str | None
    integrated: bool
    memory_gb: float
    reserved_gb: float
    peak_bandwidth_gb_s: float
    efficiency_bandwidth: float
    kernel_us: float
    peak_tops: dict[str, float]
    efficiency_tops: dict[str, float]
    source: str
    assumed: tuple[str, ...] = ()
    measured_bandwidth_gb_s: float | None = None
    measured_tops: dict[str, float] = {}
    row_tops: tuple[tuple[int, float], ...] = ()

    def __post_init__(self) -> None:
        numbers = (
            self.memory_gb,
            self.peak_bandwidth_gb_s,
            *self.peak_tops.values(),
            *(rate for _, rate in self.row_tops),
        )
        if min(numbers) <= 0 or self.kernel_us < 0 or self.reserved_gb < 0:
            raise ValueError("memory, bandwidth and rates must be positive")
        shares = (self.efficiency_bandwidth, *self.efficiency_tops.values())
        if not all(0 < share <= 1 for share in shares):
            raise ValueError("efficiencies must be above 0 and at most 1")
        if set(self.peak_tops) != set(self.efficiency_tops):
            raise ValueError("peak_tops and efficiency_tops must name the same types")

    @property
    def usable_bytes(self) -> int:
        """Memory that a policy can have: all of it less what the system keeps."""
        return int((self.memory_gb - self.reserved_gb) * _GB)

    @property
    def stream_bytes_s(self) -> float:
        """Rate at which weights are expected to be read, bytes/s."""
        return self.peak_bandwidth_gb_s * self.efficiency_bandwidth * _GB

    @property
    def peak_bytes_s(self) -> float:
        """Rate that memory never exceeds, bytes/s."""
        return self.peak_bandwidth_gb_s * _GB

    def peak_ops_s(self, unit: str) -> float:
        """Return the rate of a unit that is never exceeded, operations/s."""
        return self._unit(self.peak_tops, unit) * 1e12

    def expected_ops_s(self, unit: str, n_rows: float | None = None) -> float:
        """Return the rate at which products of ``n_rows`` rows are expected to run."""
        if self.row_tops and n_rows is not None:
            return _interpolate(self.row_tops, n_rows) * 1e12
        return self._unit(self.peak_tops, unit) * self.efficiency_tops[unit] * 1e12

    def _unit(self, table: dict[str, float], unit: str) -> float:
        if unit not in table:
            raise SpecError(f"{self.name} has no {unit} unit; it has {', '.join(table)}")
        return table[unit]


def _interpolate(points: tuple[tuple[int, float], ...], n_rows: float) -> float:
    """Rate at ``n_rows`` between measured points, held at both ends."""
    below = max((p for p in points if p[0] <= n_rows), default=points[0])
    above = min((p for p in points if p[0] >= n_rows), default=points[-1])
    if below[0] == above[0]:
        return below[1]
    share = (n_rows - below[0]) / (above[0] - below[0])
    return below[1] + share * (above[1] - below[1])


@functools.cache
def _table() -> dict[str, Device]:
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    text = files("gwp_edge.planning").joinpath(_TABLE).read_text(encoding="utf-8")
    entries: dict[str, dict[str, Any]] = tomllib.loads(text)
    return {key: msgspec.convert({"id": key, **entry}, Device) for key, entry in entries.items()}


def device_names() -> tuple[str, ...]:
    """Return the names that ``find_device`` knows, in the order of the table."""
    return tuple(_table())


def find_device(name: str) -> Device:
    """Return a device of the table.

    Raises:
        SpecError: no device has that name.
    """
    device = _table().get(name)
    if device is None:
        raise SpecError(f"--device {name} is not known; choose from {', '.join(_table())}")
    return device


def matching_devices(
    gpu: str, compute_capability: str, *, integrated: bool, memory_bytes: int
) -> tuple[Device, ...]:
    """Return the entries that a GPU at hand may be; none where the table does not know it.

    Modules of one family give the same GPU name, so memory tells them apart, and some (Orin Nano
    with and without Super mode) nothing does. Discrete cards differ by their names alone.

    Args:
        gpu: name that CUDA gives.
        compute_capability: such as ``8.7``.
        integrated: it shares the processor's memory.
        memory_bytes: of the machine where integrated, else of the GPU.
    """
    return tuple(
        device
        for device in _table().values()
        if device.compute_capability == compute_capability
        and device.integrated == integrated
        and (integrated or gpu.endswith(device.name))
        and _MEMORY_SHARE[0] < memory_bytes / (device.memory_gb * _GB) < _MEMORY_SHARE[1]
    )


def this_processor(limits: Limits, memory_bytes: int) -> Device:
    """Return this machine's processor, from limits measured just now.

    Args:
        limits: of ``gwp_edge.machine_limits.measure_limits``.
        memory_bytes: memory of the machine.
    """
    rates: dict[int, list[float]] = {}
    for rate in limits.gemm:
        rates.setdefault(rate.shape[0], []).append(rate.gflop_s / 1e3)
    rows = tuple(sorted((n, sum(found) / len(found)) for n, found in rates.items()))
    best = limits.best_gflop_s / 1e3
    return Device(
        id="this-cpu",
        name=f"this processor, {limits.threads} threads",
        compute_capability=None,
        integrated=True,
        memory_gb=memory_bytes / _GB,
        reserved_gb=0.0,
        peak_bandwidth_gb_s=limits.stream_gb_s,
        efficiency_bandwidth=1.0,
        kernel_us=5.0,
        peak_tops={"fp32": best},
        efficiency_tops={"fp32": 1.0},
        source="measured just now: float32 products through ONNX Runtime, memory by numpy",
        assumed=("kernel_us",),
        row_tops=rows,
    )
