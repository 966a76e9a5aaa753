"""What this machine can do at best: float32 matrix products and streaming memory.

A stage cannot be faster than its operations at the first rate, nor than its bytes at the second,
so a measured time is judged by its distance from them.
"""

from __future__ import annotations

import os
import platform
import shutil
import struct
import subprocess
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec
import numpy as np

from gwp_edge.types import Float32Array

GemmShape = tuple[int, int, int]

# One square product, where packing costs nothing, and what the networks themselves do at full
# size: rows x inner x outer.
GEMM_SHAPES: tuple[GemmShape, ...] = (
    (2048, 2048, 2048),
    (121, 3072, 14336),
    (121, 3072, 3072),
    (48, 1024, 4096),
    (48, 1024, 3072),
)
_STREAM_BYTES = 512 << 20
# A network reads each weight once in a pass, so a product that finds its weight in the cache from
# the time before would promise too much: many weights take turns, together larger than any cache.
_TURNS_BYTES = 256 << 20
_MIN_SECONDS_PER_RATE = 0.6
_MIN_REPEATS = 3
_FLOAT = 1
_OPSET = 20
_IR_VERSION = 10


class GemmRate(msgspec.Struct, frozen=True, kw_only=True):
    """Best measured rate of products (n, k) x (k, m), their weights read from memory."""

    shape: GemmShape
    gflop_s: float


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """Measured limits of the machine.

    Attributes:
        threads: CPU threads used.
        gemm: rate of each shape.
        stream_gb_s: rate of reading a large array once.
    """

    threads: int
    gemm: tuple[GemmRate, ...]
    stream_gb_s: float

    @property
    def best_gflop_s(self) -> float:
        """The highest rate of any shape: what no layer is expected to beat."""
        return max(rate.gflop_s for rate in self.gemm)

    def merged(self, other: Limits) -> Limits:
        """Return the better of two measurements, shape by shape."""
        pairs = zip(self.gemm, other.gemm, strict=True)
        return Limits(
            threads=self.threads,
            gemm=tuple(max(a, b, key=lambda r: r.gflop_s) for a, b in pairs),
            stream_gb_s=max(self.stream_gb_s, other.stream_gb_s),
        )


def measure_limits(
    threads: int,
    *,
    shapes: Sequence[GemmShape] = GEMM_SHAPES,
    stream_bytes: int = _STREAM_BYTES,
    progress: Callable[[str, int, int], None] | None = None,
) -> Limits:
    """Measure float32 GEMM rates through ONNX Runtime and the memory's streaming rate.

    Args:
        threads: CPU threads to use.
        shapes: products to time.
        stream_bytes: size of the array to read; much larger than every cache.
        progress: called with what is done, how many, of how many.
    """
    rates = []
    for i, shape in enumerate(shapes):
        if progress is not None:
            progress("machine limits", i, len(shapes) + 1)
        rates.append(GemmRate(shape=shape, gflop_s=_gemm_gflop_s(shape, threads)))
    stream = _stream_gb_s(threads, stream_bytes)
    if progress is not None:
        progress("machine limits", len(shapes) + 1, len(shapes) + 1)
    return Limits(threads=threads, gemm=tuple(rates), stream_gb_s=stream)


def _best_seconds(run: Callable[[], object]) -> float:
    """Return the shortest time of repeated calls, s; the first call is not counted."""
    run()
    best, spent, n = float("inf"), 0.0, 0
    while spent < _MIN_SECONDS_PER_RATE or n < _MIN_REPEATS:
        t_start = time.perf_counter()
        run()
        took = time.perf_counter() - t_start
        best, spent, n = min(best, took), spent + took, n + 1
    return best


