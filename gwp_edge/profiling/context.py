"""The context that every performance report carries: without it a time means nothing."""

from __future__ import annotations

import datetime
import sys
from collections.abc import Sequence

import msgspec

from gwp_edge.doctor.power import check_power_mode
from gwp_edge.doctor.system import LocalSystem
from gwp_edge.machine_limits import Machine
from gwp_edge.manifest import Manifest
from gwp_edge.spec import PolicySpec

_SYNCHRONISED = {
    ("ort", "cpu"): "calls return when the result is there; nothing runs behind them",
    ("ort", "cuda"): "every stage ends with its outputs copied to the host, which waits for the "
    "device",
    (
        "trt",
        None,
    ): "CUDA events on the engine's stream where a chunk is one launch, else a wait for "
    "the stream after every stage",
}
# What of the last one was done, as the engine's own times say.
ON_DEVICE = "CUDA events on the engine's stream; every chunk was one launch"
BY_STAGE = "a wait for the stream after every stage; no chunk was one launch"


class Context(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """All that a reader must know to judge the numbers.

    Attributes:
        command_line: as typed.
        started_at: UTC, ISO 8601.
        robot: name, or None for the engine alone.
        bundle: folder, or the size of random weights.
        bundle_id: hash of spec and files; None where the policy is no bundle.
        precision: of the bundle.
        engine: which runs it.
        provider: of the engine.
        threads: CPU threads of the engine; None is the engine's choice.
        n_rows: rows of a chunk.
        period_ms: time between rows.
        n_steps: denoising steps.
        motor_hz: asked rate of the motor loop.
        execution: how chunks follow each other, None for the engine alone.
        duration_s: asked; None where chunks were counted instead.
        warmup_s: left out of the steady phase; None where chunks were counted instead.
        repeat: how often.
        disturbances: what was injected on purpose.
        watched_by: what listened besides the profile and may have cost time.
        synchronised: how device work is waited for when a stage is timed.
        power_mode: of a Jetson.
        machine: processor, clocks, versions, commit.
    """

    command_line: tuple[str, ...]
    started_at: str
    robot: str | None
    bundle: str | None
    bundle_id: str | None
    precision: str | None
    engine: str | None
    provider: str | None
    threads: int | None
    n_rows: int
    period_ms: float
    n_steps: int
    motor_hz: float | None
    execution: str | None
    duration_s: float | None
    warmup_s: float | None
    repeat: int
    disturbances: tuple[str, ...]
    watched_by: tuple[str, ...]
    synchronised: str
    power_mode: str | None
    machine: Machine


def make_context(
    spec: PolicySpec,
    machine: Machine,
    *,
    manifest: Manifest | None,
    bundle: str | None,
    robot: str | None,
    engine: str | None,
    provider: str | None,
    threads: int | None,
    motor_hz: float | None,
    duration_s: float | None,
    warmup_s: float | None,
    execution: str | None = None,
    repeat: int = 1,
    disturbances: Sequence[str] = (),
    watched_by: Sequence[str] = (),
) -> Context:
    """Return what a reader must know; taken before the run, as the machine stands then."""
    power = check_power_mode(LocalSystem())[0]
    return Context(
        command_line=tuple(sys.argv),
        started_at=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        robot=robot,
        bundle=bundle,
        bundle_id=manifest.bundle_id if manifest else None,
        precision=manifest.precision.name if manifest else None,
        engine=engine,
        provider=provider,
        threads=threads,
        n_rows=spec.n_rows,
        period_ms=spec.period_ns / 1e6,
        n_steps=spec.sampler.n_steps,
        motor_hz=motor_hz,
        execution=execution,
        duration_s=duration_s,
        warmup_s=warmup_s,
        repeat=repeat,
        disturbances=tuple(disturbances),
        watched_by=tuple(watched_by),
        synchronised=_synchronised(engine, provider),
        power_mode=power.detail if power.status != "skip" else None,
        machine=machine,
    )


def with_timing(context: Context, n_chunks: int, n_on_device: int) -> Context:
    """Return the context with what was really done, where an engine can do either.

    Args:
        context: made before the run.
        n_chunks: all chunks.
        n_on_device: those whose stages the device timed.
    """
    if context.engine != "trt" or not n_chunks:
        return context
    how = ON_DEVICE if n_on_device == n_chunks else BY_STAGE
    if 0 < n_on_device < n_chunks:
        how = (
            f"CUDA events on the engine's stream for {n_on_device} chunks, each one launch; a wait "
            f"for the stream after every stage for the other {n_chunks - n_on_device}"
        )
    return msgspec.structs.replace(context, synchronised=how)


def _synchronised(engine: str | None, provider: str | None) -> str:
    for (of_engine, of_provider), text in _SYNCHRONISED.items():
        if engine == of_engine and of_provider in (provider, None):
            return text
    return "as the policy does"
