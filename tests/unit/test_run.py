"""Whole runs in real processes on the kinematic robot: every ending leaves the arm holding."""

import dataclasses
import gc
import os
import signal
import time
import weakref

import msgspec
import numpy as np
import pytest
from run_rig import MOTOR

from gwp_edge import runtime
from gwp_edge.operator_input import Key
from gwp_edge.policy_options import PolicyOptions
from gwp_edge.robots import load_robot
from gwp_edge.run_report import Findings
from gwp_edge.runtime import RunOptions, run
from gwp_edge.status import HoldReason, Mode
from gwp_edge.testing import make_spec


def test_run_duration_ends_well_and_reports(a_run):
    summary = a_run.start(duration_s=0.6)
    assert (summary.outcome, summary.exit_code) == ("duration", 0)
    assert summary.message == "ran for 0.6 s; the arm stands and holds"
    a_run.check_decelerated_and_holding()
    assert Mode.RUN in a_run.modes
    assert summary.n_chunks > 3
    assert summary.n_ticks > 50
    assert summary.latency_ms["total"].n == summary.n_chunks
    assert all(check.passed for check in summary.checks)
    assert {c.name for c in summary.checks} >= {
        "golden", "cameras", "statistics", "latency", "first action", "memory",
    }  # fmt: skip
    msgspec.json.encode(summary.to_dict())


def test_run_leaves_nothing_for_the_garbage_collector(a_run, monkeypatch):
    """A program that runs again and again would grow by 2 MB each time until it is collected."""
    left = []

    class Kept(Findings):
        def __init__(self):
            super().__init__()
            left.append(weakref.ref(self))

    monkeypatch.setattr(runtime, "Findings", Kept)
    gc.disable()
    try:
        a_run.start(on_status=a_run.once_running(lambda s: os.kill(s.policy_pid, signal.SIGKILL)))
        assert [ref() for ref in left] == [None]
    finally:
        gc.enable()


@pytest.mark.parametrize(
    ("number", "outcome"), [(signal.SIGINT, "interrupted"), (signal.SIGTERM, "terminated")]
)
def test_run_signal_ends_well(a_run, number, outcome):
    handler = signal.getsignal(number)
    summary = a_run.start(on_status=a_run.once_running(lambda _: os.kill(os.getpid(), number)))
    assert (summary.outcome, summary.exit_code) == (outcome, 0)
    assert summary.message.endswith("the arm stands and holds")
    a_run.check_decelerated_and_holding()
    assert signal.getsignal(number) is handler


def test_run_estop_signal_holds_and_fails(a_run):
    summary = a_run.start(
        on_status=a_run.once_running(lambda _: os.kill(os.getpid(), signal.SIGUSR1))
    )
    assert (summary.outcome, summary.exit_code) == ("estop", 1)
    a_run.check_decelerated_and_holding()


def test_run_killed_policy_ends_holding(a_run):
    summary = a_run.start(
        on_status=a_run.once_running(lambda s: os.kill(s.policy_pid, signal.SIGKILL))
    )
    assert (summary.outcome, summary.exit_code) == ("crashed", 1)
    assert "policy process was killed by signal 9" in summary.message
    assert summary.message.endswith("the arm stands and holds")
    a_run.check_decelerated_and_holding()


def test_run_killed_motor_is_held_by_the_guardian(a_run):
    summary = a_run.start(
        on_status=a_run.once_running(lambda s: os.kill(s.motor_pid, signal.SIGKILL)),
        # Death itself is seen; a silent heartbeat would take longer than this test.
        guardian_timeout_s=100.0,
    )
    assert (summary.outcome, summary.exit_code) == ("crashed", 1)
    assert "the guardian sent hold" in summary.message
    t_ns, q = a_run.commands("guardian")
    assert len(q) > 1
    assert (q == q[0]).all(), "the guardian's pose must not creep"
    t_motor_ns, q_motor = a_run.commands()
    assert t_ns[0] > t_motor_ns[-1]
    # It held what it measured, which is near what was commanded last.
    assert np.abs(q[0] - q_motor[-1])[:6].max() < 0.1
    assert summary.guardian_hold_ms is not None
    a_run.check_moved_within_limits()


def test_run_hanging_motor_is_held_by_the_guardian_and_stays_silent(a_run):
    def hang(status):
        os.kill(status.motor_pid, signal.SIGSTOP)
        time.sleep(0.4)
        os.kill(status.motor_pid, signal.SIGCONT)

    summary = a_run.start(on_status=a_run.once_running(hang), guardian_timeout_s=0.1)
    assert summary.exit_code == 1
    assert "guardian" in summary.message
    t_guardian_ns, _ = a_run.commands("guardian")
    t_motor_ns, _ = a_run.commands("motor")
    # At most the one command that was on its way when it was stopped.
    assert (t_motor_ns > t_guardian_ns[0]).sum() <= 1


def test_run_killed_guardian_ends_holding(a_run):
    summary = a_run.start(
        on_status=a_run.once_running(lambda s: os.kill(s.guardian_pid, signal.SIGKILL))
    )
    assert (summary.outcome, summary.exit_code) == ("crashed", 1)
    assert "guardian process was killed" in summary.message
    a_run.check_decelerated_and_holding()


def test_run_terminated_motor_process_stops_gently(a_run):
    summary = a_run.start(
        on_status=a_run.once_running(lambda s: os.kill(s.motor_pid, signal.SIGTERM))
    )
    assert summary.message.endswith("the arm stands and holds")
    a_run.check_decelerated_and_holding()


