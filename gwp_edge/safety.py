"""The last word on every command: finite, then position, velocity, acceleration.

Pure: no clock, no device. Non-finite or absurd targets are rejected whole, and the arm brakes;
they are never clipped, because NaN passes through clamps and an absurd target is not a wish.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from gwp_edge.errors import SpecError
from gwp_edge.spec import Channel
from gwp_edge.types import FloatArray, JointLimits
from gwp_edge.workspace import ArmInBox, Workspace

POSITION: Final = 1
VELOCITY: Final = 2
ACCELERATION: Final = 4
WORKSPACE: Final = 64

MARGIN_RAD: Final = math.radians(2.0)
MARGIN_M: Final = 0.0
# A measured pose that is a hair outside (a closed gripper reads -0.1 mm) begins at the limit.
_SEED_SNAP_RAD: Final = math.radians(0.2)
_SEED_SNAP_M: Final = 0.001
REJECT_BEYOND_RAD: Final = math.radians(20.0)
REJECT_BEYOND_M: Final = 0.05
# A target beyond a limit by the margin or so is that of a joint on its stop; farther is no habit.
OUTSIDE_RAD: Final = math.radians(5.0)


def with_margin(
    limits: JointLimits,
    channels: Sequence[Channel],
    *,
    margin_rad: float = MARGIN_RAD,
    margin_m: float = MARGIN_M,
) -> JointLimits:
    """Return ``limits`` with the positions drawn in by a margin per unit of the channel.

    Raises:
        SpecError: the margin leaves no room in a channel.
    """
    margin = np.array([margin_rad if c.unit == "rad" else margin_m for c in channels])
    low, high = limits.position_min + margin, limits.position_max - margin
    for channel, a, b in zip(channels, low, high, strict=True):
        if a >= b:
            raise SpecError(
                f"limits of {channel.name}: a margin of {margin_rad} rad / {margin_m} m leaves "
                f"no room ({a:.4f} to {b:.4f}); widen the limits or lower the margin"
            )
    return JointLimits(
        position_min=low,
        position_max=high,
        velocity_max=limits.velocity_max,
        acceleration_max=limits.acceleration_max,
    )


def brake_velocity(gap: float, step: float) -> float:
    """Return the highest speed from which a discrete brake ends within ``gap``.

    The speed holds for one tick and then falls by ``step`` per tick. With n whole steps the way is
    (n + 1) v - step n (n + 1) / 2, which is solved for v. Both in units of length per tick.

    Args:
        gap: way that is left, per-tick lengths, >= 0.
        step: change of speed per tick, > 0.
    """
    n = int((math.sqrt(1.0 + 8.0 * gap / step) - 1.0) * 0.5)
    return gap / (n + 1) + 0.5 * step * n


@dataclass(slots=True)
class _Joint:
    """One channel inside the limiter; lengths in rad or m, speeds per tick."""

    low: float
    high: float
    speed_max: float
    step: float  # change of speed per tick
    free_way: float  # farther than this from a limit, the limit does not matter
    reject_low: float
    reject_high: float
    p: float = 0.0
    v: float = 0.0
    x: float = 0.0  # last target, clipped
    floor: float = 0.0  # position limits in force, wider while the arm starts outside
    ceiling: float = 0.0


class Limiter:
    """Limits a stream of commands, one per tick. Threads: one owner.

    Position, velocity and acceleration are coupled: at every tick the arm can still stop before
    its position limit, braking with the acceleration limit. A target that already respects
    everything comes out as it went in. A target that jumped is chased at a speed from which the
    command can settle on it without overshoot.

    A finite target far outside the position limits is refused: the plan is not for this robot.
    With ``refuse_far`` false, for simulated arms, it is clipped like any other.

    A pose outside the position limits (PiPER rests on its stops) is not corrected by a motion of
    its own: the limit in force follows the command inwards and never lets it out again.

    With a workspace the tool, too, stays inside of its box; an arm whose tool comes to a wall
    brakes there as a whole and goes on when its target leads back inside.

    Attributes:
        position: the last command, shape (D,); overwritten by the next one.
        flags: per channel, which limits acted at the last tick (POSITION, VELOCITY, ACCELERATION,
            WORKSPACE).
        rejected: why the last target was rejected, or None.
    """

    def __init__(
        self,
        limits: JointLimits,
        *,
        period_s: float,
        channels: Sequence[Channel] = (),
        refuse_far: bool = True,
        workspace: Sequence[ArmInBox] = (),
    ) -> None:
        if not period_s > 0:
            raise SpecError(f"limiter: period must be positive, got {period_s} s")
        units = [c.unit for c in channels] or ["rad"] * len(limits.position_min)
        self._period_s = period_s
        self._joints: list[_Joint] = []
        for i, unit in enumerate(units):
            beyond = REJECT_BEYOND_RAD if unit == "rad" else REJECT_BEYOND_M
            low, high = float(limits.position_min[i]), float(limits.position_max[i])
            self._joints.append(
                _Joint(
                    low=low,
                    high=high,
                    speed_max=0.0,
                    step=float(limits.acceleration_max[i]) * period_s * period_s,
                    free_way=0.0,
                    # Infinity lies outside of either.
                    reject_low=low - beyond if refuse_far else -sys.float_info.max,
                    reject_high=high + beyond if refuse_far else sys.float_info.max,
                )
            )
        self._speed_max = [float(v) * period_s for v in limits.velocity_max]
        self._names = [c.name for c in channels] or [f"channel {i}" for i in range(len(units))]
        self.position: FloatArray = np.zeros(len(units))
        self.flags = [0] * len(units)
        self.rejected: str | None = None
        self._refuse_far = refuse_far
        self._is_rad = [unit == "rad" for unit in units]
        steps = [j.step for j in self._joints]
        self._workspace = Workspace(workspace, steps) if workspace else None
        self.set_speed_limit(None)

    @property
    def velocity(self) -> FloatArray:
        """Velocity of the last command, rad/s and m/s, shape (D,)."""
        return np.array([j.v for j in self._joints]) / self._period_s

    @property
    def standing(self) -> bool:
        """Whether the last command did not move."""
        return all(j.v == 0.0 for j in self._joints)

    def set_speed_limit(self, speed_rad_s: float | None, speed_m_s: float | None = None) -> None:
        """Lower the velocity limits to at most the given ones; None for the limits themselves.

        A command that is faster brakes within its acceleration limit.
        """
        for j, own, is_rad in zip(self._joints, self._speed_max, self._is_rad, strict=True):
            cap = speed_rad_s if is_rad else speed_m_s
            j.speed_max = own if cap is None else min(own, cap * self._period_s)
            n = int(own / j.step) + 2
            j.free_way = own * (n + 1) + j.step * n

    def seed(self, position: FloatArray) -> None:
        """Begin at ``position``, at rest.

        Raises:
            SpecError: ``position`` is not finite, has another length, or a tool is outside of its
                workspace.
        """
        if position.shape != self.position.shape or not np.isfinite(position).all():
            raise SpecError(f"limiter: cannot begin at {position}; the arm's state is not usable")
        outside = self._workspace.outside(position.tolist()) if self._workspace else None
        if outside is not None:
            raise SpecError(f"{outside}; move the arm inside by hand or widen [workspace]")
        for j, p, is_rad in zip(self._joints, position.tolist(), self._is_rad, strict=True):
            snapped = min(max(p, j.low), j.high)
            if abs(snapped - p) <= (_SEED_SNAP_RAD if is_rad else _SEED_SNAP_M):
                p = snapped
            j.p = j.x = p
            j.v = 0.0
            j.floor, j.ceiling = min(j.low, p), max(j.high, p)
        self.position[:] = [j.p for j in self._joints]

    def reason_to_refuse(self, rows: FloatArray) -> str | None:
        """Return why a whole plan (H, D) is refused, or None: a row that ``step`` would reject.

        Asked before a seam could hide an absurd plan behind a long fade.
        """
        low = np.array([j.reject_low for j in self._joints])
        high = np.array([j.reject_high for j in self._joints])
        # Written so that NaN fails it.
        bad = np.argwhere(~((rows >= low) & (rows <= high)))
        return None if len(bad) == 0 else self._reason_to_reject(rows[bad[0][0]].tolist())

    def clip(self, row: FloatArray) -> FloatArray:
        """Return ``row``, shape (D,), within the position limits in force."""
        floor = [j.floor for j in self._joints]
        return np.clip(row, floor, [j.ceiling for j in self._joints])

    def outside(self, row: FloatArray) -> str | None:
        """Return which joint ``row``, shape (D,), wants beyond its limit by more than a little.

        None where there is none, or where far targets are not refused either.
        """
        if not self._refuse_far:
            return None
        for name, j, x, is_rad in zip(
            self._names, self._joints, row.tolist(), self._is_rad, strict=True
        ):
            if is_rad and not j.low - OUTSIDE_RAD <= x <= j.high + OUTSIDE_RAD:
                return f"{name} at {x:.3f} rad, its limits are {j.low:.3f} to {j.high:.3f}"
        return None

    def rest(self, position: FloatArray) -> None:
        """Take it that the arm has stopped at ``position``, a command that it got some time ago."""
        for i, (j, p) in enumerate(zip(self._joints, position.tolist(), strict=True)):
            j.p, j.v = p, 0.0
            self.flags[i] = ACCELERATION  # it is not where the plan has it
            j.floor, j.ceiling = min(j.low, p), max(j.high, p)
        self.position[:] = position

    def retarget(self) -> None:
        """Forget the last target: the next one continues from the command, not from it."""
        for j in self._joints:
            j.x = j.p

    def brake(self) -> FloatArray:
        """Return a command that brakes as hard as the limits allow, shape (D,)."""
        for i, j in enumerate(self._joints):
            _move(j, 0.0, None)
            j.x = j.p
            self.flags[i] = 0
        self.position[:] = [j.p for j in self._joints]
        return self.position

    def step(self, target: FloatArray) -> FloatArray:
        """Return the command for this tick, shape (D,), rad and m; see ``flags``, ``rejected``.

        Args:
            target: what the plan wants now, (D,); anything, including NaN.
        """
        values = target.tolist()
        self.rejected = self._reason_to_reject(values)
        if self.rejected is not None:
            return self.brake()
        flags, workspace = self.flags, self._workspace
        before = [(j.p, j.v, j.floor, j.ceiling) for j in self._joints] if workspace else []
        for i, j in enumerate(self._joints):
            flags[i] = _advance(j, values[i])
        if workspace is not None:
            self._stay_inside(workspace, before)
        self.position[:] = [j.p for j in self._joints]
        return self.position

    def _stay_inside(
        self, workspace: Workspace, before: list[tuple[float, float, float, float]]
    ) -> None:
        """Let each arm follow this tick's motion as far as its tool may, and brake otherwise."""
        start = [p for p, _, _, _ in before]
        wish = [j.v for j in self._joints]
        brake = [
            math.copysign(max(abs(v) - j.step, 0.0), v)
            for j, (_, v, _, _) in zip(self._joints, before, strict=True)
        ]
        for k, arm in enumerate(workspace.arms):
            share = workspace.share(k, start, brake, wish)
            if share == 1.0:
                continue
            for i in arm.joints:
                j, (p, _, floor, ceiling) = self._joints[i], before[i]
                j.v = brake[i] + share * (wish[i] - brake[i])
                j.p = min(max(p + j.v, floor), ceiling)
                j.floor, j.ceiling = floor, ceiling
                _draw_in(j)
                self.flags[i] |= WORKSPACE

    def _reason_to_reject(self, values: list[float]) -> str | None:
        if len(values) != len(self._joints):
            return f"target has {len(values)} channels, expected {len(self._joints)}"
        for name, j, x in zip(self._names, self._joints, values, strict=True):
            # Written so that NaN fails it.
            if not j.reject_low <= x <= j.reject_high:
                if not math.isfinite(x):
                    return f"target of {name} is not finite ({x})"
                return (
                    f"target of {name} is {x:.3f}, far outside {j.low:.3f} to {j.high:.3f}; "
                    "the plan is not for this robot or has gone wrong"
                )
        return None


