"""``record`` is ``run`` with a recording, and takes its options."""

from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from gwp_edge.cli import app
from gwp_edge.commands import running
from gwp_edge.errors import SpecError
from gwp_edge.testing import make_spec


@pytest.fixture
def started(monkeypatch):
    """What would have been run."""
    options = []
    monkeypatch.setattr("gwp_edge.manifest.read_spec", lambda _: make_spec())
    monkeypatch.setattr(running, "_run", lambda given, *_: options.append(given))
    return options


def test_record_runs_with_the_options_of_run_and_the_folder(started):
    words = ["record", "session", "some.gwp", "--robot", "kinematic", "--duration", "2"]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.output
    (options,) = started
    assert options.record == Path("session")
    assert options.duration_s == 2.0
    assert options.robot.name == "kinematic"


def test_record_with_an_option_that_run_has_not_is_refused(started):
    result = CliRunner().invoke(app, ["record", "session", "--robot", "sim", "--durations", "2"])
    assert result.exit_code != 0
    assert not started


@pytest.mark.parametrize(
    "words",
    [
        ("--robot", "kinematic", "--duration", "2", "session", "some.gwp"),
        ("--robot=kinematic", "session", "--duration=2", "some.gwp"),
        ("session", "--dry-run", "--robot", "kinematic", "some.gwp", "--duration", "2"),
    ],
)
def test_record_takes_options_in_any_place(started, words):
    """The value of an option before the folder was taken for the folder."""
    result = CliRunner().invoke(app, ["record", *words])
    assert result.exit_code == 0, result.output
    (options,) = started
    assert options.record == Path("session")
    assert options.duration_s == 2.0
    assert options.robot.name == "kinematic"
    assert options.policy.kwargs["path"] == "some.gwp"


def test_record_without_a_folder_does_not_take_the_bundle_for_it(started, tmp_path):
    bundle = tmp_path / "some.gwp"
    bundle.mkdir()
    (bundle / "manifest.json").write_text("{}")
    result = CliRunner().invoke(app, ["record", str(bundle), "--robot", "kinematic"])
    assert isinstance(result.exception, SpecError)
    assert "is a bundle; name the new folder for the recording before it" in str(result.exception)
    result = CliRunner().invoke(app, ["record", "--robot", "kinematic"])
    assert result.exit_code == 2
    assert "Missing argument" in result.output
    assert not started


def test_record_into_two_folders_is_refused(started):
    words = ["record", "session", "some.gwp", "--robot", "kinematic", "--record", "other"]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 2
    assert "--record" in result.output
    assert not started


def test_record_has_every_option_of_run():
    def options(command):
        parameters = typer.main.get_command(app).commands[command].params
        return {opt for p in parameters for opt in p.opts if opt.startswith("--")}

    assert options("record") == options("run") - {"--record"}
