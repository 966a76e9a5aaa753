"""From checkpoint to bundle."""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import msgspec
import onnx_ir as ir
import torch
from safetensors.torch import save_file

from gwp_edge.bundle import Bundle
from gwp_edge.calibration.applied_ranges import RANGES_FILE, save_ranges
from gwp_edge.calibration.collect import CollectOptions
from gwp_edge.calibration.forward import Network, default_device
from gwp_edge.calibration.quantize import quantize
from gwp_edge.calibration.quantize_options import QuantizeOptions
from gwp_edge.calibration.sensitivity import Budget
from gwp_edge.errors import SpecError
from gwp_edge.export import tables
from gwp_edge.export.golden import KEPT_BYTES, checked_manifest, wants_engine, write_golden
from gwp_edge.export.graphs import (
    WEIGHTS_FILE,
    Graph,
    denoise_graph,
    prefill_graph,
    share_matrices,
    vision_graph,
)
from gwp_edge.export.inputs import (
    ExportOptions,
    Inputs,
    Progress,
    bytes_progress,
    check_idle,
    read_inputs,
    silent,
)
from gwp_edge.export.manifest import TABLES_FILE, graph_file, hash_files, make_manifest
from gwp_edge.export.package import check_space, check_target, replacing
from gwp_edge.export.precision import (
    QUANTIZED_FORMATS,
)
from gwp_edge.export.prompt_cache import prompt_cache
from gwp_edge.export.targets import check_target_precision, find_target, rest_format
from gwp_edge.export.trt_lint import require_clean
from gwp_edge.export.weight_bank import WeightBank
from gwp_edge.manifest import MANIFEST, Manifest

