"""Every row of the fault table, tick by tick, on a clock that is wound by hand."""

import numpy as np
import pytest

from gwp_edge.errors import DeviceError, DeviceTimeoutError, SpecError
from gwp_edge.mailbox import Board
from gwp_edge.motor import MotorLoop
from gwp_edge.motor_options import MotorOptions
from gwp_edge.pressure import PRESSING_RAD
from gwp_edge.status import EventKind, HoldReason, Mode, Request, Word
from gwp_edge.testing import FakeArm, FakeClock, make_spec
from gwp_edge.types import Chunk, JointLimits

MS = 1_000_000
TICK_NS = 5 * MS
ACCELERATION = 5.0


class SlowFakeArm(FakeArm):
    """A class of its own: Python remembers of a class for good that it is a SlowArm."""

    feedback_period_ns = 20 * MS


class Rig:
    """A motor loop with everything around it, and what it did."""

    def __init__(self, *, park=None, start=0.0, arm_kind=FakeArm, **options):
        self.spec = make_spec()
        self.D = self.spec.n_channels
        self.clock = FakeClock()
        self.limits = JointLimits(
            position_min=np.full(self.D, -2.0),
            position_max=np.full(self.D, 2.0),
            velocity_max=np.full(self.D, 3.0),
            acceleration_max=np.full(self.D, ACCELERATION),
        )
        self.arm = arm_kind(self.spec.channels, self.limits, self.clock)
        self.arm.open(enable=True)
        self.arm.position = np.full(self.D, start)
        self.board = Board.create(self.D, self.spec.n_rows)
        self.writer = Board.attach(self.board.name, self.D, self.spec.n_rows)
        self.options = MotorOptions(**options)
        self.loop = MotorLoop(
            self.arm, self.board, self.clock, self.options, limits=self.limits, park=park
        )
        self.loop.begin(self.arm.state())
        self.start = self.arm.position.copy()
        self.running = True
        self.n_chunks = 0
        self.events = []
        # A plan goes on from the pose at rest; the centre of all plans.
        self.speed = 0.0
        self.t0_ns = self.clock.now_ns()

    def close(self):
        self.writer.close()
        self.board.close()
        self.board.unlink()

    @property
    def words(self):
        return self.writer.words

    def plan(self, speed=0.2, age_ns=20 * MS, bad=None, offset=0.0):
        """Publish a plan: from the present command on at ``speed``, like a policy that looks."""
        t = np.arange(self.spec.n_rows)[:, None] * self.spec.period_ns / 1e9
        # Row for "now" is the present command, so that the plan fits the motion.
        actions = self.arm.position + offset + speed * (t - age_ns / 1e9) * np.ones(self.D)
        if bad is not None:
            actions[-1, -1] = bad
        self.writer.publish_chunk(
            Chunk(
                actions=actions,
                t_observed_ns=self.clock.now_ns() - age_ns,
                period_ns=self.spec.period_ns,
                chunk_idx=self.n_chunks,
            )
        )
        self.n_chunks += 1

    def ticks(self, n, *, every=None, speed=0.2):
        """Tick ``n`` times or until the loop is over; plan anew ``every`` ticks."""
        for i in range(n):
            if not self.running:
                return
            if every is not None and i % every == 0:
                self.plan(speed)
            self.clock.advance(TICK_NS)
            self.running = self.loop.tick(self.clock.now_ns())

    def run(self, speed=0.2):
        """Get to RUN."""
        self.words[Word.REQUEST] = Request.RUN
        self.ticks(10)
        self.plan(0.0, age_ns=0)
        self.ticks(3)
        self.ticks(60, every=10, speed=speed)
        assert self.loop.mode is Mode.RUN

    def said(self, kind=None):
        self.events += self.board.events["motor"].drain()
        return [e.text for e in self.events if kind is None or e.kind is kind]

    def velocity(self):
        return np.diff(np.array(self.arm.sent), axis=0) / (TICK_NS / 1e9)

    def check_decelerated_and_holding(self):
        """The last commands stand, and nothing on the way there broke a limit."""
        v = np.concatenate([np.zeros((1, self.D)), self.velocity()])
        a = np.diff(v, axis=0) / (TICK_NS / 1e9)
        assert np.abs(a).max() <= ACCELERATION + 1e-6
        assert np.abs(v).max() <= 3.0
        assert np.abs(v[-2:]).max() == 0.0
        assert np.isfinite(np.array(self.arm.sent)).all()


@pytest.fixture
def rig():
    rig = Rig()
    yield rig
    rig.close()


@pytest.fixture
def make_rig():
    rigs = []

    def make(**kwargs):
        rigs.append(Rig(**kwargs))
        return rigs[-1]

    yield make
    for rig in rigs:
        rig.close()


def test_begin_holds_the_measured_pose_until_asked_to_run(rig):
    rig.plan(1.0)
    rig.ticks(20, every=5)
    assert rig.loop.mode is Mode.ENABLED
    np.testing.assert_array_equal(np.array(rig.arm.sent), np.tile(rig.start, (20, 1)))


def test_plan_from_before_enabling_is_not_executed(rig):
    rig.plan(0.5, age_ns=100 * MS)
    rig.words[Word.REQUEST] = Request.RUN
    rig.ticks(20)
    assert rig.loop.mode is Mode.ENABLED


