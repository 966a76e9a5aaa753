"""Ends of a run that a person or a terminal brings about, some of them while it already ends."""

import dataclasses
import os
import select
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from run_rig import MOTOR, Run

from gwp_edge import supervisor
from gwp_edge.errors import SpecError
from gwp_edge.motor_options import MotorOptions
from gwp_edge.operator_input import Key, SignalInput, TerminalKeys
from gwp_edge.status import EventKind, Mode, PolicyPhase, Request

MAIN = """
import sys
from pathlib import Path

sys.path.insert(0, sys.argv[2])
from run_rig import Run

if __name__ == "__main__":
    run = Run(Path(sys.argv[1]))
    show = run.once_running(lambda status: print("RUNS", flush=True))
    summary = run.start(on_status=show, duration_s=120.0)
    print(summary.outcome, summary.message, flush=True)
"""


@pytest.mark.parametrize(
    ("number", "outcome"),
    [
        (signal.SIGINT, "interrupted"),
        (signal.SIGHUP, "terminated"),
        (signal.SIGTSTP, "terminated"),
        (signal.SIGUSR1, "estop"),
    ],
)
def test_signal_to_the_whole_group_leaves_an_arm_that_is_held(tmp_path, number, outcome):
    """A terminal that is closed once killed motor process and guardian together."""
    program = tmp_path / "main.py"
    program.write_text(MAIN)
    main = subprocess.Popen(
        [sys.executable, program, tmp_path, Path(__file__).parent],
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        assert "RUNS\n" in iter(main.stdout.readline, ""), "the run ended before it ran"
        os.killpg(main.pid, number)
        last = main.stdout.read().strip().splitlines()[-1]
    finally:
        main.kill()
        main.wait()
        main.stdout.close()
    assert last.startswith(f"{outcome} ")
    assert last.endswith("the arm stands and holds")
    Run(tmp_path).check_decelerated_and_holding()


def quit_then(a_run, action):
    """Return keys and callback that park, and do ``action`` once the arm is on its way."""
    state = {"status": None, "quit": False, "n_ticks": 0, "key": None}

    def keys():
        status = state["status"]
        if status is not None and status.mode is Mode.RUN and not state["quit"]:
            state["quit"] = True
            return Key.QUIT
        key, state["key"] = state["key"], None
        return key

    def on_status(status):
        state["status"] = status
        if status.mode is Mode.PARK:
            state["n_ticks"] = state["n_ticks"] or status.n_ticks
            if status.n_ticks - state["n_ticks"] > 40:
                state["n_ticks"] = 1 << 60
                state["key"] = action()

    return {"keys": keys, "on_status": on_status, "park_share": 0.95, "interactive": True}


@pytest.mark.parametrize(
    ("action", "outcome", "words"),
    [
        (lambda: os.kill(os.getpid(), signal.SIGUSR1), "estop", "e-stop"),
        (lambda: os.kill(os.getpid(), signal.SIGINT), "interrupted", "interrupted"),
        (lambda: os.kill(os.getpid(), signal.SIGTERM), "terminated", "asked to terminate"),
        (lambda: Key.HOLD, "held", "stopped the parking"),
    ],
)
def test_parking_can_be_stopped(a_run, action, outcome, words):
    summary = a_run.start(**quit_then(a_run, action))
    assert summary.outcome == outcome, summary.message
    assert words in summary.message
    assert summary.exit_code == (outcome in ("estop", "held"))
    _, q = a_run.commands()
    pose = np.array(list(a_run.park_pose(0.95).values()))
    assert np.abs(q[-1, :6] - pose[:6]).max() > 0.3, "it went on to the park pose"
    a_run.check_decelerated_and_holding()


def test_parking_to_its_end_reaches_the_pose(a_run):
    summary = a_run.start(**{**quit_then(a_run, lambda: None), "park_share": 0.55})
    assert (summary.outcome, summary.exit_code) == ("parked", 0)
    _, q = a_run.commands()
    np.testing.assert_allclose(q[-1], list(a_run.park_pose(0.55).values()), atol=1e-6)
    a_run.check_decelerated_and_holding()


def test_parking_that_does_not_end_is_stopped_and_not_killed(a_run, monkeypatch):
    """Such as at a wall of the workspace between here and the pose."""
    monkeypatch.setattr("gwp_edge.supervisor._PARK_TIMEOUT_S", 0.3)
    summary = a_run.start(**quit_then(a_run, lambda: None))
    assert (summary.outcome, summary.exit_code) == ("held", 1)
    assert "did not reach its park pose" in summary.message
    assert "the arm stands and holds" in summary.message
    a_run.check_decelerated_and_holding()


def test_fault_while_parking_is_not_reported_as_parked(a_run):
    faults = [{"kind": "arm-fault", "at_s": 1.5}]
    summary = a_run.start(faults=faults, **quit_then(a_run, lambda: None))
    assert a_run.modes[-2:] == [Mode.PARK, Mode.FAULT]
    assert (summary.outcome, summary.exit_code) == ("fault", 1)
    assert "joint driver error" in summary.message
    a_run.check_decelerated_and_holding()


def test_parking_that_nobody_watches_is_not_reported_as_done(a_run):
    motor = dataclasses.replace(MOTOR, unwatched_ns=300_000_000)
    summary = a_run.start(motor=motor, **quit_then(a_run, lambda: time.sleep(2.0)))
    assert (summary.outcome, summary.exit_code) == ("held", 1)
    assert "not parked: hold: nobody watches keys" in summary.message
    a_run.check_decelerated_and_holding()


def test_park_pose_out_of_reach_is_refused_before_anything_moves(a_run):
    """It once parked until it was killed: the limiter stops where the pose was not yet."""
    summary = a_run.start(park_share=1.01)
    assert summary.exit_code == 1
    assert "park pose: left_joint_1 is 2.63" in summary.message
    assert not a_run.log.with_name("commands.motor").exists()


@pytest.mark.parametrize(
    ("number", "outcome"), [(signal.SIGUSR1, "estop"), (signal.SIGINT, "interrupted")]
)
def test_signal_while_motors_are_powered_breaks_that_off(a_run, number, outcome):
    """The e-stop once waited until the last motor of the second arm had power."""
    seen = {"n_ready": 0, "t_pressed_s": 0.0}

    def press(status):
        if status.phase is PolicyPhase.READY and status.mode is Mode.CONNECTED:
            seen["n_ready"] += 1  # every 50 ms; the checks are over after the first
            if seen["n_ready"] == 20:
                seen["t_pressed_s"] = time.monotonic()
                os.kill(os.getpid(), number)

    summary = a_run.start(enable_s=120.0, on_status=press)
    assert time.monotonic() - seen["t_pressed_s"] < 60.0
    assert summary.outcome == outcome, summary.message
    assert "killed" not in summary.message
    assert "the start was broken off: motors that have power" in summary.message
    assert not a_run.log.with_name("commands.motor").exists()


def test_second_interrupt_brakes_at_once(a_run):
    def twice(_):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    summary = a_run.start(on_status=a_run.once_running(twice))
    assert (summary.outcome, summary.exit_code) == ("interrupted", 0)
    assert summary.message.startswith("interrupted twice: immediate hold")
    a_run.check_decelerated_and_holding()


def test_second_interrupt_asks_for_an_immediate_hold_from_the_handler():
    asked = []
    with SignalInput(asked.append):
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)
    assert asked[:2] == [Request.STOP, Request.STOP_NOW]


