"""A box that the tool must not leave: checked on every command before it is sent.

The limiter keeps each joint within its own limits; where the tool goes follows from all of them
together. A command is allowed when the tool is inside of the box there and at every tick of the
hardest stop from there, so that a stop is always possible and always inside.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Protocol

import msgspec
import numpy as np

from gwp_edge.errors import SpecError
from gwp_edge.spec import Channel
from gwp_edge.types import FloatArray

# Sums of rounding along a stop stay far below this; the box is drawn in by as much.
_ROUNDING_M: Final = 1e-7
_HALVINGS: Final = 4
_FEW: Final = 12


class WorkspaceBox(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A box in the base frame of one arm, m; see ``[workspace]`` in a robot file."""

    min_m: tuple[float, float, float]
    max_m: tuple[float, float, float]

    def __post_init__(self) -> None:
        for axis, low, high in zip("xyz", self.min_m, self.max_m, strict=True):
            if not -10.0 <= low < high <= 10.0:
                raise ValueError(
                    f"workspace: expected min_m below max_m within 10 m, got {low} to {high} in "
                    f"{axis}"
                )


class Chain(Protocol):
    """Forward kinematics of one arm's joints. Threads: any; pure."""

    levers_m: tuple[float, ...]
    """Per joint: farthest that the tool can be from its axis."""

    def tool_position(self, joints_rad: Sequence[float]) -> tuple[float, float, float]:
        """Return the tool in the arm's base, m."""
        ...

    def tool_positions(self, joints_rad: FloatArray) -> FloatArray:
        """Return the tool for n poses, (n, joints) to (n, 3), m."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class ArmInBox:
    """One arm: its box, its kinematics, and where its joints are among the channels.

    Attributes:
        name: for messages: ``arm``, ``left``, ``right``.
        first: index of its first joint.
        box: of its tool.
        chain: its kinematics.
    """

    name: str
    first: int
    box: WorkspaceBox
    chain: Chain

    @property
    def joints(self) -> range:
        """Indices of its joints among the channels."""
        return range(self.first, self.first + len(self.chain.levers_m))


class Workspace:
    """The boxes of all arms. Threads: one owner.

    Args:
        arms: those that have a box.
        steps: change of speed per tick that each channel may brake by, per tick.
    """

    def __init__(self, arms: Sequence[ArmInBox], steps: Sequence[float]) -> None:
        self.arms = tuple(arms)
        self._steps = list(steps)
        self._low = [np.array(arm.box.min_m) + _ROUNDING_M for arm in self.arms]
        self._high = [np.array(arm.box.max_m) - _ROUNDING_M for arm in self.arms]

    def outside(self, position: Sequence[float]) -> str | None:
        """Return which tool is outside of its box at ``position``, or None."""
        for arm in self.arms:
            tool = arm.chain.tool_position([position[i] for i in arm.joints])
            axes = zip("xyz", tool, arm.box.min_m, arm.box.max_m, strict=True)
            parts = [
                f"{axis} is {value:.3f} m, allowed {low:.3f} to {high:.3f}"
                for axis, value, low, high in axes
                if not low + _ROUNDING_M <= value <= high - _ROUNDING_M
            ]
            if parts:
                return f"the tool of {arm.name} is outside of its workspace: {'; '.join(parts)}"
        return None

    def share(
        self, i: int, start: Sequence[float], brake: Sequence[float], wish: Sequence[float]
    ) -> float:
        """Return how much of a wish arm ``i`` may follow, 0 (brake) to 1 (all of it).

        Every share between a braking speed and a wished one respects what both respect.

        Args:
            i: index into ``arms``.
            start: channels before this tick, (D,).
            brake: speeds of all channels when braking, per tick, (D,).
            wish: wished speeds, per tick, (D,).
        """
        joints = self.arms[i].joints
        begin, end = joints.start, joints.stop
        p, v0, v1 = start[begin:end], brake[begin:end], wish[begin:end]
        if self._is_free(i, p, v1) or self._stops_inside(i, p, v1):
            return 1.0
        # Not every smaller share need be inside, but each that is taken has been checked; none
        # of the wish always is, because the tick before has seen to it.
        best, low, high = 0.0, 0.0, 1.0
        for _ in range(_HALVINGS):
            middle = 0.5 * (low + high)
            v = [a + middle * (b - a) for a, b in zip(v0, v1, strict=True)]
            if self._stops_inside(i, p, v):
                best = low = middle
            else:
                high = middle
        return best

    def _is_free(self, i: int, p: Sequence[float], v: Sequence[float]) -> bool:
        """Whether no stop from here can reach a wall: the cheap answer for most ticks.

        A joint that turns by an angle moves the tool by no more than the angle times its lever.
        """
        arm = self.arms[i]
        reach_m = 0.0
        for lever_m, speed, j in zip(arm.chain.levers_m, v, arm.joints, strict=True):
            speed = abs(speed)
            reach_m += lever_m * speed * (1.5 + 0.5 * speed / self._steps[j])
        x, y, z = arm.chain.tool_position(p)
        low, high = arm.box.min_m, arm.box.max_m
        return (
            low[0] + reach_m < x < high[0] - reach_m
            and low[1] + reach_m < y < high[1] - reach_m
            and low[2] + reach_m < z < high[2] - reach_m
        )

    def _stops_inside(self, i: int, p: Sequence[float], v: Sequence[float]) -> bool:
        """Whether the tool is inside at p + v and at each tick of braking from there."""
        arm = self.arms[i]
        steps = self._steps[arm.first : arm.joints.stop]
        n = 1 + max(math.ceil(abs(a) / step) for a, step in zip(v, steps, strict=True))
        if n > _FEW:
            speed, step = np.array(v), np.array(steps)
            left = np.maximum(np.abs(speed) - step * np.arange(n)[:, None], 0.0)
            path = np.array(p) + np.cumsum(np.sign(speed) * left, axis=0)
            tools = arm.chain.tool_positions(path)
            return bool(((tools >= self._low[i]) & (tools <= self._high[i])).all())
        # The slow end of a motion has few ticks, for which arrays do not pay.
        points: list[list[float]] = []
        here, left_over = list(p), list(v)
        for _ in range(n):
            here = [q + a for q, a in zip(here, left_over, strict=True)]
            points.append(here)
            left_over = [
                math.copysign(max(abs(a) - step, 0.0), a)
                for a, step in zip(left_over, steps, strict=True)
            ]
        # The far end is outside most often.
        return all(self._is_inside(i, arm.chain.tool_position(q)) for q in reversed(points))

    def _is_inside(self, i: int, tool: tuple[float, float, float]) -> bool:
        box = self.arms[i].box
        return all(
            low + _ROUNDING_M <= x <= high - _ROUNDING_M
            for x, low, high in zip(tool, box.min_m, box.max_m, strict=True)
        )


def find_arms(
    boxes: Mapping[str, WorkspaceBox], channels: Sequence[Channel], kind: str
) -> tuple[ArmInBox, ...]:
    """Return the arms that have a box, in the order of their channels.

    Args:
        boxes: by name of the arm: ``arm`` where there is one, ``left`` and ``right`` of two.
        channels: of the robot.
        kind: of the arm's driver.

    Raises:
        SpecError: an unknown arm, or no kinematics are known for this robot.
    """
    if not boxes:
        return ()
    # Imported here: of use to these robots alone.
    from gwp_edge.drivers.piper_model import CHAIN, N_CHANNELS, N_JOINTS

    units = [c.unit for c in channels]
    n_arms = len(channels) // N_CHANNELS
    if kind not in ("piper", "sim", "kinematic") or units != (["rad"] * N_JOINTS + ["m"]) * n_arms:
        raise SpecError(
            f"workspace: kinematics are known for PiPER arms alone, not for arm kind {kind!r} with "
            f"{len(channels)} channels; remove [workspace] from the robot file"
        )
    names = ("arm",) if n_arms == 1 else ("left", "right")[:n_arms]
    unknown = sorted(set(boxes) - set(names))
    if unknown:
        raise SpecError(
            f"workspace of {', '.join(unknown)}: the robot has {', '.join(names)}; "
            f"expected [workspace.{names[0]}]"
        )
    return tuple(
        ArmInBox(name=name, first=i * N_CHANNELS, box=boxes[name], chain=CHAIN)
        for i, name in enumerate(names)
        if name in boxes
    )
