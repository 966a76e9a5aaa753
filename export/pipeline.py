"""From checkpoint to bundle."""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import msgspec
import numpy as np
import onnx_ir as ir
import torch
from safetensors.torch import save_file

import gwp_edge
from gwp_edge.bundle import (
    MANIFEST,
    SCHEMA,
    SCHEMA_VERSION,
    Bundle,
    FileEntry,
    Golden,
    GraphSet,
    Layer,
    Manifest,
    MeasuredError,
    Precision,
    Provenance,
    bundle_id,
    hash_file,
)
from gwp_edge.calibration.applied_ranges import RANGES_FILE, save_ranges
from gwp_edge.calibration.collect import DEFAULT_N_HELD_OUT, CollectOptions
from gwp_edge.calibration.forward import Network, default_device
from gwp_edge.calibration.quantize import Quantized, QuantizeOptions, quantize
from gwp_edge.calibration.sampling import DEFAULT_N_SAMPLES
from gwp_edge.calibration.sensitivity import Budget
from gwp_edge.errors import BuildError, SpecError
from gwp_edge.export import tables
from gwp_edge.export.accounting import account
from gwp_edge.export.checkpoint import Checkpoint, open_checkpoint, open_module
from gwp_edge.export.companions import Companions, find_companions, read_statistics
from gwp_edge.export.errors_measured import measure_error
from gwp_edge.export.graphs import WEIGHTS_FILE, Graph, denoise_graph, prefill_graph, vision_graph
from gwp_edge.export.layout import find_layout
from gwp_edge.export.ops import WeightSource
from gwp_edge.export.package import check_space, check_target, replacing
from gwp_edge.export.precision import (
    QUANTIZED_FORMATS,
    Format,
    Recipe,
    cache_format,
    make_recipe,
)
from gwp_edge.export.prompt_cache import needed_rows, prompt_cache
from gwp_edge.export.prompts import encode_prompt, pad_rows, read_prompt_embedding, task_name
from gwp_edge.export.reference import ChunkInput, ChunkOutput, Reference, golden_input
from gwp_edge.export.sizes import network_sizes
from gwp_edge.export.targets import check_target_precision, find_target, rest_format
from gwp_edge.export.trt_lint import require_clean
from gwp_edge.export.vision_encoder import VaeConfig
from gwp_edge.export.weight_bank import WeightBank
from gwp_edge.policy import BundlePolicy
from gwp_edge.sampler import make_schedule
from gwp_edge.spec import PolicySpec
from gwp_edge.types import Float32Array

logger = logging.getLogger(__name__)

TABLES_FILE = "tables.safetensors"
GOLDEN_FILE = "golden.safetensors"
GOLDEN_SEED = 20260
# Engines agree to about 1e-6 of an action in float32; this is the parity that is promised.
MIN_TOLERANCE = 2e-4
# Rounding flips where another order of sums meets a rounding boundary.
TOLERANCE_OVER_ERROR = 1.5
# The action expert in bfloat16, which every denoising step of the reference reads again.
KEPT_BYTES = 1_800_000_000
# One flipped rounding re-draws all that follow, so two right engines may differ by two such errors.
QUANTIZED_TOLERANCE_OVER_ERROR = 3.0
# Above this the portable graphs would not fit beside the export.
ENGINE_CHECK_BYTES = 3 << 30

Progress = Callable[[str, int, int], None]


def _silent(stage: str, done: int, total: int) -> None:
    """Report to nobody."""


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """What ``gwp-edge export`` was asked for; see its help."""

    checkpoint: Path
    out: Path
    base_model: Path | None = None
    norm_stats: Path | None = None
    prompts: tuple[str, ...] = ()
    prompt_embeddings: tuple[Path, ...] = ()
    precision: str = "fp32"
    n_steps: int = 10
    timesteps: Literal["bfloat16", "exact"] = "bfloat16"
    embodiment: int = 0
    layout: str = "piper-dual"
    head_dim: int | None = None
    use_ema: bool = False
    engine_check: Literal["auto", "always", "never"] = "auto"
    # What follows is for quantized precisions; see QuantizeOptions.
    target: str = "cpu"
    calibration: Path | None = None
    calibration_record: Path | None = None
    samples: int = DEFAULT_N_SAMPLES
    held_out_samples: int = DEFAULT_N_HELD_OUT
    seed: int = 0
    observer: str = "auto"
    percentile: float = 99.9
    smoothing: bool = True
    recipe_file: Path | None = None
    rest: Format | None = None  # None: what suits the target
    block: int = 32
    max_error_rad: float | None = 2e-3
    max_error_m: float | None = 2e-4
    allow_synthetic: bool = False
    go_on: bool = False
    device: str | None = None


