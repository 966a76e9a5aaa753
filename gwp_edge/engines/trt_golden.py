"""The golden gate of a build: the engines' answer, with the right noise and with other noise.

Not yet run on hardware.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np

from gwp_edge.bundle import Bundle, Stage
from gwp_edge.engines.trt import TrtEngine
from gwp_edge.engines.trt_build import BuildOptions
from gwp_edge.engines.trt_gates import judge_golden, judge_replay
from gwp_edge.engines.trt_timing import by_stage
from gwp_edge.policy import BundlePolicy

if TYPE_CHECKING:
    from gwp_edge.types import Float32Array

_OTHER_SEED: Final = 20261
# Enough for a median; a second or two on the slowest device.
_N_TIMED: Final = 7


@dataclass(frozen=True, slots=True, kw_only=True)
class GoldenResult:
    """What the gate saw.

    Attributes:
        error: largest distance from the golden actions, rad and m.
        times_ns: of every pass of the replayed chunks, by the GPU's clock.
    """

    error: float
    times_ns: Mapping[Stage, Sequence[int]]


def golden_gate(bundle: Bundle, folder: Path, options: BuildOptions) -> GoldenResult:
    """Run the golden input, and the same with other noise.

    Raises:
        BuildError: the right noise does not reproduce the answer, or the wrong noise does, or
            the chunk as a replayed graph answers something else than its stages.
    """
    golden = bundle.manifest.golden
    arrays = bundle.arrays(golden.file)
    canvas, state = arrays["canvas"], np.asarray(arrays["state"], np.float64)
    noise: Float32Array = arrays["noise"]
    other = np.random.default_rng(_OTHER_SEED).standard_normal(noise.shape, dtype=np.float32)
    engine = TrtEngine(bundle, folder=folder, options=options)
    policy = BundlePolicy(bundle, engine, task=golden.task, whole=False)
    replaying = BundlePolicy(bundle, engine, task=golden.task)
    try:
        latent, answer = policy.predict_from_canvas(canvas, state, noise)
        _, moved = policy.predict_from_canvas(canvas, state, other)
        # Other noise first: the graph must read what is there when it is replayed.
        replaying.predict_from_canvas(canvas, state, np.zeros_like(noise))
        _, replayed = replaying.predict_from_canvas(canvas, state, noise)
        laps = []
        for _ in range(_N_TIMED):
            replaying.predict_from_canvas(canvas, state, noise)
            laps.append(engine.chunk_laps_ns)
    finally:
        policy.close()
    error = judge_golden(
        answer=answer,
        wanted=np.asarray(arrays["actions"], np.float64),
        other_seed=moved,
        tolerance=golden.tolerance,
        latent=latent,
        wanted_latent=arrays["latent"],
    )
    judge_replay(replayed, answer, golden.tolerance)
    return GoldenResult(error=error, times_ns=by_stage(laps))
