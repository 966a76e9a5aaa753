"""The simulated table-top as MJCF text: PiPER arms, grippers, cubes, cameras, light.

World frame: x from the arms across the table, y to the arms' left, z up; the table's top is z = 0
and the arms stand on it. One arm stands at the origin. Two stand beside each other, the left one at
y = +0.25 m and first in every array, the right one at y = -0.25 m, both facing x.

Link frames follow ``piper_model.DH_TABLE`` exactly; shapes, masses, forces and cameras are our own
plain stand-ins and were not identified on an arm.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Final

import numpy as np

from gwp_edge.drivers import piper_model
from gwp_edge.errors import SpecError
from gwp_edge.types import FloatArray

ARM_SPACING_M: Final = 0.5
CUBE_HALF_M: Final = 0.0225
CUBES: Final[dict[str, str]] = {"red_cube": "0.85 0.08 0.08 1", "blue_cube": "0.10 0.22 0.85 1"}
#: Joint angles and opening at the start: arms drawn back, so that they hide no cube from above.
READY: Final = (0.0, 0.5, -0.6, 0.0, 1.1, 0.0, 0.05)

_FIXED_MOUNTS: Final[dict[str, tuple[tuple[float, ...], tuple[float, ...], float]]] = {
    # name: position, point looked at (m, world), vertical field of view (deg)
    "high": ((0.10, 0.0, 0.95), (0.21, 0.0, 0.0), 42.0),
    "front": ((1.05, 0.0, 0.60), (0.15, 0.0, 0.17), 45.0),
    "left_side": ((0.45, 0.95, 0.50), (0.25, 0.0, 0.10), 45.0),
    "right_side": ((0.45, -0.95, 0.50), (0.25, 0.0, 0.10), 45.0),
}
_WRIST_MOUNTS: Final = ("wrist", "left_wrist", "right_wrist")
_DEFAULT_MOUNTS: Final[dict[str, str]] = {
    "cam_high": "high",
    "cam_front": "front",
    "cam_low": "front",
    "cam_left_side": "left_side",
    "cam_right_side": "right_side",
    "cam_wrist": "wrist",
    "cam_left_wrist": "left_wrist",
    "cam_right_wrist": "right_wrist",
}
# kp (Nm/rad), kv (Nms/rad), torque limit (Nm), armature (kgm2): stiff and about critically damped.
_SERVOS: Final = ((600, 32, 25, 0.10),) * 3 + ((120, 4.5, 10, 0.03),) * 3
_GRIPPER_SERVO: Final = (1000, 25, 15)
#: Velocity feed-forward that cancels the lag of the damping term, s: kv / kp per channel.
FEED_FORWARD_S: Final = (*(kv / kp for kp, kv, _, _ in _SERVOS), 25 / 1000)


def arm_prefixes(n_arms: int) -> tuple[str, ...]:
    """Return the name prefixes of the arms, in the order of the channels."""
    return ("arm",) if n_arms == 1 else ("left", "right")


def n_coordinates(n_arms: int) -> int:
    """Return the length of the configuration: six joints, two fingers an arm; seven a cube."""
    return (piper_model.N_JOINTS + 2) * n_arms + 7 * len(CUBES)


def arm_base(n_arms: int, arm_idx: int) -> FloatArray:
    """Return where arm ``arm_idx`` stands in the world, shape (3,), m; bases are not turned."""
    y = 0.0 if n_arms == 1 else ARM_SPACING_M * (0.5 - arm_idx)
    return np.array([0.0, y, 0.0])


def camera_mounts(
    n_arms: int, roles: Sequence[str], chosen: Mapping[str, str] | None = None
) -> dict[str, str]:
    """Decide where the camera of each role is mounted.

    Args:
        n_arms: 1 or 2.
        roles: camera names of the policy.
        chosen: mounts by role that the user gave.

    Returns:
        Mount by role: ``high``, ``front``, ``left_side``, ``right_side``, ``wrist`` (one arm),
        ``left_wrist`` and ``right_wrist`` (two arms).

    Raises:
        SpecError: a role has no mount, or two roles share the one wrist.
    """
    mounts = {**_DEFAULT_MOUNTS, **(chosen or {})}
    wrists = ("wrist",) if n_arms == 1 else ("left_wrist", "right_wrist")
    known = (*_FIXED_MOUNTS, *wrists)
    result: dict[str, str] = {}
    for role in roles:
        mount = mounts.get(role, "none")
        if n_arms == 1 and mount in _WRIST_MOUNTS:
            mount = "wrist"
        if mount not in known:
            raise SpecError(
                f"sim camera {role}: expected a mount of {', '.join(known)}, got {mount}; "
                "give it with the option mounts"
            )
        if mount == "wrist" and "wrist" in result.values():
            other = next(r for r, m in result.items() if m == "wrist")
            raise SpecError(
                f"sim cameras {other} and {role}: one arm has one wrist camera; "
                f"mount one of them elsewhere with the option mounts ({', '.join(_FIXED_MOUNTS)})"
            )
        result[role] = mount
    return result


def build_mjcf(
    n_arms: int,
    mounts: Mapping[str, str],
    *,
    width_px: int,
    height_px: int,
    period_s: float,
) -> str:
    """Return the scene as MJCF.

    Args:
        n_arms: 1 or 2.
        mounts: mount by camera role, from ``camera_mounts``.
        width_px: largest image width.
        height_px: largest image height.
        period_s: physics time step.
    """
    prefixes = arm_prefixes(n_arms)
    wrist = {"wrist": "arm", "left_wrist": "left", "right_wrist": "right"}
    by_arm = {p: [r for r, m in mounts.items() if wrist.get(m) == p] for p in prefixes}
    arms = "".join(
        _arm(p, arm_base(n_arms, i), _collision(i), by_arm[p]) for i, p in enumerate(prefixes)
    )
    fixed = "".join(_fixed_camera(r, m) for r, m in mounts.items() if m in _FIXED_MOUNTS)
    cubes = "".join(_cube(name, rgba) for name, rgba in CUBES.items())
    return f"""<mujoco model="piper_table">
  <compiler angle="radian" autolimits="true"/>
  <option timestep="{period_s!r}" integrator="implicitfast" cone="elliptic" impratio="5"/>
  <visual>
    <global offwidth="{width_px}" offheight="{height_px}"/>
    <quality offsamples="0" shadowsize="0"/>
    <headlight ambient="0.27 0.27 0.27" diffuse="0.16 0.16 0.16" specular="0 0 0"/>
    <map znear="0.01" zfar="20"/>
  </visual>
  <statistic extent="1" center="0.3 0 0.2"/>
{_ASSETS}  <worldbody>
    <light name="key" directional="true" castshadow="false" pos="0.3 0.8 2"
      dir="-0.15 -0.45 -0.9" diffuse="0.44 0.43 0.41" specular="0.15 0.15 0.15"/>
    <light name="fill" directional="true" castshadow="false" pos="1 -0.8 1.5"
      dir="-0.5 0.4 -0.6" diffuse="0.14 0.15 0.17" specular="0 0 0"/>
{_TABLE}{fixed}{cubes}{arms}  </worldbody>
  <equality>{"".join(_EQUALITY.format(p=p) for p in prefixes)}
  </equality>
  <tendon>{"".join(_TENDON.format(p=p) for p in prefixes)}
  </tendon>
  <actuator>{"".join(_actuators(p) for p in prefixes)}
  </actuator>
