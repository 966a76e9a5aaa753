"""A command that is killed leaves nothing in the folder for temporary files."""

from __future__ import annotations

import os
import signal
import tempfile
from functools import partial

import pytest

from gwp_edge.commands import benching, planning
from gwp_edge.console import EXIT_INTERRUPTED, one_line_errors

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.parametrize(
    ("module", "command"),
    [
        (benching, partial(benching.bench, size="gwp05-tiny")),
        (planning, partial(planning.plan, size="gwp05-tiny", precision="fp32", check=True)),
    ],
    ids=["bench", "plan"],
)
def test_command_killed_with_random_weights_removes_them(
    tmp_path, monkeypatch, capsys, number, module, command
):
    """SIGTERM ended the program on the spot, with gigabytes left behind."""

    def killed(folder, *_):
        assert folder.parent == tmp_path
        (folder / "weights").touch()
        os.kill(os.getpid(), number)
        pytest.fail("the signal did nothing")

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(module, "_random_bundle", killed)
    with pytest.raises(SystemExit) as stopped, one_line_errors():
        command()
    assert stopped.value.code == EXIT_INTERRUPTED
    assert "interrupted" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
