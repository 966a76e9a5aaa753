"""Time the stages of an engine and judge them by the limits of the machine.

The random input is one chunk after another, as a robot asks for them: vision, prefill, N steps.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import msgspec
import numpy as np

from gwp_edge.bundle import STAGES, Manifest, Stage
from gwp_edge.errors import SpecError
from gwp_edge.machine_limits import Limits
from gwp_edge.profiling.columns import Chunks, Phase
from gwp_edge.profiling.context import Context
from gwp_edge.protocols import Engine
from gwp_edge.spec import PolicySpec
from gwp_edge.types import Float32Array, ImageArray

SCHEMA = "gwp-edge.bench"
SCHEMA_VERSION = 2
_CACHE_ELEMENT_BYTES = {"fp32": 4, "fp16": 2, "bf16": 2}
Progress = Callable[[str, int, int], None]


class Times(msgspec.Struct, frozen=True, kw_only=True):
    """Distribution of n measured times, ms."""

    n: int
    p50_ms: float
    p95_ms: float
    p99_ms: float
    min_ms: float
    max_ms: float

    @classmethod
    def of(cls, times_ns: Sequence[int]) -> Times:
        """Compute it from times, ns."""
        ms = np.asarray(times_ns, dtype=np.float64) / 1e6
        p50, p95, p99 = (float(p) for p in np.percentile(ms, (50, 95, 99)))
        return cls(
            n=len(ms),
            p50_ms=p50,
            p95_ms=p95,
            p99_ms=p99,
            min_ms=float(ms.min()),
            max_ms=float(ms.max()),
        )


class Cost(msgspec.Struct, frozen=True, kw_only=True):
    """What one pass of a stage must do at least.

    Attributes:
        flops: operations of its products, a multiply-add counted as two.
        n_bytes: weights, and K/V caches, that it reads once, in their stored formats.
    """

    flops: int
    n_bytes: int

    def __add__(self, other: Cost) -> Cost:
        return Cost(flops=self.flops + other.flops, n_bytes=self.n_bytes + other.n_bytes)

    def times(self, n: int) -> Cost:
        """Return the cost of n passes."""
        return Cost(flops=self.flops * n, n_bytes=self.n_bytes * n)


class StageReport(msgspec.Struct, frozen=True, kw_only=True):
    """One stage, or the whole chunk, against its limits.

    Attributes:
        times: what it took.
        gflop: operations.
        mbyte: bytes read.
        gflop_s: achieved rate at p50.
        gbyte_s: achieved rate at p50.
        gemm_floor_ms: operations at the best measured GEMM rate.
        memory_floor_ms: bytes at the measured streaming rate.
        ratio_to_gemm_floor: p50 over ``gemm_floor_ms``.
        percent_of_limit: the larger floor over p50; 100 is as fast as this machine can.
    """

    times: Times
    gflop: float
    mbyte: float
    gflop_s: float
    gbyte_s: float
    gemm_floor_ms: float
    memory_floor_ms: float
    ratio_to_gemm_floor: float
    percent_of_limit: float


class EagerReport(msgspec.Struct, frozen=True, kw_only=True):
    """The unreduced network in eager torch, same sizes, same machine, same run.

    Attributes:
        stages: its own stages; ``prefix`` is missing where every step runs all tokens.
        chunk: vision, prefix and all steps.
        ratio: engine over eager, of the chunk's p50: 0.5 is twice as fast.
        largest_difference: between both answers to one input, of the normalised actions, over
            their largest value.
    """

    stages: dict[str, Times]
    chunk: Times
    ratio: float
    largest_difference: float


class BenchReport(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A measurement with all that is needed to judge it; of one family with a profile's report.

    Attributes:
        schema: ``SCHEMA``.
        schema_version: ``SCHEMA_VERSION``.
        context: as a profile has it.
        size: of the random weights, or the bundle's folder.
        family: of the network.
        warmup: chunks left out of the times; they are in ``chunks`` as cold and warm.
        limits: of the machine, the better of before and after.
        stages: against those.
        chunk: likewise, all stages of a chunk.
        chunks: one by one, as a profile has them; "profile compare" reads these.
        eager: the original, or None where it was not timed.
    """

    schema: str
    schema_version: int
    context: Context
    size: str
    family: Literal["gwp-0.5", "gwp-0"]
    warmup: int
    limits: Limits
    stages: dict[str, StageReport]
    chunk: StageReport
    chunks: Chunks
    eager: EagerReport | None


