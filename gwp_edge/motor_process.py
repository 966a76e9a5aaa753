"""The motor process: opens the arm, keeps the deadlines, and leaves the arm holding."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from gwp_edge.child_process import leave_terminal
from gwp_edge.clock import MonotonicClock
from gwp_edge.errors import DeviceError, GwpError, SpecError
from gwp_edge.mailbox import Board
from gwp_edge.motor import MotorLoop
from gwp_edge.motor_options import MotorOptions
from gwp_edge.preflight import check_arm
from gwp_edge.protocols import Arm
from gwp_edge.realtime import SPIN_NS, make_realtime
from gwp_edge.robot_config import RobotConfig
from gwp_edge.robot_limits import intersect_limits, park_pose
from gwp_edge.robots import create_arm
from gwp_edge.shared_memory import fence
from gwp_edge.spec import Channel, PolicySpec
from gwp_edge.status import EventKind, Mode, Request, Word
from gwp_edge.telemetry import CheckResult
from gwp_edge.types import FloatArray, JointLimits
from gwp_edge.workspace import Workspace, find_arms

logger = logging.getLogger(__name__)

_STEADY_AFTER_NS = 1_000_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class ArmSetup:
    """What a process needs to reach arm and board; crosses to it by pickle.

    Attributes:
        board: name of the shared board.
        spec: of the policy.
        robot: which arm, limits, park pose.
        extra: options that the world adds.
        supervisor_pid: its parent; when that goes, the arm stops.
    """

    board: str
    spec: PolicySpec
    robot: RobotConfig
    supervisor_pid: int
    extra: dict[str, object] = field(default_factory=dict)

    def attach(self) -> Board:
        """Open the board."""
        return Board.attach(self.board, self.spec.n_channels, self.spec.n_rows)


class _Interrupted(BaseException):
    """SIGTERM came while the arm was opened. Not an error that a driver might try to mend."""


class _Life:
    """Whether this process is asked to end: a signal, or its parent is gone."""

    def __init__(self, supervisor_pid: int) -> None:
        self._supervisor_pid = supervisor_pid
        self._terminated = self._is_opening = False
        leave_terminal(self._on_terminate)

    def _on_terminate(self) -> None:
        self._terminated = True
        if self._is_opening:
            self._is_opening = False
            raise _Interrupted

    def open(self, arm: Arm, *, enable: bool) -> None:
        """Open ``arm``, unless SIGTERM comes first.

        A driver looks at nothing of the run while it powers motor after motor, for seconds.

        Raises:
            DeviceError: as the driver says.
            _Interrupted: it was broken off; the arm is closed.
        """
        self._is_opening = True
        try:
            if not self._terminated:
                arm.open(enable=enable)
        except BaseException:
            self._is_opening = False
            arm.close()
            raise
        self._is_opening = False
        if self._terminated:
            arm.close()
            raise _Interrupted

    @property
    def over(self) -> bool:
        return self._terminated or os.getppid() != self._supervisor_pid


class _Teller(logging.Handler):
    """Hands a driver's warnings to the run, where a person sees them. Threads: the main one."""

    def __init__(self, say: Callable[[EventKind, str], None]) -> None:
        super().__init__(logging.WARNING)
        self._say = say

    def emit(self, record: logging.LogRecord) -> None:
        self._say(EventKind.WARNING, record.getMessage())


def motor_main(setup: ArmSetup, options: MotorOptions) -> None:
    """Run the motor process to its end; exits with 1 when something failed."""
    life = _Life(setup.supervisor_pid)
    board = setup.attach()
    say = board.events["motor"].say
    logging.getLogger("gwp_edge").addHandler(_Teller(say))
    arm: Arm | None = None
    try:
        arm = create_arm(setup.robot, setup.spec, setup.extra)
        _run(arm, board, setup, options, life)
    except _Interrupted:
        say(EventKind.INFO, "stopped while the arm was opened")
    except GwpError as e:
        say(EventKind.ERROR, str(e))
        board.words[Word.MOTOR_MODE] = int(Mode.FAULT)
        sys.exit(1)
    except Exception as e:  # a bug; the arm was stopped by _run, the traceback goes to stderr
        say(EventKind.ERROR, f"motor process: {type(e).__name__}: {e}")
        raise
    finally:
        # MOTOR_ARMED stays on where the arm may still be moving: the guardian then takes over.
        if arm is not None:
            arm.close()
        board.words[Word.MOTOR_ENDED] = 1
        board.close()


