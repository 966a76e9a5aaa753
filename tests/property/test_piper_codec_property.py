"""The PiPER codec against the vendor's SDK, over the whole range of every field."""

import math
import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

can = pytest.importorskip("can")
pytest.importorskip("piper_sdk")

from piper_sdk import C_PiperInterface_V2  # noqa: E402
from piper_sdk.piper_msgs.msg_v2 import PiperMessage  # noqa: E402
from piper_sdk.protocol.protocol_v2 import C_PiperParserV2  # noqa: E402

from gwp_edge.drivers import piper_codec as codec  # noqa: E402
from gwp_edge.errors import SafetyFault  # noqa: E402

INT32 = st.integers(-(2**31), 2**31 - 1)
INT16 = st.integers(-(2**15), 2**15 - 1)
JOINT = st.integers(1, 6)


class _Recorder:
    """Stands where the SDK's CAN port is and keeps what it would send."""

    class CAN_STATUS:
        SEND_MESSAGE_SUCCESS = object()

    def __init__(self):
        self.frames = []

    def SendCanMessage(self, can_id, data):
        self.frames.append((can_id, bytes(data)))
        return self.CAN_STATUS.SEND_MESSAGE_SUCCESS


_SDK = C_PiperInterface_V2(can_name="codec-oracle", judge_flag=False, can_auto_init=False)


def sdk_frames(command):
    """Return the frames that the real SDK packs for ``command``."""
    recorder = _Recorder()
    _SDK._C_PiperInterface_V2__arm_can = recorder
    command(_SDK)
    return recorder.frames


@given(st.lists(INT32, min_size=6, max_size=6))
def test_encode_joints_any_int32_equals_sdk(joints):
    assert list(codec.encode_joints(joints)) == sdk_frames(lambda s: s.JointCtrl(*joints))


@given(INT32, st.integers(0, 2000), st.integers(0, 3), st.booleans())
def test_encode_gripper_whole_range_equals_sdk(stroke, effort, code, zero):
    zero = zero and code in (0, 2)
    ours = codec.encode_gripper(stroke, effort, code, set_zero=zero)
    assert [ours] == sdk_frames(lambda s: s.GripperCtrl(stroke, effort, code, 0xAE * zero))


@given(st.integers(0, 100), st.booleans())
def test_encode_mode_every_speed_equals_sdk(speed, standby):
    ours = codec.encode_mode(speed, standby=standby)
    assert [ours] == sdk_frames(lambda s: s.MotionCtrl_2(0 if standby else 1, 1, speed, 0))


@given(st.integers(1, 7), st.booleans())
def test_encode_enable_every_motor_equals_sdk(motor, enable):
    ours = codec.encode_enable(motor, enable=enable)
    assert [ours] == sdk_frames(lambda s: s.EnableArm(motor) if enable else s.DisableArm(motor))


@given(JOINT, INT16, INT16, st.integers(0, 3000))
def test_encode_set_limit_whole_range_equals_sdk(joint, high, low, speed):
    # The SDK refuses angles that its own table does not allow, so its encoder is asked directly.
    message = PiperMessage()
    parser = C_PiperParserV2()
    limit = message.arm_motor_angle_limit_max_spd_set
    limit.motor_num, limit.max_angle_limit = joint, high
    limit.min_angle_limit, limit.max_joint_spd = low, speed
    assert codec.encode_set_limit(joint, high, low, speed) == _encode(
        parser, message, "PiperMsgMotorAngleLimitMaxSpdSet"
    )


def _encode(parser, message, kind):
    from piper_sdk.piper_msgs.msg_v2 import ArmMsgType

    message.type_ = getattr(ArmMsgType, kind)
    frame = can.Message()
    assert parser.EncodeMessage(message, frame)
    return frame.arbitration_id, bytes(frame.data)


@given(JOINT, st.sampled_from([1, 2]))
def test_encode_query_limit_equals_sdk(joint, content):
    ours = codec.encode_query_limit(joint, content)
    assert [ours] == sdk_frames(lambda s: s.SearchMotorMaxAngleSpdAccLimit(joint, content))


@given(st.integers(1, 4))
def test_encode_query_parameter_equals_sdk(what):
    ours = codec.encode_query_parameter(what)
    assert [ours] == sdk_frames(lambda s: s.ArmParamEnquiryAndConfig(param_enquiry=what))