def test_approach_far_plan_is_slow_until_near(rig):
    rig.words[Word.REQUEST] = Request.RUN
    rig.ticks(10)
    away = np.append(np.full(6, 0.3), 0.03)
    actions = np.tile(rig.start + away, (rig.spec.n_rows, 1))
    for i in range(400):
        if i % 10 == 0:
            rig.writer.publish_chunk(
                Chunk(
                    actions=actions,
                    t_observed_ns=rig.clock.now_ns(),
                    period_ns=rig.spec.period_ns,
                    chunk_idx=i,
                )
            )
        rig.ticks(1)
        if rig.loop.mode is Mode.RUN:
            break
    assert rig.loop.mode is Mode.RUN
    speed = np.abs(rig.velocity())
    assert speed[:, :6].max() <= 0.3 + 1e-9
    assert speed[:, 6].max() <= 0.05 + 1e-9
    assert np.abs(rig.arm.position[:6] - actions[0, :6]).max() < np.deg2rad(2.0) + 0.3 * 0.005


def test_stop_decelerates_and_ends(rig):
    rig.run()
    assert np.abs(rig.velocity()[-1]).max() > 0.1
    rig.words[Word.REQUEST] = Request.STOP
    rig.ticks(400, every=10)
    assert not rig.running
    rig.check_decelerated_and_holding()


def test_stop_now_brakes_as_hard_as_allowed(rig):
    rig.run()
    v = rig.velocity()[-1].max()
    n = len(rig.arm.sent)
    rig.words[Word.REQUEST] = Request.STOP_NOW
    rig.ticks(400)
    assert not rig.running
    rig.check_decelerated_and_holding()
    moving = np.abs(rig.velocity()[n - 1 :]).max(axis=1) > 0
    assert moving.sum() <= np.ceil(v / (ACCELERATION * TICK_NS / 1e9))


def test_one_not_finite_chunk_keeps_the_plan_three_hold(rig):
    rig.run()
    for n in (1, 2):
        rig.plan(bad=np.nan)
        rig.ticks(3)
        assert rig.loop.mode is Mode.RUN
        assert rig.words[Word.MOTOR_N_NOT_FINITE] == n
    rig.plan(bad=np.inf)
    rig.ticks(2)
    assert rig.loop.mode is Mode.HOLD
    assert rig.loop.hold_reason is HoldReason.NOT_FINITE
    rig.ticks(100)
    rig.check_decelerated_and_holding()
    assert any(
        "3 plans in a row were refused" in text and "not finite" in text
        for text in rig.said(EventKind.WARNING)
    )
    # It does not go on by itself, even when the plans are fine again.
    rig.ticks(50, every=5)
    assert rig.loop.mode is Mode.HOLD


def test_not_finite_chunks_with_good_ones_between_go_on(rig):
    rig.run()
    for _ in range(4):
        rig.plan(bad=np.nan)
        rig.ticks(3)
        rig.plan()
        rig.ticks(3)
    assert rig.loop.mode is Mode.RUN


def test_used_up_plan_holds_and_a_fresh_one_resumes_by_approach(rig):
    rig.run()
    rig.ticks(600)
    assert rig.loop.mode is Mode.HOLD
    assert rig.loop.hold_reason is HoldReason.STALE_CHUNK
    rig.check_decelerated_and_holding()
    modes = []
    for i in range(100):
        if i % 10 == 0:
            rig.plan(0.0, offset=0.06 if i == 0 else 0.0)
        rig.ticks(1)
        modes.append(rig.loop.mode)
    assert Mode.APPROACH in modes
    assert modes[-1] is Mode.RUN
    assert rig.words[Word.MOTOR_N_HOLDS] == 1


def test_camera_stall_holds_and_its_end_resumes(rig):
    rig.run()
    rig.words[Word.POLICY_CAMERA_STALL] = 1
    rig.ticks(100)
    assert rig.loop.hold_reason is HoldReason.CAMERA_STALL
    rig.check_decelerated_and_holding()
    rig.plan(0.0)
    rig.ticks(20)
    assert rig.loop.mode is Mode.HOLD
    rig.words[Word.POLICY_CAMERA_STALL] = 0
    rig.plan(0.0)
    rig.ticks(20)
    assert rig.loop.mode is Mode.RUN


@pytest.mark.parametrize(
    ("age_ms", "mode", "warned"),
    [(55, Mode.RUN, False), (70, Mode.RUN, True), (210, Mode.HOLD, True), (510, Mode.FAULT, True)],
)
def test_feedback_of_a_slow_arm_is_judged_by_its_own_rate(age_ms, mode, warned):
    """At 50 Hz every second state used to bring a warning about cables."""
    rig = Rig(arm_kind=SlowFakeArm)
    try:
        rig.run()
        rig.arm.feedback_age_ns = age_ms * MS
        rig.ticks(3)
        assert rig.loop.mode is mode
        assert any("no joint feedback" in text for text in rig.said()) == warned
    finally:
        rig.close()


def test_old_feedback_warns_then_holds_then_faults(rig):
    rig.run()
    rig.arm.feedback_age_ns = 30 * MS
    rig.ticks(3)
    assert rig.loop.mode is Mode.RUN
    assert any("no joint feedback" in t for t in rig.said(EventKind.WARNING))
    rig.arm.feedback_age_ns = 101 * MS
    rig.ticks(1)
    assert rig.loop.hold_reason is HoldReason.FEEDBACK
    rig.ticks(100)
    rig.check_decelerated_and_holding()
    rig.arm.feedback_age_ns = 501 * MS
    rig.ticks(1)
    assert rig.loop.mode is Mode.FAULT


