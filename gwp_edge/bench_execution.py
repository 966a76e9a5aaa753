"""Compare ways of following one chunk with the next, on a toy whose right answer is known.

The toy has two channels. ``side`` must pass an obstacle every 2.5 s, left or right of it: the
policy knows both ways and no other, so the mean of the two is a collision. ``goal`` must go to a
place that moves without notice. The policy is an exact flow-matching velocity field of that
mixture, sampled by the same Euler steps, guidance, schedule and limiter as a real one; latency is
simulated, so the table does not depend on the machine.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Final

import numpy as np

from gwp_edge.chunking import Guidance, frozen_rows, prefix_gain, shift_rows, warm_start_step
from gwp_edge.errors import SpecError
from gwp_edge.safety import Limiter
from gwp_edge.schedule import Acceptance, Blend, Schedule
from gwp_edge.types import Chunk, FloatArray, JointLimits

LATENCIES_MS: Final = (0.0, 100.0, 200.0, 400.0)
_TICK_NS: Final = 5_000_000
_PERIOD_NS: Final = 33_333_333
_REPLAN_NS: Final = 100_000_000
_MARGIN_NS: Final = 20_000_000
_N_ROWS: Final = 48
_N_STEPS: Final = 20  # with 10, one plan in ten ends between the two ways
_SHIFT: Final = 5.0
_T0_NS: Final = 1_000_000_000

# The toy, in rad and s.
OBSTACLE_EVERY_S: Final = 2.5
FIRST_OBSTACLE_S: Final = 1.5
_BUMP: Final = 0.4
_BUMP_WIDTH_S: Final = 0.35
CLEAR_OF_OBSTACLE: Final = 0.2
GOAL_EVERY_S: Final = 4.0
_GOAL: Final = 0.3
_APPROACH_S: Final = 0.3
_SPREAD: Final = 0.01
_SEES_SIDE: Final = 0.15  # how far the arm must be to one side for the policy to see that it is

_LIMITS: Final = JointLimits(
    position_min=np.full(2, -2.0),
    position_max=np.full(2, 2.0),
    velocity_max=np.full(2, 3.0),
    acceleration_max=np.full(2, 15.0),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    """One way of following chunks.

    Attributes:
        name: as ``run --execution`` calls it, where it has it.
        guidance: inside the denoising loop.
        blend: between plans.
        synchronous: plan, execute all of it, stand, plan again.
    """

    name: str
    guidance: Guidance
    blend: Blend = "seam"
    synchronous: bool = False


METHODS: Final = (
    Method(name="soft", guidance=Guidance(method="soft")),
    Method(name="hard", guidance=Guidance(method="hard")),
    Method(name="identity", guidance=Guidance(method="identity")),
    Method(name="warm start", guidance=Guidance(method="soft", warm_start_sigma=0.7)),
    Method(name="naive", guidance=Guidance(method="none")),
    Method(name="naive, no seam", guidance=Guidance(method="none"), blend="none"),
    Method(name="ensemble", guidance=Guidance(method="none"), blend="ensemble"),
    Method(name="sync", guidance=Guidance(method="none"), blend="none", synchronous=True),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class ExecutionResult:
    """How one method did at one latency.

    Attributes:
        method: its name.
        latency_ms: from observation to chunk.
        seam_p95_mrad: new plan against the target in force, when it takes over.
        jerk_rms_rad_s3: of the commands sent.
        cleared_share: obstacles that were passed on either side.
        changes_of_mind: how often a plan chose the other side, per obstacle.
        age_mean_ms: of the observation behind a command.
        reaction_p50_ms: from the goal's move until half the way is gone; NaN when none was.
        n_chunks: plans taken over.
    """

    method: str
    latency_ms: float
    seam_p95_mrad: float
    jerk_rms_rad_s3: float
    cleared_share: float
    changes_of_mind: float
    age_mean_ms: float
    reaction_p50_ms: float
    n_chunks: int

    def to_dict(self) -> dict[str, object]:
        """Return it for JSON."""
        return asdict(self)


def obstacle_times_s(duration_s: float) -> FloatArray:
    """Return when the obstacles pass, s."""
    return np.arange(FIRST_OBSTACLE_S, duration_s - 0.1, OBSTACLE_EVERY_S)


def way_round(t_s: FloatArray) -> FloatArray:
    """Return how far to the side the obstacle next to ``t_s`` asks to be, rad."""
    phase = (t_s - FIRST_OBSTACLE_S + OBSTACLE_EVERY_S / 2) % OBSTACLE_EVERY_S
    bump: FloatArray = _BUMP * np.exp(-(((phase - OBSTACLE_EVERY_S / 2) / _BUMP_WIDTH_S) ** 2))
    return bump


def goal_at(t_s: float) -> float:
    """Return where the goal is, rad."""
    return _GOAL if int(t_s / GOAL_EVERY_S) % 2 else -_GOAL


class ToyPolicy:
    """An exact velocity field of a mixture of two plans. Threads: one owner."""

    def __init__(self, seed: int) -> None:
        self._rng = np.random.default_rng(seed)
        linear = np.linspace(1.0, 0.0, _N_STEPS + 1)
        self.sigmas: FloatArray = _SHIFT * linear / (1.0 + (_SHIFT - 1.0) * linear)

    def predict(
        self, t_s: float, state: FloatArray, previous: Chunk | None, guidance: Guidance
    ) -> FloatArray:
        """Return a plan from the observation of ``state`` (2,) at ``t_s``; (H, 2), rad."""
        plans, weights = self._plans(t_s, state)
        x = self._rng.standard_normal((_N_ROWS, 2))
        gain = np.zeros((_N_STEPS, _N_ROWS, 1))
        prefix, first = np.zeros_like(x), 0
        if previous is not None and guidance.method != "none":
            prefix, n_real = shift_rows(previous, _ns(t_s), _PERIOD_NS, _N_ROWS)
            if n_real:
                gain = prefix_gain(guidance.within(n_real), self.sigmas, _N_ROWS).astype(float)
                first = warm_start_step(guidance, self.sigmas)
                if first:
                    x = (1.0 - self.sigmas[first]) * prefix + self.sigmas[first] * x
        for i in range(first, _N_STEPS):
            sigma = self.sigmas[i]
            v = self._velocity(x, sigma, plans, weights)
            v = v - gain[i] * (prefix - (x - sigma * v))
            x = x + (self.sigmas[i + 1] - sigma) * v
        return x

    @staticmethod
    def _plans(t_s: float, state: FloatArray) -> tuple[FloatArray, FloatArray]:
        """Return both plans, (2, H, 2), and their log weights, (2,)."""
        ahead_s = np.arange(_N_ROWS) * _PERIOD_NS / 1e9
        fade = np.exp(-ahead_s / _APPROACH_S)
        way, here = way_round(t_s + ahead_s), float(way_round(np.array(t_s)))
        goal = goal_at(t_s)
        plans, log_weights = [], []
        for side in (-1.0, 1.0):
            off = state[0] - side * here
            plans.append(np.stack([side * way + off * fade, goal + (state[1] - goal) * fade], 1))
            log_weights.append(-0.5 * (off / _SEES_SIDE) ** 2)
        return np.stack(plans), np.array(log_weights)

    @staticmethod
    def _velocity(
        x: FloatArray, sigma: float, plans: FloatArray, log_weights: FloatArray
    ) -> FloatArray:
        """Return E[noise - action | x] at noise level ``sigma``."""
        variance = sigma**2 + ((1.0 - sigma) * _SPREAD) ** 2
        away = x - (1.0 - sigma) * plans
        log_p = log_weights - 0.5 * (away**2).sum(axis=(1, 2)) / variance
        p = np.exp(log_p - log_p.max())
        p /= p.sum()
        clean = plans + (1.0 - sigma) * _SPREAD**2 / variance * away
        expected = np.tensordot(p, clean, axes=1)
        velocity: FloatArray = (x - expected) / sigma
        return velocity


@dataclass(slots=True)
class _Record:
    commands: list[FloatArray]
    ages_ns: list[int]
    seams: list[float]
    sides: list[tuple[int, float]]  # obstacle and the side on which a plan passes it
    n_chunks: int = 0


def measure(
    method: Method, latency_ms: float, *, duration_s: float = 60.0, seed: int = 0
) -> ExecutionResult:
    """Execute the toy with one method at one latency.

    Args:
        method: how chunks follow each other.
        latency_ms: from observation to chunk.
        duration_s: simulated time.
        seed: of the policy's noise.

    Raises:
        SpecError: a time does not make sense.
    """
    if not (math.isfinite(latency_ms) and 0.0 <= latency_ms <= 1000.0):
        raise SpecError(f"latency: expected 0 to 1000 ms, got {latency_ms}")
    if not (math.isfinite(duration_s) and duration_s >= 2 * GOAL_EVERY_S):
        raise SpecError(f"duration: expected at least {2 * GOAL_EVERY_S:g} s, got {duration_s}")
    record = _execute(method, round(latency_ms * 1e6), duration_s, seed)
    return _judge(method, latency_ms, duration_s, record)


def compare(
    *, latencies_ms: Sequence[float] = LATENCIES_MS, duration_s: float = 60.0, seed: int = 0
) -> list[ExecutionResult]:
    """Measure every method at every latency."""
    return [
        measure(method, latency_ms, duration_s=duration_s, seed=seed)
        for latency_ms in latencies_ms
        for method in METHODS
    ]


def _ns(t_s: float) -> int:
    return _T0_NS + round(t_s * 1e9)


def _execute(method: Method, latency_ns: int, duration_s: float, seed: int) -> _Record:
    policy = ToyPolicy(seed)
    schedule = Schedule(_LIMITS, blend=method.blend, rebase=method.synchronous)
    limiter = Limiter(_LIMITS, period_s=_TICK_NS / 1e9)
    start = np.array([0.0, goal_at(0.0)])
    limiter.seed(start)
    schedule.hold(start)
    record = _Record([], [], [], [])
    guidance = replace(
        method.guidance,
        n_frozen_rows=frozen_rows(latency_ns, _MARGIN_NS, _PERIOD_NS, _N_ROWS),
    )
    published: Chunk | None = None
    coming: Chunk | None = None
    t_next_ns = t_ready_ns = _T0_NS
    for now_ns in range(_T0_NS, _ns(duration_s), _TICK_NS):
        if coming is not None and now_ns >= t_ready_ns:
            _take_over(schedule, coming, now_ns, record)
            if method.blend != "none" and any(limiter.flags):  # as the motor loop does
                schedule.reseam(now_ns, limiter.position, limiter.velocity)
            published, coming = coming, None
        may_plan = not method.synchronous or (schedule.ended(now_ns) and limiter.standing)
        if coming is None and now_ns >= t_next_ns and may_plan:
            t_s = (now_ns - _T0_NS) / 1e9
            rows = policy.predict(t_s, limiter.position.copy(), published, guidance)
            coming = Chunk(
                actions=rows,
                t_observed_ns=now_ns,
                period_ns=_PERIOD_NS,
                chunk_idx=record.n_chunks,
            )
            t_ready_ns, t_next_ns = now_ns + latency_ns, now_ns + max(_REPLAN_NS, latency_ns)
            _note_side(record, coming)
        record.commands.append(limiter.step(schedule.sample(now_ns)).copy())
        if schedule.t_observed_ns:
            record.ages_ns.append(now_ns - schedule.t_observed_ns)
    return record


def _take_over(schedule: Schedule, chunk: Chunk, now_ns: int, record: _Record) -> None:
    before = schedule.sample(now_ns).copy()
    was_active = schedule.active
    if schedule.accept(chunk, now_ns) is not Acceptance.ACCEPTED:
        return
    record.n_chunks += 1
    if was_active:
        rows, _ = shift_rows(chunk, now_ns, chunk.period_ns, 1)
        record.seams.append(float(np.abs(rows[0] - before).max()))


def _note_side(record: _Record, chunk: Chunk) -> None:
    """Note on which side this plan passes the next obstacle that it reaches."""
    t_s = (chunk.t_observed_ns - _T0_NS) / 1e9
    idx = max(0, math.ceil((t_s - FIRST_OBSTACLE_S) / OBSTACLE_EVERY_S))
    at_s = FIRST_OBSTACLE_S + idx * OBSTACLE_EVERY_S
    row = round((at_s - t_s) * 1e9 / chunk.period_ns)
    if row < len(chunk.actions):
        record.sides.append((idx, float(np.sign(chunk.actions[row, 0]))))


def _judge(
    method: Method, latency_ms: float, duration_s: float, record: _Record
) -> ExecutionResult:
    commands = np.array(record.commands)
    tick_s = _TICK_NS / 1e9
    jerk = np.diff(commands, n=3, axis=0) / tick_s**3
    obstacles_s = obstacle_times_s(duration_s)
    passed = np.abs(commands[np.rint(obstacles_s / tick_s).astype(int), 0])
    changes = sum(
        a[0] == b[0] and a[1] != b[1]
        for a, b in zip(record.sides[:-1], record.sides[1:], strict=True)
    )
    return ExecutionResult(
        method=method.name,
        latency_ms=latency_ms,
        seam_p95_mrad=1e3 * float(np.percentile(record.seams, 95)) if record.seams else math.nan,
        jerk_rms_rad_s3=float(np.sqrt((jerk**2).mean())),
        cleared_share=float((passed >= CLEAR_OF_OBSTACLE).mean()),
        changes_of_mind=changes / len(obstacles_s),
        age_mean_ms=float(np.mean(record.ages_ns)) / 1e6,
        reaction_p50_ms=_reaction_ms(commands[:, 1], duration_s),
        n_chunks=record.n_chunks,
    )


def _reaction_ms(goal_channel: FloatArray, duration_s: float) -> float:
    tick_s = _TICK_NS / 1e9
    n_until_next = round(GOAL_EVERY_S / tick_s)
    times: list[float] = []
    for t_s in np.arange(GOAL_EVERY_S, duration_s - GOAL_EVERY_S + tick_s, GOAL_EVERY_S):
        first = round(t_s / tick_s)
        side = math.copysign(1.0, goal_at(t_s + tick_s))
        there = np.flatnonzero(side * goal_channel[first : first + n_until_next] > 0.0)
        times.append(1e3 * tick_s * float(there[0]) if len(there) else math.nan)
    return float(np.median(times)) if not np.isnan(times).all() else math.nan