@given(st.integers(0, 2))
def test_encode_stop_equals_sdk(action):
    assert [codec.encode_stop(action)] == sdk_frames(lambda s: s.MotionCtrl_1(action, 0, 0))


@given(st.integers(1, 7), st.integers(0, 500) | st.just(codec.KEEP), st.booleans())
def test_encode_joint_config_equals_sdk(joint, acceleration, clear):
    ours = codec.encode_joint_config(joint, acceleration_crad_s2=acceleration, clear_error=clear)
    keep = acceleration == codec.KEEP
    message = PiperMessage()
    config = message.arm_joint_config
    config.joint_motor_num = joint
    config.set_motor_current_pos_as_zero = 0
    config.acc_param_config_is_effective_or_not = 0 if keep else 0xAE
    config.max_joint_acc = acceleration
    config.clear_joint_err = 0xAE * clear
    assert ours == _encode(C_PiperParserV2(), message, "PiperMsgJointConfig")


@given(st.lists(st.integers(0, 8), min_size=6, max_size=6))
def test_encode_set_collision_equals_sdk(levels):
    ours = codec.encode_set_collision(levels)
    assert [ours] == sdk_frames(lambda s: s.CrashProtectionConfig(*levels))


@given(st.sampled_from([70, 100]), st.integers(100, 200), st.integers(1, 10))
def test_encode_set_gripper_parameter_equals_sdk(stroke, percent, friction):
    ours = codec.encode_set_gripper_parameter(stroke, teach_percent=percent, friction=friction)
    assert [ours] == sdk_frames(
        lambda s: s.GripperTeachingPendantParamConfig(percent, stroke, friction)
    )


def test_encode_firmware_and_role_equal_sdk():
    assert [codec.encode_query_firmware()] == sdk_frames(lambda s: s.SearchPiperFirmwareVersion())
    assert [codec.encode_follower_role()] == sdk_frames(
        lambda s: s.MasterSlaveConfig(0xFC, 0, 0, 0)
    )


# --- decoding ---


def _read(can_id, m):
    """Return the SDK's reading of ``can_id`` in the order of our decoder, or None to skip."""
    j, p = m.arm_joint_feedback, m.arm_end_pose
    if 0x251 <= can_id <= 0x256:
        f = getattr(m, f"arm_high_spd_feedback_{can_id - 0x250}")
        return f.motor_speed, f.current, f.pos
    if 0x261 <= can_id <= 0x266:
        d = getattr(m, f"arm_low_spd_feedback_{can_id - 0x260}")
        return d.vol, d.foc_temp, d.motor_temp, d.foc_status_code, d.bus_current
    g = m.gripper_feedback
    n = m.arm_feedback_current_motor_angle_limit_max_spd
    e = m.arm_feedback_current_end_vel_acc_param
    c = m.arm_crash_protection_rating_feedback
    a = m.arm_feedback_current_motor_max_acc_limit
    r = m.arm_feedback_resp_set_instruction
    t = m.arm_gripper_teaching_param_feedback
    return {
        0x2A2: (p.X_axis, p.Y_axis),
        0x2A3: (p.Z_axis, p.RX_axis),
        0x2A4: (p.RY_axis, p.RZ_axis),
        0x2A5: (j.joint_1, j.joint_2),
        0x2A6: (j.joint_3, j.joint_4),
        0x2A7: (j.joint_5, j.joint_6),
        0x2A8: (g.grippers_angle, g.grippers_effort, g.status_code),
        0x473: (n.motor_num, n.max_angle_limit, n.min_angle_limit, n.max_joint_spd),
        0x476: (r.instruction_index, r.is_set_zero_successfully),
        0x478: (
            e.end_max_linear_vel,
            e.end_max_angular_vel,
            e.end_max_linear_acc,
            e.end_max_angular_acc,
        ),
        0x47B: tuple(getattr(c, f"joint_{k}_protection_level") for k in range(1, 7)),
        0x47C: (a.joint_motor_num, a.max_joint_acc),
        0x47E: (t.teaching_range_per, t.max_range_config, t.teaching_friction),
    }[can_id]


def test_decoders_cover_every_feedback_frame_of_the_table():
    assert set(codec.DECODERS) == {
        *range(0x2A1, 0x2A9),
        *range(0x251, 0x257),
        *range(0x261, 0x267),
        0x473,
        0x476,
        0x478,
        0x47B,
        0x47C,
        0x47E,
    }


