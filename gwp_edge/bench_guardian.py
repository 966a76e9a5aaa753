"""How fast the guardian answers a killed motor process, on a fake PiPER's bus."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Final

from gwp_edge.errors import DeviceError
from gwp_edge.guardian import guardian_main
from gwp_edge.mailbox import Board
from gwp_edge.motor_process import ArmSetup
from gwp_edge.robot_config import ArmConfig, RobotConfig
from gwp_edge.robots import create_arm
from gwp_edge.status import Word
from gwp_edge.testing import make_spec

if TYPE_CHECKING:
    from gwp_edge.drivers.piper_fake_bus import FakeProcess

_PRIORITY: Final = 70  # below the motor loop's, as in a run


def kill_to_hold_ns(*, realtime: bool = True) -> int:
    """Kill a process that the guardian watches; return when its hold went out, ns after the kill.

    Measured on a fake PiPER's bus: from the kill to the time at which the guardian handed its
    hold frames to it.

    Raises:
        DeviceError: the guardian did not start or did not act.
    """
    from gwp_edge.drivers.piper_fake_bus import FakeProcess
    from gwp_edge.drivers.piper_witness import WitnessPiper

    with (
        tempfile.TemporaryDirectory() as folder,
        FakeProcess(str(Path(folder) / "arm"), WitnessPiper()) as fake,
    ):
        return _kill_beside(fake, realtime=realtime)


def _kill_beside(fake: FakeProcess, *, realtime: bool) -> int:
    spec = make_spec(1)
    robot = RobotConfig(
        name="a fake PiPER", arm=ArmConfig(kind="piper", options={"can": fake.channel})
    )
    # The guardian holds what is powered and under CAN control, and nothing else.
    arm = create_arm(robot, spec, {})
    try:
        arm.open(enable=True)
    finally:
        arm.close()
    board = Board.create(spec.n_channels, spec.n_rows)
    motor = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    setup = ArmSetup(
        board=board.name,
        spec=spec,
        robot=robot,
        supervisor_pid=os.getpid(),
    )
    guardian = multiprocessing.get_context("spawn").Process(
        target=guardian_main,
        args=(setup,),
        kwargs={"timeout_ns": 60_000_000_000, "realtime": realtime, "priority": _PRIORITY},
    )
    words = board.words
    try:
        guardian.start()
        _await(lambda: words[Word.GUARDIAN_READY] == 1, "the guardian did not start")
        words[Word.MOTOR_PID] = motor.pid
        words[Word.MOTOR_HEARTBEAT_NS] = time.monotonic_ns()
        words[Word.MOTOR_ARMED] = 1
        time.sleep(0.05)  # it opens the process on its next turn
        t_kill_ns = time.monotonic_ns()
        motor.kill()
        _await(lambda: words[Word.GUARDIAN_HOLD_SENT_NS] != 0, "the guardian did not act")
        # The frames are sent before the word is written, and heard a moment later.
        _await(lambda: fake.ask("testify").t_command_ns > t_kill_ns, "the arm heard no hold")
        seen = fake.ask("first_command_since", t_kill_ns)
        return int(seen) - t_kill_ns
    finally:
        motor.kill()
        motor.wait()
        guardian.kill()
        guardian.join()
        board.close()
        board.unlink()


def _await(condition: Callable[[], bool], otherwise: str) -> None:
    deadline_s = time.monotonic() + 30.0
    while not condition():
        if time.monotonic() > deadline_s:
            raise DeviceError(f"{otherwise} in 30 s")
        time.sleep(0.0005)
