"""The fake arm that judges: a limited stream passes, what no limiter would send is accused."""

import numpy as np
import pytest

from gwp_edge.drivers import piper_codec as codec
from gwp_edge.drivers import piper_model
from gwp_edge.drivers.piper_witness import WitnessPiper
from gwp_edge.safety import Limiter

PERIOD_NS = 5_000_000


class Stream:
    """Commands to a witness, one per period."""

    def __init__(self):
        self.witness = WitnessPiper()
        self.t_ns = 1_000_000_000
        self.witness.step(self.t_ns)
        self.pose = np.array(self.witness.joint_mdeg) * codec.RAD_PER_MDEG

    def send(self, joints_rad, *, periods=1):
        self.t_ns += periods * PERIOD_NS
        self.witness.step(self.t_ns)
        for can_id, data in codec.encode_joints(codec.rad_to_mdeg(*joints_rad)):
            self.witness.hear(can_id, data, self.t_ns)

    @property
    def violations(self):
        return self.witness.testify().violations


def turned(pose, joint, angle_rad):
    """Return ``pose`` with one joint turned on."""
    return np.where(np.arange(6) == joint, pose + angle_rad, pose)


@pytest.fixture
def stream():
    return Stream()


def test_limited_stream_is_safe_and_reaches_the_limits(stream):
    limiter = Limiter(piper_model.joint_limits(1), period_s=0.005, refuse_far=False)
    limiter.seed(np.append(stream.pose, 0.02))
    rng = np.random.default_rng(0)
    stream.send(stream.pose)
    for i in range(1599):
        if i % 400 == 0:
            target = rng.uniform(-2.0, 2.0, 7)
        stream.send(limiter.step(target)[:6])
    seen = stream.witness.testify()
    assert seen.violations == ()
    assert seen.n_commands == 4800
    assert seen.worst_speed > 0.6
    assert 0.5 < seen.worst_acceleration <= 1.0


def test_first_command_must_be_the_measured_pose(stream):
    stream.send(stream.pose + np.deg2rad(1.0))
    assert len(stream.violations) == 6
    assert "from nothing" in stream.violations[0]


@pytest.mark.parametrize("jump_deg", [0.1, -1.0, 90.0])
def test_jump_is_accused(stream, jump_deg):
    for _ in range(5):
        stream.send(stream.pose)
    assert stream.violations == ()
    stream.send(stream.pose + np.deg2rad([0, 0, 0, jump_deg, 0, 0]))
    assert len(stream.violations) == 1
    assert "joint 4" in stream.violations[0]


@pytest.mark.parametrize("n_on", [1, 20])
def test_what_goes_on_or_stops_after_an_accusation_is_not_accused_again(stream, n_on):
    stream.send(stream.pose)
    for i in range(20):
        stream.send(turned(stream.pose, 0, 0.5 * 0.005 * min(i + 1, n_on)))
    assert len(stream.violations) == 1
    stream.send(turned(stream.pose, 0, 0.5 * 0.005 * (n_on + 2)))
    assert len(stream.violations) == 2


def test_steady_speed_over_the_limit_is_accused(stream):
    stream.send(stream.pose)
    speed, q = 0.0, 0.0
    for _ in range(200):
        speed += 4.9 * 0.005
        q += speed * 0.005
        stream.send(turned(stream.pose, 0, q))
    assert any("too fast" in text for text in stream.violations)


def test_ticks_that_were_lost_are_allowed_for_and_no_more(stream):
    for i in range(60):
        stream.send(turned(stream.pose, 0, 0.5 * 4.5 * (0.005 * i) ** 2))
    speed, q = 4.5 * 0.005 * 59, 0.5 * 4.5 * (0.005 * 59) ** 2
    stream.send(turned(stream.pose, 0, q + 3 * speed * 0.005), periods=3)
    assert stream.violations == ()
    stream.send(turned(stream.pose, 0, q + 7 * speed * 0.005), periods=2)
    assert stream.violations


def test_hold_at_a_pose_that_was_reported_is_safe_for_a_moment(stream):
    for i in range(100):
        stream.send(turned(stream.pose, 0, 0.5 * 3.0 * (0.005 * i) ** 2))
    stream.send(stream.pose)  # where the arm, not enabled, has been all the time
    assert stream.violations == ()
    stream.witness.faults.drift_mdeg = {1: 5000}
    for _ in range(100):
        stream.t_ns += PERIOD_NS
        stream.witness.step(stream.t_ns)
    stream.send(stream.pose + np.deg2rad([5, 0, 0, 0, 0, 0]))
    assert stream.violations == ()
    stream.witness.faults.drift_mdeg = {}
    stream.send(stream.pose + np.deg2rad([1, 0, 0, 0, 0, 0]))
    assert len(stream.violations) == 1


def test_beyond_a_position_limit_is_accused(stream):
    limits = piper_model.joint_limits(1)
    stream.witness.joint_mdeg[3] = np.rad2deg(limits.position_max[3]) * 1e3
    stream.t_ns += PERIOD_NS
    stream.witness.step(stream.t_ns)
    pose = np.array(stream.witness.joint_mdeg) * codec.RAD_PER_MDEG
    q = 0.0
    for i in range(60):
        q = 0.5 * 1.0 * (0.005 * i) ** 2
        stream.send(turned(pose, 3, q))
    assert any("beyond its limit" in text for text in stream.violations)


@pytest.mark.parametrize(
    ("frame", "words"),
    [
        (codec.encode_stop(1), "stopped or dropped"),
        (codec.encode_stop(2), "stopped or dropped"),
        (codec.encode_enable(3, enable=False), "switched off"),
        (codec.encode_mode(100, standby=True), "position control"),
        ((codec.ID_MODE, bytes((1, 1, 100, 0xAD, 0, 0, 0, 0))), "position control"),
        ((0x15A, bytes(8)), "changes the arm"),
        (codec.encode_set_collision([0] * 6), "changes the arm"),
        (codec.encode_gripper(-1000, 1000), "outside of its range"),
    ],
)
def test_frame_that_no_run_may_send_is_accused(stream, frame, words):
    stream.witness.hear(*frame, stream.t_ns)
    assert words in stream.violations[0]


def test_streaming_into_teach_mode_is_accused_after_a_moment(stream):
    stream.send(stream.pose)
    stream.witness.press_teach()
    stream.send(stream.pose)
    assert stream.violations == ()
    for _ in range(70):
        stream.send(stream.pose)
    assert "teach mode" in stream.violations[0]
    stream.witness.mend()
    n = stream.witness.testify().n_violations
    stream.send(stream.pose)
    assert stream.witness.testify().n_violations == n


def test_arm_that_was_late_itself_says_so(stream):
    assert stream.witness.testify().t_late_ns == 0
    stream.send(stream.pose, periods=30)
    assert stream.witness.testify().t_late_ns == stream.t_ns
