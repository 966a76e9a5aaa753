"""A policy: observation in, chunk of absolute actions out."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from gwp_edge.bundle import Bundle
from gwp_edge.chunking import Guidance, prefix_gain, shift_rows, warm_start_step
from gwp_edge.engines import create_engine
from gwp_edge.errors import BuildError, SpecError
from gwp_edge.passes import PassAnswer, PassInput, free_input, run_pass, run_stages
from gwp_edge.preprocess import (
    actions_from_network,
    actions_to_network,
    compose_canvas,
    normalise_state,
)
from gwp_edge.protocols import ChunkEngine, Engine
from gwp_edge.spec import PolicySpec
from gwp_edge.telemetry import StageTimes
from gwp_edge.types import Chunk, Float32Array, FloatArray, ImageArray, Observation

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class PredictTrace:
    """What one ``predict`` passed from stage to stage, for records and replays.

    Attributes:
        canvas: uint8 RGB, (h, w, 3).
        latent: (1, C, h/16, w/16), float32.
        noise: the starting noise, (H, A), float32.
    """

    canvas: ImageArray
    latent: Float32Array
    noise: Float32Array


class BundlePolicy:
    """A bundle on an engine. Threads: one owner.

    Args:
        bundle: a checked bundle.
        engine: runs its graphs; closed with the policy.
        task: prompt to follow; None takes the bundle's first.
        seed: of the noise that ``predict`` draws; None takes a fresh one.
        whole: run a chunk in one call where the engine can; else stage by stage.
    """

    def __init__(
        self,
        bundle: Bundle,
        engine: Engine,
        *,
        task: str | None = None,
        seed: int | None = None,
        whole: bool = True,
    ) -> None:
        self.bundle = bundle
        self._engine = engine
        self._pass = run_pass if whole else run_stages
        self._spec = bundle.spec
        self._rng = np.random.default_rng(seed)
        self._sigmas = np.asarray(self._spec.sampler.sigmas)
        self._timing: StageTimes | None = None
        self._trace: PredictTrace | None = None
        self._n_chunks = 0
        self.task = task if task is not None else self._spec.tasks[0]
        engine.set_prompt(self.task)

    @property
    def spec(self) -> PolicySpec:
        """What the policy expects and gives."""
        return self._spec

    @property
    def timing(self) -> StageTimes:
        """Stage times of the last prediction, the golden one included.

        Raises:
            SpecError: nothing was predicted yet.
        """
        if self._timing is None:
            raise SpecError("no chunk was predicted yet, so there are no stage times")
        return self._timing

    @property
    def trace(self) -> PredictTrace | None:
        """What the last ``predict`` passed from stage to stage; None before the first."""
        return self._trace

    def predict(
        self,
        observation: Observation,
        *,
        noise: Float32Array | None = None,
        previous: Chunk | None = None,
        guidance: Guidance | None = None,
    ) -> Chunk:
        """Return a plan of absolute actions, stamped with the observation's time.

        Args:
            observation: a frame of every camera of the spec, and the state (D,), rad and m.
            noise: starting noise, (H, A) or (1, H, A), float32; drawn where None.
            previous: the plan in execution, for real-time chunking.
            guidance: how to stay near ``previous``; None for a free plan.

        Raises:
            SpecError: a camera is missing, or a shape does not fit the spec.
        """
        t_start = time.monotonic_ns()
        canvas = compose_canvas(observation, self._spec.canvas)
        state_norm = normalise_state(observation.state, self._spec)
        start = self._noise(noise)
        given = free_input(canvas, state_norm, start, self._spec.sampler.n_steps)
        t_guide = t_given = time.monotonic_ns()
        if previous is not None and guidance is not None and guidance.method != "none":
            given = self._guided(given, observation, previous, guidance)
            t_given = time.monotonic_ns()
        answer = self._pass(self._engine, given)
        t_post = time.monotonic_ns()
        chunk = Chunk(
            actions=actions_from_network(answer.x, observation.state, self._spec),
            t_observed_ns=observation.t_observed_ns,
            period_ns=self._spec.period_ns,
            chunk_idx=self._n_chunks,
        )
        self._n_chunks += 1
        self._trace = PredictTrace(canvas=canvas, latent=answer.latent, noise=start)
        self._note_times(answer, t_guide - t_start, time.monotonic_ns() - t_post, t_given - t_guide)
        return chunk

    def _note_times(
        self, answer: PassAnswer, preprocess_ns: int, postprocess_ns: int, guide_ns: int = 0
    ) -> None:
        self._timing = StageTimes(
            # Copies to a device and the launch come before its stages, so they count here.
            preprocess_ns=preprocess_ns + answer.other_ns,
            guide_ns=guide_ns,
            vision_ns=answer.vision_ns,
            prefill_ns=answer.prefill_ns,
            denoise_ns=answer.denoise_ns,
            postprocess_ns=postprocess_ns,
            device_timed=self._pass is run_pass and isinstance(self._engine, ChunkEngine),
        )

    def _noise(self, noise: Float32Array | None) -> Float32Array:
        shape = (self._spec.n_rows, self._spec.network.n_action_channels)
        if noise is None:
            return self._rng.standard_normal(shape, dtype=np.float32)
        given = np.asarray(noise)
        if given.shape == (1, *shape):
            given = given[0]
        if given.shape != shape:
            raise SpecError(f"noise: expected shape {shape}, got {np.asarray(noise).shape}")
        if not np.issubdtype(given.dtype, np.floating) or not np.isfinite(given).all():
            raise SpecError("noise: expected finite floating-point numbers")
        return np.ascontiguousarray(given, dtype=np.float32)

    def _guided(
        self, free: PassInput, observation: Observation, previous: Chunk, guidance: Guidance
    ) -> PassInput:
        """Pull a free pass towards the running chunk, as far as that one still reaches."""
        spec = self._spec
        rows, n_real = shift_rows(previous, observation.t_observed_ns, spec.period_ns, spec.n_rows)
        if n_real == 0:
            return free
        prefix = actions_to_network(rows, observation.state, spec)
        limited = guidance.within(n_real)
        first, x = warm_start_step(guidance, self._sigmas), free.x
        if first > 0:
            sigma = np.float32(self._sigmas[first])
            x = (1 - sigma) * prefix + sigma * x
        return dataclasses.replace(
            free,
            x=x,
            prefix_norm=prefix,
            prefix_gain=prefix_gain(limited, self._sigmas, spec.n_rows),
            first_step=first,
        )

    def predict_from_canvas(
        self, canvas: ImageArray, state: FloatArray, noise: Float32Array
    ) -> tuple[Float32Array, FloatArray]:
        """Return latent and absolute actions (H, D) for a composed canvas; rad and m."""
        t_start = time.monotonic_ns()
        state_norm = normalise_state(state, self._spec)
        n_steps = self._spec.sampler.n_steps
        given = free_input(canvas, state_norm, self._noise(noise), n_steps)
        preprocess_ns = time.monotonic_ns() - t_start
        answer = self._pass(self._engine, given)
        t_post = time.monotonic_ns()
        actions = actions_from_network(answer.x, state, self._spec)
        self._note_times(answer, preprocess_ns, time.monotonic_ns() - t_post)
        return answer.latent, actions

    def check_golden(self) -> None:
        """Run the bundle's golden input on this machine and compare.

        Raises:
            BuildError: an action differs by more than the recorded tolerance.
        """
        golden = self.bundle.manifest.golden
        arrays = self.bundle.arrays(golden.file)
        self._engine.set_prompt(golden.task)
        try:
            _, actions = self.predict_from_canvas(
                arrays["canvas"], np.asarray(arrays["state"], np.float64), arrays["noise"]
            )
        finally:
            self._engine.set_prompt(self.task)
        # NaN compares false with everything, so it counts as infinitely far off.
        error = np.nan_to_num(np.abs(actions - arrays["actions"]), nan=np.inf)
        if error.max() > golden.tolerance:
            row, channel = np.unravel_index(int(np.argmax(error)), error.shape)
            name = self._spec.channels[channel]
            raise BuildError(
                f"{self.bundle.root}: this engine does not reproduce the golden output: "
                f"{name.name} row {row} is off by {error.max():.3g} {name.unit}, allowed "
                f"{golden.tolerance:.3g}; do not run it on a robot"
            )

    def close(self) -> None:
        """Free the engine; safe to call twice."""
        self._engine.close()


def load(
    path: Path | str,
    *,
    engine: str = "ort",
    task: str | None = None,
    threads: int | None = None,
    provider: str = "cpu",
    weights: str = "packed",
    seed: int | None = None,
    check_golden: bool = True,
    progress: Callable[[str, int, int], None] | None = None,
) -> BundlePolicy:
    """Load a bundle on this machine.

    Args:
        path: bundle folder.
        engine: ``ort``, or ``trt`` where engines were built.
        task: prompt to follow; None takes the bundle's first.
        threads: CPU threads of the engine.
        provider: ``cpu`` or ``cuda``, for ``ort``.
        weights: ``packed`` or ``mapped``, for ``ort`` on the CPU.
        seed: of the noise.
        check_golden: run the self-test first; switch off only to look at a bundle.
        progress: called with what is done, bytes done and bytes in all.

    Raises:
        SpecError: the bundle or an option does not fit.
        BuildError: the engine does not reproduce the golden output.
        PerformanceIssue: the provider is not there.
    """
    bundle = Bundle.open(path, progress=progress)
    calibration = bundle.manifest.calibration
    if calibration is not None and calibration.is_synthetic:
        logger.warning("%s: calibrated on SYNTHETIC data; not for a robot", path)
    policy = BundlePolicy(
        bundle,
        create_engine(engine, bundle, provider=provider, threads=threads, weights=weights),
        task=task,
        seed=seed,
    )
    if check_golden:
        try:
            policy.check_golden()
        except BaseException:
            policy.close()
            raise
    return policy
