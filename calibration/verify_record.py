"""What a calibration record says for itself: which samples, which ranges, do they settle."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from gwp_edge.bundle import Bundle
from gwp_edge.calibration.applied_ranges import AppliedRanges
from gwp_edge.calibration.record import CalibrationRecord, load_record
from gwp_edge.calibration.sampling import SampleRef, hash_sample
from gwp_edge.calibration.verify_schema import Check, StepRange
from gwp_edge.lerobot.dataset import LeRobotDataset

# Fewer cannot say whether a range still grows: an eighth of them is less than one.
MIN_SAMPLES = 8
# A few late outliers are normal; a quarter of all ranges still growing is too few samples.
_MAX_GROWING = 0.25
_N_REHASHED = 4


@dataclass(frozen=True, kw_only=True)
class RecordView:
    """A calibration as a verification needs it: from its record, or from the bundle.

    Attributes:
        samples: what calibration saw; empty where nothing says it.
        ranges: largest magnitude of each input by step.
        checks: whether the samples are enough.
        notes: what a user must know.
    """

    samples: tuple[SampleRef, ...] = ()
    ranges: tuple[StepRange, ...] = ()
    checks: tuple[Check, ...] = ()
    notes: tuple[str, ...] = ()

    def frames(self, dataset: LeRobotDataset) -> Collection[tuple[int, int]]:
        """Return the (episode, frame) pairs of ``dataset`` that calibration saw."""
        return {(ref.episode, ref.frame) for ref in self.refs_into(dataset)}

    def refs_into(self, dataset: LeRobotDataset) -> tuple[SampleRef, ...]:
        """Return the references into ``dataset``, which is known by its name."""
        return tuple(ref for ref in self.samples if ref.dataset == dataset.name)

    def check_samples(self, dataset: LeRobotDataset, n_rows: int) -> tuple[Check, ...]:
        """Look at a few calibration samples again: are they what the dataset holds?

        Cameras that were exchanged, an edited episode or another decoder show here.
        """
        if not self.samples:
            return ()
        refs = self.refs_into(dataset)
        if not refs:
            text = f"none of them is in {dataset.name}"
            return (Check(name="calibration samples", passed=None, text=text),)
        step = -(-len(refs) // _N_REHASHED)
        picked = refs[::step]
        for ref in picked:
            if hash_sample(dataset.sample(ref.episode, ref.frame, n_rows=n_rows)) != ref.sha256:
                text = (
                    f"episode {ref.episode}, frame {ref.frame} is not what calibration saw: "
                    "pictures, cameras, state, actions or task differ"
                )
                return (Check(name="calibration samples", passed=False, text=text),)
        text = f"{len(picked)} of {len(refs)} looked at, as calibration saw them"
        return (Check(name="calibration samples", passed=True, text=text),)


def view_record(path: Path | None) -> RecordView:
    """Read a record; an empty view without one.

    Raises:
        SpecError: not a readable record.
    """
    if path is None:
        return RecordView()
    record = load_record(path)
    return RecordView(
        samples=record.samples,
        ranges=tuple(
            StepRange(name=name, steps=tuple(seen.histogram(step).amax for step in seen.steps))
            for name, seen in record.tensors.items()
        ),
        checks=(_settled(record),),
        notes=("the calibration samples are not recorded data",) if record.is_synthetic else (),
    )


def view_bundle(bundle: Bundle, ranges: AppliedRanges) -> RecordView:
    """Return what a bundle says of its calibration; an empty view where there was none."""
    calibration = bundle.manifest.calibration
    if calibration is None:
        return RecordView()
    n = calibration.n_samples
    return RecordView(
        samples=tuple(
            SampleRef(dataset=s.dataset, episode=s.episode, frame=s.frame, sha256=s.sha256)
            for s in calibration.samples
        ),
        ranges=tuple(
            StepRange(name=name, steps=tuple(float(x) for x in amax))
            for name, amax in ranges.step_amax.items()
        ),
        checks=(_enough(n) or Check(name="calibration", passed=True, text=f"{n} samples"),),
        notes=("the calibration samples are not recorded data",)
        if calibration.is_synthetic
        else (),
    )


def _enough(n_samples: int) -> Check | None:
    """Return a failed check where there are too few samples."""
    if n_samples >= MIN_SAMPLES:
        return None
    return Check(
        name="calibration",
        passed=False,
        text=f"{n_samples} samples, expected at least {MIN_SAMPLES}: calibrate with more --samples",
    )


def _settled(record: CalibrationRecord) -> Check:
    n = len(record.samples)
    if (few := _enough(n)) is not None:
        return few
    growing = [t.name for t in record.tensors.values() if t.convergence().is_growing]
    text = f"{n} samples, {len(growing)} of {len(record.tensors)} ranges still grow"
    if len(growing) > _MAX_GROWING * len(record.tensors):
        return Check(
            name="calibration", passed=False, text=f"{text}: calibrate with more --samples"
        )
    return Check(name="calibration", passed=True, text=text)
