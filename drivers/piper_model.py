"""Geometry and limits of the AgileX PiPER arm; numpy only.

Shared by the simulation, the CAN driver and anything that needs forward kinematics. Frames are
those of the modified Denavit-Hartenberg convention: frame i sits on joint i, and the transform
from frame i-1 is RotX(alpha) TransX(a) RotZ(theta + offset) TransZ(d).

Source: piper_sdk 0.6.2, ``kinematics/piper_fk.py`` (``dh_is_offset=1``, arms since firmware
S-V1.6-3) and ``piper_param/piper_param_manager.py``; the tests compare with that package.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from gwp_edge.errors import SpecError
from gwp_edge.types import FloatArray, JointLimits

N_JOINTS: Final = 6
#: Channels of one arm: six joints (rad) and the total gripper opening (m).
N_CHANNELS: Final = N_JOINTS + 1


@dataclass(frozen=True, slots=True, kw_only=True)
class DhRow:
    """One row of the modified DH table."""

    alpha_rad: float
    a_m: float
    offset_rad: float
    d_m: float


DH_TABLE: Final[tuple[DhRow, ...]] = (
    DhRow(alpha_rad=0.0, a_m=0.0, offset_rad=0.0, d_m=0.123),
    DhRow(alpha_rad=-math.pi / 2, a_m=0.0, offset_rad=math.radians(-172.22), d_m=0.0),
    DhRow(alpha_rad=0.0, a_m=0.28503, offset_rad=math.radians(-102.78), d_m=0.0),
    DhRow(alpha_rad=math.pi / 2, a_m=-0.02198, offset_rad=0.0, d_m=0.25075),
    DhRow(alpha_rad=-math.pi / 2, a_m=0.0, offset_rad=0.0, d_m=0.0),
    DhRow(alpha_rad=math.pi / 2, a_m=0.0, offset_rad=0.0, d_m=0.091),
)
#: Where the fingers close, on the z axis of frame 6 (parallel gripper).
TOOL_OFFSET_M: Final = 0.135

#: What the controller accepts (SDK limits): a command outside of it is refused.
JOINT_RANGE_DEG: Final[tuple[tuple[float, float], ...]] = (
    (-150.0, 150.0),
    (0.0, 180.0),
    (-170.0, 0.0),
    (-100.0, 100.0),
    (-70.0, 70.0),
    (-120.0, 120.0),
)
GRIPPER_RANGE_M: Final = (0.0, 0.07)
# Published sources differ for J6 (120 and 100 deg): the narrower one, and 2 deg inside of it.
_SAFE_RANGE_DEG: Final = (*JOINT_RANGE_DEG[:5], (-100.0, 100.0))
_MARGIN_DEG: Final = 2.0
JOINT_VELOCITY_MAX_RAD_S: Final = 3.0
JOINT_ACCELERATION_MAX_RAD_S2: Final = 5.0
# The gripper's own speed is not published; 0.1 m/s opens it fully in under a second.
GRIPPER_VELOCITY_MAX_M_S: Final = 0.1
GRIPPER_ACCELERATION_MAX_M_S2: Final = 1.0
_IK_ITERATIONS: Final = 300
_IK_DAMPING: Final = 1e-4
_GIMBAL_LOCK: Final = 1e-6


def command_range(n_arms: int) -> tuple[FloatArray, FloatArray]:
    """Return the lowest and highest accepted command of ``n_arms`` arms, each (D,), rad and m."""
    low = [*(math.radians(lo) for lo, _ in JOINT_RANGE_DEG), GRIPPER_RANGE_M[0]]
    high = [*(math.radians(hi) for _, hi in JOINT_RANGE_DEG), GRIPPER_RANGE_M[1]]
    return np.array(low * n_arms), np.array(high * n_arms)


def joint_limits(n_arms: int) -> JointLimits:
    """Return the limits to stay within, for ``n_arms`` arms one after the other.

    Joint ranges are the narrowest of the published ones less 2 degrees, so that a controller that
    stops at its own limit is never reached.
    """
    low = [math.radians(lo + _MARGIN_DEG) for lo, _ in _SAFE_RANGE_DEG]
    high = [math.radians(hi - _MARGIN_DEG) for _, hi in _SAFE_RANGE_DEG]
    velocity = [JOINT_VELOCITY_MAX_RAD_S] * N_JOINTS + [GRIPPER_VELOCITY_MAX_M_S]
    acceleration = [JOINT_ACCELERATION_MAX_RAD_S2] * N_JOINTS + [GRIPPER_ACCELERATION_MAX_M_S2]
    return JointLimits(
        position_min=np.array([*low, GRIPPER_RANGE_M[0]] * n_arms),
        position_max=np.array([*high, GRIPPER_RANGE_M[1]] * n_arms),
        velocity_max=np.array(velocity * n_arms),
        acceleration_max=np.array(acceleration * n_arms),
    )


def link_poses(joints_rad: FloatArray) -> FloatArray:
    """Return the frames of the six links in the arm's base, homogeneous, shape (6, 4, 4), m.

    Args:
        joints_rad: six joint angles, shape (6,).

    Raises:
        SpecError: not six finite angles.
    """
    joints = np.asarray(joints_rad, np.float64)
    if joints.shape != (N_JOINTS,) or not np.isfinite(joints).all():
        raise SpecError(f"expected {N_JOINTS} finite joint angles, got {joints.tolist()}")
    poses = np.empty((N_JOINTS, 4, 4))
    pose = np.eye(4)
    for i, row in enumerate(DH_TABLE):
        pose = pose @ _dh_transform(row, float(joints[i]))
        poses[i] = pose
    return poses


def end_pose(joints_rad: FloatArray) -> tuple[float, float, float, float, float, float]:
    """Return the end pose as the arm reports it, frame 6 in its base: x y z in m, rx ry rz in rad.

    Rotations are about the base's fixed axes, x first: R = Rz(rz) Ry(ry) Rx(rx). Where ry is
    +-90 degrees only the sum or difference of the others is known, and rz is 0.

    Source: piper_sdk 0.6.2, ``kinematics/piper_fk.py``, with which a test compares it.
    """
    pose = link_poses(joints_rad)[-1]
    x, y, z = (float(v) for v in pose[:3, 3])
    level = math.hypot(pose[0, 0], pose[1, 0])
    ry = math.atan2(-pose[2, 0], level)
    if level < _GIMBAL_LOCK:
        turn = math.atan2(pose[0, 1], pose[1, 1])
        return x, y, z, math.copysign(1.0, ry) * turn, ry, 0.0
    rx = math.atan2(pose[2, 1], pose[2, 2])
    return x, y, z, rx, ry, math.atan2(pose[1, 0], pose[0, 0])


def tool_pose(joints_rad: FloatArray) -> FloatArray:
    """Return the frame between the fingertips in the arm's base, shape (4, 4), m.

    Its z axis points out of the gripper, the fingers move along its y axis.
    """
    pose: FloatArray = link_poses(joints_rad)[-1].copy()
    pose[:3, 3] += TOOL_OFFSET_M * pose[:3, 2]
    return pose


def tool_jacobian(joints_rad: FloatArray) -> FloatArray:
    """Return the geometric Jacobian of the tool, shape (6, 6): rows vx vy vz wx wy wz, base."""
    links = link_poses(joints_rad)
    tip = links[-1][:3, 3] + TOOL_OFFSET_M * links[-1][:3, 2]
    axes = links[:, :3, 2]
    return np.vstack([np.cross(axes, tip - links[:, :3, 3]).T, axes.T])


class PiperChain:
    """Where the tool is, for those who ask at every tick. Threads: any; pure.

    Only a point is carried through the chain, not frames: a dozen times cheaper than
    ``tool_pose``, with which a test compares it.

    Attributes:
        levers_m: per joint, the farthest that the tool can be from its axis.
    """

    def __init__(self) -> None:
        self._rows = [
            (math.cos(row.alpha_rad), math.sin(row.alpha_rad), row.a_m, row.offset_rad, row.d_m)
            for row in DH_TABLE
        ]
        links = [abs(row.a_m) + abs(row.d_m) for row in DH_TABLE[1:]]
        self.levers_m = tuple(sum(links[i:]) + TOOL_OFFSET_M for i in range(N_JOINTS))

    def tool_position(self, joints_rad: Sequence[float]) -> tuple[float, float, float]:
        """Return the tool in the arm's base, m."""
        x, y, z = 0.0, 0.0, TOOL_OFFSET_M
        for (ca, sa, a_m, offset_rad, d_m), joint_rad in zip(
            reversed(self._rows), reversed(joints_rad), strict=True
        ):
            ct, st = math.cos(joint_rad + offset_rad), math.sin(joint_rad + offset_rad)
            x, y, z = ct * x - st * y + a_m, st * x + ct * y, z + d_m
            y, z = ca * y - sa * z, sa * y + ca * z
        return x, y, z

    def tool_positions(self, joints_rad: FloatArray) -> FloatArray:
        """Return the tool for n poses, (n, 6) to (n, 3), m."""
        x = y = np.zeros(len(joints_rad))
        z = np.full(len(joints_rad), TOOL_OFFSET_M)
        for i in reversed(range(N_JOINTS)):
            ca, sa, a_m, offset_rad, d_m = self._rows[i]
            angle_rad = joints_rad[:, i] + offset_rad
            ct, st = np.cos(angle_rad), np.sin(angle_rad)
            x, y, z = ct * x - st * y + a_m, st * x + ct * y, z + d_m
            y, z = ca * y - sa * z, sa * y + ca * z
        return np.stack([x, y, z], axis=1)


