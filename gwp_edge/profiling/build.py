"""Put a report together from what was collected."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from gwp_edge.machine_limits import Limits
from gwp_edge.manifest import Manifest
from gwp_edge.profiling import verdicts
from gwp_edge.profiling.cameras import camera_reports, transports
from gwp_edge.profiling.chunks import (
    chunk_columns,
    chunk_table,
    joined,
    phase_summaries,
)
from gwp_edge.profiling.context import Context, with_timing
from gwp_edge.profiling.motor_report import first_ns, motor_report
from gwp_edge.profiling.raw import Raw
from gwp_edge.profiling.roofline import roofline
from gwp_edge.profiling.schema import (
    SCHEMA,
    SCHEMA_VERSION,
    CameraReport,
    Cost,
    ProfileReport,
    Roofline,
    Summary,
)
from gwp_edge.profiling.system_report import system_report
from gwp_edge.profiling.tail import tail
from gwp_edge.spec import PolicySpec


def build_report(
    raws: list[Raw],
    spec: PolicySpec,
    context: Context,
    *,
    cameras: tuple[str, ...] = (),
    manifest: Manifest | None = None,
    limits: Limits | None = None,
    why_no_limits: str | None = None,
    outcome: str = "done",
    n_holds: int = 0,
    faults: Sequence[str] = (),
    cost_us: tuple[float, float] = (0.0, 0.0),
) -> ProfileReport:
    """Return the report of one or several runs.

    Args:
        raws: what was collected, one for each run.
        spec: of the policy.
        context: see ``profiling.context``.
        cameras: names in the order of the stamps; empty for the engine alone.
        manifest: of the bundle, for the roofline.
        limits: of the machine, likewise.
        why_no_limits: said where there are none.
        outcome: how the runs ended.
        n_holds: how often a running arm went to hold.
        faults: what went wrong.
        cost_us: of one stamp and of one tick.
    """
    flags = np.concatenate([raw.stamps["device_timed"] for raw in raws])
    context = with_timing(context, len(flags), int((flags > 0).sum()))
    warmup_s = context.warmup_s or 0.0
    table = joined([chunk_table(raw, spec, warmup_s=warmup_s, run=i) for i, raw in enumerate(raws)])
    steady = table.steady
    phases = phase_summaries(table)
    line = Roofline(limits=None, stages={}, why_not=why_no_limits or "not measured")
    if limits is not None and manifest is not None:
        line = roofline(steady, manifest, limits)
    motor = None
    if context.motor_hz is not None:
        motor = motor_report(raws, spec, motor_hz=context.motor_hz, warmup_s=warmup_s)
    found_cameras = _cameras(raws, cameras, warmup_s=warmup_s)
    system = system_report(raws, warmup_s=warmup_s)
    plan, slowest = verdicts.budget(steady, spec), tail(steady)
    plan_ms = (spec.n_rows - 1) * spec.period_ns / 1e6
    usual = phases.get("steady", {}).get("predict")
    cost = _cost(raws, cost_us, usual.p50 if usual is not None else None)
    failures = tuple(raw.failure for raw in raws if raw.failure is not None)
    return ProfileReport(
        schema=SCHEMA,
        schema_version=SCHEMA_VERSION,
        context=context,
        outcome=outcome,
        phases=phases,
        chunks=chunk_columns(table, first_ns(raws[0])),
        motor=motor,
        cameras=found_cameras,
        budget=plan,
        tail=slowest,
        verdicts=verdicts.verdicts(
            plan=plan,
            tail_report=slowest,
            execution=context.execution,
            # There a plan begins when it is adopted.
            standing=Summary.of(np.maximum(steady.interval - plan_ms, 0.0)),
            motor=motor,
            cameras=found_cameras,
            steady=phases.get("steady", {}),
            cold=phases.get("cold", {}),
            roofline=line,
            system=system,
            cost=cost,
            n_holds=n_holds,
        ),
        roofline=line,
        system=system,
        cost=cost,
        faults=(*faults, *failures),
    )


def _cameras(
    raws: list[Raw], names: tuple[str, ...], *, warmup_s: float
) -> tuple[CameraReport, ...]:
    """Return one report per camera; counts add up over the runs, times are those of all."""
    runs = [camera_reports(raw, names, warmup_s=warmup_s) for raw in raws]
    pooled = transports(raws, names, warmup_s=warmup_s)
    return tuple(
        CameraReport(
            name=of_camera[-1].name,
            clock=of_camera[-1].clock,
            n_made=sum(c.n_made for c in of_camera),
            n_used=sum(c.n_used for c in of_camera),
            health=raws[-1].health.get(of_camera[-1].name),
            period_ms=_median([c.period_ms for c in of_camera]),
            n_expected=sum(c.n_expected for c in of_camera),
            n_missing=sum(c.n_missing for c in of_camera),
            n_late=sum(c.n_late for c in of_camera),
            transport_ms=pooled[of_camera[-1].name],
        )
        for of_camera in zip(*runs, strict=True)
    )


def _median(values: list[float | None]) -> float | None:
    """Return the median of the runs' values, None where one of them has none."""
    known = [v for v in values if v is not None]
    return float(np.median(known)) if known and len(known) == len(values) else None


def _cost(raws: list[Raw], cost_us: tuple[float, float], chunk_p50_ms: float | None) -> Cost:
    wall_s = sum(raw.wall_s for raw in raws) or 1.0
    lost = {k: int(np.sum([raw.n_lost.get(k, 0) for raw in raws])) for r in raws for k in r.n_lost}
    return Cost(
        listener_percent=100 * sum(raw.listener_s for raw in raws) / wall_s,
        sampler_percent=100 * sum(raw.sampler_s for raw in raws) / wall_s,
        view_percent=100 * sum(raw.view_s for raw in raws) / wall_s,
        helper_percent=100 * sum(raw.helper_s for raw in raws) / wall_s,
        stamp_us=cost_us[0],
        stamp_percent=cost_us[0] / (10 * chunk_p50_ms) if chunk_p50_ms else None,
        tick_us=cost_us[1],
        n_lost=lost,
    )
