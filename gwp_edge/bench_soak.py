"""Minutes of random faults: no unsafe command, no leak, every fault ends in a hold.

Two fake PiPER arms in processes of their own judge every command at their end of the bus
(``drivers.piper_witness``), while motor, policy and guardian processes run as in ``run``. Runs
follow each other: some faults end one, most do not. What is chosen follows from the seed; when
exactly it strikes depends on the machine.
"""

from __future__ import annotations

import contextlib
import os
import random
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

from gwp_edge.drivers.disturbed import Switch
from gwp_edge.drivers.piper_fake_bus import FakeProcess
from gwp_edge.drivers.piper_witness import Testimony, WitnessPiper
from gwp_edge.errors import SpecError
from gwp_edge.motor_options import MotorOptions
from gwp_edge.observe import ObservationLimits
from gwp_edge.policy_options import PolicyOptions
from gwp_edge.robot_config import ArmConfig, CameraConfig, DeviceConfig, RobotConfig
from gwp_edge.run_options import RunOptions
from gwp_edge.runtime import run
from gwp_edge.soak_faults import FAULTS, N_ARMS, Rig, SoakFault
from gwp_edge.soak_life import Life, Outcome
from gwp_edge.soak_memory import MemoryGrowth, MemoryWatch
from gwp_edge.telemetry import Distribution, RunSummary
from gwp_edge.testing import make_spec

MAX_GROWTH_MB: Final = 1.0
# An allocator extends a heap by a MB or so and keeps it, as at the end of a first long run. A line
# through a few minutes makes several MB in ten of one such step: that little, in less time than
# this, is no leak yet.
_STEP_MB: Final = 4.0
_TELLING_S: Final = 900.0
_FAKE_PRIORITY: Final = 50
# Of six runs one is long enough to see a leak in its processes; the others bring faults that end.
_N_FAULTS: Final = (2, 0, 60, 3, 1, 4)
_STILL_S: Final = 3.0


@dataclass(frozen=True, slots=True, kw_only=True)
class FaultTally:
    """One kind of fault.

    Attributes:
        name: of the kind.
        after: what must follow: ``goes on``, ``resumes``, ``operator`` or ``end``.
        n: injected.
        hold_ms: from the injection to the last command that moved a target, of every arm.
        resume_s: from the end of the fault to RUN.
    """

    name: str
    after: str
    n: int
    hold_ms: Distribution
    resume_s: Distribution


@dataclass(frozen=True, slots=True, kw_only=True)
class SoakReport:
    """What happened; ``to_dict`` is JSON-able.

    Attributes:
        seed: of the choices.
        duration_s: in all, starts and ends of runs included.
        n_runs: one after another.
        n_faults: injected.
        n_commands: frames of joint targets that the arms heard.
        n_unsafe: of those, judged unsafe by the arms.
        unsafe: the first of them, in words.
        worst_speed: fastest command over the limit.
        worst_acceleration: likewise.
        problems: faults that did not end as they must.
        unprovoked: holds and ends that no injected fault explains; safe, but not wanted. A
            machine that is busy with something else makes them.
        faults: by kind.
        memory: by process.
    """

    seed: int
    duration_s: float
    n_runs: int
    n_faults: int
    n_commands: int
    n_unsafe: int
    unsafe: tuple[str, ...]
    worst_speed: float
    worst_acceleration: float
    problems: tuple[str, ...]
    unprovoked: tuple[str, ...]
    faults: tuple[FaultTally, ...]
    memory: tuple[MemoryGrowth, ...]

    @property
    def leaks(self) -> tuple[MemoryGrowth, ...]:
        """Processes that grow by 1 MB in 10 minutes or more, and not by what may be one step."""
        return tuple(m for m in self._growing if _tells(m))

    @property
    def undecided(self) -> tuple[MemoryGrowth, ...]:
        """Processes that grow as fast, but too little in too short a time to call it a leak."""
        return tuple(m for m in self._growing if not _tells(m))

    @property
    def _growing(self) -> tuple[MemoryGrowth, ...]:
        return tuple(
            m
            for m in self.memory
            if m.slope_mb_per_10min is not None and m.slope_mb_per_10min >= MAX_GROWTH_MB
        )

    @property
    def passed(self) -> bool:
        """No unsafe command, no fault that ended otherwise than it must, no leak."""
        return not (self.n_unsafe or self.problems or self.leaks) and self.n_commands > 0

    def to_dict(self) -> dict[str, object]:
        """Return it for JSON."""
        return {"passed": self.passed, **asdict(self)}


