"""One closed-loop episode in simulated time: world, policy, schedule and limiter, no clock.

The parts are those of a real run; what is simulated is time. An inference takes as long as it is
told to, so that results depend on the bundle, the task and the options, not on the machine.
"""

from __future__ import annotations

import zlib
from collections import deque
from dataclasses import dataclass, field, replace
from typing import Final, Protocol

import numpy as np

from gwp_edge.chunking import Guidance, frozen_rows
from gwp_edge.drivers import piper_model
from gwp_edge.drivers.sim_world import SimWorld
from gwp_edge.errors import SpecError
from gwp_edge.evaluation.options import TICK_NS, EpisodeOptions
from gwp_edge.evaluation.tasks import Outcome, TouchTask
from gwp_edge.safety import Limiter
from gwp_edge.schedule import Acceptance, Schedule
from gwp_edge.spec import PolicySpec
from gwp_edge.types import Chunk, Float32Array, FloatArray, Frame, ImageArray, Observation

_T0_NS: Final = 1_000_000_000  # the schedule takes 0 for "no observation yet"
_MARGIN_NS: Final = 20_000_000
_N_PICTURES: Final = 64
_GREY: Final = 128


class ChunkPolicy(Protocol):
    """What an episode asks of a policy; ``BundlePolicy`` is one."""

    @property
    def spec(self) -> PolicySpec:
        """What it expects and gives."""
        ...

    def predict(
        self,
        observation: Observation,
        *,
        noise: Float32Array | None = None,
        previous: Chunk | None = None,
        guidance: Guidance | None = None,
    ) -> Chunk:
        """Return a plan of absolute actions, stamped with the observation's time."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class EpisodeResult:
    """How one episode went.

    Attributes:
        seed: of scene, start pose and noise.
        instruction: what the arm was to do.
        outcome: how it ended.
        time_s: until it ended, from the first observation.
        n_chunks: plans that were taken over.
        limited_share: ticks in which the limiter changed or rejected the target.
        withheld_p50_rad: by how much it did, median over ticks of the largest joint difference.
        withheld_p99_rad: the same at the 99th percentile.
        tool_path_m: way of the tool.
        directness: straight line from the tool's start to its end over its way, 0 to 1.
        jerk_rms_rad_s3: of the commanded joints.
        pictures: canvases of the inferences, as the policy saw them; empty unless asked for.
    """

    seed: int
    instruction: str
    outcome: Outcome
    time_s: float
    n_chunks: int
    limited_share: float
    withheld_p50_rad: float
    withheld_p99_rad: float
    tool_path_m: float
    directness: float
    jerk_rms_rad_s3: float
    pictures: tuple[ImageArray, ...] = field(default=(), repr=False)


def check_fits(spec: PolicySpec, task: TouchTask) -> None:
    """Check that a policy can do the task at all.

    Raises:
        SpecError: number of channels, a camera, or an instruction does not fit.
    """
    n = piper_model.N_CHANNELS * task.n_arms
    if spec.n_channels != n:
        raise SpecError(
            f"task {task.name} drives {n} channels, the bundle {spec.n_channels}; "
            "it needs a policy that was trained for the task"
        )
    missing = [c for c in spec.cameras if c not in task.mounts]
    if missing:
        raise SpecError(
            f"task {task.name} has no camera {', '.join(missing)}; it has {', '.join(task.mounts)}"
        )
    unknown = [i for i in task.instructions if i not in spec.tasks]
    if unknown:
        raise SpecError(
            f"the bundle has no prompt {unknown[0]!r}, which task {task.name} gives; it has "
            f"{', '.join(map(repr, spec.tasks))}"
        )


class EpisodeRunner:
    """Runs episodes of a task in worlds of its own. Threads: one owner.

    Args:
        task: what to do.
        spec: of the policies that will run.
        options: how.
        keep_pictures: keep canvases for pictures of failures.
    """

    def __init__(
        self, task: TouchTask, spec: PolicySpec, options: EpisodeOptions, *, keep_pictures: bool
    ) -> None:
        self._task = task
        self._spec = spec
        self._options = options
        self._keep_pictures = keep_pictures
        self._world = task.open_world(spec.cameras)
        # Pictures of the past are drawn in a second world, so that physics is not disturbed.
        delayed = options.camera_delay_ms > 0
        self._viewer = task.open_world(spec.cameras) if delayed else self._world
        n_past = round(options.camera_delay_ms * 1e6 / TICK_NS)
        self._past: deque[tuple[FloatArray, FloatArray]] = deque(maxlen=n_past + 1)
        self._limits = piper_model.joint_limits(task.n_arms)

    def close(self) -> None:
        """Free the worlds."""
        self._world.close()
        if self._viewer is not self._world:
            self._viewer.close()

    def run(self, policy: ChunkPolicy, instruction: str, seed: int) -> EpisodeResult:
        """Run one episode.

        Args:
            policy: follows ``instruction``, or another one for an ablation.
            instruction: by which success is judged.
            seed: of the scene, the start pose, noise and jitter.
        """
        self._task.reset(self._world, seed)
        if self._viewer is not self._world:
            self._task.reset(self._viewer, seed)
        self._past.clear()
        return _Episode(self, policy, instruction, seed).run()

    # -- what an episode needs ------------------------------------------------------------------

    @property
    def task(self) -> TouchTask:
        """What is done."""
        return self._task

    @property
    def world(self) -> SimWorld:
        """Where it is done."""
        return self._world

    @property
    def options(self) -> EpisodeOptions:
        """How it is done."""
        return self._options

    @property
    def keeps_pictures(self) -> bool:
        """Whether canvases are wanted."""
        return self._keep_pictures

    def make_motion(self) -> tuple[Schedule, Limiter]:
        """Return a schedule and a limiter at rest at the present pose."""
        o = self._options
        schedule = Schedule(
            self._limits, lead_ns=round(o.lead_ms * 1e6), blend=o.blend, rebase=o.synchronous
        )
        limiter = Limiter(self._limits, period_s=TICK_NS / 1e9, channels=self._spec.channels)
        start = self._world.position
        limiter.seed(start)
        schedule.hold(start)
        return schedule, limiter

    def remember(self) -> None:
        """Keep what the world and the arm's state are now, for observations that come late."""
        self._past.append((self._world.qpos, self._world.position))

    def observe(self, now_ns: int, frame_idx: int) -> Observation:
        """Return pictures as old as asked, and the arm's state of the same moment.

        A run does the same: its observer takes the state at the oldest picture's time.
        """
        qpos, position = self._past[0]
        age_ns = (len(self._past) - 1) * TICK_NS
        if self._viewer is not self._world:
            self._viewer.set_qpos(qpos)
        frames = []
        for camera in self._spec.cameras:
            image = self._viewer.render(camera)
            if self._options.ablation == "blank-cameras":
                image = np.full_like(image, _GREY)
            frames.append(
                Frame(
                    camera=camera,
                    image=image,
                    t_captured_ns=now_ns - age_ns,
                    t_received_ns=now_ns,
                    frame_idx=frame_idx,
                )
            )
        return Observation(frames=tuple(frames), state=position, t_state_ns=now_ns - age_ns)