def test_arm_that_does_not_follow_holds_after_its_time(rig):
    rig.run()
    rig.arm.follows = False
    rig.arm.position = rig.arm.position - np.deg2rad(11.0)
    t_ns = rig.clock.now_ns()
    while rig.loop.mode is Mode.RUN:
        rig.ticks(1)
        assert rig.clock.now_ns() - t_ns < 400 * MS
    assert rig.clock.now_ns() - t_ns >= 200 * MS
    assert rig.loop.hold_reason is HoldReason.TRACKING
    assert any("does not follow" in t for t in rig.said())


def block(rig, *, joint=0):
    """Let everything follow but ``joint``; return where that stands, and a way to tick so."""
    stuck = float(rig.arm.position[joint])
    rig.arm.follows = False

    def ticks(n, *, until=lambda: False):
        for _ in range(n):
            if until() or not rig.running:
                return
            pose = rig.arm.sent[-1].copy()
            pose[joint] = stuck
            rig.arm.position = pose
            rig.ticks(1)

    return stuck, ticks


@pytest.mark.parametrize("speed", [0.3, 1.0, 1.8])
def test_blocked_joint_is_commanded_where_it_is_and_not_pressed_on(make_rig, speed):
    """A hold at the last command keeps pressing, and the arm leaps when the obstacle gives way."""
    rig = make_rig(start=-1.8)
    rig.run(speed)
    rig.plan(speed)
    stuck, ticks = block(rig)
    ticks(400, until=lambda: rig.loop.mode is Mode.HOLD)
    assert rig.loop.hold_reason is HoldReason.TRACKING
    farthest = abs(rig.arm.sent[-1][0] - stuck)
    assert farthest > np.deg2rad(10.0)
    others = rig.arm.sent[-1][1:].copy()
    ticks(1200)
    assert abs(rig.arm.sent[-1][0] - stuck) < 1e-9
    assert (rig.arm.sent[-1][1:] >= others).all(), "joints that follow do not go back"
    rig.check_decelerated_and_holding()
    assert any("which goes back to it" in t for t in rig.said())


def test_joint_that_something_keeps_in_a_hold_is_yielded_to_once(make_rig):
    """Space was pressed before 0.2 s were over; later pushes by hand are not followed."""
    rig = make_rig(start=-1.8)
    rig.run(1.8)
    stuck, ticks = block(rig)
    ticks(10)
    rig.words[Word.REQUEST] = Request.HOLD
    ticks(1000)
    assert abs(rig.arm.sent[-1][0] - stuck) < 1e-9
    rig.arm.position = rig.arm.sent[-1] - np.deg2rad(15.0)
    rig.ticks(500)
    assert abs(rig.arm.sent[-1][0] - stuck) < 1e-9


@pytest.mark.parametrize("request_", [Request.STOP, Request.STOP_NOW])
def test_end_of_a_run_waits_until_a_blocked_joint_is_let_go(make_rig, request_):
    rig = make_rig(start=-1.8)
    rig.run(1.5)
    stuck, ticks = block(rig)
    ticks(10)
    rig.words[Word.REQUEST] = request_
    ticks(1000)
    assert not rig.running
    assert abs(rig.arm.sent[-1][0] - stuck) < 1e-9
    rig.check_decelerated_and_holding()


@pytest.mark.parametrize("request_", [Request.STOP, Request.STOP_NOW])
def test_fault_of_a_blocked_joint_leaves_no_pressure(make_rig, request_):
    """A collision is seen early: braking from the command alone would end far inside of it."""
    rig = make_rig(start=-1.8)
    rig.run(1.8)
    stuck, ticks = block(rig)
    ticks(12)
    rig.arm.fault = "joint 1: collision detected"
    ticks(1000)
    assert rig.loop.mode is Mode.FAULT
    assert abs(rig.arm.sent[-1][0] - stuck) < 1e-9
    rig.check_decelerated_and_holding()
    n_sent = len(rig.arm.sent)
    ticks(50)
    rig.arm.position = rig.arm.position - np.deg2rad(20.0)
    rig.ticks(300)
    assert len(rig.arm.sent) == n_sent, "the line is left alone then, whoever pushes"
    rig.words[Word.REQUEST] = request_
    rig.ticks(100)
    assert not rig.running


def test_joint_that_lags_is_not_sent_back(make_rig):
    """Slower than its plan, but free: it comes to where the command stands by itself."""
    rig = make_rig(start=-1.8)
    rig.run(1.8)
    rig.plan(1.8)
    rig.arm.follows = False
    for _ in range(1500):
        step = np.clip(rig.arm.sent[-1] - rig.arm.position, -0.9 * 0.005, 0.9 * 0.005)
        rig.arm.position = rig.arm.position + step
        rig.ticks(1)
    assert rig.loop.hold_reason is HoldReason.TRACKING
    assert (np.diff(np.array(rig.arm.sent), axis=0) >= -1e-12).all()
    assert not any("goes back" in t for t in rig.said())


def test_servo_that_sags_is_not_followed_down(make_rig):
    rig = make_rig(start=-1.0)
    rig.run(0.3)
    rig.arm.follows = False
    for i in range(1000):
        if i == 20:
            rig.words[Word.REQUEST] = Request.HOLD
        rig.arm.position = rig.arm.sent[-1] - np.deg2rad(4.0)
        rig.ticks(1, every=1, speed=0.0)
    assert rig.loop.mode is Mode.HOLD
    standing = np.array(rig.arm.sent)[-800:]
    assert (standing == standing[0]).all()