class EngineTimes(msgspec.Struct, frozen=True, kw_only=True):
    """Times of every pass, ns; ``denoise`` holds N entries for each chunk.

    Attributes:
        stages: after the warm-up.
        chunks: sums of each chunk, after the warm-up.
        columns: every chunk with the warm-up's, for the report.
    """

    stages: dict[Stage, list[int]]
    chunks: list[int]
    columns: Chunks


@dataclass(frozen=True, slots=True, kw_only=True)
class ChunkInput:
    """What one chunk starts from.

    Attributes:
        canvas: uint8 RGB (h, w, 3).
        state_norm: (1, A), normalised and padded.
        noise: (H, A).
    """

    canvas: ImageArray
    state_norm: Float32Array
    noise: Float32Array


def stage_costs(manifest: Manifest) -> dict[Stage, Cost]:
    """Return what one pass of each stage costs, from the manifest's layers."""
    costs = {}
    for stage in STAGES:
        layers = [layer for layer in manifest.precision.layers if layer.stage == stage]
        costs[stage] = Cost(
            flops=sum(layer.flops for layer in layers),
            n_bytes=sum(layer.weight_bytes for layer in layers),
        )
    caches = _step_cache_bytes(manifest.spec, manifest.precision.cache)
    costs["denoise"] += Cost(flops=0, n_bytes=caches)
    return costs


def _step_cache_bytes(spec: PolicySpec, cache_format: str) -> int:
    """Return the bytes of prefix and text K/V that one denoising step reads."""
    net = spec.network
    per_token = 2 * net.n_layers * net.n_heads * net.head_dim
    element_bytes = _CACHE_ELEMENT_BYTES.get(cache_format)
    if element_bytes is None:
        raise SpecError(
            f"manifest: K/V caches in {cache_format!r}; this gwp-edge knows "
            f"{', '.join(_CACHE_ELEMENT_BYTES)}"
        )
    return per_token * (spec.n_prefix + net.n_text_rows) * element_bytes


def time_engine(
    engine: Engine,
    spec: PolicySpec,
    *,
    repeats: int,
    warmup: int,
    now_ns: Callable[[], int] = time.perf_counter_ns,
    progress: Progress | None = None,
) -> EngineTimes:
    """Run chunks of random input and time every stage.

    Args:
        engine: with its prompt set.
        spec: of its bundle.
        repeats: measured chunks.
        warmup: chunks before that.
        now_ns: clock.
        progress: called with what is done, how many, of how many.

    Raises:
        SpecError: ``repeats`` or ``warmup`` is out of range, or the answer is not finite.
    """
    if repeats < 1 or warmup < 0:
        raise SpecError(f"expected repeats >= 1 and warmup >= 0, got {repeats} and {warmup}")
    every: list[dict[Stage, list[int]]] = []
    t_ns: list[int] = []
    rng = np.random.default_rng(0)
    for i in range(warmup + repeats):
        if progress is not None:
            progress("engine", i, warmup + repeats)
        given = random_input(spec, rng)
        t_ns.append(now_ns())
        every.append(run_chunk(engine, spec, given, now_ns)[1])
    if progress is not None:
        progress("engine", warmup + repeats, warmup + repeats)
    steady = every[warmup:]
    return EngineTimes(
        stages={stage: [t for laps in steady for t in laps[stage]] for stage in STAGES},
        chunks=[sum(sum(times) for times in laps.values()) for laps in steady],
        columns=_columns(every, t_ns, warmup),
    )


