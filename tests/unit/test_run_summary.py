"""What ``gwp-edge run`` prints and writes of a run that is over."""

import json

import pytest

from gwp_edge.commands import running
from gwp_edge.errors import SpecError
from gwp_edge.policy_options import PolicyOptions
from gwp_edge.robots import load_robot
from gwp_edge.run_options import RunOptions
from gwp_edge.telemetry import RunSummary
from gwp_edge.testing import make_spec


@pytest.fixture
def end(monkeypatch):
    """Let a run end with an exit code at once."""
    spec = make_spec()
    options = RunOptions(
        spec=spec, robot=load_robot("kinematic", spec), policy=PolicyOptions(factory="none:none")
    )

    def run(exit_code, json_file):
        summary = RunSummary(outcome="x", exit_code=exit_code, message="the arm holds", n_chunks=3)
        monkeypatch.setattr("gwp_edge.runtime.run", lambda *_, **__: summary)
        running._run(options, json_file, None)

    return run


@pytest.mark.parametrize("exit_code", [0, 1])
def test_summary_that_cannot_be_written_is_printed(end, tmp_path, monkeypatch, capsys, exit_code):
    """The file was written first, so a full disk took how the arm was left with it."""

    def full(path, _value):
        raise SpecError(f"{path}: cannot be written: No space left on device")

    monkeypatch.setattr(running, "write_json", full)
    with pytest.raises(SpecError, match="No space left"):
        end(exit_code, tmp_path / "run.json")
    out, err = capsys.readouterr()
    assert "3 chunks" in out
    assert "the arm holds" in out + err


def test_summary_of_a_run_that_failed_is_written(end, tmp_path):
    with pytest.raises(SystemExit) as exited:
        end(1, tmp_path / "run.json")
    assert exited.value.code == 1
    assert json.loads((tmp_path / "run.json").read_text())["n_chunks"] == 3
