"""Frames of the AgileX PiPER protocol as a follower arm uses them: pure packing and unpacking.

Classic CAN at 1 Mbit/s, 11-bit identifiers, always 8 data bytes, big-endian. Every encoder takes
protocol integers (0.001 degree, 0.001 mm, 0.001 N.m) and refuses what its field cannot carry, so
nothing wraps. The MIT frames (0x15A to 0x15F) and the 0xAD pass-through mode have no encoder: their
layout depends on the firmware, and in them the last command stays active when frames stop.
What every tick repeats is done by the compiled part (piper_core.py), everything else here.
Three optional answers have no decoder: 0x2AA to 0x2AC (joints of a MOVE P), 0x481 to 0x486 (speed
and acceleration by joint) and 0x488 (assistance rating). A follower in joint position mode needs
none of them, and the package below decodes none, so nothing could vouch for a decoder.

Source: piper_sdk 0.6.2 (MIT), protocol/protocol_v2/piper_protocol_v2.py, which the tests use as
the oracle for every frame here.
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Sequence
from struct import Struct
from struct import error as StructError  # noqa: N812 - an exception class by its role

from gwp_edge.errors import SafetyFault

Frame = tuple[int, bytes]

N_JOINTS = 6
BITRATE_BPS = 1_000_000

# Host to arm.
ID_MOTION = 0x150
ID_MODE = 0x151
ID_JOINTS_12 = 0x155
ID_JOINTS_34 = 0x156
ID_JOINTS_56 = 0x157
ID_GRIPPER = 0x159
ID_ROLE = 0x470
ID_ENABLE = 0x471
ID_QUERY_LIMIT = 0x472
ID_SET_LIMIT = 0x474
ID_JOINT_CONFIG = 0x475
ID_QUERY_PARAMETER = 0x477
ID_SET_COLLISION = 0x47A
ID_SET_GRIPPER_PARAMETER = 0x47D
ID_FIRMWARE = 0x4AF

# Arm to host.
ID_STATUS = 0x2A1
ID_POSE_FEEDBACK = (0x2A2, 0x2A3, 0x2A4)
ID_JOINT_FEEDBACK = (0x2A5, 0x2A6, 0x2A7)
ID_GRIPPER_FEEDBACK = 0x2A8
ID_MOTOR_FAST = tuple(range(0x251, 0x257))
ID_MOTOR_SLOW = tuple(range(0x261, 0x267))
ID_LIMIT = 0x473
ID_ACKNOWLEDGE = 0x476
ID_END_SPEED = 0x478
ID_COLLISION = 0x47B
ID_ACCELERATION = 0x47C
ID_GRIPPER_PARAMETER = 0x47E

# Values of 0x2A1 byte 0, the control mode.
MODE_STANDBY = 0
MODE_CAN = 1
MODE_TEACH = 2
MODE_LINKAGE = 6

MOVE_J = 1
KEEP = 0x7FFF  # "leave this parameter as it is" in 0x474 and 0x475
_VALID = 0xAE  # "this field is meant" in several frames

GRIPPER_EFFORT_CAP_MNM = 2000
GRIPPER_DISABLE, GRIPPER_ENABLE, GRIPPER_DISABLE_CLEAR, GRIPPER_ENABLE_CLEAR = 0, 1, 2, 3

QUERY_LIMIT, QUERY_ACCELERATION = 1, 2
PARAMETER_END_SPEED, PARAMETER_COLLISION, PARAMETER_GRIPPER = 1, 2, 4

_MDEG_PER_RAD = 180_000.0 / math.pi
RAD_PER_MDEG = math.pi / 180_000.0
UM_PER_M = 1e6

_PAIR, _SIX = Struct(">ii"), Struct(">6i")
_BYTES = Struct(">8B")
_GRIPPER = Struct(">iHBB")
_LIMIT = Struct(">BhhHx")
_JOINT_CONFIG = Struct(">BBBHBxx")


def _pack(layout: Struct, can_id: int, *fields: int) -> Frame:
    try:
        return can_id, layout.pack(*fields)
    except StructError as e:
        raise SafetyFault(
            f"PiPER frame 0x{can_id:03X}: {fields} does not fit its fields ({e}); nothing was sent"
        ) from e


def _within(value: int, low: int, high: int, what: str) -> int:
    """Return ``value`` as an int after checking ``low <= value <= high``."""
    try:
        number = operator.index(value)
    except TypeError:
        raise SafetyFault(
            f"PiPER {what}: expected a whole number, got {value!r}; nothing was sent"
        ) from None
    if not low <= number <= high:
        raise SafetyFault(f"PiPER {what}: expected {low} to {high}, got {number}; nothing was sent")
    return number


def _joint(number: int) -> int:
    return _within(number, 1, N_JOINTS, "joint number")


def rad_to_mdeg(*angles_rad: float) -> list[int]:
    """Return ``angles_rad`` in 0.001 degree, rounded to nearest (ties to even, so symmetric).

    Raises:
        SafetyFault: one is not finite.
    """
    try:
        return [round(angle_rad * _MDEG_PER_RAD) for angle_rad in angles_rad]
    except (ValueError, OverflowError):
        raise SafetyFault(
            f"PiPER joint targets are {angles_rad}, one is not a number; nothing was sent"
        ) from None


def mdeg_to_rad(angle_mdeg: int) -> float:
    """Return an angle of ``angle_mdeg`` 0.001 degree in rad."""
    return angle_mdeg * RAD_PER_MDEG


def m_to_um(length_m: float) -> int:
    """Return ``length_m`` in 0.001 mm, rounded to nearest (ties to even, so symmetric).

    Raises:
        SafetyFault: not finite.
    """
    if not math.isfinite(length_m):
        raise SafetyFault(f"PiPER gripper target is {length_m}, not a number; nothing was sent")
    return round(length_m * UM_PER_M)


def um_to_m(length_um: int) -> float:
    """Return a length of ``length_um`` 0.001 mm in m."""
    return length_um / UM_PER_M


def encode_joints(joint_mdeg: Sequence[int]) -> tuple[Frame, Frame, Frame]:
    """Return the three target frames of six joints; all are packed before any can be sent.

    Args:
        joint_mdeg: targets of joints 1 to 6, 0.001 degree.

    Raises:
        SafetyFault: not six whole numbers, or one does not fit int32.
    """
    if len(joint_mdeg) != N_JOINTS:
        raise SafetyFault(f"PiPER needs {N_JOINTS} joint targets, got {len(joint_mdeg)}")
    try:
        data = _SIX.pack(*joint_mdeg)
        return (ID_JOINTS_12, data[:8]), (ID_JOINTS_34, data[8:16]), (ID_JOINTS_56, data[16:])
    except StructError:  # one by one, so that the error names the frame
        a, b, c, d, e, f = joint_mdeg
    return (
        _pack(_PAIR, ID_JOINTS_12, a, b),
        _pack(_PAIR, ID_JOINTS_34, c, d),
        _pack(_PAIR, ID_JOINTS_56, e, f),
    )


def encode_gripper(
    stroke_um: int, effort_mnm: int, code: int = GRIPPER_ENABLE, *, set_zero: bool = False
) -> Frame:
    """Return a gripper command.

    Args:
        stroke_um: total opening, 0.001 mm.
        effort_mnm: torque, 0.001 N.m, 0 to 2000 (the field could say 65000, the gear could not).
        code: 0 disable, 1 enable, 2 disable and clear, 3 enable and clear.
        set_zero: make the present opening the zero; only with a disabling code.
    """
    # At every tick; the layout itself refuses what is no whole number.
    if not (0 <= effort_mnm <= GRIPPER_EFFORT_CAP_MNM and 0 <= code <= 3):
        _within(effort_mnm, 0, GRIPPER_EFFORT_CAP_MNM, "gripper effort in 0.001 N.m")
        _within(code, 0, 3, "gripper code")
    if set_zero and code not in (GRIPPER_DISABLE, GRIPPER_DISABLE_CLEAR):
        raise SafetyFault("PiPER gripper: zero may be set only while it is disabled")
    return _pack(_GRIPPER, ID_GRIPPER, stroke_um, effort_mnm, code, _VALID if set_zero else 0)


def encode_mode(speed_percent: int, *, standby: bool = False) -> Frame:
    """Return the mode command: joint targets over CAN in position-velocity mode, or standby.

    Args:
        speed_percent: cap on the speed, 0 to 100.
        standby: ask for standby instead.
    """
    _within(speed_percent, 0, 100, "speed percentage")
    return _pack(
        _BYTES, ID_MODE, MODE_STANDBY if standby else MODE_CAN, MOVE_J, speed_percent, 0, 0, 0, 0, 0
    )


def encode_stop(action: int) -> Frame:
    """Return the emergency command: 1 stops with a damped descent, 2 resets and DROPS the arm.

    Nothing in gwp-edge sends 2 by itself: the motors lose power at once.
    """
    return _pack(_BYTES, ID_MOTION, _within(action, 0, 2, "stop action"), 0, 0, 0, 0, 0, 0, 0)


def encode_enable(motor: int, *, enable: bool) -> Frame:
    """Return the power command of one joint motor, 1 to 6, or 7 for all with the gripper."""
    _within(motor, 1, 7, "motor number")
    return _pack(_BYTES, ID_ENABLE, motor, 2 if enable else 1, 0, 0, 0, 0, 0, 0)


def encode_follower_role() -> Frame:
    """Return the command that makes an arm a follower with the standard identifiers."""
    return _pack(_BYTES, ID_ROLE, 0xFC, 0, 0, 0, 0, 0, 0, 0)


def encode_query_limit(joint: int, content: int) -> Frame:
    """Return a question for the limits of ``joint``: 1 angle and speed, 2 acceleration."""
    return _pack(
        _BYTES, ID_QUERY_LIMIT, _joint(joint), _within(content, 1, 2, "query"), 0, 0, 0, 0, 0, 0
    )


def encode_query_parameter(what: int) -> Frame:
    """Return a question for a parameter: 1 end speed, 2 collision, 4 gripper.

    Byte 4 is a load setting; 3 says that it is not one.
    """
    _within(what, 1, 4, "parameter query")
    return _pack(_BYTES, ID_QUERY_PARAMETER, what, 0, 0, 0, 3, 0, 0, 0)


def encode_query_firmware() -> Frame:
    """Return the question for the firmware text."""
    return _pack(_BYTES, ID_FIRMWARE, 1, 0, 0, 0, 0, 0, 0, 0)


def encode_set_limit(joint: int, max_ddeg: int, min_ddeg: int, speed: int) -> Frame:
    """Return a command that stores the limits of ``joint``; ``KEEP`` leaves one as it is.

    Args:
        joint: 1 to 6.
        max_ddeg: upper angle, 0.1 degree.
        min_ddeg: lower angle, 0.1 degree.
        speed: raw speed limit; its unit differs between firmwares, so read it back.
    """
    return _pack(_LIMIT, ID_SET_LIMIT, _joint(joint), max_ddeg, min_ddeg, speed)


def encode_joint_config(
    joint: int, *, acceleration_crad_s2: int = KEEP, clear_error: bool = False
) -> Frame:
    """Return a joint set-up command; it has no way to set a zero, which is for the vendor's tool.

    Args:
        joint: 1 to 6, or 7 for all.
        acceleration_crad_s2: largest acceleration, 0.01 rad/s^2, 0 to 500, or ``KEEP``.
        clear_error: clear the error of the joint's driver.
    """
    _within(joint, 1, 7, "joint number")
    if acceleration_crad_s2 != KEEP:
        _within(acceleration_crad_s2, 0, 500, "joint acceleration in 0.01 rad/s^2")
    valid = 0 if acceleration_crad_s2 == KEEP else _VALID
    clear = _VALID if clear_error else 0
    return _pack(_JOINT_CONFIG, ID_JOINT_CONFIG, joint, 0, valid, acceleration_crad_s2, clear)


def encode_set_collision(levels: Sequence[int]) -> Frame:
    """Return the collision protection levels of joints 1 to 6, each 0 (off) to 8."""
    if len(levels) != N_JOINTS:
        raise SafetyFault(f"PiPER needs {N_JOINTS} collision levels, got {len(levels)}")
    checked = [_within(level, 0, 8, "collision level") for level in levels]
    return _pack(_BYTES, ID_SET_COLLISION, *checked, 0, 0)


def encode_set_gripper_parameter(
    max_stroke_mm: int, *, teach_percent: int = 100, friction: int = 1
) -> Frame:
    """Return the gripper's parameters: stroke 70 or 100 mm, teach range 100-200 %, friction."""
    if max_stroke_mm not in (70, 100):
        raise SafetyFault(f"PiPER gripper stroke: expected 70 or 100 mm, got {max_stroke_mm}")
    _within(teach_percent, 100, 200, "teach range in percent")
    _within(friction, 1, 10, "teach friction")
    return _pack(
        _BYTES, ID_SET_GRIPPER_PARAMETER, teach_percent, max_stroke_mm, friction, 0, 0, 0, 0, 0
    )