def _gemm_gflop_s(shape: GemmShape, threads: int) -> float:
    import onnxruntime as ort

    n, k, m = shape
    turns = max(1, -(-_TURNS_BYTES // (4 * k * m)))
    rng = np.random.default_rng(0)
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    weight = rng.standard_normal((k, m), dtype=np.float32)
    session = ort.InferenceSession(
        _matmul_model(n, weight, turns), options, providers=["CPUExecutionProvider"]
    )
    x = rng.standard_normal((n, k), dtype=np.float32)
    seconds = _best_seconds(lambda: session.run(None, {"x": x}))
    return 2 * n * k * m * turns / seconds / 1e9


def _stream_gb_s(threads: int, n_bytes: int) -> float:
    """Rate of reading an array once, one piece per thread; numpy frees the lock meanwhile."""
    array = np.ones(n_bytes // 8, dtype=np.float64)
    pieces = np.array_split(array, threads)

    def read(piece: np.ndarray) -> object:
        # One load and one compare per element: the memory is the bottleneck, not the arithmetic.
        return piece.max()

    with ThreadPoolExecutor(threads) as pool:
        seconds = _best_seconds(lambda: list(pool.map(read, pieces)))
    return array.nbytes / seconds / 1e9


# -- a model of one product, written without the onnx package, which robots do not have -----------


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _field(number: int, value: bytes | str | int) -> bytes:
    """One protobuf field: an int as varint, everything else with its length."""
    if isinstance(value, int):
        return _varint(number << 3) + _varint(value)
    data = value.encode() if isinstance(value, str) else value
    return _varint(number << 3 | 2) + _varint(len(data)) + data


def _value_info(name: str, shape: Sequence[int]) -> bytes:
    dims = b"".join(_field(1, _field(1, side)) for side in shape)
    tensor_type = _field(1, _FLOAT) + _field(2, dims)
    return _field(1, name) + _field(2, _field(1, tensor_type))


def _matmul_model(n: int, weight: Float32Array, turns: int) -> bytes:
    """Return a serialised ONNX model: ``y_i = x @ w_i``, x (n, k), each w_i a copy of its own."""
    k, m = weight.shape
    data = weight.astype("<f4").tobytes()
    parts = [_field(2, "products")]
    for i in range(turns):
        # Engines join equal constants, so each copy differs in its last element.
        own = data[:-4] + struct.pack("<f", i)
        tensor = _field(1, k) + _field(1, m) + _field(2, _FLOAT) + _field(8, f"w{i}")
        node = _field(1, "x") + _field(1, f"w{i}") + _field(2, f"y{i}") + _field(4, "MatMul")
        parts.append(_field(1, node) + _field(5, tensor + _field(9, own)))
        parts.append(_field(12, _value_info(f"y{i}", (n, m))))
    graph = b"".join(parts) + _field(11, _value_info("x", (n, k)))
    opset = _field(1, "") + _field(2, _OPSET)
    return _field(1, _IR_VERSION) + _field(7, graph) + _field(8, opset)


# -- what was measured where ----------------------------------------------------------------------


class Machine(msgspec.Struct, frozen=True, kw_only=True):
    """What a reader must know to judge a time; None where the system does not say."""

    system: str
    cpu: str
    n_cpus: int
    governor: str | None
    clock_mhz: float | None
    temperature_c: float | None
    load_average: tuple[float, float, float]
    versions: dict[str, str]
    commit: str | None


def describe_machine(packages: Sequence[str] = ("numpy", "onnxruntime")) -> Machine:
    """Return what this machine is and how it stands now.

    Args:
        packages: whose versions matter.
    """
    from importlib.metadata import PackageNotFoundError, version

    def installed(name: str) -> str:
        try:
            return version(name)
        except PackageNotFoundError:
            return "not installed"

    versions = {"python": platform.python_version()}
    versions |= {name: installed(name) for name in ("gwp-edge", *packages)}
    cpu = Path("/sys/devices/system/cpu/cpu0/cpufreq")
    return Machine(
        system=f"{platform.system()} {platform.release()} {platform.machine()}",
        cpu=_cpuinfo("model name") or platform.processor() or "unknown",
        n_cpus=os.cpu_count() or 1,
        governor=_read(cpu / "scaling_governor"),
        clock_mhz=_number(_cpuinfo("cpu MHz")),
        temperature_c=_number(_read(Path("/sys/class/thermal/thermal_zone0/temp")), 1e-3),
        load_average=os.getloadavg(),
        versions=versions,
        commit=_commit(),
    )


def _read(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8").strip()
    except OSError:
        return None


def _number(text: str | None, scale: float = 1.0) -> float | None:
    try:
        return None if text is None else float(text) * scale
    except ValueError:
        return None


def _cpuinfo(field: str) -> str | None:
    for line in (_read(Path("/proc/cpuinfo")) or "").splitlines():
        name, _, value = line.partition(":")
        if name.strip() == field:
            return value.strip()
    return None


def _commit() -> str | None:
    """Return the commit of the checkout that this code runs from, ``+`` when it was changed."""
    root = Path(__file__).resolve().parents[1]
    if not (root / ".git").exists() or shutil.which("git") is None:
        return None

    def git(*arguments: str) -> str | None:
        done = subprocess.run(
            ["git", "-C", str(root), *arguments], capture_output=True, text=True, check=False
        )
        return done.stdout.strip() if done.returncode == 0 else None

    commit = git("rev-parse", "HEAD")
    if commit is None:
        return None
    return commit + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")
