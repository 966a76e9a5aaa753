"""What a robot file says about the range of its channels: tighter limits, and where to park."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Final

import numpy as np

from gwp_edge.errors import SpecError
from gwp_edge.robot_config import ChannelLimits, RobotConfig
from gwp_edge.spec import Channel
from gwp_edge.types import FloatArray, JointLimits

# By unit: nothing goes farther, or faster, and the unit in which such numbers are usual.
_MOST: Final = {"rad": (4.0 * math.pi, 50.0, "degrees"), "m": (2.0, 10.0, "mm")}


def intersect_limits(
    own: JointLimits, overrides: Mapping[str, ChannelLimits], channels: Sequence[Channel]
) -> JointLimits:
    """Return the arm's own limits tightened by a robot file's.

    Raises:
        SpecError: an override names no channel, or leaves no room.
    """
    names = [c.name for c in channels]
    unknown = sorted(set(overrides) - set(names))
    if unknown:
        raise SpecError(
            f"limits for {', '.join(unknown)}: the robot's channels are {', '.join(names)}"
        )

    def tightened(field: str, base: FloatArray) -> FloatArray:
        choose = np.maximum if field == "position_min" else np.minimum
        wanted = [getattr(overrides.get(name), field, None) for name in names]
        return np.array(
            [b if w is None else choose(b, w) for w, b in zip(wanted, base, strict=True)]
        )

    return JointLimits(
        position_min=tightened("position_min", own.position_min),
        position_max=tightened("position_max", own.position_max),
        velocity_max=tightened("velocity_max", own.velocity_max),
        acceleration_max=tightened("acceleration_max", own.acceleration_max),
    )


def park_pose(robot: RobotConfig, channels: Sequence[Channel]) -> FloatArray | None:
    """Return the park pose, rad and m, shape (D,), or None where the robot has none.

    Raises:
        SpecError: the pose names other channels than the robot has.
    """
    if not robot.park:
        return None
    names = [c.name for c in channels]
    if set(robot.park) != set(names):
        raise SpecError(
            f"park pose: expected a value for each of {', '.join(names)}, "
            f"got {', '.join(sorted(robot.park))}"
        )
    return np.array([robot.park[name] for name in names])


def check_ranges(robot: RobotConfig, channels: Sequence[Channel]) -> None:
    """Check what can be told before the arm has said what it can do.

    Raises:
        SpecError: limits or a pose name other channels, leave some out, or are in another unit.
    """
    names = [c.name for c in channels]
    strangers = sorted((set(robot.limits) | set(robot.park)) - set(names))
    if strangers:
        raise SpecError(
            f"{', '.join(strangers)} is no channel of the policy; it has {', '.join(names)}"
        )
    park_pose(robot, channels)
    for channel in channels:
        most, most_rate, other = _MOST[channel.unit]
        limits = robot.limits.get(channel.name, ChannelLimits())
        places = (limits.position_min, limits.position_max, robot.park.get(channel.name))
        far = [q for q in places if q is not None and abs(q) > most]
        far += [v for v in (limits.velocity_max,) if v is not None and v > most_rate]
        if far:
            raise SpecError(
                f"{channel.name}: {far[0]:g} cannot be meant in {channel.unit}; is it in {other}?"
            )
