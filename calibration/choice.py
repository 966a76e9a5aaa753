"""How ranges follow from a record: every way is tried, and measured, where that can be done."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from gwp_edge.calibration.collect import SMOOTHED
from gwp_edge.calibration.forward import Network, Progress
from gwp_edge.calibration.judge import Judge, LayerSize
from gwp_edge.calibration.record import CalibrationRecord
from gwp_edge.calibration.sensitivity import Budget, describe
from gwp_edge.calibration.thresholds import Method
from gwp_edge.export.folding import FoldedWeights
from gwp_edge.export.ops import WeightSource
from gwp_edge.export.precision import STATIC_FORMATS, Recipe, scale_key
from gwp_edge.types import Float32Array

logger = logging.getLogger(__name__)

METHODS: tuple[Method, ...] = ("minmax", "percentile", "mse", "entropy")
# A range seen on n rows is widened by this over sqrt(n): the state token is one row a sample.
_HEADROOM = 2.0
# Above this many weights, one pass takes minutes on a CPU, and the choice of ranges is not tried.
_MANY_WEIGHTS = 500_000_000
_STAGES = ("prefill", "denoise")


@dataclass(frozen=True, kw_only=True)
class Choice:
    """How ranges follow from the record."""

    method: Method
    is_smoothed: bool


def recipe_with_ranges(
    base: Recipe,
    record: CalibrationRecord,
    choice: Choice,
    layers: Sequence[str],
    percentile: float,
) -> Recipe:
    """Return ``base`` with ranges and means; a layer whose input was always zero stays high."""
    prefix = SMOOTHED if choice.is_smoothed else ""
    thresholds: dict[str, float] = {}
    means: dict[str, Float32Array] = {}
    overrides = dict(base.overrides)
    for layer in layers:
        fmt = base.of(layer)
        for stage in _STAGES:
            key = scale_key(stage, layer)
            observer = record.tensors.get(prefix + key)
            if observer is None:
                continue
            means[key] = record.means[prefix + key]
            if fmt not in STATIC_FORMATS or key in thresholds:
                continue
            found = observer.threshold(
                choice.method,
                percentile=percentile,
                number_format="fp8" if fmt == "fp8" else "int8",
            )
            n_rows = observer.histogram().n_values / len(means[key])
            thresholds[key] = found * (1.0 + _HEADROOM / math.sqrt(n_rows))
        used = [thresholds.get(scale_key(stage, layer), 1.0) for stage in _STAGES]
        if fmt in STATIC_FORMATS and min(used) == 0.0:
            overrides[layer] = (base.rest, "its input was zero in all of calibration: no range")
    return replace(base, thresholds=thresholds, means=means, overrides=overrides)


def choose_ranges(
    network: Network,
    base: Recipe,
    sizes: Mapping[str, LayerSize],
    record: CalibrationRecord,
    judge: Judge | None,
    *,
    observer: str,
    percentile: float,
    budget: Budget | None,
    device: str,
    notes: list[str],
    progress: Progress | None,
) -> Choice:
    """Return the observer, and whether to smooth, with the least error on held-out samples.

    Where that is not measured, a line is added to ``notes``.
    """
    methods: Sequence[Method] = [m for m in METHODS if observer in ("auto", m)]
    if not any(base.of(layer) in STATIC_FORMATS for layer in sizes):
        methods = methods[:1]  # no activation is quantized
    smoothings = (False, True) if record.smoothing else (False,)
    many = sum(size.n_values for size in sizes.values()) > _MANY_WEIGHTS
    if judge is None or (many and device == "cpu"):
        method: Method = "mse" if observer == "auto" else methods[0]
        # Factors are there only where they are predicted to lower the rounding noise.
        choice = Choice(method=method, is_smoothed=bool(record.smoothing))
        why = "nothing to measure on" if judge is None else "too slow to measure on a CPU"
        folded = ", with smoothing as predicted" if choice.is_smoothed else ""
        notes.append(f"ranges are chosen by {method}{folded}: {why}")
        return choice
    tried: list[tuple[float, Choice]] = []
    choices = [Choice(method=m, is_smoothed=s) for s in smoothings for m in methods]
    # Only the ratio of both units matters here.
    scale = budget or Budget()
    for i, choice in enumerate(choices):
        recipe = recipe_with_ranges(base, record, choice, tuple(sizes), percentile)
        weights: WeightSource = network.weights
        if choice.is_smoothed:
            weights = FoldedWeights(network.weights, record.smoothing)
        error = judge.measure(recipe, weights)
        logger.info("ranges by %s: %s", choice, describe(error))
        tried.append((scale.use(error), choice))
        if progress is not None:
            progress("choose ranges", i + 1, len(choices))
    return min(tried, key=lambda pair: pair[0])[1]
