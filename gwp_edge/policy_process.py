"""The policy process: observe, predict, publish, as often as it can or as asked."""

from __future__ import annotations

import logging
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from os import getppid
from typing import cast

import numpy as np

from gwp_edge.child_process import die_with_parent, leave_terminal
from gwp_edge.chunking import Guidance, frozen_rows
from gwp_edge.clock import MonotonicClock
from gwp_edge.errors import DeviceError, GwpError, SpecError, StaleError
from gwp_edge.mailbox import Board
from gwp_edge.observe import ObservationLimits, Observer, StateHistory
from gwp_edge.preflight import (
    check_calibration,
    check_cameras,
    check_first_action,
    check_golden,
    check_latency,
    check_statistics,
    note_bundle,
)
from gwp_edge.profiling.stamps import stamp_record
from gwp_edge.protocols import Camera, HealthReporter, Policy
from gwp_edge.record_tap import PolicyTap
from gwp_edge.robots import RobotConfig, create_camera, import_callable, world_options
from gwp_edge.spec import PolicySpec
from gwp_edge.status import EventKind, Mode, PolicyPhase, Word
from gwp_edge.telemetry import CheckResult
from gwp_edge.types import Chunk, Observation

logger = logging.getLogger(__name__)

_POLL_NS = 2_000_000
_LOOK_NS = 20_000_000
_FIRST_FRAME_NS = 10_000_000_000
_N_WARM_UP = 3
_N_REMEMBERED = 8
_WARN_EVERY_NS = 1_000_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyOptions:
    """How the policy process runs.

    Attributes:
        factory: "module:function" that makes the policy.
        kwargs: its keyword arguments.
        guidance: how a new chunk follows the old one; its rows are set from the latency.
        latency_margin_ns: added to the p95 latency when rows are frozen.
        replan_hz: chunks per second at most; None for as many as possible.
        synchronous: plan only while the arm stands at the end of the last plan.
        limits: when an observation is too old; None takes the robot's.
        tap: where to hand every chunk to a recorder; None records nothing.
    """

    factory: str
    kwargs: Mapping[str, object] = field(default_factory=dict)
    guidance: Guidance = field(default_factory=Guidance)
    latency_margin_ns: int = 10_000_000
    replan_hz: float | None = None
    synchronous: bool = False
    limits: ObservationLimits | None = None
    tap: str | None = None

    def __post_init__(self) -> None:
        if self.replan_hz is not None and not 0 < self.replan_hz <= 1000:
            raise SpecError(f"replan rate: expected above 0 up to 1000 Hz, got {self.replan_hz}")


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicySetup:
    """What the process needs; crosses to it by pickle."""

    board: str
    spec: PolicySpec
    robot: RobotConfig
    supervisor_pid: int
    extra: dict[str, object] = field(default_factory=dict)


def policy_main(setup: PolicySetup, options: PolicyOptions) -> None:
    """Run the policy process to its end; exits with 1 when something failed."""
    # The supervisor ends this process once the arm stands; a plan more does no harm until then.
    leave_terminal()
    # It may hang in a library by then, and keep the memory of a whole network.
    die_with_parent(setup.supervisor_pid)
    spec = setup.spec
    board = Board.attach(setup.board, spec.n_channels, spec.n_rows)
    say = board.events["policy"].say
    cameras: list[Camera] = []
    policy: Policy | None = None
    try:
        for config in setup.robot.cameras:
            shared = world_options(setup.robot, config, setup.extra)
            cameras.append(create_camera(config, spec, shared))
            cameras[-1].open()
        policy = _load(options, spec)
        runner = _Runner(board, policy, cameras, setup, options)
        try:
            runner.run()
        finally:
            runner.close()
        board.words[Word.POLICY_PHASE] = PolicyPhase.ENDED
    except GwpError as e:
        board.words[Word.POLICY_PHASE] = PolicyPhase.FAILED
        say(EventKind.ERROR, f"policy: {e}")
        sys.exit(1)
    except Exception as e:  # a bug in a policy or engine: the supervisor stops the arm
        board.words[Word.POLICY_PHASE] = PolicyPhase.FAILED
        say(EventKind.ERROR, f"policy process: {type(e).__name__}: {e}")
        raise
    finally:
        if policy is not None:
            policy.close()
        for camera in cameras:
            report_health(camera, say)
            camera.close()
        board.close()


