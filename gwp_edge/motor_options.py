"""How the motor process runs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from gwp_edge.errors import SpecError
from gwp_edge.schedule import Blend

_MOST_LEAD_NS: Final = 1_000_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class MotorOptions:
    """How the motor process runs.

    Attributes:
        rate_hz: ticks per second.
        lead_ns: how far ahead of the present the plan is read: the arm's own lag.
        blend: how chunks follow each other.
        synchronous: chunks start when they arrive; a plan that is used up waits for the next.
        approach_rad_s: speed limit on the way from a hold to the plan and to the park pose.
        approach_m_s: likewise for channels in metres.
        dry_run: everything but sending; the arm is never enabled.
        feedback_warn_ns: older feedback is reported.
        feedback_hold_ns: older feedback stops the arm.
        feedback_fault_ns: older feedback ends the run.
        resume_ns: a hold that ends by itself does so within this time, later a person must agree;
            None where nobody is there to ask.
        unwatched_ns: without a sign of life from the supervisor for this long, the arm is stopped.
        refuse_far: refuse plans far outside the position limits; false clips them, for simulated
            arms only.
        realtime: ask for SCHED_FIFO and locked memory.
        priority: of SCHED_FIFO.
        cpu: core to stay on.
    """

    rate_hz: float = 200.0
    lead_ns: int = 0
    blend: Blend = "seam"
    synchronous: bool = False
    approach_rad_s: float = 0.3
    approach_m_s: float = 0.05
    dry_run: bool = False
    feedback_warn_ns: int = 20_000_000
    feedback_hold_ns: int = 100_000_000
    feedback_fault_ns: int = 500_000_000
    resume_ns: int | None = 3_000_000_000
    unwatched_ns: int = 2_000_000_000
    refuse_far: bool = True
    realtime: bool = True
    priority: int = 80
    cpu: int | None = None

    def __post_init__(self) -> None:
        if not 10.0 <= self.rate_hz <= 2000.0:
            raise SpecError(f"motor rate: expected 10 to 2000 Hz, got {self.rate_hz}")
        if not 0 <= self.lead_ns <= _MOST_LEAD_NS:
            raise SpecError(f"lead: expected 0 to 1000 ms, got {self.lead_ns / 1e6:g} ms")
        if not (self.approach_rad_s > 0 and self.approach_m_s > 0):
            raise SpecError("approach speed must be positive")
        if not 0 < self.feedback_warn_ns <= self.feedback_hold_ns <= self.feedback_fault_ns:
            raise SpecError("feedback ages: expected 0 < warn <= hold <= fault")
        for name in ("resume_ns", "unwatched_ns"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise SpecError(f"{name}: expected a positive time, got {value}")
        if not 1 <= self.priority <= 99:
            raise SpecError(f"priority: expected 1 to 99, got {self.priority}")

    def feedback_ages_ns(self, feedback_period_ns: int) -> tuple[int, int, int]:
        """Return at which age feedback is reported, stops the arm, and ends the run, ns.

        Args:
            feedback_period_ns: how often the arm is read; 3, 10 and 25 of it where that is more.
        """
        return (
            max(self.feedback_warn_ns, 3 * feedback_period_ns),
            max(self.feedback_hold_ns, 10 * feedback_period_ns),
            max(self.feedback_fault_ns, 25 * feedback_period_ns),
        )

    @property
    def period_ns(self) -> int:
        """Time between ticks, ns."""
        return round(1e9 / self.rate_hz)