def test_measurement_that_is_not_trusted_is_not_commanded(make_rig):
    """Angles that drifted away from the motors: going to them would be a motion of its own."""
    rig = make_rig(start=-1.8)
    rig.run(1.0)
    stuck, ticks = block(rig)
    rig.arm.drifted = True
    ticks(700, until=lambda: rig.loop.mode is Mode.HOLD)
    ticks(800)
    assert rig.arm.sent[-1][0] - stuck > np.deg2rad(10.0)
    rig.arm.fault = "the feedback has drifted"
    ticks(400)
    assert rig.arm.sent[-1][0] - stuck > np.deg2rad(10.0)


def on_the_way_back(make_rig):
    """Return a rig whose command goes back to a blocked joint, and what ``block`` does."""
    rig = make_rig(start=-1.8)
    rig.run(1.8)
    stuck, ticks = block(rig)
    ticks(10)
    rig.words[Word.REQUEST] = Request.HOLD
    ticks(1000, until=lambda: rig.loop._pressure.going)
    return rig, stuck, ticks


def test_way_back_ends_when_the_measurement_is_no_longer_trusted(make_rig):
    rig, stuck, ticks = on_the_way_back(make_rig)
    ticks(40)
    before = rig.arm.sent[-1][0] - stuck
    rig.arm.drifted = True
    ticks(400)
    assert before - np.deg2rad(1.0) < rig.arm.sent[-1][0] - stuck < before
    rig.check_decelerated_and_holding()


def test_estop_on_the_way_back_brakes_first(make_rig):
    rig, stuck, ticks = on_the_way_back(make_rig)
    ticks(60)
    n_sent = len(rig.arm.sent)
    rig.words[Word.REQUEST] = Request.STOP_NOW
    ticks(1000)
    assert not rig.running
    speed = rig.velocity()[n_sent - 1 :, 0]
    standing = np.flatnonzero(speed == 0.0)[0]
    assert standing <= 0.3 / (ACCELERATION * 0.005) + 2
    assert abs(rig.arm.sent[-1][0] - stuck) < PRESSING_RAD


def test_parking_that_is_blocked_near_its_end_is_let_go_and_said(make_rig):
    rig = make_rig(park=np.full(7, 0.5))
    rig.run(0.0)
    rig.arm.follows = False
    rig.words[Word.REQUEST] = Request.PARK
    for _ in range(3000):
        rig.arm.position = np.minimum(rig.arm.sent[-1], 0.5 - np.deg2rad(8.0))
        rig.ticks(1)
    assert not rig.running
    assert any("does not come to its park pose" in t for t in rig.said())
    assert np.abs(rig.arm.sent[-1][:6] - (0.5 - np.deg2rad(8.0))).max() < 1e-9


def plan_beyond(rig, beyond_rad, *, n):
    """Plan joint 2 so far beyond its limit, and nothing else, for ``n`` times 0.2 s."""
    for _ in range(n):
        offset = np.zeros(rig.D)
        offset[2] = 2.0 + beyond_rad - rig.arm.position[2]
        rig.plan(offset=offset, speed=0.0)
        rig.ticks(40)


def test_plan_that_stays_outside_the_limits_holds_and_says_which_joint(make_rig):
    rig = make_rig(start=1.9)
    rig.run(0.0)
    plan_beyond(rig, np.deg2rad(15.0), n=9)
    assert rig.loop.mode is Mode.RUN
    plan_beyond(rig, np.deg2rad(15.0), n=3)
    assert rig.loop.hold_reason is HoldReason.REJECTED
    (said,) = [t for t in rig.said() if "the plans want" in t]
    assert f"{rig.spec.channels[2].name} at 2.2" in said
    rig.check_decelerated_and_holding()


def test_plan_a_little_outside_the_limits_is_clipped_for_as_long_as_it_lasts(make_rig):
    """PiPER rests on its stops, two degrees beyond the limits' margin."""
    rig = make_rig(start=1.95)
    rig.run(0.0)
    plan_beyond(rig, np.deg2rad(3.0), n=30)
    assert rig.loop.mode is Mode.RUN


def test_plan_outside_the_limits_from_the_start_is_told_in_the_approach(make_rig):
    rig = make_rig(start=1.9)
    rig.words[Word.REQUEST] = Request.RUN
    rig.ticks(10)
    plan_beyond(rig, np.deg2rad(15.0), n=15)
    assert rig.loop.hold_reason is HoldReason.REJECTED
    assert any("the plans want" in t for t in rig.said())


def test_plan_on_a_stop_beyond_the_margin_gets_from_approach_to_run(make_rig):
    """It was compared with the target before that was clipped, which no command reaches."""
    rig = make_rig(start=1.9)
    rig.words[Word.REQUEST] = Request.RUN
    rig.ticks(10)
    plan_beyond(rig, np.deg2rad(3.0), n=10)
    assert rig.loop.mode is Mode.RUN


def test_gripper_that_is_stopped_by_an_object_goes_on(rig):
    rig.run()
    rig.arm.follows = False
    for _ in range(80):
        rig.arm.position = np.append(rig.arm.sent[-1][:6], rig.start[6] + 0.5)
        rig.ticks(1)
    assert rig.loop.mode is Mode.RUN


def test_loop_that_paused_begins_from_rest(rig):
    rig.run(speed=1.0)
    before = rig.arm.sent[-1]
    moved = np.abs(before - rig.arm.sent[-2]).max()
    assert moved > 0.5 * 0.005
    rig.clock.advance(60_000_000)
    rig.plan(1.0)
    rig.ticks(1)
    assert np.abs(rig.arm.sent[-1] - before).max() <= ACCELERATION * 0.005**2 + 1e-12
    rig.ticks(60, every=10, speed=1.0)
    assert np.abs(rig.arm.sent[-1] - rig.arm.sent[-2]).max() > 0.5 * 0.005


