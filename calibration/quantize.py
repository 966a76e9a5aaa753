"""From a checkpoint and a dataset to a quantized recipe whose error was measured.

Ranges come from one part of the dataset; every choice and every figure from episodes that the
ranges never saw.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace

from gwp_edge.calibration.applied_ranges import AppliedRanges, applied_ranges
from gwp_edge.calibration.choice import METHODS, choose_ranges, recipe_with_ranges
from gwp_edge.calibration.collect import (
    load_set,
)
from gwp_edge.calibration.forward import Network, Progress
from gwp_edge.calibration.judge import Judge, LayerSize, layer_sizes
from gwp_edge.calibration.obtain_record import as_recorded, check_unseen, obtain_record
from gwp_edge.calibration.quantize_options import QuantizeOptions
from gwp_edge.calibration.record import CalibrationRecord
from gwp_edge.calibration.sensitivity import (
    MAX_OVER_P99,
    Budget,
    SearchResult,
    describe,
    describe_budget,
    make_units,
    search,
)
from gwp_edge.calibration.summary import summarise
from gwp_edge.errors import BuildError, SpecError
from gwp_edge.export.folding import FoldedWeights
from gwp_edge.export.ops import WeightSource
from gwp_edge.export.precision import (
    INT4_BLOCKS,
    QUANTIZED_FORMATS,
    STATIC_FORMATS,
    Recipe,
    make_recipe,
)
from gwp_edge.export.quantized_linear import weight_bytes
from gwp_edge.export.recipe_file import read_recipe
from gwp_edge.export.targets import check_target_precision, with_whole_blocks
from gwp_edge.lerobot.dataset import LeRobotDataset
from gwp_edge.manifest import Calibration, MeasuredError
from gwp_edge.types import Float32Array

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Quantized:
    """What to export.

    Attributes:
        recipe: format, range and reason of every layer.
        weights: the checkpoint, with smoothing folded in where that was chosen.
        error: measured on held-out samples; None without a dataset.
        calibration: for the manifest; None where nothing was calibrated.
        ranges: what the codes follow from, for the bundle.
        notes: what a user must know.
    """

    recipe: Recipe
    weights: WeightSource
    error: MeasuredError | None
    calibration: Calibration | None
    ranges: AppliedRanges
    notes: tuple[str, ...]


def quantize(
    network: Network,
    options: QuantizeOptions,
    *,
    known_prompts: Mapping[str, Float32Array],
    progress: Progress | None = None,
) -> Quantized:
    """Calibrate, choose ranges and formats by measured error, and say what it costs.

    Args:
        network: the checkpoint.
        options: what to do.
        known_prompts: prompt embeddings (64, text_dim) of the bundle by task.
        progress: called with stage, done and total.

    Raises:
        SpecError: an option, the dataset or the record does not fit.
        BuildError: no recipe meets the budget, and ``go_on`` is not set.
    """
    check_target_precision(options.target, options.precision)
    if options.record is not None and not options.record.absolute().parent.is_dir():
        raise SpecError(f"--calibration-record {options.record}: the folder does not exist")
    if options.block not in INT4_BLOCKS:
        known = ", ".join(map(str, INT4_BLOCKS))
        raise SpecError(f"--block: expected one of {known}, got {options.block}")
    if not 0.0 < options.percentile <= 100.0:
        raise SpecError(f"--percentile: expected above 0 up to 100, got {options.percentile:g}")
    if options.observer not in ("auto", *METHODS):
        raise SpecError(f"--observer {options.observer}: choose auto, {', '.join(METHODS)}")
    sizes = layer_sizes(network)
    base = replace(make_recipe(options.precision), rest=options.rest, block=options.block)
    if options.recipe_file is not None:
        base = read_recipe(options.recipe_file, base, tuple(sizes))
        for fmt in sorted({base.of(layer) for layer in sizes} & set(QUANTIZED_FORMATS)):
            check_target_precision(options.target, fmt)
    widths = {layer: network.weights.shape(f"{layer}.weight")[1] for layer in sizes}
    whole = with_whole_blocks(base, options.target, widths)
    n_ragged = len(whole.overrides) - len(base.overrides)
    base = whole
    if options.budget is not None and options.dataset is None:
        raise SpecError(
            "a budget of action error is measured on held-out episodes: pass --calibration "
            "DATASET, or --no-budget"
        )
    notes: list[str] = []
    if n_ragged:
        notes.append(
            f"{n_ragged} layers stay in {base.rest}: their inputs are not whole int4 blocks of "
            f"{base.block}"
        )
    with ExitStack() as stack:
        dataset = None
        if options.dataset is not None:
            dataset = stack.enter_context(LeRobotDataset.open(options.dataset))
        record = obtain_record(network, dataset, options, known_prompts, notes, progress)
        if record is None and any(base.of(layer) in STATIC_FORMATS for layer in sizes):
            raise SpecError(
                f"--precision {options.precision} needs ranges: pass --calibration DATASET"
            )
        judge = None
        if dataset is not None:
            held_out = load_set(
                network,
                dataset,
                # The split is the record's: with another seed its samples would be judged on.
                options.collect if record is None else as_recorded(options.collect, record),
                held_out=True,
                known_prompts=known_prompts,
                progress=progress,
            )
            check_unseen(held_out, record)
            judge = Judge(network, held_out, options.collect.device, dataset.name)
    return _decide(network, options, base, sizes, record, judge, notes, progress)


def _decide(
    network: Network,
    options: QuantizeOptions,
    base: Recipe,
    sizes: Mapping[str, LayerSize],
    record: CalibrationRecord | None,
    judge: Judge | None,
    notes: list[str],
    progress: Progress | None,
) -> Quantized:
    recipe, weights, choice = base, network.weights, None
    if record is not None:
        choice = choose_ranges(
            network,
            base,
            sizes,
            record,
            judge,
            observer=options.observer,
            percentile=options.percentile,
            budget=options.budget,
            device=options.collect.device,
            notes=notes,
            progress=progress,
        )
        recipe = recipe_with_ranges(base, record, choice, tuple(sizes), options.percentile)
        if choice.is_smoothed:
            weights = FoldedWeights(network.weights, record.smoothing)
    found: SearchResult | None = None
    if judge is not None and options.budget is not None and options.recipe_file is None:
        found = _search(options, recipe, weights, sizes, judge, options.budget, progress)
        recipe = _accept(found, recipe, options, options.budget, notes)
    elif options.recipe_file is not None:
        notes.append(f"formats of layers follow {options.recipe_file.name}, not the budget search")
    error = judge.measure(recipe, weights) if judge is not None else None
    if error is not None and options.budget is not None and options.recipe_file is not None:
        _require(options.budget, error, options, notes)
    summary = None
    if record is not None and choice is not None:
        searched = judge is not None and options.recipe_file is None
        summary = summarise(record, choice, recipe, found, options.budget if searched else None)
    is_smoothed = choice is not None and choice.is_smoothed
    # By the largest values, whatever the observer: what it clips is not what calibration missed.
    ranges = applied_ranges(recipe, record, is_smoothed=is_smoothed)
    growing = sum(found.is_growing for found in ranges.convergence.values())
    if growing:
        notes.append(f"{growing} of {len(ranges.convergence)} ranges still grew with more samples")
    return Quantized(
        recipe=recipe,
        weights=weights,
        error=error,
        calibration=summary,
        ranges=ranges,
        notes=tuple(notes),
    )


def _require(
    budget: Budget, error: MeasuredError, options: QuantizeOptions, notes: list[str]
) -> None:
    """Hold a recipe that was written by hand to the budget."""
    if budget.use(error) <= 1.0:
        return
    message = (
        f"the recipe gives {describe(error)}, allowed {describe_budget(budget)} and "
        f"{MAX_OVER_P99:g} times that at most"
    )
    if not options.go_on:
        raise BuildError(f"{message}; change it, allow more with --max-error, or --go-on")
    notes.append(f"{message}; exported all the same")


def _search(
    options: QuantizeOptions,
    recipe: Recipe,
    weights: WeightSource,
    sizes: Mapping[str, LayerSize],
    judge: Judge,
    budget: Budget,
    progress: Progress | None,
) -> SearchResult:
    layers = [layer for layer in sizes if recipe.of(layer) != recipe.rest]
    saved = {
        layer: weight_bytes(sizes[layer].n_values, recipe.rest)
        - weight_bytes(sizes[layer].n_values, recipe.of(layer))
        for layer in layers
    }
    units = make_units(layers, saved, {layer: sizes[layer].flops for layer in layers})

    def advance(done: int, total: int) -> None:
        if progress is not None:
            progress("measure each layer alone", done, total)

    return search(recipe, units, lambda r: judge.measure(r, weights), budget, advance)


def _accept(
    found: SearchResult,
    recipe: Recipe,
    options: QuantizeOptions,
    budget: Budget,
    notes: list[str],
) -> Recipe:
    whole = found.curve[0]
    if found.recipe is None:
        curve = "; ".join(
            f"{p.quantized_share:.0%} {options.precision}: {describe(p.error)}" for p in found.curve
        )
        message = (
            f"no recipe with {options.precision} keeps within {describe_budget(budget)} ({curve})"
        )
        if not options.go_on:
            raise BuildError(
                f"{message}; allow more with --max-error, choose another --precision, or go on"
            )
        notes.append(f"{message}; exported all the same")
        return recipe
    if found.sweep:
        share = next(p.quantized_share for p in found.curve if budget.use(p.error) <= 1.0)
        notes.append(
            f"{share:.0%} of the weights of the blocks are {options.precision} to keep within "
            f"{describe_budget(budget)}; all of them would give {describe(whole.error)}"
        )
    return found.recipe
