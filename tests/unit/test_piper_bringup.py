"""Waking a PiPER: what it must be, and every reason to refuse."""

import math

import numpy as np
import pytest
from piper_rig import MS, Rig, channels

from gwp_edge.drivers import piper_codec as codec
from gwp_edge.drivers.piper import PiperArm, create_arm
from gwp_edge.drivers.piper_fake import FakePiper
from gwp_edge.drivers.piper_feedback import ERR_CONTROLLER, ERR_PROTOCOL
from gwp_edge.drivers.piper_options import parse_options
from gwp_edge.errors import DeviceError, DeviceTimeoutError, SafetyFault, SpecError


def test_open_enabled_powers_all_motors_and_does_not_move():
    rig = Rig(fakes=[FakePiper(needs_two_enables=True)])
    before = list(rig.fake.joint_mdeg)
    rig.arm.open(enable=True)
    state = rig.watch()
    assert state.enabled
    assert state.fault is None
    assert rig.fake.enabled == [True] * 6
    assert rig.fake.gripper_enabled
    assert rig.fake.joint_mdeg == before
    assert state.position[:6] == pytest.approx(np.radians(np.array(before) / 1000), abs=1e-5)
    assert not rig.fake.forbidden


def test_open_enabled_seeds_measured_pose_before_first_enable():
    rig = Rig()
    rig.arm.open(enable=True)
    ids = [can_id for can_id, _ in rig.bus.sent]
    first_enable = ids.index(codec.ID_ENABLE)
    assert {0x155, 0x156, 0x157} <= set(ids[:first_enable])
    assert codec.ID_MODE not in ids[:first_enable]
    seed = codec.encode_joints([round(q) for q in rig.fake.joint_mdeg])
    targets = [frame for frame in rig.bus.sent if frame[0] in (0x155, 0x156, 0x157)]
    assert set(targets) == set(seed)


def test_open_enabled_names_joints_one_by_one_and_never_all():
    rig = Rig()
    rig.arm.open(enable=True)
    enables = [data[:2] for can_id, data in rig.bus.sent if can_id == codec.ID_ENABLE]
    assert {data[0] for data in enables} == {1, 2, 3, 4, 5, 6}
    assert {data[1] for data in enables} == {2}


def test_open_to_read_sends_questions_only():
    rig = Rig()
    rig.arm.open(enable=False)
    questions = {codec.ID_QUERY_LIMIT, codec.ID_FIRMWARE, codec.ID_QUERY_PARAMETER}
    assert {can_id for can_id, _ in rig.bus.sent} == questions
    state = rig.watch()
    assert not state.enabled
    with pytest.raises(DeviceError, match="open for reading only"):
        rig.arm.send(state.position)


def test_close_sends_nothing_and_leaves_the_arm_holding():
    rig = Rig()
    rig.arm.open(enable=True)
    n_sent = len(rig.bus.sent)
    rig.arm.close()
    rig.arm.close()
    assert len(rig.bus.sent) == n_sent
    assert rig.fake.enabled == [True] * 6
    with pytest.raises(DeviceError, match="call open first"):
        rig.arm.state()


def test_open_again_after_close_needs_no_new_enable():
    rig = Rig()
    rig.arm.open(enable=True)
    n_enables = rig.fake.heard[codec.ID_ENABLE]
    rig.arm.close()
    rig.arm.open(enable=True)
    assert rig.fake.heard[codec.ID_ENABLE] == n_enables
    assert rig.watch().enabled


def test_limits_are_the_intersection_less_two_degrees():
    rig = Rig()
    with pytest.raises(DeviceError, match="known after open"):
        _ = rig.arm.limits
    rig.fake.faults.limits[1] = (900, -1500)
    rig.arm.open(enable=False)
    limits = rig.arm.limits
    margin = math.radians(2)
    assert limits.position_max[0] == pytest.approx(math.radians(90) - margin)
    assert limits.position_min[0] == pytest.approx(-2.6179 + margin)
    assert limits.position_max[5] == pytest.approx(1.745 - margin)
    assert limits.position_min[1] == pytest.approx(margin)
    assert limits.position_max[6] == 0.07
    assert limits.velocity_max[:6] == pytest.approx([3.0] * 6)
    assert limits.acceleration_max[:6] == pytest.approx([5.0] * 6)