def test_pause_is_said_with_what_took_so_long(rig, monkeypatch):
    rig.run(speed=1.0)
    rig.clock.advance(60 * MS)
    rig.ticks(1)
    assert said_pauses(rig) == [
        "no command for 65 ms, the arm goes on from rest: something held the motor loop up, the "
        "arm's driver or other programs"
    ]
    send = rig.arm.send
    monkeypatch.setattr(
        rig.arm, "send", lambda command: rig.clock.advance(70 * MS) or send(command)
    )
    rig.ticks(30, every=1, speed=1.0)
    assert rig.loop.mode is Mode.RUN
    said = said_pauses(rig)[1:]
    assert "driver took 70 ms to send one" in said[0]
    assert len(said) == 2, "30 pauses of 75 ms: once a second is enough"


def said_pauses(rig):
    return [text for text in rig.said(EventKind.WARNING) if text.startswith("no command")]


def interrupt(rig, monkeypatch, duration_ns):
    """Let the next tick pause for so long in its middle."""
    state = rig.arm.state

    def slow_state():
        rig.clock.advance(duration_ns)
        monkeypatch.setattr(rig.arm, "state", state)
        return state()

    monkeypatch.setattr(rig.arm, "state", slow_state)
    rig.ticks(1)


def test_pause_is_measured_from_what_was_sent_last(rig, monkeypatch):
    """A tick that sent late and the next one late, too: the arm waited for less than both say."""
    rig.run(speed=1.0)
    interrupt(rig, monkeypatch, 10 * MS)
    before = rig.arm.sent[-1]
    rig.clock.advance(21 * MS)  # 26 ms after it was sent, 36 ms after its tick began
    rig.plan(1.0)
    rig.ticks(1)
    assert np.abs(rig.arm.sent[-1] - before).max() > 0.5 * 0.005


def test_command_for_an_arm_that_has_stopped_since_is_not_sent(rig, monkeypatch):
    rig.run(speed=1.0)
    n, before = len(rig.arm.sent), rig.arm.sent[-1]
    interrupt(rig, monkeypatch, 29 * MS)
    assert len(rig.arm.sent) == n + 1  # 34 ms after the last one: late, and still in motion
    assert np.abs(rig.arm.sent[-1] - before).max() > 0.5 * 0.005
    before = rig.arm.sent[-1]
    interrupt(rig, monkeypatch, 40 * MS)
    assert len(rig.arm.sent) == n + 1
    assert rig.words[Word.MOTOR_N_SEND_DROPPED] == 1
    rig.plan(1.0)
    rig.ticks(1)
    assert len(rig.arm.sent) == n + 2
    # The arm has stopped at what it got, not at what was never sent.
    assert np.abs(rig.arm.sent[-1] - before).max() <= ACCELERATION * 0.005**2 + 1e-12


def test_arm_whose_state_takes_longer_than_a_period_still_moves(rig, monkeypatch):
    rig.run(speed=1.0)
    state = rig.arm.state
    monkeypatch.setattr(rig.arm, "state", lambda: rig.clock.advance(20 * MS) or state())
    n = len(rig.arm.sent)
    rig.ticks(20, every=2, speed=1.0)
    assert len(rig.arm.sent) == n + 20
    assert np.abs(rig.arm.sent[-1] - rig.arm.sent[-2]).max() > 0.5 * 0.005


def test_brake_of_an_arm_that_fails_in_part_stays_within_limits(rig, monkeypatch):
    """The driver of two arms sends to the one that is well, and then says what is wrong."""
    rig.run(speed=1.0)
    got = [rig.arm.sent[-2], rig.arm.sent[-1]]

    def send_to_one(position):
        got.append(np.array(position))
        raise DeviceError("right arm: the bus is off")

    monkeypatch.setattr(rig.arm, "send", send_to_one)
    rig.ticks(80)
    assert rig.loop.mode is Mode.FAULT
    assert len(got) > 20
    a = np.diff(np.array(got), n=2, axis=0) / 0.005**2
    assert np.abs(a).max() <= ACCELERATION + 1e-6
    assert np.abs(got[-1] - got[-2]).max() == 0.0


def test_caution_holds_once_and_a_person_may_go_on(rig):
    rig.run()
    rig.arm.caution = "a target is over the arm's own angle limit"
    rig.ticks(1)
    assert rig.loop.hold_reason is HoldReason.ARM
    rig.ticks(100, every=10)
    assert rig.loop.mode is Mode.HOLD
    rig.check_decelerated_and_holding()
    assert any("own angle limit" in e.text for e in rig.board.events["motor"].drain())
    rig.words[Word.RESUME_COUNT] += 1
    rig.ticks(60, every=10, speed=0.0)
    assert rig.loop.mode is Mode.RUN
    rig.arm.caution = None
    rig.ticks(2)
    rig.arm.caution = "joint 3 is at its angle limit"
    rig.ticks(1)
    assert rig.loop.mode is Mode.HOLD


def test_caution_before_the_motion_is_only_said(rig):
    rig.arm.caution = "joint 3 is at its angle limit"
    rig.ticks(5)
    assert rig.loop.mode is Mode.ENABLED
    assert any("joint 3" in e.text for e in rig.board.events["motor"].drain())
    rig.run()
    assert rig.loop.mode is Mode.RUN