class _Episode:
    def __init__(
        self, runner: EpisodeRunner, policy: ChunkPolicy, instruction: str, seed: int
    ) -> None:
        self._runner, self._policy = runner, policy
        self._instruction, self._seed = instruction, seed
        self._options = o = runner.options
        self._schedule, self._limiter = runner.make_motion()
        spec = policy.spec
        self._noise_shape = (spec.n_rows, spec.network.n_action_channels)
        longest_ns = round((o.latency_ms + o.latency_jitter_ms + o.camera_delay_ms) * 1e6)
        self._guidance = Guidance(
            method=o.guidance,
            n_frozen_rows=frozen_rows(longest_ns, _MARGIN_NS, spec.period_ns, spec.n_rows),
        )
        # Stable over runs and Pythons, unlike hash(); the instruction counts in it.
        self._jitter = np.random.default_rng((seed, zlib.crc32(instruction.encode()), 1))
        self._published: Chunk | None = None
        self._coming: Chunk | None = None
        self._t_ready_ns = self._t_next_ns = _T0_NS
        self._n_asked = self._n_chunks = self._n_limited = 0
        self._withheld_rad: list[float] = []
        self._commands: list[FloatArray] = []
        self._tool: list[FloatArray] = []
        self._pictures: list[ImageArray] = []

    def run(self) -> EpisodeResult:
        world, task = self._runner.world, self._runner.task
        now_ns = _T0_NS
        outcome: Outcome = "running"
        while outcome == "running":
            self._runner.remember()
            self._plan(now_ns)
            target = self._schedule.sample(now_ns)
            command = self._limiter.step(target).copy()
            self._n_limited += any(self._limiter.flags) or self._limiter.rejected is not None
            self._withheld_rad.append(float(np.abs(target - command)[: piper_model.N_JOINTS].max()))
            self._commands.append(command)
            self._tool.append(world.tool_pose()[:3, 3].copy())
            now_ns += TICK_NS
            due_ns = now_ns - _T0_NS - world.time_ns
            world.step(command, n_steps=max(1, round(due_ns / world.period_ns)))
            outcome = task.outcome(world, self._instruction)
        self._tool.append(world.tool_pose()[:3, 3].copy())
        return self._result(outcome, (now_ns - _T0_NS) / 1e9)

    def _plan(self, now_ns: int) -> None:
        if self._coming is not None and now_ns >= self._t_ready_ns:
            self._take_over(self._coming, now_ns)
            self._coming = None
        o = self._options
        # A synchronous run plans when the arm has done all of the last plan and stands.
        standing = self._schedule.ended(now_ns) and self._limiter.standing
        if o.synchronous and self._schedule.active and not standing:
            return
        if self._coming is None and now_ns >= self._t_next_ns:
            self._coming = self._infer(now_ns)
            latency_ms = o.latency_ms + o.latency_jitter_ms * self._jitter.random()
            self._t_ready_ns = now_ns + round(latency_ms * 1e6)
            self._t_next_ns = now_ns + round(1e9 / o.replan_hz)
            if now_ns >= self._t_ready_ns:
                self._take_over(self._coming, now_ns)
                self._coming = None

    def _infer(self, now_ns: int) -> Chunk:
        observation = self._runner.observe(now_ns, self._n_asked)
        # The same noise for every bundle, so that bundles can be compared episode by episode.
        rng = np.random.default_rng((self._seed, self._n_asked, 2))
        chunk = self._policy.predict(
            observation,
            noise=rng.standard_normal(self._noise_shape, dtype=np.float32),
            previous=None if self._options.synchronous else self._published,
            guidance=self._guidance,
        )
        self._n_asked += 1
        if self._runner.keeps_pictures and len(self._pictures) < _N_PICTURES:
            self._pictures.append(np.hstack(_same_height([f.image for f in observation.frames])))
        return replace(chunk, chunk_idx=self._n_asked)

    def _take_over(self, chunk: Chunk, now_ns: int) -> None:
        if self._schedule.accept(chunk, now_ns) is not Acceptance.ACCEPTED:
            return
        if self._options.blend != "none" and any(self._limiter.flags):  # as the motor loop does
            self._schedule.reseam(now_ns, self._limiter.position, self._limiter.velocity)
        self._published = chunk
        self._n_chunks += 1

    def _result(self, outcome: Outcome, time_s: float) -> EpisodeResult:
        way = np.array(self._tool)
        length_m = float(np.linalg.norm(np.diff(way, axis=0), axis=1).sum())
        straight_m = float(np.linalg.norm(way[-1] - way[0]))
        jerk = np.diff(np.array(self._commands)[:, : piper_model.N_JOINTS], n=3, axis=0)
        jerk_rad_s3 = jerk / (TICK_NS / 1e9) ** 3
        p50_rad, p99_rad = np.percentile(self._withheld_rad, (50, 99))
        return EpisodeResult(
            seed=self._seed,
            instruction=self._instruction,
            outcome=outcome,
            time_s=time_s,
            n_chunks=self._n_chunks,
            limited_share=self._n_limited / len(self._commands),
            withheld_p50_rad=float(p50_rad),
            withheld_p99_rad=float(p99_rad),
            tool_path_m=length_m,
            directness=straight_m / length_m if length_m > 0 else 0.0,
            jerk_rms_rad_s3=float(np.sqrt(np.mean(jerk_rad_s3**2))) if len(jerk) else 0.0,
            pictures=tuple(self._pictures),
        )


def _same_height(images: list[ImageArray]) -> list[ImageArray]:
    height = min(len(image) for image in images)
    return [image[:height] for image in images]
