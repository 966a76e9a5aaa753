"""What a bundle needs of a device's memory, while building, loading and running. Modelled.

Weights and K/V are counted; what TensorRT adds is bounded from above by assumptions that the
fields name. On a Jetson one memory serves processor and GPU, so host copies count too.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from gwp_edge.errors import BuildError, DeviceError
from gwp_edge.manifest import Manifest, Stage
from gwp_edge.planning.devices import Device
from gwp_edge.planning.workload import StageWork, cache_bytes, workload

GIB: Final = 1 << 30
WORKSPACE_BYTES: Final = 1 * GIB
# CUDA context, cuBLAS-free TensorRT runtime and Python, as seen on JetPack systems; assumed.
_RUNTIME_BYTES: Final = 700_000_000
# While a stage is built its weights exist as the parser's copy, the builder's copy on the device
# and the serialized plan. The engine is loaded for inspection after those are gone.
_BUILD_COPIES: Final = 3
# While a stage is loaded its plan is in host memory beside the engine.
_LOAD_COPIES: Final = 2
_FLOAT_BYTES: Final = 4
# Live activations of the widest point, in tensors of that size; assumed.
_LIVE_TENSORS: Final = 4
_VAE_CHANNELS: Final = 160


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryPlan:
    """Bytes that a bundle needs, modelled.

    Attributes:
        weights: of each stage; engines hold theirs each.
        caches: prefix and prompt K/V.
        activations: scratch of the largest stage; stages share one.
        workspace: what kernels may ask for on top, while building and in the same scratch later.
        runtime: CUDA context, libraries, Python.
    """

    weights: Mapping[Stage, int]
    caches: int
    activations: int
    workspace: int
    runtime: int

    @property
    def run_bytes(self) -> int:
        """Resident while the robot runs."""
        scratch = self.activations + self.workspace
        return sum(self.weights.values()) + self.caches + scratch + self.runtime

    @property
    def load_bytes(self) -> int:
        """Peak while the engines are loaded, one after the other, the largest last.

        Where memory is shared; a GPU of its own needs ``run_bytes``, the plan being on the host.
        """
        largest = max(self.weights.values())
        return self.run_bytes + (_LOAD_COPIES - 1) * largest

    @property
    def swappable_bytes(self) -> int:
        """What of ``build_bytes`` is host copies, which swap can take; the GPU's cannot move."""
        return (_BUILD_COPIES - 1) * max(self.weights.values())

    @property
    def build_bytes(self) -> int:
        """Peak while the largest stage is built; nothing else is resident."""
        largest = max(self.weights.values())
        return _BUILD_COPIES * largest + self.activations + self.workspace + self.runtime

    def built(self, engine_bytes: Mapping[Stage, int], scratch_bytes: int) -> MemoryPlan:
        """Return the plan with what engines that exist really need.

        Args:
            engine_bytes: size of each stage's engine, nearly all of it weights.
            scratch_bytes: device memory for a pass of the stage that needs most.
        """
        return replace(self, weights=engine_bytes, activations=scratch_bytes, workspace=0)

    def rows(self) -> tuple[tuple[str, int], ...]:
        """Return name and bytes of every part, for a table."""
        return (
            *((f"weights {stage}", n) for stage, n in self.weights.items()),
            ("K/V caches", self.caches),
            ("activations", self.activations),
            ("workspace", self.workspace),
            ("runtime", self.runtime),
            ("running", self.run_bytes),
            ("loading (peak)", self.load_bytes),
            ("building (peak)", self.build_bytes),
        )


def _resident_weight_bytes(work: StageWork, formats: Mapping[str, str]) -> int:
    """Weights as TensorRT keeps them: int8 weight-only is expanded to float when it builds."""
    factors = {"w8": 4}
    return sum(x.weight_bytes * factors.get(formats[x.name], 1) for x in work.layers)


