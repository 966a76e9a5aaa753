"""The supervisor of a run: starts its processes, watches them, and ends every run with a hold."""

from __future__ import annotations

import logging
import time
from contextlib import ExitStack
from multiprocessing.process import BaseProcess
from typing import Final

from gwp_edge.errors import DeviceError
from gwp_edge.mailbox import Board
from gwp_edge.operator_input import Key, SignalInput
from gwp_edge.preflight import check_memory
from gwp_edge.preflight_machine import check_machine
from gwp_edge.protocols import World
from gwp_edge.run_monitor import RunMonitor
from gwp_edge.run_options import KeySource, RunOptions, StatusCallback
from gwp_edge.run_processes import RunProcesses
from gwp_edge.run_report import Findings
from gwp_edge.status import HoldReason, Mode, PolicyPhase, Request, Word

logger = logging.getLogger(__name__)

_POLL_S: Final = 0.01
# Time to brake, and to let go of what is pressed on at the slow speed of an approach.
_STOP_TIMEOUT_S: Final = 8.0
_PARK_TIMEOUT_S: Final = 60.0
# An inference that takes longer, while the arm waits for it, is one that hangs.
_PLAN_TIMEOUT_S: Final = 60.0
_JOIN_TIMEOUT_S: Final = 3.0
_GUARDIAN_TIMEOUT_S: Final = 2.0
# The guardian looks every 5 ms. After a stall of the whole machine it may come second.
_GUARDIAN_SILENT_S: Final = 0.5
_GUARDIAN_SILENT_TURNS: Final = 20


