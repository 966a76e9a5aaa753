"""The expert of the touch task: inverse kinematics and minimum-jerk joint paths.

It knows where the cube is; the policy that learns from it must see that.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from gwp_edge.drivers import piper_model
from gwp_edge.drivers.sim_model import CUBE_HALF_M, READY
from gwp_edge.types import FloatArray

N_JOINTS = piper_model.N_JOINTS

#: Lean of the tool from straight down, away from the base: the whole area can be reached so.
_TILT_RAD = 0.4
_HOVER_M = 0.06
#: How far below the cube's top the fingertips are sent, so that they surely touch.
_PRESS_M = 0.006
_PEAK_SPEED_RAD_S = 1.3
_SHORTEST_S = 0.6
_DESCENT_S = 0.6
_OVERLAP_S = 0.3
_REST_S = 0.6


def tool_down(position: FloatArray) -> FloatArray:
    """Return the tool pose at ``position`` (3,), m, that points down and a little outwards."""
    yaw = np.arctan2(position[1], position[0])
    outward = np.array([np.cos(yaw), np.sin(yaw), 0.0])
    side = np.array([-np.sin(yaw), np.cos(yaw), 0.0])
    along = np.sin(_TILT_RAD) * outward + np.array([0.0, 0.0, -np.cos(_TILT_RAD)])
    pose = np.eye(4)
    pose[:3, :3] = np.column_stack((np.cross(side, along), side, along))
    pose[:3, 3] = position
    return pose


def joints_at(position: FloatArray) -> FloatArray:
    """Return joint angles (6,) that bring the closed fingertips to ``position``, pointing down.

    Raises:
        SpecError: out of reach.
    """
    near = np.array(READY[:N_JOINTS])
    near[0] = np.arctan2(position[1], position[0])
    return piper_model.solve_joints(tool_down(position), near)


def minimum_jerk(s: FloatArray) -> FloatArray:
    """Return the share of the way at the share ``s`` of the time, with no jerk at the ends."""
    s = np.clip(s, 0.0, 1.0)
    return np.asarray(s**3 * (10.0 - 15.0 * s + 6.0 * s * s))


@dataclass(frozen=True, kw_only=True)
class Path:
    """Two overlapping minimum-jerk movements: to above the cube, and down on it.

    Attributes:
        start: joints and gripper, (7,), rad and m.
        above: joints above the cube, (6,).
        touch: joints on the cube, (6,).
        travel_s: duration of the first movement.
    """

    start: FloatArray
    above: FloatArray
    touch: FloatArray
    travel_s: float

    @property
    def duration_s(self) -> float:
        """Time until the arm rests on the cube and has rested there a while."""
        return self.travel_s - _OVERLAP_S + _DESCENT_S + _REST_S

    def at(self, t_s: FloatArray) -> FloatArray:
        """Return the commands at times (n,), shape (n, 7), rad and m."""
        first = minimum_jerk(t_s / self.travel_s)[:, None]
        second = minimum_jerk((t_s - self.travel_s + _OVERLAP_S) / _DESCENT_S)[:, None]
        start = self.start[:N_JOINTS]
        joints = start + (self.above - start) * first + (self.touch - self.above) * second
        gripper = self.start[N_JOINTS] * (1.0 - first)
        return np.hstack((joints, gripper))


def plan(start: FloatArray, cube_position: FloatArray) -> Path:
    """Plan from ``start`` (7,), rad and m, to the top of a cube at ``cube_position`` (3,), m.

    Raises:
        SpecError: the cube is out of reach.
    """
    top = cube_position + np.array([0.0, 0.0, CUBE_HALF_M])
    above = joints_at(top + np.array([0.0, 0.0, _HOVER_M]))
    touch = joints_at(top - np.array([0.0, 0.0, _PRESS_M]))
    # The peak speed of a minimum-jerk movement is 15/8 of its mean.
    furthest = float(np.abs(above - start[:N_JOINTS]).max())
    travel_s = max(_SHORTEST_S, 1.875 * furthest / _PEAK_SPEED_RAD_S)
    return Path(start=np.array(start), above=above, touch=touch, travel_s=travel_s)
