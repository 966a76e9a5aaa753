"""The golden gate of a build: the engines' answer, with the right noise and with other noise.

Not yet run on hardware.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np

from gwp_edge.bundle import Bundle
from gwp_edge.engines.trt import TrtEngine
from gwp_edge.engines.trt_blame import BuildDebug, Seen, blame
from gwp_edge.engines.trt_gates import judge_golden, judge_replay
from gwp_edge.engines.trt_timing import by_stage
from gwp_edge.errors import BuildError, DeviceError
from gwp_edge.manifest import Stage
from gwp_edge.policy import BundlePolicy
from gwp_edge.types import FloatArray

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


@dataclass(frozen=True, slots=True, kw_only=True)
class _Answers:
    """Actions (H, D) by stages, with other noise, and by a replayed graph; what was on the way."""

    actions: FloatArray
    other_seed: FloatArray
    replayed: FloatArray
    seen: Seen
    laps_ns: Sequence[Sequence[int]]


def golden_gate(bundle: Bundle, folder: Path, build_debug: BuildDebug) -> GoldenResult:
    """Run the golden input, and the same with other noise.

    Args:
        bundle: a checked bundle.
        folder: its engines.
        build_debug: builds an engine that shows its layers, to name the one that is wrong.

    Raises:
        BuildError: the right noise does not reproduce the answer, or the wrong noise does, or
            the chunk as a replayed graph answers something else than its stages, or the engines
            cannot run here.
    """
    golden = bundle.manifest.golden
    try:
        found = _run(bundle, folder)
    except DeviceError as e:
        raise BuildError(f"the engines cannot run here: {e}; they were deleted") from e
    error = judge_golden(
        answer=found.actions,
        wanted=np.asarray(bundle.arrays(golden.file)["actions"], np.float64),
        other_seed=found.other_seed,
        tolerance=golden.tolerance,
        # By now the engines are closed, so that there is memory to look for the fault.
        blame=functools.partial(blame, bundle, found.seen, folder, build_debug),
    )
    judge_replay(found.replayed, found.actions, golden.tolerance)
    return GoldenResult(error=error, times_ns=by_stage(found.laps_ns))


def _run(bundle: Bundle, folder: Path) -> _Answers:
    golden = bundle.manifest.golden
    arrays = bundle.arrays(golden.file)
    canvas, state = arrays["canvas"], np.asarray(arrays["state"], np.float64)
    noise: Float32Array = arrays["noise"]
    other = np.random.default_rng(_OTHER_SEED).standard_normal(noise.shape, dtype=np.float32)
    engine = TrtEngine(bundle, folder=folder)
    try:
        policy = BundlePolicy(bundle, engine, task=golden.task, whole=False)
        replaying = BundlePolicy(bundle, engine, task=golden.task)
        latent, answer = policy.predict_from_canvas(canvas, state, noise)
        seen = Seen(latent=latent, prefix=engine.prefix())
        _, moved = policy.predict_from_canvas(canvas, state, other)
        # Other noise first: the graph must read what is there when it is replayed.
        replaying.predict_from_canvas(canvas, state, np.zeros_like(noise))
        _, replayed = replaying.predict_from_canvas(canvas, state, noise)
        laps = []
        for _ in range(_N_TIMED):
            replaying.predict_from_canvas(canvas, state, noise)
            laps.append(engine.chunk_laps_ns)
    finally:
        engine.close()
    return _Answers(
        actions=answer, other_seed=moved, replayed=replayed, seen=seen, laps_ns=tuple(laps)
    )