def _tells(growth: MemoryGrowth) -> bool:
    return growth.observed_s >= _TELLING_S or (growth.grown_mb or 0.0) >= _STEP_MB


def soak(
    *,
    duration_s: float = 1800.0,
    seed: int = 0,
    realtime: bool = True,
    gap_s: tuple[float, float] = (2.0, 5.0),
    kinds: tuple[SoakFault, ...] = FAULTS,
    patience_s: float = 0.0,
    progress: Callable[[str], None] | None = None,
) -> SoakReport:
    """Run for ``duration_s`` with faults at random.

    Args:
        duration_s: in all.
        seed: of kind, order and pauses.
        realtime: ask for SCHED_FIFO, for the motor process and for the fake arms.
        gap_s: shortest and longest time of undisturbed motion between two faults.
        kinds: which faults.
        patience_s: added to every deadline and to the guardian's, for a busy machine.
        progress: called with one line per fault.

    Raises:
        SpecError: a number is out of range.
        DeviceError: a fake arm did not start.
    """
    if not 5.0 <= duration_s <= 48 * 3600.0:
        raise SpecError(f"soak: expected 5 s to 48 hours, got {duration_s} s")
    if not 0.0 < gap_s[0] <= gap_s[1]:
        raise SpecError(f"soak: expected 0 < shortest <= longest gap, got {gap_s} s")
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        arms = tuple(
            stack.enter_context(FakeProcess(os.fspath(Path(name) / side), WitnessPiper()))
            for side in ("left", "right")
        )
        if realtime:
            for arm in arms:
                # They are the hardware here: a busy machine must not make them late. Where that
                # is not allowed they compete like everyone else.
                with contextlib.suppress(PermissionError):
                    os.sched_setscheduler(arm.pid, os.SCHED_FIFO, os.sched_param(_FAKE_PRIORITY))
        switch = Switch(os.fspath(Path(name) / "switch"))
        stack.callback(switch.close)
        chooser = random.Random(seed)
        rig = Rig(arms=arms, switch=switch, random=chooser)
        options = _run_options(
            rig, os.fspath(Path(name) / "switch"), realtime=realtime, patience_s=patience_s
        )
        session = _Session(rig, options, duration_s, gap_s, kinds, patience_s, progress)
        session.go_on()
        return session.report(seed)


