"""What the command line shares: one-line errors, progress bars, JSON and tables.

Progress and remarks go to stderr, so that stdout holds the answer alone.
"""

from __future__ import annotations

import io
import json
import os
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from gwp_edge.errors import GwpError, SpecError

EXIT_FAILED = 1
EXIT_INTERRUPTED = 130


def open_closed_streams() -> None:
    """Open the null device where the caller closed a standard stream, as by ``>&-``.

    The work is done all the same, and no file of it gets the number of a standard stream.
    """
    for name in ("stdin", "stdout", "stderr"):
        if getattr(sys, name) is None:
            descriptor = os.open(os.devnull, os.O_RDWR)  # the lowest number that is free
            os.set_inheritable(descriptor, True)  # noqa: FBT003 - positional only
            mode = "r" if name == "stdin" else "w"
            setattr(sys, name, os.fdopen(descriptor, mode, encoding="utf-8"))


def fail(message: str, code: int = EXIT_FAILED) -> NoReturn:
    """Print a one-line error and exit."""
    sys.stderr.write(f"gwp-edge: {' '.join(message.split())}\n")
    raise SystemExit(code)


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Turn the project's errors, and what the system says about files, into one line."""
    try:
        yield
    except GwpError as e:
        # A list of many findings keeps its lines; the first one sums it up.
        sys.stderr.write(f"gwp-edge: {e}\n")
        raise SystemExit(EXIT_FAILED) from e
    except (OSError, MemoryError) as e:
        fail(f"{type(e).__name__}: {e}")
    except KeyboardInterrupt:
        fail("interrupted", EXIT_INTERRUPTED)
    except Interrupted:
        fail("interrupted; nothing was left behind", EXIT_INTERRUPTED)


class Interrupted(BaseException):
    """Ctrl-C or a polite kill, on its way out through every clean-up."""


def raise_on_signals(error: type[BaseException] = Interrupted) -> None:
    """Let what asks for an end raise ``error``, so that a kill cleans up like Ctrl-C."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        del number, frame
        raise error

    for asks in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(asks, interrupt)


@contextmanager
def progress_bars() -> Iterator[Callable[[str, int, int], None]]:
    """Give a function (stage, done, total) that draws one bar for each stage on stderr."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

    bars: dict[str, TaskID] = {}
    columns = (
        TextColumn("{task.description:24s}"),
        BarColumn(),
        TextColumn("{task.percentage:3.0f} %"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as progress:

        def report(stage: str, done: int, total: int) -> None:
            if stage not in bars:
                bars[stage] = progress.add_task(stage, total=max(total, 1))
            progress.update(bars[stage], completed=done if total else 1, total=max(total, 1))

        yield report


def say(text: str) -> None:
    """Print one line of the answer."""
    sys.stdout.write(f"{text}\n")


def remark(text: str) -> None:
    """Print a line that is not part of the answer."""
    sys.stderr.write(f"{text}\n")


def say_json(value: object) -> None:
    """Print the answer as JSON."""
    sys.stdout.write(json.dumps(value, indent=2) + "\n")


def say_table(title: str, header: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print a table; numbers stand to the right."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for i, name in enumerate(header):
        numeric = all(isinstance(row[i], (int, float)) for row in rows) and bool(rows)
        table.add_column(name, justify="right" if numeric else "left")
    for row in rows:
        table.add_row(*(str(cell) for cell in row))
    Console().print(table)


def require_writable(*paths: Path | None) -> None:
    """Check that files can be written there, before the work whose result they are for.

    Raises:
        SpecError: the folder is not there or not writable, the path is a folder, or two are one.
    """
    given = [path for path in paths if path is not None]
    targets = [path.resolve() for path in given]
    for path in given:
        if targets.count(path.resolve()) > 1:
            raise SpecError(f"{path}: was named for two files; name another one")
        is_stream = _is_stream(path)
        folder = path.resolve().parent
        if not is_stream and not folder.is_dir():
            raise SpecError(f"{path}: folder {folder} does not exist; make it first")
        if path.is_dir():
            raise SpecError(f"{path}: this is a folder; name a file")
        if is_stream and not os.access(path, os.W_OK):
            raise SpecError(f"{path}: cannot be written; name another file")
        if not is_stream and not os.access(folder, os.W_OK):
            raise SpecError(f"{path}: folder {folder} cannot be written")


def write_file(path: Path, write: Callable[[Any], None]) -> None:
    """Write a file beside its place and rename it there; a link to a file stays a link.

    What is there and no regular file, such as a device, a pipe or standard output, is written to.

    Args:
        path: where it goes.
        write: called with the open binary file.

    Raises:
        SpecError: the folder is not there or cannot be written.
    """
    target = path.resolve()
    is_stream = _is_stream(path)
    if not is_stream and not target.parent.is_dir():
        raise SpecError(f"{path}: folder {target.parent} does not exist")
    try:
        if is_stream:
            _write_through(path, write)
        else:
            _write_beside(target, write)
    except OSError as e:
        raise SpecError(f"{path}: cannot be written: {e.strerror}") from e


def _is_stream(path: Path) -> bool:
    """Whether a rename to ``path`` would put a file in the place of something else."""
    if path.is_dir():
        return False
    return (path.exists() and not path.is_file()) or _standard_stream(path) is not None


def _standard_stream(path: Path) -> int | None:
    """Return the descriptor of standard output or error where ``path`` is the same file."""
    for number in (1, 2):
        with suppress(OSError):
            if os.path.samestat(os.fstat(number), path.stat()):
                return number
    return None


def _write_through(path: Path, write: Callable[[Any], None]) -> None:
    whole = io.BytesIO()  # a pipe has no position, which numpy asks for
    write(whole)
    number = _standard_stream(path)
    if number is None:
        path.write_bytes(whole.getvalue())
        return
    # Opened again it would begin at its first byte, over what was said before.
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            stream.flush()
    with os.fdopen(os.dup(number), "wb") as file:
        file.write(whole.getvalue())


def _write_beside(target: Path, write: Callable[[Any], None]) -> None:
    with tempfile.NamedTemporaryFile(
        dir=target.parent, prefix=f".{target.name}.", delete=False
    ) as file:
        try:
            write(file)
            file.flush()
            os.chmod(file.name, 0o644)
            os.replace(file.name, target)
        except BaseException:
            os.unlink(file.name)
            raise


def write_json(path: Path, value: object) -> None:
    """Write ``value`` as a JSON file, whole or not at all."""
    text = json.dumps(value, indent=2) + "\n"
    write_file(path, lambda file: file.write(text.encode()))
