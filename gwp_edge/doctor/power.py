"""Checks of power mode, clocks, heat and the tools that trace them.

Not yet run on a Jetson; the formats are those of tests/data/doctor/README.md.
"""

from __future__ import annotations

import re

import msgspec

from gwp_edge.doctor.system import (
    CheckResult,
    System,
    failed,
    is_jetson,
    passed,
    read_int,
    skipped,
    warned,
)

# AGX Orin 64 GB: 171 sparse INT8 TOPS in MAXN, 41 in its default mode of 30 W.
_MODE_COST = "up to 4x slower than MAXN"
_LOCK_FIX = "sudo jetson_clocks  (after the power mode; lost at restart)"
_TRIP_MARGIN_MC = 10_000
_HOT_WITHOUT_TRIP_MC = 85_000
_FANS = ("fan",)


class _Jtop(msgspec.Struct):
    error: str = ""


def check_power_mode(system: System) -> list[CheckResult]:
    """MAXN; every other mode is a power budget that costs speed."""
    name = "power mode"
    if not is_jetson(system):
        return skipped(name, "not a Jetson")
    answer = system.run("nvpmodel", "-q")
    match = re.search(r"NV Power Mode:\s*(\S+)", answer.stdout) if answer is not None else None
    if match is None:
        return skipped(name, "nvpmodel -q gave no mode; try it as root")
    if match[1].startswith("MAXN"):
        return passed(name, match[1])
    table = system.read("/etc/nvpmodel.conf") or ""
    best = re.search(r"POWER_MODEL\s+ID=(\d+)\s+NAME=(MAXN\w*)", table)
    # The number of MAXN differs from board to board, so it is never guessed.
    fix = f"sudo nvpmodel -m {best[1]}" if best else "sudo nvpmodel -m ID, MAXN's ID in"
    fix += f"  ({best[2]}; may restart)" if best else " /etc/nvpmodel.conf (may restart)"
    return warned(name, f"{match[1]}: {_MODE_COST}", f"{fix}, then: sudo jetson_clocks")


def check_gpu_clocks(system: System) -> list[CheckResult]:
    """GPU clocks held at the power mode's maximum."""
    name = "gpu clocks"
    if not is_jetson(system):
        return skipped(name, "not a Jetson")
    nodes = [d for d in system.glob("/sys/class/devfreq/*") if "gpu" in d.rsplit("/", 1)[-1]]
    rows = []
    for node in nodes:
        low, high = (read_int(system, f"{node}/{key}_freq") for key in ("min", "max"))
        if low is not None and high is not None:
            rows.append((node.rsplit("/", 1)[-1], low, high))
    if not rows:
        return skipped(name, "no GPU with min_freq and max_freq under /sys/class/devfreq")
    detail = ", ".join(f"{gpu} {_mhz(low)} to {_mhz(high)}" for gpu, low, high in rows)
    if all(low == high for _, low, high in rows):
        return passed(name, f"held: {detail}")
    return warned(name, f"not held: {detail}; the first chunks run on a slow clock", _LOCK_FIX)


def check_memory_clock(system: System) -> list[CheckResult]:
    """Memory clock (EMC) at its maximum: a small batch is bound by memory bandwidth."""
    name = "memory clock"
    if not is_jetson(system):
        return skipped(name, "not a Jetson")
    # Thor has it in sysfs; on Orin only root sees it, through jetson_clocks.
    low, high = (read_int(system, f"/sys/class/devfreq/bwmgr/{k}_freq") for k in ("min", "max"))
    if low is not None and high is not None:
        held = low == high
        detail = f"{_mhz(low)} to {_mhz(high)}"
    else:
        answer = system.run("jetson_clocks", "--show")
        text = answer.stdout if answer is not None else ""
        match = re.search(r"EMC MinFreq=(\d+) MaxFreq=(\d+) CurrentFreq=(\d+)(.*)", text)
        if match is None:
            return skipped(name, "only root may ask: sudo jetson_clocks --show")
        low, high, now = (int(match[i]) for i in (1, 2, 3))
        held = low == high or (now == high and "FreqOverride=1" in match[4])
        detail = f"now {_mhz(now)} of {_mhz(high)}"
    if held:
        return passed(name, f"held: {detail}")
    return warned(name, f"not held: {detail}", _LOCK_FIX)


