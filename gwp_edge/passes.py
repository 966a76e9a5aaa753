"""One pass from canvas to normalised actions: stage by stage, or whole where the engine can."""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np

from gwp_edge.protocols import ChunkEngine, Engine
from gwp_edge.types import Float32Array, ImageArray


@dataclass(frozen=True, slots=True, kw_only=True)
class PassInput:
    """What a pass starts from.

    Attributes:
        canvas: uint8 RGB, (h, w, 3).
        state_norm: normalised, padded state, (1, A).
        x: noisy actions at sigma[first_step], (H, A).
        prefix_norm: actions of the running chunk, normalised, (H, A).
        prefix_gain: pull towards it for each step, (N, H, 1).
        first_step: 0 to N-1; above 0 for a warm start.
    """

    canvas: ImageArray
    state_norm: Float32Array
    x: Float32Array
    prefix_norm: Float32Array
    prefix_gain: Float32Array
    first_step: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class PassAnswer:
    """What a pass gives.

    Attributes:
        x: normalised actions, (H, A).
        latent: (1, C, h/16, w/16).
        vision_ns: time of the vision stage.
        prefill_ns: time of the prefill stage.
        denoise_ns: time of each step.
        other_ns: what the call took beyond its stages: copies, launch, waiting.
    """

    x: Float32Array
    latent: Float32Array
    vision_ns: int
    prefill_ns: int
    denoise_ns: tuple[int, ...]
    other_ns: int


def free_input(
    canvas: ImageArray, state_norm: Float32Array, noise: Float32Array, n_steps: int
) -> PassInput:
    """Return the input of a pass that no running chunk guides; shapes as in ``PassInput``."""
    return PassInput(
        canvas=canvas,
        state_norm=state_norm,
        x=noise,
        prefix_norm=np.zeros_like(noise),
        prefix_gain=np.zeros((n_steps, len(noise), 1), np.float32),
    )


def run_pass(engine: Engine, given: PassInput) -> PassAnswer:
    """Run a pass the way that the engine runs fastest; its prompt must be set."""
    if isinstance(engine, ChunkEngine):
        return run_whole(engine, given)
    return run_stages(engine, given)


def run_stages(engine: Engine, given: PassInput) -> PassAnswer:
    """Run a pass stage by stage, timed by this machine's clock."""
    laps: list[int] = []
    t_last = time.monotonic_ns()

    def lap() -> None:
        nonlocal t_last
        now = time.monotonic_ns()
        laps.append(now - t_last)
        t_last = now

    latent = engine.vision(given.canvas)
    lap()
    engine.prefill(latent, given.state_norm)
    lap()
    x = given.x
    for step_idx in range(given.first_step, len(given.prefix_gain)):
        x = engine.denoise(x, step_idx, given.prefix_norm, given.prefix_gain[step_idx])
        lap()
    return PassAnswer(
        x=x,
        latent=latent,
        vision_ns=laps[0],
        prefill_ns=laps[1],
        denoise_ns=tuple(laps[2:]),
        other_ns=0,
    )


def run_whole(engine: ChunkEngine, given: PassInput) -> PassAnswer:
    """Run a pass as one call, timed by the device's clock and, around it, by this machine's."""
    t_start = time.monotonic_ns()
    x, latent = engine.chunk(
        given.canvas,
        given.state_norm,
        given.x,
        given.prefix_norm,
        given.prefix_gain,
        first_step=given.first_step,
    )
    total_ns = time.monotonic_ns() - t_start
    vision_ns, prefill_ns, *denoise_ns = engine.chunk_laps_ns
    return PassAnswer(
        x=x,
        latent=latent,
        vision_ns=vision_ns,
        prefill_ns=prefill_ns,
        denoise_ns=tuple(denoise_ns),
        # Two clocks: their rates differ by less than any stage takes, but never below nothing.
        other_ns=max(0, total_ns - sum(engine.chunk_laps_ns)),
    )