class _Session:
    """The runs of one soak. Threads: one owner, the main thread."""

    def __init__(
        self,
        rig: Rig,
        options: RunOptions,
        duration_s: float,
        gap_s: tuple[float, float],
        kinds: tuple[SoakFault, ...],
        patience_s: float,
        progress: Callable[[str], None] | None,
    ) -> None:
        self._rig = rig
        self._options = options
        self._gap_s = gap_s
        self._patience_s = patience_s
        self._kinds = kinds
        self._progress = progress
        self._t_begin_s = time.monotonic()
        self._t_end_s = self._t_begin_s + duration_s
        self._memory = MemoryWatch()
        self._outcomes: list[Outcome] = []
        self._problems: list[str] = []
        self._unprovoked: list[str] = []
        self._n_runs = 0
        self._testimony: tuple[Testimony, ...] = ()

    def go_on(self) -> None:
        """Run after run until the time is over."""
        going = [kind for kind in self._kinds if kind.after != "end"]
        ending = [kind for kind in self._kinds if kind.after == "end"]
        while time.monotonic() < self._t_end_s:
            n_going = _N_FAULTS[self._n_runs % len(_N_FAULTS)] if going else 0
            chosen = [self._rig.random.choice(going) for _ in range(n_going)]
            if ending:
                # Every kind has its turn before any has its second.
                if self._n_runs % len(ending) == 0:
                    self._rig.random.shuffle(ending)
                chosen.append(ending[self._n_runs % len(ending)])
            self._rig.mend()
            life = Life(
                self._rig,
                chosen,
                gap_s=self._gap_s,
                t_end_s=self._t_end_s,
                memory=self._memory,
                patience_s=self._patience_s,
                progress=self._progress,
            )
            summary = run(self._options, on_status=life.on_status, keys=life.key)
            self._n_runs += 1
            self._close(life, summary)
            if summary.outcome in ("interrupted", "terminated") and not life.expects(summary):
                raise KeyboardInterrupt  # of the person who runs the soak

    def _close(self, life: Life, summary: RunSummary) -> None:
        self._wait_until_still(summary)
        life.finish(summary, self._testimony)
        self._outcomes += life.outcomes
        self._problems += life.problems
        self._unprovoked += life.unprovoked

    def _wait_until_still(self, summary: RunSummary) -> None:
        deadline_s = time.monotonic() + _STILL_S + self._patience_s
        while True:
            self._testimony = tuple(arm.ask("testify") for arm in self._rig.arms)
            if all(t.is_still for t in self._testimony):
                return
            if time.monotonic() > deadline_s:
                self._problems.append(f"an arm still moves after the run: {summary.message}")
                return
            time.sleep(0.05)

    def report(self, seed: int) -> SoakReport:
        """Return the report."""
        tallies = []
        for kind in self._kinds:
            mine = [o for o in self._outcomes if o.kind is kind]
            holds = [o.hold_s * 1e3 for o in mine if o.hold_s is not None]
            resumes = [o.resume_s for o in mine if o.resume_s is not None]
            tallies.append(
                FaultTally(
                    name=kind.name,
                    after=kind.after,
                    n=len(mine),
                    hold_ms=Distribution.of(holds),
                    resume_s=Distribution.of(resumes),
                )
            )
        seen = self._testimony
        return SoakReport(
            seed=seed,
            duration_s=time.monotonic() - self._t_begin_s,
            n_runs=self._n_runs,
            n_faults=len(self._outcomes),
            n_commands=sum(t.n_commands for t in seen),
            n_unsafe=sum(t.n_violations for t in seen),
            unsafe=tuple(text for t in seen for text in t.violations),
            worst_speed=max((t.worst_speed for t in seen), default=0.0),
            worst_acceleration=max((t.worst_acceleration for t in seen), default=0.0),
            problems=tuple(self._problems),
            unprovoked=tuple(self._unprovoked),
            faults=tuple(tallies),
            memory=self._memory.growth(),
        )


def _run_options(
    rig: Rig,
    switch: str,
    *,
    realtime: bool,
    patience_s: float,
) -> RunOptions:
    spec = make_spec(N_ARMS)
    left, right = (arm.channel for arm in rig.arms)
    camera = {"disturbed_kind": "kinematic", "disturbed_switch": switch}
    return RunOptions(
        spec=spec,
        robot=RobotConfig(
            name="two fake PiPER arms",
            arm=ArmConfig(kind="piper", options={"left": left, "right": right}),
            cameras=tuple(
                CameraConfig(role=role, kind="disturbed", options=camera) for role in spec.cameras
            ),
            world=DeviceConfig(kind="kinematic"),
        ),
        policy=PolicyOptions(
            factory="gwp_edge.soak_faults:create_policy",
            kwargs={"switch": switch},
            replan_hz=10.0,
            # A busy machine is not what is tested.
            limits=ObservationLimits(
                frame_age_ns=1_000_000_000, state_age_ns=1_000_000_000, stall_ns=1_500_000_000
            ),
        ),
        motor=MotorOptions(realtime=realtime),
        guardian_timeout_s=0.05 + patience_s,
        interactive=True,
        skip_checks=frozenset({"statistics", "first action", "latency"}),
    )