def test_arm_fault_is_latched_brakes_and_leaves_the_line_alone(rig):
    rig.run()
    rig.arm.fault = "joint 3: driver over-temperature"
    rig.ticks(100)
    assert rig.loop.mode is Mode.FAULT
    rig.check_decelerated_and_holding()
    n = len(rig.arm.sent)
    rig.arm.fault = None
    rig.words[Word.RESUME_COUNT] += 1
    rig.ticks(50, every=5)
    assert rig.loop.mode is Mode.FAULT
    assert len(rig.arm.sent) == n
    assert "joint 3: driver over-temperature" in rig.said(EventKind.ERROR)
    rig.words[Word.REQUEST] = Request.STOP
    rig.ticks(1)
    assert not rig.running


@pytest.mark.parametrize("what", ["failure", "send_failure"])
def test_lost_connection_faults_with_the_drivers_words(rig, what):
    rig.run()
    setattr(rig.arm, what, DeviceError("bus can_left is off; check the cable"))
    rig.ticks(5)
    assert rig.loop.mode is Mode.FAULT
    assert "bus can_left is off; check the cable" in rig.said(EventKind.ERROR)


def test_dropped_commands_are_counted_and_five_in_a_row_fault(rig):
    rig.run()
    rig.arm.send_failure = DeviceTimeoutError("queue full")
    rig.ticks(4)
    assert rig.loop.mode is Mode.RUN
    rig.arm.send_failure = None
    rig.ticks(1)
    rig.arm.send_failure = DeviceTimeoutError("queue full")
    rig.ticks(4)
    assert rig.loop.mode is Mode.RUN
    assert rig.words[Word.MOTOR_N_SEND_DROPPED] == 8
    rig.ticks(1)
    assert rig.loop.mode is Mode.FAULT


def test_full_queue_after_a_pause_of_the_loop_is_one_dropped_command(rig):
    rig.run()
    rig.clock.advance(60 * MS)
    rig.arm.send_failure = DeviceTimeoutError("queue full")
    rig.ticks(4)
    assert rig.loop.mode is Mode.RUN
    rig.ticks(1)
    assert rig.loop.mode is Mode.FAULT


def test_queue_that_takes_long_to_be_full_faults_all_the_same(rig, monkeypatch):
    rig.run()

    def slow(_command):
        rig.clock.advance(60 * MS)
        raise DeviceTimeoutError("queue full")

    monkeypatch.setattr(rig.arm, "send", slow)
    rig.ticks(2)
    assert rig.loop.mode is Mode.FAULT


def test_commands_dropped_for_longer_than_a_pause_fault(make_rig):
    """At a low rate five of them take so long that the arm has stopped meanwhile."""
    rig = make_rig(rate_hz=30.0)
    rig.words[Word.REQUEST] = Request.RUN
    rig.arm.send_failure = DeviceTimeoutError("queue full")
    for _ in range(3):
        rig.clock.advance(33 * MS)
        rig.loop.tick(rig.clock.now_ns())
    assert rig.loop.mode is not Mode.FAULT
    rig.clock.advance(33 * MS)
    rig.loop.tick(rig.clock.now_ns())
    assert rig.loop.mode is Mode.FAULT


def test_not_finite_state_faults(rig):
    rig.run()
    rig.arm.follows = False
    rig.arm.position = np.full(rig.D, np.nan)
    rig.ticks(100)
    assert rig.loop.mode is Mode.FAULT
    rig.check_decelerated_and_holding()


def test_absurd_plans_are_refused_and_three_in_a_row_hold(rig):
    """Far beyond the limits is no wish to clamp; a seam would lead there all the same."""
    rig.run()
    n_before = rig.words[Word.MOTOR_N_REJECTED_CHUNKS]
    for i in range(3):
        assert rig.loop.mode is Mode.RUN
        rig.plan(offset=50.0)
        rig.ticks(2)
        assert rig.words[Word.MOTOR_N_REJECTED_CHUNKS] == n_before + i + 1
    assert rig.loop.hold_reason is HoldReason.REJECTED
    rig.ticks(100)
    rig.check_decelerated_and_holding()
    assert any("far outside" in text for text in rig.said(EventKind.WARNING))


def test_plan_a_little_outside_is_clamped_to_the_limit(make_rig):
    rig = make_rig(start=1.97)
    rig.run(0.03)
    for _ in range(40):
        rig.plan(0.03)
        rig.ticks(10)
    assert np.array(rig.arm.sent).max() == 2.0
    assert rig.loop.mode is Mode.RUN
    assert (rig.board.interventions[:, 0] > 0).all()


def test_operator_holds_and_resumes(rig):
    rig.run()
    rig.words[Word.REQUEST] = Request.HOLD
    rig.ticks(100, every=10)
    assert rig.loop.hold_reason is HoldReason.OPERATOR
    rig.check_decelerated_and_holding()
    rig.words[Word.RESUME_COUNT] += 1
    rig.words[Word.REQUEST] = Request.RUN
    rig.ticks(60, every=10, speed=0.0)
    assert rig.loop.mode is Mode.RUN


def test_enter_during_a_camera_stall_does_not_start_the_arm_later(rig):
    rig.run()
    rig.words[Word.REQUEST] = Request.HOLD
    rig.ticks(100, every=10)
    rig.words[Word.POLICY_CAMERA_STALL] = 1
    rig.words[Word.RESUME_COUNT] += 1
    rig.words[Word.REQUEST] = Request.RUN
    rig.ticks(20)
    assert any("no usable camera frames" in text for text in rig.said(EventKind.WARNING))
    rig.words[Word.POLICY_CAMERA_STALL] = 0
    rig.ticks(100, every=10, speed=0.0)
    assert rig.loop.mode is Mode.HOLD
    rig.words[Word.RESUME_COUNT] += 1
    rig.ticks(60, every=10, speed=0.0)
    assert rig.loop.mode is Mode.RUN


