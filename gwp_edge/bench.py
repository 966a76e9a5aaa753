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

from gwp_edge.errors import SpecError
from gwp_edge.machine_limits import Limits
from gwp_edge.manifest import STAGES, Manifest, Stage
from gwp_edge.profiling.blocks import Roofline, RooflineStage, StageReport, Summary, Times
from gwp_edge.profiling.columns import Chunks, Phase
from gwp_edge.profiling.context import Context
from gwp_edge.protocols import Engine
from gwp_edge.spec import PolicySpec
from gwp_edge.types import Float32Array, ImageArray

__all__ = ["BenchReport", "Roofline", "StageReport", "Summary", "Times"]

SCHEMA = "gwp-edge.bench"
SCHEMA_VERSION = 3
_CACHE_ELEMENT_BYTES = {"fp32": 4, "fp16": 2, "bf16": 2}
Progress = Callable[[str, int, int], None]


class Cost(msgspec.Struct, frozen=True, kw_only=True):
    """What one pass of a stage must do at least.

    Attributes:
        flops: operations of its products, a multiply-add counted as two.
        n_bytes: weights, and K/V caches, that it reads once, in their stored formats; what passes
            between layers is not counted.
        int8_flops: those of ``flops`` in int8 layers.
    """

    flops: int
    n_bytes: int
    int8_flops: int = 0

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            flops=self.flops + other.flops,
            n_bytes=self.n_bytes + other.n_bytes,
            int8_flops=self.int8_flops + other.int8_flops,
        )

    def times(self, n: int) -> Cost:
        """Return the cost of n passes."""
        return Cost(flops=self.flops * n, n_bytes=self.n_bytes * n, int8_flops=self.int8_flops * n)


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
        stages: against those, one pass each.
        chunk: likewise, all stages of a chunk.
        phases: as a profile has them: of every stage of a chunk, ``denoise`` all its steps.
        roofline: likewise, of the steady phase.
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
    phases: dict[Phase, dict[str, Summary]]
    roofline: Roofline
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
            int8_flops=sum(layer.flops for layer in layers if layer.format == "int8"),
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


def joined(runs: Sequence[EngineTimes]) -> EngineTimes:
    """Return the times of several runs as one, each chunk with the number of its run."""
    columns = [times.columns for times in runs]
    none: list[float | None] = [None for c in columns for _ in c.t_s]
    return EngineTimes(
        stages={stage: [t for times in runs for t in times.stages[stage]] for stage in STAGES},
        chunks=[t for times in runs for t in times.chunks],
        columns=Chunks(
            t_s=[t for c in columns for t in c.t_s],
            phase=[p for c in columns for p in c.phase],
            run=[i for i, c in enumerate(columns) for _ in c.t_s],
            segments_ms={s: [v for c in columns for v in c.segments_ms[s]] for s in STAGES},
            steps_ms=[steps for c in columns for steps in c.steps_ms],
            cpu_ms=none,
            frame_to_chunk_ms=none,
            frame_to_command_ms=none,
            interval_ms=none,
            slack_ms=none,
        ),
    )


def chunk_phases(chunks: Chunks) -> dict[Phase, dict[str, Summary]]:
    """Return the distribution of every stage of a chunk and of their sum, phase by phase."""
    segments = {k: np.array(v, np.float64) for k, v in chunks.segments_ms.items()}
    segments["chunk"] = np.sum(list(segments.values()), axis=0)
    found: dict[Phase, dict[str, Summary]] = {}
    for phase in dict.fromkeys(chunks.phase):
        rows = np.array([p == phase for p in chunks.phase])
        of_phase = [chunks.steps_ms[i] for i in np.flatnonzero(rows)]
        values = {k: v[rows] for k, v in segments.items()}
        values["denoise step"] = np.array([ms for steps in of_phase for ms in steps])
        summaries = {k: Summary.of(v) for k, v in values.items()}
        found[phase] = {k: v for k, v in summaries.items() if v is not None}
    return found


def chunk_roofline(chunks: Chunks, manifest: Manifest, limits: Limits) -> Roofline:
    """Return every stage of the steady chunks against the limits; ``denoise`` is all steps."""
    costs, stages = stage_costs(manifest), {}
    steady = [i for i, phase in enumerate(chunks.phase) if phase == "steady"]
    for stage in STAGES:
        spent = [chunks.segments_ms[stage][i] or 0.0 for i in steady]
        n_passes = len(chunks.steps_ms[steady[0]]) if stage == "denoise" else 1
        report = judge([round(ms * 1e6) for ms in spent], costs[stage].times(n_passes), limits)
        stages[str(stage)] = against_roof(report)
    return Roofline(limits=limits, stages=stages)


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
    float_ms = (cost.flops - cost.int8_flops) / limits.best_of("fp32") / 1e6
    gemm_floor_ms = float_ms + cost.int8_flops / limits.best_of("int8") / 1e6
    memory_floor_ms = cost.n_bytes / limits.stream_gb_s / 1e6
    return StageReport(
        times=times,
        gflop=cost.flops / 1e9,
        int8_gflop=cost.int8_flops / 1e9,
        mbyte=cost.n_bytes / 1e6,
        gflop_s=cost.flops / times.p50_ms / 1e6,
        gbyte_s=cost.n_bytes / times.p50_ms / 1e6,
        gemm_floor_ms=gemm_floor_ms,
        memory_floor_ms=memory_floor_ms,
        ratio_to_gemm_floor=times.p50_ms / gemm_floor_ms,
        percent_of_limit=100 * max(gemm_floor_ms, memory_floor_ms) / times.p50_ms,
    )


def against_roof(report: StageReport) -> RooflineStage:
    """Return a stage with its bound and what is left above it."""
    ceiling_ms = max(report.gemm_floor_ms, report.memory_floor_ms)
    return RooflineStage(
        bound="compute" if report.gemm_floor_ms >= report.memory_floor_ms else "memory",
        ceiling_ms=ceiling_ms,
        left_ms=max(0.0, report.times.p50_ms - ceiling_ms),
        report=report,
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
