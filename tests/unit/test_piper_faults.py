"""Faults while a PiPER runs: each shows within its time, in words, and nothing is fought.

Every fault that a run must survive, and the tests that hold its reaction, deadline and words:

| event | tests |
|---|---|
| NaN or infinity in a plan | test_motor: one_not_finite_chunk_keeps_the_plan_three_hold |
| target out of limits | test_safety_property; test_motor: absurd_plans, a_little_outside |
| likewise | test_motor: plan_that_stays_outside |
| plan used up | test_motor: used_up_plan_holds_and_a_fresh_one_resumes_by_approach |
| cameras stall | test_run: camera_stall_ends_holding, short_camera_stall_resumes |
| likewise | test_policy_process: cameras_are_watched_between_plans |
| old joint feedback | test_motor: old_feedback_warns_then_holds_then_faults; here: silence_* |
| arm does not follow | test_motor: arm_that_does_not_follow; here: stuck_joint |
| likewise | test_motor: blocked_joint_is_commanded, fault_of_a_blocked_joint |
| transmit queue full | test_motor: dropped_commands, dropped_for_longer; here: full_queue_* |
| motor loop paused | test_motor: pause_is_measured, arm_that_has_stopped_since, loop_that_paused |
| bus-off, interface down | here: bus_off_*, interface_that_goes_down |
| arm status, driver bits | here: status_fault_*, driver_bit_*; test_motor: arm_fault_is_latched |
| status 4 | here: passing_status_*; test_motor: caution_holds_once |
| motors without power | test_motor: motors_without_power |
| mode is not CAN | here: teach_button_*, mode_that_is_not_can_* |
| Ctrl-C, SIGTERM, SIGHUP | test_run: signal_ends_well |
| likewise | test_run_ends: signal_to_the_whole_group, second_interrupt |
| guardian or policy process gone | test_run: killed_guardian, killed_policy |
| likewise | test_run_ends: guardian_that_hangs |
| main process hangs or dies | test_run_ends: main_process_that_hangs; test_run_orphaned |
| likewise | test_motor: silent_supervisor_stops, silent_supervisor_ends_a_parking |
| display fails | test_run_ends: display_that_fails, display_is_blocked |
| error inside the motor process | test_run: error_inside_the_motor_process |
| recorder gone | test_record_run: recorder_that_dies, full_disk |
| motor process killed or hanging | test_run: killed_motor, hanging_motor |
| likewise | test_bench_loop; test_run_ends: motor_process_that_does_not_stop |
| operator, external e-stop | test_run: estop_signal, keys_hold_resume_and_park |
| likewise | test_run_ends: parking_can_be_stopped, keys_before_the_start |
| likewise | test_run_ends: while_motors_are_powered; test_motor: hold_that_lasted |

test_bench_soak injects most of them into whole runs and judges the commands at the arm.
"""

import gc
import logging
import struct
import weakref

import numpy as np
import pytest
from piper_rig import MS, Rig

from gwp_edge.drivers import piper_bringup
from gwp_edge.drivers import piper_codec as codec
from gwp_edge.drivers.piper_fake import FakePiper
from gwp_edge.drivers.piper_feedback import ERR_NO_ACK, ERR_RESTARTED, PiperFeedback
from gwp_edge.errors import DeviceError, DeviceTimeoutError


@pytest.fixture
def rig():
    rig = Rig()
    rig.arm.open(enable=True)
    rig.run(rig.watch().position, 20)
    return rig


def test_quiet_run_has_no_fault(rig):
    for _ in range(200):
        assert rig.run(rig.watch().position, 1).fault is None


@pytest.mark.parametrize(
    ("muted", "words"),
    [
        ({0x2A5}, "no joint angles feedback for"),
        ({0x2A8}, "no gripper feedback for"),
        ({0x2A1}, "no status feedback for"),
    ],
)
def test_silence_shows_within_110_ms(rig, muted, words):
    rig.fake.faults.mute_ids = frozenset(muted)
    text, took_ns = rig.fault_after(110 * MS)
    assert words in text
    assert took_ns > 90 * MS
    assert "check the CAN cable" in text