# Layouts of what the arm says, as protocol integers.
#   status: mode, arm status, move mode, teach, moving, point, over-limit bits, joint silence bits
#   joints: two angles, 0.001 degree        gripper: 0.001 mm, 0.001 N.m, status bits, mode
#   motor fast: 0.001 rad/s, 0.001 A, 0.001 rad
#   motor slow: 0.1 V, driver C, motor C, status bits, 0.001 A
#   limit: joint, max, min (0.1 degree), speed      acceleration: joint, 0.01 rad/s^2
LAYOUTS: dict[int, Struct] = {
    ID_STATUS: Struct(">8B"),
    ID_GRIPPER_FEEDBACK: Struct(">ihBB"),
    ID_LIMIT: _LIMIT,
    ID_ACKNOWLEDGE: Struct(">BB6x"),
    ID_END_SPEED: Struct(">HHHH"),
    ID_COLLISION: Struct(">6B2x"),
    ID_ACCELERATION: Struct(">BH5x"),
    ID_GRIPPER_PARAMETER: Struct(">BBB5x"),
    **dict.fromkeys((*ID_POSE_FEEDBACK, *ID_JOINT_FEEDBACK), _PAIR),
    **dict.fromkeys(ID_MOTOR_FAST, Struct(">hhi")),
    **dict.fromkeys(ID_MOTOR_SLOW, Struct(">HhbBH")),
}

Decoder = Callable[[bytes], tuple[int, ...]]

DECODERS: dict[int, Decoder] = {can_id: layout.unpack for can_id, layout in LAYOUTS.items()}

_FIRMWARE = re.compile(rb"S-V(\d+)\.(\d+)-(\d+)")


def parse_firmware(text: bytes) -> tuple[str, tuple[int, int, int]] | None:
    """Return the software version in the firmware answer as text and numbers, or None.

    Args:
        text: the data of the 0x4AF answers, joined in their order.
    """
    # The field is 8 bytes wide and a date made of digits follows it without a gap.
    begin = text.find(b"S-V")
    found = _FIRMWARE.match(text[begin : begin + 8]) if begin >= 0 else None
    if found is None:
        return None
    major, minor, patch = (int(group) for group in found.groups())
    return found.group().decode("ascii"), (major, minor, patch)
