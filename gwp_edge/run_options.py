"""What a run is asked for, and what it shows of itself while it goes on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from gwp_edge.errors import SpecError
from gwp_edge.motor_options import MotorOptions
from gwp_edge.operator_input import Key
from gwp_edge.policy_options import PolicyOptions
from gwp_edge.robot_config import RobotConfig
from gwp_edge.spec import PolicySpec
from gwp_edge.status import Event, HoldReason, Mode, PolicyPhase

# Silence of less than so many motor periods is not a sign of anything.
_GUARDED_PERIODS = 1.5
# Whoever put the camera's plug back in may have a hand there still, and is asked for a key.
OPERATOR_RESUME_S = 3.0


@dataclass(frozen=True, slots=True, kw_only=True)
class RunOptions:
    """Everything about one run.

    Attributes:
        spec: of the policy, as read from its bundle.
        robot: which robot.
        policy: how to make and run the policy.
        motor: how to run the motor process; its ``synchronous`` must equal the policy's.
        duration_s: time from the first motion to the end; None runs until told to stop.
        guardian: run the guardian process where the arm allows a second connection.
        guardian_timeout_s: silence of the motor loop after which the guardian takes over.
        start_timeout_s: time for loading, connecting and checks.
        recover_timeout_s: a hold that does not end by then ends the run, if nobody is there.
        interactive: an operator watches: holds wait for a key, also those that end by themselves
            once they have lasted for ``OPERATOR_RESUME_S``.
        skip_checks: names of preflight checks whose failure is reported and ignored.
        record: new folder to record the run to; None records nothing.
    """

    spec: PolicySpec
    robot: RobotConfig
    policy: PolicyOptions
    motor: MotorOptions = field(default_factory=MotorOptions)
    duration_s: float | None = None
    guardian: bool = True
    guardian_timeout_s: float = 0.05
    start_timeout_s: float = 300.0
    recover_timeout_s: float = 10.0
    interactive: bool = False
    skip_checks: frozenset[str] = frozenset()
    record: Path | None = None

    def __post_init__(self) -> None:
        if self.duration_s is not None and not self.duration_s > 0:
            raise SpecError(f"duration: expected a positive time, got {self.duration_s} s")
        if self.motor.synchronous != self.policy.synchronous:
            raise SpecError("synchronous execution concerns policy and motor process alike")
        for name in ("guardian_timeout_s", "start_timeout_s", "recover_timeout_s"):
            if not getattr(self, name) > 0:
                raise SpecError(f"{name}: expected a positive time, got {getattr(self, name)}")
        least_s = _GUARDED_PERIODS * self.motor.period_ns / 1e9
        if self.is_guarded and self.guardian_timeout_s < least_s:
            raise SpecError(
                f"motor rate: at {self.motor.rate_hz:g} Hz the guardian, which takes over after "
                f"{self.guardian_timeout_s * 1e3:g} ms of silence, would not wait for the next "
                f"tick; expected at least {_GUARDED_PERIODS / self.guardian_timeout_s:g} Hz"
            )

    @property
    def is_guarded(self) -> bool:
        """Whether a guardian process watches the motor process: the arm takes two connections."""
        return self.guardian and self.robot.arm.guardian and not self.motor.dry_run


@dataclass(frozen=True, slots=True, kw_only=True)
class RunStatus:
    """What a display or a test may want to know, about 20 times a second."""

    mode: Mode
    hold_reason: HoldReason
    phase: PolicyPhase
    run_s: float
    n_chunks: int
    n_ticks: int
    n_missed: int
    events: tuple[Event, ...]
    motor_pid: int
    policy_pid: int
    guardian_pid: int


StatusCallback = Callable[[RunStatus], None]
KeySource = Callable[[], Key | None]