def refusal(rig, *, enable=True, error=DeviceError):
    with pytest.raises(error) as caught:
        rig.arm.open(enable=enable)
    assert codec.ID_ENABLE not in rig.fake.heard
    assert not rig.fake.forbidden
    text = str(caught.value)
    assert "\n" not in text
    assert text.startswith("arm (can0): ")
    return text


def test_open_powered_off_says_off_or_leader():
    rig = Rig()
    rig.fake.faults.silent = True
    text = refusal(rig, error=DeviceTimeoutError)
    assert "no frames within 0.5 s" in text
    assert "switched off" in text
    assert "leader role" in text
    assert rig.clock.t_ns - 1_000_000_000 < 600 * MS


def test_open_leader_that_is_moved_is_told_apart():
    rig = Rig()
    rig.fake.faults.leader = True
    assert "the arm is in the leader role" in refusal(rig)


@pytest.mark.parametrize("classes", [ERR_PROTOCOL, ERR_CONTROLLER])
def test_open_error_frames_only_hints_at_the_bitrate(classes):
    rig = Rig()
    rig.fake.faults.silent = True
    for _ in range(3):
        rig.fake.error_frame(classes)
    text = refusal(rig)
    assert "3 CAN error frames" in text
    assert "bitrate 1000000" in text


@pytest.mark.parametrize(
    ("muted", "words"),
    [
        (0x2A1, "status (0x2A1)"),
        (0x2A6, "joint angles (0x2A5 to 0x2A7)"),
        (0x2A8, "gripper (0x2A8)"),
        (0x263, "joint 3 driver (0x263)"),
    ],
)
def test_open_partial_feedback_names_what_is_missing(muted, words):
    rig = Rig()
    rig.fake.faults.mute_ids = frozenset({muted})
    text = refusal(rig, error=DeviceTimeoutError)
    assert f"missing {words}:" in text


def test_open_feedback_that_stops_after_a_moment_is_stale():
    # Without a version the questions are repeated for 0.4 s, long enough for the angles to age.
    rig = Rig(fakes=[FakePiper(firmware="no version")])
    waiting = rig.bus.waiting
    first_ns = rig.clock.t_ns

    def stops():
        if rig.clock.t_ns > first_ns + 50 * MS:
            rig.fake.faults.mute_ids = frozenset({0x2A5})
        return waiting()

    rig.bus.waiting = stops
    text = refusal(rig, error=DeviceTimeoutError)
    assert "no joint angles feedback for" in text


def test_open_limits_not_answered_is_refused():
    rig = Rig()
    rig.fake.faults.no_answers = True
    assert "joint 1 did not answer its limits" in refusal(rig)


@pytest.mark.parametrize("limits", [(-1, -1), (-100, 100), (50, 0), (4000, -1000)])
@pytest.mark.parametrize("enable", [False, True])
def test_open_absurd_limits_are_refused_also_for_reading(limits, enable):
    rig = Rig()
    rig.fake.faults.limits[4] = limits
    text = refusal(rig, enable=enable)
    assert "joint 4 stores absurd limits" in text
    assert "restore its defaults" in text


def test_open_limits_outside_the_published_ones_leave_no_range():
    rig = Rig()
    rig.fake.faults.limits[2] = (-100, -300)
    assert "joint 2 has no range left" in refusal(rig)


@pytest.mark.parametrize(
    ("mode", "words"),
    [
        (2, "teach mode: someone pressed the teach button; press it again"),
        (3, "ethernet control"),
        (4, "wifi control"),
        (5, "remote control"),
        (6, "leader (linkage teaching input) role: make it a follower"),
        (7, "offline trajectory mode"),
        (9, "unknown control mode 9"),
    ],
)
def test_open_wrong_mode_says_what_the_person_must_do(mode, words):
    rig = Rig()
    rig.fake.faults.mode = mode
    assert words in refusal(rig)


def test_open_teach_mode_may_be_read():
    rig = Rig()
    rig.fake.press_teach()
    rig.arm.open(enable=False)
    assert rig.watch().fault is None