def test_silence_of_everything_shows_and_passes_when_frames_return(rig):
    rig.fake.faults.silent = True
    text, _ = rig.fault_after(110 * MS)
    assert text.startswith("arm (can0): no joint angles feedback for 1")
    age_ns = rig.clock.t_ns - rig.arm.state().t_received_ns
    assert age_ns > 90 * MS
    rig.fake.faults.silent = False
    assert rig.watch(10).fault is None


def test_silent_joint_driver_is_named(rig):
    rig.fake.faults.mute_ids = frozenset({0x264})
    text, _ = rig.fault_after(530 * MS)
    assert "joint 4: no driver feedback for" in text


@pytest.mark.parametrize(
    ("status", "words"),
    [
        (1, "emergency stop: find out why"),
        (5, "a joint does not answer the controller"),
        (6, "brake is not released"),
        (7, "collision detected, the arm is frozen"),
        (9, "a joint reports an abnormal state"),
        (10, "error without a name"),
        (14, "controller is too hot"),
        (15, "brake resistor is too hot"),
    ],
)
def test_status_fault_shows_at_once_and_stays(rig, status, words):
    rig.fake.faults.arm_status = status
    text, _ = rig.fault_after(10 * MS)
    assert words in text
    rig.fake.faults.arm_status = None
    assert words in rig.watch(50).fault


@pytest.mark.parametrize(
    ("status", "words"),
    [(2, "no solution"), (3, "singular"), (4, "over the arm's own angle limit")],
)
def test_passing_status_is_a_caution_while_the_mode_is_sent_again(rig, status, words):
    rig.fake.faults.arm_status = status
    text, _ = rig.caution_after(10 * MS)
    assert words in text
    assert rig.watch().fault is None
    rig.bus.sent.clear()
    rig.run(rig.watch().position, 41)
    assert codec.ID_MODE in [can_id for can_id, _ in rig.bus.sent]
    rig.fake.faults.arm_status = None
    assert rig.watch(2).caution is None


def test_joint_at_its_limit_is_named_and_passes(rig):
    rig.fake.faults.over_limit = 0b000100
    assert "joint 3 is at its angle limit" in rig.caution_after(10 * MS)[0]
    assert rig.watch().fault is None
    rig.fake.faults.over_limit = 0
    assert rig.watch(2).caution is None


def test_fake_says_as_much_as_the_vendor_documents():
    """It left the end pose out, and a fifth of what a bus carries with it."""
    fake = FakePiper()
    fake.step(0)
    counts = {}
    for now_ms in range(1, 1_001):
        for can_id, _, _ in fake.step(now_ms * MS):
            counts[can_id] = counts.get(can_id, 0) + 1
    fast = (*range(0x251, 0x257), *range(0x2A1, 0x2A9))
    assert counts == {**dict.fromkeys(fast, 200), **dict.fromkeys(range(0x261, 0x267), 40)}
    assert sum(counts.values()) == 3040


def test_memory_bus_passes_what_a_kernel_filter_would_and_fills_with_nothing_else(rig):
    rig.clock.sleep_until_ns(rig.clock.t_ns + 50 * MS)
    assert {0x2A1, 0x261} <= {can_id for can_id, _, _ in rig.bus.queue}
    assert not {can_id for can_id, _, _ in rig.bus.queue} & set(codec.ID_POSE_FEEDBACK)


@pytest.mark.parametrize(
    ("joint", "target_mdeg", "limit_mdeg"),
    [(1, 400_000, 150_000), (2, -5_000, 0), (3, -400_000, -170_000)],
)
def test_fake_target_over_a_limit_stops_there_and_is_a_caution(joint, target_mdeg, limit_mdeg):
    """The fake followed a target of 400 degrees with status 0: no test could reach a limit."""
    rig = Rig()
    rig.arm.open(enable=True)
    targets = [round(q) for q in rig.fake.joint_mdeg]
    inside = list(targets)
    targets[joint - 1] = target_mdeg
    for frame in codec.encode_joints(targets):
        rig.fake.hear(*frame)
    text, _ = rig.caution_after(10 * MS)
    assert "over the arm's own angle limit" in text
    assert rig.arm.units[0].feedback.arm_status == 4
    assert rig.fake.over_limit == 1 << (joint - 1)
    for _ in range(1000):
        rig.watch()
        assert rig.fake.joint_mdeg[joint - 1] * np.sign(target_mdeg) <= abs(limit_mdeg)
    assert rig.fake.joint_mdeg[joint - 1] == pytest.approx(limit_mdeg, abs=1)
    assert rig.watch().fault is None
    assert rig.watch().caution is not None  # it holds as long as the target does
    for frame in codec.encode_joints(inside):
        rig.fake.hear(*frame)
    assert rig.watch(2).caution is None
    assert rig.fake.over_limit == 0


