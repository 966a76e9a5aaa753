"""How the policy process runs, and what it needs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from gwp_edge.chunking import Guidance
from gwp_edge.errors import SpecError
from gwp_edge.observe import ObservationLimits
from gwp_edge.robot_config import RobotConfig
from gwp_edge.spec import PolicySpec


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyOptions:
    """How the policy process runs.

    Attributes:
        factory: "module:function" that makes the policy.
        kwargs: its keyword arguments.
        guidance: how a new chunk follows the old one; its rows are set from the latency.
        latency_margin_ns: added to the p95 latency when rows are frozen.
        replan_hz: chunks per second at most; None for as many as possible.
        synchronous: plan only while the arm stands at the end of the last plan.
        limits: when an observation is too old; None takes the robot's.
        tap: where to hand every chunk to a recorder; None records nothing.
    """

    factory: str
    kwargs: Mapping[str, object] = field(default_factory=dict)
    guidance: Guidance = field(default_factory=Guidance)
    latency_margin_ns: int = 10_000_000
    replan_hz: float | None = None
    synchronous: bool = False
    limits: ObservationLimits | None = None
    tap: str | None = None

    def __post_init__(self) -> None:
        if self.replan_hz is not None and not 0 < self.replan_hz <= 1000:
            raise SpecError(f"replan rate: expected above 0 up to 1000 Hz, got {self.replan_hz}")


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicySetup:
    """What the process needs; crosses to it by pickle."""

    board: str
    spec: PolicySpec
    robot: RobotConfig
    supervisor_pid: int
    extra: dict[str, object] = field(default_factory=dict)