def _columns(every: list[dict[Stage, list[int]]], t_ns: list[int], warmup: int) -> Chunks:
    """Return the chunks as a profile has them; nothing but the engine was there."""
    none: list[float | None] = [None] * len(every)
    phases: list[Phase] = ["steady"] * len(every)
    phases[:warmup] = ["warm"] * warmup
    if warmup:
        phases[0] = "cold"
    return Chunks(
        t_s=[round((t - t_ns[0]) / 1e9, 4) for t in t_ns],
        phase=phases,
        run=[0] * len(every),
        segments_ms={stage: [sum(laps[stage]) / 1e6 for laps in every] for stage in STAGES},
        steps_ms=[[step / 1e6 for step in laps["denoise"]] for laps in every],
        cpu_ms=none,
        frame_to_chunk_ms=none,
        frame_to_command_ms=none,
        interval_ms=none,
        slack_ms=none,
    )


def random_input(spec: PolicySpec, rng: np.random.Generator) -> ChunkInput:
    """Draw what one chunk starts from."""
    A, H = spec.network.n_action_channels, spec.n_rows
    shape = (spec.canvas.height_px, spec.canvas.width_px, 3)
    state_norm = np.zeros((1, A), dtype=np.float32)
    state_norm[0, : spec.n_channels] = rng.uniform(-1, 1, spec.n_channels)
    return ChunkInput(
        canvas=rng.integers(0, 256, shape, dtype=np.uint8),
        state_norm=state_norm,
        noise=rng.standard_normal((H, A), dtype=np.float32),
    )


def run_chunk(
    engine: Engine,
    spec: PolicySpec,
    given: ChunkInput,
    now_ns: Callable[[], int] = time.perf_counter_ns,
) -> tuple[Float32Array, dict[Stage, list[int]]]:
    """Return normalised actions (H, A) and the time of every pass, ns.

    Raises:
        SpecError: the answer is not finite.
    """
    x, (H, A) = given.noise, given.noise.shape
    no_prefix, no_gain = np.zeros((H, A), np.float32), np.zeros((H, 1), np.float32)
    t_0 = now_ns()
    latent = engine.vision(given.canvas)
    t_1 = now_ns()
    engine.prefill(latent, given.state_norm)
    t_2 = now_ns()
    marks = [t_2]
    for step_idx in range(spec.sampler.n_steps):
        x = engine.denoise(x, step_idx, no_prefix, no_gain)
        marks.append(now_ns())
    if not np.isfinite(x).all():
        raise SpecError("the engine's answer is not finite; its times would mean nothing")
    steps = [b - a for a, b in pairwise(marks)]
    return x, {"vision": [t_1 - t_0], "prefill": [t_2 - t_1], "denoise": steps}


def judge(times_ns: Sequence[int], cost: Cost, limits: Limits) -> StageReport:
    """Return times and cost of a stage against the limits of the machine."""
    times = Times.of(times_ns)
    gemm_floor_ms = cost.flops / limits.best_gflop_s / 1e6
    memory_floor_ms = cost.n_bytes / limits.stream_gb_s / 1e6
    return StageReport(
        times=times,
        gflop=cost.flops / 1e9,
        mbyte=cost.n_bytes / 1e6,
        gflop_s=cost.flops / times.p50_ms / 1e6,
        gbyte_s=cost.n_bytes / times.p50_ms / 1e6,
        gemm_floor_ms=gemm_floor_ms,
        memory_floor_ms=memory_floor_ms,
        ratio_to_gemm_floor=times.p50_ms / gemm_floor_ms,
        percent_of_limit=100 * max(gemm_floor_ms, memory_floor_ms) / times.p50_ms,
    )


def judge_engine(
    times: EngineTimes, manifest: Manifest, limits: Limits
) -> tuple[dict[str, StageReport], StageReport]:
    """Return every stage and the whole chunk against the limits of the machine."""
    costs = stage_costs(manifest)
    stages: dict[str, StageReport] = {
        stage: judge(times.stages[stage], costs[stage], limits) for stage in STAGES
    }
    steps = costs["denoise"].times(manifest.spec.sampler.n_steps)
    return stages, judge(times.chunks, costs["vision"] + costs["prefill"] + steps, limits)
