"""ONNX Runtime engine: the default everywhere.

Prefix K/V are bound once as outputs of prefill and inputs of denoise: the same memory, never
copied. All sessions read one weight file through the page cache.
"""

from __future__ import annotations

import ctypes
from typing import Any, Literal

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from gwp_edge.bundle import Bundle
from gwp_edge.errors import DeviceError, PerformanceIssue, SpecError
from gwp_edge.manifest import STAGES, Stage
from gwp_edge.types import Float32Array, ImageArray

Provider = Literal["cpu", "cuda"]
Weights = Literal["packed", "mapped"]

_PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
_DTYPES: dict[str, npt.DTypeLike] = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(bfloat16)": ml_dtypes.bfloat16,
    "tensor(uint8)": np.uint8,
}
SESSION_CONFIG = {
    # int4 weights times float32 activations. The library's own choice (4) would quantize the
    # activations to int8 on the way, which no calibration has seen.
    "session.qdq_matmulnbits_accuracy_level": "1",
}
# From malloc.h of glibc; setting it also stops the threshold from growing.
_M_MMAP_THRESHOLD = -3
_MAPPED_BLOCK_BYTES = 1 << 20
# Warnings of the library are about its own choices; errors come back as exceptions.
_LOG_ERRORS_ONLY = 3


