"""Refusals of the PiPER codec, and a few frames written out by hand."""

import math

import pytest

from gwp_edge.drivers import piper_codec as codec
from gwp_edge.errors import SafetyFault


def test_encode_joints_known_angles_gives_known_bytes():
    frames = codec.encode_joints([90_000, -90_000, 1, -1, 0, 180_000])
    assert frames == (
        (0x155, bytes.fromhex("00015f90fffea070")),
        (0x156, bytes.fromhex("00000001ffffffff")),
        (0x157, bytes.fromhex("000000000002bf20")),
    )


def test_encode_gripper_known_opening_gives_known_bytes():
    assert codec.encode_gripper(50_000, 1000) == (0x159, bytes.fromhex("0000c35003e80100"))


def test_encode_mode_is_joint_position_over_can_and_nothing_else():
    assert codec.encode_mode(100) == (0x151, bytes.fromhex("0101640000000000"))


def test_codec_has_no_mit_frame_and_no_pass_through_mode():
    names = [name for name in dir(codec) if name.startswith("encode_")]
    assert len(names) > 10
    assert not [name for name in names if "mit" in name.lower().split("_")]
    ids = {v for name, v in vars(codec).items() if name.startswith("ID_") and isinstance(v, int)}
    assert not ids & set(range(0x15A, 0x160))
    for speed in range(101):
        assert codec.encode_mode(speed)[1][3] == 0


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_targets_not_finite_are_refused(value):
    with pytest.raises(SafetyFault, match="not a number; nothing was sent"):
        codec.rad_to_mdeg(value)
    with pytest.raises(SafetyFault, match="not a number; nothing was sent"):
        codec.m_to_um(value)


@pytest.mark.parametrize(
    ("encode", "message"),
    [
        (lambda: codec.encode_joints([0] * 5), "needs 6 joint targets, got 5"),
        (lambda: codec.encode_joints([0] * 5 + [2**31]), "0x157"),
        (lambda: codec.encode_gripper(0, 2001), "0 to 2000, got 2001"),
        (lambda: codec.encode_gripper(0, -1), "0 to 2000, got -1"),
        (lambda: codec.encode_gripper(2**31, 0), "0x159"),
        (lambda: codec.encode_gripper(0, 0, 4), "0 to 3, got 4"),
        (lambda: codec.encode_gripper(0, 0, 1, set_zero=True), "only while it is disabled"),
        (lambda: codec.encode_mode(101), "0 to 100, got 101"),
        (lambda: codec.encode_mode(1.5), "expected a whole number, got 1.5"),
        (lambda: codec.encode_stop(3), "0 to 2, got 3"),
        (lambda: codec.encode_enable(0, enable=True), "1 to 7, got 0"),
        (lambda: codec.encode_query_limit(7, 1), "1 to 6, got 7"),
        (lambda: codec.encode_query_parameter(5), "1 to 4, got 5"),
        (lambda: codec.encode_set_limit(1, 40_000, 0, 0), "0x474"),
        (lambda: codec.encode_joint_config(1, acceleration_crad_s2=501), "0 to 500, got 501"),
        (lambda: codec.encode_set_collision([9] * 6), "0 to 8, got 9"),
        (lambda: codec.encode_set_collision([1]), "needs 6 collision levels"),
        (lambda: codec.encode_set_gripper_parameter(80), "70 or 100 mm, got 80"),
    ],
)
def test_encoders_values_out_of_range_are_refused(encode, message):
    with pytest.raises(SafetyFault, match=message):
        encode()


def test_parse_firmware_date_right_behind_is_not_part_of_the_version():
    assert codec.parse_firmware(b"H-V1.2-1\0\0S-V1.8-6250826\0") == ("S-V1.8-6", (1, 8, 6))


def test_parse_firmware_without_version_is_none():
    assert codec.parse_firmware(b"H-V1.2-1") is None
