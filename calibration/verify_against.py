"""The float32 side of a verification: answers, and whether the bundle is made of the same parts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from safetensors.torch import load_file

from gwp_edge.bundle import Bundle
from gwp_edge.calibration.applied_ranges import AppliedRanges, recipe_of
from gwp_edge.calibration.verify_engine import Answer
from gwp_edge.calibration.verify_errors import Ruler, compare
from gwp_edge.calibration.verify_frames import Prompt
from gwp_edge.calibration.verify_layers import measure_layers
from gwp_edge.calibration.verify_reference import (
    FloatReference,
    PromptCache,
    is_same_prompt,
    prompt_difference,
    spec_differences,
)
from gwp_edge.calibration.verify_schema import Check, Comparison, LayerReport
from gwp_edge.export.folding import FoldedWeights, unfold_prompt
from gwp_edge.export.reference import ChunkInput
from gwp_edge.types import FloatArray

Progress = Callable[[str, int, int], None]
# Layers are measured on fewer samples: every one of them computes three times.
MAX_LAYER_SAMPLES = 2


@dataclass(frozen=True, kw_only=True)
class Against:
    """What the reference says.

    Attributes:
        actions: absolute actions (H, D) of each sample, rad and m.
        checks: whether spec, prompts and checkpoint are the same.
        notes: what could not be checked.
        emulation: the bundle's formats in torch against float32; None unless asked for.
        layers: by layer; empty unless asked for.
    """

    actions: list[FloatArray]
    checks: tuple[Check, ...]
    notes: tuple[str, ...]
    emulation: Comparison | None
    layers: tuple[LayerReport, ...]


def run_reference(
    bundle: Bundle,
    reference: FloatReference,
    answers: Sequence[Answer],
    ruler: Ruler,
    ranges: AppliedRanges,
    *,
    layers: bool,
    threads: int | None = None,
    progress: Progress,
) -> Against:
    """Answer the samples in float32 and compare what both sides are made of.

    Args:
        bundle: what is judged.
        reference: the open checkpoint.
        answers: the bundle's answers, with their inputs.
        ruler: how to compare.
        ranges: what the bundle was quantized with.
        layers: judge every layer on a few samples.
        threads: CPU threads of torch; None leaves the number to it.
        progress: called with stage, done and total.
    """
    used = list(dict.fromkeys(a.prompt for a in answers))
    held = {prompt: _held(bundle, prompt.task, ranges) for prompt in used}
    caches = {prompt: reference.cache(held[prompt], prompt) for prompt in used}
    inputs = [ChunkInput(canvas=a.canvas, state=a.state, noise=a.noise) for a in answers]
    stage, done = "float32 reference", 0

    def advance() -> None:
        nonlocal done
        done += 1
        progress(stage, done, len(inputs))

    progress(stage, 0, len(inputs))
    with _torch_threads(threads):
        actions = reference.answer(inputs, [caches[a.prompt] for a in answers], advance)
    checks = [_specification(bundle, reference), _prompts(held, caches)]
    notes = [*reference.notes, *_origin(bundle, reference)]
    emulation: Comparison | None = None
    layer_reports: tuple[LayerReport, ...] = ()
    if layers:
        # Spread over the episodes: samples are sorted by place.
        step = max(1, len(inputs) // MAX_LAYER_SAMPLES)
        picked = range(0, len(inputs), step)[:MAX_LAYER_SAMPLES]
        with _torch_threads(threads):
            emulation, layer_reports = _layers(
                bundle,
                reference,
                ranges,
                [inputs[i] for i in picked],
                [answers[i].prompt for i in picked],
                ruler,
                progress,
            )
    return Against(
        actions=actions,
        checks=tuple(checks),
        notes=tuple(notes),
        emulation=emulation,
        layers=layer_reports,
    )


@contextmanager
def _torch_threads(n: int | None) -> Iterator[None]:
    """Limit torch's threads for a while; the number belongs to the whole process."""
    before = torch.get_num_threads()
    if n is not None:
        torch.set_num_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _specification(bundle: Bundle, reference: FloatReference) -> Check:
    found = spec_differences(bundle.spec, reference.spec)
    text = "; ".join(found) if found else "network, cameras, channels and statistics agree"
    return Check(name="specification", passed=not found, text=text)


def _held(bundle: Bundle, task: str, ranges: AppliedRanges) -> PromptCache:
    """Return the bundle's text K/V, without the factors that it folded into them."""
    cache = load_file(bundle.file(bundle.manifest.prompts[task]))
    return unfold_prompt(cache, ranges.factors, bundle.spec.network)


def _prompts(held: dict[Prompt, PromptCache], caches: dict[Prompt, PromptCache]) -> Check:
    unknown = [prompt.task for prompt in caches if prompt.file is None]
    wrong = []
    for prompt, expected in caches.items():
        if prompt.file is None:
            continue
        difference = prompt_difference(held[prompt], expected)
        if not is_same_prompt(difference):
            wrong.append(f"{prompt.task!r} is not what is in {prompt.file} ({difference:.0%} off)")
    if wrong:
        return Check(name="prompts", passed=False, text="; ".join(wrong))
    if unknown:
        return Check(
            name="prompts",
            passed=None,
            text=f"no embedding of {unknown[0]!r} to compare with: the bundle's own was taken; "
            "give it with --prompt-embedding",
        )
    return Check(name="prompts", passed=True, text=f"{len(caches)} agree with their embeddings")


def _origin(bundle: Bundle, reference: FloatReference) -> list[str]:
    made_of = set(bundle.manifest.provenance.checkpoint.values())
    if set(reference.sources.values()) == made_of:
        return []
    return [
        "the bundle was not exported from these checkpoint files (other SHA-256): "
        "either the same weights in another container, or another training"
    ]


def _layers(
    bundle: Bundle,
    reference: FloatReference,
    ranges: AppliedRanges,
    inputs: Sequence[ChunkInput],
    prompts: Sequence[Prompt],
    ruler: Ruler,
    progress: Progress,
) -> tuple[Comparison, tuple[LayerReport, ...]]:
    recipe = recipe_of(bundle.manifest.precision, ranges)
    folded = replace(reference, weights=FoldedWeights(reference.weights, ranges.factors))
    done = 0

    def advance() -> None:
        nonlocal done
        done += 1
        progress("layers", done, len(inputs))

    progress("layers", 0, len(inputs))
    pairs = []
    for prompt in prompts:
        held = load_file(bundle.file(bundle.manifest.prompts[prompt.task]))
        pairs.append((folded.cache(held, prompt), held))
    reports, exact, reduced = measure_layers(folded, recipe, inputs, pairs, advance)
    compared = compare(
        reduced, exact, ruler, of=f"{recipe.name} emulated in torch", against="float32 in torch"
    )
    return compared, reports
