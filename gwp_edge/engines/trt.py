"""TensorRT engine: NVIDIA GPUs, Jetson first. Not yet run on hardware.

One stream, static shapes, every address fixed when the engine is opened. Prefix and prompt K/V
stay on the device. ``chunk`` replays vision, prefill and N Euler steps as one CUDA graph; the
stages of the protocol run one by one, for profiles and checks.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy.typing as npt

from gwp_edge.bundle import Bundle
from gwp_edge.engines.trt_cache import find_engines
from gwp_edge.engines.trt_device import PrimaryContext, cuda_errors
from gwp_edge.engines.trt_graph import CapturedGraph, CudaDriver, Events
from gwp_edge.engines.trt_options import BuildOptions, key_of
from gwp_edge.engines.trt_record import EngineFile
from gwp_edge.engines.trt_stages import LoadedStages
from gwp_edge.errors import DeviceError, GwpError, SpecError
from gwp_edge.manifest import Stage
from gwp_edge.planning.memory import check_free, memory_plan
from gwp_edge.types import Float32Array, ImageArray

logger = logging.getLogger(__name__)


class TrtEngine:
    """Runs a bundle's TensorRT engines. Threads: one owner, the one that opened it.

    ``folder`` is where they are.

    Args:
        bundle: a checked bundle whose engines were built on this device.
        built: folder of the engines to use and what is known about each; None finds those that
            fit.
        options: what the engines must have been built with; None takes the newest that fit.

    Raises:
        PerformanceIssue: no engines, no TensorRT, PyCUDA or CUDA graphs here; says what to do.
        BuildError: engines of another device, version, graph or flag; says what differs.
        DeviceError: the GPU fails.
    """

    def __init__(
        self,
        bundle: Bundle,
        *,
        built: tuple[Path, Mapping[Stage, EngineFile]] | None = None,
        options: BuildOptions | None = None,
    ) -> None:
        self._bundle, self._spec = bundle, bundle.spec
        self._n_steps = bundle.spec.sampler.n_steps
        self._task: str | None = None
        self._failed: str | None = None
        self._laps_ns: tuple[int, ...] = ()
        self._graphs: dict[int, CapturedGraph] = {}
        self._stages: LoadedStages | None = None
        self._events: Events | None = None
        self._context = PrimaryContext()
        try:
            self._open(built, options)
        except BaseException:
            self.close()
            raise

    def _open(
        self,
        built: tuple[Path, Mapping[Stage, EngineFile]] | None,
        options: BuildOptions | None,
    ) -> None:
        facts = self._context.facts()
        files: Mapping[Stage, EngineFile]
        if built is None:
            key = key_of(self._bundle, facts, options or BuildOptions())
            folder, record = find_engines(self._bundle, key, any_flags=options is None)
            files = record.files
        else:
            folder, files = built
        plan = memory_plan(self._bundle.manifest).built(
            {stage: entry.n_bytes for stage, entry in files.items()},
            max(entry.scratch_bytes for entry in files.values()),
        )
        check_free(
            "loading the engines",
            plan.load_bytes if facts.integrated else plan.run_bytes,
            self._context.free_bytes(facts),
            "close other programs, or export with a smaller --precision",
        )
        self._stream = self._context.stream()
        self._driver = CudaDriver()
        # Before vision, after it, after prefill, and after each step.
        self._events = Events(self._driver, self._n_steps + 3)
        self.folder = folder
        self._stages = LoadedStages(
            self._bundle, folder, stream=self._stream, integrated=facts.integrated
        )

    # -- protocol ----------------------------------------------------------------------------

    def set_prompt(self, task: str) -> None:
        """Make the prompt K/V of ``task`` resident."""
        if task != self._task:
            stages = self._ready()
            with self._watch("the upload of a prompt"):
                stages.upload_prompt(task)
            self._task = task

    def vision(self, canvas: ImageArray) -> Float32Array:
        """Encode a canvas, uint8 RGB (h, w, 3), into a normalised latent (1, C, h/16, w/16)."""
        stages = self._ready()
        stages.buffers.put("canvas", canvas)
        with self._watch("vision"):
            stages.buffers.send("canvas")
            stages.enqueue("vision")
            stages.buffers.fetch("latent")
            self._stream.synchronize()
        latent: Float32Array = stages.buffers.host("latent").copy()
        return latent

    def prefill(self, latent: Float32Array, state_norm: Float32Array) -> None:
        """Compute the prefix K/V from a latent and a normalised, padded state (1, A)."""
        stages = self._with_prompt()
        stages.buffers.put("latent", latent)
        stages.buffers.put("state", state_norm)
        with self._watch("prefill"):
            stages.buffers.send("latent")
            stages.buffers.send("state")
            stages.enqueue("prefill")
            self._stream.synchronize()

    def denoise(
        self,
        x: Float32Array,
        step_idx: int,
        prefix_norm: Float32Array,
        prefix_gain: Float32Array,
    ) -> Float32Array:
        """Take one Euler step from ``x`` (H, A) at ``step_idx``; return the next x (H, A)."""
        self._check_step(step_idx)
        stages = self._with_prompt()
        stages.buffers.put("x", x)
        stages.buffers.put("prefix_norm", prefix_norm)
        stages.put_gain(step_idx, prefix_gain)
        with self._watch("denoise"):
            for name in ("x", "prefix_norm", "prefix_gains"):
                stages.buffers.send(name)
            stages.step(step_idx, stages.buffers.address("x"), stages.buffers.address("x_next"))
            stages.buffers.fetch("x_next")
            self._stream.synchronize()
        x_next: Float32Array = stages.buffers.host("x_next").copy()
        return x_next

    def prefix(self) -> dict[str, npt.NDArray[Any]]:
        """Return copies of the prefix K/V that the last ``prefill`` left, by name."""
        stages = self._ready()
        with self._watch("the download of the prefix"):
            return stages.prefix()

    # -- a chunk as one graph ----------------------------------------------------------------

    def chunk(
        self,
        canvas: ImageArray,
        state_norm: Float32Array,
        x: Float32Array,
        prefix_norm: Float32Array,
        prefix_gain: Float32Array,
        *,
        first_step: int = 0,
    ) -> tuple[Float32Array, Float32Array]:
        """Run vision, prefill and the steps from ``first_step`` on.

        The first call with a ``first_step`` runs the work plainly, which settles what TensorRT
        allocates late, and captures it; later calls replay the graph. A policy therefore asks for
        one chunk before the motors are enabled.

        Args:
            canvas: uint8 RGB (h, w, 3).
            state_norm: normalised, padded state (1, A).
            x: noisy actions at sigma[first_step], (H, A).
            prefix_norm: actions of the running chunk, normalised, (H, A).
            prefix_gain: pull towards it for each step, (N, H, 1).
            first_step: 0 to N-1; above 0 for a warm start.

        Returns:
            the last x (H, A), and the latent (1, C, h/16, w/16) for records.
        """
        self._check_step(first_step)
        stages = self._with_prompt()
        if prefix_gain.shape != (self._n_steps, self._spec.n_rows, 1):
            raise SpecError(
                f"prefix_gain: expected {(self._n_steps, self._spec.n_rows, 1)}, got "
                f"{prefix_gain.shape}"
            )
        stages.buffers.put("canvas", canvas)
        stages.buffers.put("state", state_norm)
        stages.buffers.put("x", x)
        stages.buffers.put("prefix_norm", prefix_norm)
        for step_idx in range(self._n_steps):
            stages.put_gain(step_idx, prefix_gain[step_idx])
        with self._watch("a chunk"):
            self._run_chunk(stages, first_step)
            self._stream.synchronize()
            if self._events is not None:
                self._laps_ns = self._events.laps_ns(3 + self._n_steps - first_step)
        x_last: Float32Array = stages.buffers.host("x_next").copy()
        latent: Float32Array = stages.buffers.host("latent").copy()
        return x_last, latent

    @property
    def chunk_laps_ns(self) -> tuple[int, ...]:
        """Times of vision, prefill and each step of the last ``chunk``, by the GPU's clock."""
        return self._laps_ns

    def _run_chunk(self, stages: LoadedStages, first_step: int) -> None:
        handle = self._stream.handle
        graph = self._graphs.get(first_step)
        if graph is not None:
            graph.launch(handle)
            return
        self._enqueue_chunk(stages, first_step, captured=False)
        self._stream.synchronize()
        enqueue = functools.partial(self._enqueue_chunk, stages, first_step, captured=True)
        self._graphs[first_step] = CapturedGraph(self._driver, handle, enqueue)
        # The marks now belong to the graph, so only a replay gives them times.
        self._graphs[first_step].launch(handle)

    def _enqueue_chunk(self, stages: LoadedStages, first_step: int, *, captured: bool) -> None:
        buffers, n_marks = stages.buffers, 0

        def mark() -> None:
            nonlocal n_marks
            if self._events is not None:
                self._events.record(n_marks, self._stream.handle, captured=captured)
                n_marks += 1

        for name in ("canvas", "state", "x", "prefix_norm", "prefix_gains"):
            buffers.send(name)
        mark()
        stages.enqueue("vision")
        mark()
        stages.enqueue("prefill")
        mark()
        source = buffers.address("x")
        for step_idx in range(first_step, self._n_steps):
            last = step_idx == self._n_steps - 1
            target = buffers.address("x_next") if last else stages.swap(step_idx)
            stages.step(step_idx, source, target)
            source = target
            mark()
        buffers.fetch("x_next")
        buffers.fetch("latent")

    # -- state -------------------------------------------------------------------------------

    def _check_step(self, step_idx: int) -> None:
        if not 0 <= step_idx < self._n_steps:
            raise SpecError(f"step {step_idx} is not in 0..{self._n_steps - 1}")

    def _ready(self) -> LoadedStages:
        if self._failed is not None:
            raise DeviceError(f"the GPU failed before ({self._failed}); restart gwp-edge")
        if self._stages is None:
            raise DeviceError("the engine is closed")
        return self._stages

    def _with_prompt(self) -> LoadedStages:
        stages = self._ready()
        if self._task is None:
            raise SpecError("no prompt is set; call set_prompt first")
        return stages

    @contextmanager
    def _watch(self, what: str) -> Iterator[None]:
        """Turn failures of CUDA into DeviceError, after which nothing is answered any more."""
        try:
            with cuda_errors(f"running {what}"):
                yield
        except DeviceError as e:
            self._failed = str(e)
            raise

    def close(self) -> None:
        """Free the device; safe to call twice, and after a failure.

        Graphs go before the contexts that they call, those before their engines, memory last.
        """
        for graph in self._graphs.values():
            _quietly(graph.close)
        self._graphs.clear()
        if self._events is not None:
            _quietly(self._events.close)
            self._events = None
        if self._stages is not None:
            _quietly(self._stages.close)
            self._stages = None
        # PyCUDA destroys a stream in its context, which must still be there then.
        if hasattr(self, "_stream"):
            del self._stream
        _quietly(self._context.close)


def _quietly(free: Callable[[], None]) -> None:
    try:
        free()
    except GwpError as e:
        # A dead context cannot free anything; the process's end does.
        logger.warning("while closing the engine: %s", e)


def open_engine(
    bundle: Bundle,
    *,
    provider: str = "cpu",
    threads: int | None = None,
    weights: str = "packed",
) -> TrtEngine:
    """Open the engines that fit, for ``create_engine``.

    Raises:
        SpecError: an option was given that is for ONNX Runtime.
    """
    del provider  # its default names the processor, which means nothing here
    if threads is not None or weights != "packed":
        raise SpecError("--threads and --weights are for --engine ort; leave them away")
    return TrtEngine(bundle)
