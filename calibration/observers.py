"""Observe activations while a reference network runs: ranges per tensor, per step, over all.

Values stream through and are dropped; what stays is a few histograms for each tensor. Observers
of two runs merge into what one run over both would have seen.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from gwp_edge.calibration.arithmetic import NumberFormat
from gwp_edge.calibration.histogram import N_BINS, Histogram
from gwp_edge.calibration.thresholds import Method, choose_threshold
from gwp_edge.errors import SpecError
from gwp_edge.types import Float32Array, frozen_array

FRACTIONS = (0.125, 0.25, 0.5, 1.0)
_GROWTH_TOLERANCE = 0.05


@dataclass(frozen=True, slots=True, kw_only=True)
class Convergence:
    """Does the range still grow with more samples?

    Attributes:
        name: the tensor.
        fractions: shares of the samples that were looked at.
        amax: largest magnitude in each share.
        thresholds: chosen threshold in each share.
        growth: last threshold over the one of half the samples, minus 1.
        is_growing: ``growth`` is beyond the tolerance: calibrate with more samples.
    """

    name: str
    fractions: tuple[float, ...]
    amax: tuple[float, ...]
    thresholds: tuple[float, ...]
    growth: float
    is_growing: bool

    @classmethod
    def of(
        cls,
        name: str,
        amax: Sequence[float],
        thresholds: Sequence[float],
        *,
        tolerance: float = _GROWTH_TOLERANCE,
    ) -> Convergence:
        """Judge the growth of what was seen in each of ``FRACTIONS``."""
        half, last = thresholds[-2], thresholds[-1]
        growth = last / half - 1.0 if half > 0 else float(last > 0)
        return cls(
            name=name,
            fractions=FRACTIONS,
            amax=tuple(amax),
            thresholds=tuple(thresholds),
            growth=growth,
            is_growing=abs(growth) > tolerance,
        )


def convergence_group(sample_idx: int) -> int:
    """Return which of the four shares (1/8, 1/8, 1/4, 1/2) a sample belongs to.

    The shares interleave, so that each spreads over all episodes although samples come in order.
    """
    if sample_idx % 8 == 0:
        return 0
    if sample_idx % 8 == 4:
        return 1
    return 2 if sample_idx % 4 == 2 else 3


class TensorObserver:
    """Magnitudes of one activation tensor. Threads: one owner.

    Attributes:
        name: the tensor.
        n_bins: bins of each histogram.
        step_histograms: one per denoising step.
        group_histograms: one per share of the samples, over all steps; see
            :func:`convergence_group`.
    """

    def __init__(self, name: str, *, n_bins: int = N_BINS) -> None:
        self.name = name
        self.n_bins = n_bins
        self.step_histograms: dict[int, Histogram] = {}
        self.group_histograms: dict[int, Histogram] = {}

    def observe(self, x: npt.ArrayLike, *, sample_idx: int, step_idx: int = 0) -> None:
        """Count the magnitudes of one batch.

        Args:
            x: activations of any shape, float; converted to float32.
            sample_idx: position of the calibration sample, from 0.
            step_idx: denoising step; 0 for tensors that run once.

        Raises:
            SpecError: an empty batch, a negative index, or a value that is not finite.
        """
        if sample_idx < 0 or step_idx < 0:
            raise SpecError(
                f"{self.name}: expected indices from 0, got sample {sample_idx}, step {step_idx}"
            )
        where = f"{self.name} (sample {sample_idx}, step {step_idx})"
        batch = Histogram.of(x, name=where, n_bins=self.n_bins)
        self._of(self.step_histograms, step_idx).add(batch)
        self._of(self.group_histograms, convergence_group(sample_idx)).add(batch)

    def _of(self, table: dict[int, Histogram], key: int) -> Histogram:
        if key not in table:
            table[key] = Histogram(self.n_bins)
        return table[key]

    @property
    def steps(self) -> tuple[int, ...]:
        """Denoising steps seen, ascending."""
        return tuple(sorted(self.step_histograms))

    def histogram(self, step_idx: int | None = None) -> Histogram:
        """Return the histogram of one step, or over all steps.

        Raises:
            SpecError: nothing was observed, or not at this step.
        """
        if step_idx is None:
            merged = Histogram(self.n_bins)
            for histogram in self.step_histograms.values():
                merged.add(histogram)
        else:
            merged = self.step_histograms.get(step_idx, Histogram(self.n_bins))
        if merged.n_values == 0:
            at = "" if step_idx is None else f" at step {step_idx}"
            raise SpecError(f"{self.name}: no activations were observed{at}")
        return merged

    def threshold(
        self,
        method: Method = "percentile",
        *,
        step_idx: int | None = None,
        percentile: float = 99.9,
        number_format: NumberFormat = "int8",
    ) -> float:
        """Return the clipping threshold of one step or over all; see :mod:`thresholds`."""
        return choose_threshold(
            self.histogram(step_idx), method, percentile=percentile, number_format=number_format
        )

    def merge(self, other: TensorObserver) -> None:
        """Add what ``other`` has seen of the same tensor.

        Raises:
            SpecError: another tensor, or another number of bins.
        """
        if other.name != self.name:
            raise SpecError(f"cannot merge the ranges of {other.name} into those of {self.name}")
        for mine, theirs in (
            (self.step_histograms, other.step_histograms),
            (self.group_histograms, other.group_histograms),
        ):
            for key, histogram in theirs.items():
                self._of(mine, key).add(histogram)

    def convergence(
        self,
        method: Method = "percentile",
        *,
        percentile: float = 99.9,
        number_format: NumberFormat = "int8",
        tolerance: float = _GROWTH_TOLERANCE,
    ) -> Convergence:
        """Report how amax and threshold grow from 1/8 of the samples to all.

        A share without samples (fewer than eight in all) repeats the one before it.
        """
        seen = Histogram(self.n_bins)
        amax: list[float] = []
        thresholds: list[float] = []
        for group in range(len(FRACTIONS)):
            if group in self.group_histograms:
                seen.add(self.group_histograms[group])
            amax.append(seen.amax)
            thresholds.append(
                choose_threshold(seen, method, percentile=percentile, number_format=number_format)
                if seen.n_values
                else 0.0
            )
        return Convergence.of(self.name, amax, thresholds, tolerance=tolerance)


class ChannelObserver:
    """Largest magnitude of each channel of one tensor per step: what smoothing needs.

    Channels are the last axis. Threads: one owner.

    Attributes:
        name: the tensor.
        step_amax: one array of shape (channels,) per denoising step.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.step_amax: dict[int, Float32Array] = {}

    def observe(self, x: npt.ArrayLike, *, step_idx: int = 0) -> None:
        """Take one batch, shape (..., channels).

        Raises:
            SpecError: an empty batch, another number of channels, or a value that is not finite.
        """
        values = np.asarray(x, dtype=np.float32)
        if values.ndim == 0 or values.size == 0:
            raise SpecError(f"{self.name}: expected shape (..., channels), got {values.shape}")
        amax: Float32Array = np.abs(values).reshape(-1, values.shape[-1]).max(axis=0)
        if not np.isfinite(amax).all():
            raise SpecError(
                f"{self.name} (step {step_idx}): activations are not finite in channel "
                f"{int(np.flatnonzero(~np.isfinite(amax))[0])}; check the checkpoint"
            )
        known = next(iter(self.step_amax.values()), amax)
        if known.shape != amax.shape:
            raise SpecError(f"{self.name}: expected {known.size} channels, got {amax.size}")
        self.step_amax[step_idx] = np.maximum(self.step_amax.get(step_idx, amax), amax)

    @property
    def steps(self) -> tuple[int, ...]:
        """Denoising steps seen, ascending."""
        return tuple(sorted(self.step_amax))

    def amax(self, step_idx: int | None = None) -> Float32Array:
        """Return the largest magnitude per channel, of one step or over all, shape (channels,).

        Raises:
            SpecError: nothing was observed, or not at this step.
        """
        rows = [v for k, v in self.step_amax.items() if step_idx in (None, k)]
        if not rows:
            raise SpecError(f"{self.name}: no activations were observed")
        result: Float32Array = frozen_array(np.max(rows, axis=0), np.float32)
        return result

    def merge(self, other: ChannelObserver) -> None:
        """Add what ``other`` has seen of the same tensor.

        Raises:
            SpecError: another tensor, or another number of channels.
        """
        if other.name != self.name:
            raise SpecError(f"cannot merge the ranges of {other.name} into those of {self.name}")
        for step_idx, amax in other.step_amax.items():
            self.observe(amax, step_idx=step_idx)