def test_fake_stops_at_the_limits_that_it_answers(rig):
    rig.fake.faults.limits[1] = (200, -200)
    for frame in codec.encode_joints([90_000, 10_000, -20_000, 0, 15_000, 0]):
        rig.fake.hear(*frame)
    rig.watch(400)
    assert rig.fake.joint_mdeg[0] == pytest.approx(20_000, abs=1)
    rig.fake.faults.limits[1] = (100, -100)  # out of them now: not farther, and no jump
    rig.watch(1)
    assert rig.fake.joint_mdeg[0] > 19_000
    rig.watch(400)
    assert rig.fake.joint_mdeg[0] == pytest.approx(10_000, abs=1)


def test_joints_that_do_not_answer_are_named_and_stay(rig):
    rig.fake.faults.joint_silent = 0b100001
    assert "joint 1, joint 6 does not answer the controller" in rig.fault_after(10 * MS)[0]
    rig.fake.faults.joint_silent = 0
    assert rig.watch(2).fault is not None


@pytest.mark.parametrize(
    ("bit", "words"),
    [
        (0, "supply voltage too low"),
        (1, "motor too hot"),
        (2, "driver over current"),
        (3, "driver too hot"),
        (4, "collision detected"),
        (5, "driver error"),
        (7, "motor stalled"),
    ],
)
def test_driver_bit_shows_within_a_driver_period_and_stays(rig, bit, words):
    rig.fake.faults.driver_bits[5] = 1 << bit
    text, _ = rig.fault_after(30 * MS)
    assert f"joint 5: {words}" in text
    rig.fake.faults.driver_bits.clear()
    assert words in rig.watch(20).fault
    rig.arm.send(rig.watch().position)  # holding goes on


def test_driver_bit_for_one_frame_between_two_ticks_is_not_lost(rig):
    rig.fake.faults.driver_bits[1] = 1 << 2
    rig.clock.t_ns += 25 * MS
    frames = rig.bus.receive()
    rig.fake.faults.driver_bits.clear()
    rig.clock.t_ns += 25 * MS
    frames += rig.bus.receive()
    rig.arm.units[0].feedback.ingest(frames)
    assert "joint 1: driver over current" in rig.arm.state().fault


def test_gripper_fault_is_named(rig):
    rig.fake.faults.gripper_bits = 1 << 4
    assert "gripper: sensor error" in rig.fault_after(10 * MS)[0]


def test_teach_button_stops_streaming_and_is_not_fought(rig):
    rig.fake.press_teach()
    text, _ = rig.fault_after(10 * MS)
    assert "the arm left CAN control, streaming stopped" in text
    assert "someone pressed the teach button" in text
    n_sent = len(rig.bus.sent)
    for _ in range(100):
        state = rig.watch()
        assert state.fault is not None
        with pytest.raises(DeviceError, match="someone pressed the teach button"):
            rig.arm.send(state.position)
    assert len(rig.bus.sent) == n_sent
    assert not rig.fake.forbidden


@pytest.mark.parametrize("mode", [0, 3, 4, 5, 6, 7])
def test_mode_that_is_not_can_latches_even_when_it_returns(rig, mode):
    rig.fake.faults.mode = mode
    rig.fault_after(10 * MS)
    rig.fake.faults.mode = None
    state = rig.watch(20)
    assert "left CAN control" in state.fault
    with pytest.raises(DeviceError, match="left CAN control"):
        rig.arm.send(state.position)


