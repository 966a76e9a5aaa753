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

TENSORRT_MAJOR = 10


class _Onnxruntime(msgspec.Struct):
    version: str = ""
    providers: list[str] = []
    error: str = ""


class _Tensorrt(msgspec.Struct):
    version: str = ""
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
    """TensorRT 10: bindings importable and of the same version as the library."""
    name = "tensorrt"
    if not has_nvidia_gpu(system):
        return skipped(name, "no NVIDIA GPU here")
    if is_jetson(system):
        fix = "sudo apt-get install python3-libnvinfer; venv made with --system-site-packages"
    else:
        fix = "pip install 'gwp-edge[jetson]'"
    answer = system.probe(name)
    if answer is None or not answer.stdout:
        return failed(name, "importing it crashed or took too long", fix)
    facts = msgspec.json.decode(answer.stdout, type=_Tensorrt)
    if facts.error:
        return failed(name, facts.error, fix)
    numbers = facts.version.split(".")
    if numbers[0] != str(TENSORRT_MAJOR):
        wanted = f"{TENSORRT_MAJOR}.x"
        return failed(name, f"{facts.version}; expected {wanted}", f"install TensorRT {wanted}")
    library = _library_version(system)
    if library is None:
        return passed(name, f"{facts.version} (library not from a Debian package)")
    # Debian's version is 10.3.0.30-1+cuda12.5; the bindings say 10.3.0 or 10.3.0.30.
    if library.split("-")[0].split(".")[:3] != numbers[:3]:
        return failed(
            name,
            f"bindings {facts.version}, library {library}: they must match",
            "remove the pip package tensorrt from the venv, use the system's",
        )
    return passed(name, f"{facts.version}, library {library}")


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