@pytest.mark.parametrize(
    ("status", "words"),
    [
        (1, "emergency stop"),
        (5, "a joint does not answer the controller"),
        (6, "brake is not released"),
        (7, "collision detected, the arm is frozen"),
        (8, "too fast while being dragged"),
        (9, "abnormal state"),
        (10, "error without a name"),
        (14, "controller is too hot"),
        (15, "brake resistor is too hot"),
        (99, "unknown arm status 99"),
    ],
)
def test_open_status_that_needs_a_person_is_refused(status, words):
    rig = Rig()
    rig.fake.faults.arm_status = status
    assert words in refusal(rig)


def test_open_driver_fault_names_the_joint():
    rig = Rig()
    rig.fake.faults.driver_bits[2] = 0b10000001
    text = refusal(rig)
    assert "joint 2: supply voltage too low" in text
    assert "motor stalled" in text


def test_open_gripper_range_never_set_says_how_to_set_it():
    rig = Rig()
    rig.fake.faults.gripper_unset = True
    text = refusal(rig)
    assert "stroke is not set (it says 0 mm" in text
    assert "set its zero" in text


def test_open_someone_else_commands_the_arm_is_refused():
    rig = Rig()
    waiting = rig.bus.waiting

    def with_stranger():
        rig.inject(*codec.encode_joints([0] * 6)[0])
        return waiting()

    rig.bus.waiting = with_stranger
    assert "another program or a leader arm sends joint commands" in refusal(rig)


def test_open_last_frame_of_a_program_that_has_ended_is_no_reason_to_refuse():
    rig = Rig()
    rig.inject(*codec.encode_joints([0] * 6)[0])
    rig.arm.open(enable=True)
    assert rig.watch().fault is None


def test_open_to_read_next_to_a_running_program_works():
    rig = Rig()
    rig.inject(*codec.encode_joints([0] * 6)[0])
    rig.arm.open(enable=False)
    assert rig.watch().fault is None


def test_open_joint_that_does_not_enable_is_named():
    rig = Rig()
    rig.fake.faults.no_enable = frozenset({3, 5})
    with pytest.raises(DeviceTimeoutError, match="joint 3, 5 did not enable within 3 s"):
        rig.arm.open(enable=True)
    assert codec.ID_MODE not in rig.fake.heard


def test_open_fault_while_enabling_stops_it():
    rig = Rig()
    enable = rig.fake._hear_enable

    def break_down(motor, flag):
        enable(motor, flag)
        rig.fake.faults.driver_bits[4] = 0b00100000

    rig.fake._hear_enable = break_down
    with pytest.raises(DeviceError, match="joint 4: driver error"):
        rig.arm.open(enable=True)


def test_open_arm_that_jumps_while_enabling_is_refused():
    rig = Rig()
    enable = rig.fake._hear_enable

    def jump(motor, flag):
        enable(motor, flag)
        rig.fake.joint_mdeg[1] = rig.fake.target_mdeg[1] = 20_000.0

    rig.fake._hear_enable = jump
    with pytest.raises(DeviceError, match=r"joint 2 moved 10\.0 deg while its motors"):
        rig.arm.open(enable=True)


def test_open_arm_that_ignores_the_mode_command_is_refused():
    rig = Rig()
    rig.fake.faults.mode = 0
    with pytest.raises(DeviceTimeoutError, match="did not take CAN joint control within 1 s"):
        rig.arm.open(enable=True)


def test_open_transmit_queue_always_full_is_refused():
    rig = Rig()
    rig.bus.busy = 10_000
    with pytest.raises(DeviceError, match="transmit queue stays full"):
        rig.arm.open(enable=True)


def test_open_short_transmit_queue_is_waited_for():
    rig = Rig()
    rig.bus.busy = 3
    rig.arm.open(enable=True)
    assert rig.watch().enabled


def test_open_bus_off_during_bring_up_is_refused():
    rig = Rig()
    rig.fake.bus_off()
    with pytest.raises(DeviceError, match="bus-off: check cable, termination"):
        rig.arm.open(enable=True)


def test_open_known_drift_firmware_warns(caplog):
    rig = Rig(fakes=[FakePiper(firmware="S-V1.8-6")])
    rig.arm.open(enable=True)
    assert rig.arm.units[0].firmware == "S-V1.8-6"
    assert "S-V1.8-6 is known to report wrong joint angles" in caplog.text