def test_motor_that_loses_power_is_named_and_not_enabled(rig):
    rig.fake.enabled[3] = False
    text, _ = rig.fault_after(30 * MS)
    assert "joint 4: its motor lost power or was disabled from elsewhere" in text
    assert not rig.arm.state().enabled
    with pytest.raises(DeviceError, match="joint 4"):
        rig.arm.send(rig.arm.state().position)


def test_gripper_that_loses_power_is_named(rig):
    rig.fake.gripper_enabled = False
    assert "gripper: its motor lost power" in rig.fault_after(10 * MS)[0]


def test_another_program_that_commands_the_arm_stops_ours(rig):
    rig.inject(*codec.encode_joints([0] * 6)[0])
    assert "another program or a leader arm" in rig.fault_after(10 * MS)[0]
    with pytest.raises(DeviceError, match="another program"):
        rig.arm.send(rig.arm.state().position)


def test_bus_off_ends_the_connection_for_good(rig):
    rig.fake.bus_off()
    with pytest.raises(DeviceError, match=r"arm \(can0\): the CAN controller went bus-off"):
        rig.watch()
    n_sent = len(rig.bus.sent)
    with pytest.raises(DeviceError, match="bus-off"):
        rig.arm.send(np.zeros(7))
    with pytest.raises(DeviceError, match="bus-off"):
        rig.watch()
    assert len(rig.bus.sent) == n_sent


def test_bus_off_open_again_seeds_from_the_measured_pose(rig):
    target = rig.watch().position.copy()
    target[0] += 0.5
    rig.run(target, 30)
    rig.fake.bus_off()
    with pytest.raises(DeviceError):
        rig.watch()
    rig.bus.sent.clear()
    rig.arm.open(enable=True)
    first = next(data for can_id, data in rig.bus.sent if can_id == 0x155)
    measured_mdeg = codec.DECODERS[0x2A5](first)[0]
    assert abs(measured_mdeg - rig.fake.joint_mdeg[0]) < 2000
    assert rig.watch().fault is None


def test_interface_that_goes_down_ends_the_connection(rig):
    rig.bus.down = True
    with pytest.raises(DeviceError, match="went down"):
        rig.watch()
    with pytest.raises(DeviceError, match="went down"):
        rig.arm.send(np.zeros(7))


def test_error_frames_are_counted_and_are_no_fault(rig):
    rig.fake.error_frame(ERR_NO_ACK)
    rig.fake.error_frame(ERR_RESTARTED)
    assert rig.watch().fault is None
    feedback = rig.arm.units[0].feedback
    assert (feedback.n_error_frames, feedback.n_restarts) == (2, 1)


def test_full_queue_drops_ticks_counts_and_gives_up_after_five(rig):
    pose = rig.watch().position
    for _ in range(4):
        rig.bus.busy = 1
        with pytest.raises(DeviceTimeoutError, match="this tick was dropped"):
            rig.arm.send(pose)
    rig.arm.send(pose)  # one that fits starts the count again
    for _ in range(4):
        rig.bus.busy = 1
        with pytest.raises(DeviceTimeoutError):
            rig.arm.send(pose)
    rig.bus.busy = 1
    with pytest.raises(DeviceError, match="full 5 times in a row: nobody acknowledges") as caught:
        rig.arm.send(pose)
    assert not isinstance(caught.value, TimeoutError)
    assert rig.arm.units[0].n_dropped == 9
    with pytest.raises(DeviceError, match="5 times in a row"):
        rig.arm.send(pose)
    with pytest.raises(DeviceError, match="5 times in a row"):
        rig.watch()


