"""What a calibration says for itself: which samples, which ranges, do they settle."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from gwp_edge.bundle import Bundle
from gwp_edge.calibration.applied_ranges import AppliedRanges
from gwp_edge.calibration.observers import FRACTIONS, Convergence
from gwp_edge.calibration.record import CalibrationRecord, load_record, record_bytes
from gwp_edge.calibration.sampling import SampleRef
from gwp_edge.calibration.verify_schema import Check, RangeGrowth, Settling, StepRange
from gwp_edge.errors import SpecError

# Fewer cannot say whether a range still grows: an eighth of them is less than one.
MIN_SAMPLES = 8
# Largest magnitudes have late outliers: of a random reference network's ranges 27 % grew with the
# last half of 8 samples, and 8 % with that of 64. Where most grow, the samples are too few.
_MAX_GROWING = 0.5
_SYNTHETIC = "the calibration samples are not recorded data"


@dataclass(frozen=True, kw_only=True)
class RecordView:
    """A calibration as a verification needs it: from its record, or from the bundle.

    Attributes:
        samples: what calibration saw; empty where nothing says it.
        ranges: largest magnitude of each input by step.
        settling: do the ranges still grow; None where nothing says it.
        checks: whether the samples are enough.
        notes: what a user must know.
    """

    samples: tuple[SampleRef, ...] = ()
    ranges: tuple[StepRange, ...] = ()
    settling: Settling | None = None
    checks: tuple[Check, ...] = ()
    notes: tuple[str, ...] = ()


def view_record(path: Path, bundle: Bundle, applied: AppliedRanges) -> RecordView:
    """Return what a bundle and its record say; the record has ranges of all inputs.

    Args:
        path: the record that the bundle was calibrated with.
        bundle: what is judged.
        applied: its ranges.

    Raises:
        SpecError: not a readable record, or not the one that the bundle was made from.
    """
    record = load_record(path)
    _require_own(path, record, bundle)
    seen = view_bundle(bundle, applied)
    return RecordView(
        samples=record.samples,
        ranges=tuple(
            StepRange(name=name, steps=tuple(seen.histogram(step).amax for step in seen.steps))
            for name, seen in record.tensors.items()
        ),
        settling=seen.settling,
        checks=seen.checks,
        notes=seen.notes,
    )


def _require_own(path: Path, record: CalibrationRecord, bundle: Bundle) -> None:
    calibration = bundle.manifest.calibration
    if calibration is None:
        raise SpecError(
            f"--calibration-record {path}: {bundle.root} was not calibrated; leave it out"
        )
    found = hashlib.sha256(record_bytes(record)).hexdigest()
    if found != calibration.record_sha256:
        raise SpecError(
            f"--calibration-record {path}: {bundle.root} was calibrated with another record, "
            f"{calibration.record_sha256[:12]}, this is {found[:12]}; leave it out, the bundle "
            "names its samples itself"
        )


def view_bundle(bundle: Bundle, applied: AppliedRanges) -> RecordView:
    """Return what a bundle says of its calibration; an empty view where there was none."""
    calibration = bundle.manifest.calibration
    if calibration is None:
        return RecordView()
    settling = settling_of(applied.convergence, applied.method)
    return RecordView(
        samples=tuple(
            SampleRef(dataset=s.dataset, episode=s.episode, frame=s.frame, sha256=s.sha256)
            for s in calibration.samples
        ),
        ranges=tuple(
            StepRange(name=name, steps=tuple(float(x) for x in amax))
            for name, amax in applied.step_amax.items()
        ),
        settling=settling,
        checks=(check_settled(calibration.n_samples, settling),),
        notes=(_SYNTHETIC,) if calibration.is_synthetic else (),
    )


def settling_of(convergence: Mapping[str, Convergence], method: str) -> Settling | None:
    """Return convergence as a report shows it; None where nothing has a range."""
    if not convergence:
        return None
    return Settling(
        method=method,
        fractions=FRACTIONS,
        ranges=tuple(
            RangeGrowth(
                name=name,
                amax=seen.amax,
                thresholds=seen.thresholds,
                growth=seen.growth,
                is_growing=seen.is_growing,
            )
            for name, seen in convergence.items()
        ),
    )


def check_settled(n_samples: int, settling: Settling | None) -> Check:
    """Judge whether there were enough samples.

    Args:
        n_samples: how many there were.
        settling: what the ranges did as they were added; None where there are no ranges.
    """
    if n_samples < MIN_SAMPLES:
        text = f"{n_samples} samples, expected at least {MIN_SAMPLES}"
        return _too_few(text)
    text = f"{n_samples} samples"
    if settling is None:
        return Check(name="calibration", passed=True, text=text)
    n_growing = sum(seen.is_growing for seen in settling.ranges)
    text += f", {n_growing} of {len(settling.ranges)} ranges ({settling.method}) still grow"
    if n_growing > _MAX_GROWING * len(settling.ranges):
        return _too_few(text)
    return Check(name="calibration", passed=True, text=text)


def _too_few(text: str) -> Check:
    return Check(name="calibration", passed=False, text=f"{text}: calibrate with more --samples")
