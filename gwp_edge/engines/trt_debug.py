"""Run one engine on given inputs and keep its debug tensors. Not yet run on hardware."""

from __future__ import annotations

import math
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from gwp_edge.engines.trt_buffers import Buffers, dtype_of
from gwp_edge.engines.trt_device import (
    PrimaryContext,
    cuda_errors,
    last_error,
    require_tensorrt,
    shared_logger,
)
from gwp_edge.errors import BuildError, DeviceError

if TYPE_CHECKING:
    import pycuda.driver as drv
    import tensorrt as trt

Arrays = dict[str, npt.NDArray[Any]]


def run_debug(path: Path, feeds: Mapping[str, npt.NDArray[Any]]) -> Arrays:
    """Return the debug tensors and outputs of one pass, by name.

    Raises:
        BuildError: the engine cannot be loaded, or shows nothing.
        DeviceError: the GPU fails.
    """
    require_tensorrt()
    context = PrimaryContext()
    buffers: Buffers | None = None
    stream: drv.Stream | None = None
    try:
        stream = context.stream()
        buffers = Buffers(integrated=False, stream=stream)
        return _run(path, feeds, buffers, stream)
    except BaseException as e:
        # Its frames hold engine and context, which go before memory and CUDA's context.
        traceback.clear_frames(e.__traceback__)
        raise
    finally:
        if buffers is not None:
            buffers.close()
        # PyCUDA destroys a stream in its context, which must still be there then.
        buffers = stream = None
        context.close()


def _run(
    path: Path, feeds: Mapping[str, npt.NDArray[Any]], buffers: Buffers, stream: drv.Stream
) -> Arrays:
    import tensorrt

    log = shared_logger()
    runtime = tensorrt.Runtime(log)
    engine = runtime.deserialize_cuda_engine(np.memmap(path, np.uint8, mode="r"))
    context = None if engine is None else engine.create_execution_context()
    if engine is None or context is None:
        raise BuildError(f"{path.name}: TensorRT cannot load it: {last_error(log)}")
    outputs: dict[str, tuple[int, tuple[int, ...], np.dtype[Any]]] = {}
    for index in range(engine.num_io_tensors):
        name = engine.get_tensor_name(index)
        shape = tuple(int(side) for side in engine.get_tensor_shape(name))
        dtype = dtype_of(engine.get_tensor_dtype(name).name, name)
        address = buffers.device(math.prod(shape) * dtype.itemsize)
        if engine.get_tensor_mode(name) == tensorrt.TensorIOMode.INPUT:
            if name not in feeds:
                raise BuildError(f"{path.name}: nothing is known about its input {name}")
            buffers.upload(feeds[name].astype(dtype).reshape(shape), address)
        else:
            outputs[name] = address, shape, dtype
        context.set_tensor_address(name, address)
    sink = _Sink(buffers, stream)
    # It must outlive the pass, so it has a name.
    listener = _listener(sink)
    taken = context.set_debug_listener(listener) and context.set_all_tensors_debug_state(True)
    with cuda_errors("running an engine for its layers"):
        if not taken or not context.execute_async_v3(stream.handle):
            raise DeviceError(f"{path.name}: TensorRT cannot show layers: {last_error(log)}")
        stream.synchronize()
    if sink.failure is not None:
        raise sink.failure
    for name, (address, shape, dtype) in outputs.items():
        sink.seen[name] = buffers.download(address, shape, dtype)
    return sink.seen


class _Sink:
    """Takes debug tensors while a pass is enqueued. Threads: the one that enqueues."""

    def __init__(self, buffers: Buffers, stream: drv.Stream) -> None:
        self._buffers, self._stream = buffers, stream
        self.seen: Arrays = {}
        self.failure: DeviceError | BuildError | None = None

    def keep(self, address: int, kind: str, shape: tuple[int, ...], name: str) -> bool:
        """Copy a tensor, which is valid during the call alone; False stops nothing."""
        # TensorRT swallows what is raised here.
        try:
            with cuda_errors(f"reading {name}"):
                self._stream.synchronize()
            self.seen[name] = self._buffers.download(address, shape, dtype_of(kind, name))
        except (DeviceError, BuildError) as e:
            self.failure = e
            return False
        return True


def _listener(sink: _Sink) -> trt.IDebugListener:
    import tensorrt

    class _Listener(tensorrt.IDebugListener):
        def __init__(self) -> None:
            # The bindings insist on this form.
            tensorrt.IDebugListener.__init__(self)

        def process_debug_tensor(
            self,
            addr: int,
            location: trt.TensorLocation,
            type: trt.DataType,
            shape: Sequence[int],
            name: str,
            stream: int,
        ) -> bool:
            del location, stream
            return sink.keep(int(addr), type.name, tuple(int(side) for side in shape), name)

    return _Listener()
