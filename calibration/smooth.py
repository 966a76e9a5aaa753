"""Choose the factors that even out the channels of activations and weights (SmoothQuant).

One large channel decides the scale of a whole tensor and costs every other channel resolution. A
factor for each channel moves part of its size into the weight, where every output has a scale of
its own; :mod:`gwp_edge.export.folding` applies it without any work at run time.

Where no channel stands out the same factors cost more than they gain, so each input gets the
strength, or none, for which the rounding noise at the outputs is predicted to be least.

The prediction is for even steps, those of int8. Steps of FP8 grow with the value, so that a large
channel costs the others little until they fall below its smallest step: factors gain less there.
One record serves every format, so whether a format is better off smoothed is not predicted but
measured, when ranges are chosen (:mod:`gwp_edge.calibration.choice`).

Source of the factors: Xiao et al., SmoothQuant, arXiv 2211.10438, equation 4.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from gwp_edge.export.folding import factor_name
from gwp_edge.export.ops import WeightSource
from gwp_edge.export.precision import scale_key
from gwp_edge.types import Float32Array, FloatArray

STRENGTHS = (0.25, 0.5, 0.75)
# Beyond this a factor would move rounding noise of float16 or the embedders into view.
_LARGEST_FACTOR = 64.0
_CODES = 127.0


class ChannelMoments:
    """Largest magnitude and moments of each channel of one input. Threads: one owner."""

    def __init__(self) -> None:
        self.amax: Float32Array | None = None
        self._sum: FloatArray | float = 0.0
        self._squares: FloatArray | float = 0.0
        self._n = 0

    def observe(self, x: Float32Array) -> None:
        """Take one batch (n, channels)."""
        amax = np.abs(x).max(axis=0)
        self.amax = amax if self.amax is None else np.maximum(self.amax, amax)
        self._sum = self._sum + x.sum(axis=0, dtype=np.float64)
        self._squares = self._squares + np.square(x, dtype=np.float64).sum(axis=0)
        self._n += len(x)

    @property
    def variance(self) -> FloatArray:
        """Return the variance of each channel: its mean is taken up by the bias."""
        return np.maximum(self._squares / self._n - np.square(self._sum / self._n), 0.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Reader:
    """What one layer does with a shared input."""

    weight: Float32Array
    moments: tuple[ChannelMoments, ...]

    def noise(self, factor: Float32Array) -> float:
        """Return the predicted noise power at the outputs over their power, from rounding."""
        total, w = 0.0, self.weight * factor
        w_step = np.abs(w).max(axis=1) / _CODES
        for moments in self.moments:
            if moments.amax is None:
                continue
            variance = moments.variance / np.square(factor)
            x_step = float((moments.amax / factor).max()) / _CODES
            signal = float((np.square(w) * variance).sum())
            noise = x_step**2 * float(np.square(w).sum())
            noise += float(np.square(w_step).sum() * variance.sum())
            total += noise / (12.0 * max(signal, 1e-30))
        return total


def smoothing_factors(
    weights: WeightSource,
    moments: Mapping[str, ChannelMoments],
    layers: Sequence[str],
) -> tuple[dict[str, Float32Array], dict[str, float]]:
    """Return the factors worth folding, by name, and the predicted fall of noise, by name.

    ``s_j = amax(x_j)^a / amax(W_j)^(1 - a)`` with geometric mean 1, rounded to powers of two: those
    change no bit of a float32 weight or table, so folding is exact.

    Args:
        weights: the checkpoint; the readers of one input are in memory together.
        moments: what was seen of every layer's input, by ``scale_key``.
        layers: layers to smooth.

    Returns:
        factors (in,), and noise power with them over noise power without, below 1.
    """
    groups: dict[str, list[str]] = {}
    for layer in layers:
        name = factor_name(layer)
        if name is not None:
            groups.setdefault(name, []).append(layer)
    factors, gains = {}, {}
    for name, members in sorted(groups.items()):
        readers = [_reader(weights, moments, layer) for layer in members]
        readers = [reader for reader in readers if reader.moments]
        if not readers:
            continue
        best, gain = _best(readers)
        if gain < 1.0:
            factors[name], gains[name] = best, gain
    return factors, gains


def _reader(weights: WeightSource, moments: Mapping[str, ChannelMoments], layer: str) -> _Reader:
    keys = [scale_key(stage, layer) for stage in ("prefill", "denoise")]
    return _Reader(
        weight=weights.load(f"{layer}.weight").to(torch.float32).numpy(),
        moments=tuple(moments[key] for key in keys if key in moments),
    )


def _best(readers: Sequence[_Reader]) -> tuple[Float32Array, float]:
    x_amax = np.max([m.amax for r in readers for m in r.moments if m.amax is not None], axis=0)
    w_amax = np.max([np.abs(r.weight).max(axis=0) for r in readers], axis=0)
    none = np.ones_like(w_amax)
    plain = sum(r.noise(none) for r in readers)
    best, least = none, plain
    for strength in STRENGTHS:
        factor = _factors(x_amax, w_amax, strength)
        noise = sum(r.noise(factor) for r in readers)
        if noise < least:
            best, least = factor, noise
    return best, least / plain if plain > 0 else 1.0


def _factors(x_amax: Float32Array, w_amax: Float32Array, strength: float) -> Float32Array:
    used = (x_amax > 0) & (w_amax > 0)
    exponent = np.zeros(len(x_amax), np.float64)
    exponent[used] = strength * np.log2(x_amax[used]) - (1 - strength) * np.log2(w_amax[used])
    if used.any():
        exponent[used] -= exponent[used].mean()
    limit = np.log2(_LARGEST_FACTOR)
    return np.exp2(np.rint(np.clip(exponent, -limit, limit))).astype(np.float32)
