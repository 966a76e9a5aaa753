"""``gwp-edge infer``: one chunk, offline."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from gwp_edge.commands.options import (
    BundleArgument,
    EngineOption,
    JsonFlag,
    ProviderOption,
    TaskOption,
    ThreadsOption,
)
from gwp_edge.console import progress_bars, say, say_json, write_file
from gwp_edge.resident import Resident, read_resident


def infer(
    bundle: BundleArgument,
    observation: Annotated[
        Path,
        typer.Option("--observation", help=".npz: one uint8 RGB array per camera, and state."),
    ],
    noise: Annotated[
        Path | None, typer.Option("--noise", help=".npy of shape (H, A); drawn otherwise.")
    ] = None,
    out: Annotated[
        Path, typer.Option("--out", help="Absolute actions (H, D), float32, rad and m.")
    ] = Path("actions.npy"),
    task: TaskOption = None,
    engine: EngineOption = "ort",
    provider: ProviderOption = "cpu",
    threads: ThreadsOption = None,
    weights: Annotated[
        str, typer.Option("--weights", help="For ort on a CPU: packed (fast) or mapped.")
    ] = "packed",
    seed: Annotated[int | None, typer.Option("--seed", min=0, help="Of the noise.")] = None,
    as_json: JsonFlag = False,
) -> None:
    """Answer one observation with one chunk; --json says what memory that took beside the weights.

    Example: gwp-edge infer policy.gwp --observation obs.npz --out actions.npy
    """
    import numpy as np

    from gwp_edge.manifest import read_spec
    from gwp_edge.observation_file import load_noise, load_observation
    from gwp_edge.policy import load

    # Bad input is told before the weights are read.
    spec = read_spec(bundle)
    given = load_observation(observation, spec)
    start = None if noise is None else load_noise(noise, spec)
    memory = [read_resident()]
    with progress_bars() as bars:
        policy = load(
            bundle,
            engine=engine,
            task=task,
            threads=threads,
            provider=provider,
            weights=weights,
            seed=seed,
            progress=bars,
        )
    try:
        memory.append(read_resident())
        chunk = policy.predict(given, noise=start)
        timing = policy.timing
        memory.append(read_resident())
    finally:
        policy.close()
    actions = np.asarray(chunk.actions, dtype=np.float32)
    write_file(out, lambda file: np.save(file, actions))
    stages = {
        "preprocess": timing.preprocess_ns,
        "vision": timing.vision_ns,
        "prefill": timing.prefill_ns,
        "denoise": sum(timing.denoise_ns),
        "postprocess": timing.postprocess_ns,
    }
    if as_json:
        weights_file = policy.bundle.file(policy.bundle.manifest.weights)
        say_json(
            {
                "out": str(out),
                "task": policy.task,
                "shape": list(actions.shape),
                "channels": [c.name for c in policy.spec.channels],
                "stages_ms": {name: t_ns / 1e6 for name, t_ns in stages.items()},
                "total_ms": timing.total_ns / 1e6,
                "memory": memory_report(weights_file.stat().st_size, *memory),
            }
        )
        return
    parts = ", ".join(f"{name} {t_ns / 1e6:.1f}" for name, t_ns in stages.items())
    say(f"{out}: {actions.shape[0]} rows of {actions.shape[1]} channels, rad and m")
    say(f"first call {timing.total_ns / 1e6:.1f} ms ({parts})")


def memory_report(
    weight_bytes: int, before: Resident | None, loaded: Resident | None, after: Resident | None
) -> dict[str, float | None]:
    """Return resident memory beside the weights; None where this system does not tell it.

    Args:
        weight_bytes: size of the bundle's weight file.
        before: before the policy was loaded: the interpreter and its libraries.
        loaded: with the policy loaded and its self-test run.
        after: with one chunk answered.
    """
    return {
        "weights_bytes": weight_bytes,
        "before_bytes": before.now_bytes if before else None,
        "loaded_bytes": loaded.now_bytes if loaded else None,
        "after_chunk_bytes": after.now_bytes if after else None,
        "peak_bytes": after.peak_bytes if after else None,
        "resident_over_weights": after.now_bytes / weight_bytes if after else None,
    }