</mujoco>
"""


_ASSETS = """  <asset>
    <texture name="sky" type="skybox" builtin="gradient" rgb1="0.86 0.89 0.93"
      rgb2="0.55 0.6 0.68" width="64" height="384"/>
    <texture name="wood" type="2d" builtin="flat" mark="random" random="0.04"
      rgb1="0.77 0.66 0.52" markrgb="0.72 0.60 0.46" width="256" height="256"/>
    <texture name="tiles" type="2d" builtin="checker" rgb1="0.42 0.43 0.46"
      rgb2="0.47 0.48 0.51" width="128" height="128"/>
    <material name="wood" texture="wood" texrepeat="2 2" specular="0.1" shininess="0.1"/>
    <material name="tiles" texture="tiles" texrepeat="6 6" texuniform="true" specular="0"/>
    <material name="shell" rgba="0.90 0.91 0.92 1" specular="0.3" shininess="0.4"/>
    <material name="joint" rgba="0.16 0.17 0.19 1" specular="0.3" shininess="0.3"/>
    <material name="pad" rgba="0.28 0.29 0.31 1" specular="0.1" shininess="0.1"/>
  </asset>
"""
_TABLE = """    <geom name="floor" type="plane" pos="0 0 -0.75" size="4 4 0.1" material="tiles"
      contype="1" conaffinity="7"/>
    <geom name="table" type="box" pos="0.25 0 -0.02" size="0.45 0.65 0.02" material="wood"
      contype="1" conaffinity="7" friction="0.8 0.01 0.001"/>
    <geom type="box" pos="0.65 0.6 -0.39" size="0.03 0.03 0.35" material="joint"
      contype="0" conaffinity="0"/>
    <geom type="box" pos="0.65 -0.6 -0.39" size="0.03 0.03 0.35" material="joint"
      contype="0" conaffinity="0"/>
