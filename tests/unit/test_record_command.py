"""``record`` is ``run`` with a recording, and takes its options."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from gwp_edge.cli import app
from gwp_edge.commands import running
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
