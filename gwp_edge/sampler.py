"""The denoising schedule of rectified flow with a shift.

``x(sigma) = (1 - sigma) a + sigma noise``; the network predicts ``noise - a``; Euler steps take
sigma from 1 to 0.
"""

from __future__ import annotations

from typing import Literal

import ml_dtypes
import numpy as np

from gwp_edge.errors import SpecError
from gwp_edge.spec import SamplerSpec

MAX_STEPS = 1000
TRAINING_SHIFT = 5.0


def make_schedule(
    n_steps: int,
    *,
    shift: float = TRAINING_SHIFT,
    rounding: Literal["bfloat16", "exact"] = "bfloat16",
) -> SamplerSpec:
    """Return the schedule that the model was trained for, in N steps.

    The shift enters twice: once in the smallest sigma, once over the whole range.

    Args:
        n_steps: N, 1 to 1000.
        shift: schedule shift s, positive.
        rounding: ``bfloat16`` rounds what the network is told about time, as in training.

    Raises:
        SpecError: N or s is out of range.

    Source: diffusers FlowMatchEulerDiscreteScheduler(shift=s), set_timesteps(N).
    """
    if not 1 <= n_steps <= MAX_STEPS:
        raise SpecError(f"--steps must be 1 to {MAX_STEPS}, got {n_steps}")
    if not shift > 0:
        raise SpecError(f"schedule shift must be positive, got {shift}")

    def shifted(u: np.ndarray) -> np.ndarray:
        return shift * u / (1 + (shift - 1) * u)

    # float32 as the scheduler computes it, so that N timesteps agree to the last bit or so.
    smallest = float(shifted(np.float32(1 / 1000)))
    u = np.linspace(1000.0, 1000.0 * smallest, n_steps) / 1000.0
    sigmas = shifted(u).astype(np.float32)
    timesteps = (sigmas.astype(np.float64) * 1000).astype(np.float32)
    if rounding == "bfloat16":
        timesteps = timesteps.astype(ml_dtypes.bfloat16).astype(np.float32)
    return SamplerSpec(
        shift=shift,
        sigmas=(*(float(s) for s in sigmas), 0.0),
        timesteps=tuple(float(t) for t in timesteps),
        rounding=rounding,
    )
