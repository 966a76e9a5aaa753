"""One run of a soak: injects its faults one by one and sees to it that each ends as it must."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, Literal

from gwp_edge.drivers.piper_witness import Testimony
from gwp_edge.operator_input import Key
from gwp_edge.run_options import RunStatus
from gwp_edge.soak_faults import Rig, SoakFault
from gwp_edge.soak_memory import MemoryWatch
from gwp_edge.status import Mode
from gwp_edge.telemetry import RunSummary

_UNMOVED_S: Final = 0.15
_GOES_ON_S: Final = 1.5
_HELD_S: Final = 0.5
_ENTER_EVERY_S: Final = 1.0
_RESUME_S: Final = 30.0
_END_S: Final = 15.0
_HELP_AFTER_S: Final = 5.0
_EXCUSED_NS: Final = 1_000_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How one fault ended; times in s, None where there was nothing of the kind."""

    kind: SoakFault
    hold_s: float | None = None
    resume_s: float | None = None


class Life:
    """One run. Threads: one owner, the supervisor's.

    Attributes:
        outcomes: of the faults so far.
        problems: faults that did not end as they must.
        unprovoked: holds and ends without a fault.
    """

    def __init__(
        self,
        rig: Rig,
        faults: Sequence[SoakFault],
        *,
        gap_s: tuple[float, float],
        t_end_s: float,
        memory: MemoryWatch,
        patience_s: float,
        progress: Callable[[str], None] | None,
    ) -> None:
        self._rig = rig
        self._todo = list(faults)
        self._gap_s = gap_s
        self._t_end_s = t_end_s
        self._memory = memory
        self._patience_s = patience_s
        self._progress = progress
        self.outcomes: list[Outcome] = []
        self.problems: list[str] = []
        self.unprovoked: list[str] = []
        self._stage: Literal["settle", "injected", "held", "over"] = "settle"
        self._kind: SoakFault | None = None
        self._t_stage_s = time.monotonic()
        self._t_injected_ns = 0
        self._hold_s: float | None = None
        self._t_enter_s = 0.0
        self._wait_s = self._gap()
        self._ran = False
        self._was_holding = False

    def _gap(self) -> float:
        return self._rig.random.uniform(*self._gap_s)

    def key(self) -> Key | None:
        """Return the key that the operator presses now, if any."""
        key, self._rig.key = self._rig.key, None
        return key

    def on_status(self, status: RunStatus) -> None:
        """Look, and do what is next."""
        self._rig.pids = {
            "motor": status.motor_pid,
            "policy": status.policy_pid,
            "guardian": status.guardian_pid,
        }
        now_s = time.monotonic()
        if status.mode in (Mode.APPROACH, Mode.RUN, Mode.HOLD):
            fakes = {f"fake arm {i}": arm.pid for i, arm in enumerate(self._rig.arms)}
            self._memory.sample(now_s, {"supervisor": os.getpid(), **self._rig.pids, **fakes})
        if self._stage == "settle":
            self._settle(status, now_s)
        elif self._stage == "injected":
            self._await_reaction(status, now_s)
        elif self._stage == "held":
            self._await_resume(status, now_s)

    def _enter(self, stage: Literal["settle", "injected", "held", "over"], now_s: float) -> None:
        self._stage, self._t_stage_s = stage, now_s

    # Between faults

    def _settle(self, status: RunStatus, now_s: float) -> None:
        if now_s > self._t_end_s:
            self._rig.key = Key.QUIT
            self._enter("over", now_s)
            return
        if status.mode is not Mode.RUN:
            self._see_unprovoked(status, now_s)
            return
        if not self._ran or self._was_holding:
            self._ran, self._was_holding = True, False
            self._t_stage_s = now_s
        if now_s - self._t_stage_s < self._wait_s:
            return
        if not self._todo:
            self._rig.key = Key.QUIT
            self._enter("over", now_s)
            return
        self._inject(now_s)

    def _see_unprovoked(self, status: RunStatus, now_s: float) -> None:
        """A hold without a fault: on a starved machine a plan may come too late."""
        if status.mode is not Mode.HOLD:
            return
        if not self._was_holding:
            self._was_holding = True
            self.unprovoked.append(f"hold: {status.hold_reason.name.lower()}")
            self._t_enter_s = now_s
        elif not status.hold_reason.ends_by_itself and now_s - self._t_enter_s > _HELP_AFTER_S:
            self._t_enter_s = now_s
            self._rig.key = Key.RESUME

    def _inject(self, now_s: float) -> None:
        self._kind = kind = self._todo.pop(0)
        if self._progress is not None:
            self._progress(kind.name)
        self._rig.arm = None
        self._hold_s = None
        self._enter("injected", now_s)
        self._t_injected_ns = time.monotonic_ns()
        kind.inject(self._rig)

    # After a fault

    def _await_reaction(self, status: RunStatus, now_s: float) -> None:
        kind, since_s = self._kind, now_s - self._t_stage_s
        if kind is None:
            return
        if kind.after == "goes on":
            if status.mode is not Mode.RUN:
                self._complain(f"held ({status.hold_reason.name.lower()}) instead of going on")
                kind.undo(self._rig)
                self._enter("held", now_s)
            elif since_s > _GOES_ON_S:
                kind.undo(self._rig)
                self._done(Outcome(kind=kind), now_s)
        elif kind.after == "end":
            if since_s > kind.deadline_s + _END_S + self._patience_s:
                self._complain("the run did not end")
                self._rig.mend()
                self._rig.key = Key.QUIT
                self._enter("over", now_s)
        elif status.mode is Mode.HOLD and self._stands():
            if status.hold_reason is not kind.reason:
                self._complain(f"held because of {status.hold_reason.name.lower()}")
            self._note_hold(kind, self._testify())
            kind.undo(self._rig)
            self._enter("held", now_s)
        elif since_s > kind.deadline_s + _END_S + self._patience_s:
            self._complain("no hold")
            kind.undo(self._rig)
            self._enter("held", now_s)

    def _await_resume(self, status: RunStatus, now_s: float) -> None:
        kind, since_s = self._kind, now_s - self._t_stage_s
        if kind is None:
            return
        if status.mode is Mode.RUN:
            self._done(Outcome(kind=kind, hold_s=self._hold_s, resume_s=since_s), now_s)
        elif since_s > _RESUME_S + self._patience_s:
            self._complain("did not resume")
            self._rig.key = Key.QUIT
            self._enter("over", now_s)
        elif (
            since_s > _HELD_S
            and status.mode is Mode.HOLD
            and not status.hold_reason.ends_by_itself
            and now_s - self._t_enter_s > _ENTER_EVERY_S
        ):
            self._t_enter_s = now_s
            self._rig.key = Key.RESUME

    def _done(self, outcome: Outcome, now_s: float) -> None:
        self.outcomes.append(outcome)
        self._kind = None
        self._wait_s = self._gap()
        self._enter("settle", now_s)

    def _testify(self) -> tuple[Testimony, ...]:
        return tuple(arm.ask("testify") for arm in self._rig.arms)

    def _stands(self) -> bool:
        now_ns = time.monotonic_ns()
        return all(now_ns - t.t_moved_ns > _UNMOVED_S * 1e9 for t in self._testify())

    def _note_hold(self, kind: SoakFault, seen: Sequence[Testimony]) -> None:
        self._hold_s = max(0, *(t.t_moved_ns - self._t_injected_ns for t in seen)) / 1e9
        allowed_s = kind.deadline_s + self._patience_s
        if self._hold_s > allowed_s:
            self._complain(f"stood after {self._hold_s:.2f} s, allowed {allowed_s:.2f} s")

    def _complain(self, text: str) -> None:
        """Note a problem, unless an arm was itself kept from running just then."""
        name = self._kind.name if self._kind is not None else "no fault"
        since_ns = self._t_injected_ns - _EXCUSED_NS
        if any(t.t_late_ns > since_ns for t in self._testify()):
            self.unprovoked.append(f"{name}, while a fake arm was late: {text}")
        else:
            self.problems.append(f"{name}: {text}")

    def expects(self, summary: RunSummary) -> bool:
        """Whether the fault in progress ends a run as ``summary`` says."""
        return self._kind is not None and summary.outcome in self._kind.outcomes

    def finish(self, summary: RunSummary, seen: Sequence[Testimony]) -> None:
        """Judge the end of the run; the arms have come to rest, or that was noted."""
        kind = self._kind
        if kind is None:
            if summary.outcome != "parked":
                self.unprovoked.append(f"end: {summary.message}")
            return
        if kind.after != "end":
            self._complain(f"ended the run: {summary.message}")
            self.outcomes.append(Outcome(kind=kind, hold_s=self._hold_s))
            return
        if not self.expects(summary):
            self._complain(f"the run ended as {summary.outcome}: {summary.message}")
        self._note_hold(kind, seen)
        self.outcomes.append(Outcome(kind=kind, hold_s=self._hold_s))
