"""Checks of the engine libraries: importable, of a known version, matching each other."""

from __future__ import annotations

import re

import msgspec

from gwp_edge.doctor.system import (
    CheckResult,
    System,
    failed,
    is_jetson,
    passed,
    skipped,
    warned,
)
from gwp_edge.engines.trt_gates import TENSORRT_MAJOR, tensorrt_problem

_PIP_FIX = "remove the pip package tensorrt from the venv, use the system's"


class _Onnxruntime(msgspec.Struct):
    version: str = ""
    providers: list[str] = []
    error: str = ""


class _Tensorrt(msgspec.Struct):
    version: str = ""
    own_library: bool = False
    error: str = ""


class _Pycuda(msgspec.Struct):
    version: str = ""
    cuda: list[int] = []
    driver: int = 0
    device: str = ""
    capability: list[int] = []
    error: str = ""


def has_nvidia_gpu(system: System) -> bool:
    """Tell whether a GPU that TensorRT could use is here."""
    return is_jetson(system) or system.read("/proc/driver/nvidia/version") is not None


def check_onnxruntime(system: System) -> list[CheckResult]:
    """ONNX Runtime, the engine that every machine has."""
    name = "onnxruntime"
    answer = system.probe(name)
    fix = "pip install gwp-edge in this environment again"
    if answer is None or not answer.stdout:
        return failed(name, "importing it crashed or took too long", fix)
    facts = msgspec.json.decode(answer.stdout, type=_Onnxruntime)
    if facts.error:
        return failed(name, facts.error, fix)
    if "CPUExecutionProvider" not in facts.providers:
        return failed(name, f"{facts.version} without the CPU provider: {facts.providers}", fix)
    return passed(name, f"{facts.version}: {', '.join(facts.providers)}")


def check_tensorrt(system: System) -> list[CheckResult]:
    """TensorRT 10: bindings importable, new enough, of the same version as their library."""
    name = "tensorrt"
    if not has_nvidia_gpu(system):
        return skipped(name, "no NVIDIA GPU here")
    if is_jetson(system):
        fix = "sudo apt-get install python3-libnvinfer; venv made with --system-site-packages"
    else:
        fix = "pip install 'gwp-edge[jetson]'"
    facts = _tensorrt(system)
    if facts is None:
        return failed(name, "importing it crashed or took too long", fix)
    if facts.error:
        return failed(name, facts.error, fix)
    problem = tensorrt_problem(facts.version)
    if problem is not None:
        return failed(name, f"{facts.version}; expected {problem[0]}", problem[1])
    if facts.own_library:
        detail = f"{facts.version}, library from pip"
        if not is_jetson(system):
            return passed(name, detail)
        return warned(name, f"{detail}, not JetPack's", _PIP_FIX)
    library = _library_version(system)
    if library is None:
        return passed(name, f"{facts.version} (library not from a Debian package)")
    # Debian's version is 10.3.0.30-1+cuda12.5; the bindings say 10.3.0 or 10.3.0.30.
    if library.split("-")[0].split(".")[:3] != facts.version.split(".")[:3]:
        return failed(
            name,
            f"bindings {facts.version}, library {library}: they must match",
            _PIP_FIX,
        )
    return passed(name, f"{facts.version}, library {library}")


def _tensorrt(system: System) -> _Tensorrt | None:
    answer = system.probe("tensorrt")
    if answer is None or not answer.stdout:
        return None
    return msgspec.json.decode(answer.stdout, type=_Tensorrt)


def _library_version(system: System) -> str | None:
    """Return Debian's version of TensorRT's library, or None where it is from elsewhere."""
    answer = system.run("dpkg-query", "-W", "-f=${Version}", f"libnvinfer{TENSORRT_MAJOR}")
    if answer is None or answer.exit_code != 0 or not answer.stdout:
        return None
    return answer.stdout


def check_pycuda(system: System) -> list[CheckResult]:
    """PyCUDA: importable, a device answers, of TensorRT's CUDA and none newer than the driver's."""
    name = "pycuda"
    if not has_nvidia_gpu(system):
        return skipped(name, "no NVIDIA GPU here")
    fix = "PATH=/usr/local/cuda/bin:$PATH pip install --force-reinstall --no-cache-dir pycuda"
    answer = system.probe(name)
    if answer is None or not answer.stdout:
        return failed(name, "importing it or starting CUDA crashed or took too long", fix)
    facts = msgspec.json.decode(answer.stdout, type=_Pycuda)
    if facts.error:
        return failed(name, facts.error, fix)
    if len(facts.cuda) < 2 or len(facts.capability) != 2:
        return skipped(name, f"{facts.version} answered without CUDA version or capability")
    tensorrt = re.search(r"\+cuda(\d+)\.(\d+)", _library_version(system) or "")
    bindings = _tensorrt(system)
    if bindings is not None and bindings.own_library:
        tensorrt = None  # Debian's package is not what this process loads
    if tensorrt is not None and int(tensorrt[1]) != facts.cuda[0]:
        found = f"CUDA {facts.cuda[0]}.{facts.cuda[1]}, TensorRT CUDA {tensorrt[1]}.{tensorrt[2]}"
        return failed(name, f"PyCUDA is of {found}: one process cannot use both", fix)
    built = facts.cuda[0] * 1000 + facts.cuda[1] * 10  # as the driver counts: 12060 is 12.6
    detail = (
        f"{facts.version}, CUDA {facts.cuda[0]}.{facts.cuda[1]}, {facts.device}, "
        f"compute capability {facts.capability[0]}.{facts.capability[1]}"
    )
    if built // 1000 > facts.driver // 1000:
        return failed(name, f"{detail}: newer than the driver's CUDA {_cuda(facts.driver)}", fix)
    if built > facts.driver:
        # Within one major version the driver runs code of newer toolkits, with exceptions.
        return warned(name, f"{detail}: newer than the driver's {_cuda(facts.driver)}", fix)
    return passed(name, f"{detail}, driver's CUDA {_cuda(facts.driver)}")


def _cuda(number: int) -> str:
    return f"{number // 1000}.{number % 1000 // 10}"
