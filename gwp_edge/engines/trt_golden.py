"""The golden gate of a build: the engines' answer, with the right noise and with other noise.

Not yet run on hardware.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np

from gwp_edge.bundle import Bundle
from gwp_edge.engines.trt import TrtEngine
from gwp_edge.engines.trt_blame import BuildDebug, Seen, blame
from gwp_edge.engines.trt_gates import judge_golden, judge_replay
from gwp_edge.engines.trt_record import EngineFile
from gwp_edge.engines.trt_timing import by_stage
from gwp_edge.errors import BuildError, DeviceError
from gwp_edge.manifest import Stage
from gwp_edge.passes import free_input, run_stages, run_whole
from gwp_edge.policy import BundlePolicy
from gwp_edge.preprocess import actions_from_network, normalise_state
from gwp_edge.types import FloatArray

if TYPE_CHECKING:
    from gwp_edge.spec import PolicySpec
    from gwp_edge.types import Float32Array, ImageArray

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
    """Actions (H, D) by stages and with other noise; what was on the way.

    ``replays`` are pairs of actions: by a replayed graph and by its stages.
    """

    actions: FloatArray
    other_seed: FloatArray
    replays: Sequence[tuple[FloatArray, FloatArray]]
    seen: Seen
    laps_ns: Sequence[Sequence[int]]


def golden_gate(
    bundle: Bundle, folder: Path, files: Mapping[Stage, EngineFile], build_debug: BuildDebug
) -> GoldenResult:
    """Run the golden input, and the same with other noise.

    Args:
        bundle: a checked bundle.
        folder: its engines.
        files: what is known about them.
        build_debug: builds an engine that shows its layers, to name the one that is wrong.

    Raises:
        BuildError: the right noise does not reproduce the answer, or the wrong noise does, or
            the chunk as a replayed graph answers something else than its stages, or the engines
            cannot run here.
    """
    golden = bundle.manifest.golden
    try:
        found = _run(bundle, folder, files)
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
    for replayed, staged in found.replays:
        judge_replay(replayed, staged, golden.tolerance)
    return GoldenResult(error=error, times_ns=by_stage(found.laps_ns))


def _run(bundle: Bundle, folder: Path, files: Mapping[Stage, EngineFile]) -> _Answers:
    golden = bundle.manifest.golden
    arrays = bundle.arrays(golden.file)
    canvas, state = arrays["canvas"], np.asarray(arrays["state"], np.float64)
    noise: Float32Array = arrays["noise"]
    other = np.random.default_rng(_OTHER_SEED).standard_normal(noise.shape, dtype=np.float32)
    engine = TrtEngine(bundle, built=(folder, files))
    try:
        policy = BundlePolicy(bundle, engine, task=golden.task, whole=False)
        replaying = BundlePolicy(bundle, engine, task=golden.task)
        latent, answer = policy.predict_from_canvas(canvas, state, noise)
        seen = Seen(latent=latent, prefix=engine.prefix())
        _, moved = policy.predict_from_canvas(canvas, state, other)
        # Other noise first: the graph must read what is there when it is replayed.
        replaying.predict_from_canvas(canvas, state, np.zeros_like(noise))
        replays = [(replaying.predict_from_canvas(canvas, state, noise)[1], answer)]
        if bundle.spec.sampler.n_steps > 1:
            replays.append(_replay_warm_start(bundle.spec, engine, canvas, state, noise))
            # The graphs share buffers and some contexts: the first must still be right after the
            # second was made.
            replays.append((replaying.predict_from_canvas(canvas, state, noise)[1], answer))
        laps = []
        for _ in range(_N_TIMED):
            replaying.predict_from_canvas(canvas, state, noise)
            laps.append(engine.chunk_laps_ns)
    finally:
        engine.close()
    return _Answers(
        actions=answer, other_seed=moved, replays=replays, seen=seen, laps_ns=tuple(laps)
    )


def _replay_warm_start(
    spec: PolicySpec,
    engine: TrtEngine,
    canvas: ImageArray,
    state: FloatArray,
    noise: Float32Array,
) -> tuple[FloatArray, FloatArray]:
    """Return actions (H, D) of the last step alone, by a replayed graph and by its stages."""
    n_steps = spec.sampler.n_steps
    free = free_input(canvas, normalise_state(state, spec), noise, n_steps)
    given = replace(free, first_step=n_steps - 1)
    staged = run_stages(engine, given).x
    run_whole(engine, replace(given, x=np.zeros_like(noise)))
    replayed = run_whole(engine, given).x
    return actions_from_network(replayed, state, spec), actions_from_network(staged, state, spec)
