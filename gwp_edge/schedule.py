"""From chunks to one target per tick: index by time, smooth between rows and between chunks.

Pure: the time comes in as an argument. Between rows the target is a Catmull-Rom spline. Where a
new chunk takes over, the difference in position and speed to the old plan is carried along and
faded out by a quintic, so neither jumps. A plan that nobody replaces slows down along its own path
and stands still on its last row; rows are never repeated and never wrapped around.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Callable
from typing import Final, Literal

import numpy as np

from gwp_edge.errors import SpecError
from gwp_edge.types import Chunk, FloatArray, JointLimits

Blend = Literal["seam", "ensemble", "none"]

# What a seam and an end may use of the limits; the rest is for the plan's own motion.
SEAM_SHARE: Final = 0.5
JERK_TIME_S: Final = 0.1  # jerk limit = acceleration limit per this time
# A fade that grows with what it has to fade, begun anew with every chunk, may never come down; one
# of bounded length always does. The limiter keeps the limits where this is too short for them.
SEAM_MAX_S: Final = 1.0
ENSEMBLE_DECAY: Final = 0.01
N_ENSEMBLE: Final = 16
# Clocks of one machine agree; a chunk from farther in the future has a wrong stamp.
_FUTURE_NS: Final = 50_000_000


class Acceptance(enum.Enum):
    """What became of a chunk."""

    ACCEPTED = "accepted"
    NOT_FINITE = "not finite"
    OLDER = "older than the running one"
    EXPIRED = "over before it arrived"
    FROM_FUTURE = "stamped in the future"
    BAD_SHAPE = "of another shape"


class _Plan:
    """One chunk as a spline, with its slowing down at the end."""

    def __init__(self, chunk: Chunk, t_start_ns: int, acceleration_max: FloatArray) -> None:
        rows = chunk.actions
        H = len(rows)
        self.chunk_idx = chunk.chunk_idx
        self.t_observed_ns = chunk.t_observed_ns
        self.t_start_ns = t_start_ns
        self.period_ns = chunk.period_ns
        self.last_row = H - 1
        if H == 1:
            self._coefficients = np.concatenate([rows, np.zeros((3, rows.shape[1]))])[None]
        else:
            slopes = np.gradient(rows, axis=0)
            p0, p1, m0, m1 = rows[:-1], rows[1:], slopes[:-1], slopes[1:]
            self._coefficients = np.stack(
                [p0, m0, 3.0 * (p1 - p0) - 2.0 * m0 - m1, 2.0 * (p0 - p1) + m0 + m1], axis=1
            )
        self._slow_rows = self._slowing_rows(rows, acceleration_max)
        self.slow_from = self.last_row - 0.5 * self._slow_rows
        self.ends_at = self.slow_from + self._slow_rows

    def _slowing_rows(self, rows: FloatArray, acceleration_max: FloatArray) -> float:
        """Rows over which the rate along the path falls from 1 to 0: T = 1.5 v / a."""
        if self.last_row == 0:
            return 0.0
        period_s = self.period_ns / 1e9
        n_tail = max(2, len(rows) // 3)
        speed = np.abs(np.diff(rows[-n_tail:], axis=0)).max(axis=0) / period_s
        time_s = 1.5 * float((speed / (SEAM_SHARE * acceleration_max)).max())
        return min(max(time_s / period_s, 1.0), float(self.last_row))

    def row_at(self, t_ns: int) -> tuple[float, float]:
        """Return the row number u at ``t_ns`` and du/d(row time): 1, falling to 0 at the end."""
        u = (t_ns - self.t_start_ns) / self.period_ns
        if u <= self.slow_from:
            return max(u, 0.0), 1.0
        if u >= self.ends_at:
            return float(self.last_row), 0.0
        x = (u - self.slow_from) / self._slow_rows
        row = self.slow_from + self._slow_rows * (x - x**3 + 0.5 * x**4)
        return row, 1.0 - 3.0 * x * x + 2.0 * x**3

    def ended(self, t_ns: int) -> bool:
        return (t_ns - self.t_start_ns) / self.period_ns >= self.ends_at

    def position(self, u: float) -> FloatArray:
        k = min(int(u), max(self.last_row - 1, 0))
        a = u - k
        c = self._coefficients[k]
        result: FloatArray = ((c[3] * a + c[2]) * a + c[1]) * a + c[0]
        return result

    def velocity(self, u: float, rate: float) -> FloatArray:
        """Velocity at row ``u`` run through at ``rate``; rad/s and m/s, (D,)."""
        k = min(int(u), max(self.last_row - 1, 0))
        a = u - k
        c = self._coefficients[k]
        result: FloatArray = ((3.0 * a * c[3] + 2.0 * c[2]) * a + c[1]) * (
            rate * 1e9 / self.period_ns
        )
        return result


def seam_time_s(
    offset: FloatArray, velocity_offset: FloatArray, limits: JointLimits, jerk_time_s: float
) -> float:
    """Return the time over which a seam fades out within the limits, s.

    With D the offset and V its speed: peaks of the fading quintic are 1.875 D/T + V in velocity,
    5.774 D/T^2 + 3.94 V/T in acceleration, 60 D/T^3 and 36 V/T^2 in jerk, so that for V = 0
    T = max(1.875 D/v, sqrt(5.774 D/a), cbrt(60 D/j)).
    """
    D, V = np.abs(offset), np.abs(velocity_offset)
    v, a = SEAM_SHARE * limits.velocity_max, SEAM_SHARE * limits.acceleration_max
    j = a / jerk_time_s
    by_acceleration = (3.94 * V + np.sqrt((3.94 * V) ** 2 + 4.0 * 5.774 * a * D)) / (2.0 * a)
    times = (1.875 * D / v, by_acceleration, np.cbrt(60.0 * D / j), np.sqrt(36.0 * V / j))
    return max(float(t.max()) for t in times)


class Schedule:
    """The plan in force. Threads: one owner.

    Args:
        limits: of the robot; they set how long seams and stops take.
        lead_ns: how far ahead of the present the plan is read, the arm's own lag.
        blend: ``seam`` fades differences out; ``ensemble`` averages all chunks that cover the
            moment (w_i = exp(-0.01 i), i = 0 the oldest) and fades as well; ``none`` jumps, for
            comparison.
        rebase: start every chunk when it arrives instead of by its stamp (synchronous execution:
            the arm stood still meanwhile).
    """

    def __init__(
        self,
        limits: JointLimits,
        *,
        lead_ns: int = 0,
        blend: Blend = "seam",
        rebase: bool = False,
        jerk_time_s: float = JERK_TIME_S,
    ) -> None:
        if lead_ns < 0:
            raise SpecError(f"lead must not be negative, got {lead_ns / 1e6} ms")
        self._limits = limits
        self._lead_ns = lead_ns
        self._blend = blend
        self._rebase = rebase
        self._jerk_time_s = jerk_time_s
        D = len(limits.position_min)
        self._plans: list[_Plan] = []
        self._hold: FloatArray = np.zeros(D)
        self._brake_v: FloatArray = np.zeros(D)
        self._brake_t_ns = 0
        self._brake_time_ns = 0
        self._offset: FloatArray = np.zeros(D)
        self._velocity_offset: FloatArray = np.zeros(D)
        self._acceleration_offset: FloatArray = np.zeros(D)
        self._seam_t_ns = 0
        self._seam_time_ns = 0
        self._t_newest_ns = -1

    @property
    def active(self) -> bool:
        """Whether there is a plan, ended or not."""
        return bool(self._plans)

    @property
    def chunk_idx(self) -> int:
        """Number of the newest chunk in force, -1 for none."""
        return self._plans[-1].chunk_idx if self._plans else -1

    @property
    def t_observed_ns(self) -> int:
        """Observation time of the newest chunk in force, 0 for none."""
        return self._plans[-1].t_observed_ns if self._plans else 0

    def row(self, now_ns: int) -> float:
        """Return the row of the newest chunk that is due, -1 for none."""
        return self._plans[-1].row_at(now_ns + self._lead_ns)[0] if self._plans else -1.0

    def ended(self, now_ns: int) -> bool:
        """Return whether the plan is used up and the target stands still."""
        return not self._plans or all(p.ended(now_ns + self._lead_ns) for p in self._plans)

    def braking(self, now_ns: int) -> bool:
        """Return whether a ``stop`` is still slowing down."""
        return not self._plans and now_ns < self._brake_t_ns + self._brake_time_ns

    def hold(self, position: FloatArray) -> None:
        """Drop the plan; the target is ``position`` from now on."""
        self._plans.clear()
        self._hold = np.array(position, np.float64)
        self._brake_time_ns = 0

    def stop(self, now_ns: int, position: FloatArray, velocity: FloatArray) -> None:
        """Drop the plan; slow down from ``position`` and ``velocity`` to zero and hold there.

        All channels take the same time T = 1.6 max(v/a), so the direction stays
        and the peak, 1.5 v/T, is below the limit.
        """
        self.hold(position)
        self._brake_v = np.array(velocity, np.float64)
        time_s = 1.6 * float((np.abs(velocity) / self._limits.acceleration_max).max())
        self._brake_t_ns, self._brake_time_ns = now_ns, round(time_s * 1e9)

    def accept(self, chunk: Chunk, now_ns: int, *, seam: bool = True) -> Acceptance:
        """Take ``chunk`` over, or say why not; a rejected chunk leaves the plan as it is.

        Args:
            chunk: the new plan.
            now_ns: the present.
            seam: fade from the old plan; without, the target jumps onto the new one (for an
                approach whose own speed limit does the fading).
        """
        reason = self._reason_to_reject(chunk, now_ns)
        if reason is not Acceptance.ACCEPTED:
            return reason
        position, velocity = self._evaluate(now_ns)
        acceleration = self._seam_acceleration(now_ns)
        t_start_ns = now_ns + self._lead_ns if self._rebase else chunk.t_observed_ns
        plan = _Plan(chunk, t_start_ns, self._limits.acceleration_max)
        if plan.ended(now_ns + self._lead_ns):
            return Acceptance.EXPIRED
        kept = self._plans if self._blend == "ensemble" else []
        t_ns = now_ns + self._lead_ns
        self._plans = [*(p for p in kept if not p.ended(t_ns)), plan][-N_ENSEMBLE:]
        self._t_newest_ns = chunk.t_observed_ns
        self._seam_time_ns = 0
        if seam and self._blend != "none":
            new_position, new_velocity = self._at(now_ns)
            self._set_seam(now_ns, position - new_position, velocity - new_velocity, acceleration)
        return Acceptance.ACCEPTED

    def reseam(self, now_ns: int, position: FloatArray, velocity: FloatArray) -> None:
        """Fade from where the arm really is to the plan in force."""
        self._seam_time_ns = 0
        plan_position, plan_velocity = self._evaluate(now_ns)
        self._set_seam(now_ns, position - plan_position, velocity - plan_velocity)

    def sample(self, now_ns: int) -> FloatArray:
        """Return the target at ``now_ns``, rad and m, shape (D,)."""
        if not self._plans:
            return self._braked(now_ns)[0]
        if len(self._plans) > 1:
            self._drop_ended(now_ns)
        return self._position_at(now_ns)

    def _reason_to_reject(self, chunk: Chunk, now_ns: int) -> Acceptance:
        if chunk.actions.shape[1] != len(self._hold):
            return Acceptance.BAD_SHAPE
        if not np.isfinite(chunk.actions).all():
            return Acceptance.NOT_FINITE
        if chunk.t_observed_ns <= self._t_newest_ns:
            return Acceptance.OLDER
        if chunk.t_observed_ns > now_ns + _FUTURE_NS:
            return Acceptance.FROM_FUTURE
        return Acceptance.ACCEPTED

    def _set_seam(
        self,
        now_ns: int,
        offset: FloatArray,
        velocity_offset: FloatArray,
        acceleration_offset: FloatArray | None = None,
    ) -> None:
        self._offset, self._velocity_offset = offset, velocity_offset
        # A fade that began without the acceleration of the one it replaces would begin all over
        # again with every chunk; with chunks that come faster than it lasts it would never happen.
        self._acceleration_offset = (
            np.zeros_like(offset) if acceleration_offset is None else acceleration_offset
        )
        time_s = seam_time_s(offset, velocity_offset, self._limits, self._jerk_time_s)
        time_s = min(time_s, SEAM_MAX_S)
        self._seam_t_ns, self._seam_time_ns = now_ns, math.ceil(time_s * 1e9)

    def _braked(self, now_ns: int) -> tuple[FloatArray, FloatArray]:
        if self._brake_time_ns == 0:
            return self._hold, np.zeros_like(self._hold)
        x = min(max((now_ns - self._brake_t_ns) / self._brake_time_ns, 0.0), 1.0)
        way = self._brake_time_ns / 1e9 * (x - x**3 + 0.5 * x**4)
        rate = 1.0 - 3.0 * x * x + 2.0 * x**3
        return self._hold + self._brake_v * way, self._brake_v * rate

    def _drop_ended(self, now_ns: int) -> None:
        """Take plans that are used up out of the mean, which must not jump by it."""
        t_ns = now_ns + self._lead_ns
        # The newest stays: one that slows down longer may end after it and must not follow it.
        live = [p for p in self._plans[:-1] if not p.ended(t_ns)] + self._plans[-1:]
        if len(live) == len(self._plans):
            return
        position, velocity = self._at(now_ns)
        acceleration = self._seam_acceleration(now_ns)
        self._plans = live
        self._seam_time_ns = 0
        new_position, new_velocity = self._at(now_ns)
        self._set_seam(now_ns, position - new_position, velocity - new_velocity, acceleration)

    def _mean(self, now_ns: int, value: Callable[[_Plan, float, float], FloatArray]) -> FloatArray:
        """Return the mean of ``value(plan, row, rate)`` over the plans that cover the moment."""
        t_ns = now_ns + self._lead_ns
        if len(self._plans) == 1:
            return value(self._plans[0], *self._plans[0].row_at(t_ns))
        weights = np.exp(-ENSEMBLE_DECAY * np.arange(len(self._plans)))
        values = np.stack([value(p, *p.row_at(t_ns)) for p in self._plans])
        mean: FloatArray = weights @ values / weights.sum()
        return mean

    def _evaluate(self, now_ns: int) -> tuple[FloatArray, FloatArray]:
        """Return target and its velocity at ``now_ns``, seam included."""
        if not self._plans:
            return self._braked(now_ns)
        if len(self._plans) > 1:
            self._drop_ended(now_ns)
        return self._at(now_ns)

    def _at(self, now_ns: int) -> tuple[FloatArray, FloatArray]:
        velocity = self._mean(now_ns, lambda p, u, rate: p.velocity(u, rate))
        since_ns = now_ns - self._seam_t_ns
        if since_ns < self._seam_time_ns:
            time_s, x = self._seam_time_ns / 1e9, since_ns / self._seam_time_ns
            slope = -30.0 * x * x * (1.0 - 2.0 * x + x * x) / time_s
            slope_v = 1.0 - x * x * (18.0 - 32.0 * x + 15.0 * x * x)
            slope_a = time_s * x * (1.0 - x * (4.5 - x * (6.0 - 2.5 * x)))
            velocity = velocity + self._offset * slope + self._velocity_offset * slope_v
            velocity = velocity + self._acceleration_offset * slope_a
        return self._position_at(now_ns), velocity

    def _position_at(self, now_ns: int) -> FloatArray:
        position = self._mean(now_ns, lambda p, u, _: p.position(u))
        since_ns = now_ns - self._seam_t_ns
        if since_ns < self._seam_time_ns:
            time_s, x = self._seam_time_ns / 1e9, since_ns / self._seam_time_ns
            fade = 1.0 - x**3 * (10.0 - 15.0 * x + 6.0 * x * x)
            fade_v = time_s * x * (1.0 - x * x * (6.0 - 8.0 * x + 3.0 * x * x))
            fade_a = 0.5 * time_s * time_s * x * x * (1.0 - x) ** 3
            position = position + self._offset * fade + self._velocity_offset * fade_v
            position = position + self._acceleration_offset * fade_a
        return position

    def _seam_acceleration(self, now_ns: int) -> FloatArray:
        """Return the acceleration of the fade in progress, at most its share of the limits."""
        since_ns = now_ns - self._seam_t_ns
        if since_ns >= self._seam_time_ns:
            return np.zeros_like(self._offset)
        time_s, x = self._seam_time_ns / 1e9, since_ns / self._seam_time_ns
        bend = -60.0 * x * (1.0 - 3.0 * x + 2.0 * x * x) / time_s**2
        bend_v = -x * (36.0 - 96.0 * x + 60.0 * x * x) / time_s
        bend_a = 1.0 - 9.0 * x + 18.0 * x * x - 10.0 * x**3
        acceleration = (
            self._offset * bend
            + self._velocity_offset * bend_v
            + self._acceleration_offset * bend_a
        )
        most = SEAM_SHARE * self._limits.acceleration_max
        clipped: FloatArray = np.clip(acceleration, -most, most)
        return clipped
