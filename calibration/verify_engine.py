"""The bundle's side of a verification: its answers to dataset samples, on its engine."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from gwp_edge.bundle import Bundle
from gwp_edge.calibration.verify_frames import Prompt, noise_of, observation_of
from gwp_edge.calibration.verify_schema import Check
from gwp_edge.engines import create_engine
from gwp_edge.errors import BuildError
from gwp_edge.lerobot.dataset import LeRobotDataset
from gwp_edge.policy import BundlePolicy
from gwp_edge.preprocess import compose_canvas
from gwp_edge.spec import CanvasSpec
from gwp_edge.types import Float32Array, FloatArray, ImageArray

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, kw_only=True)
class EngineChoice:
    """Which engine runs the bundle, and how.

    Attributes:
        name: of the engine.
        provider: for ``ort``.
        threads: CPU threads of the engine, and of torch for the reference; None leaves the
            number to them.
    """

    name: str = "ort"
    provider: str = "cpu"
    threads: int | None = None


@dataclass(frozen=True, kw_only=True)
class Answer:
    """One sample and what the bundle answered.

    Attributes:
        episode: index in the dataset.
        frame: index in the episode.
        prompt: the bundle's prompt it ran under.
        state: (D,), rad and m.
        noise: (H, A).
        canvas: the picture as the reference is to see it, uint8 (h, w, 3).
        recorded: recorded actions (H, D), rad and m.
        actions: the bundle's actions (H, D), rad and m.
    """

    episode: int
    frame: int
    prompt: Prompt
    state: FloatArray
    noise: Float32Array
    canvas: ImageArray
    recorded: FloatArray
    actions: FloatArray


def run_bundle(
    bundle: Bundle,
    dataset: LeRobotDataset,
    frames: tuple[tuple[int, int], ...],
    prompts: Mapping[int, Prompt],
    canvas: CanvasSpec,
    *,
    seed: int,
    engine: EngineChoice,
    progress: Progress,
) -> tuple[list[Answer], Check]:
    """Answer every sample, one decoded at a time, and try the golden output; frees the engine.

    Args:
        bundle: what runs.
        dataset: where the samples are.
        frames: (episode, frame) pairs, sorted.
        prompts: by episode.
        canvas: how the reference composes the pictures; the bundle composes its own.
        seed: of the noise.
        engine: what it runs on.
        progress: called with stage, done and total.

    Raises:
        BuildError: an answer is not finite.
    """
    stage = f"bundle on {engine.name}"
    runner = create_engine(engine.name, bundle, provider=engine.provider, threads=engine.threads)
    policy, answers = BundlePolicy(bundle, runner), []
    try:
        golden = _golden(policy)
        for i, sample in enumerate(dataset.samples(frames, n_rows=bundle.spec.n_rows)):
            progress(stage, i, len(frames))
            prompt = prompts[sample.episode]
            runner.set_prompt(prompt.task)
            observation = observation_of(sample)
            noise = noise_of(bundle.spec, seed, sample.episode, sample.frame)
            actions = policy.predict(observation, noise=noise).actions
            if not np.isfinite(actions).all():
                raise BuildError(
                    f"{bundle.root}: the answer to episode {sample.episode}, frame {sample.frame} "
                    "is not finite; do not run it on a robot"
                )
            answers.append(
                Answer(
                    episode=sample.episode,
                    frame=sample.frame,
                    prompt=prompt,
                    state=observation.state,
                    noise=noise,
                    canvas=compose_canvas(observation, canvas),
                    recorded=sample.actions.astype(np.float64),
                    actions=actions,
                )
            )
    finally:
        policy.close()
    progress(stage, len(frames), len(frames))
    return answers, golden


def _golden(policy: BundlePolicy) -> Check:
    try:
        policy.check_golden()
    except BuildError as e:
        return Check(name="golden output", passed=False, text=str(e))
    allowed = policy.bundle.manifest.golden.tolerance
    return Check(name="golden output", passed=True, text=f"reproduced within {allowed:.2g}")
