"""What only a Jetson tells: GPU and memory clock, power rails, fan and power mode.

From jetson-stats (``jtop``) where its library is importable and its service answers, else from
NVIDIA's ``tegrastats``. Both are read as they are documented; not yet run on hardware.
"""

from __future__ import annotations

import logging
import re
import shutil
import subprocess
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Protocol

logger = logging.getLogger(__name__)

_PERIOD_S: Final = 0.5


class JetsonSource(Protocol):
    """Where the numbers of a Jetson come from."""

    @property
    def name(self) -> str:
        """Of the program."""
        ...

    @property
    def power_mode(self) -> str | None:
        """Name of the power mode, None where the program does not say."""
        ...

    @property
    def pids(self) -> tuple[int, ...]:
        """Processes that were started for it."""
        ...

    def read(self) -> dict[str, float]:
        """Return the newest values by name with unit; never waits."""
        ...

    def close(self) -> None:
        """End what was started; safe to call twice."""
        ...


def open_jetson_source() -> JetsonSource | None:
    """Return ``jtop``, else ``tegrastats``, else None: this is no Jetson."""
    return Jtop.start() or Tegrastats.start()


# -- jetson-stats ---------------------------------------------------------------------------------


class Jtop:
    """A client of the jetson-stats service. Not yet run on hardware.

    Threads: one owner; the library's own thread takes each answer of the service.

    Args:
        client: a started ``jtop.jtop``.
    """

    name = "jtop"

    def __init__(self, client: Any) -> None:  # noqa: ANN401 - the library has no types
        self._client = client

    @classmethod
    def start(cls) -> Jtop | None:
        """Connect; None where the library or its service is missing."""
        try:
            from jtop import JtopException, jtop
        except ImportError:
            return None
        try:
            client = jtop(interval=_PERIOD_S)
            client.start()
        except (JtopException, OSError) as e:
            logger.warning("jetson-stats is installed but does not answer: %s", e)
            return None
        return cls(client)

    @property
    def power_mode(self) -> str | None:
        """Name of the nvpmodel in force."""
        mode = self._client.nvpmodel
        return None if mode is None else str(mode.name)

    @property
    def pids(self) -> tuple[int, ...]:
        """None: the service runs with or without us."""
        return ()

    def read(self) -> dict[str, float]:
        """Return the newest answer of the service."""
        return parse_jtop(
            self._client.gpu,
            self._client.memory,
            self._client.temperature,
            self._client.power,
            self._client.fan,
        )

    def close(self) -> None:
        """Disconnect."""
        self._client.close()


def parse_jtop(
    gpu: Mapping[str, Any],
    memory: Mapping[str, Any],
    temperature: Mapping[str, Any],
    power: Mapping[str, Any],
    fan: Mapping[str, Any] | None,
) -> dict[str, float]:
    """Return the numbers of one answer of jetson-stats 4, by name with unit.

    Not yet run on hardware. What a board does not have is left out: each argument is the attribute
    of ``jtop`` of that name, clocks in kHz, loads and fan in per cent, power in mW.
    """
    row: dict[str, float] = {}
    for device in gpu.values():
        if device.get("type", "integrated") == "integrated":
            _put(row, "gpu_percent", device.get("status", {}).get("load"))
            _put(row, "gpu_mhz", device.get("freq", {}).get("cur"), 1e-3)
    emc = memory.get("EMC", {})
    _put(row, "emc_percent", emc.get("val"))
    _put(row, "emc_mhz", emc.get("cur"), 1e-3)
    for zone, sensor in temperature.items():
        if sensor.get("online", True):
            _put(row, f"{zone}_c", sensor.get("temp"))
    for rail, values in power.get("rail", {}).items():
        _put(row, f"{rail}_w", values.get("power"), 1e-3)
    _put(row, "total_w", power.get("tot", {}).get("power"), 1e-3)
    for name, values in (fan or {}).items():
        for i, percent in enumerate(values.get("speed", ())):
            _put(row, f"{name}{i}_percent", percent)
        for i, turns in enumerate(values.get("rpm", ())):
            _put(row, f"{name}{i}_rpm", turns)
    return row


def _put(row: dict[str, float], name: str, value: object, scale: float = 1.0) -> None:
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        row[name] = float(value) * scale


# -- tegrastats -----------------------------------------------------------------------------------


def parse_tegrastats(line: str) -> dict[str, float]:
    """Return the numbers of one line of ``tegrastats``, by name with unit.

    Not yet run on hardware; the fields are those that NVIDIA's developer guide describes: GPU
    load ``GR3D_FREQ 45%@[1300]``, memory clock ``EMC_FREQ 12%@3199``, temperatures ``gpu@46.5C``
    and rails ``VDD_GPU_SOC 2400mW/2400mW``, now and on average.
    """
    row: dict[str, float] = {}
    for key, name in (("GR3D_FREQ", "gpu"), ("EMC_FREQ", "emc")):
        found = re.search(rf"\b{key} (\d+)%(?:@\[?(\d+))?", line)
        if found is not None:
            row[f"{name}_percent"] = float(found[1])
            if found[2] is not None:
                row[f"{name}_mhz"] = float(found[2])
    for zone, degrees in re.findall(r"\b([A-Za-z][\w-]*)@(-?\d+(?:\.\d+)?)C\b", line):
        # A part that is switched off reports -256.
        if float(degrees) > -200:
            row[f"{zone}_c"] = float(degrees)
    for rail, now in re.findall(r"\b([A-Z][A-Z0-9_]*) (\d+)mW/\d+mW", line):
        row[f"{rail}_w"] = float(now) / 1e3
    return row


@dataclass(slots=True)
class Tegrastats:
    """A running ``tegrastats`` and its newest line. Not yet run on hardware.

    Threads: one owner; a thread of its own reads lines until the process ends.
    """

    process: subprocess.Popen[str]
    line: str = ""
    _thread: threading.Thread | None = field(default=None)

    @classmethod
    def start(cls) -> Tegrastats | None:
        """Start it; None where it is not installed."""
        path = shutil.which("tegrastats")
        if path is None:
            return None
        process = subprocess.Popen(
            [path, "--interval", str(round(_PERIOD_S * 1e3))],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        stats = cls(process)
        stats._thread = threading.Thread(target=stats._listen, name="gwp-tegrastats", daemon=True)
        stats._thread.start()
        return stats

    @property
    def name(self) -> str:
        """Of the program."""
        return "tegrastats"

    @property
    def power_mode(self) -> str | None:
        """Tegrastats does not say."""
        return None

    @property
    def pids(self) -> tuple[int, ...]:
        """That of the program."""
        return (self.process.pid,)

    def read(self) -> dict[str, float]:
        """Return the newest line's values."""
        return parse_tegrastats(self.line)

    def close(self) -> None:
        """End it; safe to call twice."""
        if self.process.poll() is None:
            self.process.terminate()
        self.process.wait(timeout=5.0)
        if self._thread is not None:
            self._thread.join(5.0)
        if self.process.stdout is not None:
            self.process.stdout.close()

    def _listen(self) -> None:
        if self.process.stdout is not None:
            for line in self.process.stdout:
                self.line = line
