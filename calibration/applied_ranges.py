"""What a quantized bundle's codes follow from, kept in the bundle itself.

With it, and the checkpoint, the bundle's arithmetic can be emulated layer by layer anywhere.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors.numpy import save

from gwp_edge.bundle import Bundle
from gwp_edge.calibration.collect import SMOOTHED
from gwp_edge.calibration.observers import Convergence
from gwp_edge.calibration.record import CalibrationRecord
from gwp_edge.calibration.thresholds import Method
from gwp_edge.errors import SpecError
from gwp_edge.export.precision import FLOAT_FORMATS, PRECISIONS, Format, Recipe, make_recipe
from gwp_edge.manifest import Precision
from gwp_edge.types import Float32Array

RANGES_FILE = "ranges.safetensors"


@dataclass(frozen=True, kw_only=True)
class AppliedRanges:
    """Ranges as a bundle applies them; keys are those of ``scale_key``.

    Attributes:
        block: inputs that share a scale in w4.
        thresholds: largest magnitude that the codes of an input can express.
        means: mean input (in,) of a layer, which its bias accounts for.
        factors: what was folded, by the name of what it divides; see :mod:`folding`.
        step_amax: largest magnitude seen at an input in every step (N,) that it ran in.
        convergence: whether each range in ``thresholds`` still grows with more samples.
        method: observer that ``convergence`` judges by; empty where there is none.
    """

    block: int = 32
    thresholds: Mapping[str, float] = field(default_factory=dict)
    means: Mapping[str, Float32Array] = field(default_factory=dict)
    factors: Mapping[str, Float32Array] = field(default_factory=dict)
    step_amax: Mapping[str, Float32Array] = field(default_factory=dict)
    convergence: Mapping[str, Convergence] = field(default_factory=dict)
    method: str = ""


def applied_ranges(
    recipe: Recipe,
    record: CalibrationRecord | None,
    *,
    is_smoothed: bool,
    method: Method = "minmax",
    percentile: float = 99.9,
) -> AppliedRanges:
    """Return the ranges that a recipe was given from a record.

    Args:
        recipe: with ranges.
        record: what was observed; None for none.
        is_smoothed: the recipe's ranges are those with factors folded in.
        method: observer to judge convergence by.
        percentile: for the percentile observer.
    """
    if record is None:
        return AppliedRanges(block=recipe.block)
    prefix = SMOOTHED if is_smoothed else ""
    return AppliedRanges(
        block=recipe.block,
        thresholds=recipe.thresholds,
        means=recipe.means,
        factors=record.smoothing if is_smoothed else {},
        step_amax={
            key: np.array([seen.histogram(step).amax for step in seen.steps], np.float32)
            for key in recipe.means
            if (seen := record.tensors.get(prefix + key)) is not None
        },
        convergence={
            key: seen.convergence(
                method,
                percentile=percentile,
                number_format="fp8" if recipe.default == "fp8" else "int8",
            )
            for key in recipe.thresholds
            if (seen := record.tensors.get(prefix + key)) is not None
        },
        method=method,
    )


def save_ranges(path: Path, ranges: AppliedRanges) -> None:
    """Write ranges; equal ones give equal bytes."""
    arrays: dict[str, npt.NDArray[Any]] = {"block": np.array([ranges.block], np.int64)}
    for key, threshold in ranges.thresholds.items():
        arrays[f"threshold:{key}"] = np.array([threshold], np.float64)
    for kind, named in (
        ("mean", ranges.means),
        ("factor", ranges.factors),
        ("amax", ranges.step_amax),
    ):
        for key, vector in named.items():
            arrays[f"{kind}:{key}"] = np.ascontiguousarray(vector, np.float32)
    for key, seen in ranges.convergence.items():
        arrays[f"growth:{key}"] = np.array([seen.amax, seen.thresholds], np.float64)
    if ranges.convergence:
        arrays["method"] = np.frombuffer(ranges.method.encode(), np.uint8)
    path.write_bytes(save(dict(sorted(arrays.items()))))


def load_ranges(bundle: Bundle) -> AppliedRanges:
    """Read the ranges of a bundle; empty ones where it has none.

    Raises:
        SpecError: the file holds something else.
    """
    name = bundle.manifest.precision.ranges
    if name is None:
        return AppliedRanges()
    kinds = ("threshold", "mean", "factor", "amax", "growth")
    found: dict[str, dict[str, Any]] = {kind: {} for kind in kinds}
    block, method = None, ""
    for key, value in bundle.arrays(name).items():
        kind, _, rest = key.partition(":")
        if key == "block":
            block = int(value[0])
        elif key == "method":
            method = value.tobytes().decode()
        elif kind in found:
            found[kind][rest] = value
        else:
            raise SpecError(f"{bundle.root}: {name} has an unknown entry {key}; export it again")
    if block is None:
        raise SpecError(f"{bundle.root}: {name} has no block size; export the policy again")
    return AppliedRanges(
        block=block,
        thresholds={key: float(value[0]) for key, value in found["threshold"].items()},
        means=found["mean"],
        factors=found["factor"],
        step_amax=found["amax"],
        convergence={
            key: Convergence.of(key, value[0].tolist(), value[1].tolist())
            for key, value in found["growth"].items()
        },
        method=method,
    )


def recipe_of(precision: Precision, ranges: AppliedRanges) -> Recipe:
    """Return the recipe that a bundle was exported with, layer by layer from its manifest.

    Raises:
        SpecError: a format that this version does not know.
    """
    overrides: dict[str, tuple[Format, str]] = {}
    for layer in precision.layers:
        overrides[layer.name] = (_known(layer.format, layer.name, PRECISIONS), layer.reason)
    return replace(
        make_recipe(precision.name),
        rest=_known(precision.cache, "the prefix K/V", FLOAT_FORMATS),
        overrides=overrides,
        thresholds=ranges.thresholds,
        means=ranges.means,
        block=ranges.block,
    )


def _known(name: str, what: str, formats: tuple[Format, ...]) -> Format:
    for known in formats:
        if known == name:
            return known
    raise SpecError(f"{what} is in {name}, expected {', '.join(formats)}; update gwp-edge")