def test_open_drifted_feedback_on_known_firmware_is_refused():
    rig = Rig(fakes=[FakePiper(firmware="S-V1.8-6")])
    rig.fake.faults.drift_mdeg[5] = 30_000
    text = refusal(rig)
    assert "joint 5: its angle and its motor differ by -30.0 deg" in text


def test_open_drifted_feedback_on_other_firmware_warns(caplog):
    rig = Rig()
    rig.fake.faults.drift_mdeg[5] = 30_000
    rig.arm.open(enable=True)
    assert "joint 5: its angle and its motor differ" in caplog.text


def without_common_zero(**options):
    rig = Rig(fakes=[FakePiper(firmware="S-V1.8-6")], **options)
    for joint in range(1, 7):
        # Towards where each joint may be.
        rig.fake.faults.drift_mdeg[joint] = (-10_000 if joint == 3 else 10_000) * joint
    return rig


def test_open_firmware_that_drifts_unseen_is_refused():
    with pytest.raises(
        DeviceError, match=r"no zero in common .* update the firmware, or set drift"
    ):
        without_common_zero().arm.open(enable=False)


def test_open_motors_without_common_zero_are_not_compared_where_that_is_accepted(caplog):
    without_common_zero(drift="warn").arm.open(enable=True)
    assert "no common zero" in caplog.text


def test_gripper_open_wider_than_it_may_is_refused_before_power():
    """Its first command would be its own pose, and be refused with the motors on."""
    rig = Rig(gripper_max_m=0.05)
    rig.fake.gripper_um = 66_000
    with pytest.raises(DeviceError, match=r"gripper is open by 66 mm.*gripper_max_m"):
        rig.arm.open(enable=True)
    assert not any(rig.fake.enabled)
    rig.arm.open(enable=False)


def test_joint_far_outside_of_its_range_is_refused_before_power():
    rig = Rig()
    rig.fake.joint_mdeg[1] = -15_000
    with pytest.raises(DeviceError, match=r"joint 2 is at -15 deg.*by hand"):
        rig.arm.open(enable=True)
    assert not any(rig.fake.enabled)


def test_open_firmware_without_version_warns_and_goes_on(caplog):
    rig = Rig(fakes=[FakePiper(firmware="??")])
    rig.arm.open(enable=False)
    assert "did not say its version" in caplog.text


def test_open_right_arm_refuses_before_left_is_powered():
    rig = Rig(n_arms=2)
    rig.fakes[1].press_teach()
    with pytest.raises(DeviceError, match=r"right arm \(can_right\): the arm is in teach mode"):
        rig.arm.open(enable=True)
    assert codec.ID_ENABLE not in rig.fakes[1].heard
    assert codec.ID_ENABLE not in rig.fakes[0].heard


class SlowFake(FakePiper):
    """Enables on the fifth request only, and does not know its gripper's parameters."""

    def __init__(self):
        super().__init__()
        self._enables_needed = [5] * 6

    def hear(self, can_id, data, t_sent_ns=0):
        if can_id != codec.ID_QUERY_PARAMETER:
            super().hear(can_id, data, t_sent_ns)


@pytest.mark.parametrize("phase_ms", range(5))
@pytest.mark.parametrize("enable", [False, True])
def test_open_slow_right_arm_does_not_make_the_left_one_look_old(phase_ms, enable):
    """Nobody reads the left arm meanwhile: its queue fills, and what is new is lost."""
    rig = Rig(fakes=[FakePiper(), SlowFake()], n_arms=2)
    rig.fakes[1]._t_next_ns = rig.clock.t_ns + phase_ms * MS
    moved = []

    def fall(step=rig.fakes[0].step):
        # By hand, as long as it has no power: the seed must be where it is, not where it was.
        if not any(rig.fakes[0].enabled) and rig.clock.t_ns > 1_200 * MS:
            rig.fakes[0].joint_mdeg[1] = 14_000.0
            rig.fakes[0].target_mdeg[1] = 14_000.0
            moved.append(rig.clock.t_ns)
        return step(rig.clock.t_ns)

    rig.fakes[0].step = lambda now_ns: fall()
    rig.arm.open(enable=enable)
    assert len(rig.buses[0].queue) < 277
    assert rig.arm.state().fault is None
    assert moved
    if enable:
        first = next(data for can_id, data in rig.buses[0].sent if can_id == codec.ID_JOINTS_12)
        assert abs(codec.DECODERS[0x2A5](first)[1] - 14_000) < 500


