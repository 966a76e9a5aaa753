"""What a calibration record says for itself: which samples, which ranges, do they settle."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from gwp_edge.calibration.dataset import LeRobotDataset
from gwp_edge.calibration.record import CalibrationRecord, load_record
from gwp_edge.calibration.verify_schema import Check, StepRange

# Fewer cannot say whether a range still grows: an eighth of them is less than one.
MIN_SAMPLES = 8
# A few late outliers are normal; a quarter of all ranges still growing is too few samples.
_MAX_GROWING = 0.25


@dataclass(frozen=True, kw_only=True)
class RecordView:
    """A record as a verification needs it.

    Attributes:
        ranges: largest magnitude of each input by step.
        checks: whether the samples are enough.
        notes: what a user must know.
    """

    record: CalibrationRecord | None
    ranges: tuple[StepRange, ...] = ()
    checks: tuple[Check, ...] = ()
    notes: tuple[str, ...] = ()

    def frames(self, dataset: LeRobotDataset) -> Collection[tuple[int, int]]:
        """Return the (episode, frame) pairs of ``dataset`` that calibration saw."""
        refs = self.record.samples if self.record is not None else ()
        return {(r.episode, r.frame) for r in refs if r.dataset == dataset.name}


def view_record(path: Path | None) -> RecordView:
    """Read a record; an empty view without one.

    Raises:
        SpecError: not a readable record.
    """
    if path is None:
        return RecordView(record=None)
    record = load_record(path)
    return RecordView(
        record=record,
        ranges=tuple(
            StepRange(name=name, steps=tuple(seen.histogram(step).amax for step in seen.steps))
            for name, seen in record.tensors.items()
        ),
        checks=(_settled(record),),
        notes=("the calibration samples are not recorded data",) if record.is_synthetic else (),
    )


def _settled(record: CalibrationRecord) -> Check:
    n = len(record.samples)
    if n < MIN_SAMPLES:
        return Check(
            name="calibration",
            passed=False,
            text=f"{n} samples, expected at least {MIN_SAMPLES}: calibrate with more --samples",
        )
    growing = [t.name for t in record.tensors.values() if t.convergence().is_growing]
    text = f"{n} samples, {len(growing)} of {len(record.tensors)} ranges still grow"
    if len(growing) > _MAX_GROWING * len(record.tensors):
        return Check(
            name="calibration", passed=False, text=f"{text}: calibrate with more --samples"
        )
    return Check(name="calibration", passed=True, text=text)
