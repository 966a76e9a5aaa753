"""Random policies of any size, and the eager unreduced network timed beside the engine."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch

from gwp_edge.bench import ChunkInput, EagerReport, Times
from gwp_edge.bundle import Bundle
from gwp_edge.errors import SpecError
from gwp_edge.export.pipeline import ExportOptions, export_bundle
from gwp_edge.export.precision import FLOAT_FORMATS, QUANTIZED_FORMATS, make_recipe
from gwp_edge.export.prompts import read_prompt_embedding
from gwp_edge.export.synthetic import SIZES, checkpoint_bytes, write_checkpoint
from gwp_edge.export.unreduced import UnreducedNetwork
from gwp_edge.export.unreduced_serving import WanVae, load_network, load_vae, pad_prompt
from gwp_edge.manifest import MANIFEST
from gwp_edge.sampler import make_schedule
from gwp_edge.spec import PolicySpec
from gwp_edge.types import Float32Array

Progress = Callable[[str, int, int], None]
Dtype = Literal["float32", "float16", "bfloat16"]

_SEED = 0


def _silent(stage: str, done: int, total: int) -> None:
    del stage, done, total


def make_checkpoint(
    folder: Path, size: str, *, dtype: Dtype = "bfloat16", progress: Progress = _silent
) -> Path:
    """Write a random checkpoint of a named size with its companions; return its folder.

    Raises:
        SpecError: there is no such size, or ``folder`` cannot take it.
    """
    _require_size(size)
    vae: Literal["small", "full"] = "small" if size.endswith("tiny") else "full"
    total, done = checkpoint_bytes(SIZES[size], dtype=dtype, vae=vae), 0

    def advance(n_bytes: int) -> None:
        nonlocal done
        done += n_bytes
        progress("random checkpoint", done, total)

    return write_checkpoint(folder, SIZES[size], dtype=dtype, seed=_SEED, vae=vae, progress=advance)


def _require_size(size: str) -> None:
    if size not in SIZES:
        raise SpecError(f"--size {size} is not known; choose from {', '.join(SIZES)}")


def make_random_bundle(
    folder: Path, size: str, *, precision: str, n_steps: int, progress: Progress = _silent
) -> Bundle:
    """Return the bundle of a random checkpoint; what ``folder`` holds already is used again.

    Args:
        folder: gets ``SIZE/`` (the checkpoint) and ``SIZE-PRECISION-STEPS.gwp``.
        size: one of the named sizes.
        precision: of the bundle.
        n_steps: denoising steps.
        progress: called with what is done, bytes done and bytes in all.

    Raises:
        SpecError: size, precision or steps are not known, or random weights cannot have them.
    """
    # All of it before gigabytes of weights are made; an export would refuse it after that.
    _require_size(size)
    make_recipe(precision)
    make_schedule(n_steps)
    root, out = folder / size, folder / f"{size}-{precision}-{n_steps}.gwp"
    if (out / MANIFEST).is_file():
        return Bundle.open(out)
    if precision in QUANTIZED_FORMATS:
        raise SpecError(
            f"--precision {precision}: random weights have no episodes to be quantized on; choose "
            f"{', '.join(FLOAT_FORMATS)}, or time an exported bundle by --bundle"
        )
    if not (root / "checkpoint").is_dir():
        make_checkpoint(root, size, progress=progress)
    options = ExportOptions(
        checkpoint=root / "checkpoint",
        out=out,
        precision=precision,
        n_steps=n_steps,
        engine_check="never",
    )
    export_bundle(options, progress)
    return Bundle.open(out)


@dataclass(kw_only=True)
class EagerPolicy:
    """The whole network and VAE in float32, as upstream serves them. Threads: one owner."""

    network: UnreducedNetwork
    vae: WanVae
    prompt: torch.Tensor

    @classmethod
    def load(cls, root: Path) -> EagerPolicy:
        """Load a checkpoint that :func:`make_checkpoint` wrote."""
        network, vae = load_network(root / "checkpoint"), load_vae(root / "base_model" / "vae")
        # 0.55 B parameters that encoding never touches.
        cast("Any", vae.model).decoder = None
        (path,) = sorted((root / "t5_embedding").iterdir())
        rows = read_prompt_embedding(path, text_dim=network.sizes.text_dim)
        return cls(network=network, vae=vae, prompt=pad_prompt(torch.from_numpy(rows)))

    def run(
        self, spec: PolicySpec, given: ChunkInput, n_steps: int | None = None
    ) -> tuple[Float32Array, dict[str, list[int]]]:
        """Return normalised actions (H, A) and the time of every pass, ns.

        Args:
            spec: schedule and embodiment.
            given: what the chunk starts from.
            n_steps: stop after as many steps; None for all.
        """
        with torch.inference_mode():
            return self._run(spec, given, n_steps)

    def _run(
        self, spec: PolicySpec, given: ChunkInput, n_steps: int | None
    ) -> tuple[Float32Array, dict[str, list[int]]]:
        laps: dict[str, list[int]] = {}

        def timed(stage: str, work: Callable[[], Any]) -> Any:  # noqa: ANN401 - passed through
            t_start = time.perf_counter_ns()
            result = work()
            laps.setdefault(stage, []).append(time.perf_counter_ns() - t_start)
            return result

        network, prompt, embodiment = self.network, self.prompt, spec.embodiment
        canvas = torch.from_numpy(given.canvas)[None, None]
        state = torch.from_numpy(given.state_norm)[None]
        x = torch.from_numpy(given.noise)[None]
        latent = timed("vision", lambda: self.vae.encode(canvas))
        past = None
        if network.two_streams:
            past = timed(
                "prefix",
                lambda: network.prefix(state, latent, prompt, embodiment=embodiment),
            )
        sigmas = spec.sampler.sigmas
        for i, t in enumerate(spec.sampler.timesteps[:n_steps]):
            timestep = torch.tensor([t])

            def step(x: torch.Tensor = x, timestep: torch.Tensor = timestep) -> torch.Tensor:
                if past is not None:
                    return network.cached_step(x, timestep, prompt, past, embodiment=embodiment)
                velocity: torch.Tensor = network(
                    state=state,
                    reference=latent,
                    actions=x,
                    action_timestep=timestep,
                    prompt=prompt,
                    embodiment=embodiment,
                )[0]
                return velocity

            x = x + (sigmas[i + 1] - sigmas[i]) * timed("denoise", step)
        actions: Float32Array = x[0].numpy()
        return actions, laps


@contextmanager
def _torch_threads(threads: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def time_eager(
    policy: EagerPolicy,
    spec: PolicySpec,
    given: ChunkInput,
    *,
    threads: int,
    repeats: int,
    engine_p50_ms: float,
    engine_actions: Float32Array,
    progress: Progress = _silent,
) -> EagerReport:
    """Time the unreduced network and set the engine beside it.

    Args:
        policy: the network.
        spec: of the engine's bundle.
        given: the input of every chunk.
        threads: CPU threads.
        repeats: measured chunks; before them vision, prefix and one step run once.
        engine_p50_ms: what the engine took for a chunk.
        engine_actions: what the engine answered to ``given``, (H, A).
        progress: called with what is done, how many, of how many.

    Raises:
        SpecError: ``repeats`` is not positive.
    """
    if repeats < 1:
        raise SpecError(f"eager repeats must be at least 1, got {repeats}")
    stages: dict[str, list[int]] = {}
    chunks: list[int] = []
    actions = engine_actions
    with _torch_threads(threads):
        progress("eager baseline", 0, repeats)
        policy.run(spec, given, n_steps=1)
        for i in range(repeats):
            actions, laps = policy.run(spec, given)
            for stage, times in laps.items():
                stages.setdefault(stage, []).extend(times)
            chunks.append(sum(map(sum, laps.values())))
            progress("eager baseline", i + 1, repeats)
    chunk = Times.of(chunks)
    scale = float(np.abs(actions).max())
    return EagerReport(
        stages={stage: Times.of(times) for stage, times in stages.items()},
        chunk=chunk,
        ratio=engine_p50_ms / chunk.p50_ms,
        largest_difference=float(np.abs(engine_actions - actions).max()) / scale,
    )
