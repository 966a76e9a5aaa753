"""Real-time chunking without gradients: how a new chunk is kept near the one that is running.

All of it is one blend inside the Euler step, v' = v - gain (A_prev - (x - sigma v)), with a gain
per step and row; the denoise graph applies it, this module computes the gain.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Final, Literal, get_args

import numpy as np

from gwp_edge.errors import SpecError
from gwp_edge.types import Chunk, Float32Array, FloatArray

Method = Literal["soft", "hard", "identity", "none"]
_METHODS: Final = get_args(Method)


@dataclass(frozen=True, slots=True, kw_only=True)
class Guidance:
    """How a new chunk follows the old one.

    Attributes:
        method: ``soft`` blends the predicted clean actions with exponentially falling weights
            (default); ``hard`` replaces the frozen rows and nothing else; ``identity`` is
            real-time chunking with the Jacobian taken as the identity; ``none`` is free.
        n_frozen_rows: rows d that will be executed before the new chunk can arrive.
        n_horizon_rows: rows e up to which the old chunk has a say; 0 takes as many as are real.
        beta: cap of the identity gain; 10 as in LeRobot's RTCConfig, 5 in the paper's code.
        warm_start_sigma: start denoising at this sigma from the noised old chunk; 1 for a free
            start. Below 1 saves steps and keeps the mode, but resists changes of mind.
    """

    method: Method = "soft"
    n_frozen_rows: int = 0
    n_horizon_rows: int = 0
    beta: float = 10.0
    warm_start_sigma: float = 1.0

    def __post_init__(self) -> None:
        if self.method not in _METHODS:
            raise SpecError(f"guidance {self.method!r}: expected one of {', '.join(_METHODS)}")
        if self.n_frozen_rows < 0 or self.n_horizon_rows < 0:
            raise SpecError(
                f"guidance: rows must not be negative, got {self.n_frozen_rows} frozen and "
                f"{self.n_horizon_rows} horizon"
            )
        if not (math.isfinite(self.beta) and self.beta > 0):
            raise SpecError(f"guidance: beta must be positive, got {self.beta}")
        if not 0 < self.warm_start_sigma <= 1:
            raise SpecError(
                f"warm start: expected above 0 up to 1 (1 is none), got {self.warm_start_sigma:g}"
            )

    def within(self, n_real_rows: int) -> Guidance:
        """Return it with frozen and horizon rows capped to those that the old chunk covers."""
        horizon = min(self.n_horizon_rows or n_real_rows, n_real_rows)
        return replace(
            self, n_frozen_rows=min(self.n_frozen_rows, n_real_rows), n_horizon_rows=horizon
        )


def prefix_weights(n_frozen: int, n_horizon: int, n_rows: int) -> FloatArray:
    """Return the weights W of the old chunk per row, shape (H,), 1 down to 0.

    1 for i < d; w (e^w - 1) / (e - 1) with w falling linearly from d to e; 0 from e on.
    """
    d = min(n_frozen, n_rows)
    e = min(max(n_horizon, d), n_rows)
    i = np.arange(n_rows)
    w = np.clip((d - 1 - i) / (e - d + 1) + 1, 0.0, 1.0)
    weights: FloatArray = w * np.expm1(w) / math.expm1(1.0)
    weights[i >= e] = 0.0
    return weights


def prefix_gain(guidance: Guidance, sigmas: FloatArray, n_rows: int) -> Float32Array:
    """Return the gain per step and row, shape (N, H, 1).

    Args:
        guidance: method and rows; ``n_horizon_rows`` of 0 is taken as ``n_rows``.
        sigmas: the N + 1 noise levels, falling to 0.
        n_rows: rows H of a chunk.

    soft and hard: W / sigma, which leads x to A_prev exactly where W is 1. identity:
    min(beta, (s^2 + (1-s)^2) / (s (1-s))) W, and never more than 1 / d sigma, beyond which an
    Euler step would overshoot.
    """
    sigmas = np.asarray(sigmas, np.float64)
    if sigmas.ndim != 1 or len(sigmas) < 2 or not (np.diff(sigmas) < 0).all() or sigmas[-1] < 0:
        raise SpecError(f"guidance: sigmas must fall towards 0, got {sigmas.tolist()}")
    n_steps = len(sigmas) - 1
    gain = np.zeros((n_steps, n_rows, 1), np.float32)
    if guidance.method == "none":
        return gain
    s = sigmas[:-1]
    horizon = guidance.n_horizon_rows or n_rows
    if guidance.method == "hard":
        weights = (np.arange(n_rows) < guidance.n_frozen_rows).astype(np.float64)
    else:
        weights = prefix_weights(guidance.n_frozen_rows, horizon, n_rows)
    if guidance.method == "identity":
        with np.errstate(divide="ignore"):
            scale = (s**2 + (1 - s) ** 2) / (s * (1 - s))
        scale = np.minimum(np.minimum(scale, guidance.beta), 1.0 / -np.diff(sigmas))
    else:
        scale = 1.0 / s
    gain[:, :, 0] = scale[:, None] * weights[None, :]
    return gain


def warm_start_step(guidance: Guidance, sigmas: FloatArray) -> int:
    """Return the first step to take: the first whose sigma is at most ``warm_start_sigma``."""
    s = np.asarray(sigmas)[:-1]
    below = np.flatnonzero(s <= guidance.warm_start_sigma + 1e-6)
    return int(below[0]) if len(below) else len(s) - 1


def shift_rows(
    previous: Chunk, t_observed_ns: int, period_ns: int, n_rows: int
) -> tuple[FloatArray, int]:
    """Return the old plan at the times of a new chunk's rows, and how many of them are real.

    Rows between those of the old plan are interpolated linearly; beyond its end its last row is
    held, and before its start its first one.

    Args:
        previous: the plan that is being executed, absolute actions (H', D).
        t_observed_ns: the new observation's time.
        period_ns: time between the new rows.
        n_rows: rows H of the new chunk.

    Returns:
        rows: absolute actions, (H, D).
        n_real: leading rows that the old plan covers.
    """
    if period_ns <= 0 or n_rows <= 0:
        raise SpecError(f"chunk: expected positive period and rows, got {period_ns} ns, {n_rows}")
    t_ns = t_observed_ns - previous.t_observed_ns + period_ns * np.arange(n_rows, dtype=np.int64)
    u = t_ns / previous.period_ns
    last = len(previous.actions) - 1
    n_real = int((u <= last + 1e-9).sum())
    u = np.clip(u, 0.0, last)
    k = np.minimum(u.astype(np.int64), max(last - 1, 0))
    a = (u - k)[:, None]
    after = np.minimum(k + 1, last)
    rows: FloatArray = (1.0 - a) * previous.actions[k] + a * previous.actions[after]
    return rows, n_real


def frozen_rows(latency_ns: int, margin_ns: int, period_ns: int, n_rows: int) -> int:
    """Return how many rows pass before a chunk asked for now arrives: ceil of latency + margin."""
    return min(n_rows, -(-max(0, latency_ns + margin_ns) // period_ns))
