"""The policy process: observe, predict, publish, as often as it can or as asked."""

from __future__ import annotations

import logging
import sys
import time
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from os import getppid
from typing import cast

import numpy as np

from gwp_edge.camera_watch import CameraWatch
from gwp_edge.child_process import die_with_parent, leave_terminal
from gwp_edge.chunking import Guidance, frozen_rows
from gwp_edge.clock import MonotonicClock
from gwp_edge.errors import DeviceError, GwpError, SpecError, StaleError
from gwp_edge.mailbox import Board
from gwp_edge.observe import ObservationLimits, Observer, StateHistory
from gwp_edge.policy_checks import POLL_NS, PolicyChecks
from gwp_edge.policy_options import PolicyOptions, PolicySetup
from gwp_edge.profiling.stamps import stamp_record
from gwp_edge.protocols import Camera, HealthReporter, Policy
from gwp_edge.record_tap import PolicyTap
from gwp_edge.robots import create_camera, import_callable, world_options
from gwp_edge.shared_memory import fence
from gwp_edge.spec import PolicySpec
from gwp_edge.status import EventKind, Mode, PolicyPhase, Word
from gwp_edge.types import Chunk, Observation

logger = logging.getLogger(__name__)

_LOOK_NS = 20_000_000
# Of the time after which a stall holds the arm: how often it is looked for during an inference,
# which a look of its own must not slow down.
_WATCH_SHARE = 0.1
_N_REMEMBERED = 8
_WARN_EVERY_NS = 1_000_000_000


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
        # First, as closing may take longer than this process is given.
        for camera in cameras:
            report_health(camera, say)
        if policy is not None:
            policy.close()
        for camera in cameras:
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
        limits = options.limits or ObservationLimits.of(setup.robot.observation)
        self._observer = Observer(cameras, states, limits)
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
        self._stalled_over = ""
        self._tap = PolicyTap(options.tap, self._spec, cameras) if options.tap else None
        self._watch = CameraWatch(self._watch_cameras, limits.stall_ns * _WATCH_SHARE / 1e9)

    def run(self) -> None:
        """Check, warm up, then plan until told to stop."""
        checks = PolicyChecks(
            self._board, self._policy, self._observer, self._options, self._clock, self._is_over
        )
        latency_ns = checks.run()
        if latency_ns is None:
            return
        self._latencies_ns.append(latency_ns)
        # Whoever sees the phase must find every check's line, failed ones above all.
        fence()
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
                with self._watch.owned():
                    observation = self._observe(now_ns)
            if (
                not is_due
                or observation is None
                or observation.t_observed_ns <= self._t_last_observed_ns
            ):
                if is_due and observation is not None:
                    self._looked = (now_ns, tuple(f.frame_idx for f in observation.frames))
                self._clock.sleep_until_ns(now_ns + POLL_NS)
                continue
            self._t_last_observed_ns = observation.t_observed_ns
            t_built_ns, cpu_ns = self._clock.now_ns(), time.process_time_ns()
            with self._watch.busy():
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
        if self._stalled_over:
            self._say(EventKind.WARNING, f"during an inference: {self._stalled_over}")
            self._stalled_over = ""
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

    def _watch_cameras(self, now_ns: int) -> None:
        """Look during an inference: hold over a stall, and let the owner of the words say so."""
        if self._words[Word.MOTOR_MODE] == Mode.CONNECTED:
            return
        try:
            self._observer.observe(now_ns)
        except StaleError as e:
            if self._observer.is_stalled(now_ns) and not self._words[Word.POLICY_CAMERA_STALL]:
                self._words[Word.POLICY_CAMERA_STALL] = 1
                self._stalled_over = str(e)
        except DeviceError:
            self._words[Word.POLICY_CAMERA_STALL] = 1
            raise
        else:
            self._words[Word.POLICY_CAMERA_STALL] = 0

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
        """End the watch and let go of the recorder's memory."""
        self._watch.close()
        if self._tap is not None:
            self._tap.close()
