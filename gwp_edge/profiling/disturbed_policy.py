"""An engine and a policy that take longer on purpose, in the policy's own process."""

from __future__ import annotations

import random
import time
from collections.abc import Mapping
from dataclasses import replace

from gwp_edge.bundle import Bundle
from gwp_edge.chunking import Guidance
from gwp_edge.drivers.disturbed import Delay, draw_ms
from gwp_edge.engines import create_engine
from gwp_edge.policy import BundlePolicy, PredictTrace
from gwp_edge.protocols import Engine, Policy
from gwp_edge.spec import PolicySpec
from gwp_edge.telemetry import StageTimes
from gwp_edge.types import Chunk, Float32Array, ImageArray, Observation


class DisturbedEngine:
    """An engine whose stages take longer now and then. Threads: one owner."""

    def __init__(self, inner: Engine, stages: Mapping[str, Delay]) -> None:
        self._inner = inner
        self._stages = stages
        self._random = random.Random(0)

    def _wait(self, stage: str) -> None:
        if stage in self._stages:
            time.sleep(draw_ms(self._stages[stage], self._random) / 1e3)

    def set_prompt(self, task: str) -> None:
        """As the engine's."""
        self._inner.set_prompt(task)

    def vision(self, canvas: ImageArray) -> Float32Array:
        """As the engine's, later."""
        self._wait("vision")
        return self._inner.vision(canvas)

    def prefill(self, latent: Float32Array, state_norm: Float32Array) -> None:
        """As the engine's, later."""
        self._wait("prefill")
        self._inner.prefill(latent, state_norm)

    def denoise(
        self, x: Float32Array, step_idx: int, prefix_norm: Float32Array, prefix_gain: Float32Array
    ) -> Float32Array:
        """As the engine's, later."""
        self._wait("denoise")
        return self._inner.denoise(x, step_idx, prefix_norm, prefix_gain)

    def close(self) -> None:
        """As the engine's."""
        self._inner.close()


class DisturbedPolicy:
    """A policy that takes longer before and after its engine. Threads: one owner."""

    def __init__(self, inner: BundlePolicy, stages: Mapping[str, Delay]) -> None:
        self._inner = inner
        self._stages = stages
        self._random = random.Random(1)
        self._waited_ns = dict.fromkeys(("preprocess", "postprocess"), 0)

    def _wait(self, stage: str) -> None:
        begin_ns = time.monotonic_ns()
        if stage in self._stages:
            time.sleep(draw_ms(self._stages[stage], self._random) / 1e3)
        self._waited_ns[stage] = time.monotonic_ns() - begin_ns

    @property
    def spec(self) -> PolicySpec:
        """As the policy's."""
        return self._inner.spec

    @property
    def timing(self) -> StageTimes:
        """As the policy's, with what was waited."""
        timing = self._inner.timing
        return replace(
            timing,
            preprocess_ns=timing.preprocess_ns + self._waited_ns["preprocess"],
            postprocess_ns=timing.postprocess_ns + self._waited_ns["postprocess"],
        )

    @property
    def trace(self) -> PredictTrace | None:
        """As the policy's."""
        return self._inner.trace

    def predict(
        self,
        observation: Observation,
        *,
        noise: Float32Array | None = None,
        previous: Chunk | None = None,
        guidance: Guidance | None = None,
    ) -> Chunk:
        """As the policy's, later."""
        self._wait("preprocess")
        chunk = self._inner.predict(observation, noise=noise, previous=previous, guidance=guidance)
        self._wait("postprocess")
        return chunk

    def check_golden(self) -> None:
        """As the policy's."""
        self._inner.check_golden()

    def close(self) -> None:
        """As the policy's."""
        self._inner.close()


def create_policy(
    *,
    path: str,
    stages: Mapping[str, Delay],
    engine: str = "ort",
    task: str | None = None,
    threads: int | None = None,
    provider: str = "cpu",
    seed: int | None = None,
    check_golden: bool = False,
) -> Policy:
    """Load a bundle as ``gwp_edge.policy:load`` does; disturbed where ``stages`` says so."""
    bundle = Bundle.open(path)
    inner = create_engine(engine, bundle, provider=provider, threads=threads, weights="packed")
    # Around it an engine that runs a chunk as one call would have to run it stage by stage.
    if any(stage in stages for stage in ("vision", "prefill", "denoise")):
        inner = DisturbedEngine(inner, stages)
    made = BundlePolicy(bundle, inner, task=task, seed=seed)
    outside = any(stage in stages for stage in ("preprocess", "postprocess"))
    policy: Policy = DisturbedPolicy(made, stages) if outside else made
    if check_golden:
        try:
            policy.check_golden()
        except BaseException:
            policy.close()
            raise
    return policy