def test_estop_acts_while_the_display_is_blocked(a_run):
    """A terminal that takes no text, such as after Ctrl-S, once kept the e-stop waiting."""
    stood = []

    def block(_):
        threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGUSR1)).start()
        stood.append(a_run.await_standing())

    motor = dataclasses.replace(MOTOR, unwatched_ns=10**12)
    summary = a_run.start(on_status=a_run.once_running(block), motor=motor)
    assert stood == [True]
    assert (summary.outcome, summary.exit_code) == ("estop", 1)
    a_run.check_decelerated_and_holding()


def test_main_process_that_hangs_stops_the_arm(a_run):
    stood = []
    motor = dataclasses.replace(MOTOR, unwatched_ns=300_000_000)
    summary = a_run.start(
        on_status=a_run.once_running(lambda _: stood.append(a_run.await_standing())), motor=motor
    )
    assert stood == [True]
    assert (summary.outcome, summary.exit_code) == ("held", 1)
    assert "the main process hangs" in summary.message
    a_run.check_decelerated_and_holding()


def test_display_that_fails_ends_the_run_and_leaves_no_process(a_run):
    """It once left motor, guardian and policy process behind for ever."""
    pids = []

    def fail(status):
        pids.extend((status.motor_pid, status.policy_pid, status.guardian_pid))
        raise BrokenPipeError("nobody reads")

    summary = a_run.start(on_status=a_run.once_running(fail))
    assert (summary.outcome, summary.exit_code) == ("crashed", 1)
    assert "can no longer be shown (BrokenPipeError" in summary.message
    assert len(pids) == 3
    assert [pid for pid in pids if Path(f"/proc/{pid}").exists()] == []
    a_run.check_decelerated_and_holding()


def test_guardian_that_hangs_ends_the_run(a_run):
    summary = a_run.start(
        on_status=a_run.once_running(lambda s: os.kill(s.guardian_pid, signal.SIGSTOP)),
        guardian_timeout_s=0.3,
    )
    assert (summary.outcome, summary.exit_code) == ("fault", 1)
    assert "the guardian is silent" in summary.message
    a_run.check_decelerated_and_holding()


