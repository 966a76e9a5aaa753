"""What quantizing each layer costs in action error, and a recipe that keeps within a budget.

The sweep quantizes one unit, a layer or a group of layers, and leaves the rest in high precision.
Errors of units add up nearly like variances, so the units with the most error for the bytes they
save are the ones to keep high. How many of them follows by bisection on measured errors; nothing
is taken from a prediction.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from gwp_edge.errors import SpecError
from gwp_edge.export.precision import Format, Recipe
from gwp_edge.manifest import MeasuredError

MAX_UNITS = 64
MAX_OVER_P99 = 10.0
_BLOCK = re.compile(r"^blocks\.(\d+)\.(.+)$")

# Measures a recipe on held-out samples.
Measure = Callable[[Recipe], MeasuredError]


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """Largest allowed 99th percentile of the action error: rad for joints, m for grippers.

    The largest error of all may be ``MAX_OVER_P99`` times as large: a percentile alone would let
    one chunk in a hundred go anywhere.

    Raises:
        SpecError: a limit is not positive. Infinity means none.
    """

    joints_rad: float = 2e-3
    grippers_m: float = 2e-4

    def __post_init__(self) -> None:
        for flag, limit in (
            ("--max-error", self.joints_rad),
            ("--max-gripper-error", self.grippers_m),
        ):
            if not limit > 0:
                raise SpecError(f"{flag}: expected a positive number, got {limit:g}")

    def use(self, error: MeasuredError) -> float:
        """Return the share of the budget that an error takes; above 1 it does not fit."""
        return max(self._share(error, "p99"), self._share(error, "max") / MAX_OVER_P99)

    def typical_use(self, error: MeasuredError) -> float:
        """Return the mean error over the budget: less noisy than a percentile, for ranking."""
        return self._share(error, "mean")

    def _share(self, error: MeasuredError, field: str) -> float:
        shares = [0.0]
        for found, limit in (
            (error.joints_rad, self.joints_rad),
            (error.grippers_m, self.grippers_m),
        ):
            if found is not None:
                shares.append(float(getattr(found, field)) / limit)
        return max(shares)


@dataclass(frozen=True, slots=True, kw_only=True)
class Unit:
    """Layers that are kept or quantized together.

    Attributes:
        name: for reports.
        layers: their names.
        saved_bytes: what quantizing them saves in the weight file.
        flops: operations in one chunk, which then run in the cheaper format.
    """

    name: str
    layers: tuple[str, ...]
    saved_bytes: int
    flops: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Sensitivity:
    """What one unit alone costs."""

    unit: Unit
    error: MeasuredError


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """One measured recipe on the way from all quantized to all high.

    Attributes:
        n_high: units kept in high precision.
        quantized_share: bytes of weights in the quantized format, as a share of all that could be.
        error: measured.
    """

    n_high: int
    quantized_share: float
    error: MeasuredError


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchResult:
    """A recipe within the budget, or all that was tried.

    Attributes:
        recipe: the recipe; None where not even one unit can be quantized.
        sweep: cost of each unit alone; empty where the whole recipe fits at once.
        curve: every recipe that was measured, by ``n_high``.
    """

    recipe: Recipe | None
    sweep: tuple[Sensitivity, ...]
    curve: tuple[Point, ...]


def make_units(
    layers: Sequence[str], saved_bytes: Mapping[str, int], flops: Mapping[str, int]
) -> tuple[Unit, ...]:
    """Return one unit for each layer, or in a deep network for each kind of layer in a few blocks.

    Args:
        layers: layers to be quantized, in order.
        saved_bytes: bytes that each saves.
        flops: operations of each in one chunk.
    """
    span = 1
    while len(groups := _group(layers, span)) > MAX_UNITS and len(groups) > len(_group(layers, 0)):
        span += 1
    return tuple(
        Unit(
            name=name,
            layers=tuple(members),
            saved_bytes=sum(saved_bytes[m] for m in members),
            flops=sum(flops[m] for m in members),
        )
        for name, members in groups.items()
    )


def _group(layers: Sequence[str], span: int) -> dict[str, list[str]]:
    """Group layers of one kind in ``span`` neighbouring blocks; 0 for all blocks."""
    groups: dict[str, list[str]] = {}
    for layer in layers:
        match = _BLOCK.match(layer)
        if match is None or span == 1:
            groups.setdefault(layer, []).append(layer)
            continue
        first = int(match[1]) // span * span if span else 0
        label = f"blocks.{first}-{first + span - 1}" if span else "blocks.*"
        groups.setdefault(f"{label}.{match[2]}", []).append(layer)
    return groups


def sweep(
    recipe: Recipe,
    units: Sequence[Unit],
    measure: Measure,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[Sensitivity, ...]:
    """Measure every unit alone: it is quantized, all others compute in ``recipe.rest``."""
    found = []
    for i, unit in enumerate(units):
        others = [layer for u in units if u is not unit for layer in u.layers]
        alone = _keep(recipe, dict.fromkeys(others, "not in this measurement"))
        found.append(Sensitivity(unit=unit, error=measure(alone)))
        if progress is not None:
            progress(i + 1, len(units))
    return tuple(found)


def search(
    recipe: Recipe,
    units: Sequence[Unit],
    measure: Measure,
    budget: Budget,
    progress: Callable[[int, int], None] | None = None,
) -> SearchResult:
    """Return a recipe whose measured error keeps within ``budget``.

    Where the whole recipe fits, nothing else is measured.
    """
    total = sum(u.saved_bytes for u in units) or 1
    points: dict[int, Point] = {}
    whole = measure(recipe)
    points[0] = Point(n_high=0, quantized_share=1.0, error=whole)
    if budget.use(whole) <= 1.0:
        reason = f"all layers together: {describe(whole)}, within {describe_budget(budget)}"
        reasons = {layer: (recipe.of(layer), reason) for u in units for layer in u.layers}
        fits = replace(recipe, overrides={**reasons, **recipe.overrides})
        return SearchResult(recipe=fits, sweep=(), curve=(points[0],))
    costs = sweep(recipe, units, measure, progress)
    ranked = sorted(
        costs,
        key=lambda c: -(budget.typical_use(c.error) ** 2) / max(c.unit.saved_bytes, 1),
    )

    def at(n_high: int) -> Point:
        if n_high not in points:
            saved = sum(c.unit.saved_bytes for c in ranked[n_high:])
            error = measure(_explained(recipe, ranked, n_high, budget))
            points[n_high] = Point(n_high=n_high, quantized_share=saved / total, error=error)
        return points[n_high]

    low, high = 0, len(ranked)  # low does not fit; high, nothing quantized, does
    while high - low > 1:
        middle = (low + high) // 2
        if budget.use(at(middle).error) <= 1.0:
            high = middle
        else:
            low = middle
    curve = tuple(points[n] for n in sorted(points))
    found = _explained(recipe, ranked, high, budget) if high < len(ranked) else None
    return SearchResult(recipe=found, sweep=costs, curve=curve)


def _keep(recipe: Recipe, reasons: Mapping[str, str]) -> Recipe:
    high: dict[str, tuple[Format, str]] = {k: (recipe.rest, why) for k, why in reasons.items()}
    return replace(recipe, overrides={**recipe.overrides, **high})


def _explained(
    recipe: Recipe, ranked: Sequence[Sensitivity], n_high: int, budget: Budget
) -> Recipe:
    """Keep the first ``n_high`` units high and give every layer its reason."""
    overrides = dict(recipe.overrides)
    for i, cost in enumerate(ranked):
        fmt: Format = recipe.rest if i < n_high else recipe.default
        why = "kept high to stay within the budget" if i < n_high else "within the budget"
        reason = (
            f"{why} of {describe_budget(budget)}; {cost.unit.name} alone: {describe(cost.error)}"
        )
        overrides |= dict.fromkeys(cost.unit.layers, (fmt, reason))
    return replace(recipe, overrides=overrides)


def describe(error: MeasuredError) -> str:
    """Return the 99th percentiles of an error in words, and maxima that stand out."""
    parts = []
    for part, unit in ((error.joints_rad, "mrad"), (error.grippers_m, "mm")):
        if part is not None:
            far = part.max > MAX_OVER_P99 * part.p99
            most = f" (max {part.max * 1e3:.3g})" if far else ""
            parts.append(f"{part.p99 * 1e3:.3g} {unit}{most}")
    return f"p99 {', '.join(parts)}"


def describe_budget(budget: Budget) -> str:
    """Return a budget in words."""
    limits = ((budget.joints_rad, "mrad"), (budget.grippers_m, "mm"))
    return ", ".join(f"{x * 1e3:.3g} {unit}" for x, unit in limits if math.isfinite(x))
