"""The motor loop on the PiPER driver and a fake arm: what the arm does when a hold gives way."""

import numpy as np
import pytest
from piper_rig import TICK_NS, Rig

from gwp_edge.drivers.piper_fake import FakePiper
from gwp_edge.mailbox import Board
from gwp_edge.motor import MotorLoop
from gwp_edge.motor_options import MotorOptions
from gwp_edge.status import HoldReason, Mode, Request, Word
from gwp_edge.types import Chunk

POSE_MDEG = (0, 60_000, -60_000, 0, 15_000, 0)


class LoopRig:
    """A motor loop with its arm, in the arm's own time."""

    def __init__(self, firmware="S-V1.8-8", **options):
        fake = FakePiper(firmware=firmware, joint_mdeg=POSE_MDEG)
        self.rig = Rig(fakes=[fake], **options)
        self.fake, self.arm, self.clock = self.rig.fake, self.rig.arm, self.rig.clock
        self.arm.open(enable=True)
        self.board = Board.create(7, 30)
        self.writer = Board.attach(self.board.name, 7, 30)
        limits = self.arm.limits
        self.loop = MotorLoop(self.arm, self.board, self.clock, MotorOptions(), limits=limits)
        self.loop.begin(self.arm.state())
        self.n_chunks = 0
        self.true_deg = []
        self.writer.words[Word.REQUEST] = Request.RUN

    def close(self):
        self.writer.close()
        self.board.close()
        self.board.unlink()

    def ticks(self, n, *, speed_rad_s=0.0):
        """Follow plans that move joint 1 at ``speed_rad_s``, made anew every 50 ms."""
        for i in range(n):
            if i % 10 == 0:
                t_s = np.arange(30)[:, None] / 30.0
                rows = np.tile(self.loop._limiter.position, (30, 1))
                rows[:, :1] += speed_rad_s * t_s
                now_ns = self.clock.now_ns()
                self.writer.publish_chunk(
                    Chunk(
                        actions=rows,
                        t_observed_ns=now_ns,
                        period_ns=33_333_333,
                        chunk_idx=self.n_chunks,
                    )
                )
                self.n_chunks += 1
            self.clock.sleep_until_ns(self.clock.now_ns() + TICK_NS)
            self.loop.tick(self.clock.now_ns())
            self.true_deg.append(np.array(self.fake.joint_mdeg) / 1000.0)

    def said(self):
        return [e.text for e in self.board.events["motor"].drain()]

    @property
    def target_deg(self):
        return np.array(self.fake.target_mdeg) / 1000.0


@pytest.fixture
def make():
    rigs = []

    def make(*arguments, **options):
        rigs.append(LoopRig(*arguments, **options))
        rigs[-1].ticks(60)
        assert rigs[-1].loop.mode is Mode.RUN
        return rigs[-1]

    yield make
    for rig in rigs:
        rig.close()


def test_joint_that_was_blocked_does_not_leap_when_it_is_freed(make):
    rig = make(speed_percent=100)
    rig.fake.faults.stuck = frozenset({1})
    rig.ticks(300, speed_rad_s=0.8)
    assert rig.loop.hold_reason is HoldReason.TRACKING
    (said,) = [t for t in rig.said() if "does not follow" in t]
    assert said.endswith("is it blocked or overloaded? (its motor takes 2.5 A)")
    rig.ticks(800)
    assert abs(rig.target_deg[0] - rig.true_deg[-1][0]) < 0.1
    rig.fake.faults.stuck = frozenset()
    n = len(rig.true_deg)
    rig.ticks(200)
    assert np.ptp(np.array(rig.true_deg[n:])[:, 0]) < 0.2


@pytest.mark.parametrize("speed_percent", [30, 100])
def test_arm_that_lags_is_not_sent_back(make, speed_percent):
    rig = make(speed_percent=speed_percent)
    rig.ticks(400, speed_rad_s=1.2)
    rig.ticks(600)
    way = np.diff(np.array(rig.true_deg)[:, 0])
    assert way.min() > -0.01


@pytest.mark.parametrize("firmware", ["S-V1.8-6", "S-V1.8-8"])
@pytest.mark.parametrize("drift_deg", [25, 9])
def test_angles_that_drifted_move_nothing(make, firmware, drift_deg):
    """A hold by them would move the arm by as much as they are wrong."""
    rig = make(firmware)
    rig.fake.faults.drift_mdeg[2] = -1000 * drift_deg
    rig.ticks(100)
    rig.writer.words[Word.REQUEST] = Request.HOLD
    rig.ticks(600)
    assert rig.loop.mode in (Mode.HOLD, Mode.FAULT)
    assert np.abs(np.array(rig.true_deg)[:, 1] - 60.0).max() < 1.0