def memory_plan(manifest: Manifest, *, workspace_bytes: int = WORKSPACE_BYTES) -> MemoryPlan:
    """Return what a bundle needs."""
    spec, net = manifest.spec, manifest.spec.network
    caches = cache_bytes(spec, manifest.precision.cache)
    n_streams = 2 if net.family == "gwp-0.5" else 1
    widest_vision = spec.canvas.height_px * spec.canvas.width_px // 4 * _VAE_CHANNELS
    widest_prefill = spec.n_prefix * max(net.visual_ffn_dim, 3 * net.visual_dim)
    widest_denoise = spec.n_rows * max(net.action_ffn_dim, 3 * net.action_dim)
    widest = max(widest_vision, widest_prefill, widest_denoise)
    formats: dict[Stage, dict[str, str]] = {}
    for layer in manifest.precision.layers:
        formats.setdefault(layer.stage, {})[layer.name] = layer.format
    weights = {
        stage: _resident_weight_bytes(work, formats[stage])
        for stage, work in workload(manifest).items()
    }
    return MemoryPlan(
        weights=weights,
        caches=caches["prefix"] + n_streams * caches["prompt"],
        activations=_LIVE_TENSORS * widest * _FLOAT_BYTES,
        workspace=workspace_bytes,
        runtime=_RUNTIME_BYTES,
    )


def fits(plan: MemoryPlan, device: Device) -> dict[str, bool]:
    """Return whether building, loading and running fit a device's memory."""
    free = device.usable_bytes
    return {
        "build": plan.build_bytes <= free,
        "load": (plan.load_bytes if device.integrated else plan.run_bytes) <= free,
        "run": plan.run_bytes <= free,
    }


def check_free(what: str, needed_bytes: int, free_bytes: int, hint: str) -> None:
    """Refuse before the system would kill the process.

    Raises:
        BuildError: ``what`` needs more than is free.
    """
    if needed_bytes > free_bytes:
        raise BuildError(
            f"{what} needs about {needed_bytes / 1e9:.1f} GB (modelled), "
            f"{free_bytes / 1e9:.1f} GB are free; {hint}"
        )


def available_bytes(meminfo: str | None = None) -> int:
    """Return the memory that can be had without swapping, from /proc/meminfo.

    On unified memory this is what the GPU can have as well; the driver's own figure leaves out
    the page cache, which the system would give back.

    Raises:
        DeviceError: the system does not say.
    """
    return _meminfo_bytes("MemAvailable", meminfo)


def total_bytes(meminfo: str | None = None) -> int:
    """Return the memory of the machine, from /proc/meminfo.

    Raises:
        DeviceError: the system does not say.
    """
    return _meminfo_bytes("MemTotal", meminfo)


def disk_swap_bytes(swaps: str | None = None) -> int:
    """Return the free swap on disks, from /proc/swaps; compressed memory (zram) is not more memory.

    Raises:
        DeviceError: the system does not say.
    """
    if swaps is None:
        try:
            swaps = Path("/proc/swaps").read_text(encoding="utf-8")
        except OSError as e:
            raise DeviceError(f"/proc/swaps cannot be read: {e.strerror}") from e
    # Filename, type, size, used, priority; sizes in KiB.
    rows = [line.split() for line in swaps.splitlines()[1:] if line.strip()]
    return sum(
        1024 * (int(row[-3]) - int(row[-2])) for row in rows if not row[0].startswith("/dev/zram")
    )


def _meminfo_bytes(wanted: str, meminfo: str | None) -> int:
    if meminfo is None:
        try:
            meminfo = Path("/proc/meminfo").read_text(encoding="ascii")
        except OSError as e:
            raise DeviceError(f"/proc/meminfo cannot be read: {e.strerror}") from e
    for line in meminfo.splitlines():
        name, _, rest = line.partition(":")
        if name == wanted:
            return int(rest.split()[0]) * 1024
    raise DeviceError(f"/proc/meminfo has no {wanted} line; a kernel of 3.14 or newer is needed")