@pytest.mark.parametrize("can_id", [*range(0x2AA, 0x2AD), *range(0x481, 0x487), 0x488])
def test_answers_without_a_decoder_have_none_in_the_sdk_either(can_id):
    frame = can.Message(arbitration_id=can_id, data=bytes(8), is_extended_id=False)
    assert not C_PiperParserV2().DecodeMessage(frame, PiperMessage())
    assert can_id not in codec.DECODERS


@settings(max_examples=400)
@given(st.sampled_from(sorted(set(codec.DECODERS) - {0x2A1})), st.binary(min_size=8, max_size=8))
def test_decode_any_bytes_equals_sdk(can_id, data):
    message = PiperMessage()
    frame = can.Message(arbitration_id=can_id, data=data, is_extended_id=False)
    assert C_PiperParserV2().DecodeMessage(frame, message)
    theirs = _read(can_id, message)
    assert codec.DECODERS[can_id](data)[: len(theirs)] == theirs


@given(
    st.tuples(
        st.integers(0, 7),
        st.integers(0, 15),
        st.integers(0, 5),
        st.integers(0, 7),
        st.integers(0, 1),
        *[st.integers(0, 255)] * 3,
    )
)
def test_decode_status_equals_sdk(fields):
    data = bytes(fields)
    message = PiperMessage()
    frame = can.Message(arbitration_id=codec.ID_STATUS, data=data, is_extended_id=False)
    assert C_PiperParserV2().DecodeMessage(frame, message)
    s = message.arm_status_msgs
    ours = codec.DECODERS[codec.ID_STATUS](data)
    assert ours[:6] == (
        int(s.ctrl_mode),
        int(s.arm_status),
        int(s.mode_feed),
        int(s.teach_status),
        int(s.motion_status),
        s.trajectory_num,
    )
    over = [getattr(s.err_status, f"joint_{k}_angle_limit") for k in range(1, 7)]
    silent = [getattr(s.err_status, f"communication_status_joint_{k}") for k in range(1, 7)]
    assert [bool(ours[6] >> k & 1) for k in range(6)] == over
    assert [bool(ours[7] >> k & 1) for k in range(6)] == silent


@given(st.binary(max_size=60), st.integers(0, 9), st.integers(0, 9), st.integers(0, 9))
def test_parse_firmware_equals_sdk(before, major, minor, patch):
    text = (before.replace(b"S-V", b"...") + b"S-V%d.%d-%d" % (major, minor, patch)).ljust(
        88, b"\0"
    )
    _SDK._C_PiperInterface_V2__firmware_data = bytearray(text)
    parsed = codec.parse_firmware(text)
    assert parsed is not None
    assert parsed == (_SDK.GetPiperFirmwareVersion(), (major, minor, patch))


# --- units and refusals ---


@given(INT32)
def test_angles_survive_the_round_trip_exactly(mdeg):
    assert codec.rad_to_mdeg(codec.mdeg_to_rad(mdeg)) == [mdeg]


@given(INT32)
def test_lengths_survive_the_round_trip_exactly(um):
    assert codec.m_to_um(codec.um_to_m(um)) == um


@given(st.floats(-7.0, 7.0))
def test_rad_to_mdeg_is_odd_and_within_half_a_unit(angle_rad):
    mdeg, opposite = codec.rad_to_mdeg(angle_rad, -angle_rad)
    assert opposite == -mdeg
    assert abs(mdeg - math.degrees(angle_rad) * 1000) <= 0.5 + 1e-6


@given(
    st.lists(INT32, min_size=6, max_size=6),
    st.integers(0, 5),
    st.integers(2**31, 2**40) | st.integers(-(2**40), -(2**31) - 1) | st.floats(),
)
def test_encode_joints_one_value_too_big_or_no_integer_is_refused_whole(joints, where, value):
    joints[where] = value
    with pytest.raises(SafetyFault, match="nothing was sent"):
        codec.encode_joints(joints)


@given(st.binary(min_size=8, max_size=8))
def test_joint_frames_decode_to_what_was_encoded(data):
    a, b = codec.DECODERS[codec.ID_JOINT_FEEDBACK[0]](data)
    assert codec.encode_joints([a, b, 0, 0, 0, 0])[0] == (codec.ID_JOINTS_12, data)
    assert struct.pack(">ii", a, b) == data


def test_encode_joints_numpy_integers_are_taken():
    joints = np.arange(6, dtype=np.int64)
    assert codec.encode_joints(joints.tolist()) == codec.encode_joints(range(6))
