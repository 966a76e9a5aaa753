"""Checks of the operating system, Python, memory, disks and real-time rights."""

from __future__ import annotations

import re

from gwp_edge.doctor.system import (
    CheckResult,
    Status,
    System,
    failed,
    is_jetson,
    passed,
    skipped,
    warned,
)

GIB_BYTES = 1024**3
MIB_BYTES = 1024**2

SUPPORTED_PYTHON = ((3, 10), (3, 13))
# JetPack's major version by Jetson Linux's; TensorRT's bindings come for one Python only.
JETPACK_BY_L4T = {36: 6, 38: 7, 39: 7}
PYTHON_BY_JETPACK = {6: (3, 10), 7: (3, 12)}

# A full-size policy has 5 to 6 billion parameters: about 6 GiB in INT8 before activations.
MEMORY_WARN_BYTES = 8 * GIB_BYTES
MEMORY_FAIL_BYTES = 1 * GIB_BYTES
# Three cameras of 1280 x 720 RGB with a few frames each are about 50 MB.
SHM_WARN_BYTES = 256 * MIB_BYTES
SHM_FAIL_BYTES = 64 * MIB_BYTES
# A bundle, its engines and a build's temporary files.
DISK_WARN_BYTES = 20 * GIB_BYTES
DISK_FAIL_BYTES = 2 * GIB_BYTES

MOTOR_PRIORITY = 80
CAP_IPC_LOCK = 14
_LIMITS_FILE = "/etc/security/limits.d/99-gwp-edge.conf"


def l4t_version(system: System) -> tuple[int, str] | None:
    """Return Jetson Linux's major version and its revision, such as (36, "4.3"), or None."""
    text = system.read("/etc/nv_tegra_release") or ""
    match = re.search(r"R(\d+)\s*\(release\),\s*REVISION:\s*([\d.]+)", text)
    return (int(match[1]), match[2]) if match else None


def check_operating_system(system: System) -> list[CheckResult]:
    """Name the distribution and the kernel; Linux is all that is supported."""
    text = system.read("/etc/os-release") or ""
    match = re.search(r'^PRETTY_NAME="?([^"\n]+)"?$', text, re.MULTILINE)
    kernel = system.read("/proc/sys/kernel/osrelease")
    if kernel is None:
        return skipped("operating system", "no /proc/sys/kernel/osrelease: not a Linux")
    realtime = ", PREEMPT_RT" if system.read("/sys/kernel/realtime") == "1" else ""
    name = match[1] if match else "unknown distribution"
    return passed("operating system", f"{name}, kernel {kernel}{realtime}")


def check_jetpack(system: System) -> list[CheckResult]:
    """JetPack 6 or 7 on a Jetson."""
    if not is_jetson(system):
        return skipped("jetpack", "not a Jetson (no /etc/nv_tegra_release)")
    model = system.read("/proc/device-tree/model") or "unknown Jetson"
    l4t = l4t_version(system)
    if l4t is None:
        return warned(
            "jetpack",
            f"{model}: /etc/nv_tegra_release is missing or unreadable",
            "flash JetPack 6 or 7",
        )
    major, revision = l4t
    jetpack = JETPACK_BY_L4T.get(major)
    found = f"{model}, Jetson Linux {major}.{revision}"
    if jetpack is not None:
        installed = system.run("dpkg-query", "-W", "-f=${Version}", "nvidia-jetpack")
        exact = installed.stdout if installed is not None and installed.exit_code == 0 else ""
        return passed("jetpack", f"{found}, JetPack {exact or f'{jetpack} (by Jetson Linux)'}")
    if major < min(JETPACK_BY_L4T):
        return failed(
            "jetpack",
            f"{found}: older than JetPack 6; it has neither TensorRT 10 nor Python 3.10",
            "flash JetPack 6 (Orin) or 7 (Thor)",
        )
    return warned(
        "jetpack",
        f"{found}: newer than what gwp-edge knows (36, 38, 39)",
        "build the engines, read the golden test's result, and report what you find",
    )


def check_python(system: System) -> list[CheckResult]:
    """A supported Python, and on a Jetson the one that TensorRT's bindings are made for."""
    version = system.python_version
    name = ".".join(map(str, version))
    low, high = SUPPORTED_PYTHON
    if not low <= version <= high:
        return failed("python", f"Python {name}; expected 3.10 to 3.13", "use another interpreter")
    l4t = l4t_version(system)
    wanted = PYTHON_BY_JETPACK.get(JETPACK_BY_L4T.get(l4t[0], 0)) if l4t else None
    if wanted is not None and version != wanted:
        wanted_name = ".".join(map(str, wanted))
        return failed(
            "python",
            f"Python {name}; this JetPack has TensorRT's bindings for {wanted_name} only",
            f"python{wanted_name} -m venv --system-site-packages .venv",
        )
    return passed("python", f"Python {name}")


