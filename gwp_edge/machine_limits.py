"""What this machine can do at best: matrix products, float32 and 8 bits, and streaming memory.

A stage cannot be faster than its operations at the first rate, nor than its bytes at the second,
so a measured time is judged by its distance from them.
"""

from __future__ import annotations

import datetime
import os
import platform
import shutil
import subprocess
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from gwp_edge.product_models import float_product, integer_product

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
_N_INT8_SHAPES = 2
_STREAM_BYTES = 512 << 20
# A network reads each weight once in a pass, so a product that finds its weight in the cache from
# the time before would promise too much: many weights take turns, together larger than any cache.
_TURNS_BYTES = 256 << 20
_MIN_SECONDS_PER_RATE = 0.6
_MIN_REPEATS = 3


class GemmRate(msgspec.Struct, frozen=True, kw_only=True):
    """Best measured rate of products (n, k) x (k, m), their weights read from memory."""

    shape: GemmShape
    gflop_s: float


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """Measured limits of the machine.

    Attributes:
        threads: CPU threads used.
        gemm: rate of each shape, float32.
        stream_gb_s: rate of reading a large array once.
        gemm_int8: likewise of products of 8-bit codes in 32-bit integers, which is what int8 layers
            are here; empty where they were not measured.
        measured_at: UTC, ISO 8601; None where it is not known.
        load_before: load average of a minute when it began; a busy machine shows lower limits.
    """

    threads: int
    gemm: tuple[GemmRate, ...]
    stream_gb_s: float
    gemm_int8: tuple[GemmRate, ...] = ()
    measured_at: str | None = None
    load_before: float | None = None

    @property
    def best_gflop_s(self) -> float:
        """The highest float32 rate of any shape: what no such layer is expected to beat."""
        return max(rate.gflop_s for rate in self.gemm)

    def best_of(self, layer_format: str) -> float:
        """Return the highest rate of a layer's format, in units of ``gflop_s``.

        ONNX Runtime computes everything but int8 in float32 on the processor: weights in fewer
        bits are unpacked before.
        """
        if layer_format == "int8" and self.gemm_int8:
            return max(rate.gflop_s for rate in self.gemm_int8)
        return self.best_gflop_s

    def merged(self, other: Limits) -> Limits:
        """Return the better of two measurements, shape by shape."""

        def better(a: Sequence[GemmRate], b: Sequence[GemmRate]) -> tuple[GemmRate, ...]:
            pairs = zip(a, b, strict=True)
            return tuple(max(a, b, key=lambda r: r.gflop_s) for a, b in pairs)

        return Limits(
            threads=self.threads,
            gemm=better(self.gemm, other.gemm),
            stream_gb_s=max(self.stream_gb_s, other.stream_gb_s),
            gemm_int8=better(self.gemm_int8, other.gemm_int8),
            measured_at=self.measured_at,
            load_before=self.load_before,
        )


def measure_limits(
    threads: int,
    *,
    shapes: Sequence[GemmShape] = GEMM_SHAPES,
    stream_bytes: int = _STREAM_BYTES,
    progress: Callable[[str, int, int], None] | None = None,
) -> Limits:
    """Measure rates of products through ONNX Runtime and the memory's streaming rate.

    Args:
        threads: CPU threads to use.
        shapes: products to time.
        stream_bytes: size of the array to read; much larger than every cache.
        progress: called with what is done, how many, of how many.
    """
    now = datetime.datetime.now(datetime.timezone.utc)
    load = os.getloadavg()[0]
    kinds = [("float32", shape) for shape in shapes]
    kinds += [("int8", shape) for shape in shapes[:_N_INT8_SHAPES]]
    rates: dict[str, list[GemmRate]] = {"float32": [], "int8": []}
    for i, (kind, shape) in enumerate(kinds):
        if progress is not None:
            progress("machine limits", i, len(kinds) + 1)
        rates[kind].append(GemmRate(shape=shape, gflop_s=_gemm_gflop_s(kind, shape, threads)))
    stream = _stream_gb_s(threads, stream_bytes)
    if progress is not None:
        progress("machine limits", len(kinds) + 1, len(kinds) + 1)
    return Limits(
        threads=threads,
        gemm=tuple(rates["float32"]),
        stream_gb_s=stream,
        gemm_int8=tuple(rates["int8"]),
        measured_at=now.isoformat(timespec="seconds"),
        load_before=load,
    )


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


def _gemm_gflop_s(kind: str, shape: GemmShape, threads: int) -> float:
    import onnxruntime as ort

    n, k, m = shape
    weight_bytes = k * m * (4 if kind == "float32" else 1)
    turns = max(1, -(-_TURNS_BYTES // weight_bytes))
    rng = np.random.default_rng(0)
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    x = rng.integers(0, 256, (n, k), dtype=np.uint8)
    given: dict[str, npt.NDArray[Any]] = {"x": x}
    if kind == "float32":
        given = {"x": x.astype(np.float32)}
        model = float_product(n, rng.standard_normal((k, m), dtype=np.float32), turns)
    else:
        model = integer_product(n, rng.integers(0, 256, (k, m), dtype=np.uint8), turns)
    session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    seconds = _best_seconds(lambda: session.run(None, given))
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
