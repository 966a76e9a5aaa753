"""What a verification's page draws beside its errors."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from gwp_edge.bundle import Bundle
from gwp_edge.calibration.verify_engine import Answer
from gwp_edge.calibration.verify_schema import PlotChunk, Rows, Sensitivity
from gwp_edge.types import FloatArray

_N_PLOTS = 4


def sensitivity_of(bundle: Bundle) -> tuple[Sensitivity, ...]:
    """Return what export measured of each part alone; empty where it did not."""
    calibration = bundle.manifest.calibration
    return tuple(
        Sensitivity(name=cost.name, p99_rad=cost.joints_rad_p99, format=cost.format)
        for cost in (calibration.sensitivity if calibration is not None else ())
        if cost.joints_rad_p99 is not None
    )


def plot_chunks(
    answers: Sequence[Answer], reference: list[FloatArray] | None
) -> tuple[PlotChunk, ...]:
    """Return the worst sample, then others spread over the rest."""
    truth = reference if reference is not None else [a.recorded for a in answers]
    worst = [float(np.abs(a.actions - t).max()) for a, t in zip(answers, truth, strict=True)]
    order = sorted(range(len(answers)), key=lambda i: -worst[i])
    picked = [order[i * len(order) // _N_PLOTS] for i in range(min(_N_PLOTS, len(order)))]
    return tuple(
        PlotChunk(
            episode=answers[i].episode,
            frame=answers[i].frame,
            task=answers[i].prompt.task,
            bundle=_rows(answers[i].actions),
            reference=None if reference is None else _rows(reference[i]),
            recorded=_rows(answers[i].recorded),
        )
        for i in dict.fromkeys(picked)
    )


def _rows(actions: FloatArray) -> Rows:
    return tuple(tuple(round(float(v), 6) for v in row) for row in actions)