"""
_EQUALITY = """
    <joint joint1="{p}_finger_a" joint2="{p}_finger_b" polycoef="0 1 0 0 0"
      solref="0.005 1"/>"""
_TENDON = """
    <fixed name="{p}_gripper">
      <joint joint="{p}_finger_a" coef="1"/><joint joint="{p}_finger_b" coef="1"/>
    </fixed>"""


def _collision(arm_idx: int) -> str:
    # Bits: 1 world, 2 left or only arm, 4 right arm. An arm meets the world and the other arm;
    # its own links, whose stand-in shapes overlap at the joints, are left out.
    own = 2 << arm_idx
    return f'contype="{own}" conaffinity="{7 & ~own}"'


def _cube(name: str, rgba: str) -> str:
    return f"""    <body name="{name}" pos="0.3 0 {CUBE_HALF_M}">
      <freejoint name="{name}"/>
      <geom name="{name}" type="box" size="{CUBE_HALF_M} {CUBE_HALF_M} {CUBE_HALF_M}" rgba="{rgba}"
        mass="0.05" contype="1" conaffinity="7" condim="4" friction="1 0.02 0.001"/>
    </body>
"""


def _fixed_camera(role: str, mount: str) -> str:
    position, target, fovy_deg = _FIXED_MOUNTS[mount]
    axes = _look_at(position, target, (0.0, 0.0, 1.0))
    return (
        f'    <camera name="{role}" pos="{_text(position)}" xyaxes="{axes}" fovy="{fovy_deg}"/>\n'
    )


def _wrist_camera(role: str) -> str:
    # On top of the wrist when the tool points forward; sees both fingertips and what is below.
    position, target = (-0.075, 0.0, 0.012), (-0.012, 0.0, 0.14)
    axes = _look_at(position, target, (-1.0, 0.0, 0.0))
    return f'<camera name="{role}" pos="{_text(position)}" xyaxes="{axes}" fovy="62"/>'


def _look_at(position: Sequence[float], target: Sequence[float], up: Sequence[float]) -> str:
    forward = np.subtract(target, position)
    right = np.cross(forward, up)
    right /= np.linalg.norm(right)
    above = np.cross(right, forward)
    return _text([*right, *(above / np.linalg.norm(above))])


def _actuators(prefix: str) -> str:
    lines = [
        f'\n    <position name="{prefix}_{i + 1}" joint="{prefix}_joint_{i + 1}" kp="{kp}" '
        f'kv="{kv}" forcerange="-{torque} {torque}"/>'
        for i, (kp, kv, torque, _) in enumerate(_SERVOS)
    ]
    kp, kv, force = _GRIPPER_SERVO
    lines.append(
        f'\n    <position name="{prefix}_7" tendon="{prefix}_gripper" kp="{kp}" kv="{kv}" '
        f'forcerange="-{force} {force}"/>'
    )
    return "".join(lines)


# What each link is made of, in its own frame: type, place (from-to, or a box's centre), size,
# material, mass (kg). Parts without mass are seen but not touched.
_Part = tuple[str, str, str, str, float]
_LINK_PARTS: Final[tuple[tuple[_Part, ...], ...]] = (
    (  # shoulder, turns about the vertical
        ("cylinder", "0 0 -0.05 0 0 -0.005", "0.052", "shell", 0.7),
        ("cylinder", "0 -0.05 0 0 0.05 0", "0.043", "joint", 0.0),
    ),
    (  # upper arm, along x
        ("capsule", "0.02 0 0 0.265 0 0", "0.034", "shell", 1.2),
        ("cylinder", "0.285 0 -0.045 0.285 0 0.045", "0.039", "joint", 0.0),
    ),
    # forearm, to the wrist's centre
    (("capsule", "0 0 0 -0.02 -0.17 0", "0.03", "shell", 0.7),),
    (  # wrist roll
        ("cylinder", "0 0 -0.085 0 0 -0.03", "0.031", "joint", 0.0),
        ("capsule", "0 0 -0.06 0 0 -0.015", "0.026", "shell", 0.35),
    ),
    (  # wrist pitch
        ("cylinder", "0 0 -0.034 0 0 0.034", "0.03", "joint", 0.0),
        ("capsule", "0 0 0 0 -0.04 0", "0.026", "shell", 0.25),
    ),
    (  # flange, gripper body, wrist camera; the fingers follow
        ("cylinder", "0 0 -0.045 0 0 0.004", "0.028", "joint", 0.0),
        ("box", "0 0 0.034", "0.02 0.046 0.03", "shell", 0.35),
        ("box", "-0.066 0 -0.006", "0.01 0.03 0.01", "joint", 0.0),
    ),
)


def _part(part: _Part, collision: str) -> str:
    shape, place, size, material, mass_kg = part
    where = "pos" if shape == "box" else "fromto"
    contact = collision if mass_kg else 'contype="0" conaffinity="0"'
    return (
        f'<geom type="{shape}" {where}="{place}" size="{size}" material="{material}" '
        f'mass="{mass_kg}" {contact}/>'
    )


def _finger(prefix: str, side: str, sign: int, collision: str) -> str:
    half_range = piper_model.GRIPPER_RANGE_M[1] / 2
    return f"""<body name="{prefix}_finger_{side}" pos="0 {sign * 0.007} 0.1" gravcomp="1">
        <joint name="{prefix}_finger_{side}" type="slide" axis="0 {sign} 0"
          range="0 {half_range}" armature="0.05"/>
        <geom name="{prefix}_pad_{side}" type="box" size="0.011 0.007 0.036" material="pad"
          mass="0.04" condim="4" friction="1.5 0.02 0.001"
          solref="0.004 1" solimp="0.97 0.995 0.0005" {collision}/>
      </body>
      """


def _arm(prefix: str, base: FloatArray, collision: str, wrist_roles: Sequence[str]) -> str:
    inner = "\n      ".join(
        [
            _finger(prefix, "a", 1, collision) + _finger(prefix, "b", -1, collision),
            f'<site name="{prefix}_tool" pos="0 0 {piper_model.TOOL_OFFSET_M}" group="4"/>',
            *(_wrist_camera(role) for role in wrist_roles),
        ]
    )
    for i in reversed(range(piper_model.N_JOINTS)):
        inner = _link(prefix, i, collision, inner)
    return f"""    <body name="{prefix}_base" pos="{_text(base)}">
      <geom type="box" pos="0 0 0.006" size="0.075 0.065 0.006" material="joint" {collision}/>
      <geom type="cylinder" fromto="0 0 0.01 0 0 0.073" size="0.06" material="shell" {collision}/>
      {inner}
    </body>
