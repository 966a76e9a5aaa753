"""What the processes of a run say: to the findings, to the log, and to whoever shows the run."""

from __future__ import annotations

import logging
import time
from typing import Final

from gwp_edge.mailbox import Board
from gwp_edge.run_options import RunStatus, StatusCallback
from gwp_edge.run_processes import RunProcesses
from gwp_edge.run_report import Findings
from gwp_edge.status import Event, EventKind, HoldReason, Mode, PolicyPhase, Word
from gwp_edge.telemetry import CheckResult

logger = logging.getLogger(__name__)

_SHOW_EVERY_S: Final = 0.05


class RunMonitor:
    """Takes in what was said since the last look. Threads: one owner, the supervisor's."""

    def __init__(
        self,
        board: Board,
        processes: RunProcesses,
        findings: Findings,
        on_status: StatusCallback | None,
    ) -> None:
        self._board = board
        self._processes = processes
        self._findings = findings
        self._on_status = on_status
        self._t_shown_s = 0.0

    def collect(self) -> None:
        """Take in all lines and timings; show the run if there are any, or now and then."""
        events: list[Event] = []
        for who, ring in self._board.events.items():
            for event in ring.drain():
                events.append(event)
                self._take(who, event)
        self._findings.take_timings(self._board.timings.drain())
        now_s = time.monotonic()
        if self._on_status is not None and (events or now_s - self._t_shown_s > _SHOW_EVERY_S):
            self._t_shown_s = now_s
            self._show(self._on_status, self._status(tuple(events)))

    def take_check(self, result: CheckResult) -> None:
        """Take in one line of the preflight."""
        self._findings.checks.append(result)
        logger.info("check %s: %s: %s", result.name, result.passed, result.detail)

    def close(self) -> None:
        """Show the run no more; what is said is still taken in."""
        self._on_status = None

    def _take(self, who: str, event: Event) -> None:
        if who == "policy":
            self._findings.take_health(event.text)
        if event.kind in (EventKind.CHECK_PASSED, EventKind.CHECK_FAILED):
            name, _, detail = event.text.partition(": ")
            passed = event.kind is EventKind.CHECK_PASSED
            self.take_check(CheckResult(name=name, passed=passed, detail=detail))
        elif event.kind is EventKind.INFO:
            logger.info("%s: %s", who, event.text)
        else:
            logger.warning("%s: %s", who, event.text)
            self._findings.note_fault(event.text, is_error=event.kind is EventKind.ERROR)

    def _show(self, on_status: StatusCallback, status: RunStatus) -> None:
        try:
            on_status(status)
        except Exception as e:  # somebody else's code, above a moving arm: it must come to rest
            self._on_status = None
            text = f"the run can no longer be shown ({type(e).__name__}: {e})"
            logger.exception("%s", text)
            self._findings.note_fault(text)
            self._findings.end("crashed", text)

    def _status(self, events: tuple[Event, ...]) -> RunStatus:
        words, pids, t_run_s = self._board.words, self._processes.pids, self._findings.t_run_s
        return RunStatus(
            mode=Mode(words[Word.MOTOR_MODE]),
            hold_reason=HoldReason(words[Word.MOTOR_HOLD_REASON]),
            phase=PolicyPhase(words[Word.POLICY_PHASE]),
            run_s=0.0 if t_run_s is None else time.monotonic() - t_run_s,
            n_chunks=words[Word.POLICY_N_CHUNKS],
            n_ticks=words[Word.MOTOR_N_TICKS],
            n_missed=words[Word.MOTOR_N_MISSED],
            events=events,
            motor_pid=pids.get("motor", 0),
            policy_pid=pids.get("policy", 0),
            guardian_pid=pids.get("guardian", 0),
        )