def check_memory(system: System) -> list[CheckResult]:
    """Free memory; on a Jetson the GPU lives in it too."""
    text = system.read("/proc/meminfo") or ""
    kib = {m[1]: int(m[2]) for m in re.finditer(r"^(\w+):\s+(\d+) kB$", text, re.MULTILINE)}
    if "MemAvailable" not in kib or "MemTotal" not in kib:
        return skipped("memory", "/proc/meminfo does not say MemTotal and MemAvailable")
    free_bytes, total_bytes = kib["MemAvailable"] * 1024, kib["MemTotal"] * 1024
    kind = "unified memory" if is_jetson(system) else "memory"
    detail = f"{_gib(free_bytes)} of {_gib(total_bytes)} {kind} free"
    detail += f", swap {_gib(kib.get('SwapFree', 0) * 1024)} free"
    fix = "close other programs; on a Jetson also: sudo systemctl isolate multi-user.target"
    name = "memory"
    return [_by_floor(name, detail, fix, free_bytes, MEMORY_WARN_BYTES, MEMORY_FAIL_BYTES)]


def check_shared_memory(system: System) -> list[CheckResult]:
    """Room in /dev/shm, where frames and chunks cross between processes."""
    fix = "sudo mount -o remount,size=1G /dev/shm; in a container: --shm-size=1g"
    return _check_space(system, "shared memory", "/dev/shm", fix, SHM_WARN_BYTES, SHM_FAIL_BYTES)


def check_disk(system: System) -> list[CheckResult]:
    """Room in the working folder for a bundle and its engines."""
    fix = "free some space, or work on another disk"
    return _check_space(system, "disk", ".", fix, DISK_WARN_BYTES, DISK_FAIL_BYTES)


def check_realtime(system: System) -> list[CheckResult]:
    """May the motor process run under SCHED_FIFO? Tried, since limits alone do not decide."""
    name = "real-time priority"
    trial = system.run("chrt", "--fifo", str(MOTOR_PRIORITY), "true")
    limit = _limit(system, "Max realtime priority")
    found = f"limit {limit}" if limit is not None else "limit unknown"
    if trial is not None and trial.exit_code == 0:
        return passed(name, f"SCHED_FIFO {MOTOR_PRIORITY} allowed ({found})")
    if trial is None and limit is None:
        return skipped(name, "neither chrt nor /proc/self/limits to ask")
    if trial is None and (limit == "unlimited" or _at_least(limit, MOTOR_PRIORITY)):
        return passed(name, f"{found}; not tried, chrt is missing")
    detail = f"SCHED_FIFO {MOTOR_PRIORITY} refused ({found}): ticks can be late by milliseconds"
    return warned(name, detail, _limits_fix(f"rtprio {MOTOR_PRIORITY}"))


def check_locked_memory(system: System) -> list[CheckResult]:
    """May the motor process lock its memory, so that no page fault delays a tick?"""
    name = "locked memory"
    status = system.read("/proc/self/status") or ""
    match = re.search(r"^CapEff:\s*([0-9a-fA-F]+)", status, re.MULTILINE)
    if match and int(match[1], 16) >> CAP_IPC_LOCK & 1:
        return passed(name, "allowed without limit (CAP_IPC_LOCK)")
    limit = _limit(system, "Max locked memory")
    if limit is None:
        return skipped(name, "no /proc/self/limits")
    if limit == "unlimited" or _at_least(limit, GIB_BYTES):
        return passed(name, f"limit {limit}")
    detail = f"limit {limit} bytes: the motor process cannot lock its memory"
    return warned(name, detail, _limits_fix("memlock unlimited"))


def _limit(system: System, label: str) -> str | None:
    """Return the soft limit of a row of /proc/self/limits, or None."""
    text = system.read("/proc/self/limits") or ""
    match = re.search(rf"^{label}\s+(\S+)", text, re.MULTILINE)
    return match[1] if match else None


def _at_least(limit: str | None, floor: int) -> bool:
    return limit is not None and limit.isdecimal() and int(limit) >= floor


def _limits_fix(row: str) -> str:
    return f'echo "$USER - {row}" | sudo tee -a {_LIMITS_FILE}; then log out and in again'


def _check_space(
    system: System, name: str, path: str, fix: str, warn_bytes: int, fail_bytes: int
) -> list[CheckResult]:
    answer = system.run("df", "-B1", "--output=avail,size", path)
    numbers = re.search(r"(\d+)\s+(\d+)\s*$", answer.stdout) if answer is not None else None
    if numbers is None:
        return skipped(name, f"df does not know the free space of {path}")
    free_bytes, total_bytes = int(numbers[1]), int(numbers[2])
    detail = f"{_gib(free_bytes)} of {_gib(total_bytes)} free in {path}"
    return [_by_floor(name, detail, fix, free_bytes, warn_bytes, fail_bytes)]


def _by_floor(
    name: str, detail: str, fix: str, value: int, warn_below: int, fail_below: int
) -> CheckResult:
    status: Status = "pass"
    if value < warn_below:
        status = "warn"
        detail += f"; {_gib(warn_below)} advised"
    if value < fail_below:
        status = "fail"
    return CheckResult(name=name, status=status, detail=detail, fix="" if status == "pass" else fix)


def _gib(n_bytes: int) -> str:
    if n_bytes < GIB_BYTES:
        return f"{n_bytes / MIB_BYTES:.0f} MiB"
    return f"{n_bytes / GIB_BYTES:.1f} GiB"
