"""The runner of hardware tests, on commands that need none."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from gwp_edge.drivers.piper_fake_bus import FakeProcess
from gwp_edge.errors import SpecError

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "hil.py"
if not SCRIPT.is_file():
    pytest.skip("needs the checkout's scripts", allow_module_level=True)
_spec = importlib.util.spec_from_file_location("gwp_hil_runner", SCRIPT)
hil = importlib.util.module_from_spec(_spec)
sys.modules["gwp_hil_runner"] = hil
_spec.loader.exec_module(hil)


def entry(code: str, *, needs=(), result=False, timeout_s=60.0):
    return hil.HilTest(
        name="t",
        what="w",
        needs=needs,
        command=("python", "-c", code),
        timeout_s=timeout_s,
        result=result,
    )


def test_list_every_test_names_known_needs_and_commands():
    tests = hil.read_list()
    assert len({t.name for t in tests}) == len(tests) > 4
    for test in tests:
        assert test.command[0] in ("GWP", "python")
        if any("run" in word or "arm" in word for word in test.command):
            assert "bundle" in test.needs
    moving = [t for t in tests if t.command[1] == "run" and "--dry-run" not in t.command]
    assert moving
    assert all("arm" in t.needs for t in moving)


def test_list_names_what_a_command_takes():
    """A test that was ready and could only fail: no GPU, no cameras, no serial numbers."""
    for test in hil.read_list():
        words = set(test.command)
        assert ("ROBOT" in words) == ("robot" in test.needs)
        assert "trt" not in words or "gpu" in test.needs
        if "ROBOT" in words:
            assert "can" in test.needs
            # What starts a run opens the cameras as well.
            assert ("GWP" in words) == ("realsense" in test.needs)
    (moves,) = [t for t in hil.read_list() if t.name == "arm-moves"]
    environ = {"GWP_HIL_BUNDLE": "b", "GWP_ARM_ENABLE": "1"}
    assert "GWP_HIL_ROBOT" in hil.missing(moves, hil.NEEDS, environ)
    assert hil.missing(moves, hil.NEEDS, {**environ, "GWP_HIL_ROBOT": "r.toml"}) is None


def test_list_has_a_test_of_every_need_and_of_bus_and_cameras_alone():
    """No test needed a Jetson, and bus and cameras could not be tried without a bundle."""
    tests = hil.read_list()
    assert {need for test in tests for need in test.needs} == hil.NEEDS
    alone = [set(test.needs) for test in tests]
    assert {"can", "robot"} in alone
    assert {"realsense"} in alone
    (heat,) = [test for test in tests if "jetson" in test.needs]
    assert heat.timeout_s > float(heat.command[heat.command.index("--duration") + 1]) >= 300


def run_can(path):
    command = [sys.executable, str(SCRIPT.with_name("hil_can.py")), str(path)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)


def test_can_is_read_without_bundle_and_cameras(tmp_path):
    robot = tmp_path / "robot.toml"
    channel = f"unix:{tmp_path}/can"
    robot.write_text(f'name = "r"\n[arm]\nkind = "piper"\noptions = {{ can = "{channel}" }}\n')
    with FakeProcess(f"{tmp_path}/can"):
        for _ in range(5):  # a busy machine may starve the fake arm
            done = run_can(robot)
            if done.returncode == 0:
                break
        assert done.returncode == 0, done.stderr
        found = json.loads(done.stdout)
    assert len(found["position"]) == 7
    assert found["arms"][0]["firmware"]
    silent = run_can(robot)
    assert silent.returncode == 1
    assert silent.stderr.startswith("hil_can: ")


def test_can_of_another_arm_is_refused(tmp_path):
    robot = tmp_path / "robot.toml"
    robot.write_text('name = "r"\n[arm]\nkind = "kinematic"\n')
    done = run_can(robot)
    assert done.returncode == 1
    assert "reads 'piper' only" in done.stderr


def test_list_with_an_unknown_need_is_refused(tmp_path):
    path = tmp_path / "t.toml"
    path.write_text('[[test]]\nname="a"\nwhat="b"\nneeds=["moon"]\ncommand=["x"]\ntimeout_s=1\n')
    with pytest.raises(SpecError, match="moon: not known"):
        hil.read_list(path)
    path.write_text("[[test]]\nname=1\n")
    with pytest.raises(SpecError):
        hil.read_list(path)


def test_moving_the_arm_needs_its_own_word():
    test = entry("", needs=("arm",))
    assert "must not move" in hil.missing(test, frozenset({"arm"}), {})
    assert hil.missing(test, frozenset({"arm"}), {"GWP_ARM_ENABLE": "1"}) is None
    assert "does not name arm" in hil.missing(test, frozenset(), {"GWP_ARM_ENABLE": "1"})
    with_bundle = entry("", needs=("bundle",))
    assert "names no bundle" in hil.missing(with_bundle, frozenset({"bundle"}), {})


def test_outcomes_passed_failed_result_and_timeout():
    good = hil.run_test(entry("print('{\"ms\": 3}')", result=True), {})
    assert (good.status, good.result) == ("passed", {"ms": 3})
    bad = hil.run_test(entry("import sys; print('why'); sys.exit(3)"), {})
    assert (bad.status, bad.why, bad.output) == ("failed", "exit code 3", ("why",))
    dumb = hil.run_test(entry("print('no')", result=True), {})
    assert (dumb.status, dumb.why) == ("failed", "it printed no JSON")
    slow = hil.run_test(entry("import time; time.sleep(60)", timeout_s=0.2), {})
    assert slow.status == "failed"
    assert "not done after" in slow.why


PYTEST = ("python", "-m", "pytest", "-q", "-p", "no:cacheprovider", "-c", os.devnull)


def pytest_entry(path):
    return hil.HilTest(
        name="t", what="w", needs=(), command=(*PYTEST, str(path)), timeout_s=120, result=False
    )


def test_outcome_of_a_test_program_that_skips_everything_is_failed(tmp_path):
    """69 skipped cases, for want of torch, were recorded as a contract that holds."""
    path = tmp_path / "test_it.py"
    path.write_text("import pytest\ndef test_a(): pytest.skip('no torch here')\n" * 2)
    skipped = hil.run_test(pytest_entry(path), {"GWP_HIL_BUNDLE": ""})
    assert skipped.status == "failed"
    assert skipped.why == "none of 1 cases ran: no torch here"
    path.write_text("import pytest\npytest.importorskip('nothing_of_that_name')\n")
    # Skipped while it was collected: pytest says so with a code of its own.
    assert hil.run_test(pytest_entry(path), {"GWP_HIL_BUNDLE": ""}).status == "failed"
    path.write_text("import pytest\ndef test_a(): pytest.skip('b')\ndef test_c(): pass\n")
    good = hil.run_test(pytest_entry(path), {"GWP_HIL_BUNDLE": ""})
    assert (good.status, good.result["tests"], good.result["skipped"]) == ("passed", 2, 1)
    path.write_text("def test_a(): assert False\n")
    assert hil.run_test(pytest_entry(path), {"GWP_HIL_BUNDLE": ""}).status == "failed"


# Invented figures of a device that does not exist: what is tested is where they end up.
SAMPLE = {
    "schema": "gwp-edge.hil",
    "schema_version": 1,
    "created_at": "2026-12-01T10:00:00Z",
    "machine": {"system": "Linux test", "commit": "abc1234", "clock_mhz": 2201.0},
    "tests": [
        {"name": "doctor", "status": "passed", "result": {}},
        {"name": "arm-moves", "status": "skipped", "result": None},
        {
            "name": "build",
            "status": "passed",
            "result": {
                "key": {
                    "device": "Test GPU",
                    "board": "Test Board | 0",
                    "n_multiprocessors": 3,
                    "precision": "int8",
                    "tensorrt": "10.3.0",
                    "flags": {"level": "3"},
                },
                "golden_error": 0.00123,
                "timing": [
                    {"stage": "vision", "measured_ms": 1.26, "expected_ms": 1.0, "n": 7},
                    {"stage": "prefill", "measured_ms": 2.0, "expected_ms": 2.0, "n": 7},
                    {"stage": "denoise", "measured_ms": 3.0, "expected_ms": 3.0, "n": 70},
                ],
            },
        },
        {
            "name": "latency",
            "status": "passed",
            "result": {
                "context": {
                    "power_mode": "TESTMAX",
                    "warmup_s": 5.0,
                    "synchronised": "events",
                    "machine": {"temperature_c": 51.0},
                },
                "phases": {
                    "steady": {"predict": {"p50": 9, "p95": 10, "p99": 11, "max": 12, "n": 400}}
                },
            },
        },
    ],
}


def write_record(tmp_path, record, name="r.json"):
    path = tmp_path / name
    path.write_text(json.dumps(record))
    return str(path)


@pytest.fixture
def readme(tmp_path):
    path = tmp_path / "README.md"
    path.write_text(
        "before\n<!-- hil:begin, written by scripts/hil.py --table -->\n"
        "earlier figures\n<!-- hil:end -->\nafter\n"
    )
    return path


def test_table_replaces_the_marked_block_and_nothing_else(tmp_path, readme):
    record = write_record(tmp_path, SAMPLE)
    for _ in range(2):  # once more changes nothing
        assert hil.main(["--table", record, "--readme", str(readme)]) == 0
        text = readme.read_text()
    assert text.startswith("before\n<!-- hil:begin")
    assert text.endswith("<!-- hil:end -->\nafter\n")
    assert "earlier figures" not in text
    assert text.count("| Test Board / 0, 3 SM | int8 |") == 1
    assert "| 1.3 + 2.0 + 3.0 (1.0 + 2.0 + 3.0) |" in text
    assert "| 9.0 / 10.0 / 11.0 / 12.0 (n = 400) |" in text
    assert "| 0.0012 | 3 passed, 1 skipped |" in text
    for fact in (
        "TESTMAX",
        "TensorRT 10.3.0",
        "abc1234",
        "7 vision, 7 prefill, 70 denoise",
        "C 51",
    ):
        assert fact in text.split("\n- ")[1]


def test_table_says_what_was_not_measured(tmp_path, readme):
    """A failed build's or a missing latency's figures are no figures."""
    poor = json.loads(json.dumps(SAMPLE))
    poor["tests"][2]["status"] = "failed"
    del poor["tests"][3]
    records = [write_record(tmp_path, SAMPLE), write_record(tmp_path, poor, "p.json")]
    assert hil.main(["--table", *records, "--readme", str(readme)]) == 0
    row = next(x for x in readme.read_text().splitlines() if x.startswith("| Linux test"))
    assert row.count("not measured") == 4
    assert "1 passed, 1 failed, 1 skipped" in row


@pytest.mark.parametrize("fault", ["marks", "schema", "json"])
def test_table_refuses_strange_files_and_leaves_the_readme(tmp_path, readme, fault, capsys):
    if fault == "marks":
        readme.write_text("no marks here\n")
    changed = {**SAMPLE, "schema": "other"} if fault == "schema" else SAMPLE
    record = write_record(tmp_path, changed)
    if fault == "json":
        Path(record).write_text("{")
    before = readme.read_text()
    assert hil.main(["--table", record, "--readme", str(readme)]) == 2
    assert readme.read_text() == before
    assert capsys.readouterr().err.startswith("hil: ")


def test_readme_has_the_block_that_the_table_goes_to(tmp_path):
    root = SCRIPT.parents[1]
    copy = tmp_path / "README.md"
    copy.write_text((root / "README.md").read_text())
    assert hil.main(["--table", write_record(tmp_path, SAMPLE), "--readme", str(copy)]) == 0
    assert "Test Board" in copy.read_text()


def test_make_hil_needs_no_setup_and_says_where_the_environment_comes_from(tmp_path):
    """The set-up of the workstation hides JetPack's TensorRT and installs torch."""
    done = subprocess.run(
        ["make", "-n", "hil", "GWP_VENV=/nowhere"],
        cwd=SCRIPT.parents[1],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "pip" not in done.stdout
    assert "/nowhere/bin/python" in done.stdout
    assert "jetson-setup.sh" in done.stdout


def test_main_writes_a_record_and_fails_when_nothing_ran(tmp_path, monkeypatch, capsys):
    skipped = (entry("", needs=("gpu",)),)
    monkeypatch.delenv("GWP_HIL", raising=False)
    monkeypatch.setattr(hil, "read_list", lambda: skipped)
    assert hil.main(["--out", str(tmp_path)]) == 1
    (record,) = tmp_path.glob("hil-*.json")
    assert json.loads(record.read_text())["tests"][0]["status"] == "skipped"
    monkeypatch.setattr(hil, "read_list", lambda: (entry("pass"),))
    assert hil.main(["--out", str(tmp_path / "second")]) == 0
    assert "1 passed, 0 failed, 0 skipped" in capsys.readouterr().out
    monkeypatch.setenv("GWP_HIL", "gpu,moon")
    assert hil.main(["--out", str(tmp_path)]) == 2
