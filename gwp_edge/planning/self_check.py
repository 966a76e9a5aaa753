"""Check the latency model where it can be checked: on this machine's processor.

For a quiet machine: the limits and the passes are measured one after the other, so a load that
comes and goes shows as an error of the model.
"""

from __future__ import annotations

from gwp_edge.bench import time_engine
from gwp_edge.bundle import Bundle
from gwp_edge.engines import create_engine
from gwp_edge.errors import PerformanceIssue, SpecError
from gwp_edge.machine_limits import measure_limits
from gwp_edge.planning.devices import this_processor
from gwp_edge.planning.latency import Comparison, compare, estimate
from gwp_edge.planning.memory import available_bytes
from gwp_edge.planning.workload import workload

# How far modelled and measured stage times may be apart.
ALLOWED_ERROR = 0.25


def compare_here(
    bundle: Bundle, *, threads: int, repeats: int = 5, warmup: int = 2
) -> tuple[Comparison, ...]:
    """Return modelled and measured times of every stage of a float32 bundle.

    Args:
        bundle: at full width; products of small networks are not what was measured.
        threads: CPU threads.
        repeats: measured chunks.
        warmup: chunks before that.

    Raises:
        SpecError: a layer is not float32, whose rates are not measured.
    """
    other = next((x for x in bundle.manifest.precision.layers if x.format != "fp32"), None)
    if other is not None:
        raise SpecError(
            f"{bundle.root}: {other.stage} {other.name} is {other.format}; float32 rates alone are "
            "measured here: export with --precision fp32"
        )
    limits = measure_limits(threads)
    engine = create_engine("ort", bundle, threads=threads)
    try:
        engine.set_prompt(bundle.spec.tasks[0])
        times = time_engine(engine, bundle.spec, repeats=repeats, warmup=warmup)
    finally:
        engine.close()
    # The better of before and after: another program may have taken its share meanwhile.
    limits = limits.merged(measure_limits(threads))
    device = this_processor(limits, available_bytes())
    modelled = estimate(workload(bundle.manifest), device)
    return compare(modelled, times.stages)


def require_agreement(rows: tuple[Comparison, ...]) -> None:
    """Judge a comparison.

    Raises:
        PerformanceIssue: a stage is further off than ``ALLOWED_ERROR``.
    """
    for row in rows:
        if abs(row.error) > ALLOWED_ERROR:
            raise PerformanceIssue(
                f"{row.stage}: modelled {row.expected_ms:.1f} ms, measured {row.measured_ms:.1f} "
                f"ms: off by {100 * row.error:+.0f} %, allowed {100 * ALLOWED_ERROR:.0f} %; is "
                "the machine quiet?"
            )
