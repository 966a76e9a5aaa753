"""The motor process beyond its ticks: in which order it opens the arm and becomes real-time."""

import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from gwp_edge import motor_process
from gwp_edge.mailbox import Board
from gwp_edge.motor_options import MotorOptions
from gwp_edge.robot_config import ArmConfig, RobotConfig
from gwp_edge.status import Mode, Request, Word
from gwp_edge.testing import FakeArm, FakeClock, make_spec
from gwp_edge.types import JointLimits

SPEC = make_spec()


class Listed(FakeArm):
    """A fake arm that writes down when it is opened, closed and commanded."""

    def __init__(self, done):
        D = SPEC.n_channels
        limits = JointLimits(
            position_min=np.full(D, -2.0),
            position_max=np.full(D, 2.0),
            velocity_max=np.full(D, 3.0),
            acceleration_max=np.full(D, 5.0),
        )
        self.clock = FakeClock()
        super().__init__(SPEC.channels, limits, self.clock)
        self.done = done

    def open(self, *, enable):
        self.done.append("enabled" if enable else "opened")
        super().open(enable=enable)

    def close(self):
        self.done.append("closed")
        super().close()

    def send(self, position):
        self.done.append("sent")
        super().send(position)


@pytest.fixture
def board():
    board = Board.create(SPEC.n_channels, SPEC.n_rows)
    yield board
    board.close()
    board.unlink()


@pytest.mark.parametrize(("dry_run", "second"), [(False, "enabled"), (True, "opened")])
def test_memory_is_locked_while_no_bus_is_open(board, monkeypatch, dry_run, second):
    """Locking takes a tenth of a second, in which frames pile up unread and look like silence."""
    done = []
    arm = Listed(done)
    life = SimpleNamespace(over=False, open=lambda arm, enable: arm.open(enable=enable))

    def make_realtime(**_):
        done.append("real-time")
        life.over = True  # ends the loop as soon as the arm stands
        return []

    monkeypatch.setattr(motor_process, "make_realtime", make_realtime)
    monkeypatch.setattr(motor_process, "MonotonicClock", lambda **_: arm.clock)
    board.words[Word.REQUEST] = Request.RUN
    robot = RobotConfig(name="listed", arm=ArmConfig(kind="kinematic"))
    setup = motor_process.ArmSetup(board=board.name, spec=SPEC, robot=robot, supervisor_pid=0)
    motor_process._run(arm, board, setup, MotorOptions(dry_run=dry_run), life)
    assert done[:4] == ["opened", "closed", "real-time", second]
    assert ("sent" in done) is not dry_run
    assert board.words[Word.MOTOR_ARMED] == 0
    assert board.words[Word.MOTOR_MODE] == Mode.HOLD


def test_threads_that_a_library_starts_later_are_not_real_time():
    """A vendor's reader thread at the loop's priority would take its time from it."""
    code = (
        "import os, threading\n"
        "from gwp_edge.realtime import make_realtime\n"
        "warnings = make_realtime(priority=5, cpu=None)\n"
        "seen = []\n"
        "t = threading.Thread(target=lambda: seen.append(os.sched_getscheduler(0)))\n"
        "t.start(); t.join()\n"
        "own = os.sched_getscheduler(0) & ~os.SCHED_RESET_ON_FORK\n"
        "refused = any('real-time' in w for w in warnings)\n"
        "assert refused or own == os.SCHED_FIFO, (warnings, own)\n"
        "assert seen == [os.SCHED_OTHER], seen\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
