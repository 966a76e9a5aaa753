"""The process that owns a LeRobot robot, as the world of a run: started first, ended last."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import msgspec

from gwp_edge.drivers.lerobot_options import SOCKET_KEY, FeatureMap, LerobotOptions
from gwp_edge.errors import DeviceError, DeviceTimeoutError, SpecError
from gwp_edge.spec import PolicySpec

logger = logging.getLogger(__name__)

_SERVER: Final = Path(__file__).resolve().with_name("lerobot_server.py")
_POLL_S: Final = 0.005
_END_S: Final = 5.0


class LerobotWorld:
    """The process that owns the robot. Threads: one owner."""

    def __init__(self, options: LerobotOptions, features: FeatureMap, spec: PolicySpec) -> None:
        self._options = options
        self._features = features
        if strangers := sorted(set(options.cameras) - set(spec.cameras)):
            raise SpecError(
                f"cameras: {', '.join(strangers)} is no role of the policy; it has "
                f"{', '.join(spec.cameras)}"
            )
        self._process: subprocess.Popen[bytes] | None = None
        self._folder: Path | None = None

    @property
    def process_id(self) -> int:
        """Of the process that owns the robot."""
        return self._running().pid

    def start(self) -> Mapping[str, object]:
        """Start lerobot, connect the robot; return where it is to be reached.

        Raises:
            DeviceError: it ended or did not connect in time; says its last line.
        """
        options = self._options
        self._folder = Path(tempfile.mkdtemp(prefix="gwp-lerobot-"))
        path = self._folder / "socket"
        told = {
            "type": options.type,
            "config": options.config,
            "plugins": options.plugins,
            "features": self._features.features,
            "cameras": options.cameras,
            "rate_hz": options.rate_hz,
            "patience_s": options.patience_s,
            "socket": str(path),
            "parent_pid": os.getpid(),
        }
        try:
            with open(self._folder / "log", "wb") as log:
                # A session of its own: Ctrl-C is for the supervisor, which ends this one last.
                self._process = subprocess.Popen(
                    [options.python, str(_SERVER)],
                    stdin=subprocess.PIPE,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                )
            stdin = self._process.stdin
            if stdin is not None:
                with contextlib.suppress(BrokenPipeError), stdin:
                    stdin.write(json.dumps(told).encode() + b"\n")
            deadline_s = time.monotonic() + options.connect_timeout_s
            while not path.exists():
                self.check()
                if time.monotonic() > deadline_s:
                    raise DeviceTimeoutError(
                        f"LeRobot robot {options.type} did not connect in "
                        f"{options.connect_timeout_s:g} s: {self._last_line()}"
                    )
                time.sleep(_POLL_S)
        except OSError as e:
            self.close()
            raise DeviceError(
                f"cannot start {options.python} ({e.strerror}); set the option python to the "
                "interpreter that has lerobot"
            ) from e
        except DeviceError:
            self.close()
            raise
        return {**_as_dict(options), SOCKET_KEY: str(path)}

    def check(self) -> None:
        """Return while the process lives.

        Raises:
            DeviceError: it ended; says its last line.
        """
        process = self._running()
        if process.poll() is not None:
            raise DeviceError(
                f"the process of LeRobot robot {self._options.type} ended with "
                f"{process.returncode}: {self._last_line()}"
            )

    def close(self) -> None:
        """End the process, which leaves the robot holding; safe to call twice."""
        if self._process is not None:
            self._process.terminate()
            try:
                self._process.wait(_END_S)
            except subprocess.TimeoutExpired:
                logger.warning("the LeRobot process hangs and is killed; servos keep their target")
                self._process.kill()
                self._process.wait()
            self._process = None
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = None

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is None:
            raise DeviceError("the LeRobot world is not running; call start first")
        return self._process

    def _last_line(self) -> str:
        if self._folder is None:
            return "no output"
        lines = (self._folder / "log").read_text("utf-8", "replace").strip().splitlines()
        return lines[-1] if lines else "no output"


def _as_dict(options: LerobotOptions) -> dict[str, object]:
    as_dict: dict[str, object] = msgspec.to_builtins(options)
    return as_dict
