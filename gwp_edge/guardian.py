"""The guardian process: if the motor process dies or hangs, the arm is told to hold.

It does nothing else, so that nothing else can stop it. It keeps its own connection to the arm and
latches: once it has acted, it never gives the arm back within this run.
"""

from __future__ import annotations

import contextlib
import logging
import os
import select
import sys

from gwp_edge.child_process import leave_terminal
from gwp_edge.clock import MonotonicClock
from gwp_edge.errors import DeviceError, GwpError
from gwp_edge.mailbox import Board
from gwp_edge.motor_process import ArmSetup
from gwp_edge.protocols import Arm
from gwp_edge.realtime import make_realtime
from gwp_edge.robots import create_arm
from gwp_edge.status import EventKind, Word

logger = logging.getLogger(__name__)

_POLL_MS = 5
_RESEND_NS = 10_000_000
_RESEND_FOR_NS = 500_000_000


def guardian_main(setup: ArmSetup, *, timeout_ns: int, realtime: bool, priority: int) -> None:
    """Watch the motor process until told to end; exits with 1 when the arm is out of reach."""
    # Only the supervisor ends the guardian: a terminal or a service manager that signals every
    # process must not take the net away first.
    leave_terminal()
    board = setup.attach()
    say = board.events["guardian"].say
    arm: Arm | None = None
    try:
        arm = create_arm(setup.robot, setup.spec, setup.extra)
        arm.open(enable=False)
        for warning in make_realtime(priority=priority, cpu=None, scheduler=realtime):
            say(EventKind.WARNING, f"guardian: {warning}")
        _watch(arm, board, setup.supervisor_pid, timeout_ns)
    except GwpError as e:
        say(EventKind.ERROR, f"guardian: {e}")
        sys.exit(1)
    finally:
        if arm is not None:
            arm.close()
        board.close()


def _watch(arm: Arm, board: Board, supervisor_pid: int, timeout_ns: int) -> None:
    words, clock = board.words, MonotonicClock()
    poller = select.poll()
    pid_fd: int | None = None
    n_silent = 0
    words[Word.GUARDIAN_READY] = 1
    try:
        while not words[Word.GUARDIAN_STOP]:
            now_ns = clock.now_ns()
            words[Word.GUARDIAN_HEARTBEAT_NS] = now_ns
            is_dead = False
            if words[Word.MOTOR_ARMED]:
                if pid_fd is None:
                    pid_fd = _open_pid(words[Word.MOTOR_PID])
                    is_dead = pid_fd is None
                    if pid_fd is not None:
                        poller.register(pid_fd, select.POLLIN)
                silent_ns = now_ns - words[Word.MOTOR_HEARTBEAT_NS]
                # Twice in a row: after a stall of the whole machine the motor may come second.
                n_silent = n_silent + 1 if silent_ns > timeout_ns else 0
                if n_silent > 1:
                    _take_over(arm, board, f"the motor loop is silent for {silent_ns / 1e6:.0f} ms")
                    return
            elif os.getppid() != supervisor_pid:
                return  # nobody left to watch over
            # Reading drains the socket, so that the pose is fresh when it is needed. Its errors
            # are the motor process's to report; here they matter only when it comes to hold.
            with contextlib.suppress(DeviceError):
                arm.state()
            is_dead = is_dead or bool(poller.poll(_POLL_MS))
            if is_dead and words[Word.MOTOR_ARMED]:
                _take_over(arm, board, "the motor process died")
                return
    finally:
        if pid_fd is not None:
            os.close(pid_fd)


def _take_over(arm: Arm, board: Board, why: str) -> None:
    """Send hold at once, again for a while, and stay until the supervisor has seen it."""
    words, clock, say = board.words, MonotonicClock(), board.events["guardian"].say
    t_tripped_ns = clock.now_ns()
    words[Word.GUARDIAN_TRIPPED_NS] = t_tripped_ns
    t_ns, n_failed = t_tripped_ns, 0
    while True:
        try:
            arm.hold()
            if not words[Word.GUARDIAN_HOLD_SENT_NS]:
                words[Word.GUARDIAN_HOLD_SENT_NS] = clock.now_ns()
                say(EventKind.ERROR, f"{why}; the guardian sent hold")
        except DeviceError as e:
            n_failed += 1
            if n_failed == 1:
                say(EventKind.ERROR, f"{why}, and the guardian cannot hold the arm: {e}")
        t_ns += _RESEND_NS
        if t_ns - t_tripped_ns > _RESEND_FOR_NS:
            return
        clock.sleep_until_ns(t_ns)


def _open_pid(pid: int) -> int | None:
    try:
        return os.pidfd_open(pid)
    except ProcessLookupError:
        return None  # dead and buried already
    except OSError as e:
        raise DeviceError(f"cannot watch the motor process {pid}: {e.strerror}") from e