def test_run_policy_answering_nan_ends_holding(a_run):
    summary = a_run.start(script="nan", policy={"after_n": 25})
    assert (summary.outcome, summary.exit_code) == ("held", 1)
    assert "not finite" in summary.message
    assert summary.n_rejected_chunks["not_finite"] >= 3
    a_run.check_decelerated_and_holding()


def test_run_policy_raising_ends_holding(a_run):
    summary = a_run.start(script="crash", policy={"after_n": 25})
    assert summary.exit_code == 1
    assert "scripted crash" in summary.message
    a_run.check_decelerated_and_holding()


def test_run_policy_that_stops_answering_ends_holding(a_run):
    a_run.spec = make_spec(n_rows=16)
    summary = a_run.start(script="wait", policy={"after_n": 25})
    assert (summary.outcome, summary.exit_code) == ("held", 1)
    assert "plan is used up" in summary.message
    a_run.check_decelerated_and_holding()


def test_run_synchronous_policy_that_stops_answering_ends(a_run, monkeypatch):
    """The arm stands and waits for the next plan: nothing ever ran out, and the run never ended."""
    monkeypatch.setattr("gwp_edge.supervisor._PLAN_TIMEOUT_S", 0.5)
    a_run.spec = make_spec(n_rows=16)
    motor = dataclasses.replace(MOTOR, synchronous=True)
    summary = a_run.start(script="wait", policy={"after_n": 6}, motor=motor, synchronous=True)
    assert (summary.outcome, summary.exit_code) == ("held", 1)
    assert "no plan for 0 s, the policy hangs" in summary.message


def test_run_camera_stall_ends_holding(a_run):
    a_run.spec = make_spec(n_rows=48)
    summary = a_run.start(faults=[{"kind": "camera-freeze", "at_s": 0.5}])
    assert (summary.outcome, summary.exit_code) == ("held", 1)
    assert "camera" in summary.message
    assert summary.n_stale_observations >= 1
    a_run.check_decelerated_and_holding()


def test_run_short_camera_stall_resumes(a_run):
    summary = a_run.start(
        faults=[{"kind": "camera-freeze", "at_s": 0.3, "for_s": 1.0}],
        duration_s=2.5,
        recover_timeout_s=20.0,
    )
    assert (summary.outcome, summary.exit_code) == ("duration", 0)
    assert summary.n_holds == 1
    assert a_run.modes.count(Mode.RUN) >= 2
    a_run.check_decelerated_and_holding()


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("arm-fault", "joint driver error"),
        ("feedback-error", "connection lost"),
        ("send-failure", "cannot send"),
        ("nan-state", "not finite"),
        ("camera-failure", "unplugged"),
        ("stuck", "does not follow"),
    ],
)
def test_run_device_fault_ends_and_says_so(a_run, kind, words):
    policy = {"amplitude": 0.8, "swing_s": 2.0} if kind == "stuck" else {}
    summary = a_run.start(faults=[{"kind": kind, "at_s": 0.4}], policy=policy)
    assert summary.exit_code == 1
    assert words in summary.message
    a_run.check_moved_within_limits()


def test_run_error_inside_the_motor_process_brakes_and_ends(a_run):
    """Nothing of the state machine is trusted then: limiter and driver bring the arm to rest."""
    summary = a_run.start(faults=[{"kind": "driver-bug", "at_s": 0.43}])
    assert summary.exit_code == 1
    assert "RuntimeError: kinematic arm: planned bug of a driver" in summary.message
    assert "NOBODY HOLDS" not in summary.message
    a_run.check_decelerated_and_holding()


def test_run_dry_run_commands_nothing(a_run):
    summary = a_run.start(motor=dataclasses.replace(MOTOR, dry_run=True), duration_s=0.3)
    assert summary.exit_code == 0
    assert summary.message.endswith("the arm was not moved")
    assert summary.n_chunks > 0
    assert not a_run.log.with_name("commands.motor").exists()


def test_run_failed_check_moves_nothing(a_run):
    a_run.spec = make_spec()
    summary = a_run.start(script="nan", duration_s=1.0)
    assert (summary.outcome, summary.exit_code) == ("refused", 1)
    assert "first action: the plan is not finite" in summary.message
    assert not a_run.log.with_name("commands.motor").exists()


def test_run_missing_policy_is_refused_with_its_name(a_run):
    summary = run(
        RunOptions(
            spec=a_run.spec,
            robot=load_robot("kinematic", a_run.spec),
            policy=PolicyOptions(factory="gwp_edge.testing:no_such_policy"),
            motor=MOTOR,
        )
    )
    assert summary.exit_code == 1
    assert "no_such_policy" in summary.message


def test_run_keys_hold_resume_and_park(a_run):
    state = {"holding": False, "resumed": False, "status": None}

    def keys():
        status = state["status"]
        if status is None:
            return None
        if status.mode is Mode.RUN and not state["holding"]:
            state["holding"] = True
            return Key.HOLD
        if status.hold_reason is HoldReason.OPERATOR and not state["resumed"]:
            state["resumed"] = True
            return Key.RESUME
        if status.mode is Mode.RUN and state["resumed"]:
            return Key.QUIT
        return None

    summary = a_run.start(keys=keys, on_status=lambda s: state.update(status=s), interactive=True)
    assert (summary.outcome, summary.exit_code) == ("parked", 0)
    assert summary.n_holds == 1
    a_run.check_decelerated_and_holding()