def test_lost_joint_frames_never_mix_two_moments(rig):
    """A pose is three frames; with every fourth of them lost, each pose is still of one moment."""
    rig.fake.faults.drop_every = 4
    target = rig.watch().position.copy()
    target[:6] += [0.4, 0.4, -0.4, 0.4, 0.4, 0.4]
    truth = {}
    waiting = rig.bus.waiting

    def recording():
        frames = waiting()
        for can_id, data, t_ns in frames:
            if 0x2A5 <= can_id <= 0x2A7:
                truth.setdefault(t_ns, {})[can_id] = codec.DECODERS[can_id](data)
        return frames

    rig.bus.waiting = recording
    feedback = rig.arm.units[0].feedback
    seen = set()
    for _ in range(120):
        rig.run(target, 1)
        if feedback.t_pose_ns in truth:
            seen.add(feedback.t_pose_ns)
            parts = truth[feedback.t_pose_ns]
            assert sorted(parts) == [0x2A5, 0x2A6, 0x2A7]
            assert feedback.joint_mdeg == [*parts[0x2A5], *parts[0x2A6], *parts[0x2A7]]
    whole = {t for t, parts in truth.items() if len(parts) == 3}
    assert seen
    assert seen == {t for t in whole if t >= min(seen)}
    assert len(whole) < len(truth)


def test_old_parts_of_a_pose_are_not_completed_by_new_ones():
    feedback = PiperFeedback("arm")

    def joints(part, value, t_ns):
        data = codec.encode_joints([value] * 6)[part][1]
        feedback.ingest([(codec.ID_JOINT_FEEDBACK[part], data, t_ns)])

    joints(0, 1, 0)
    joints(1, 1, 100)
    joints(2, 2, 5 * MS)  # its two fellows were lost
    assert feedback.joint_rad is None
    joints(0, 3, 10 * MS)
    joints(1, 3, 10 * MS + 1)
    assert feedback.joint_rad is None
    joints(2, 3, 10 * MS + 2)
    assert feedback.joint_mdeg == [3] * 6
    assert feedback.t_pose_ns == 10 * MS


@pytest.mark.parametrize("angle_mdeg", [-3_000_000, 3_000_000])
@pytest.mark.parametrize("joint", range(6))
def test_pose_with_a_wild_angle_is_left_out_whole(rig, joint, angle_mdeg):
    before = rig.watch().position
    feedback = rig.arm.units[0].feedback
    was = (feedback.joint_mdeg, feedback.joint_rad, feedback.t_pose_ns)
    angles = [1000] * 6
    angles[joint] = angle_mdeg
    rig.clock.t_ns += MS
    feedback.ingest(
        (can_id, data, rig.clock.t_ns)
        for can_id, (_, data) in zip(
            codec.ID_JOINT_FEEDBACK, codec.encode_joints(angles), strict=True
        )
    )
    assert feedback.n_bad == 1
    assert (feedback.joint_mdeg, feedback.joint_rad, feedback.t_pose_ns) == was
    assert rig.watch().position == pytest.approx(before)  # the next whole one counts again
    assert feedback.t_pose_ns > was[2]


def test_frames_of_wrong_length_or_a_wild_gripper_are_left_out(rig):
    before = rig.watch().position
    feedback = rig.arm.units[0].feedback
    wild = struct.pack(">iHBB", 3_000_000, 0, 0x40, 0)
    was = (feedback.gripper_um, feedback.joint_mdeg)
    feedback.ingest([(0x2A5, bytes(7), 0), (0x2A8, wild, rig.clock.t_ns)])
    assert feedback.n_bad == 2
    assert (feedback.gripper_um, feedback.joint_mdeg) == was
    assert rig.watch().position == pytest.approx(before)


def test_wild_gripper_that_repeats_itself_is_no_sign_of_life(rig):
    rig.watch()
    feedback = rig.arm.units[0].feedback
    t_ns = feedback.t_gripper_ns
    wild = struct.pack(">iHBB", 3_000_000, 0, 0x40, 0)
    for _ in range(3):
        feedback.ingest([(0x2A8, wild, t_ns + MS)])
    assert (feedback.n_bad, feedback.t_gripper_ns) == (3, t_ns)


def test_angles_that_cannot_be_do_not_hide_that_none_come(rig):
    rig.fake.faults.mute_ids = frozenset(codec.ID_JOINT_FEEDBACK)
    nonsense = [data for _, data in codec.encode_joints([3_000_000] * 6)]
    for _ in range(22):
        rig.arm.units[0].feedback.ingest(
            (can_id, data, rig.clock.t_ns)
            for can_id, data in zip(codec.ID_JOINT_FEEDBACK, nonsense, strict=True)
        )
        state = rig.watch()
    assert "no joint angles feedback for" in state.fault


