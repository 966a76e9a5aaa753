"""The three engines of a bundle on a device: their memory, tables and launches.

Not yet run on hardware.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import numpy.typing as npt

from gwp_edge.bundle import Bundle
from gwp_edge.engines.trt_buffers import Buffers, dtype_of
from gwp_edge.engines.trt_cache import engine_file
from gwp_edge.engines.trt_device import cuda_errors, last_error, require_tensorrt, shared_logger
from gwp_edge.errors import BuildError, DeviceError, SpecError
from gwp_edge.manifest import STAGES, Stage
from gwp_edge.types import Float32Array

if TYPE_CHECKING:
    import pycuda.driver as drv
    import tensorrt as trt

# Tensors that the host writes or reads; all others stay on the device.
_CROSSING: Final = frozenset({"canvas", "latent", "state", "x", "x_next", "prefix_norm"})
# One row for each step: of a table, or written anew for each chunk.
_STEPPED: Final = ("sigma", "sigma_step", "modulation", "prefix_gain")


class LoadedStages:
    """Engines with every address fixed. Threads: one owner, with its context current.

    Args:
        bundle: a checked bundle.
        folder: engines that fit it.
        stream: on which everything is launched.
        integrated: the GPU shares the processor's memory.

    Raises:
        BuildError: an engine cannot be loaded or has other tensors than expected.
        DeviceError: the GPU fails.
    """

    def __init__(
        self, bundle: Bundle, folder: Path, *, stream: drv.Stream, integrated: bool
    ) -> None:
        require_tensorrt()
        import tensorrt

        self._bundle, self._spec = bundle, bundle.spec
        self._n_steps = bundle.spec.sampler.n_steps
        self._stream = stream
        self._trt_logger = shared_logger()
        self._runtime: trt.Runtime = tensorrt.Runtime(self._trt_logger)
        self._contexts: dict[Stage, trt.IExecutionContext] = {}
        self._engines: dict[Stage, trt.ICudaEngine] = {}
        # A captured graph must not see its context changed, so that each step has one of its own.
        self._denoisers: dict[tuple[int, int, int], trt.IExecutionContext] = {}
        self._denoise_addresses: dict[str, int] = {}
        self._fixed: dict[str, int] = {}
        self._prompt: dict[str, tuple[tuple[int, ...], np.dtype[Any]]] = {}
        self._prefix: dict[str, tuple[tuple[int, ...], np.dtype[Any]]] = {}
        self.buffers = Buffers(integrated=integrated, stream=stream)
        try:
            for stage in STAGES:
                self._load(stage, engine_file(folder, stage))
            self._make_contexts()
            self._make_tables()
            self._bind_all()
        except BaseException:
            self.close()
            raise

    def _load(self, stage: Stage, path: Path) -> None:
        # Mapped, so that the plan's pages can be dropped while the engine is made from them.
        plan = np.memmap(path, np.uint8, mode="r")
        engine = self._runtime.deserialize_cuda_engine(plan)
        if engine is None:
            raise BuildError(
                f"{path}: TensorRT cannot load it: {last_error(self._trt_logger)}; build again"
            )
        self._engines[stage] = engine

    def _make_contexts(self) -> None:
        """Make the contexts on one scratch memory: stages follow each other on one stream."""
        n_bytes = max(engine.device_memory_size_v2 for engine in self._engines.values())
        self._scratch = (self.buffers.device(max(n_bytes, 1)), n_bytes)
        for stage in self._engines:
            if stage != "denoise":
                self._contexts[stage] = self._make_context(stage)

    def _make_context(self, stage: Stage) -> trt.IExecutionContext:
        import tensorrt

        strategy = tensorrt.ExecutionContextAllocationStrategy.USER_MANAGED
        with cuda_errors(f"making a {stage} context"):
            context = self._engines[stage].create_execution_context(strategy)
        if context is None:
            raise DeviceError(
                f"{stage}: no execution context: {last_error(self._trt_logger)}; free memory"
            )
        context.set_device_memory(*self._scratch)
        return context

    def _make_tables(self) -> None:
        """Put everything that follows from the step alone on the device, once."""
        buffers = self.buffers
        modulation = self._bundle.arrays(self._bundle.manifest.tables)["modulation"]
        sigmas = np.asarray(self._spec.sampler.sigmas, np.float32)
        if len(modulation) != self._n_steps:
            raise SpecError(
                f"{self._bundle.root}: modulation has {len(modulation)} steps, the spec "
                f"{self._n_steps}; export the policy again"
            )
        self._steps: dict[str, tuple[int, ...]] = {
            "sigma": buffers.table(sigmas[:-1]),
            "sigma_step": buffers.table(np.diff(sigmas)),
            "modulation": buffers.table(np.asarray(modulation, np.float32)),
        }
        # Rows of the gain are written for each chunk, so they cross; one tensor for all steps.
        n_rows = self._spec.n_rows
        stride = -(-n_rows * 4 // 256) * 64
        gains = buffers.crossing("prefix_gains", (self._n_steps, stride), np.float32)
        self._row_bytes = {
            "sigma": 4,
            "sigma_step": 4,
            "modulation": modulation[0].size * 4,
            "prefix_gain": n_rows * 4,
        }
        self._steps["prefix_gain"] = tuple(
            gains.address + 4 * stride * i for i in range(self._n_steps)
        )

    def _bind_all(self) -> None:
        """Give every tensor of every engine its address; one name is one memory."""
        buffers = self.buffers
        import tensorrt

        for stage, engine in self._engines.items():
            for index in range(engine.num_io_tensors):
                name = engine.get_tensor_name(index)
                if engine.get_tensor_mode(name) == tensorrt.TensorIOMode.NONE:
                    continue
                shape = tuple(int(side) for side in engine.get_tensor_shape(name))
                dtype = dtype_of(engine.get_tensor_dtype(name).name, name)
                if name in _STEPPED:
                    self._check_row(name, shape, dtype)
                    continue
                address = self._place(buffers, name, shape, dtype)
                if stage == "denoise":
                    self._denoise_addresses[name] = address
                else:
                    self._bind(self._contexts[stage], stage, name, address)
        # The second half of the pair that denoising steps swap between them.
        x = buffers.host("x")
        self._swap = (buffers.device(x.nbytes), buffers.device(x.nbytes))

    def _place(
        self, buffers: Buffers, name: str, shape: tuple[int, ...], dtype: np.dtype[Any]
    ) -> int:
        if min(shape, default=1) <= 0:
            raise BuildError(f"engine tensor {name} has shape {shape}; it must be static")
        if name in _CROSSING:
            return buffers.crossing(name, shape, dtype).address
        if name not in self._fixed:
            self._fixed[name] = buffers.device(math.prod(shape) * dtype.itemsize)
        if name.startswith("prompt_"):
            self._prompt[name] = (shape, dtype)
        elif name.startswith("prefix_"):
            self._prefix[name] = (shape, dtype)
        return self._fixed[name]

    def _check_row(self, name: str, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
        """Check that an engine reads of a table what a row of it holds."""
        n_bytes = math.prod(shape) * dtype.itemsize
        if dtype != np.float32 or n_bytes != self._row_bytes[name]:
            raise BuildError(
                f"engine tensor {name} is {dtype} {shape}, its rows are float32 of "
                f"{self._row_bytes[name]} bytes; export the policy again"
            )

    def _bind(self, context: trt.IExecutionContext, stage: Stage, name: str, address: int) -> None:
        if not context.set_tensor_address(name, address):
            raise DeviceError(
                f"{stage}: TensorRT refuses the address of {name}: {last_error(self._trt_logger)}"
            )

    def upload_prompt(self, task: str) -> None:
        """Make the prompt K/V of ``task`` resident.

        Raises:
            SpecError: the bundle has no such task, or its prompt does not fit the engines.
        """
        prompts = self._bundle.manifest.prompts
        if task not in prompts:
            known = ", ".join(repr(name) for name in prompts)
            raise SpecError(f"--task {task!r} is not in this bundle; it has {known}")
        arrays = self._bundle.arrays(prompts[task])
        # All are checked before the first is sent: half of one prompt is not an answer.
        for name, (shape, dtype) in self._prompt.items():
            array = arrays.get(name)
            if array is None or array.shape != shape or array.dtype != dtype:
                got = "nothing" if array is None else f"{array.dtype} {array.shape}"
                raise SpecError(
                    f"{prompts[task]}: {name} is {got}, expected {dtype} {shape}; "
                    "export the policy again"
                )
        for name in self._prompt:
            self.buffers.upload(arrays[name], self._fixed[name])

    def prefix(self) -> dict[str, npt.NDArray[Any]]:
        """Return copies of the prefix K/V, by name; the stream must be done."""
        return {
            name: self.buffers.download(self._fixed[name], shape, dtype)
            for name, (shape, dtype) in self._prefix.items()
        }

    def put_gain(self, step_idx: int, gain: Float32Array) -> None:
        """Write the gain (H, 1) of one step to the host's side."""
        if gain.shape != (self._spec.n_rows, 1):
            raise SpecError(f"prefix_gain: expected {(self._spec.n_rows, 1)}, got {gain.shape}")
        self.buffers.host("prefix_gains")[step_idx, : self._spec.n_rows] = gain[:, 0]

    def step(self, step_idx: int, source: int, target: int) -> None:
        """Launch one Euler step from the x at ``source`` to the x at ``target``.

        Each such step has a context of its own, made when it is first launched, whose addresses
        never change: a graph depends on the state of the contexts that it was captured from. They
        share weights and scratch memory.

        Source: TensorRT documentation, CUDA graphs: "use one execution context per captured graph".
        """
        context = self._denoisers.get((step_idx, source, target))
        if context is None:
            context = self._make_context("denoise")
            rows = {name: self._steps[name][step_idx] for name in _STEPPED}
            given = {**self._denoise_addresses, **rows, "x": source, "x_next": target}
            for name, address in given.items():
                self._bind(context, "denoise", name, address)
            self._denoisers[step_idx, source, target] = context
        self._launch(context, "denoise")

    def swap(self, step_idx: int) -> int:
        """Return where the x after ``step_idx`` may be kept until the next step has read it."""
        return self._swap[step_idx % 2]

    def enqueue(self, stage: Stage) -> None:
        """Launch one pass of vision or prefill; returns at once.

        Raises:
            DeviceError: TensorRT refuses.
        """
        self._launch(self._contexts[stage], stage)

    def _launch(self, context: trt.IExecutionContext, stage: Stage) -> None:
        if not context.execute_async_v3(self._stream.handle):
            raise DeviceError(
                f"TensorRT failed in {stage}: {last_error(self._trt_logger)}; restart gwp-edge"
            )

    def close(self) -> None:
        """Free contexts, then engines, then memory; safe to call twice.

        Raises:
            DeviceError: the GPU no longer answers.
        """
        self._denoisers.clear()
        self._contexts.clear()
        self._engines.clear()
        self.buffers.close()
