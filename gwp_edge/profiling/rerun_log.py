"""Live logging to Rerun: a watcher of a run that hands everything to a process of its own."""

from __future__ import annotations

import contextlib
import importlib.util
import ipaddress
import multiprocessing
import multiprocessing.process
import socket
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

from gwp_edge.child_process import start_shielded
from gwp_edge.errors import DeviceError, SpecError
from gwp_edge.profiling.rerun_process import RerunSetup, rerun_main
from gwp_edge.shared_memory import SHM_DIR, unique_name
from gwp_edge.spec import PolicySpec

DEFAULT_URL: Final = "rerun+http://127.0.0.1:9876/proxy"
_START_TIMEOUT_S: Final = 60.0
_STOP_TIMEOUT_S: Final = 30.0
_CONNECT_TIMEOUT_S: Final = 2.0


class RerunLogger:
    """The run's handle on its Rerun process; a ``runtime.Watcher``. Threads: one owner.

    Args:
        target: a file ending in ``.rrd``, ``viewer`` for the one of this machine, or its URL.
        spec: of the policy.

    Attributes:
        tap_name: what the policy process is to write to.
        problems: what went wrong, one line each.

    Raises:
        SpecError: the target is neither, or a viewer of another machine.
        DeviceError: the library is missing, or no viewer listens.
    """

    def __init__(self, target: str, spec: PolicySpec) -> None:
        if importlib.util.find_spec("rerun") is None:
            raise DeviceError("--rerun needs rerun-sdk: pip install 'gwp-edge[rerun]'")
        self.tap_name = unique_name("tap")
        self.problems: list[str] = []
        self._target = target
        self._spec = spec
        self._file, self._url = parse_target(target)
        if self._url is not None:
            _check_viewer(self._url)
        self._n_runs = 0
        self._pipe: Connection | None = None
        self._process: multiprocessing.process.BaseProcess | None = None

    def begin(self, board_name: str) -> None:
        """Start the process and wait for it; nothing moves yet.

        Raises:
            DeviceError: it does not start.
        """
        self._n_runs += 1
        setup = RerunSetup(
            file=self._file_of_run(),
            url=self._url,
            board=board_name,
            tap=self.tap_name,
            spec=self._spec,
        )
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(
            target=rerun_main, args=(setup, theirs), name="gwp-rerun", daemon=True
        )
        start_shielded(self._process)
        # With our copy closed, the process sees the end of the pipe when we die.
        theirs.close()
        answer = _answer(self._pipe, _START_TIMEOUT_S)
        if answer != "ready":
            self._join()
            raise DeviceError(f"--rerun {self._target}: did not start: {answer}")

    def end(self) -> None:
        """Let the process write the rest and end it; safe to call twice."""
        if self._pipe is None:
            return
        with contextlib.suppress(OSError):
            self._pipe.send("stop")
        answer = _answer(self._pipe, _STOP_TIMEOUT_S)
        if isinstance(answer, dict):
            lost = ", ".join(f"{n} {kind}" for kind, n in answer.items() if n)
            if lost:
                self.problems.append(f"--rerun {self._target}: {lost} were not logged: too slow")
        else:
            self.problems.append(f"--rerun {self._target}: is incomplete: {answer}")
        self._join()

    def _file_of_run(self) -> str | None:
        if self._file is None or self._n_runs == 1:
            return self._file
        path = Path(self._file)
        return str(path.with_name(f"{path.stem}-{self._n_runs}{path.suffix}"))

    def _join(self) -> None:
        process, self._process = self._process, None
        pipe, self._pipe = self._pipe, None
        if process is not None:
            process.join(2.0)
            if process.is_alive():
                process.kill()
                process.join()
            process.close()
        if pipe is not None:
            pipe.close()
        (SHM_DIR / self.tap_name).unlink(missing_ok=True)


def parse_target(target: str) -> tuple[str | None, str | None]:
    """Return file and URL, one of them None.

    Raises:
        SpecError: it is neither, or the viewer is not on this machine.
    """
    if target.endswith(".rrd"):
        folder = Path(target).resolve().parent
        if not folder.is_dir():
            raise SpecError(f"--rerun {target}: folder {folder} does not exist")
        return target, None
    url = DEFAULT_URL if target == "viewer" else target
    parts = urlsplit(url)
    try:
        port = parts.port
    except ValueError:
        port = None
    if parts.scheme != "rerun+http" or port is None:
        raise SpecError(
            f"--rerun {target}: expected a file ending in .rrd, viewer, or a URL such as "
            f"{DEFAULT_URL}"
        )
    if not _is_loopback(parts.hostname or ""):
        raise SpecError(
            f"--rerun {target}: pictures and motions leave this machine through a file only; "
            "expected a viewer at 127.0.0.1"
        )
    return None, url


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _check_viewer(url: str) -> None:
    parts = urlsplit(url)
    try:
        socket.create_connection(
            (parts.hostname, parts.port or 0), timeout=_CONNECT_TIMEOUT_S
        ).close()
    except OSError as e:
        raise DeviceError(
            f"--rerun: no viewer listens at {parts.hostname}:{parts.port} ({e.strerror}); start "
            "one with: rerun --bind 127.0.0.1"
        ) from e


def _answer(pipe: Connection, timeout_s: float) -> object:
    try:
        answer: object = pipe.recv() if pipe.poll(timeout_s) else "no answer"
    except (EOFError, OSError):
        return "its process ended"
    return answer
