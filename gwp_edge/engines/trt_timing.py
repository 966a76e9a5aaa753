"""Measured stage times of a build against the planner's floor and expectation. Needs no GPU.

Faster than the floor: a part of the network is missing. Far slower than expected: kernels of
another type than asked for, or a GPU at a part of its clocks.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

import msgspec

from gwp_edge.engines.trt_device import DeviceFacts
from gwp_edge.manifest import STAGES, Manifest, Stage
from gwp_edge.planning.devices import matching_devices
from gwp_edge.planning.latency import Verdict, estimate, judge_measured
from gwp_edge.planning.workload import workload

_MEANING: Mapping[Verdict, str] = {
    "plausible": "plausible",
    "below the floor": "below the floor: is a part of the network missing? Do not trust it",
    "far above the floor": "over 3 times what its layers should take: slow kernels, or not the "
    "full power mode",
}


class StageTiming(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One stage: measured and modelled.

    Attributes:
        stage: which.
        n: measured passes.
        measured_ms: median of one pass, by the GPU's clock.
        floor_ms: modelled, cannot be beaten; None where the device is not in the table.
        expected_ms: modelled; None as above.
        verdict: what the comparison says.
    """

    stage: Stage
    n: int
    measured_ms: float
    floor_ms: float | None
    expected_ms: float | None
    verdict: Verdict | None

    @property
    def is_suspect(self) -> bool:
        """The model cannot explain the time."""
        return self.verdict not in (None, "plausible")

    def __str__(self) -> str:
        """Return it as one line."""
        took = f"{self.stage} {self.measured_ms:.2f} ms (median of {self.n})"
        if self.floor_ms is None or self.expected_ms is None or self.verdict is None:
            return f"{took}; this device is not in the planner's table, so nothing judges it"
        return (
            f"{took}, modelled floor {self.floor_ms:.2f}, expected {self.expected_ms:.2f}: "
            f"{_MEANING[self.verdict]}"
        )


def by_stage(chunks: Sequence[Sequence[int]]) -> dict[Stage, list[int]]:
    """Sort laps of whole chunks (vision, prefill, each step; ns) by stage."""
    return {
        "vision": [laps[0] for laps in chunks],
        "prefill": [laps[1] for laps in chunks],
        "denoise": [lap for laps in chunks for lap in laps[2:]],
    }


def judge_build(
    manifest: Manifest, facts: DeviceFacts, times_ns: Mapping[Stage, Sequence[int]], *, tf32: bool
) -> tuple[StageTiming, ...]:
    """Judge the stages of engines that were just built.

    Where several entries of the device table fit the machine, the one that suits a time best
    counts: what is flagged then is wrong on all of them.
    """
    devices = matching_devices(
        facts.name,
        facts.capability_text,
        integrated=facts.integrated,
        memory_bytes=facts.memory_bytes,
    )
    work = workload(manifest)
    estimates = [estimate(work, device, tf32=tf32) for device in devices]
    timings = []
    for index, stage in enumerate(STAGES):
        measured_ms = statistics.median(times_ns[stage]) / 1e6
        modelled = [found.stages[index] for found in estimates]
        verdicts = [judge_measured(found, measured_ms) for found in modelled]
        best = next((i for i, v in enumerate(verdicts) if v == "plausible"), 0)
        timings.append(
            StageTiming(
                stage=stage,
                n=len(times_ns[stage]),
                measured_ms=measured_ms,
                floor_ms=modelled[best].floor_ms if modelled else None,
                expected_ms=modelled[best].expected_ms if modelled else None,
                verdict=verdicts[best] if modelled else None,
            )
        )
    return tuple(timings)
