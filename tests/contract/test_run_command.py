"""``gwp-edge run`` with a real bundle: what it prints, writes and exits with."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.export


def start(bundle, *words, cwd=None) -> subprocess.Popen:
    command = [sys.executable, "-m", "gwp_edge.cli", "run", str(bundle), *map(str, words)]
    return subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=cwd,
    )


def finish(process: subprocess.Popen) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=180)
    return process.returncode, out, err


@pytest.mark.parametrize(
    ("robot", "layout"),
    [
        ("kinematic", "piper-dual"),
        ("kinematic", "piper"),
        pytest.param("sim", "piper-dual", marks=pytest.mark.sim),
        pytest.param("sim", "piper", marks=pytest.mark.sim),
    ],
)
def test_run_for_a_duration_moves_and_ends_well(exported, tmp_path, robot, layout):
    if robot == "sim":
        pytest.importorskip("mujoco")
    bundle = exported("gwp05", layout=layout)
    words = ("--robot", robot, "--duration", 1.5, "--threads", 1, "--json", tmp_path / "run.json")
    code, out, err = finish(start(bundle, *words))
    assert code == 0, err
    assert out.splitlines()[-1].endswith("the arm stands and holds")
    summary = json.loads((tmp_path / "run.json").read_text())
    assert summary["outcome"] == "duration"
    assert summary["n_chunks"] > 0
    assert summary["n_ticks"] > 50
    assert {"vision", "prefill", "denoise", "total"} <= set(summary["latency_ms"])
    assert len(summary["interventions"]) == (14 if layout == "piper-dual" else 7)
    assert next(c for c in summary["checks"] if c["name"] == "golden")["passed"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_run_stopped_by_a_signal_ends_well_and_says_so(exported, number):
    process = start(exported("gwp05"), "--robot", "kinematic", "--threads", 1)
    seen = []
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        line = process.stderr.readline()
        seen.append(line)
        if "APPROACH" in line or "RUN" in line or not line:
            break
    process.send_signal(number)
    code, out, err = finish(process)
    assert code == 0, "".join(seen) + err
    assert "holds" in out.splitlines()[-1]


def test_run_without_a_bundle_takes_the_one_here(exported, tmp_path):
    os.symlink(exported("gwp05"), tmp_path / "policy.gwp")
    command = [sys.executable, "-m", "gwp_edge.cli", "run", "--robot", "nothing"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=120)
    assert done.returncode == 1
    assert "robot 'nothing': expected" in done.stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--robot", "kinematic", "--task", "dance"), "is not in this bundle"),
        (("--robot", "kinematic", "--execution", "wild"), "--execution wild is not known"),
        (("--robot", "kinematic", "--duration", "-1"), "duration"),
        (("--robot", "piper"), "use --robot piper-dual"),
        (("--robot", "missing.toml"), "missing.toml"),
    ],
)
def test_run_with_bad_options_is_one_line_and_starts_nothing(exported, words, message):
    code, _, err = finish(start(exported("gwp05"), *words))
    assert code == 1
    lines = err.strip().splitlines()
    assert len(lines) == 1, err
    assert message in lines[0]


def test_run_on_a_built_in_arm_with_several_cameras_asks_for_their_serials(exported):
    """It started every process before it said so."""
    code, _, err = finish(start(exported("gwp05"), "--robot", "piper-dual"))
    assert code == 1
    (line,) = err.splitlines()
    assert "no serial number for cam_high, cam_left_wrist, cam_right_wrist" in line
    assert "gwp-edge cameras --write" in line


ROBOT = """
name = "two arms"
[arm]
kind = "piper"
options = { left = "can_left", right = "can_right" }
""" + "".join(
    f'[[cameras]]\nrole = "{role}"\nkind = "realsense"\noptions = {{ serial = "{i}" }}\n'
    for i, role in enumerate(("cam_high", "cam_left_wrist", "cam_right_wrist"))
)


def test_run_on_absent_hardware_says_what_is_missing_and_moves_nothing(exported, tmp_path):
    """No CAN interface and no camera here: refused before any motion, with the reason."""
    robot = tmp_path / "robot.toml"
    robot.write_text(ROBOT)
    code, out, err = finish(start(exported("gwp05"), "--robot", robot))
    assert code == 1
    assert "the arm was not moved" in out + err or "nothing moved" in out + err
    assert "Traceback" not in err


def test_run_leaves_no_shared_memory_behind(exported):
    before = set(Path("/dev/shm").glob("gwp-*"))
    process = start(exported("gwp05"), "--robot", "kinematic", "--duration", 0.5, "--threads", 1)
    pid = process.pid
    finish(process)
    left = {p for p in set(Path("/dev/shm").glob("gwp-*")) - before if f"{pid}" in p.name}
    assert not left
