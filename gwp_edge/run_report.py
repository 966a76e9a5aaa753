"""What the supervisor finds out in the course of a run, and the summary made of it."""

from __future__ import annotations

import re
import time
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from gwp_edge.mailbox import TIMING_DTYPE, Board
from gwp_edge.spec import PolicySpec
from gwp_edge.status import Mode, Word
from gwp_edge.telemetry import (
    CheckResult,
    Distribution,
    RunSummary,
    latencies_ms,
    nonzero_interventions,
)

_ENDED_WELL: Final = frozenset({"duration", "interrupted", "terminated", "parked"})
_MAX_FAULTS: Final = 200
# Half an hour at ten chunks per second.
_MAX_TIMINGS: Final = 20_000


class Findings:
    """Collects. Threads: one owner.

    Attributes:
        checks: the preflight.
        faults: warnings and errors in order, repeats left out.
        cameras: what each camera's driver said about itself at the end, by name.
        standing: how the arm is left.
        t_run_s: time of the first motion.
    """

    def __init__(self) -> None:
        self.checks: list[CheckResult] = []
        self.faults: list[str] = []
        self.cameras: dict[str, str] = {}
        self.standing = ""
        self.t_run_s: float | None = None
        self._last_error = ""
        self._outcome = ""
        self._message = ""
        self._run_s = 0.0
        self._timings = np.empty(_MAX_TIMINGS, TIMING_DTYPE)
        # Written once, so that the pages are there and a long run does not seem to leak.
        self._timings.view(np.uint8)[:] = 0
        self._n_timings = 0

    @property
    def ended(self) -> bool:
        """Whether the run has an outcome."""
        return bool(self._outcome)

    @property
    def last_fault(self) -> str:
        """The newest error, else the newest warning, or an empty string."""
        return self._last_error or (self.faults[-1] if self.faults else "")

    def end(self, outcome: str, message: str) -> None:
        """Note why the run ends; the first reason stays, but Ctrl-C ends parking and itself."""
        stopped = outcome in ("interrupted", "terminated")
        if (
            not self._outcome
            or outcome == self._outcome == "interrupted"
            or (stopped and self._outcome == "parked")
        ):
            self._outcome, self._message = outcome, message
            if self.t_run_s is not None and not self._run_s:
                self._run_s = time.monotonic() - self.t_run_s

    def fail(self, outcome: str, message: str) -> None:
        """Note that the end itself went wrong, which wins over a good reason for it."""
        if self._outcome in _ENDED_WELL or not self._outcome:
            self._outcome, self._message = outcome, message

    def note_fault(self, text: str, *, is_error: bool = False) -> None:
        """Note a warning or an error; one that follows an error does not hide it."""
        if is_error:
            self._last_error = text
        if len(self.faults) < _MAX_FAULTS and (not self.faults or self.faults[-1] != text):
            self.faults.append(text)

    def take_health(self, text: str) -> None:
        """Keep a line that ``policy_process.report_health`` has said; others are passed over."""
        found = re.fullmatch(r"camera (\S+): (.*)", text)
        if found is not None:
            self.cameras[found[1]] = found[2]

    def take_timings(self, records: npt.NDArray[Any]) -> None:
        """Keep chunk timings; a long run keeps the newest ones."""
        records = records[-_MAX_TIMINGS:]
        slots = (self._n_timings + np.arange(len(records))) % _MAX_TIMINGS
        self._timings[slots] = records
        self._n_timings += len(records)

    @property
    def timings(self) -> npt.NDArray[Any]:
        """The newest chunk timings, oldest first."""
        begin = max(0, self._n_timings - _MAX_TIMINGS)
        return self._timings[np.arange(begin, self._n_timings) % _MAX_TIMINGS]

    def verdict(self) -> tuple[str, int, str, float]:
        """Return outcome, exit code, last line and duration of the motion, s."""
        outcome = self._outcome or "crashed"
        message = self._message or "the run ended for no known reason"
        line = f"{message}; {self.standing}" if self.standing else message
        # Ended before the first motion, however willingly, it did not do what it was started for.
        is_good = outcome in _ENDED_WELL and self.t_run_s is not None
        return outcome, 0 if is_good else 1, line, self._run_s


def summarise(board: Board, spec: PolicySpec, findings: Findings) -> RunSummary:
    """Return the summary of a run whose processes have all ended."""
    words = board.words
    timings = findings.timings
    ticks = board.ticks.drain()
    moving = ticks[np.isin(ticks["mode"], (Mode.APPROACH, Mode.RUN))]
    planned = moving[moving["chunk_idx"] >= 0]
    outcome, exit_code, message, run_s = findings.verdict()
    hold_ms = None
    if words[Word.GUARDIAN_HOLD_SENT_NS]:
        hold_ms = (words[Word.GUARDIAN_HOLD_SENT_NS] - words[Word.GUARDIAN_TRIPPED_NS]) / 1e6
    return RunSummary(
        outcome=outcome,
        exit_code=exit_code,
        message=message,
        run_s=run_s,
        n_chunks=words[Word.POLICY_N_CHUNKS],
        n_ticks=words[Word.MOTOR_N_TICKS],
        latency_ms=latencies_ms(timings),
        frame_age_ms=Distribution.of(timings["frame_age_ns"], 1e-6),
        frame_skew_ms=Distribution.of(timings["frame_skew_ns"], 1e-6),
        feedback_age_ms=Distribution.of(
            # Feedback may come in between waking up and reading it.
            np.maximum(ticks["t_woke_ns"] - ticks["t_feedback_ns"], 0),
            1e-6,
        ),
        chunk_age_ms=Distribution.of(planned["t_woke_ns"] - planned["t_observed_ns"], 1e-6),
        lateness_us=Distribution.of_histogram(board.lateness_us),
        busy_us=Distribution.of_histogram(board.busy_us),
        n_missed_ticks=words[Word.MOTOR_N_MISSED],
        n_late_ticks=words[Word.MOTOR_N_LATE],
        interventions=nonzero_interventions(board.interventions, [c.name for c in spec.channels]),
        n_stale_observations=words[Word.POLICY_N_STALE],
        n_rejected_chunks={
            "not_finite": words[Word.MOTOR_N_NOT_FINITE],
            "other": words[Word.MOTOR_N_REJECTED_CHUNKS],
        },
        n_rejected_ticks=words[Word.MOTOR_N_REJECTED_TICKS],
        n_dropped_sends=words[Word.MOTOR_N_SEND_DROPPED],
        n_holds=words[Word.MOTOR_N_HOLDS],
        guardian_hold_ms=hold_ms,
        cameras=dict(findings.cameras),
        checks=tuple(findings.checks),
        faults=tuple(findings.faults),
    )
