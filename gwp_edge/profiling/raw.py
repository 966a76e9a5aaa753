"""What is collected of a run, before anything is computed from it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Final

import numpy.typing as npt

from gwp_edge.profiling.system_sampler import SystemSamples
from gwp_edge.status import TickFlag

Records = npt.NDArray[Any]

# The flags of a tick that say which limit acted.
LIMIT_FLAGS: Final = tuple(
    flag for flag in TickFlag if flag not in (TickFlag.REJECTED, TickFlag.LATE, TickFlag.NOT_SENT)
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Raw:
    """Everything that was collected of one run, or of several, one after the other.

    Attributes:
        stamps: one record per chunk, ``STAMP_DTYPE``.
        ticks: one per motor tick, ``TICK_DTYPE``.
        states: measured states.
        commands: commands sent.
        system: samples of the system, or None.
        health: what each camera's driver said about itself at the end, by name.
        n_lost: records overwritten before they were read.
        listener_s: processor time of the listener.
        sampler_s: the sampler's part of it.
        wall_s: how long it listened.
        view_s: processor time of the live view.
        helper_s: processor time of the sampler's other threads and processes.
        failure: why collecting ended early, or None.
    """

    stamps: Records
    ticks: Records
    states: Records
    commands: Records
    system: SystemSamples | None = None
    health: dict[str, str] = field(default_factory=dict)
    n_lost: dict[str, int] = field(default_factory=dict)
    listener_s: float = 0.0
    sampler_s: float = 0.0
    wall_s: float = 0.0
    view_s: float = 0.0
    helper_s: float = 0.0
    failure: str | None = None