@pytest.mark.parametrize("side", [0, 1])
def test_one_arm_of_two_without_power_or_with_drift_speaks_for_both(side):
    rig = Rig(n_arms=2)
    rig.arm.open(enable=False)
    for fake in rig.fakes:
        fake.enabled = [True] * 6
    state = rig.watch(20)
    assert state.enabled
    assert not state.drifted
    rig.fakes[side].enabled[2] = False
    rig.arm.units[side].drifted = True
    state = rig.watch(20)
    assert not state.enabled
    assert state.drifted


@pytest.mark.parametrize(
    ("can_id", "data", "words"),
    [
        (0x2A1, bytes([2, 0, 1, 0, 0, 0, 0, 0]), "the arm left CAN control"),
        (0x2A8, bytes(8), "gripper: its motor lost power"),
        *((0x260 + j, bytes(8), f"joint {j}: its motor lost power") for j in range(1, 7)),
    ],
)
def test_what_the_arm_said_before_it_was_armed_is_judged_again(can_id, data, words):
    feedback = PiperFeedback("arm")
    for t_ns in (1, 2):
        feedback.ingest([(can_id, data, t_ns)])
    assert feedback.latched is None
    feedback.set_armed(True)
    feedback.ingest([(can_id, data, 3)])
    assert words in feedback.latched


def test_arm_that_leaves_can_control_just_before_it_is_armed_is_not_commanded(monkeypatch):
    rig = Rig()
    enable_gripper = piper_bringup._enable_gripper

    def at_the_last_moment(port, *arguments):
        enable_gripper(port, *arguments)
        rig.fake.press_teach()
        port.wait(20 * MS, lambda: False)

    monkeypatch.setattr(piper_bringup, "_enable_gripper", at_the_last_moment)
    rig.arm.open(enable=True)
    assert "the arm left CAN control" in rig.watch().fault
    n_sent = len(rig.bus.sent)
    with pytest.raises(DeviceError, match="left CAN control"):
        rig.arm.send(rig.watch().position)
    assert len(rig.bus.sent) == n_sent


def test_nothing_of_the_last_connection_is_taken_for_the_present_one(rig):
    rig.arm.close()
    feedback = rig.arm.units[0].feedback
    feedback.reset()
    assert np.isnan(feedback.motor_rad).all()
    assert np.isnan(feedback.velocity_rad_s).all()
    rig.fake.faults.mute_ids = frozenset({0x263})
    with pytest.raises(DeviceTimeoutError, match=r"joint 3 driver \(0x263\)"):
        rig.arm.open(enable=True)


def test_frame_that_says_the_same_again_counts_as_news_of_the_arm(rig):
    feedback = rig.arm.units[0].feedback
    gripper = struct.pack(">iHBB", 1000, 0, 0x40, 0)
    for t_ns in (rig.clock.t_ns, rig.clock.t_ns + MS):
        feedback.ingest([(0x2A8, gripper, t_ns)])
        assert feedback.t_gripper_ns == t_ns
    assert feedback.n_bad == 0


def test_drift_on_known_firmware_is_a_fault_within_a_third_of_a_second():
    from gwp_edge.drivers.piper_fake import FakePiper

    rig = Rig(fakes=[FakePiper(firmware="S-V1.8-6")])
    rig.arm.open(enable=True)
    rig.fake.faults.drift_mdeg[5] = 25_000
    text, took_ns = rig.fault_after(300 * MS)
    assert "joint 5: its angle and its motor differ by -25.0 deg" in text
    assert took_ns > 200 * MS


def test_drift_on_other_firmware_warns_once(rig, caplog):
    assert not rig.watch(200).drifted
    rig.fake.faults.drift_mdeg[5] = 25_000
    state = rig.watch(200)
    assert state.fault is None
    assert state.drifted
    assert caplog.text.count("the feedback has drifted") == 1


