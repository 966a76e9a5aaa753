"""Where the checks get their facts: files, commands and short Python probes of one machine."""

from __future__ import annotations

import glob
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

Status = Literal["pass", "warn", "fail", "skip"]

COMMAND_TIMEOUT_S = 10.0
PROBE_TIMEOUT_S = 40.0
READ_LIMIT_BYTES = 1_000_000

# Each prints one JSON object. They run in a process of their own: importing a vendor library can
# take seconds, start threads, or end in a crash of native code.
_PROBE_FRAME = """
import json
try:
    facts = probe()
except Exception as error:
    facts = {"error": f"{type(error).__name__}: {error}"}
print(json.dumps(facts))
"""
PROBES = {
    "onnxruntime": """
def probe():
    import onnxruntime
    return {"version": onnxruntime.__version__, "providers": onnxruntime.get_available_providers()}
""",
    "tensorrt": """
def probe():
    import sys
    import tensorrt
    # pip's wheels bring their library in a package that the bindings import where it is.
    return {"version": tensorrt.__version__, "own_library": "tensorrt_libs" in sys.modules}
""",
    "pycuda": """
def probe():
    import pycuda
    import pycuda.driver as cuda
    cuda.init()
    device = cuda.Device(0)
    return {
        "version": pycuda.VERSION_TEXT,
        "cuda": list(cuda.get_version()),
        "driver": cuda.get_driver_version(),
        "device": device.name(),
        "capability": list(device.compute_capability()),
    }
""",
    "jtop": """
def probe():
    from jtop import jtop
    client = jtop()
    client.start()
    client.close()
    return {}
""",
    "realsense": """
def probe():
    import pyrealsense2 as rs
    def info(device, key):
        return device.get_info(key) if device.supports(key) else ""
    keys = rs.camera_info
    return {"cameras": [
        {
            "name": info(d, keys.name),
            "serial": info(d, keys.serial_number),
            "usb": info(d, keys.usb_type_descriptor),
            "firmware": info(d, keys.firmware_version),
        }
        for d in rs.context().query_devices()
    ]}
""",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckResult:
    """What one check found.

    Attributes:
        name: what was checked, such as ``power mode`` or ``can can0``.
        status: "fail" stops a robot or makes it unsafe, "warn" costs speed or margin, "skip" says
            that the fact is not to be had or does not apply.
        detail: what was found, one line.
        fix: what to do, one line or a command; empty where nothing is to be done.
    """

    name: str
    status: Status
    detail: str
    fix: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Output:
    """How a command ended."""

    exit_code: int
    stdout: str


class System(Protocol):
    """One machine as the checks see it. Threads: one caller."""

    @property
    def python_version(self) -> tuple[int, int]:
        """Major and minor version of the Python that runs gwp-edge."""
        ...

    def read(self, path: str) -> str | None:
        """Return the text of a file without trailing space and NULs, or None."""
        ...

    def glob(self, pattern: str) -> list[str]:
        """Return the paths that match, sorted."""
        ...

    def run(self, *argv: str) -> Output | None:
        """Run a command that changes nothing; None when it is missing or hangs."""
        ...

    def probe(self, name: str) -> Output | None:
        """Run one of ``PROBES``; None when it crashed without an answer or hangs."""
        ...


class LocalSystem:
    """The machine that this process runs on. Threads: one caller."""

    @property
    def python_version(self) -> tuple[int, int]:
        """Major and minor version of this interpreter."""
        return sys.version_info[:2]

    def read(self, path: str) -> str | None:
        """Return the text of a file, at most ``READ_LIMIT_BYTES``, or None."""
        try:
            with Path(path).open("rb") as file:
                data = file.read(READ_LIMIT_BYTES)
        except (OSError, ValueError):  # sysfs answers with all kinds of errors
            return None
        return data.decode("utf-8", errors="replace").rstrip("\0\n\t ")

    def glob(self, pattern: str) -> list[str]:
        """Return the paths that match, sorted."""
        return sorted(glob.glob(pattern))

    def run(self, *argv: str) -> Output | None:
        """Run a command; None when it is missing or takes longer than ``COMMAND_TIMEOUT_S``."""
        return _run(list(argv), COMMAND_TIMEOUT_S)

    def probe(self, name: str) -> Output | None:
        """Run one of ``PROBES`` in a new interpreter of the same environment."""
        return _run([sys.executable, "-c", PROBES[name] + _PROBE_FRAME], PROBE_TIMEOUT_S)


def _run(argv: list[str], timeout_s: float) -> Output | None:
    try:
        done = subprocess.run(
            argv,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=timeout_s,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    stdout = done.stdout.decode("utf-8", errors="replace").rstrip()
    return Output(exit_code=done.returncode, stdout=stdout)


def passed(name: str, detail: str) -> list[CheckResult]:
    """Return one "pass"."""
    return [CheckResult(name=name, status="pass", detail=detail)]


def warned(name: str, detail: str, fix: str) -> list[CheckResult]:
    """Return one "warn"."""
    return [CheckResult(name=name, status="warn", detail=detail, fix=fix)]


def failed(name: str, detail: str, fix: str) -> list[CheckResult]:
    """Return one "fail"."""
    return [CheckResult(name=name, status="fail", detail=detail, fix=fix)]


def skipped(name: str, why: str) -> list[CheckResult]:
    """Return one "skip"."""
    return [CheckResult(name=name, status="skip", detail=why)]


def is_jetson(system: System) -> bool:
    """Tell whether this is a Jetson: it says so in its device tree or has Jetson Linux."""
    model = system.read("/proc/device-tree/model") or ""
    return "jetson" in model.lower() or system.read("/etc/nv_tegra_release") is not None


def read_int(system: System, path: str) -> int | None:
    """Return the integer in a file, or None."""
    text = system.read(path)
    try:
        return None if text is None else int(text.split()[0])
    except (ValueError, IndexError):
        return None