def _advance(j: _Joint, x: float) -> int:
    """Move one channel one tick towards target ``x``; return the limits that acted."""
    flags = 0
    if x > j.ceiling:
        x, flags = j.ceiling, POSITION
    elif x < j.floor:
        x, flags = j.floor, POSITION
    behind = j.x - j.p  # what the command lagged behind the last target
    w = x - j.x  # the target's own motion in this tick
    if abs(w) > j.speed_max:
        w = 0.0 if abs(w) > 2.0 * j.speed_max else math.copysign(j.speed_max, w)
    j.x = x
    # Half the acceleration for catching up leaves the rest for the target's own.
    catch_up = 0.5 * j.step
    if -catch_up <= behind <= catch_up:
        return flags | _move(j, x - j.p, x)
    speed = brake_velocity(abs(behind), catch_up)
    return flags | _move(j, w + math.copysign(speed, behind), None)


def _move(j: _Joint, v: float, x: float | None) -> int:
    """Take speed ``v`` as far as the limits allow; ``x`` is the exact target that ``v`` leads to.

    The bounds always overlap: braking by ``step`` is allowed by every one of them, because the
    same was seen to at the tick before.
    """
    slowest, fastest = j.v - j.step, j.v + j.step
    flags = ACCELERATION if v > fastest or v < slowest else 0
    high = min(fastest, max(j.speed_max, slowest))
    low = max(slowest, min(-j.speed_max, fastest))
    if v > j.speed_max or v < -j.speed_max:
        flags |= VELOCITY
    gap_up, gap_down = j.ceiling - j.p, j.p - j.floor
    if gap_up < j.free_way:
        bound = brake_velocity(max(gap_up, 0.0), j.step)
        if bound < high:
            flags |= POSITION if v > bound else 0
            high = max(bound, slowest)
    if gap_down < j.free_way:
        bound = -brake_velocity(max(gap_down, 0.0), j.step)
        if bound > low:
            flags |= POSITION if v < bound else 0
            low = min(bound, fastest)
    if low <= v <= high:
        p = j.p + v if x is None else x
    else:
        v = high if v > high else low
        p = j.p + v
    j.v = v
    # Rounding must not carry the sum past the limit.
    j.p = min(max(p, j.floor), j.ceiling)
    _draw_in(j)
    return flags


def _draw_in(j: _Joint) -> None:
    """Let a limit that was widened for the start pose follow the command back in."""
    if j.ceiling > j.high:
        j.ceiling = max(j.high, j.p)
    if j.floor < j.low:
        j.floor = min(j.low, j.p)