def test_angles_that_differ_a_little_from_the_motors_are_doubted_while_they_do(rig, caplog):
    """Too little for a drift; enough not to command the arm to where it is not."""
    rig.fake.faults.drift_mdeg[5] = 6_000
    state = rig.watch(30)
    assert state.drifted
    assert state.fault is None
    with pytest.raises(DeviceError, match="joint angles have drifted"):
        rig.arm.hold()
    assert caplog.text.count("joint 5: its angle and its motor differ by -6.0 deg") == 1
    rig.fake.faults.drift_mdeg.clear()
    assert not rig.watch(30).drifted


def test_motor_feedback_that_stopped_is_no_drift(caplog):
    """The joint moved on, its last motor position did not: a healthy arm was told to be cut off."""
    rig = Rig(fakes=[FakePiper(firmware="S-V1.8-6")])
    rig.arm.open(enable=True)
    target = rig.watch().position.copy()
    rig.run(target, 20)
    rig.fake.faults.mute_ids = frozenset({0x251})
    for _ in range(150):
        target[0] += 0.003
        assert rig.run(target, 1).fault is None
    assert caplog.text.count("joint 1: no motor feedback (0x251)") == 1
    rig.clock.sleep_until_ns(rig.clock.t_ns + 500 * MS)  # nobody reads: what waits is old
    rig.arm.state()
    assert caplog.text.count("no motor feedback") == 1
    rig.fake.faults.mute_ids = frozenset()
    rig.fake.faults.drift_mdeg[1] = 25_000
    text, _ = rig.fault_after(1_000 * MS)
    assert "the feedback has drifted" in text


def test_drift_check_off_says_nothing(caplog):
    rig = Rig(drift="off")
    rig.arm.open(enable=True)
    rig.fake.faults.drift_mdeg[5] = 25_000
    with caplog.at_level(logging.WARNING):
        assert rig.watch(200).fault is None
    assert not caplog.records


def test_stuck_joint_shows_as_a_tracking_error(rig):
    rig.fake.faults.stuck = frozenset({1})
    target = rig.watch().position.copy()
    target[0] += 0.3
    state = rig.run(target, 100)
    assert abs(state.position[0] - target[0]) == pytest.approx(0.3, abs=1e-3)
    assert state.velocity[0] == 0.0


def test_velocity_is_measured_for_joints_and_unknown_for_the_gripper(rig):
    target = rig.watch().position.copy()
    target[0] += 1.0
    state = rig.run(target, 40)
    assert state.velocity[0] > 0.1
    assert np.isnan(state.velocity[6])


# --- two arms ---


def test_fault_of_one_arm_names_it_and_the_other_keeps_its_commands():
    rig = Rig(n_arms=2)
    rig.arm.open(enable=True)
    pose = rig.watch().position
    rig.fakes[0].press_teach()
    text, _ = rig.fault_after(10 * MS)
    assert text.startswith("left arm (can_left): ")
    n_sent = [len(bus.sent) for bus in rig.buses]
    with pytest.raises(DeviceError, match="left arm"):
        rig.arm.send(pose)
    assert len(rig.buses[0].sent) == n_sent[0]
    assert len(rig.buses[1].sent) >= n_sent[1] + 4


def test_dead_bus_of_one_arm_does_not_keep_the_other_from_being_read_and_sent():
    rig = Rig(n_arms=2)
    rig.arm.open(enable=True)
    pose = rig.watch().position
    rig.buses[0].down = True
    n_frames = rig.arm.units[1].feedback.n_frames
    with pytest.raises(DeviceError, match="left arm"):
        rig.watch()
    assert rig.arm.units[1].feedback.n_frames > n_frames
    n_sent = len(rig.buses[1].sent)
    with pytest.raises(DeviceError, match="left arm"):
        rig.arm.send(pose)
    assert len(rig.buses[1].sent) >= n_sent + 4


@pytest.mark.parametrize(("busy", "dead", "name"), [(0, 1, "right arm"), (1, 0, "left arm")])
def test_full_queue_of_one_arm_gives_way_to_a_dead_bus_of_the_other(busy, dead, name):
    rig = Rig(n_arms=2)
    rig.arm.open(enable=True)
    pose = rig.watch().position
    rig.buses[busy].busy = 1
    rig.buses[dead].down = True
    with pytest.raises(DeviceError, match=name) as caught:
        rig.arm.send(pose)
    assert not isinstance(caught.value, TimeoutError)


