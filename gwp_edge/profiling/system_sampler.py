"""What the system does meanwhile: load and clock of every core, memory, heat, fans, bus counters.

Reads small files of /proc and /sys through the doctor's ``System``; ``jetson_stats`` adds what only
a Jetson tells. PSS is read from one process at a time, every five seconds: the kernel walks all
pages of the process for it, and that takes longer than everything else here together.
"""

from __future__ import annotations

import os
import re
import time
from dataclasses import dataclass
from typing import Final

from gwp_edge.doctor.system import LocalSystem, System, read_int
from gwp_edge.profiling.jetson_stats import JetsonSource, open_jetson_source

_PAGE_BYTES: Final = os.sysconf("SC_PAGE_SIZE")
_TICKS_PER_S: Final = os.sysconf("SC_CLK_TCK")
_PSS_EVERY_NS: Final = 5_000_000_000
# As ``/sys/class/net/*/type`` says it, ARPHRD_CAN: an interface may have any name.
_CAN_DEVICE: Final = "280"
CAN_COUNTERS: Final = (
    "rx_packets",
    "tx_packets",
    "rx_errors",
    "tx_errors",
    "rx_dropped",
    "tx_dropped",
    "rx_over_errors",
)


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
        jetson: ask jetson-stats or tegrastats where there is one.

    Attributes:
        pids: processes to follow, by name; 0 for none. What those have started is summed up as
            ``helpers``.
        foreign: processes that were started from here and are to count as other programs.
        helper_s: processor time of the threads and processes that sampling itself has started.
    """

    def __init__(self, system: System | None = None, *, jetson: bool = True) -> None:
        self._system = system or LocalSystem()
        self.pids: dict[str, int] = {}
        self.foreign: frozenset[int] = frozenset()
        self.helper_s = 0.0
        self._t_ns: list[int] = []
        self._rows: list[dict[str, float]] = []
        self._throttled: dict[str, None] = {}
        self._cpu_before: dict[str, tuple[int, int]] = {}
        self._process_before: dict[str, tuple[int, int, int, int]] = {}
        self._clocks = self._system.glob("/sys/devices/system/cpu/cpu[0-9]*/cpufreq")
        self._zones = self._readable_zones()
        self._coolers = self._system.glob("/sys/class/thermal/cooling_device*")
        self._buses = [
            f"{net}/statistics"
            for net in self._system.glob("/sys/class/net/*")
            if (self._system.read(f"{net}/type") or "").strip() == _CAN_DEVICE
        ]
        self._fans = self._readable_fans()
        threads = self._threads()
        self._jetson: JetsonSource | None = open_jetson_source() if jetson else None
        self._helper_threads = self._threads() - threads
        self._ticks_before: dict[int, int] = {}
        self._t_pss_ns = 0
        self._n_pss = 0

    @property
    def newest(self) -> dict[str, float]:
        """The newest sample; empty before the first. Any thread may ask."""
        return self._rows[-1] if self._rows else {}

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
        self._take_helpers(row, now_ns)
        if now_ns - self._t_pss_ns >= _PSS_EVERY_NS:
            self._take_pss(row, now_ns)
        self._take_heat(row)
        for bus in self._buses:
            name = bus.split("/")[-2]
            for counter in CAN_COUNTERS:
                _put(row, f"{name}_{counter}", read_int(self._system, f"{bus}/{counter}"))
        for name, path in self._fans:
            _put(row, name, read_int(self._system, path))
        if self._jetson is not None:
            row.update(self._jetson.read())
        self._t_ns.append(now_ns)
        self._rows.append(row)

    def samples(self) -> SystemSamples:
        """Return all samples so far."""
        sources = ["/proc", "/sys"] + ([self._jetson.name] if self._jetson is not None else [])
        return SystemSamples(
            t_ns=list(self._t_ns),
            rows=list(self._rows),
            throttled=tuple(self._throttled),
            sources=tuple(sources),
        )

    def close(self) -> None:
        """End what was started; safe to call twice."""
        if self._jetson is not None:
            self._jetson.close()

    def _readable_zones(self) -> list[tuple[str, str]]:
        zones: list[tuple[str, str]] = []
        for zone in self._system.glob("/sys/class/thermal/thermal_zone*"):
            if read_int(self._system, f"{zone}/temp") is not None:
                number = zone.rsplit("/", 1)[-1]
                label = self._system.read(f"{zone}/type") or number
                if any(name == f"{label}_c" for name, _ in zones):  # several may be of one type
                    label = f"{label}_{number.removeprefix('thermal_')}"
                zones.append((f"{label}_c", f"{zone}/temp"))
        return zones

    def _readable_fans(self) -> list[tuple[str, str]]:
        fans = []
        for folder in self._system.glob("/sys/class/hwmon/hwmon*"):
            label = self._system.read(f"{folder}/name") or folder.rsplit("/", 1)[-1]
            for file, unit in (("fan1_input", "rpm"), ("rpm", "rpm"), ("pwm1", "pwm")):
                if read_int(self._system, f"{folder}/{file}") is not None:
                    fans.append((f"{label}_{unit}", f"{folder}/{file}"))
        return fans

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
            fields = self._stat(f"{pid}") if pid else []
            if not fields:
                continue
            minor, major, cpu = int(fields[7]), int(fields[9]), _cpu_ticks(fields)
            row[f"{name}_rss_mb"] = int(fields[21]) * _PAGE_BYTES / 2**20
            before = self._process_before.get(name)
            self._process_before[name] = (now_ns, cpu, minor, major)
            if before is not None and now_ns > before[0]:
                elapsed_s = (now_ns - before[0]) / 1e9
                row[f"{name}_cpu_percent"] = 100.0 * (cpu - before[1]) / _TICKS_PER_S / elapsed_s
                row[f"{name}_minor_faults"] = float(minor - before[2])
                row[f"{name}_major_faults"] = float(major - before[3])

    def _stat(self, process: str) -> list[str]:
        """Return the fields of a process or thread after its name; empty where it is gone."""
        text = self._system.read(f"/proc/{process}/stat")
        # The name in parentheses may hold anything, spaces and parentheses too.
        return text.rpartition(")")[2].split() if text else []

    def _threads(self) -> frozenset[str]:
        return frozenset(t.rsplit("/", 1)[-1] for t in self._system.glob("/proc/self/task/*"))

    def _take_helpers(self, row: dict[str, float], now_ns: int) -> None:
        """Add up what the followed processes have started, and what sampling has started."""
        known = {pid for pid in self.pids.values() if pid}
        found: set[int] = set()
        waiting = list(known)
        while waiting:
            pid = waiting.pop()
            text = self._system.read(f"/proc/{pid}/task/{pid}/children") or ""
            new = {int(child) for child in text.split()} - known - found - self.foreign
            found |= new
            waiting += new
        ticks = {pid: _cpu_ticks(fields) for pid in found if (fields := self._stat(f"{pid}"))}
        if self._t_ns and now_ns > self._t_ns[-1] and ticks:
            spent = sum(n - self._ticks_before.get(pid, n) for pid, n in ticks.items())
            elapsed_s = (now_ns - self._t_ns[-1]) / 1e9
            row["helpers_cpu_percent"] = 100.0 * spent / _TICKS_PER_S / elapsed_s
        self._ticks_before = ticks
        if self._jetson is not None:
            mine = [f"self/task/{tid}" for tid in self._helper_threads]
            mine += [f"{pid}" for pid in self._jetson.pids]
            spent = sum(_cpu_ticks(fields) for m in mine if (fields := self._stat(m)))
            self.helper_s = max(self.helper_s, spent / _TICKS_PER_S)

    def _take_pss(self, row: dict[str, float], now_ns: int) -> None:
        """Read the share of memory of one process; the next time it is the next one's turn."""
        live = [(name, pid) for name, pid in self.pids.items() if pid]
        if not live:
            return
        self._t_pss_ns = now_ns
        name, pid = live[self._n_pss % len(live)]
        self._n_pss += 1
        text = self._system.read(f"/proc/{pid}/smaps_rollup") or ""
        found = re.search(r"^Pss:\s+(\d+) kB", text, re.MULTILINE)
        _put(row, f"{name}_pss_mb", int(found[1]) / 1024 if found is not None else None)

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


def _cpu_ticks(fields: list[str]) -> int:
    return int(fields[11]) + int(fields[12])


def _put(row: dict[str, float], name: str, value: float | None) -> None:
    if value is not None:
        row[name] = float(value)
