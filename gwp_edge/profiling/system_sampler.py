"""What the system does meanwhile: load and clock of every core, memory, heat, bus counters.

Reads small files of /proc and /sys through the doctor's ``System``. On a Jetson ``tegrastats`` adds
GPU, memory clock and power rails; its lines are parsed by NVIDIA's description of them, and this
is not yet run on hardware. PSS is left out: reading it makes the kernel walk the process's pages
while the process waits.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import threading
import time
from dataclasses import dataclass, field
from typing import Final

from gwp_edge.doctor.system import LocalSystem, System, read_int

_PAGE_BYTES: Final = os.sysconf("SC_PAGE_SIZE")
_TICKS_PER_S: Final = os.sysconf("SC_CLK_TCK")
_TEGRASTATS_MS: Final = 500
_CAN_COUNTERS: Final = ("rx_packets", "tx_packets", "rx_errors", "tx_errors", "tx_dropped")


@dataclass(frozen=True, slots=True, kw_only=True)
class SystemSamples:
    """Samples in order: time on the monotonic clock, ns, and values by name with unit."""

    t_ns: list[int]
    rows: list[dict[str, float]]
    throttled: tuple[str, ...] = ()
    sources: tuple[str, ...] = ()


class SystemSampler:
    """Takes samples. Threads: one caller of ``sample``; ``pids`` may be set by another.

    Args:
        system: where files come from.
        tegrastats: run it where it is installed.

    Attributes:
        pids: processes to follow, by name; 0 for none.
    """

    def __init__(self, system: System | None = None, *, tegrastats: bool = True) -> None:
        self._system = system or LocalSystem()
        self.pids: dict[str, int] = {}
        self._t_ns: list[int] = []
        self._rows: list[dict[str, float]] = []
        self._throttled: dict[str, None] = {}
        self._cpu_before: dict[str, tuple[int, int]] = {}
        self._process_before: dict[str, tuple[int, int, int, int]] = {}
        self._clocks = self._system.glob("/sys/devices/system/cpu/cpu[0-9]*/cpufreq")
        self._zones = self._readable_zones()
        self._coolers = self._system.glob("/sys/class/thermal/cooling_device*")
        self._buses = self._system.glob("/sys/class/net/can*/statistics")
        self._tegrastats = _Tegrastats.start() if tegrastats else None

    def sample_every(self, period_s: float) -> None:
        """Take a sample if the last one is that old."""
        if not self._t_ns or time.monotonic_ns() - self._t_ns[-1] >= period_s * 1e9:
            self.sample()

    def sample(self) -> None:
        """Take one sample."""
        row: dict[str, float] = {}
        now_ns = time.monotonic_ns()
        self._take_cpus(row)
        self._take_memory(row)
        self._take_processes(row, now_ns)
        self._take_heat(row)
        for bus in self._buses:
            name = bus.split("/")[-2]
            for counter in _CAN_COUNTERS:
                _put(row, f"{name}_{counter}", read_int(self._system, f"{bus}/{counter}"))
        if self._tegrastats is not None:
            row.update(parse_tegrastats(self._tegrastats.line))
        self._t_ns.append(now_ns)
        self._rows.append(row)

    def samples(self) -> SystemSamples:
        """Return all samples so far."""
        sources = ["/proc", "/sys"] + (["tegrastats"] if self._tegrastats is not None else [])
        return SystemSamples(
            t_ns=list(self._t_ns),
            rows=list(self._rows),
            throttled=tuple(self._throttled),
            sources=tuple(sources),
        )

    def close(self) -> None:
        """End what was started; safe to call twice."""
        if self._tegrastats is not None:
            self._tegrastats.stop()

    def _readable_zones(self) -> list[tuple[str, str]]:
        zones = []
        for zone in self._system.glob("/sys/class/thermal/thermal_zone*"):
            if read_int(self._system, f"{zone}/temp") is not None:
                label = self._system.read(f"{zone}/type") or zone.rsplit("/", 1)[-1]
                zones.append((f"{label}_c", f"{zone}/temp"))
        return zones

    def _take_cpus(self, row: dict[str, float]) -> None:
        for line in (self._system.read("/proc/stat") or "").splitlines():
            name, *counts = line.split()
            if not re.fullmatch(r"cpu\d+", name):
                continue
            values = [int(c) for c in counts[:8]]
            # idle and iowait are the fourth and fifth; guest times are part of user already.
            total, idle = sum(values), sum(values[3:5])
            before = self._cpu_before.get(name)
            self._cpu_before[name] = (total, idle)
            if before is not None and total > before[0]:
                busy = 1.0 - (idle - before[1]) / (total - before[0])
                row[f"{name}_percent"] = 100.0 * busy
        for folder in self._clocks:
            khz = read_int(self._system, f"{folder}/scaling_cur_freq")
            _put(row, f"{folder.split('/')[-2]}_mhz", None if khz is None else khz / 1e3)

    def _take_memory(self, row: dict[str, float]) -> None:
        for line in (self._system.read("/proc/meminfo") or "").splitlines():
            name, _, value = line.partition(":")
            if name in ("MemAvailable", "SwapFree"):
                row[f"{name}_mb"] = int(value.split()[0]) / 1024

    def _take_processes(self, row: dict[str, float], now_ns: int) -> None:
        for name, pid in list(self.pids.items()):
            text = self._system.read(f"/proc/{pid}/stat") if pid else None
            if not text:
                continue
            # The name in parentheses may hold anything, spaces and parentheses too.
            fields = text.rpartition(")")[2].split()
            minor, major, cpu = int(fields[7]), int(fields[9]), int(fields[11]) + int(fields[12])
            row[f"{name}_rss_mb"] = int(fields[21]) * _PAGE_BYTES / 2**20
            before = self._process_before.get(name)
            self._process_before[name] = (now_ns, cpu, minor, major)
            if before is not None and now_ns > before[0]:
                elapsed_s = (now_ns - before[0]) / 1e9
                row[f"{name}_cpu_percent"] = 100.0 * (cpu - before[1]) / _TICKS_PER_S / elapsed_s
                row[f"{name}_minor_faults"] = float(minor - before[2])
                row[f"{name}_major_faults"] = float(major - before[3])

    def _take_heat(self, row: dict[str, float]) -> None:
        for name, path in self._zones:
            now_mc = read_int(self._system, path)
            _put(row, name, None if now_mc is None else now_mc / 1e3)
        for device in self._coolers:
            state = read_int(self._system, f"{device}/cur_state")
            if state:
                label = self._system.read(f"{device}/type") or device.rsplit("/", 1)[-1]
                if "fan" not in label.lower():
                    self._throttled.setdefault(label)


def _put(row: dict[str, float], name: str, value: float | None) -> None:
    if value is not None:
        row[name] = float(value)


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
class _Tegrastats:
    """A running ``tegrastats`` and its newest line. Not yet run on hardware.

    Threads: one owner; a thread of its own reads lines until the process ends.
    """

    process: subprocess.Popen[str]
    line: str = ""
    _thread: threading.Thread | None = field(default=None)

    @classmethod
    def start(cls) -> _Tegrastats | None:
        """Start it; None where it is not installed."""
        path = shutil.which("tegrastats")
        if path is None:
            return None
        process = subprocess.Popen(
            [path, "--interval", str(_TEGRASTATS_MS)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        stats = cls(process)
        stats._thread = threading.Thread(target=stats._read, name="gwp-tegrastats", daemon=True)
        stats._thread.start()
        return stats

    def _read(self) -> None:
        if self.process.stdout is not None:
            for line in self.process.stdout:
                self.line = line

    def stop(self) -> None:
        """End it; safe to call twice."""
        if self.process.poll() is None:
            self.process.terminate()
        self.process.wait(timeout=5.0)
        if self._thread is not None:
            self._thread.join(5.0)
        if self.process.stdout is not None:
            self.process.stdout.close()