class OrtEngine:
    """Runs a bundle with ONNX Runtime. Threads: one owner.

    Args:
        bundle: a checked bundle.
        provider: where it runs. Never changed in silence: a missing provider is an error.
        threads: intra-operator threads on the CPU; None leaves the choice to the library.
        weights: ``packed`` re-orders weights at load for speed; ``mapped`` computes on the mapped
            file, which keeps them evictable and shared between processes, and is slower.

    Raises:
        PerformanceIssue: the provider is not in this build of onnxruntime.
        SpecError: the graphs do not fit the manifest.
    """

    def __init__(
        self,
        bundle: Bundle,
        *,
        provider: Provider = "cpu",
        threads: int | None = None,
        weights: Weights = "packed",
    ) -> None:
        if threads is not None and threads < 1:
            raise SpecError(f"--threads must be at least 1, got {threads}")
        if weights not in ("packed", "mapped"):
            raise SpecError(f"--weights {weights}: expected packed or mapped")
        self._bundle = bundle
        self._spec = bundle.spec
        self._provider = _available(provider)
        _return_freed_memory()
        self._form: Literal["native", "portable"] = _choose_form(bundle, provider)
        self._sessions: dict[Stage, ort.InferenceSession] = {
            stage: self._open(stage, provider, threads, weights) for stage in STAGES
        }
        self._buffers: dict[str, npt.NDArray[Any]] = {}
        self._bindings: dict[Stage, ort.IOBinding] = {}
        self._task: str | None = None
        self._load_tables()
        if weights == "packed":
            self._load_shared_weights()
        for stage in STAGES:
            self._bind(stage)

    def _open(
        self, stage: Stage, provider: Provider, threads: int | None, weights: Weights
    ) -> ort.InferenceSession:
        options = ort.SessionOptions()
        options.log_severity_level = _LOG_ERRORS_ONLY
        for key, value in SESSION_CONFIG.items():
            options.add_session_config_entry(key, value)
        if threads is not None:
            options.intra_op_num_threads = threads
        if weights == "mapped":
            options.add_session_config_entry("session.disable_prepacking", "1")
        if provider != "cpu":
            options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
        path = self._bundle.file(getattr(self._bundle.manifest.graphs[self._form], stage))
        try:
            session = ort.InferenceSession(
                str(path),
                options,
                providers=[self._provider],
                disabled_optimizers=unfit_optimizers(self._bundle),
            )
        except Exception as e:  # the library has no common base for its errors
            raise SpecError(f"{path}: onnxruntime cannot load it: {_first_line(e)}") from e
        if session.get_providers()[0] != self._provider:
            raise PerformanceIssue(
                f"{stage}: asked for {self._provider}, onnxruntime chose "
                f"{session.get_providers()[0]}; install a build with that provider"
            )
        return session

    def _load_tables(self) -> None:
        table = self._bundle.arrays(self._bundle.manifest.tables)["modulation"]
        sigmas = np.asarray(self._spec.sampler.sigmas, dtype=np.float32)
        self._modulation = np.ascontiguousarray(table, dtype=np.float32)
        self._sigmas, self._sigma_steps = sigmas[:-1], np.diff(sigmas)
        if len(self._modulation) != self._spec.sampler.n_steps:
            raise SpecError(
                f"{self._bundle.root}: modulation has {len(self._modulation)} steps, the spec "
                f"{self._spec.sampler.n_steps}; export the policy again"
            )

    def _load_shared_weights(self) -> None:
        """Read weights that graphs take as inputs: once for all sessions, and none packs them."""
        for session in self._sessions.values():
            for node in session.get_overridable_initializers():
                if node.name not in self._buffers:
                    self._buffers[node.name] = self._bundle.weight(node.name)

    def _shared(self, session: ort.InferenceSession) -> list[ort.NodeArg]:
        """Return the weights of a graph that were read here; the library maps the others."""
        return [n for n in session.get_overridable_initializers() if n.name in self._buffers]

    def _buffer(self, node: ort.NodeArg) -> npt.NDArray[Any]:
        """Return the buffer of a graph value; values of one name share it between graphs."""
        dtype = _DTYPES.get(node.type)
        if dtype is None or not all(isinstance(side, int) for side in node.shape):
            raise SpecError(f"{node.name}: unexpected type or shape {node.type} {node.shape}")
        known = self._buffers.get(node.name)
        if known is None:
            known = np.zeros(node.shape, dtype=dtype)
            self._buffers[node.name] = known
        elif known.dtype != dtype or known.shape != tuple(node.shape):
            raise SpecError(
                f"{node.name}: {node.type} {node.shape} in one graph, "
                f"{known.dtype} {known.shape} in another; export the policy again"
            )
        return known

    def _bind(self, stage: Stage) -> None:
        session = self._sessions[stage]
        binding = session.io_binding()
        for nodes, bind in (
            (session.get_inputs(), binding.bind_input),
            (self._shared(session), binding.bind_input),
            (session.get_outputs(), binding.bind_output),
        ):
            for node in nodes:
                array = self._buffer(node)
                bind(
                    node.name,
                    "cpu",
                    0,
                    _element_type(array),
                    array.shape,
                    array.ctypes.data,
                )
        self._bindings[stage] = binding

    def _run(self, stage: Stage) -> None:
        try:
            self._sessions[stage].run_with_iobinding(self._bindings[stage])
        except Exception as e:  # see _open
            raise DeviceError(f"onnxruntime failed in {stage}: {_first_line(e)}") from e

    def set_prompt(self, task: str) -> None:
        """Make the prompt K/V of ``task`` resident."""
        prompts = self._bundle.manifest.prompts
        if task not in prompts:
            known = ", ".join(repr(name) for name in prompts)
            raise SpecError(f"--task {task!r} is not in this bundle; it has {known}")
        if task == self._task:
            return
        arrays = self._bundle.arrays(prompts[task])
        wanted = [name for name in self._buffers if name.startswith("prompt_")]
        missing = [name for name in wanted if name not in arrays]
        if missing:
            raise SpecError(f"{prompts[task]}: has no {missing[0]}; export the policy again")
        for name in wanted:
            if arrays[name].shape != self._buffers[name].shape:
                raise SpecError(
                    f"{prompts[task]}: {name} has shape {arrays[name].shape}, expected "
                    f"{self._buffers[name].shape}; export the policy again"
                )
            self._buffers[name][...] = arrays[name]
        self._task = task

    def vision(self, canvas: ImageArray) -> Float32Array:
        """Encode a canvas, uint8 RGB (h, w, 3), into a normalised latent (1, C, h/16, w/16)."""
        self._put("canvas", canvas)
        self._run("vision")
        latent: Float32Array = self._buffers["latent"].copy()
        return latent

    def prefill(self, latent: Float32Array, state_norm: Float32Array) -> None:
        """Compute the prefix K/V from a latent and a normalised, padded state (1, A)."""
        if self._task is None:
            raise SpecError("no prompt is set; call set_prompt first")
        self._put("latent", latent)
        self._put("state", state_norm)
        self._run("prefill")

    def denoise(
        self,
        x: Float32Array,
        step_idx: int,
        prefix_norm: Float32Array,
        prefix_gain: Float32Array,
    ) -> Float32Array:
        """Take one Euler step from ``x`` (H, A) at ``step_idx``; return the next x (H, A)."""
        if not 0 <= step_idx < len(self._modulation):
            raise SpecError(f"step {step_idx} is not in 0..{len(self._modulation) - 1}")
        self._put("x", x)
        self._put("prefix_norm", prefix_norm)
        self._put("prefix_gain", prefix_gain)
        self._buffers["sigma"][0] = self._sigmas[step_idx]
        self._buffers["sigma_step"][0] = self._sigma_steps[step_idx]
        self._buffers["modulation"][...] = self._modulation[step_idx]
        self._run("denoise")
        x_next: Float32Array = self._buffers["x_next"].copy()
        return x_next

    def close(self) -> None:
        """Free sessions and buffers; safe to call twice."""
        self._bindings.clear()
        self._sessions.clear()
        self._buffers.clear()

    def _put(self, name: str, value: npt.NDArray[Any]) -> None:
        buffer = self._buffers[name]
        if value.shape != buffer.shape or value.dtype != buffer.dtype:
            raise SpecError(
                f"{name}: expected {buffer.dtype} {buffer.shape}, got {value.dtype} {value.shape}"
            )
        buffer[...] = value