def check_cpu_clocks(system: System) -> list[CheckResult]:
    """CPU frequency held, so that the motor loop wakes at full speed."""
    name = "cpu clocks"
    folders = system.glob("/sys/devices/system/cpu/cpu[0-9]*/cpufreq")
    if not folders:
        return skipped(name, "no cpufreq in /sys: a virtual machine, or clocks are fixed")
    governors = {g for f in folders if (g := system.read(f"{f}/scaling_governor"))}
    limits = [
        (read_int(system, f"{f}/scaling_min_freq"), read_int(system, f"{f}/scaling_max_freq"))
        for f in folders
    ]
    detail = f"{len(folders)} CPUs, governor {', '.join(sorted(governors)) or 'unknown'}"
    held = all(low is not None and low == high for low, high in limits)
    if held or governors == {"performance"}:
        return passed(name, detail + (", frequency held" if held else ""))
    fix = "sudo cpupower frequency-set -g performance"
    return warned(
        name, f"{detail}: clocks follow the load", _LOCK_FIX if is_jetson(system) else fix
    )


def check_temperature(system: System) -> list[CheckResult]:
    """Every thermal zone below the point at which it slows the machine down."""
    name = "temperature"
    hottest: tuple[int, str] | None = None
    close = []
    for zone in system.glob("/sys/class/thermal/thermal_zone*"):
        now_mc = read_int(system, f"{zone}/temp")
        if now_mc is None:  # zones of parts that are switched off answer with an error
            continue
        label = system.read(f"{zone}/type") or zone.rsplit("/", 1)[-1]
        hottest = max(hottest, (now_mc, label)) if hottest else (now_mc, label)
        limit_mc = _throttle_point_mc(system, zone)
        if now_mc >= limit_mc - _TRIP_MARGIN_MC:
            close.append((now_mc, limit_mc, label))
    if hottest is None:
        return skipped(name, "no readable zone under /sys/class/thermal")
    if not close:
        return passed(name, f"hottest {hottest[1]} {_celsius(hottest[0])}")
    fix = "let it cool, set the fan to full (sudo jetson_clocks --fan), check the air flow"
    rows = (f"{label} {_celsius(now)}, slows at {_celsius(at)}" for now, at, label in close)
    over = any(now >= at for now, at, _ in close)
    return (failed if over else warned)(name, "; ".join(rows), fix)


def check_throttling(system: System) -> list[CheckResult]:
    """No part is being slowed down now, no over-current event since start."""
    name = "throttling"
    seen = False
    found = []
    for device in system.glob("/sys/class/thermal/cooling_device*"):
        state = read_int(system, f"{device}/cur_state")
        label = system.read(f"{device}/type") or ""
        if state is None:
            continue
        seen = True
        if state > 0 and not any(fan in label.lower() for fan in _FANS):
            found.append(f"{label} at step {state}")
    for counter in system.glob("/sys/class/hwmon/hwmon*/oc*_event_cnt"):
        events = read_int(system, counter)
        if events is None:
            continue
        seen = True
        if events > 0:
            found.append(f"{counter.rsplit('/', 1)[-1].split('_')[0]} {events} events since start")
    if found:
        fix = "cool it; over-current or under-voltage: a stronger supply, or a smaller power mode"
        return warned(name, "; ".join(found), fix)
    if not seen:
        return skipped(name, "neither cooling devices nor over-current counters in /sys")
    return passed(name, "none now, no over-current event since start")


def check_telemetry(system: System) -> list[CheckResult]:
    """Jetson-stats or tegrastats, from which `profile` takes power, clocks and heat."""
    name = "telemetry"
    if not is_jetson(system):
        return skipped(name, "not a Jetson")
    # As a profile opens them: the program alone, without its service or in another environment,
    # is of no use to it.
    answer = system.probe("jtop")
    facts = msgspec.json.decode(answer.stdout, type=_Jtop) if answer and answer.stdout else None
    found = ["jtop"] if facts is not None and not facts.error else []
    if system.glob("/usr/bin/tegrastats"):
        found.append("tegrastats")
    if found:
        return passed(name, " and ".join(found))
    return warned(
        name,
        "neither jtop nor /usr/bin/tegrastats: profiles will have no power, clocks and heat",
        "sudo apt-get install nvidia-l4t-tools; in a container, mount it from the host",
    )


def _throttle_point_mc(system: System, zone: str) -> int:
    """Return the lowest temperature at which this zone slows something down, millidegrees C.

    "active" trip points only turn a fan on, so they do not count.
    """
    points = []
    for kind in system.glob(f"{zone}/trip_point_*_type"):
        if system.read(kind) in ("passive", "hot", "critical"):
            at_mc = read_int(system, kind.replace("_type", "_temp"))
            if at_mc is not None and at_mc > 0:
                points.append(at_mc)
    return min(points, default=_HOT_WITHOUT_TRIP_MC)


def _mhz(hz: int) -> str:
    return f"{hz / 1e6:.0f} MHz"


def _celsius(millidegrees: int) -> str:
    return f"{millidegrees / 1000:.0f} C"