__all__ = ["ExportOptions", "ExportResult", "export_bundle"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class ExportResult:
    """What an export did."""

    bundle: Bundle
    seconds: float
    unused: Mapping[str, int] = field(default_factory=dict)


def export_bundle(options: ExportOptions, progress: Progress = silent) -> ExportResult:
    """Write a verified, action-only bundle.

    Raises:
        SpecError: an input is missing or does not fit; nothing was written.
        BuildError: the bundle does not reproduce the reference; nothing was written.
    """
    t_start = time.monotonic()
    check_target(options.out)
    check_target_precision(options.target, options.precision)
    check_idle(options)
    with ExitStack() as stack:
        inputs = read_inputs(options, stack, progress)
        if options.precision in QUANTIZED_FORMATS:
            inputs = _quantized(options, inputs, progress)
        bundle = _write(options, inputs, progress)
        unused = inputs.unused
    return ExportResult(bundle=bundle, seconds=time.monotonic() - t_start, unused=unused)


def find_device(name: str | None) -> str:
    """Return the device to calibrate on: the one asked for, else a GPU where there is one.

    Raises:
        SpecError: torch cannot use it.
    """
    if name is None:
        return default_device()
    try:
        torch.zeros(1, device=name)
    except (RuntimeError, AssertionError, NotImplementedError) as e:
        why = str(e).splitlines()[0]
        raise SpecError(f"--device {name}: torch cannot use it ({why}); leave it out") from e
    return name


def _quantized(options: ExportOptions, inputs: Inputs, progress: Progress) -> Inputs:
    """Calibrate, and choose what each layer computes in."""
    budget = None
    if options.max_error_rad is not None or options.max_error_m is not None:
        limits = (options.max_error_rad, options.max_error_m)
        joints, grippers = (math.inf if limit is None else limit for limit in limits)
        budget = Budget(joints_rad=joints, grippers_m=grippers)
    rows = zip(inputs.spec.tasks, inputs.embeddings, strict=True)
    quantized = quantize(
        Network(
            weights=inputs.weights,
            vae_weights=inputs.vae_weights,
            vae=inputs.vae,
            spec=inputs.spec,
        ),
        QuantizeOptions(
            precision=inputs.recipe.default,
            target=options.target,
            observer=options.observer,
            percentile=options.percentile,
            budget=budget,
            recipe_file=options.recipe_file,
            record=options.calibration_record,
            dataset=options.calibration,
            collect=CollectOptions(
                n_samples=options.samples,
                n_held_out=options.held_out_samples,
                seed=options.seed,
                smoothing=options.smoothing,
                device=find_device(options.device),
            ),
            fixed=options.fixed,
            rest=options.rest or rest_format(options.target),
            block=options.block,
            allow_synthetic=options.allow_synthetic,
            go_on=options.go_on,
        ),
        known_prompts={task: embedding.numpy() for task, embedding in rows},
        progress=progress,
    )
    return replace(inputs, recipe=quantized.recipe, quantized=quantized)


def _write(options: ExportOptions, inputs: Inputs, progress: Progress) -> Bundle:
    bank = WeightBank()
    graphs = _record(inputs, bank)
    check_space(options.out, bank.n_bytes + (1 << 28))
    with replacing(options.out) as work:
        for graph in graphs:
            ir.save(graph.model(bank), work / graph_file(graph))
        with bytes_progress(progress, "write weights", bank.n_bytes) as advance:
            weights_hash = bank.write(work / WEIGHTS_FILE, advance)
        prompts = _write_prompts(inputs, work, progress)
        if inputs.quantized is not None:
            save_ranges(work / RANGES_FILE, inputs.quantized.ranges)
        modulation = tables.denoise_rows(inputs.network, inputs.spec)
        save_file({"modulation": modulation.contiguous()}, work / TABLES_FILE)
        # Hashing runs beside the arithmetic; both leave the interpreter lock alone.
        with ThreadPoolExecutor(1, "hash") as pool, inputs.weights.keeping(KEPT_BYTES):
            hashing = pool.submit(inputs.checkpoint.source_hashes)
            golden, error = write_golden(inputs, work, progress)
            progress("hash checkpoint", 0, 1)
            sources = hashing.result()
            progress("hash checkpoint", 1, 1)
        files = hash_files(work, {WEIGHTS_FILE: weights_hash}, progress)
        manifest = make_manifest(inputs, graphs, prompts, golden, error, files, sources)
        _save_manifest(manifest, work)
        release = find_target(options.target).release
        if release is not None:
            require_clean(Bundle(work, manifest), (release,))
        if wants_engine(options, bank):
            progress("check on ONNX Runtime", 0, 1)
            manifest = checked_manifest(manifest, work, inputs)
            _save_manifest(manifest, work)
            progress("check on ONNX Runtime", 1, 1)
    return Bundle(options.out, manifest)


def _save_manifest(manifest: Manifest, work: Path) -> None:
    text = json.dumps(msgspec.to_builtins(manifest), indent=1, sort_keys=False)
    (work / MANIFEST).write_text(text + "\n")


def _record(inputs: Inputs, bank: WeightBank) -> list[Graph]:
    """Record the three graphs, in the native form and where it differs in the portable one."""
    spec, recipe = inputs.spec, inputs.recipe
    forms: tuple[Literal["native", "portable"], ...] = ("native",)
    if not recipe.is_float32:
        forms = ("native", "portable")
    result = []
    for form in forms:
        result += [
            vision_graph(inputs.vae_weights, inputs.vae, spec, recipe, bank, form),
            prefill_graph(inputs.network, spec, recipe, bank, form),
            denoise_graph(inputs.network, spec, recipe, bank, form),
        ]
    if len(forms) > 1:
        share_matrices(*result[-2:])
    # A graph of float32 layers alone is the same in either form.
    return [g for g in result if g.form == "native" or any(c.format != "fp32" for c in g.costs)]


def _write_prompts(inputs: Inputs, work: Path, progress: Progress) -> dict[str, str]:
    n = len(inputs.embeddings)
    (work / "prompts").mkdir()
    files: dict[str, str] = {}
    for i, (task, embedding) in enumerate(zip(inputs.spec.tasks, inputs.embeddings, strict=True)):
        progress("prompt caches", i, n)
        name = f"prompts/{i:04d}.safetensors"
        cache = prompt_cache(inputs.network, inputs.spec, embedding, inputs.recipe)
        save_file(cache, work / name)
        files[task] = name
    progress("prompt caches", n, n)
    return files
