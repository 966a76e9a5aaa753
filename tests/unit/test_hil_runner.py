"""The runner of hardware tests, on commands that need none."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest

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
    good = hil.run_test(entry("print('{\"ms\": 3}')", result=True), "")
    assert (good.status, good.result) == ("passed", {"ms": 3})
    bad = hil.run_test(entry("import sys; print('why'); sys.exit(3)"), "")
    assert (bad.status, bad.why, bad.output) == ("failed", "exit code 3", ("why",))
    dumb = hil.run_test(entry("print('no')", result=True), "")
    assert (dumb.status, dumb.why) == ("failed", "it printed no JSON")
    slow = hil.run_test(entry("import time; time.sleep(60)", timeout_s=0.2), "")
    assert slow.status == "failed"
    assert "not done after" in slow.why


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
