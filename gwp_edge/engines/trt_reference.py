"""One stage of a bundle in ONNX Runtime, with its layers' results: what an engine is held to.

Needs no GPU. The robot has no ``onnx``, so that outputs are added to a graph as bytes: protobuf
merges messages that follow each other, and a list in the second is appended to that of the first.

Source: Protocol Buffers, Encoding, "Last One Wins"; onnx.proto of ONNX 1.x.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Final

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from gwp_edge.bundle import Bundle
from gwp_edge.engines.ort import unfit_optimizers
from gwp_edge.errors import DeviceError
from gwp_edge.manifest import Stage
from gwp_edge.planning.memory import available_bytes, check_free
from gwp_edge.preprocess import normalise_state

Arrays = dict[str, npt.NDArray[Any]]
_DTYPES: Final[dict[str, npt.DTypeLike]] = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(bfloat16)": ml_dtypes.bfloat16,
    "tensor(uint8)": np.uint8,
}
_WEIGHTS_FOLDER: Final = "session.model_external_initializers_file_folder_path"
_LOG_ERRORS_ONLY: Final = 3
# ModelProto.graph, GraphProto.output and ValueInfoProto.name, all length-delimited.
_GRAPH, _OUTPUT, _NAME = 7, 12, 1
# The portable form computes in float32: a copy of the weights beside those of the file.
_FLOAT_BYTES: Final = 4
_STORED_BYTES: Final[dict[str, float]] = {"fp32": 4, "fp16": 2, "bf16": 2, "w4": 0.5}


def _field(number: int, content: bytes) -> bytes:
    return _varint(number << 3 | 2) + _varint(len(content)) + content


def _varint(value: int) -> bytes:
    text = bytearray()
    while value > 0x7F:
        text.append(value & 0x7F | 0x80)
        value >>= 7
    text.append(value)
    return bytes(text)


def with_outputs(model: bytes, names: Iterable[str]) -> bytes:
    """Return an ONNX model with tensors of the graph as further outputs."""
    added = b"".join(_field(_OUTPUT, _field(_NAME, name.encode())) for name in names)
    return model + _field(_GRAPH, added)


def _graph_file(bundle: Bundle, stage: Stage) -> Path:
    graphs = bundle.manifest.graphs
    return bundle.file(getattr(graphs.get("portable", graphs["native"]), stage))


def layer_tensors(bundle: Bundle, stage: Stage) -> dict[str, str]:
    """Return the tensor with each layer's result, in the order of the graph.

    A layer with a bias of its own is a node ``NAME.add``, a float32 convolution one node.
    """
    text = _graph_file(bundle, stage).read_bytes()
    native = bundle.file(getattr(bundle.manifest.graphs["native"], stage)).read_bytes()
    found = {}
    for layer in bundle.manifest.precision.layers:
        if layer.stage != stage or not layer.weight_bytes:
            continue
        for tensor in (f"{layer.name}.add:out", f"{layer.name}:out"):
            # Names stand in the file as they are; weights do not.
            if all(tensor.encode() in graph for graph in (text, native)):
                found[layer.name] = tensor
                break
    return found


def reference_bytes(bundle: Bundle, stage: Stage) -> int:
    """Return the memory for a stage's weights in ONNX Runtime, modelled."""
    layers = [x for x in bundle.manifest.precision.layers if x.stage == stage]
    return sum(
        round(x.weight_bytes * (1 + _FLOAT_BYTES / _STORED_BYTES.get(x.format, 1))) for x in layers
    )


class Reference:
    """A stage in ONNX Runtime on the processor. Threads: one owner.

    Args:
        bundle: a checked bundle.
        stage: which.
        shown: tensors to return besides the outputs.

    Raises:
        BuildError: there is not enough memory for it.
        DeviceError: ONNX Runtime cannot load it.
    """

    def __init__(self, bundle: Bundle, stage: Stage, shown: Sequence[str] = ()) -> None:
        check_free(
            "comparing layers on the processor",
            reference_bytes(bundle, stage),
            available_bytes(),
            "close other programs",
        )
        path = _graph_file(bundle, stage)
        options = ort.SessionOptions()
        options.log_severity_level = _LOG_ERRORS_ONLY
        options.add_session_config_entry(_WEIGHTS_FOLDER, str(path.parent))
        # Packing would keep some weights twice, and speed is no matter here.
        options.add_session_config_entry("session.disable_prepacking", "1")
        options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
        self._stage = stage
        try:
            self._session: Any = ort.InferenceSession(
                with_outputs(path.read_bytes(), shown),
                options,
                providers=["CPUExecutionProvider"],
                disabled_optimizers=unfit_optimizers(bundle),
            )
        except Exception as e:  # the library has no common base for its errors
            raise DeviceError(f"{stage}: onnxruntime cannot load it: {e}") from e

    def __enter__(self) -> Reference:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        del kind, error, trace
        self._session = None

    def run(self, feeds: Mapping[str, npt.NDArray[Any]]) -> Arrays:
        """Return outputs and shown tensors for inputs by name.

        Raises:
            DeviceError: an input is missing or ONNX Runtime fails.
        """
        given = {}
        for node in self._session.get_inputs():
            if node.name not in feeds:
                raise DeviceError(f"{self._stage}: nothing is known about input {node.name}")
            given[node.name] = feeds[node.name].astype(_DTYPES[node.type]).reshape(node.shape)
        names = [node.name for node in self._session.get_outputs()]
        try:
            return dict(zip(names, self._session.run(names, given), strict=True))
        except Exception as e:  # see above
            raise DeviceError(f"{self._stage}: onnxruntime failed: {e}") from e


def stage_inputs(bundle: Bundle, stage: Stage) -> Arrays:
    """Return right inputs of a stage for the golden input; of denoise, for its first step.

    Raises:
        BuildError: there is not enough memory to compute those of denoise.
        DeviceError: ONNX Runtime fails.
    """
    manifest, spec = bundle.manifest, bundle.spec
    golden = bundle.arrays(manifest.golden.file)
    if stage == "vision":
        return {"canvas": golden["canvas"]}
    prompt = bundle.arrays(manifest.prompts[manifest.golden.task])
    state = normalise_state(np.asarray(golden["state"], np.float64), spec)
    prefill = {"latent": golden["latent"], "state": state, **prompt}
    if stage == "prefill":
        return prefill
    with Reference(bundle, "prefill") as reference:
        prefix = reference.run(prefill)
    sigmas = np.asarray(spec.sampler.sigmas, np.float32)
    noise = np.asarray(golden["noise"], np.float32).reshape(spec.n_rows, -1)
    return {
        **prompt,
        **prefix,
        "x": noise,
        "sigma": sigmas[:1],
        "sigma_step": np.diff(sigmas)[:1],
        "modulation": bundle.arrays(manifest.tables)["modulation"][0],
        "prefix_norm": np.zeros_like(noise),
        "prefix_gain": np.zeros((spec.n_rows, 1), np.float32),
    }
