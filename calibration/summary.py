"""What a bundle's manifest says about its calibration."""

from __future__ import annotations

import hashlib
import json
import math

from gwp_edge.calibration.choice import Choice
from gwp_edge.calibration.record import CalibrationRecord, record_bytes
from gwp_edge.calibration.sensitivity import Budget, SearchResult
from gwp_edge.export.precision import Recipe
from gwp_edge.manifest import Calibration, CalibrationSample, CurvePoint, MeasuredError, UnitCost


def summarise(
    record: CalibrationRecord,
    choice: Choice,
    recipe: Recipe,
    found: SearchResult | None,
    budget: Budget | None,
) -> Calibration:
    """Return the manifest's entry.

    Args:
        record: what was observed.
        choice: how ranges followed from it.
        recipe: the one that is exported.
        found: the search; None without one.
        budget: what it had to keep within; None where nothing was measured against one.
    """
    samples = tuple(
        CalibrationSample(dataset=r.dataset, episode=r.episode, frame=r.frame, sha256=r.sha256)
        for r in record.samples
    )
    listed = [[s.dataset, s.episode, s.frame, s.sha256] for s in samples]
    return Calibration(
        dataset=str(record.provenance.get("dataset", "")),
        n_samples=len(samples),
        samples=samples,
        samples_sha256=hashlib.sha256(json.dumps(listed).encode()).hexdigest(),
        record_sha256=hashlib.sha256(record_bytes(record)).hexdigest(),
        seed=int(record.provenance["seed"]),
        is_synthetic=record.is_synthetic,
        observer=choice.method,
        is_smoothed=choice.is_smoothed,
        budget_rad=_finite(budget.joints_rad) if budget else None,
        budget_m=_finite(budget.grippers_m) if budget else None,
        curve=tuple(
            CurvePoint(quantized_share=p.quantized_share, **_p99(p.error))
            for p in (found.curve if found else ())
        ),
        sensitivity=tuple(
            UnitCost(
                name=cost.unit.name,
                format=recipe.default,
                is_quantized=recipe.of(cost.unit.layers[0]) == recipe.default,
                saved_bytes=cost.unit.saved_bytes,
                flops=cost.unit.flops,
                **_p99(cost.error),
            )
            for cost in (found.sweep if found else ())
        ),
    )


def _p99(error: MeasuredError) -> dict[str, float | None]:
    return {
        "joints_rad_p99": error.joints_rad.p99 if error.joints_rad else None,
        "grippers_m_p99": error.grippers_m.p99 if error.grippers_m else None,
    }


def _finite(limit: float) -> float | None:
    return limit if math.isfinite(limit) else None
