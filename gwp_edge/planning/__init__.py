"""What a bundle will cost on a device that is not at hand: time and memory, modelled.

Nothing here is a measurement. Every figure that leaves this package carries the word "modelled".
"""

from __future__ import annotations

from gwp_edge.planning.devices import Device, device_names, find_device
from gwp_edge.planning.latency import Estimate, StageEstimate, estimate
from gwp_edge.planning.memory import MemoryPlan, memory_plan
from gwp_edge.planning.workload import StageWork, workload

__all__ = [
    "Device",
    "Estimate",
    "MemoryPlan",
    "StageEstimate",
    "StageWork",
    "device_names",
    "estimate",
    "find_device",
    "memory_plan",
    "workload",
]