def test_enter_in_a_hold_that_ends_by_itself_is_not_called_forgotten(rig):
    rig.run()
    rig.words[Word.POLICY_CAMERA_STALL] = 1
    rig.ticks(100)
    rig.words[Word.RESUME_COUNT] += 1
    rig.ticks(20)
    assert not any("enter was not followed" in text for text in rig.said())
    rig.words[Word.POLICY_CAMERA_STALL] = 0
    rig.plan(0.0)
    rig.ticks(20)
    assert rig.loop.mode is Mode.RUN


@pytest.mark.parametrize(("wait_ticks", "mode"), [(1500, Mode.RUN), (2100, Mode.HOLD)])
def test_enter_waits_for_a_plan_but_not_for_ever(rig, wait_ticks, mode):
    rig.run()
    rig.words[Word.REQUEST] = Request.HOLD
    rig.ticks(100)
    rig.words[Word.RESUME_COUNT] += 1
    rig.words[Word.REQUEST] = Request.RUN
    rig.ticks(wait_ticks)
    rig.ticks(60, every=10, speed=0.0)
    assert rig.loop.mode is mode
    assert any("no plan came" in t for t in rig.said(EventKind.WARNING)) == (mode is Mode.HOLD)


def test_signal_is_not_taken_back_by_a_key_that_it_interrupted(rig):
    rig.run()
    rig.writer.ask_at_once(Request.STOP_NOW)
    rig.writer.ask_at_once(Request.STOP)
    rig.words[Word.REQUEST] = Request.RUN
    rig.ticks(200, every=10)
    assert not rig.running
    assert rig.writer.request is Request.STOP_NOW
    rig.check_decelerated_and_holding()


def test_park_goes_there_slowly_and_ends(make_rig):
    park = np.full(7, 0.1)
    rig = make_rig(park=park)
    rig.run()
    n = len(rig.arm.sent)
    rig.words[Word.REQUEST] = Request.PARK
    rig.ticks(3000)
    assert not rig.running
    np.testing.assert_allclose(rig.arm.position, park, atol=1e-6)
    rig.check_decelerated_and_holding()
    assert np.abs(rig.velocity()[n + 20 :, :6]).max() <= 0.3 + 1e-9


def test_park_without_a_pose_is_a_stop(rig):
    rig.run()
    rig.words[Word.REQUEST] = Request.PARK
    rig.ticks(400)
    assert not rig.running
    rig.check_decelerated_and_holding()


def test_guardian_that_took_over_silences_the_loop(rig):
    rig.run()
    n = len(rig.arm.sent)
    rig.words[Word.GUARDIAN_TRIPPED_NS] = rig.clock.now_ns()
    rig.ticks(5)
    assert not rig.running
    assert len(rig.arm.sent) == n
    assert rig.loop.mode is Mode.FAULT


def test_guardian_that_takes_over_in_the_middle_of_a_tick_is_not_contradicted(rig, monkeypatch):
    """The machine paused in a tick; both went on at once, and one command came after the hold."""
    rig.run()
    n, state = len(rig.arm.sent), rig.arm.state

    def slow_state():
        rig.words[Word.GUARDIAN_TRIPPED_NS] = rig.clock.now_ns()
        return state()

    monkeypatch.setattr(rig.arm, "state", slow_state)
    rig.ticks(5)
    assert not rig.running
    assert len(rig.arm.sent) == n
    assert rig.loop.mode is Mode.FAULT


def test_dry_run_sends_nothing_and_still_runs(make_rig):
    rig = make_rig(dry_run=True)
    rig.words[Word.REQUEST] = Request.RUN
    rig.ticks(10)
    rig.ticks(60, every=10)
    assert rig.loop.mode is Mode.RUN
    rig.words[Word.REQUEST] = Request.STOP
    rig.ticks(200)
    assert not rig.running
    assert rig.arm.sent == []


def test_synchronous_plan_that_is_used_up_waits_without_holding(make_rig):
    rig = make_rig(synchronous=True)
    rig.words[Word.REQUEST] = Request.RUN
    rig.ticks(10)
    rig.plan(0.1, age_ns=0)
    rig.ticks(600)
    assert rig.loop.mode is Mode.RUN
    assert rig.words[Word.MOTOR_PLAN_ENDED] == 1
    assert rig.words[Word.MOTOR_STANDING] == 1
    rig.check_decelerated_and_holding()
    # The next one took four seconds and starts when it arrives.
    rig.plan(0.1, age_ns=0)
    rig.ticks(1)
    assert rig.words[Word.MOTOR_PLAN_ENDED] == 0
    rig.ticks(600)
    rig.check_decelerated_and_holding()


def test_tick_log_keeps_what_happened(rig):
    rig.run()
    rig.clock.advance(3 * MS)
    planned_ns = rig.clock.now_ns() - 3 * MS
    rig.loop.tick(planned_ns)
    last = rig.writer.ticks.drain()[-1]
    assert last["t_woke_ns"] - last["t_planned_ns"] == 3 * MS
    assert last["mode"] == Mode.RUN
    assert last["chunk_idx"] == rig.n_chunks - 1
    assert rig.words[Word.MOTOR_N_LATE] == 1
    assert rig.board.lateness_us.sum() == rig.words[Word.MOTOR_N_TICKS]


