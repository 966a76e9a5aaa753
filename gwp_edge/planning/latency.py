"""Ahead-of-time latency: a floor that cannot be beaten and a time to expect. All modelled.

floor     max(sum of operations / peak rates, bytes / peak bandwidth): no overlap is lost
expected  sum over layers of max(operations / expected rate, bytes / streaming rate), and
          ``kernel_us`` for each kernel: one layer after another, as batch 1 runs
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from gwp_edge.errors import PerformanceIssue, SpecError
from gwp_edge.manifest import Stage
from gwp_edge.planning.devices import Device
from gwp_edge.planning.workload import LayerWork, StageWork

Verdict = Literal["plausible", "below the floor", "far above the floor"]
# A build that takes this many times its floor, or its layers' expected time where that is more,
# runs something else than it was asked to.
FALLBACK_RATIO = 3.0
# Clocks above the data sheet's, and timers, may shave a little from a true floor.
FLOOR_MARGIN = 0.95


@dataclass(frozen=True, slots=True, kw_only=True)
class StageEstimate:
    """Modelled time of one pass.

    Attributes:
        stage: which.
        n_passes: passes for one chunk.
        floor_ms: cannot be beaten.
        expected_ms: to expect.
        compute_share: part of ``expected_ms`` of layers that arithmetic limits, 0 to 1.
        overhead_ms: part of ``expected_ms`` between kernels.
    """

    stage: Stage
    n_passes: int
    floor_ms: float
    expected_ms: float
    compute_share: float
    overhead_ms: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """Modelled time of one chunk on a device; never a measurement."""

    device: Device
    stages: tuple[StageEstimate, ...]
    label: Literal["modelled"] = "modelled"

    @property
    def floor_ms(self) -> float:
        """Of the whole chunk."""
        return sum(s.floor_ms * s.n_passes for s in self.stages)

    @property
    def expected_ms(self) -> float:
        """Of the whole chunk."""
        return sum(s.expected_ms * s.n_passes for s in self.stages)


def _unit(layer: LayerWork, device: Device, *, tf32: bool) -> str:
    if layer.unit == "fp32" and tf32 and "tf32" in device.peak_tops:
        return "tf32"
    if layer.unit not in device.peak_tops:
        raise PerformanceIssue(
            f"{device.name} has no {layer.unit} units, which {layer.name} needs; "
            f"export with --precision {best_precision(device)}"
        )
    return layer.unit


def best_precision(device: Device) -> str:
    """Return the ``--precision`` to export for a device."""
    for unit in ("fp8", "int8", "bf16"):
        if unit in device.peak_tops and device.compute_capability is not None:
            return unit
    return "fp32"


def estimate_stage(work: StageWork, device: Device, *, tf32: bool = False) -> StageEstimate:
    """Return the modelled time of one pass of a stage.

    Args:
        work: what the pass must do.
        device: that does it.
        tf32: let tensor cores round the operands of float32 products to 10 bits.

    Raises:
        PerformanceIssue: the device cannot compute a layer's format; says what to export.
    """
    compute_s = sum(x.flops / device.peak_ops_s(_unit(x, device, tf32=tf32)) for x in work.layers)
    memory_s = (work.weight_bytes + work.cache_bytes) / device.peak_bytes_s
    bound_s, total_s = 0.0, work.cache_bytes / device.stream_bytes_s
    for x in work.layers:
        arithmetic = x.flops / device.expected_ops_s(_unit(x, device, tf32=tf32), x.n_rows)
        moving = (x.weight_bytes + x.activation_bytes) / device.stream_bytes_s
        total_s += max(arithmetic, moving)
        bound_s += arithmetic if arithmetic > moving else 0.0
    overhead_s = work.n_kernels * device.kernel_us * 1e-6
    return StageEstimate(
        stage=work.stage,
        n_passes=work.n_passes,
        floor_ms=1e3 * max(compute_s, memory_s),
        expected_ms=1e3 * (total_s + overhead_s),
        compute_share=bound_s / (total_s + overhead_s),
        overhead_ms=1e3 * overhead_s,
    )


def estimate(work: Mapping[Stage, StageWork], device: Device, *, tf32: bool = False) -> Estimate:
    """Return the modelled time of one chunk; arguments and errors as ``estimate_stage``."""
    stages = tuple(estimate_stage(stage, device, tf32=tf32) for stage in work.values())
    return Estimate(device=device, stages=stages)


def judge_measured(stage: StageEstimate, measured_ms: float) -> Verdict:
    """Compare a measured pass with its floor, and with what its layers should take.

    Faster than the floor means a part of the network is missing (a miscompiled engine was seen to
    be both wrong and faster); far slower means kernels of another type than asked for.
    """
    if not measured_ms > 0:
        raise SpecError(f"measured time must be positive, got {measured_ms} ms")
    if measured_ms < FLOOR_MARGIN * stage.floor_ms:
        return "below the floor"
    if measured_ms > FALLBACK_RATIO * max(stage.floor_ms, stage.expected_ms - stage.overhead_ms):
        return "far above the floor"
    return "plausible"


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """Modelled against measured, of one stage; ``error`` is modelled / measured - 1."""

    stage: Stage
    expected_ms: float
    measured_ms: float

    @property
    def error(self) -> float:
        """Relative error of the model."""
        return self.expected_ms / self.measured_ms - 1


def compare(
    modelled: Estimate, measured_ns: Mapping[Stage, Sequence[int]]
) -> tuple[Comparison, ...]:
    """Compare an estimate with measured passes (ns, the median counts), stage by stage.

    Meaningful on a machine that does nothing else; ``gwp_edge.bench.time_engine`` gives the times.
    """
    result = []
    for stage in modelled.stages:
        times = sorted(measured_ns[stage.stage])
        if not times:
            raise SpecError(f"no measured pass of {stage.stage}")
        result.append(
            Comparison(
                stage=stage.stage,
                expected_ms=stage.expected_ms,
                measured_ms=times[len(times) // 2] / 1e6,
            )
        )
    return tuple(result)