@pytest.mark.parametrize("guardian", [True, False])
def test_motor_process_that_does_not_stop_is_killed(a_run, monkeypatch, guardian):
    monkeypatch.setattr(supervisor, "_STOP_TIMEOUT_S", 0.3)

    def hang(status):
        os.kill(status.motor_pid, signal.SIGSTOP)
        os.kill(os.getpid(), signal.SIGINT)

    summary = a_run.start(
        on_status=a_run.once_running(hang), guardian=guardian, guardian_timeout_s=100.0
    )
    assert (summary.outcome, summary.exit_code) == ("crashed", 1)
    assert ("the guardian sent hold" in summary.message) is guardian
    assert ("NOBODY HOLDS THE ARM" in summary.message) is not guardian
    if not guardian:
        assert "no guardian: a killed motor process leaves its last target" in summary.faults


def test_keys_before_the_start_enable_nothing(a_run):
    """Space and enter during the checks once ran the arm past one that had failed."""
    pressed = iter([Key.HOLD, Key.RESUME, Key.RESUME])
    summary = a_run.start(script="nan", keys=lambda: next(pressed, None), interactive=True)
    assert (summary.outcome, summary.exit_code) == ("refused", 1)
    assert next(pressed, None) is None
    assert not a_run.log.with_name("commands.motor").exists()


def test_space_before_the_start_waits_for_enter(a_run):
    state = {"n_keys": 0, "n_ready": 0, "modes": set()}

    def keys():
        state["n_keys"] += 1
        if state["n_keys"] == 1:
            return Key.HOLD
        return Key.RESUME if state["n_ready"] == 20 else None

    def on_status(status):
        if status.phase is PolicyPhase.READY and status.mode is Mode.CONNECTED:
            state["n_ready"] += 1
        elif state["n_ready"] < 20:
            state["modes"].add(status.mode)

    summary = a_run.start(keys=keys, on_status=on_status, interactive=True, duration_s=0.5)
    assert (summary.outcome, summary.exit_code) == ("duration", 0)
    assert state["n_ready"] >= 20
    assert state["modes"] <= {Mode.DISCONNECTED, Mode.CONNECTED}
    a_run.check_decelerated_and_holding()


def test_check_that_fails_with_the_last_word_is_seen(a_run, monkeypatch):
    """The line was written before the word that ended the wait, and once was read after it."""
    is_ready = supervisor.Supervisor._is_ready

    def ready_with_a_last_line(self):
        ready = is_ready(self)
        if ready:
            self._board.events["policy"].say(EventKind.CHECK_FAILED, "late: it failed")
        return ready

    monkeypatch.setattr(supervisor.Supervisor, "_is_ready", ready_with_a_last_line)
    summary = a_run.start()
    assert (summary.outcome, summary.exit_code) == ("refused", 1)
    assert "late: it failed" in summary.message
    assert not a_run.log.with_name("commands.motor").exists()


def test_check_to_skip_that_does_not_exist_is_refused(a_run):
    summary = a_run.start(skip_checks=frozenset({"latnecy"}))
    assert (summary.outcome, summary.exit_code) == ("refused", 1)
    assert "no check is called latnecy; they are " in summary.message
    assert "latency" in summary.message
    assert not a_run.log.with_name("commands.motor").exists()


def test_terminal_keys_are_read_one_by_one_until_the_terminal_is_gone(monkeypatch):
    ours, theirs = os.openpty()
    with open(theirs, "rb", buffering=0) as terminal:
        monkeypatch.setattr(sys, "stdin", terminal)
        with TerminalKeys() as keys:
            assert keys.available
            assert keys() is None
            os.write(ours, b" xQ\r")
            found = []
            while len(found) < 4 and select.select([terminal], [], [], 10.0)[0]:
                found.append(keys())
            assert found == [Key.HOLD, None, Key.QUIT, Key.RESUME]
            os.close(ours)
            assert keys() is None
    assert not keys.available


def test_standard_input_that_is_no_terminal_has_no_keys(monkeypatch, tmp_path):
    (tmp_path / "input").write_text(" q")
    with open(tmp_path / "input") as file:
        monkeypatch.setattr(sys, "stdin", file)
        with TerminalKeys() as keys:
            assert not keys.available
            assert keys() is None


def test_motor_rate_that_the_guardian_would_not_wait_for_is_refused(a_run):
    with pytest.raises(SpecError, match="guardian_timeout_s: expected a positive time"):
        a_run.start(guardian_timeout_s=0.0)
    with pytest.raises(SpecError, match="at least 30 Hz"):
        a_run.start(motor=MotorOptions(rate_hz=20.0), guardian_timeout_s=0.05)
    a_run.start(motor=MotorOptions(rate_hz=20.0), guardian_timeout_s=2.0, duration_s=0.2)
    assert a_run.summary.outcome == "duration"
    slow = MotorOptions(rate_hz=20.0, dry_run=True)
    assert a_run.start(motor=slow, guardian_timeout_s=0.05, duration_s=0.2).outcome == "duration"