def test_motors_without_power_are_a_fault(rig):
    """An arm that reports no fault and yet has let go once ran on."""
    rig.run()
    state = rig.arm.state
    rig.arm.state = lambda: state()._replace(enabled=False)
    rig.ticks(1, every=10)
    assert rig.loop.mode is Mode.RUN
    rig.ticks(5)
    assert rig.loop.mode is Mode.FAULT
    assert any("lost their power" in text for text in rig.said(EventKind.ERROR))


def test_silent_supervisor_stops_the_arm_until_a_person_resumes(rig):
    rig.run()
    rig.words[Word.SUPERVISOR_HEARTBEAT_NS] = rig.clock.now_ns()
    rig.ticks(390, every=10)
    assert rig.loop.mode is Mode.RUN
    rig.ticks(20, every=10)
    assert rig.loop.mode is Mode.HOLD
    assert rig.loop.hold_reason is HoldReason.UNWATCHED
    for _ in range(40):
        rig.words[Word.SUPERVISOR_HEARTBEAT_NS] = rig.clock.now_ns()
        rig.ticks(10, every=10, speed=0.0)
    assert rig.loop.mode is Mode.HOLD
    rig.check_decelerated_and_holding()
    rig.words[Word.RESUME_COUNT] += 1
    rig.words[Word.SUPERVISOR_HEARTBEAT_NS] = rig.clock.now_ns()
    rig.ticks(100, every=10, speed=0.0)
    assert rig.loop.mode is Mode.RUN


def stall(rig, *, for_ns):
    """Let the cameras fail for so long, plans come again after it; tick until that is over."""
    rig.words[Word.POLICY_CAMERA_STALL] = 1
    rig.ticks(for_ns // TICK_NS)
    rig.words[Word.POLICY_CAMERA_STALL] = 0
    rig.ticks(100, every=10, speed=0.0)


def test_hold_that_ended_soon_resumes_by_itself(rig):
    rig.run()
    stall(rig, for_ns=2_500 * MS)
    assert rig.loop.mode is Mode.RUN


def test_hold_that_lasted_waits_for_a_person(rig):
    """Whoever plugged the camera in again has a hand at the arm."""
    rig.run()
    stall(rig, for_ns=3_500 * MS)
    assert rig.loop.mode is Mode.HOLD
    assert rig.loop.hold_reason is HoldReason.WAITED
    said = [t for t in rig.said() if t.startswith("hold: ")]
    assert said[-1] == "hold: no usable camera frames; enter goes on once that is over"
    before = rig.arm.sent[-1].copy()
    rig.ticks(2000, every=10, speed=0.0)
    assert (rig.arm.sent[-1] == before).all()
    rig.words[Word.RESUME_COUNT] += 1
    rig.ticks(100, every=10, speed=0.0)
    assert rig.loop.mode is Mode.RUN
    rig.check_decelerated_and_holding()


def test_enter_during_a_hold_that_ends_by_itself_counts(rig):
    """Pressed at 2.9 s it was used up by the question at 3 s."""
    rig.run()
    rig.words[Word.POLICY_CAMERA_STALL] = 1
    rig.ticks(580)
    rig.words[Word.RESUME_COUNT] += 1
    rig.ticks(120)
    rig.words[Word.POLICY_CAMERA_STALL] = 0
    rig.ticks(100, every=10, speed=0.0)
    assert rig.loop.mode is Mode.RUN


def test_hold_of_a_run_that_nobody_watches_asks_nobody(make_rig):
    rig = make_rig(resume_ns=None)
    rig.run()
    stall(rig, for_ns=9_000 * MS)
    assert rig.loop.mode is Mode.RUN


def test_start_without_a_plan_for_long_waits_for_a_person(rig):
    rig.words[Word.REQUEST] = Request.RUN
    rig.ticks(1900)
    assert rig.loop.mode is Mode.ENABLED
    rig.ticks(200)
    assert rig.loop.hold_reason is HoldReason.WAITED
    assert any("no usable plan came; enter goes on" in t for t in rig.said())
    rig.ticks(100, every=10, speed=0.0)
    assert rig.loop.mode is Mode.HOLD
    rig.words[Word.RESUME_COUNT] += 1
    rig.ticks(100, every=10, speed=0.0)
    assert rig.loop.mode is Mode.RUN


def test_silent_supervisor_ends_a_parking(make_rig):
    """Its keys are dead then: nobody could stop the arm on its way."""
    rig = make_rig(park=np.full(7, 1.5))
    rig.run()
    rig.words[Word.SUPERVISOR_HEARTBEAT_NS] = rig.clock.now_ns()
    rig.words[Word.REQUEST] = Request.PARK
    rig.ticks(390)
    assert rig.loop.mode is Mode.PARK
    rig.ticks(200)
    assert not rig.running
    assert (rig.arm.position < 1.0).all()
    assert any("main process hangs" in text for text in rig.said())
    rig.check_decelerated_and_holding()


def test_board_says_which_plans_were_taken_and_which_refused(rig):
    rig.run()
    assert rig.words[Word.MOTOR_TAKEN] == rig.n_chunks
    assert rig.words[Word.MOTOR_REFUSED] == 0
    rig.plan(bad=float("nan"))
    rig.ticks(1)
    assert rig.words[Word.MOTOR_REFUSED] == rig.n_chunks
    assert rig.words[Word.MOTOR_TAKEN] == rig.n_chunks - 1


@pytest.mark.parametrize("lead_ns", [-1, 1_000_000_001])
def test_lead_that_no_arm_has_is_refused(lead_ns):
    with pytest.raises(SpecError, match="lead: expected 0 to 1000 ms"):
        MotorOptions(lead_ns=lead_ns)