CHAIN: Final = PiperChain()


def solve_joints(target: FloatArray, start_rad: FloatArray) -> FloatArray:
    """Return joint angles that bring the tool to ``target``, shape (6,), within the safe limits.

    Damped least squares from ``start_rad``; of several solutions it finds the near one.

    Args:
        target: wanted ``tool_pose``, shape (4, 4), m.
        start_rad: where to begin, shape (6,).

    Raises:
        SpecError: not reached to 0.1 mm and 1 mrad within the limits from this start.
    """
    limits = joint_limits(1)
    low, high = limits.position_min[:N_JOINTS], limits.position_max[:N_JOINTS]
    joints = np.clip(np.asarray(start_rad, np.float64), low, high)
    error = np.full(6, np.inf)
    for _ in range(_IK_ITERATIONS):
        pose = tool_pose(joints)
        turn = 0.5 * np.cross(pose[:3, :3], target[:3, :3], axis=0).sum(axis=1)
        error = np.concatenate([target[:3, 3] - pose[:3, 3], turn])
        if np.linalg.norm(error[:3]) < 1e-4 and np.linalg.norm(error[3:]) < 1e-3:
            return joints
        jacobian = tool_jacobian(joints)
        damped = jacobian @ jacobian.T + _IK_DAMPING * np.eye(6)
        step = jacobian.T @ np.linalg.solve(damped, error)
        joints = np.clip(joints + np.clip(step, -0.2, 0.2), low, high)
    raise SpecError(
        f"the tool does not reach {np.round(target[:3, 3], 3).tolist()} m with this orientation: "
        f"{np.linalg.norm(error[:3]) * 1e3:.1f} mm and {np.linalg.norm(error[3:]):.3f} rad are left"
    )


def _dh_transform(row: DhRow, angle_rad: float) -> FloatArray:
    ca, sa = math.cos(row.alpha_rad), math.sin(row.alpha_rad)
    ct, st = math.cos(angle_rad + row.offset_rad), math.sin(angle_rad + row.offset_rad)
    return np.array(
        [
            [ct, -st, 0.0, row.a_m],
            [st * ca, ct * ca, -sa, -sa * row.d_m],
            [st * sa, ct * sa, ca, ca * row.d_m],
            [0.0, 0.0, 0.0, 1.0],
        ]
    )
