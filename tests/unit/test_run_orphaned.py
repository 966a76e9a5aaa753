"""The main process of a run is killed: nobody is left to ask for the end, and the arms stand."""

import os
import signal
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path

from gwp_edge.drivers.piper_fake_bus import FakeProcess
from gwp_edge.drivers.piper_witness import WitnessPiper
from gwp_edge.shared_memory import remove_leftovers

PATIENCE_S = 60.0
MAIN = """
import sys
from gwp_edge.bench_loop import _run_options
from gwp_edge.runtime import run

def show(status):
    print(status.mode.name, status.motor_pid, status.policy_pid, status.guardian_pid, flush=True)

if __name__ == "__main__":
    left, right = sys.argv[1:]
    run(_run_options(left, right, 60.0, realtime=False, patience_ns=3 * 10**9), on_status=show)
"""


def wait_for(condition, what):
    deadline_s = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline_s, what
        time.sleep(0.02)


def is_gone(pid):
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return True
    return state == "Z"  # where nobody inherits orphans they are never collected


def start(program, channels, stack):
    """Start a run and return it with its processes once it runs.

    A second try is for a machine that does not run the driver for 100 ms: the arm then seems
    silent, and the run ends, as it should.
    """
    for _ in range(2):
        main = subprocess.Popen(
            [sys.executable, program, *channels], stdout=subprocess.PIPE, text=True
        )
        stack.callback(main.stdout.close)
        stack.callback(main.wait)
        stack.callback(main.kill)
        pids = next((line.split()[1:] for line in main.stdout if line.startswith("RUN ")), None)
        if pids:
            return main, pids
    raise AssertionError("the run ended before it ran")


def test_killed_main_process_leaves_arms_that_stand_and_no_process(tmp_path):
    program = tmp_path / "main.py"
    program.write_text(MAIN)
    with ExitStack() as stack:
        arms = [
            stack.enter_context(FakeProcess(os.fspath(tmp_path / side), WitnessPiper()))
            for side in ("left", "right")
        ]
        channels = [arm.channel for arm in arms]
        main, pids = start(program, channels, stack)
        # It may hang, in a driver or a library, and would not look for its parent.
        os.kill(int(pids[1]), signal.SIGSTOP)
        main.kill()
        main.wait()
        wait_for(lambda: all(is_gone(pid) for pid in pids), "a process of the run lives on")
        wait_for(lambda: all(a.ask("testify").is_still for a in arms), "an arm still moves")
        for arm in arms:
            seen = arm.ask("testify")
            assert seen.n_violations == 0, seen.violations
            assert seen.n_commands > 0
    remove_leftovers()
