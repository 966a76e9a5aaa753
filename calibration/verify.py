"""How far a bundle is from the policy it was made of, on episodes that calibration did not see.

The bundle runs on its engine. The float32 reference runs in torch from the checkpoint, under the
same noise. Both are also held against the recorded actions. Nothing here moves a motor.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

import gwp_edge
from gwp_edge.bundle import Bundle
from gwp_edge.calibration.applied_ranges import load_ranges
from gwp_edge.calibration.provenance import judge_dataset
from gwp_edge.calibration.sample_search import check_samples, find_samples, seen_frames
from gwp_edge.calibration.verify_checks import Limits, error_checks, verdict
from gwp_edge.calibration.verify_engine import Answer, EngineChoice, run_bundle
from gwp_edge.calibration.verify_errors import Ruler, compare, make_ruler
from gwp_edge.calibration.verify_frames import (
    Frames,
    Prompt,
    choose_prompts,
    choose_verification,
    judge_statistics,
)
from gwp_edge.calibration.verify_plots import plot_chunks, sensitivity_of
from gwp_edge.calibration.verify_record import RecordView, view_bundle, view_record
from gwp_edge.calibration.verify_schema import (
    Check,
    Comparison,
    Context,
    SampleId,
    VerifyReport,
)
from gwp_edge.errors import SpecError
from gwp_edge.lerobot.dataset import LeRobotDataset
from gwp_edge.spec import PolicySpec

if TYPE_CHECKING:
    from gwp_edge.calibration.verify_against import Against
    from gwp_edge.calibration.verify_reference import ReferenceOptions

Progress = Callable[[str, int, int], None]
DEFAULT_N_SAMPLES = 16
_LIBRARIES = ("numpy", "onnxruntime", "torch")
_FLOAT32 = "float32 reference"
_RECORDED = "recorded actions"


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifyOptions:
    """What ``gwp-edge verify`` was asked for; see its help.

    Attributes:
        bundle: folder.
        dataset: root of a LeRobot dataset.
        reference: where the float32 reference comes from; None compares with the recording only.
        task: prompt for every episode; None matches by name.
        n_samples: how many chunks.
        seed: of split, frames and noise; the one that calibration had.
        n_first_rows: rows that one replan executes; those of 0.4 s by default.
        gripper_threshold_m: opening that counts as open; the middle of q01 and q99 by default.
        limits: what is too much.
        engine: what runs the bundle.
        layers: judge every layer too.
        calibration_record: what the bundle was calibrated with: ranges of all inputs are shown.
    """

    bundle: Path
    dataset: Path
    reference: ReferenceOptions | None = None
    task: str | None = None
    n_samples: int = DEFAULT_N_SAMPLES
    seed: int = 0
    n_first_rows: int | None = None
    gripper_threshold_m: float | None = None
    limits: Limits = field(default_factory=Limits)
    engine: EngineChoice = field(default_factory=EngineChoice)
    layers: bool = False
    calibration_record: Path | None = None


def _silent(stage: str, done: int, total: int) -> None:
    """Report to nobody."""


def verify_bundle(options: VerifyOptions, progress: Progress = _silent) -> VerifyReport:
    """Measure a bundle's error; whether it is too much is in the report.

    Args:
        options: what to measure.
        progress: called with stage, done and total.

    Raises:
        SpecError: bundle, dataset, checkpoint or an option do not fit each other.
        BuildError: the bundle answers NaN or infinity.
    """
    if options.reference is None and (options.layers or options.limits.is_absolute):
        flag = "--layers" if options.layers else "--max-error"
        raise SpecError(f"{flag} needs the float32 reference: give the checkpoint with --against")
    bundle = Bundle.open(options.bundle, progress=progress)
    ranges = load_ranges(bundle)
    record = view_bundle(bundle, ranges)
    if options.calibration_record is not None:
        record = view_record(options.calibration_record, bundle, ranges)
    spec = bundle.spec
    ruler = make_ruler(
        spec, n_first_rows=options.n_first_rows, threshold_m=options.gripper_threshold_m
    )
    with ExitStack() as stack:
        dataset = stack.enter_context(LeRobotDataset.open(options.dataset))
        reference, against = None, None
        if options.reference is not None:
            from gwp_edge.calibration.verify_reference import open_reference

            reference = stack.enter_context(open_reference(bundle, options.reference, progress))
        found = find_samples(dataset, record.samples, spec.n_rows)
        chosen = choose_verification(
            dataset,
            spec,
            n_samples=options.n_samples,
            seed=options.seed,
            calibrated=seen_frames(found),
        )
        dataset.check_against(spec, episodes=chosen.episodes)
        files = () if reference is None else reference.prompt_files
        prompts, prompt_notes = _prompts(dataset, spec, chosen, options.task, files)
        looked_at = check_samples(dataset, record.samples, found, spec.n_rows)
        checks = (*record.checks, *looked_at)
        answers, golden = run_bundle(
            bundle,
            dataset,
            chosen.frames,
            prompts,
            spec.canvas if reference is None else reference.spec.canvas,
            seed=options.seed,
            engine=options.engine,
            progress=progress,
        )
        if reference is not None:
            from gwp_edge.calibration.verify_against import run_reference

            against = run_reference(
                bundle,
                reference,
                answers,
                ruler,
                ranges,
                layers=options.layers,
                threads=options.engine.threads,
                progress=progress,
            )
        notes = (*prompt_notes, *record.notes, *_notes(bundle, dataset, chosen, against))
        context = _context(options, bundle, dataset, chosen, ruler, answers)
    return _report(
        options, bundle, ruler, context, answers, (golden, *checks), against, notes, record
    )


def _prompts(
    dataset: LeRobotDataset,
    spec: PolicySpec,
    chosen: Frames,
    task: str | None,
    files: Sequence[Path],
) -> tuple[dict[int, Prompt], tuple[str, ...]]:
    """Return the prompt of each episode, and what there is to say about it.

    A bundle with one prompt has no other to choose: bundle and reference both follow it, so their
    difference is what it is, while the recorded actions followed another instruction.
    """
    try:
        return choose_prompts(dataset, spec, chosen.episodes, task=task, files=files), ()
    except SpecError:
        if task is not None or len(spec.tasks) > 1:
            raise
    only = spec.tasks[0]
    note = (
        f"{dataset.name} has other instructions than the bundle's one prompt {only!r}, which was "
        "used throughout: the error against recorded actions says nothing"
    )
    return choose_prompts(dataset, spec, chosen.episodes, task=only, files=files), (note,)


def _notes(
    bundle: Bundle, dataset: LeRobotDataset, chosen: Frames, against: Against | None
) -> tuple[str, ...]:
    judged = judge_dataset(dataset)
    notes = [f"{dataset.name} is not recorded data: {reason}" for reason in judged.reasons]
    notes += [f"{dataset.name}: {note}" for note in judged.notes]
    notes += judge_statistics(dataset, bundle.spec, chosen.episodes)
    notes += [f"bundle: {note}" for note in bundle.manifest.provenance.notes]
    notes += [chosen.note] if chosen.note else []
    if against is not None:
        return (*notes, *against.notes)
    precision = bundle.manifest.precision.name
    if precision == "fp32":
        return (
            *notes,
            "no --against: the bundle computes in float32 itself, so only its export could be "
            "wrong, which the golden output guards",
        )
    return (
        *notes,
        f"no --against: what {precision} costs was not measured, only the distance from the "
        "recorded actions",
    )


def _context(
    options: VerifyOptions,
    bundle: Bundle,
    dataset: LeRobotDataset,
    chosen: Frames,
    ruler: Ruler,
    answers: Sequence[Answer],
) -> Context:
    engine, reference = options.engine, options.reference
    return Context(
        created_at=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        gwp_edge=gwp_edge.__version__,
        machine=f"{platform.machine()} {platform.system()} {platform.release()}",
        libraries={name: found for name in _LIBRARIES if (found := _version(name))},
        bundle=str(bundle.root),
        bundle_id=bundle.manifest.bundle_id,
        precision=bundle.manifest.precision.name,
        engine=f"{engine.name} {engine.provider}" if engine.name == "ort" else engine.name,
        threads=engine.threads,
        against=None if reference is None else str(reference.checkpoint),
        dataset=dataset.name,
        dataset_sha256=dataset.fingerprint(),
        split_by=chosen.split_by,
        episodes=chosen.episodes,
        excluded_episodes=chosen.excluded,
        samples=tuple(
            SampleId(episode=a.episode, frame=a.frame, task=a.prompt.task) for a in answers
        ),
        seed=options.seed,
        n_first_rows=ruler.n_first_rows,
        period_ns=bundle.spec.period_ns,
        n_rows=bundle.spec.n_rows,
    )


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _report(
    options: VerifyOptions,
    bundle: Bundle,
    ruler: Ruler,
    context: Context,
    answers: Sequence[Answer],
    own_checks: tuple[Check, ...],
    against: Against | None,
    notes: tuple[str, ...],
    record: RecordView,
) -> VerifyReport:
    actions = [a.actions for a in answers]
    recorded = [a.recorded for a in answers]
    measured: Comparison | None = None
    reference_open_loop: Comparison | None = None
    checks = [*own_checks]
    if against is not None:
        measured = compare(actions, against.actions, ruler, of="bundle", against=_FLOAT32)
        reference_open_loop = compare(
            against.actions, recorded, ruler, of=_FLOAT32, against=_RECORDED
        )
        checks += against.checks
        checks += error_checks(measured, bundle.manifest.error, options.limits)
    passed, line = verdict(checks, measured)
    return VerifyReport(
        passed=passed,
        verdict=line,
        checks=tuple(checks),
        notes=notes,
        context=context,
        recorded_error=bundle.manifest.error,
        reference=measured,
        bundle_open_loop=compare(actions, recorded, ruler, of="bundle", against=_RECORDED),
        reference_open_loop=reference_open_loop,
        emulation=None if against is None else against.emulation,
        layers=() if against is None else against.layers,
        sensitivity=sensitivity_of(bundle),
        ranges=record.ranges,
        settling=record.settling,
        chunks=plot_chunks(answers, None if against is None else against.actions),
    )
