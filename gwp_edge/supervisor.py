"""The supervisor of a run: starts its processes, watches them, and ends every run with a hold."""

from __future__ import annotations

import logging
import multiprocessing
import multiprocessing.process
import os
import signal
import time
from collections.abc import Callable, Mapping
from typing import Final

from gwp_edge.errors import DeviceError
from gwp_edge.guardian import guardian_main
from gwp_edge.mailbox import Board
from gwp_edge.motor_process import ArmSetup, motor_main
from gwp_edge.operator_input import Key, SignalInput
from gwp_edge.policy_process import PolicySetup, policy_main
from gwp_edge.preflight import check_memory
from gwp_edge.preflight_machine import check_machine
from gwp_edge.protocols import World
from gwp_edge.run_options import KeySource, RunOptions, RunStatus, StatusCallback
from gwp_edge.run_report import Findings
from gwp_edge.status import Event, EventKind, HoldReason, Mode, PolicyPhase, Request, Word
from gwp_edge.telemetry import CheckResult

logger = logging.getLogger(__name__)

_POLL_S: Final = 0.01
_STOP_TIMEOUT_S: Final = 5.0
_PARK_TIMEOUT_S: Final = 60.0
_JOIN_TIMEOUT_S: Final = 3.0
_GUARDIAN_TIMEOUT_S: Final = 2.0
_END_TIMEOUT_S: Final = 2.0


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
    ) -> None:
        self._options = options
        self._board = board
        self._words = board.words
        self._world = world
        self._findings = findings
        self._on_status = on_status
        self._keys = keys
        self.signals: SignalInput | None = None
        self._processes: dict[str, multiprocessing.process.BaseProcess] = {}
        self._t_run_s: float | None = None
        self._t_hold_s: float | None = None
        self._t_status_s = 0.0
        self._n_interrupts = 0

    def run(self) -> None:
        """Start, watch, end."""
        try:
            self._start()
            if self._prepare():
                self._watch()
        except DeviceError as e:
            self._findings.end("fault", str(e))
        finally:
            self._stop_arm()
            self._end_processes()
            if self._world is not None:
                self._world.close()

    # Start

    def _start(self) -> None:
        options = self._options
        extra: Mapping[str, object] = self._world.start() if self._world is not None else {}
        common = {
            "board": self._board.name,
            "spec": options.spec,
            "robot": options.robot,
            "supervisor_pid": os.getpid(),
            "extra": dict(extra),
        }
        self._words[Word.SUPERVISOR_PID] = os.getpid()
        arm_setup = ArmSetup(**common)  # type: ignore[arg-type]  # a dict forgets the types
        if options.guardian and options.robot.arm.guardian and not options.motor.dry_run:
            self._spawn(
                "guardian",
                guardian_main,
                (arm_setup,),
                {
                    "timeout_ns": round(options.guardian_timeout_s * 1e9),
                    "realtime": options.motor.realtime,
                    "priority": max(1, options.motor.priority - 10),
                },
            )
        elif not options.motor.dry_run:
            self._findings.note_fault("no guardian: a killed motor process leaves its last target")
        motor = self._spawn("motor", motor_main, (arm_setup, options.motor), {})
        self._words[Word.MOTOR_PID] = motor.pid or 0
        policy_setup = PolicySetup(**common)  # type: ignore[arg-type]
        self._spawn("policy", policy_main, (policy_setup, options.policy), {})
        for result in (check_memory(), *check_machine(options.robot)):
            self._take_check(result)

    def _spawn(
        self,
        name: str,
        target: Callable[..., None],
        args: tuple[object, ...],
        kwargs: dict[str, object],
    ) -> multiprocessing.process.BaseProcess:
        context = multiprocessing.get_context("spawn")
        process = context.Process(target=target, args=args, kwargs=kwargs, name=f"gwp-{name}")
        # The child inherits the blocked signals and handles them once it is able to.
        blocked = {signal.SIGINT, signal.SIGTERM}
        before = signal.pthread_sigmask(signal.SIG_BLOCK, blocked)
        try:
            process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        self._processes[name] = process
        return process

    def _prepare(self) -> bool:
        """Wait for checks and connections, then enable; return False when the run is over."""
        deadline_s = time.monotonic() + self._options.start_timeout_s
        while not self._is_ready():
            if not self._step():
                return False
            if time.monotonic() > deadline_s:
                self._findings.end(
                    "fault",
                    f"not ready after {self._options.start_timeout_s:.0f} s: policy "
                    f"{PolicyPhase(self._words[Word.POLICY_PHASE]).name.lower()}, motor "
                    f"{Mode(self._words[Word.MOTOR_MODE]).name.lower()}",
                )
                return False
        failed = [c for c in self._findings.checks if not c.passed]
        refusing = [c for c in failed if c.name not in self._options.skip_checks]
        if refusing:
            text = "; ".join(f"{c.name}: {c.detail}" for c in refusing)
            self._findings.end("refused", f"preflight failed, nothing moved: {text}")
            return False
        self._words[Word.REQUEST] = int(Request.RUN)
        return True

    def _is_ready(self) -> bool:
        words = self._words
        return (
            words[Word.POLICY_PHASE] == PolicyPhase.READY
            and words[Word.MOTOR_MODE] == Mode.CONNECTED
            and ("guardian" not in self._processes or words[Word.GUARDIAN_READY] == 1)
        )

    # Watch

    def _watch(self) -> None:
        duration_s = self._options.duration_s
        while self._step():
            mode = Mode(self._words[Word.MOTOR_MODE])
            now_s = time.monotonic()
            if self._t_run_s is None and mode in (Mode.APPROACH, Mode.RUN):
                self._t_run_s = now_s
                self._findings.t_run_s = now_s
            if duration_s is not None and now_s - (self._t_run_s or now_s) >= duration_s:
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
        waits = mode in (Mode.HOLD, Mode.ENABLED)
        reason = HoldReason(self._words[Word.MOTOR_HOLD_REASON])
        if not waits or reason is HoldReason.OPERATOR or self._options.interactive:
            self._t_hold_s = None
            return False
        if self._t_hold_s is None:
            self._t_hold_s = now_s
        timeout_s = self._options.recover_timeout_s
        # A hold that only a person may end has nobody to wait for.
        if mode is Mode.HOLD and not reason.ends_by_itself and self._words[Word.MOTOR_STANDING]:
            timeout_s = 0.0
        if now_s - self._t_hold_s < timeout_s:
            return False
        text = self._findings.last_fault or "no usable plan came"
        self._findings.end("held", text)
        return True

    def _step(self) -> bool:
        """Do one turn of the watch; return False when the run is to end."""
        time.sleep(_POLL_S)
        self._collect()
        ended = (
            self._see_processes()
            or self._see_fault()
            or self._see_signals()
            or self._see_key()
            or self._see_world()
        )
        return not ended

    def _collect(self) -> None:
        events: list[Event] = []
        for who, ring in self._board.events.items():
            for event in ring.drain():
                events.append(event)
                if event.kind in (EventKind.CHECK_PASSED, EventKind.CHECK_FAILED):
                    name, _, detail = event.text.partition(": ")
                    passed = event.kind is EventKind.CHECK_PASSED
                    self._take_check(CheckResult(name=name, passed=passed, detail=detail))
                elif event.kind is EventKind.INFO:
                    logger.info("%s: %s", who, event.text)
                else:
                    logger.warning("%s: %s", who, event.text)
                    self._findings.note_fault(event.text)
        self._findings.take_timings(self._board.timings.drain())
        now_s = time.monotonic()
        if self._on_status is not None and (events or now_s - self._t_status_s > 0.05):
            self._t_status_s = now_s
            self._on_status(self._status(tuple(events)))

    def _take_check(self, result: CheckResult) -> None:
        self._findings.checks.append(result)
        logger.info("check %s: %s: %s", result.name, result.passed, result.detail)

    def _status(self, events: tuple[Event, ...]) -> RunStatus:
        words = self._words
        pids = {name: p.pid or 0 for name, p in self._processes.items()}
        return RunStatus(
            mode=Mode(words[Word.MOTOR_MODE]),
            hold_reason=HoldReason(words[Word.MOTOR_HOLD_REASON]),
            phase=PolicyPhase(words[Word.POLICY_PHASE]),
            run_s=0.0 if self._t_run_s is None else time.monotonic() - self._t_run_s,
            n_chunks=words[Word.POLICY_N_CHUNKS],
            n_ticks=words[Word.MOTOR_N_TICKS],
            n_missed=words[Word.MOTOR_N_MISSED],
            events=events,
            motor_pid=pids.get("motor", 0),
            policy_pid=pids.get("policy", 0),
            guardian_pid=pids.get("guardian", 0),
        )

    def _see_processes(self) -> bool:
        for name, process in self._processes.items():
            code = process.exitcode
            if code is None:
                continue
            # A line that the process wrote just before its end says more than the exit code.
            time.sleep(_POLL_S)
            self._collect()
            if name == "motor" and code == 0 and self._words[Word.MOTOR_ENDED]:
                if self._words[Word.GUARDIAN_TRIPPED_NS] or self._is_in_fault():
                    self._findings.end("fault", self._fault_text())
                    return True
                self._findings.end("terminated", "the motor process was asked to stop")
                return True
            how = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
            said = self._findings.last_fault
            text = f"the {name} process {how}" + (f": {said}" if said else "")
            self._findings.end("crashed" if code < 0 or not said else "fault", text)
            return True
        return False

    def _is_in_fault(self) -> bool:
        return self._words[Word.MOTOR_MODE] == Mode.FAULT

    def _fault_text(self) -> str:
        return self._findings.last_fault or "the arm reported a fault"

    def _see_fault(self) -> bool:
        if not (self._words[Word.GUARDIAN_TRIPPED_NS] or self._is_in_fault()):
            return False
        # The process writes its line before or after its mode; give it a moment.
        time.sleep(_POLL_S)
        self._collect()
        if "motor" in self._processes and self._processes["motor"].exitcode not in (None, 0):
            return self._see_processes()
        self._findings.end("fault", self._fault_text())
        return True

    def _see_signals(self) -> bool:
        signals = self.signals
        if signals is None:
            return False
        if signals.n_estops:
            self._words[Word.REQUEST] = int(Request.STOP_NOW)
            self._findings.end("estop", "stopped by the external e-stop signal")
        elif signals.n_interrupts:
            self._findings.end("interrupted", "interrupted")
        elif signals.n_terminates:
            self._findings.end("terminated", "asked to terminate")
        return self._findings.ended

    def _see_key(self) -> bool:
        key = self._keys() if self._keys is not None else None
        if key is Key.HOLD:
            self._words[Word.REQUEST] = int(Request.HOLD)
        elif key is Key.RESUME and self._words[Word.REQUEST] in (Request.HOLD, Request.RUN):
            self._words[Word.RESUME_COUNT] += 1
            self._words[Word.REQUEST] = int(Request.RUN)
        elif key is Key.QUIT:
            self._words[Word.REQUEST] = int(Request.PARK)
            self._findings.end("parked", "parked by the operator")
            return True
        return False

    def _see_world(self) -> bool:
        if self._world is not None:
            self._world.check()
        return False

    # End

    def _stop_arm(self) -> None:
        """Ask for the end and wait until the arm stands; a second Ctrl-C brakes harder."""
        motor = self._processes.get("motor")
        if motor is None:
            return
        if self._words[Word.REQUEST] < Request.PARK:
            self._words[Word.REQUEST] = int(Request.STOP)
        n_before = self.signals.n_interrupts if self.signals else 0
        parking = self._words[Word.REQUEST] == Request.PARK
        # Parking is slow on purpose; a stop is not.
        deadline_s = time.monotonic() + (_PARK_TIMEOUT_S if parking else _STOP_TIMEOUT_S)
        while motor.exitcode is None and time.monotonic() < deadline_s:
            time.sleep(_POLL_S / 2)
            self._collect()
            if self._words[Word.GUARDIAN_TRIPPED_NS]:
                deadline_s = min(deadline_s, time.monotonic() + _JOIN_TIMEOUT_S)
            if self.signals is not None and self.signals.n_interrupts > n_before:
                n_before = self.signals.n_interrupts
                self._words[Word.REQUEST] = int(Request.STOP_NOW)
                self._findings.end("interrupted", "interrupted twice: immediate hold")
        if motor.exitcode is None:
            # It hangs. Killing it is what the guardian waits for.
            self._findings.fail("crashed", "the motor process did not stop in time and was killed")
            motor.kill()
        elif motor.exitcode < 0:
            self._findings.fail("crashed", f"the motor process was killed ({-motor.exitcode})")
        self._await_guardian()
        self._note_standing()

    def _await_guardian(self) -> None:
        guardian = self._processes.get("guardian")
        deadline_s = time.monotonic() + _GUARDIAN_TIMEOUT_S
        # ARMED is left on by a motor process that died; then the guardian's hold is to come.
        while guardian is not None and guardian.exitcode is None and time.monotonic() < deadline_s:
            if not self._words[Word.MOTOR_ARMED] and not self._words[Word.GUARDIAN_TRIPPED_NS]:
                break
            time.sleep(_POLL_S / 2)
            self._collect()
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
        else:
            findings.standing = "the arm was not moved"

    def _end_processes(self) -> None:
        self._words[Word.POLICY_STOP] = self._words[Word.GUARDIAN_STOP] = 1
        deadline_s = time.monotonic() + _END_TIMEOUT_S
        for process in self._processes.values():
            process.join(max(0.0, deadline_s - time.monotonic()))
            if process.is_alive():
                # Only a policy inside a long inference is left here; it holds nothing.
                logger.info("%s did not end in time and was killed", process.name)
                process.kill()
                process.join()
            process.close()
        self._collect_rest()

    def _collect_rest(self) -> None:
        self._processes.clear()
        self._on_status = None
        self._collect()
