"""From a checkpoint and a dataset to a quantized recipe whose error was measured.

Ranges come from one part of the dataset; every choice and every figure from episodes that the
ranges never saw.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path

import msgspec
import numpy as np
import torch

from gwp_edge.bundle import Calibration, CurvePoint, MeasuredError
from gwp_edge.calibration.collect import (
    SMOOTHED,
    CollectOptions,
    SampleSet,
    collect,
    load_set,
    quantizable_layers,
)
from gwp_edge.calibration.forward import BatchRunner, Network, Progress
from gwp_edge.calibration.provenance import require_recorded
from gwp_edge.calibration.record import CalibrationRecord, load_record, save_record
from gwp_edge.calibration.sensitivity import (
    Budget,
    Point,
    SearchResult,
    describe,
    describe_budget,
    make_units,
    search,
)
from gwp_edge.calibration.thresholds import Method
from gwp_edge.errors import BuildError, SpecError
from gwp_edge.export.errors_measured import measure_error
from gwp_edge.export.folding import FoldedWeights
from gwp_edge.export.graphs import denoise_graph, prefill_graph
from gwp_edge.export.ops import WeightSource
from gwp_edge.export.precision import (
    STATIC_FORMATS,
    Format,
    Recipe,
    make_recipe,
    scale_key,
)
from gwp_edge.export.quantized_linear import weight_bytes
from gwp_edge.export.recipe_file import read_recipe
from gwp_edge.export.targets import check_target_precision
from gwp_edge.export.weight_bank import WeightBank
from gwp_edge.lerobot.dataset import LeRobotDataset
from gwp_edge.types import Float32Array, FloatArray

logger = logging.getLogger(__name__)

METHODS: tuple[Method, ...] = ("minmax", "percentile", "mse", "entropy")
# A range seen on n rows is widened by this over sqrt(n): the state token is one row a sample.
_HEADROOM = 2.0
# Above this many weights, one pass takes minutes on a CPU, and the choice of ranges is not tried.
_MANY_WEIGHTS = 500_000_000
_STAGES = ("prefill", "denoise")


@dataclass(frozen=True, kw_only=True)
class QuantizeOptions:
    """How to quantize.

    Attributes:
        precision: a quantized format.
        target: device family; decides which formats are possible.
        observer: how ranges are chosen from histograms; ``auto`` measures all.
        percentile: for the percentile observer.
        budget: largest allowed action error; None for no search.
        recipe_file: layer patterns that replace the search.
        record: calibration record: read where it exists, else written.
        dataset: LeRobot dataset; ranges where there is no record, and held-out episodes.
        collect: samples, seed, device.
        rest: format of what is not quantized.
        block: inputs that share a scale in w4.
        allow_synthetic: take a dataset that is not recorded; the bundle then says so.
        go_on: where no recipe meets the budget, quantize everything all the same.
    """

    precision: Format
    target: str = "cpu"
    observer: Method | str = "auto"
    percentile: float = 99.9
    budget: Budget | None = field(default_factory=Budget)
    recipe_file: Path | None = None
    record: Path | None = None
    dataset: Path | None = None
    collect: CollectOptions = field(default_factory=CollectOptions)
    rest: Format = "fp32"
    block: int = 32
    allow_synthetic: bool = False
    go_on: bool = False


@dataclass(frozen=True, kw_only=True)
class Quantized:
    """What to export.

    Attributes:
        recipe: format, range and reason of every layer.
        weights: the checkpoint, with smoothing folded in where that was chosen.
        error: measured on held-out samples; None without a dataset.
        calibration: for the manifest; None where nothing was calibrated.
        notes: what a user must know.
    """

    recipe: Recipe
    weights: WeightSource
    error: MeasuredError | None
    calibration: Calibration | None
    notes: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerSize:
    """Weights of a layer, and its operations in one chunk."""

    n_values: int
    flops: int


def layer_sizes(network: Network) -> dict[str, LayerSize]:
    """Return all quantizable layers that the graphs run, in order."""
    spec, exact = network.spec, make_recipe("fp32")
    sizes: dict[str, LayerSize] = {}
    wanted = set(quantizable_layers(network))
    for record, n_runs in ((prefill_graph, 1), (denoise_graph, spec.sampler.n_steps)):
        for cost in record(network.weights, spec, exact, WeightBank(), "native").costs:
            if cost.name in wanted:
                known = sizes.get(cost.name)
                flops = cost.flops * n_runs + (known.flops if known else 0)
                sizes[cost.name] = LayerSize(n_values=cost.weight_bytes // 4, flops=flops)
    return {name: sizes[name] for name in quantizable_layers(network) if name in sizes}


def fingerprint(network: Network) -> str:
    """Return a hash that tells checkpoints apart without reading them whole."""
    digest = hashlib.sha256(json.dumps(msgspec.to_builtins(network.spec.network)).encode())
    for layer in quantizable_layers(network):
        bias = network.weights.load(f"{layer}.bias").to(torch.float32)
        digest.update(bias.numpy().tobytes())
    return digest.hexdigest()


class _Judge:
    """Measures recipes on held-out samples. Threads: one owner."""

    def __init__(self, network: Network, held_out: SampleSet, device: str, name: str) -> None:
        self._runner = BatchRunner(network, held_out.prepared, device=device)
        self._exact = self._actions(make_recipe("fp32"), network.weights)
        self._channels = network.spec.channels
        episodes = sorted({ref.episode for ref in held_out.refs})
        listed = ", ".join(str(e) for e in episodes)
        self._inputs = (
            f"{len(held_out.refs)} held-out samples of {name} (episode {listed}), "
            "emulated arithmetic"
        )
        self.n_runs = 0

    def _actions(self, recipe: Recipe, weights: WeightSource) -> list[FloatArray]:
        return self._runner.actions(self._runner.run(recipe, weights=weights))

    def measure(self, recipe: Recipe, weights: WeightSource) -> MeasuredError:
        """Return the action error of a recipe against float32, same noise."""
        self.n_runs += 1
        actions = self._actions(recipe, weights)
        if not np.isfinite(np.stack(actions)).all():
            raise BuildError(f"{recipe.name}: actions are not finite; choose another --precision")
        return measure_error(actions, self._exact, self._channels, self._inputs)


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
    if options.observer not in ("auto", *METHODS):
        raise SpecError(f"--observer {options.observer}: choose auto, {', '.join(METHODS)}")
    sizes = layer_sizes(network)
    base = replace(make_recipe(options.precision), rest=options.rest, block=options.block)
    if options.recipe_file is not None:
        base = read_recipe(options.recipe_file, base, tuple(sizes))
    notes: list[str] = []
    with ExitStack() as stack:
        dataset = None
        if options.dataset is not None:
            dataset = stack.enter_context(LeRobotDataset.open(options.dataset))
        record = _record(network, dataset, options, known_prompts, notes, progress)
        if record is None and any(base.of(layer) in STATIC_FORMATS for layer in sizes):
            raise SpecError(
                f"--precision {options.precision} needs ranges: pass --calibration DATASET"
            )
        judge = None
        if dataset is not None:
            held_out = load_set(
                network,
                dataset,
                options.collect,
                held_out=True,
                known_prompts=known_prompts,
                progress=progress,
            )
            judge = _Judge(network, held_out, options.collect.device, dataset.name)
    return _decide(network, options, base, sizes, record, judge, notes, progress)


def _record(
    network: Network,
    dataset: LeRobotDataset | None,
    options: QuantizeOptions,
    known_prompts: Mapping[str, Float32Array],
    notes: list[str],
    progress: Progress | None,
) -> CalibrationRecord | None:
    """Return the record that there is, or the one of a new calibration."""
    if options.record is not None and options.record.exists():
        record = load_record(options.record)
        _check_record(network, record, options.record)
        if record.is_synthetic and not options.allow_synthetic:
            raise SpecError(
                f"{options.record}: was made on synthetic data; calibrate on recorded episodes, or "
                "pass --allow-synthetic and never run the bundle on a robot"
            )
    elif dataset is None:
        return None
    else:
        verdict = require_recorded(dataset, allow_synthetic=options.allow_synthetic)
        samples = load_set(
            network,
            dataset,
            options.collect,
            held_out=False,
            known_prompts=known_prompts,
            progress=progress,
        )
        record = collect(
            network,
            samples,
            options.collect,
            is_synthetic=verdict.is_synthetic,
            provenance={
                "dataset": dataset.name,
                "dataset_sha256": dataset.fingerprint(),
                "network": fingerprint(network),
            },
            progress=progress,
        )
        if options.record is not None:
            save_record(options.record, record)
    if record.is_synthetic:
        notes.append("calibrated on SYNTHETIC data: never run this bundle on a robot")
    return record


def _check_record(network: Network, record: CalibrationRecord, path: Path) -> None:
    given = record.provenance
    if given.get("network") != fingerprint(network):
        raise SpecError(f"{path}: was made from another checkpoint; calibrate again")
    if list(given.get("timesteps", ())) != list(network.spec.sampler.timesteps):
        raise SpecError(
            f"{path}: was made for {given.get('n_steps')} denoising steps of another schedule; "
            "calibrate again, or export with the same --steps"
        )


@dataclass(frozen=True, kw_only=True)
class _Choice:
    """How ranges follow from the record."""

    method: Method
    is_smoothed: bool


def _recipe(
    base: Recipe,
    record: CalibrationRecord,
    choice: _Choice,
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


def _decide(
    network: Network,
    options: QuantizeOptions,
    base: Recipe,
    sizes: Mapping[str, LayerSize],
    record: CalibrationRecord | None,
    judge: _Judge | None,
    notes: list[str],
    progress: Progress | None,
) -> Quantized:
    recipe, weights, choice = base, network.weights, None
    if record is not None:
        choice = _choose(network, options, base, sizes, record, judge, progress)
        recipe = _recipe(base, record, choice, tuple(sizes), options.percentile)
        if choice.is_smoothed:
            weights = FoldedWeights(network.weights, record.smoothing)
    found: SearchResult | None = None
    if judge is not None and options.budget is not None and options.recipe_file is None:
        found = _search(options, recipe, weights, sizes, judge, options.budget, progress)
        recipe = _accept(found, recipe, options, options.budget, notes)
    elif options.recipe_file is not None:
        notes.append(f"formats of layers follow {options.recipe_file.name}, not the budget search")
    error = judge.measure(recipe, weights) if judge is not None else None
    summary = None
    if record is not None and choice is not None:
        summary = _summary(options, record, choice, judge, found.curve if found else ())
        growing = sum(_is_growing(record, key) for key in recipe.thresholds)
        if growing:
            notes.append(
                f"{growing} of {len(recipe.thresholds)} ranges still grew with more samples"
            )
    return Quantized(
        recipe=recipe, weights=weights, error=error, calibration=summary, notes=tuple(notes)
    )


def _is_growing(record: CalibrationRecord, key: str) -> bool:
    return record.tensors[key].convergence("minmax").is_growing


def _choose(
    network: Network,
    options: QuantizeOptions,
    base: Recipe,
    sizes: Mapping[str, LayerSize],
    record: CalibrationRecord,
    judge: _Judge | None,
    progress: Progress | None,
) -> _Choice:
    """Return the observer, and whether to smooth, with the least error on held-out samples."""
    methods: Sequence[Method] = [m for m in METHODS if options.observer in ("auto", m)]
    if not any(base.of(layer) in STATIC_FORMATS for layer in sizes):
        methods = methods[:1]  # no activation is quantized
    smoothings = (False, True) if record.smoothing else (False,)
    many = sum(size.n_values for size in sizes.values()) > _MANY_WEIGHTS
    if judge is None or (many and options.collect.device == "cpu"):
        logger.info("ranges are chosen by squared error: nothing to measure on, or too slow here")
        method: Method = "mse" if options.observer == "auto" else methods[0]
        return _Choice(method=method, is_smoothed=False)
    tried: list[tuple[float, _Choice]] = []
    choices = [_Choice(method=m, is_smoothed=s) for s in smoothings for m in methods]
    # Only the ratio of both units matters here.
    scale = options.budget or Budget()
    for i, choice in enumerate(choices):
        recipe = _recipe(base, record, choice, tuple(sizes), options.percentile)
        weights: WeightSource = network.weights
        if choice.is_smoothed:
            weights = FoldedWeights(network.weights, record.smoothing)
        error = judge.measure(recipe, weights)
        logger.info("ranges by %s: %s", choice, describe(error))
        tried.append((scale.use(error), choice))
        if progress is not None:
            progress("choose ranges", i + 1, len(choices))
    return min(tried, key=lambda pair: pair[0])[1]


def _search(
    options: QuantizeOptions,
    recipe: Recipe,
    weights: WeightSource,
    sizes: Mapping[str, LayerSize],
    judge: _Judge,
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


def _finite(limit: float) -> float | None:
    return limit if math.isfinite(limit) else None


def _summary(
    options: QuantizeOptions,
    record: CalibrationRecord,
    choice: _Choice,
    judge: _Judge | None,
    curve: Sequence[Point],
) -> Calibration:
    listed = [[r.dataset, r.episode, r.frame, r.sha256] for r in record.samples]
    budget = options.budget if judge is not None and options.recipe_file is None else None
    return Calibration(
        dataset=str(record.provenance.get("dataset", "")),
        n_samples=len(record.samples),
        samples_sha256=hashlib.sha256(json.dumps(listed).encode()).hexdigest(),
        seed=int(record.provenance["seed"]),
        is_synthetic=record.is_synthetic,
        observer=choice.method,
        is_smoothed=choice.is_smoothed,
        budget_rad=_finite(budget.joints_rad) if budget else None,
        budget_m=_finite(budget.grippers_m) if budget else None,
        curve=tuple(
            CurvePoint(
                quantized_share=p.quantized_share,
                joints_rad_p99=p.error.joints_rad.p99 if p.error.joints_rad else None,
                grippers_m_p99=p.error.grippers_m.p99 if p.error.grippers_m else None,
            )
            for p in curve
        ),
    )