def _return_freed_memory() -> None:
    """Give large freed blocks back to the system at once.

    Loading turns and re-orders every weight once. glibc raises its own threshold for mapped blocks
    after the first few and then keeps what was freed: 1.75 times the weights stay resident in
    place of 1.1 (measured on 160 MB of int8 weights).
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, _MAPPED_BLOCK_BYTES)


def _available(provider: str) -> str:
    if provider not in _PROVIDERS:
        raise SpecError(f"--provider {provider} is not known; choose cpu or cuda")
    name = _PROVIDERS[provider]
    if name not in ort.get_available_providers():
        raise PerformanceIssue(
            f"this onnxruntime has no {name} (it has "
            f"{', '.join(ort.get_available_providers())}); install onnxruntime-gpu or use "
            "--provider cpu"
        )
    return name


def unfit_optimizers(bundle: Bundle) -> list[str] | None:
    """Return the optimizers of ONNX Runtime that must not touch the graphs of ``bundle``.

    Releases up to 1.26 at least (for Python 3.10 there are no newer ones than 1.23) fuse products
    of float8 into an operator for 8-bit integers, and then refuse their own graph. 1.32 fuses
    nothing there.
    """
    has_float8 = any(layer.format == "fp8" for layer in bundle.manifest.precision.layers)
    return ["QDQSelectorActionTransformer"] if has_float8 else None


def _choose_form(bundle: Bundle, provider: str) -> Literal["native", "portable"]:
    """The CPU takes the portable form where there is one: the same arithmetic in float32."""
    if provider == "cpu" and "portable" in bundle.manifest.graphs:
        return "portable"
    return "native"


def _element_type(array: npt.NDArray[Any]) -> Any:  # noqa: ANN401 - what bind_input takes
    # numpy has no bfloat16 of its own; the library takes the ONNX type number instead.
    return 16 if array.dtype == ml_dtypes.bfloat16 else array.dtype.type


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
