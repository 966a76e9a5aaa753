"""Evaluate bundles on a task: every bundle, every instruction, the same seeds."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final

import msgspec
import numpy as np
from PIL import Image

from gwp_edge.errors import SpecError
from gwp_edge.evaluation.episode import ChunkPolicy, EpisodeResult, EpisodeRunner, check_fits
from gwp_edge.evaluation.options import EpisodeOptions
from gwp_edge.evaluation.statistics import (
    PairedComparison,
    compare_pairs,
    design_effect,
    wilson_interval,
)
from gwp_edge.evaluation.tasks import FIRST_DEMONSTRATION_SEED, TouchTask
from gwp_edge.profiling.context import Context

SCHEMA: Final = "gwp-edge/evaluation/2"
_MAX_SHOWN: Final = 12
_MOMENTS: Final = 6

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """Episodes of one instruction, or of all.

    Attributes:
        instruction: or ``all``.
        n: episodes.
        n_success: of them, successes.
        n_wrong_object: the other object was touched first.
        n_timeout: nothing was touched in time.
        success_rate: share of successes.
        success_low: of its 95 % interval (Wilson, with the design effect of seeds that several
            instructions share).
        success_high: of it.
        time_to_success_p50_s: over successes; None without one.
        time_to_success_p90_s: the same.
        directness_mean: straight line over tool path.
        jerk_rms_rad_s3: root of the mean square over episodes.
        limited_share: of ticks in which the limiter acted.
        withheld_p50_rad: by how much it did; mean over episodes of their medians.
        withheld_p99_rad: mean over episodes of their 99th percentiles.
    """

    instruction: str
    n: int
    n_success: int
    n_wrong_object: int
    n_timeout: int
    success_rate: float
    success_low: float
    success_high: float
    time_to_success_p50_s: float | None
    time_to_success_p90_s: float | None
    directness_mean: float
    jerk_rms_rad_s3: float
    limited_share: float
    withheld_p50_rad: float
    withheld_p99_rad: float


def summarise(instruction: str, results: Sequence[EpisodeResult]) -> Summary:
    """Summarise episodes.

    Raises:
        SpecError: there is none.
    """
    if not results:
        raise SpecError("no episode was finished, so there is nothing to report")
    succeeded = [r.outcome == "success" for r in results]
    n_success = sum(succeeded)
    effect = design_effect(succeeded, [r.seed for r in results])
    low, high = wilson_interval(n_success / effect, len(results) / effect)
    times_s = [r.time_s for r in results if r.outcome == "success"]
    return Summary(
        instruction=instruction,
        n=len(results),
        n_success=n_success,
        n_wrong_object=sum(r.outcome == "wrong object" for r in results),
        n_timeout=sum(r.outcome == "timeout" for r in results),
        success_rate=n_success / len(results),
        success_low=low,
        success_high=high,
        time_to_success_p50_s=float(np.percentile(times_s, 50)) if times_s else None,
        time_to_success_p90_s=float(np.percentile(times_s, 90)) if times_s else None,
        directness_mean=float(np.mean([r.directness for r in results])),
        jerk_rms_rad_s3=math.sqrt(float(np.mean([r.jerk_rms_rad_s3**2 for r in results]))),
        limited_share=float(np.mean([r.limited_share for r in results])),
        withheld_p50_rad=float(np.mean([r.withheld_p50_rad for r in results])),
        withheld_p99_rad=float(np.mean([r.withheld_p99_rad for r in results])),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """One bundle's episodes.

    Attributes:
        label: what the bundle is called in tables.
        results: instruction by instruction, seeds ascending.
    """

    label: str
    results: tuple[EpisodeResult, ...]

    def summaries(self) -> list[Summary]:
        """Return a summary per instruction, then one of all."""
        instructions = list(dict.fromkeys(r.instruction for r in self.results))
        each = [summarise(i, [r for r in self.results if r.instruction == i]) for i in instructions]
        return [*each, summarise("all", self.results)] if len(each) > 1 else each

    def compared_with(self, reference: Evaluation) -> PairedComparison:
        """Compare with ``reference`` over the episodes that both finished.

        Raises:
            SpecError: there is no such episode.
        """
        theirs = {(r.instruction, r.seed): r.outcome == "success" for r in reference.results}
        common = [r for r in self.results if (r.instruction, r.seed) in theirs]
        return compare_pairs(
            [theirs[r.instruction, r.seed] for r in common],
            [r.outcome == "success" for r in common],
            [r.seed for r in common],
        )


def told_instead_of(instruction: str, task: TouchTask, options: EpisodeOptions) -> str:
    """Return what the policy is told where ``instruction`` is what it is judged by."""
    if options.ablation == "swapped-prompt":
        return task.opposite_of(instruction)
    return instruction


def evaluate(
    label: str,
    policies: Mapping[str, ChunkPolicy],
    task: TouchTask,
    seeds: Sequence[int],
    options: EpisodeOptions,
    *,
    instructions: Sequence[str] | None = None,
    keep_pictures: bool = False,
    progress: Progress | None = None,
) -> Evaluation:
    """Run every instruction on every seed; Ctrl-C keeps what is finished.

    Args:
        label: of the bundle, for tables.
        policies: by the instruction that each follows.
        task: what is done.
        seeds: of the episodes, below those of the demonstrations.
        options: of every episode.
        instructions: by which episodes are judged; None for those of ``policies``.
        keep_pictures: keep canvases of failures.
        progress: called with what is done, episodes done, and episodes in all.

    Raises:
        SpecError: a policy is missing or does not fit the task, or seeds are those of
            demonstrations.
    """
    if not seeds or not all(0 <= s < FIRST_DEMONSTRATION_SEED for s in seeds):
        raise SpecError(
            f"seeds: expected some of 0 to {FIRST_DEMONSTRATION_SEED - 1}; those above are what "
            "demonstrations are made of"
        )
    judged = list(policies) if instructions is None else list(dict.fromkeys(instructions))
    missing = [t for t in (told_instead_of(i, task, options) for i in judged) if t not in policies]
    if missing or not judged:
        raise SpecError(f"no policy that is told {missing[0]!r}" if missing else "no instruction")
    spec = next(iter(policies.values())).spec
    check_fits(spec, task)
    runner = EpisodeRunner(task, spec, options, keep_pictures=keep_pictures)
    results: list[EpisodeResult] = []
    try:
        for instruction in judged:
            policy = policies[told_instead_of(instruction, task, options)]
            for seed in seeds:
                result = runner.run(policy, instruction, seed)
                if result.outcome == "success":
                    result = replace(result, pictures=())
                results.append(result)
                if progress is not None:
                    progress(label, len(results), len(judged) * len(seeds))
    except KeyboardInterrupt:
        pass
    finally:
        runner.close()
    return Evaluation(label=label, results=tuple(results))


def to_json(
    evaluations: Sequence[Evaluation],
    contexts: Sequence[Context],
    task: TouchTask,
    options: EpisodeOptions,
) -> dict[str, Any]:
    """Return the report: options, seeds, summaries, every episode, paired comparisons."""
    bundles = []
    for evaluation, context in zip(evaluations, contexts, strict=True):
        episodes = []
        for result in evaluation.results:
            episode = {f: getattr(result, f) for f in EpisodeResult.__dataclass_fields__}
            episode.pop("pictures")
            episodes.append({key: _short(value) for key, value in episode.items()})
        bundles.append(
            {
                "label": evaluation.label,
                "context": msgspec.to_builtins(context),
                "summaries": [asdict(s) for s in evaluation.summaries()],
                "episodes": episodes,
            }
        )
    first = evaluations[0]
    compared = [
        {"label": e.label, "reference": first.label, **asdict(c), "verdict": c.verdict}
        for e, c in ((e, e.compared_with(first)) for e in evaluations[1:])
    ]
    return {
        "schema": SCHEMA,
        "task": task.name,
        "options": asdict(options),
        "bundles": bundles,
        "compared": compared,
    }


def _short(value: object) -> object:
    """Return a number of the report with as many digits as it is worth."""
    return float(f"{value:.5g}") if isinstance(value, float) else value


def write_failures(evaluation: Evaluation, folder: Path) -> list[Path]:
    """Write a strip of pictures for some failures of each instruction; return the files."""
    folder.mkdir(parents=True, exist_ok=True)
    written: list[Path] = []
    failed = [r for r in evaluation.results if r.pictures]
    instructions = list(dict.fromkeys(r.instruction for r in failed))
    for instruction in instructions:
        mine = [r for r in failed if r.instruction == instruction]
        for result in mine[: _MAX_SHOWN // len(instructions)]:
            chosen = np.linspace(0, len(result.pictures) - 1, _MOMENTS).round().astype(int)
            rows = [result.pictures[i] for i in dict.fromkeys(chosen.tolist())]
            words = f"{result.instruction} {result.seed} {result.outcome}".replace(" ", "-")
            path = folder / f"{evaluation.label.replace('/', '-')}-{words}.png"
            Image.fromarray(np.vstack(rows)).save(path)
            written.append(path)
    return written