"""


def _link(prefix: str, i: int, collision: str, inner: str) -> str:
    row = piper_model.DH_TABLE[i]
    ca, sa = math.cos(row.alpha_rad), math.sin(row.alpha_rad)
    half_a, half_o = row.alpha_rad / 2, row.offset_rad / 2
    # Quaternion of RotX(alpha) RotZ(offset); the joint turns about z after both.
    quaternion = (
        math.cos(half_a) * math.cos(half_o),
        math.sin(half_a) * math.cos(half_o),
        -math.sin(half_a) * math.sin(half_o),
        math.cos(half_a) * math.sin(half_o),
    )
    low, high = (math.radians(v) for v in piper_model.JOINT_RANGE_DEG[i])
    parts = "\n      ".join(_part(part, collision) for part in _LINK_PARTS[i])
    return f"""<body name="{prefix}_link_{i + 1}" gravcomp="1"
        pos="{_text((row.a_m, -sa * row.d_m, ca * row.d_m))}" quat="{_text(quaternion)}">
      <joint name="{prefix}_joint_{i + 1}" type="hinge" axis="0 0 1" range="{low!r} {high!r}"
        armature="{_SERVOS[i][3]}" damping="0.2"/>
      {parts}
      {inner}
    </body>"""


def _text(values: Sequence[float] | FloatArray) -> str:
    return " ".join(repr(float(v)) for v in values)