def report_health(camera: Camera, say: Callable[[EventKind, str], None]) -> None:
    """Say how a camera has fared, if it keeps count; a warning where it was not perfect."""
    try:
        if not isinstance(camera, HealthReporter):
            return
        health = camera.health
    except DeviceError:
        return  # it was never opened, and that has been said
    kind = EventKind.INFO if health.is_good else EventKind.WARNING
    say(kind, f"camera {camera.name}: {health}")


def _load(options: PolicyOptions, spec: PolicySpec) -> Policy:
    policy = cast(Policy, import_callable(options.factory, "policy")(**options.kwargs))
    if policy.spec != spec:
        policy.close()
        raise SpecError(
            "the policy's spec is not the one that the run was started with; was the bundle "
            "replaced meanwhile? Start again"
        )
    return policy


class _Runner:
    """The loop and what it remembers. Threads: one owner."""

    def __init__(
        self,
        board: Board,
        policy: Policy,
        cameras: list[Camera],
        setup: PolicySetup,
        options: PolicyOptions,
    ) -> None:
        self._board = board
        self._words = board.words
        self._policy = policy
        self._spec = policy.spec
        self._options = options
        self._supervisor_pid = setup.supervisor_pid
        self._clock = MonotonicClock()
        states = StateHistory(board)
        self._limits = options.limits or ObservationLimits.of(setup.robot.observation)
        self._observer = Observer(cameras, states, self._limits)
        self._say = board.events["policy"].say
        self._published: deque[Chunk] = deque(maxlen=_N_REMEMBERED)
        self._latencies_ns: deque[int] = deque(maxlen=20)
        self._n_chunks = self._n_frozen = 0
        self._t_last_observed_ns = -1
        self._is_stale = False
        self._t_warned_ns = self._t_looked_ns = 0
        self._t_published_ns = 0
        self._used: tuple[int, Guidance | None] = (-1, None)
        self._looked: tuple[int, tuple[int, ...]] = (0, ())
        self._cpu_ns = 0
        self._tap = PolicyTap(options.tap, self._spec, cameras) if options.tap else None

    def run(self) -> None:
        """Check, warm up, then plan until told to stop."""
        if not self._preflight():
            return
        self._words[Word.POLICY_PHASE] = PolicyPhase.READY
        period_ns = round(1e9 / self._options.replan_hz) if self._options.replan_hz else 0
        t_next_ns = self._clock.now_ns()
        while not self._is_over():
            now_ns = self._clock.now_ns()
            self._words[Word.POLICY_HEARTBEAT_NS] = now_ns
            is_due = now_ns >= t_next_ns and self._may_plan()
            observation = None
            # Cameras are looked at between plans too: a stall must not wait for the next one.
            if is_due or now_ns - self._t_looked_ns >= _LOOK_NS:
                self._t_looked_ns = now_ns
                observation = self._observe(now_ns)
            if (
                not is_due
                or observation is None
                or observation.t_observed_ns <= self._t_last_observed_ns
            ):
                if is_due and observation is not None:
                    self._looked = (now_ns, tuple(f.frame_idx for f in observation.frames))
                self._clock.sleep_until_ns(now_ns + _POLL_NS)
                continue
            self._t_last_observed_ns = observation.t_observed_ns
            t_built_ns, cpu_ns = self._clock.now_ns(), time.process_time_ns()
            chunk = self._predict(observation)
            t_predicted_ns = self._clock.now_ns()
            self._cpu_ns = time.process_time_ns() - cpu_ns
            # Inference starts with the observation complete: a frame may come while it is built.
            self._publish(chunk, observation, t_built_ns)
            self._stamp(observation, now_ns, t_built_ns, t_predicted_ns)
            t_next_ns = max(t_next_ns + period_ns, now_ns)

    def _is_over(self) -> bool:
        return bool(self._words[Word.POLICY_STOP]) or getppid() != self._supervisor_pid

    def _may_plan(self) -> bool:
        if not self._options.synchronous:
            return True
        return bool(self._words[Word.MOTOR_PLAN_ENDED] and self._words[Word.MOTOR_STANDING])

    # Observation

    def _observe(self, now_ns: int) -> Observation | None:
        """Return an observation, or None after noting why there is none."""
        is_being_enabled = self._words[Word.MOTOR_MODE] == Mode.CONNECTED
        try:
            observation = self._observer.observe(now_ns)
        except StaleError as e:
            if is_being_enabled:
                return None  # nothing moves, and the arm has no state for a moment
            if not self._is_stale:
                self._is_stale = True
                self._words[Word.POLICY_N_STALE] += 1
            if now_ns - self._t_warned_ns > _WARN_EVERY_NS:
                self._t_warned_ns = now_ns
                self._say(EventKind.WARNING, f"no plan: {e}")
            if self._observer.is_stalled(now_ns):
                self._words[Word.POLICY_CAMERA_STALL] = 1
            return None
        self._is_stale = False
        self._words[Word.POLICY_CAMERA_STALL] = 0
        return observation

    # Prediction

    def _predict(self, observation: Observation) -> Chunk:
        self._n_frozen = 0
        self._used = (-1, None)
        in_motion = self._words[Word.MOTOR_MODE] == Mode.RUN
        previous = self._to_follow() if in_motion else None
        if previous is None or self._options.guidance.method == "none":
            return self._policy.predict(observation)
        guidance = self._guidance(observation)
        self._used = (previous.chunk_idx, guidance)
        return self._policy.predict(observation, previous=previous, guidance=guidance)

    def _to_follow(self) -> Chunk | None:
        """Return the newest chunk that the arm follows or is about to, or None.

        One that the motor process refused must not lead the next: its mistake would live on in
        the rows that are kept.
        """
        taken, refused = self._words[Word.MOTOR_TAKEN], self._words[Word.MOTOR_REFUSED]
        for chunk in reversed(self._published):
            number = chunk.chunk_idx + 1
            is_judged = number <= max(taken, refused)
            if np.isfinite(chunk.actions).all() and (number == taken or not is_judged):
                return chunk
        return None

    def _guidance(self, observation: Observation) -> Guidance:
        latency_ns = round(float(np.percentile(self._latencies_ns, 95)))
        age_ns = self._clock.now_ns() - observation.t_observed_ns
        n_frozen = frozen_rows(
            latency_ns + age_ns,
            self._options.latency_margin_ns,
            self._spec.period_ns,
            self._spec.n_rows,
        )
        self._n_frozen = n_frozen
        return replace(self._options.guidance, n_frozen_rows=n_frozen)

    def _publish(self, chunk: Chunk, observation: Observation, t_started_ns: int) -> None:
        chunk = replace(chunk, chunk_idx=self._n_chunks)
        self._board.publish_chunk(chunk)
        t_published_ns = self._clock.now_ns()
        self._n_chunks += 1
        self._words[Word.POLICY_N_CHUNKS] = self._n_chunks
        self._latencies_ns.append(t_published_ns - t_started_ns)
        self._t_published_ns = t_published_ns
        self._published.append(chunk)
        times = [f.t_captured_ns for f in observation.frames]
        timing = self._policy.timing
        self._board.timings.append(
            (
                chunk.chunk_idx,
                observation.t_observed_ns,
                t_started_ns,
                t_published_ns,
                t_started_ns - min(times),
                max(times) - min(times),
                timing.preprocess_ns + timing.guide_ns,
                timing.vision_ns,
                timing.prefill_ns,
                sum(timing.denoise_ns),
                timing.postprocess_ns,
                self._n_frozen,
            )
        )
        self._record(chunk, observation, t_started_ns, t_published_ns)

    def _stamp(
        self, observation: Observation, t_started_ns: int, t_built_ns: int, t_predicted_ns: int
    ) -> None:
        self._board.stamps.append(
            stamp_record(
                self._n_chunks - 1,
                observation,
                self._policy.timing,
                t_started_ns=t_started_ns,
                t_built_ns=t_built_ns,
                t_predicted_ns=t_predicted_ns,
                t_published_ns=self._t_published_ns,
                n_frozen_rows=self._n_frozen,
                cpu_ns=self._cpu_ns,
                t_looked_ns=self._looked[0],
                looked_idx=self._looked[1],
            )
        )
        self._looked = (0, ())

    def _record(
        self, chunk: Chunk, observation: Observation, t_started_ns: int, t_published_ns: int
    ) -> None:
        if self._tap is None:
            return
        previous_idx, guidance = self._used
        try:
            self._tap.write(
                chunk,
                observation,
                self._policy,
                t_started_ns=t_started_ns,
                t_published_ns=t_published_ns,
                previous_idx=previous_idx,
                guidance=guidance,
            )
        except DeviceError as e:
            # A run without its record is better than no run.
            self._say(EventKind.WARNING, f"no longer recording: {e}")
            self._tap.close()
            self._tap = None

    def close(self) -> None:
        """Let go of the recorder's memory."""
        if self._tap is not None:
            self._tap.close()

    # Preflight

    def _preflight(self) -> bool:
        """Run this process's checks; return False when the end came first."""
        loaded_with = self._options.kwargs
        for line in (*note_bundle(loaded_with), *check_calibration(loaded_with)):
            self._check(line)
        t_golden_ns = self._clock.now_ns()
        self._check(check_golden(self._policy))
        n_called = self._stamp_golden(t_golden_ns)
        observation = self._await_observation()
        if observation is None:
            return False
        self._check(check_cameras(observation, self._clock.now_ns(), self._limits))
        self._check(check_statistics(self._spec, observation.state))
        chunk: Chunk | None = None
        latency_ns = 0
        for i in range(_N_WARM_UP):
            fresh = self._await_observation()
            if fresh is None:
                return False
            observation, t_ns = fresh, self._clock.now_ns()
            chunk = self._policy.predict(observation)
            t_predicted_ns = self._clock.now_ns()
            latency_ns = t_predicted_ns - t_ns
            self._board.stamps.append(
                stamp_record(
                    -1 - n_called - i,
                    observation,
                    self._policy.timing,
                    t_started_ns=t_ns,
                    t_built_ns=t_ns,
                    t_predicted_ns=t_predicted_ns,
                    t_published_ns=t_predicted_ns,
                )
            )
        if chunk is not None and self._options.guidance.warm_start_sigma < 1:
            # It takes fewer steps: an engine that captures whole chunks captures that one apart.
            self._policy.predict(observation, previous=chunk, guidance=self._options.guidance)
        self._latencies_ns.append(latency_ns)
        self._check(check_latency(latency_ns, self._spec, synchronous=self._options.synchronous))
        if chunk is not None:
            self._check(check_first_action(self._spec, chunk, observation.state))
        return True

    def _stamp_golden(self, t_begin_ns: int) -> int:
        """Stamp the golden run as the first call, which is the cold one; return 1 if it was one."""
        t_end_ns = self._clock.now_ns()
        try:
            timing = self._policy.timing
        except SpecError:
            return 0
        if not 0 < timing.total_ns <= t_end_ns - t_begin_ns:
            return 0  # this policy predicts nothing for its golden run
        self._board.stamps.append(
            stamp_record(
                -1,
                None,
                timing,
                t_started_ns=t_end_ns - timing.total_ns,
                t_built_ns=t_end_ns - timing.total_ns,
                t_predicted_ns=t_end_ns,
                t_published_ns=t_end_ns,
            )
        )
        return 1

    def _await_observation(self) -> Observation | None:
        deadline_ns = self._clock.now_ns() + _FIRST_FRAME_NS
        while not self._is_over():
            now_ns = self._clock.now_ns()
            try:
                return self._observer.observe(now_ns)
            except StaleError as e:
                if now_ns > deadline_ns:
                    raise StaleError(f"no observation in {_FIRST_FRAME_NS / 1e9:.0f} s: {e}") from e
            self._clock.sleep_until_ns(now_ns + _POLL_NS)
        return None

    def _check(self, result: CheckResult) -> None:
        kind = EventKind.CHECK_PASSED if result.passed else EventKind.CHECK_FAILED
        self._say(kind, f"{result.name}: {result.detail}")