@dataclass(frozen=True, kw_only=True)
class ExportResult:
    """What an export did."""

    bundle: Bundle
    seconds: float
    unused: Mapping[str, int] = field(default_factory=dict)


class _Source:
    """A checkpoint as a weight source: finite values only.

    Weights that every denoising step reads can be kept, as far as a budget goes.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        self._budget_bytes = 0
        self._kept: dict[str, torch.Tensor] = {}
        self._finite: set[str] = set()

    @contextmanager
    def keeping(self, budget_bytes: int) -> Iterator[None]:
        """Keep action weights in memory inside this block."""
        self._budget_bytes = budget_bytes
        try:
            yield
        finally:
            self._budget_bytes = 0
            self._kept.clear()

    def shape(self, name: str) -> tuple[int, ...]:
        return self._checkpoint.info(name).shape

    def load(self, name: str) -> torch.Tensor:
        kept = self._kept.get(name)
        if kept is not None:
            return kept
        if name in self._finite:
            tensor = self._checkpoint.load(name)
        else:
            tensor = self._checkpoint.load_finite(name)
            self._finite.add(name)
        if ".visual_expert." not in name and tensor.nbytes <= self._budget_bytes:
            self._budget_bytes -= tensor.nbytes
            self._kept[name] = tensor
        return tensor


@dataclass(frozen=True, kw_only=True)
class _Inputs:
    """Everything read and checked before the first byte is written."""

    checkpoint: Checkpoint
    weights: _Source
    vae_weights: _Source
    vae: VaeConfig
    spec: PolicySpec
    recipe: Recipe
    embeddings: tuple[torch.Tensor, ...]
    unused: Mapping[str, int]
    quantized: Quantized | None = None

    @property
    def network(self) -> WeightSource:
        """The weights that the bundle holds: smoothing factors may be folded into them."""
        return self.weights if self.quantized is None else self.quantized.weights


def export_bundle(options: ExportOptions, progress: Progress = _silent) -> ExportResult:
    """Write a verified, action-only bundle.

    Raises:
        SpecError: an input is missing or does not fit; nothing was written.
        BuildError: the bundle does not reproduce the reference; nothing was written.
    """
    t_start = time.monotonic()
    check_target(options.out)
    check_target_precision(options.target, options.precision)
    with ExitStack() as stack:
        inputs = _read_inputs(options, stack, progress)
        if options.precision in QUANTIZED_FORMATS:
            inputs = _quantized(options, inputs, progress)
        bundle = _write(options, inputs, progress)
        unused = inputs.unused
    return ExportResult(bundle=bundle, seconds=time.monotonic() - t_start, unused=unused)


def _quantized(options: ExportOptions, inputs: _Inputs, progress: Progress) -> _Inputs:
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
                device=options.device or default_device(),
            ),
            rest=options.rest or rest_format(options.target),
            block=options.block,
            allow_synthetic=options.allow_synthetic,
            go_on=options.go_on,
        ),
        known_prompts={task: embedding.numpy() for task, embedding in rows},
        progress=progress,
    )
    return replace(inputs, recipe=quantized.recipe, quantized=quantized)


def _read_inputs(options: ExportOptions, stack: ExitStack, progress: Progress) -> _Inputs:
    recipe = make_recipe(options.precision)
    schedule = make_schedule(options.n_steps, rounding=options.timesteps)
    layout = find_layout(options.layout)
    checkpoint = stack.enter_context(open_checkpoint(options.checkpoint, use_ema=options.use_ema))
    sizes = network_sizes(checkpoint, head_dim=options.head_dim)
    accounting = account(checkpoint, sizes)
    if not 0 <= options.embodiment < sizes.n_embodiments:
        raise SpecError(
            f"--embodiment {options.embodiment}: the checkpoint has 0..{sizes.n_embodiments - 1}"
        )
    companions = find_companions(
        options.checkpoint,
        norm_stats=options.norm_stats,
        base_model=options.base_model,
        prompt_embeddings=options.prompt_embeddings,
        has_prompt_text=bool(options.prompts),
    )
    vae_checkpoint = stack.enter_context(open_module(companions.vae))
    vae = VaeConfig.from_json(vae_checkpoint.config or {})
    if vae.z_dim != sizes.latent_channels:
        raise SpecError(
            f"VAE {companions.vae} has {vae.z_dim} latent channels, the network takes "
            f"{sizes.latent_channels}; pass the right base model with --base-model"
        )
    statistics = read_statistics(companions.norm_stats, len(layout.channels))
    tasks = _read_prompts(options, companions, sizes.text_dim, progress)
    embeddings = tuple(torch.from_numpy(rows) for rows in tasks.values())
    try:
        spec = PolicySpec(
            network=sizes.network_spec(n_text_rows=needed_rows(embeddings)),
            sampler=schedule,
            canvas=layout.canvas,
            channels=layout.channels,
            statistics=statistics,
            n_rows=layout.n_rows,
            period_ns=round(1e9 / layout.rate_hz),
            tasks=tuple(tasks),
            embodiment=options.embodiment,
        )
    except ValueError as e:
        raise SpecError(f"checkpoint and --layout {options.layout} do not fit: {e}") from e
    return _Inputs(
        checkpoint=checkpoint,
        weights=_Source(checkpoint),
        vae_weights=_Source(vae_checkpoint),
        vae=vae,
        spec=spec,
        recipe=recipe,
        embeddings=embeddings,
        unused=_count_reasons({**accounting.unused, **accounting.dropped}),
    )


def _count_reasons(unused: Mapping[str, str]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for reason in unused.values():
        counts[reason] = counts.get(reason, 0) + 1
    return counts


def _read_prompts(
    options: ExportOptions, companions: Companions, text_dim: int, progress: Progress
) -> dict[str, Float32Array]:
    """Return padded embeddings (64, text_dim) by task name, in the order given."""
    tasks: dict[str, Float32Array] = {}

    def add(name: str, rows: Float32Array) -> None:
        if name in tasks and not np.array_equal(tasks[name], pad_rows(rows)):
            raise SpecError(f"two different prompts are called {name!r}; rename one file")
        tasks[name] = pad_rows(rows)

    for i, text in enumerate(options.prompts):
        progress("encode prompts", i, len(options.prompts))
        if companions.base_model is None:
            raise SpecError("--prompt needs the umT5 encoder: give its folder with --base-model")
        add(task_name(text=text), encode_prompt(text, companions.base_model))
    for path in companions.prompt_files:
        add(task_name(path=path), read_prompt_embedding(path, text_dim=text_dim))
    for name, rows in tasks.items():
        if rows.shape[1] != text_dim:
            raise SpecError(
                f"prompt {name!r} has {rows.shape[1]} columns, the network takes {text_dim}"
            )
    return tasks


def _write(options: ExportOptions, inputs: _Inputs, progress: Progress) -> Bundle:
    bank = WeightBank()
    graphs = _record(inputs, bank)
    check_space(options.out, bank.n_bytes + (1 << 28))
    with replacing(options.out) as work:
        for graph in graphs:
            ir.save(graph.model(bank), work / _graph_file(graph))
        with _bytes_progress(progress, "write weights", bank.n_bytes) as advance:
            weights_hash = bank.write(work / WEIGHTS_FILE, advance)
        prompts = _write_prompts(inputs, work, progress)
        if inputs.quantized is not None:
            save_ranges(work / RANGES_FILE, inputs.quantized.ranges)
        modulation = tables.denoise_rows(inputs.network, inputs.spec)
        save_file({"modulation": modulation.contiguous()}, work / TABLES_FILE)
        # Hashing runs beside the arithmetic; both leave the interpreter lock alone.
        with ThreadPoolExecutor(1, "hash") as pool, inputs.weights.keeping(KEPT_BYTES):
            hashing = pool.submit(inputs.checkpoint.source_hashes)
            golden, error = _write_golden(inputs, work, progress)
            progress("hash checkpoint", 0, 1)
            sources = hashing.result()
            progress("hash checkpoint", 1, 1)
        files = _hash_files(work, {WEIGHTS_FILE: weights_hash}, progress)
        manifest = _manifest(inputs, graphs, prompts, golden, error, files, sources)
        _save_manifest(manifest, work)
        release = find_target(options.target).release
        if release is not None:
            require_clean(Bundle(work, manifest), (release,))
        if _wants_engine(options, bank):
            progress("check on ONNX Runtime", 0, 1)
            manifest = _checked(manifest, work, inputs)
            _save_manifest(manifest, work)
            progress("check on ONNX Runtime", 1, 1)
    return Bundle(options.out, manifest)


def _save_manifest(manifest: Manifest, work: Path) -> None:
    text = json.dumps(msgspec.to_builtins(manifest), indent=1, sort_keys=False)
    (work / MANIFEST).write_text(text + "\n")


def _record(inputs: _Inputs, bank: WeightBank) -> list[Graph]:
    """Record the three graphs, in the native form and where it differs in the portable one."""
    spec, recipe = inputs.spec, inputs.recipe
    forms: tuple[Literal["native", "portable"], ...] = ("native",)
    if recipe.default != "fp32":
        forms = ("native", "portable")
    result = []
    for form in forms:
        result += [
            vision_graph(inputs.vae_weights, inputs.vae, spec, recipe, bank, form),
            prefill_graph(inputs.network, spec, recipe, bank, form),
            denoise_graph(inputs.network, spec, recipe, bank, form),
        ]
    # A graph of float32 layers alone is the same in either form.
    return [g for g in result if g.form == "native" or any(c.format != "fp32" for c in g.costs)]


def _graph_file(graph: Graph) -> str:
    return f"{graph.stage}.onnx" if graph.form == "native" else f"{graph.stage}.portable.onnx"


@contextmanager
def _bytes_progress(progress: Progress, stage: str, total: int) -> Iterator[Callable[[int], None]]:
    done = 0

    def advance(n_bytes: int) -> None:
        nonlocal done
        done += n_bytes
        progress(stage, done, total)

    progress(stage, 0, total)
    yield advance
    progress(stage, total, total)


def _write_prompts(inputs: _Inputs, work: Path, progress: Progress) -> dict[str, str]:
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


def _write_golden(inputs: _Inputs, work: Path, progress: Progress) -> tuple[Golden, MeasuredError]:
    """Answer the golden input in float32 and as this bundle computes, and keep both."""
    spec = inputs.spec
    given = golden_input(spec, GOLDEN_SEED)
    exact = _answer(inputs, make_recipe("fp32"), given, progress, "float32 reference")
    answer = exact
    if inputs.recipe.default != "fp32":
        answer = _answer(inputs, inputs.recipe, given, progress, f"{inputs.recipe.name} emulation")
    save_file(
        {
            "canvas": torch.from_numpy(given.canvas),
            "state": torch.from_numpy(np.asarray(given.state)),
            "noise": torch.from_numpy(given.noise),
            "latent": torch.from_numpy(answer.latent),
            "actions": torch.from_numpy(answer.actions),
            "actions_reference": torch.from_numpy(exact.actions.copy()),
        },
        work / GOLDEN_FILE,
    )
    if not np.isfinite(answer.actions).all():
        raise BuildError(
            f"{inputs.recipe.name}: the network's answer is not finite; choose another --precision"
        )
    error = measure_error(
        [answer.actions], [exact.actions], spec.channels, "golden input, emulated arithmetic"
    )
    largest = float(np.abs(answer.actions - exact.actions).max())
    is_quantized = inputs.quantized is not None
    over = QUANTIZED_TOLERANCE_OVER_ERROR if is_quantized else TOLERANCE_OVER_ERROR
    if inputs.quantized is not None and inputs.quantized.error is not None:
        error = inputs.quantized.error
    golden = Golden(
        file=GOLDEN_FILE,
        task=spec.tasks[0],
        tolerance=max(MIN_TOLERANCE, over * largest),
        checked_with=(),
    )
    return golden, error


def _answer(
    inputs: _Inputs, recipe: Recipe, given: ChunkInput, progress: Progress, stage: str
) -> ChunkOutput:
    total, done = inputs.spec.sampler.n_steps + 1, 0

    def advance() -> None:
        nonlocal done
        done += 1
        progress(stage, done, total)

    progress(stage, 0, total)
    weights = inputs.weights if recipe.is_float32 else inputs.network
    cache = prompt_cache(weights, inputs.spec, inputs.embeddings[0], recipe)
    reference = Reference(weights, inputs.vae_weights, inputs.vae, inputs.spec, recipe)
    return reference.run([given], cache, advance)[0]


def _hash_files(work: Path, known: Mapping[str, str], progress: Progress) -> dict[str, FileEntry]:
    """Return size and hash of every file; those in ``known`` were hashed while written."""
    sizes = {
        p.relative_to(work).as_posix(): p.stat().st_size
        for p in sorted(work.rglob("*"))
        if p.is_file()
    }
    total = sum(size for name, size in sizes.items() if name not in known)
    with _bytes_progress(progress, "hash bundle", total) as advance:
        return {
            name: FileEntry(sha256=known.get(name) or hash_file(work / name, advance), n_bytes=size)
            for name, size in sizes.items()
        }


def _manifest(
    inputs: _Inputs,
    graphs: Sequence[Graph],
    prompts: dict[str, str],
    golden: Golden,
    error: MeasuredError,
    files: dict[str, FileEntry],
    sources: dict[str, str],
) -> Manifest:
    return Manifest(
        schema=SCHEMA,
        schema_version=SCHEMA_VERSION,
        bundle_id=bundle_id(inputs.spec, files),
        spec=inputs.spec,
        precision=_precision(inputs, graphs),
        graphs={form: _graph_set(graphs, form) for form in dict.fromkeys(g.form for g in graphs)},
        prompts=prompts,
        tables=TABLES_FILE,
        weights=WEIGHTS_FILE,
        golden=golden,
        error=error,
        files=files,
        provenance=Provenance(
            gwp_edge=gwp_edge.__version__,
            created_at=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            checkpoint=sources,
            libraries={"torch": str(torch.__version__), "onnx_ir": str(ir.__version__)},
            unused=dict(inputs.unused),
            notes=inputs.quantized.notes if inputs.quantized else (),
        ),
        calibration=inputs.quantized.calibration if inputs.quantized else None,
    )


def _graph_set(graphs: Sequence[Graph], form: str) -> GraphSet:
    files = {g.stage: _graph_file(g) for g in graphs if g.form == "native"}
    return GraphSet(**{**files, **{g.stage: _graph_file(g) for g in graphs if g.form == form}})


def _precision(inputs: _Inputs, graphs: Sequence[Graph]) -> Precision:
    recipe = inputs.recipe
    layers = tuple(
        Layer(
            stage=graph.stage,
            name=cost.name,
            format=cost.format,
            reason=recipe.explain(cost.name)[1],
            flops=cost.flops,
            weight_bytes=cost.weight_bytes,
        )
        for graph in graphs
        if graph.form == "native"
        for cost in graph.costs
    )
    return Precision(
        name=recipe.name,
        cache=cache_format(recipe),
        layers=layers,
        ranges=RANGES_FILE if inputs.quantized is not None else None,
    )


def _wants_engine(options: ExportOptions, bank: WeightBank) -> bool:
    if options.engine_check == "auto":
        return bank.n_elements * 4 <= ENGINE_CHECK_BYTES
    return options.engine_check == "always"


def _checked(manifest: Manifest, work: Path, inputs: _Inputs) -> Manifest:
    """Run the golden input through ONNX Runtime.

    The measured error is then the engine's own, unless it was measured on held-out samples.

    Raises:
        BuildError: the engine does not reproduce the golden output.
    """
    from gwp_edge.engines.ort import OrtEngine

    bundle = Bundle(work, manifest)
    policy = BundlePolicy(bundle, OrtEngine(bundle))
    try:
        policy.check_golden()
        arrays = bundle.arrays(manifest.golden.file)
        state = np.asarray(arrays["state"], np.float64)
        _, actions = policy.predict_from_canvas(arrays["canvas"], state, arrays["noise"])
    finally:
        policy.close()
    error = measure_error(
        [actions],
        [np.asarray(arrays["actions_reference"])],
        manifest.spec.channels,
        f"golden input, ONNX Runtime, {inputs.recipe.name}",
    )
    if inputs.quantized is not None and inputs.quantized.error is not None:
        error = inputs.quantized.error
    golden = msgspec.structs.replace(manifest.golden, checked_with=("ort cpu",))
    return msgspec.structs.replace(manifest, golden=golden, error=error)
