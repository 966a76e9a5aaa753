"""What a command is given is judged before it works for minutes, or moves an arm."""

import os
import re
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from gwp_edge import motor_process, preflight, preflight_machine
from gwp_edge.cli import app
from gwp_edge.commands.execution import CHECKS
from gwp_edge.console import require_writable
from gwp_edge.errors import SpecError
from gwp_edge.observation_file import load_observation
from gwp_edge.policy import load
from gwp_edge.testing import make_spec


def error_of(*words):
    done = CliRunner().invoke(app, [str(word) for word in words])
    assert isinstance(done.exception, SpecError), (done.exception, done.output)
    return str(done.exception)


@pytest.mark.parametrize(
    "words",
    [
        ("run", "policy.gwp", "--robot", "kinematic", "--json"),
        ("lag", "policy.gwp", "--robot", "kinematic", "--json"),
        ("bench", "loop", "--json"),
        ("bench", "soak", "--json"),
        ("bench", "execution", "--json"),
        ("bench", "engine", "--json-file"),
        ("cameras", "--write"),
    ],
)
def test_result_that_could_not_be_written_is_refused_before_the_work(tmp_path, words):
    """The arm moved, half an hour of faults passed, and then the figures were lost."""
    assert "does not exist; make it first" in error_of(*words, tmp_path / "no" / "x.json")
    assert "this is a folder; name a file" in error_of(*words, tmp_path)


def test_folder_that_may_not_be_written_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda _path, _mode: False)
    with pytest.raises(SpecError, match="cannot be written"):
        require_writable(None, tmp_path / "x.json")


def test_figures_that_cannot_be_written_are_printed(tmp_path, monkeypatch):
    """Files were written first, so a full disk took the figures with it."""

    def full(path, _value):
        raise SpecError(f"{path}: cannot be written: No space left on device")

    monkeypatch.setattr("gwp_edge.bench_execution.compare", lambda **_: [])
    monkeypatch.setattr("gwp_edge.commands.benchmarks.write_json", full)
    done = CliRunner().invoke(app, ["bench", "execution", "--json", str(tmp_path / "x.json")])
    assert isinstance(done.exception, SpecError)
    assert "Chunk execution" in done.output


@pytest.mark.parametrize("command", ["run", "profile"])
def test_check_that_no_run_has_is_refused_before_the_start(monkeypatch, command):
    """It was told when every process had been started and had checked."""
    monkeypatch.setattr("gwp_edge.manifest.read_spec", lambda _: make_spec())
    words = (command, "some.gwp", "--robot", "kinematic", "--skip-check", "can can0")
    text = error_of(*words, "--skip-check", "latnecy")
    assert text.startswith("--skip-check latnecy: no check is called so; they are ")
    assert "latency" in text


def test_every_check_that_a_run_says_may_be_skipped():
    said = set()
    for module in (preflight, preflight_machine, motor_process):
        text = Path(module.__file__).read_text()
        said |= set(re.findall(r'(?:\bname ?= ?|\bjudge\()"([^"]+)"', text))
    assert said - {"can"} <= CHECKS
    assert {"latency", "workspace", "camera pictures", "throttling"} <= said


def test_robot_file_is_not_overwritten(tmp_path):
    path = tmp_path / "robot.toml"
    path.write_text("mine")
    assert "there already" in error_of("cameras", "--write", path)
    assert path.read_text() == "mine"


def test_core_outside_of_what_is_given_may_be_asked_for(tmp_path):
    """An isolated core is in nobody's mask: that is what makes it quiet."""
    cores = os.sched_getaffinity(0)
    if len(cores) < 2:
        pytest.skip("this machine gives one core")
    try:
        os.sched_setaffinity(0, {min(cores)})
        text = error_of("run", tmp_path, "--robot", "kinematic", "--motor-cpu", max(cores))
        assert "not a bundle" in text
        assert os.sched_getaffinity(0) == {min(cores)}
    finally:
        os.sched_setaffinity(0, cores)


def test_core_that_is_not_there_is_refused(tmp_path):
    text = error_of("run", tmp_path, "--robot", "kinematic", "--motor-cpu", 4096)
    assert "--motor-cpu 4096: no program may use this core" in text


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("infer", "policy.gwp", "--threads", "100000"), "--threads"),
        (("infer", "policy.gwp", "--seed", "-1"), "--seed"),
        (("bench", "execution", "--seed", "-1"), "--seed"),
        (("bench", "soak", "--seed", "-1"), "--seed"),
    ],
)
def test_number_out_of_range_is_a_usage_error(words, told):
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 2
    assert told in done.output


def test_observation_that_is_one_array_says_so(tmp_path):
    np.save(tmp_path / "x.npy", np.zeros(3))
    with pytest.raises(SpecError, match=r"one array \(\.npy\); expected an \.npz"):
        load_observation(tmp_path / "x.npy", make_spec())


@pytest.mark.export
def test_weights_that_do_not_exist_are_refused(exported):
    pytest.importorskip("torch")
    with pytest.raises(SpecError, match="--weights zip: expected packed or mapped"):
        load(exported("gwp05"), weights="zip")


@pytest.mark.export
def test_record_and_rerun_exclude_each_other(exported, tmp_path):
    """The viewer got no plans and no pictures, and nobody said so."""
    pytest.importorskip("torch")
    words = ("--robot", "kinematic", "--record", tmp_path / "s", "--rerun", tmp_path / "a.rrd")
    assert "--record and --rerun" in error_of("run", exported("gwp05"), *words)
    assert not (tmp_path / "s").exists()


def test_file_inside_of_a_bundle_is_not_one(tmp_path):
    path = tmp_path / "manifest.json"
    path.write_text("{}")
    assert error_of("inspect", path) == f"{path}: is a file; name the folder of a bundle"
