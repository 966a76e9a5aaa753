"""What the command line writes: files that keep what they replace, and answers in order."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest

from gwp_edge.console import (
    EXIT_INTERRUPTED,
    one_line_errors,
    require_writable,
    write_file,
    write_json,
)
from gwp_edge.errors import SpecError


@pytest.fixture
def pipe(tmp_path):
    """A named pipe with a reader that does not wait; gives (path, function that reads it)."""
    path = tmp_path / "pipe"
    os.mkfifo(path)
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    yield path, lambda: os.read(descriptor, 65536)
    os.close(descriptor)


@pytest.mark.parametrize("is_there", [True, False])
def test_link_to_a_file_stays_and_its_target_is_written(tmp_path, is_there):
    """The link was replaced by a file, and its target kept the answer of the day before."""
    (tmp_path / "there").mkdir()
    target, link = tmp_path / "there" / "real.json", tmp_path / "link.json"
    if is_there:
        target.write_text("yesterday")
    link.symlink_to("there/real.json")
    require_writable(link)
    write_json(link, [1])
    assert link.is_symlink()
    assert json.loads(target.read_text()) == [1]
    assert [p.name for p in target.parent.iterdir()] == ["real.json"]


def test_two_names_of_one_file_are_refused(tmp_path):
    (tmp_path / "link").symlink_to("a")
    require_writable(tmp_path / "a", None, tmp_path / "b")
    with pytest.raises(SpecError, match="a: was named for two files"):
        require_writable(tmp_path / "a", None, tmp_path / "link")


def test_link_whose_write_fails_leaves_its_target_as_it_was(tmp_path):
    target, link = tmp_path / "real.json", tmp_path / "link.json"
    target.write_text("yesterday")
    link.symlink_to(target)

    def fail(_file):
        raise OSError(28, "No space left on device")

    with pytest.raises(SpecError, match="cannot be written: No space left on device"):
        write_file(link, fail)
    assert target.read_text() == "yesterday"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["link.json", "real.json"]


def test_pipe_is_written_to_and_not_replaced(pipe):
    """As root, ``--out /dev/null`` made a regular file of the device."""
    path, read = pipe
    require_writable(path)
    write_json(path, {"a": 1})
    assert path.is_fifo()
    assert json.loads(read()) == {"a": 1}


def test_array_goes_through_a_pipe(pipe):
    path, read = pipe
    write_file(path, lambda file: np.save(file, np.arange(3)))
    assert read().startswith(b"\x93NUMPY")


def test_pipe_in_a_folder_that_may_not_be_written_is_no_obstacle(pipe, monkeypatch):
    path, _ = pipe
    monkeypatch.setattr(os, "access", lambda given, _mode: given == path)
    require_writable(path)


def test_folder_is_refused_in_one_line(tmp_path):
    with pytest.raises(SpecError, match="cannot be written: Is a directory"):
        write_json(tmp_path, [])


@pytest.mark.parametrize("to_file", [True, False])
def test_standard_output_by_name_comes_between_what_is_said(tmp_path, to_file):
    """A redirected one was replaced under the feet of what was said after it."""
    code = (
        "from pathlib import Path\n"
        "from gwp_edge.console import require_writable, say, write_json\n"
        "path = Path('/dev/stdout')\n"
        "require_writable(path)\n"
        "say('before')\n"
        "write_json(path, [])\n"
        "say('after')\n"
    )
    out = tmp_path / "out"
    with out.open("wb") as file:
        done = subprocess.run(
            [sys.executable, "-c", code],
            stdout=file if to_file else subprocess.PIPE,
            check=True,
            timeout=60,
        )
    assert (out.read_bytes() if to_file else done.stdout) == b"before\n[]\nafter\n"


@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&- >&- 2>&-"])
def test_command_with_closed_streams_works_and_exits_as_its_work_does(tmp_path, closed):
    """It ended in a traceback: there is no ``sys.stdout`` then."""

    def call(*words):
        return subprocess.run(
            ["sh", "-c", f'exec "$0" -m gwp_edge.cli "$@" {closed}', sys.executable, *words],
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
        )

    done = call("--version")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("gwp-edge ") is (closed == "2>&-")
    assert done.stderr == ""
    done = call("inspect", str(tmp_path))
    assert done.returncode == 1
    assert done.stdout == ""
    assert ("not a bundle" in done.stderr) is (closed == ">&-")
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("module", ["typer", "gwp_edge.commands.verifying", "gwp_edge.console"])
def test_interrupt_while_the_commands_are_imported_is_one_line(module):
    """Ctrl-C in the first moment of any command printed a traceback."""
    code = (
        "import sys\n"
        "class Finder:\n"
        "    def find_spec(self, name, *_):\n"
        f"        if name == {module!r}:\n"
        "            raise KeyboardInterrupt\n"
        "sys.meta_path.insert(0, Finder())\n"
        "import gwp_edge.cli\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == EXIT_INTERRUPTED
    assert done.stderr == "gwp-edge: interrupted\n"


def test_interrupt_outside_of_what_cleans_up_is_one_line(capsys):
    with pytest.raises(SystemExit) as exited, one_line_errors():
        raise KeyboardInterrupt
    assert exited.value.code == EXIT_INTERRUPTED
    assert capsys.readouterr().err == "gwp-edge: interrupted\n"