class Supervisor:
    """One run. Threads: one owner, the main thread of the main process."""

    def __init__(
        self,
        options: RunOptions,
        board: Board,
        world: World | None,
        findings: Findings,
        on_status: StatusCallback | None,
        keys: KeySource | None,
        signals: SignalInput,
    ) -> None:
        self._options = options
        self._board = board
        self._words = board.words
        self._world = world
        self._findings = findings
        self._keys = keys
        self._signals = signals
        self._processes = RunProcesses(options, board)
        self._monitor = RunMonitor(board, self._processes, findings, on_status)
        self._t_hold_s: float | None = None
        self._n_guardian_silent = 0
        self._hold_first = self._has_interrupted = False

    def run(self) -> None:
        """Start, watch, end."""
        # Whatever fails on the way, each of these still happens, and in this order from the last.
        with ExitStack() as stack:
            if self._world is not None:
                stack.callback(self._world.close)
            stack.callback(self._end_processes)
            stack.callback(self._stop_arm)
            try:
                self._start()
                if self._prepare():
                    self._watch()
            except DeviceError as e:
                self._findings.end("fault", str(e))

    # Start

    def _start(self) -> None:
        extra = self._world.start() if self._world is not None else {}
        if not self._processes.start(extra) and not self._options.motor.dry_run:
            self._findings.note_fault("no guardian: a killed motor process leaves its last target")
        for result in (check_memory(), *check_machine(self._options.robot)):
            self._monitor.take_check(result)

    def _prepare(self) -> bool:
        """Wait for checks and connections, then enable; return False when the run is over."""
        deadline_s = time.monotonic() + self._options.start_timeout_s
        while self._hold_first or not self._is_ready():
            if not self._step():
                return False
            if self._hold_first and self._is_ready():
                continue  # somebody pressed space: enter begins
            if time.monotonic() > deadline_s:
                self._findings.end(
                    "fault",
                    f"not ready after {self._options.start_timeout_s:.0f} s: policy "
                    f"{PolicyPhase(self._words[Word.POLICY_PHASE]).name.lower()}, motor "
                    f"{Mode(self._words[Word.MOTOR_MODE]).name.lower()}",
                )
                return False
        # The last lines were written before the word that ended the wait, and may be unread still.
        self._monitor.collect()
        if self._findings.ended:
            return False  # what shows the run failed over them: nothing is powered
        names = {c.name for c in self._findings.checks}
        unknown = sorted(self._options.skip_checks - names)
        if unknown:
            text = f"no check is called {', '.join(unknown)}; they are {', '.join(sorted(names))}"
            self._findings.end("refused", f"checks to skip: {text}")
            return False
        failed = [c for c in self._findings.checks if not c.passed]
        refusing = [c for c in failed if c.name not in self._options.skip_checks]
        if refusing:
            text = "; ".join(f"{c.name}: {c.detail}" for c in refusing)
            self._findings.end("refused", f"preflight failed, nothing moved: {text}")
            return False
        self._board.ask(Request.RUN)
        return True

    def _is_ready(self) -> bool:
        words = self._words
        return (
            words[Word.POLICY_PHASE] == PolicyPhase.READY
            and words[Word.MOTOR_MODE] == Mode.CONNECTED
            and (self._processes.guardian is None or words[Word.GUARDIAN_READY] == 1)
        )

    # Watch

    def _watch(self) -> None:
        duration_s = self._options.duration_s
        while self._step():
            mode = Mode(self._words[Word.MOTOR_MODE])
            now_s = time.monotonic()
            if duration_s is not None and now_s - (self._findings.t_run_s or now_s) >= duration_s:
                self._end_by_duration(mode, duration_s)
                return
            if self._hold_lasts_too_long(mode, now_s):
                return

    def _end_by_duration(self, mode: Mode, duration_s: float) -> None:
        reason = HoldReason(self._words[Word.MOTOR_HOLD_REASON])
        if mode is Mode.HOLD and reason is not HoldReason.OPERATOR:
            text = self._findings.last_fault or reason.name.lower().replace("_", " ")
            self._findings.end("held", f"{duration_s:g} s were over while holding: {text}")
        else:
            self._findings.end("duration", f"ran for {duration_s:g} s")

    def _hold_lasts_too_long(self, mode: Mode, now_s: float) -> bool:
        """End a run that holds for good, or never gets going, when nobody is there to help."""
        waits = mode in (Mode.HOLD, Mode.ENABLED) or self._waits_for_plan(mode)
        reason = HoldReason(self._words[Word.MOTOR_HOLD_REASON])
        if not waits or reason is HoldReason.OPERATOR or self._options.interactive:
            self._t_hold_s = None
            return False
        if self._t_hold_s is None:
            self._t_hold_s = now_s
        timeout_s = self._options.recover_timeout_s
        if mode is Mode.RUN:
            timeout_s = max(timeout_s, _PLAN_TIMEOUT_S)
        # A hold that only a person may end has nobody to wait for.
        if mode is Mode.HOLD and not reason.ends_by_itself and self._words[Word.MOTOR_STANDING]:
            timeout_s = 0.0
        if now_s - self._t_hold_s < timeout_s:
            return False
        self._monitor.collect()  # the hold's reason may be said only now
        text = self._findings.last_fault or "no usable plan came"
        if mode is Mode.RUN:  # it waits for a plan, and whatever was said last is another story
            text = f"no plan for {timeout_s:.0f} s, the policy hangs; the arm stands"
        self._findings.end("held", text)
        return True

    def _waits_for_plan(self, mode: Mode) -> bool:
        """Whether the arm stands at the end of its plan, as it does between synchronous ones."""
        words = self._words
        is_at_end = words[Word.MOTOR_PLAN_ENDED] and words[Word.MOTOR_STANDING]
        return mode is Mode.RUN and bool(is_at_end)

    def _step(self) -> bool:
        """Do one turn of the watch; return False when the run is to end."""
        self._turn()
        ended = (
            self._findings.ended
            # First: the motor process may have ended because of one already.
            or self._see_signals()
            or self._see_processes()
            or self._see_fault()
            or self._see_guardian()
            or self._see_key()
        )
        if not ended and self._world is not None:
            self._world.check()
        return not ended

    def _turn(self) -> None:
        time.sleep(_POLL_S)
        self._words[Word.SUPERVISOR_HEARTBEAT_NS] = time.monotonic_ns()
        self._monitor.collect()
        # After that: what was shown as moving has moved, whatever ends it now.
        is_moving = self._words[Word.MOTOR_MODE] in (Mode.APPROACH, Mode.RUN)
        if self._findings.t_run_s is None and is_moving:
            self._findings.t_run_s = time.monotonic()

    def _see_processes(self) -> bool:
        ended = self._processes.ended()
        if ended is None:
            return False
        name, code = ended
        # A line that the process wrote just before its end says more than the exit code.
        time.sleep(_POLL_S)
        self._monitor.collect()
        if name == "motor" and code == 0 and self._words[Word.MOTOR_ENDED]:
            if self._words[Word.GUARDIAN_TRIPPED_NS] or self._is_in_fault():
                self._findings.end("fault", self._fault_text())
            else:
                self._findings.end("terminated", "the motor process was asked to stop")
            return True
        how = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
        said = self._findings.last_fault
        text = f"the {name} process {how}" + (f": {said}" if said else "")
        self._findings.end("crashed" if code < 0 or not said else "fault", text)
        return True

    def _is_in_fault(self) -> bool:
        return self._words[Word.MOTOR_MODE] == Mode.FAULT

    def _fault_text(self) -> str:
        return self._findings.last_fault or "the arm reported a fault"

    def _see_fault(self) -> bool:
        if not (self._words[Word.GUARDIAN_TRIPPED_NS] or self._is_in_fault()):
            return False
        # The process writes its line before or after its mode; give it a moment.
        time.sleep(_POLL_S)
        self._monitor.collect()
        motor = self._processes.motor
        if motor is not None and motor.exitcode not in (None, 0):
            return self._see_processes()
        self._findings.end("fault", self._fault_text())
        return True

    def _see_guardian(self) -> bool:
        """End a run whose guardian hangs: one that died is seen by its exit code."""
        words = self._words
        if not words[Word.GUARDIAN_READY] or words[Word.GUARDIAN_TRIPPED_NS]:
            return False
        silent_s = (time.monotonic_ns() - words[Word.GUARDIAN_HEARTBEAT_NS]) / 1e9
        limit_s = max(_GUARDIAN_SILENT_S, 10.0 * self._options.guardian_timeout_s)
        self._n_guardian_silent = self._n_guardian_silent + 1 if silent_s > limit_s else 0
        if self._n_guardian_silent < _GUARDIAN_SILENT_TURNS:
            return False
        self._findings.end(
            "fault",
            f"the guardian is silent for {silent_s:.1f} s: without it nobody would hold the arm "
            "if the motor process died",
        )
        return True

    def _see_signals(self) -> bool:
        signals = self._signals
        if signals.n_estops:
            self._board.ask(Request.STOP_NOW)
            self._findings.end("estop", "stopped by the external e-stop signal")
        elif signals.n_interrupts:
            self._findings.end("interrupted", "interrupted")
        elif signals.n_terminates:
            self._findings.end("terminated", "asked to terminate")
        return self._findings.ended

    def _see_key(self) -> bool:
        key = self._keys() if self._keys is not None else None
        if key is Key.QUIT:
            self._board.ask(Request.PARK)
            self._findings.end("parked", "parked by the operator")
            return True
        if self._words[Word.REQUEST] < Request.RUN:
            # Nothing is enabled before the checks are done, whatever is pressed.
            self._hold_first = key is Key.HOLD or (self._hold_first and key is not Key.RESUME)
            if key is Key.HOLD:
                logger.warning("held before the first motion: enter begins")
        elif key is Key.HOLD:
            self._board.ask(Request.HOLD)
        elif key is Key.RESUME and self._words[Word.REQUEST] in (Request.HOLD, Request.RUN):
            self._words[Word.RESUME_COUNT] += 1
            self._words[Word.REQUEST] = int(Request.RUN)
        return False

    # End

    def _stop_arm(self) -> None:
        """Ask for the end and wait until the arm stands; signals and space still brake harder."""
        motor = self._processes.motor
        if motor is None:
            return
        if self._board.request < Request.PARK:
            self._board.ask(Request.STOP)
        parking = self._board.request == Request.PARK
        # Parking is slow on purpose; a stop is not.
        deadline_s = time.monotonic() + (_PARK_TIMEOUT_S if parking else _STOP_TIMEOUT_S)
        while motor.exitcode is None:
            self._interrupt_opening(motor)
            self._turn()
            tripped = bool(self._words[Word.GUARDIAN_TRIPPED_NS])
            if tripped:
                deadline_s = min(deadline_s, time.monotonic() + _JOIN_TIMEOUT_S)
            self._see_stop_of_end()
            is_late = time.monotonic() >= deadline_s
            if is_late and (tripped or not parking):
                break
            if is_late:
                self._board.ask(Request.STOP)
                self._findings.fail(
                    "held",
                    f"the arm did not reach its park pose within {_PARK_TIMEOUT_S:.0f} s; is a "
                    "wall of [workspace] in between?",
                )
            if parking and self._board.request != Request.PARK:
                parking = False
                deadline_s = time.monotonic() + _STOP_TIMEOUT_S
        self._monitor.collect()
        if self._is_in_fault():  # on the way to a good end
            self._findings.fail("fault", self._fault_text())
        elif parking and self._words[Word.MOTOR_MODE] == Mode.HOLD and self._options.robot.park:
            why = self._findings.last_fault or "something stopped it"
            self._findings.fail("held", f"not parked: {why}")
        if motor.exitcode is None:
            # It hangs. Killing it is what the guardian waits for.
            self._findings.fail("crashed", "the motor process did not stop in time and was killed")
            motor.kill()
        elif motor.exitcode < 0:
            self._findings.fail("crashed", f"the motor process was killed ({-motor.exitcode})")
        self._await_guardian()
        self._note_standing()

    def _interrupt_opening(self, motor: BaseProcess) -> None:
        """Break off the opening of the arm, so that no further motor gets power."""
        opens = self._words[Word.MOTOR_MODE] < Mode.ENABLED and not self._words[Word.MOTOR_ENDED]
        if opens and not self._has_interrupted and self._board.request >= Request.STOP:
            # Once: in a process that ends, the second one finds no handler any more.
            self._has_interrupted = True
            motor.terminate()

    def _see_stop_of_end(self) -> None:
        """Take the e-stop, Ctrl-C and space while the arm is parked or stopped."""
        signals = self._signals
        if signals.n_estops:
            self._board.ask(Request.STOP_NOW)
            self._findings.fail("estop", "stopped by the external e-stop signal")
        elif signals.n_interrupts > 1:
            self._board.ask(Request.STOP_NOW)
            self._findings.end("interrupted", "interrupted twice: immediate hold")
        elif signals.n_interrupts:
            self._board.ask(Request.STOP)
            self._findings.end("interrupted", "interrupted")
        elif signals.n_terminates:
            self._board.ask(Request.STOP)
            self._findings.end("terminated", "asked to terminate")
        key = self._keys() if self._keys is not None else None
        if key is Key.HOLD and self._board.request == Request.PARK:
            self._board.ask(Request.STOP)
            self._findings.fail("held", "the operator stopped the parking")

    def _await_guardian(self) -> None:
        guardian = self._processes.guardian
        deadline_s = time.monotonic() + _GUARDIAN_TIMEOUT_S
        # ARMED is left on by a motor process that died; then the guardian's hold is to come.
        while guardian is not None and guardian.exitcode is None and time.monotonic() < deadline_s:
            if not self._words[Word.MOTOR_ARMED] and not self._words[Word.GUARDIAN_TRIPPED_NS]:
                break
            time.sleep(_POLL_S / 2)
            self._monitor.collect()
        self._words[Word.GUARDIAN_STOP] = 1

    def _note_standing(self) -> None:
        words, findings = self._words, self._findings
        if words[Word.GUARDIAN_HOLD_SENT_NS]:
            findings.standing = "the guardian sent hold; the arm holds its measured pose"
        elif words[Word.MOTOR_ARMED] or words[Word.GUARDIAN_TRIPPED_NS]:
            findings.fail("crashed", "the motor process died")
            findings.standing = "NOBODY HOLDS THE ARM: it follows its last target; use the e-stop"
        elif words[Word.MOTOR_N_TICKS] and not self._options.motor.dry_run:
            findings.standing = "the arm stands and holds"
        elif words[Word.MOTOR_POWERING]:
            findings.standing = (
                "the start was broken off: motors that have power by now hold their pose, support "
                "the arm before you switch it off"
            )
        else:
            findings.standing = "the arm was not moved"

    def _end_processes(self) -> None:
        self._processes.end()
        self._monitor.close()
        self._monitor.collect()