def _run(arm: Arm, board: Board, setup: ArmSetup, options: MotorOptions, life: _Life) -> None:
    words, clock = board.words, MonotonicClock(spin_ns=SPIN_NS)
    life.open(arm, enable=False)
    _say_check(board, check_arm(arm.state()))
    limits = intersect_limits(arm.limits, setup.robot.limits, arm.channels)
    park = park_pose(setup.robot, arm.channels)
    if park is not None:
        _check_park(park, limits, arm.channels)
    workspace = find_arms(setup.robot.workspace, arm.channels, setup.robot.arm.kind)
    if workspace:
        _check_workspace(Workspace(workspace, ()), arm.state().position, park, board)
    # Whoever sees the mode must find every check's line, failed ones above all.
    fence()
    words[Word.MOTOR_MODE] = int(Mode.CONNECTED)
    if not _await_enable(arm, board, clock, options, life):
        return
    # Locking memory takes a tenth of a second, in which an open bus would fill up unread.
    arm.close()
    warnings = make_realtime(priority=options.priority, cpu=options.cpu, scheduler=options.realtime)
    for warning in warnings:
        board.events["motor"].say(EventKind.WARNING, warning)
    words[Word.MOTOR_POWERING] = int(not options.dry_run)
    life.open(arm, enable=not options.dry_run)
    loop = MotorLoop(arm, board, clock, options, limits=limits, park=park, workspace=workspace)
    loop.begin(arm.state())
    words[Word.MOTOR_HEARTBEAT_NS] = clock.now_ns()
    words[Word.MOTOR_ARMED] = int(not options.dry_run)
    try:
        _keep_deadlines(loop, board, clock, options, life)
    except Exception:
        _brake(loop, clock, options)
        words[Word.MOTOR_ARMED] = 0
        raise
    # Nothing moves any more: what was sent last is a pose to hold.
    words[Word.MOTOR_ARMED] = 0


def _check_park(park: FloatArray, limits: JointLimits, channels: Sequence[Channel]) -> None:
    """Refuse a pose that no command may reach: parking would never end.

    Raises:
        SpecError: names the channel and its range.
    """
    for channel, q, low, high in zip(
        channels, park, limits.position_min, limits.position_max, strict=True
    ):
        if not low <= q <= high:
            raise SpecError(
                f"park pose: {channel.name} is {q:g}, allowed {low:.4f} to {high:.4f}; correct "
                "[park] in the robot file"
            )


def _check_workspace(
    workspace: Workspace, position: FloatArray, park: FloatArray | None, board: Board
) -> None:
    """Say whether every tool is inside; before the arm is enabled.

    Raises:
        SpecError: the park pose is outside.
    """
    outside = workspace.outside(park.tolist()) if park is not None else None
    if outside is not None:
        raise SpecError(f"in the park pose {outside}; correct the robot file")
    outside = workspace.outside(position.tolist())
    where = "every tool is inside of its box"
    advice = "; move the arm inside by hand or widen [workspace]"
    detail = where if outside is None else outside + advice
    _say_check(board, CheckResult(name="workspace", passed=outside is None, detail=detail))


def _say_check(board: Board, result: CheckResult) -> None:
    kind = EventKind.CHECK_PASSED if result.passed else EventKind.CHECK_FAILED
    board.events["motor"].say(kind, f"{result.name}: {result.detail}")


def _await_enable(
    arm: Arm, board: Board, clock: MonotonicClock, options: MotorOptions, life: _Life
) -> bool:
    """Publish states until enabling is asked for; return False when the end is."""
    words = board.words
    t_ns = clock.now_ns()
    while True:
        state = arm.state()
        if state.fault is not None:
            raise DeviceError(state.fault)
        board.publish_state(state)
        words[Word.MOTOR_HEARTBEAT_NS] = clock.now_ns()
        request = board.request
        if request >= Request.PARK or life.over:
            return False
        # Nothing else enables: a hold that is asked for before the start is no reason to power.
        if request in (Request.ENABLE, Request.RUN):
            return True
        t_ns = max(t_ns + options.period_ns, clock.now_ns())
        clock.sleep_until_ns(t_ns)


def _keep_deadlines(
    loop: MotorLoop, board: Board, clock: MonotonicClock, options: MotorOptions, life: _Life
) -> None:
    period_ns, words = options.period_ns, board.words
    t_ns = clock.now_ns()
    t_steady_ns = t_ns + _STEADY_AFTER_NS
    while loop.tick(t_ns):
        if life.over:
            loop.stop()
        t_ns += period_ns
        behind_ns = clock.now_ns() - t_ns
        if behind_ns > period_ns:
            # Catching up by a burst of ticks would move the arm faster than planned.
            if t_ns > t_steady_ns:
                words[Word.MOTOR_N_MISSED] += behind_ns // period_ns
            t_ns += behind_ns
        clock.sleep_until_ns(t_ns)


def _brake(loop: MotorLoop, clock: MonotonicClock, options: MotorOptions) -> None:
    """Bring the arm to rest after a bug in the loop, with nothing but limiter and driver."""
    t_ns = clock.now_ns()
    while loop.emergency():
        t_ns += options.period_ns
        clock.sleep_until_ns(t_ns)
