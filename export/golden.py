"""The golden input: its answer in float32, in the bundle's formats, and on an engine."""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np
import torch
from safetensors.torch import save_file

from gwp_edge.bundle import Bundle
from gwp_edge.errors import BuildError
from gwp_edge.export.errors_measured import measure_error
from gwp_edge.export.inputs import ExportOptions, Inputs, Progress
from gwp_edge.export.precision import (
    Recipe,
    make_recipe,
)
from gwp_edge.export.prompt_cache import prompt_cache
from gwp_edge.export.reference import ChunkInput, ChunkOutput, Reference, golden_input
from gwp_edge.export.weight_bank import WeightBank
from gwp_edge.manifest import Golden, Manifest, MeasuredError
from gwp_edge.policy import BundlePolicy

GOLDEN_FILE = "golden.safetensors"
GOLDEN_SEED = 20260
# Engines agree to about 1e-6 of an action in float32; this is the parity that is promised.
MIN_TOLERANCE = 2e-4
# Rounding flips where another order of sums meets a rounding boundary.
TOLERANCE_OVER_ERROR = 1.5
# One flipped rounding re-draws all that follow, so two right engines may differ by two such errors.
QUANTIZED_TOLERANCE_OVER_ERROR = 3.0
# Above this the portable graphs would not fit beside the export.
ENGINE_CHECK_BYTES = 3 << 30
# The action expert in bfloat16, which every denoising step of the reference reads again.
KEPT_BYTES = 1_800_000_000


def write_golden(inputs: Inputs, work: Path, progress: Progress) -> tuple[Golden, MeasuredError]:
    """Answer the golden input in float32 and as this bundle computes, and keep both."""
    spec = inputs.spec
    given = golden_input(spec, GOLDEN_SEED)
    exact = _answer(inputs, make_recipe("fp32"), given, progress, "float32 reference")
    answer = exact
    if not inputs.recipe.is_float32:
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
    inputs: Inputs, recipe: Recipe, given: ChunkInput, progress: Progress, stage: str
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


def wants_engine(options: ExportOptions, bank: WeightBank) -> bool:
    """Return whether ONNX Runtime is to answer the golden input on this machine."""
    if options.engine_check == "auto":
        return bank.n_elements * 4 <= ENGINE_CHECK_BYTES
    return options.engine_check == "always"


def checked_manifest(manifest: Manifest, work: Path, inputs: Inputs) -> Manifest:
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
