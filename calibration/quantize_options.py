"""What quantization is asked for."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from gwp_edge.calibration.collect import CollectOptions
from gwp_edge.calibration.sensitivity import Budget
from gwp_edge.calibration.thresholds import Method
from gwp_edge.export.precision import DEFAULT_INT4_BLOCK, Format


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
        fixed: which of ``collect`` were asked for by name; a record must have been made so.
        rest: format of what is not quantized.
        block: inputs that share a scale in w4.
        allow_synthetic: take a dataset that is not recorded; the bundle then says so.
        go_on: where the budget is not met, go on with the whole recipe all the same.
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
    fixed: frozenset[str] = frozenset()
    rest: Format = "fp32"
    block: int = DEFAULT_INT4_BLOCK
    allow_synthetic: bool = False
    go_on: bool = False