def test_dropped_tick_leaves_nothing_behind_where_no_garbage_is_collected():
    rig = Rig(n_arms=2)
    rig.arm.open(enable=True)
    pose = rig.watch().position
    gc.collect()
    gc.disable()
    try:
        for bus in rig.buses:
            bus.busy = 1
        try:
            rig.arm.send(pose)
        except TimeoutError as e:
            dropped = weakref.ref(e)
        assert dropped() is None
    finally:
        gc.enable()


@pytest.mark.parametrize(
    ("side", "name"), [(0, "left arm (can_left)"), (1, "right arm (can_right)")]
)
def test_state_time_is_that_of_the_older_arm(side, name):
    rig = Rig(n_arms=2)
    rig.arm.open(enable=True)
    rig.fakes[side].faults.mute_ids = frozenset({0x2A6})
    state = rig.watch(10)
    assert rig.clock.t_ns - state.t_received_ns >= 45 * MS
    text, _ = rig.fault_after(110 * MS)
    assert text.startswith(f"{name}: no joint angles")


# --- hold ---


def test_hold_from_a_second_connection_stops_a_moving_arm_where_it_is():
    rig = Rig()
    rig.arm.open(enable=True)
    guardian, (end,) = rig.second_driver()
    guardian.open(enable=False)
    target = rig.watch().position.copy()
    target[0] += 1.0
    for _ in range(60):
        rig.run(target, 1)
        guardian.state()
    moving = rig.fake.joint_mdeg[0]
    assert 1_000 < moving < 50_000
    end.sent.clear()
    guardian.hold()
    assert [can_id for can_id, _ in end.sent] == [0x155, 0x156, 0x157]
    held = codec.DECODERS[0x2A5](end.sent[0][1])[0]
    assert abs(held - moving) < 1_000
    # If the motor loop was not dead after all, it stops instead of fighting over the arm.
    assert "another program" in rig.fault_after(10 * MS)[0]
    with pytest.raises(DeviceError, match="another program"):
        rig.arm.send(target)
    rig.watch(200)
    assert abs(rig.fake.joint_mdeg[0] - held) < 10


def test_hold_again_repeats_the_first_pose_and_does_not_creep():
    rig = Rig()
    rig.arm.open(enable=True)
    rig.run(rig.watch().position, 5)
    guardian, (end,) = rig.second_driver()
    guardian.open(enable=False)
    guardian.hold()
    first = end.sent[-3:]
    rig.fake.joint_mdeg[1] -= 300.0
    rig.clock.t_ns += 5 * MS
    guardian.hold()
    assert end.sent[-3:] == first


def test_hold_arm_in_teach_mode_is_left_alone():
    rig = Rig(n_arms=2)
    rig.arm.open(enable=True)
    guardian, ends = rig.second_driver()
    guardian.open(enable=False)
    rig.fakes[0].press_teach()
    rig.clock.t_ns += 5 * MS
    n_sent = [len(end.sent) for end in ends]
    with pytest.raises(DeviceError, match=r"left arm .* nothing to hold, the arm is in teach mode"):
        guardian.hold()
    assert len(ends[0].sent) == n_sent[0]
    assert len(ends[1].sent) == n_sent[1] + 3


def test_hold_by_angles_that_drifted_sends_nothing(rig):
    """It would move the arm by as much as they are wrong."""
    rig.fake.faults.drift_mdeg[5] = 25_000
    rig.watch(200)
    n_heard = sum(rig.fake.heard.values())
    with pytest.raises(DeviceError, match="joint angles have drifted"):
        rig.arm.hold()
    assert sum(rig.fake.heard.values()) == n_heard


def test_hold_without_fresh_angles_sends_nothing():
    rig = Rig()
    rig.arm.open(enable=True)
    rig.fake.faults.mute_ids = frozenset({0x2A7})
    rig.clock.t_ns += 150 * MS
    n_sent = len(rig.bus.sent)
    with pytest.raises(DeviceError, match="no fresh joint angles to hold; nothing was sent"):
        rig.arm.hold()
    assert len(rig.bus.sent) == n_sent