def test_send_moves_the_arm_to_its_target():
    rig = Rig(n_arms=2)
    rig.arm.open(enable=True)
    target = rig.watch().position.copy()
    target[0] += 0.3
    target[6] = 0.05
    target[8] += 0.2
    target[13] = 0.01
    state = rig.run(target, 200)
    assert state.position == pytest.approx(target, abs=2e-5)
    assert not rig.fakes[0].forbidden
    assert not rig.fakes[1].forbidden


def test_send_four_frames_a_tick_and_the_mode_five_times_a_second():
    rig = Rig()
    rig.arm.open(enable=True)
    pose = rig.watch().position
    rig.bus.sent.clear()
    rig.run(pose, 400)
    ids = [can_id for can_id, _ in rig.bus.sent]
    assert [ids.count(i) for i in (0x155, 0x156, 0x157, 0x159)] == [400] * 4
    assert ids.count(codec.ID_MODE) == 10
    assert len(ids) == 4 * 400 + 10


@pytest.mark.parametrize(
    ("where", "channel"),
    [
        (0, "left arm (can_left): joint 1"),
        (6, "left arm (can_left): gripper"),
        (13, "right arm (can_right): gripper"),
    ],
)
@pytest.mark.parametrize(
    ("value", "words"),
    [
        (math.nan, "is nan, not a number"),
        (math.inf, "is inf, not a number"),
        (1e9, "1e+09 is far outside its range"),
        (-4.0, "-4 is far outside its range"),
    ],
)
def test_send_target_that_cannot_be_meant_sends_nothing_to_either_arm(where, channel, value, words):
    rig = Rig(n_arms=2)
    rig.arm.open(enable=True)
    target = rig.watch().position.copy()
    target[where] = value
    n_sent = [len(bus.sent) for bus in rig.buses]
    with pytest.raises(SafetyFault, match="nothing was sent") as caught:
        rig.arm.send(target)
    assert f"{channel} target {words}" in str(caught.value)
    assert [len(bus.sent) for bus in rig.buses] == n_sent


def test_send_wrong_shape_is_refused():
    rig = Rig()
    rig.arm.open(enable=True)
    with pytest.raises(SafetyFault, match=r"expected shape \(7,\), got \(14,\)"):
        rig.arm.send(np.zeros(14))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "expected either can"),
        ({"left": "a"}, "expected either can"),
        ({"can": "a", "left": "b", "right": "c"}, "expected either can"),
        ({"can": ""}, "empty name"),
        ({"left": "a", "right": "a"}, "one CAN bus cannot carry two arms"),
        ({"can": "a", "driver": "mit"}, "driver"),
        ({"can": "a", "speed_percent": 0}, "1 to 100, got 0"),
        ({"can": "a", "gripper_effort_nm": 3.0}, "above 0 up to 2.0, got 3.0"),
        ({"can": "a", "gripper_effort_nm": math.nan}, "got nan"),
        ({"can": "a", "gripper_max_m": 0.2}, "up to 0.1, got 0.2"),
        ({"can": "a", "speed": 3}, "unknown field `speed`"),
        ({"can": 3}, "can"),
    ],
)
def test_options_that_do_not_fit_are_named(options, message):
    with pytest.raises(SpecError, match=message):
        parse_options(options)


def test_channels_of_another_robot_are_refused():
    with pytest.raises(SpecError, match=r"2 PiPER arm\(s\) have 14 channels"):
        PiperArm(channels(1), parse_options({"left": "a", "right": "b"}))


def test_create_arm_opens_nothing(monkeypatch):
    class Spec:
        channels = tuple(channels(1))

    arm = create_arm({"can": "no-such-interface"}, Spec)
    assert len(arm.channels) == 7
    with pytest.raises(DeviceError, match="CAN interface no-such-interface is missing"):
        arm.open(enable=False)
