"""Stand-ins for tensorrt, pycuda and libcuda, so that the engine's own logic runs without a GPU.

Addresses are real: "device" memory is host memory, and an engine is an ONNX Runtime session that
reads and writes it at execution. A captured stream records instead of running, as CUDA does. What
the real libraries do inside is not imitated; what our code asks of them is checked.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import sys
import types
import weakref
from enum import Enum
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import onnxruntime as ort

ALIGNMENT = 256


class FakeGpu:
    """State of the machine: streams in capture, live allocations, what was called in order."""

    def __init__(
        self, *, capability=(8, 7), name="Orin", integrated=True, version="10.3.0", n_sms=16
    ):
        self.capability, self.name, self.integrated = capability, name, integrated
        self.n_sms = n_sms
        self.version = version
        self.captures: dict[int, list] = {}
        self.graphs: dict[int, list] = {}
        self.calls: list[str] = []
        self.live: dict[int, object] = {}
        self.building = weakref.WeakSet()  # what holds weights while an engine is built
        self.scratch_bytes = {"vision": 3000, "prefill": 5000, "denoise": 1000}
        self.damaged_cache = b"damaged"  # such a timing cache is None
        self.contexts = 0
        self.fail_on: str | None = None
        self.inspector = None  # changes the inspector's layers
        self.corrupt = None  # changes an engine's outputs
        self.during_build = None  # called between two steps of a build
        self.next_id = 1000

    def new_id(self) -> int:
        self.next_id += 1
        return self.next_id

    def allocate(self, n_bytes: int) -> int:
        raw = np.zeros(n_bytes + ALIGNMENT, np.uint8)
        address = -(-raw.ctypes.data // ALIGNMENT) * ALIGNMENT
        self.live[address] = raw
        return address

    def run(self, stream: int, work) -> None:
        if stream in self.captures:
            self.captures[stream].append(work)
        else:
            work()

    def maybe_fail(self, what: str) -> None:
        if self.fail_on == what:
            raise self.driver.LaunchError(f"{what} failed: an illegal memory access")


def view(address: int, shape, dtype) -> np.ndarray:
    n_bytes = int(np.prod(shape)) * np.dtype(dtype).itemsize
    raw = (ctypes.c_uint8 * n_bytes).from_address(address)
    return np.frombuffer(raw, np.uint8).view(dtype).reshape(shape)


# -- pycuda ----------------------------------------------------------------------------------------


def make_pycuda(gpu: FakeGpu) -> dict[str, types.ModuleType]:
    package, driver = types.ModuleType("pycuda"), types.ModuleType("pycuda.driver")
    package.driver, gpu.driver = driver, driver

    class Error(Exception):
        pass

    class LaunchError(Error):
        pass

    for error in (Error, LaunchError):
        error.__module__ = "pycuda._driver"

    class Context:
        def push(self):
            gpu.contexts += 1

        @staticmethod
        def pop():
            gpu.contexts -= 1
            gpu.calls.append("context pop")

    class Device:
        def __init__(self, index):
            assert index == 0

        @staticmethod
        def count():
            return 1

        def name(self):
            return gpu.name

        def compute_capability(self):
            return gpu.capability

        def get_attribute(self, attribute):
            return {18: int(gpu.integrated), 16: gpu.n_sms}[attribute]

        def retain_primary_context(self):
            return Context()

    class Stream:
        def __init__(self, flags=0):
            self.handle = gpu.new_id()

        def synchronize(self):
            assert self.handle not in gpu.captures, "synchronize is illegal during a capture"
            gpu.maybe_fail("synchronize")

    class Allocation:
        def __init__(self, n_bytes):
            self.address = gpu.allocate(n_bytes)

        def __int__(self):
            return self.address

        def free(self):
            gpu.calls.append("free")
            del gpu.live[self.address]

    def pagelocked_empty(shape, dtype, order="C", mem_flags=0):
        assert mem_flags == (2 if gpu.integrated else 0)
        n_bytes = int(np.prod(shape)) * np.dtype(dtype).itemsize
        address = gpu.allocate(n_bytes)
        raw = gpu.live.pop(address)

        class Owner(ctypes.c_uint8 * n_bytes):
            def get_device_pointer(self):
                return address

        owner = Owner.from_address(address)
        owner.keep = raw
        made = np.ndarray(shape, dtype, buffer=owner)
        assert made.base is owner
        return made

    def copy(dest, source):
        ctypes.memmove(dest, source.ctypes.data, source.nbytes)

    def memcpy_htod(dest, src):
        gpu.maybe_fail("upload")
        gpu.calls.append("upload")
        copy(dest, src)

    def memcpy_dtoh(dest, src):
        ctypes.memmove(dest.ctypes.data, src, dest.nbytes)

    def memcpy_htod_async(dest, src, stream=None):
        gpu.run(stream.handle, lambda: copy(dest, np.asarray(src)))

    def memcpy_dtoh_async(dest, src, stream=None):
        gpu.run(stream.handle, lambda: ctypes.memmove(dest.ctypes.data, src, dest.nbytes))

    driver.Error, driver.LaunchError = Error, LaunchError
    driver.Context, driver.Device, driver.Stream = Context, Device, Stream
    driver.init = lambda flags=0: None
    driver.mem_alloc = Allocation
    driver.mem_get_info = lambda: (20_000_000_000, 24_000_000_000)
    driver.pagelocked_empty = pagelocked_empty
    driver.memcpy_htod, driver.memcpy_dtoh = memcpy_htod, memcpy_dtoh
    driver.memcpy_htod_async = memcpy_htod_async
    driver.memcpy_dtoh_async = memcpy_dtoh_async
    driver.device_attribute = types.SimpleNamespace(INTEGRATED=18, MULTIPROCESSOR_COUNT=16)
    driver.host_alloc_flags = types.SimpleNamespace(DEVICEMAP=2)
    return {"pycuda": package, "pycuda.driver": driver}


# -- tensorrt --------------------------------------------------------------------------------------

_KINDS = {1: "FLOAT", 10: "HALF", 16: "BF16", 2: "UINT8"}
_NUMPY = {
    "FLOAT": np.float32,
    "HALF": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "UINT8": np.uint8,
}


def make_tensorrt(gpu: FakeGpu) -> types.ModuleType:
    trt = types.ModuleType("tensorrt")
    trt.__version__ = gpu.version

    class Flag(Enum):
        STRONGLY_TYPED = 1

        def __int__(self):
            return self.value

    trt.NetworkDefinitionCreationFlag = Flag
    trt.BuilderFlag = Enum("BuilderFlag", "TF32")
    trt.MemoryPoolType = Enum("MemoryPoolType", "WORKSPACE")
    trt.ProfilingVerbosity = Enum("ProfilingVerbosity", "DETAILED")
    trt.LayerInformationFormat = Enum("LayerInformationFormat", "JSON")
    trt.TensorIOMode = Enum("TensorIOMode", "NONE INPUT OUTPUT")
    trt.TensorLocation = Enum("TensorLocation", "DEVICE HOST")
    strategies = Enum("ExecutionContextAllocationStrategy", "STATIC USER_MANAGED")
    trt.ExecutionContextAllocationStrategy = strategies
    trt.DataType = Enum("DataType", list(_KINDS.values()))

    class Logger:
        Severity = Enum("Severity", "INTERNAL_ERROR ERROR WARNING INFO VERBOSE")

    class ILogger:
        def __init__(self):
            pass

    class IProgressMonitor:
        def __init__(self):
            pass

    class IDebugListener:
        def __init__(self):
            pass

    trt.Logger, trt.ILogger, trt.IProgressMonitor = Logger, ILogger, IProgressMonitor
    trt.IDebugListener = IDebugListener

    class Cache:
        def __init__(self, data):
            self.data = bytes(data)

        def serialize(self):
            return self.data + b"timed;"

    class Config:
        def __init__(self):
            self.cleared = []

        def set_memory_pool_limit(self, pool, pool_size):
            self.workspace = pool_size

        def clear_flag(self, flag):
            self.cleared.append(flag)

        def create_timing_cache(self, data):
            return None if data.startswith(gpu.damaged_cache) else Cache(data)

        def set_timing_cache(self, cache, ignore_mismatch):
            assert ignore_mismatch is False
            if cache is None:
                raise TypeError("set_timing_cache(): incompatible function arguments")
            return not cache.data.startswith(b"other driver")

    class Layer:
        num_outputs = 1

        def __init__(self, name):
            self.name = name

        def get_output(self, index):
            assert index == 0
            return types.SimpleNamespace(name=self.name)

    class Network:
        def __init__(self):
            gpu.building.add(self)
            self.path, self.layers, self.debug = None, [], []

        @property
        def num_layers(self):
            return len(self.layers)

        def get_layer(self, index):
            return self.layers[index]

        def mark_debug(self, tensor):
            self.debug.append(tensor.name)
            return True

    class Parser:
        def __init__(self, network, logger):
            gpu.building.add(self)
            self.network, self.errors = network, []
            self.num_errors = 0

        def parse_from_file(self, path):
            model = onnx.load(path, load_external_data=False)
            if gpu.fail_on == "parse":
                node = model.graph.node[3]
                self.errors = [
                    types.SimpleNamespace(desc=lambda: "no such thing", node_name=lambda: node.name)
                ]
                self.num_errors = 1
                return False
            self.network.path = path
            self.network.layers = [Layer(out) for n in model.graph.node for out in n.output]
            return True

        def get_error(self, index):
            return self.errors[index]

    class Builder:
        def __init__(self, logger):
            gpu.building.add(self)
            self.logger = logger

        def create_network(self, flags=0):
            assert flags == 1 << 1, "must be strongly typed"
            return Network()

        def create_builder_config(self):
            return Config()

        def build_serialized_network(self, network, config):
            assert config.profiling_verbosity is trt.ProfilingVerbosity.DETAILED
            assert config.max_aux_streams == 0, "everything runs on one stream"
            gpu.calls.append(f"build tf32={'off' if config.cleared else 'on'}")
            if gpu.fail_on == "build":
                self.logger.log(Logger.Severity.ERROR, "out of\nworkspace")
                return None
            monitor = config.progress_monitor
            monitor.phase_start("Building", None, 2)
            for i in range(2):
                monitor.phase_start("Tactics", "Building", 4)
                for j in range(4):
                    if gpu.during_build is not None:
                        gpu.during_build()
                    if not monitor.step_complete("Tactics", j):
                        return None
                monitor.phase_finish("Tactics")
                monitor.step_complete("Building", i)
            monitor.phase_finish("Building")
            return json.dumps(
                {
                    "onnx": str(network.path),
                    "stage": Path(network.path).stem,
                    "debug": network.debug,
                }
            ).encode()

    class Inspector:
        def __init__(self, path):
            self.path = path

        def get_engine_information(self, layer_format):
            layers = inspector_layers(self.path)
            return json.dumps({"Layers": gpu.inspector(layers) if gpu.inspector else layers})

    class ExecutionContext:
        def __init__(self, engine, strategy):
            assert not gpu.captures, "making a context allocates, which a capture forbids"
            self.engine, self.addresses, self.listener = engine, {}, None
            self.is_captured = False
            gpu.calls.append(f"context {strategy.name}")
            # Without scratch of its own it must be given some before it runs.
            self.scratch = None if strategy is strategies.USER_MANAGED else (0, engine.n_scratch)

        def set_device_memory(self, memory, size):
            assert memory % ALIGNMENT == 0
            assert size >= self.engine.n_scratch
            gpu.calls.append(f"scratch {memory} {size}")
            self.scratch = (memory, size)

        def set_debug_listener(self, listener):
            assert isinstance(listener, IDebugListener)
            self.listener = listener
            return True

        def set_all_tensors_debug_state(self, flag):
            self.shows = flag
            return True

        def set_tensor_address(self, name, address):
            assert name in self.engine.tensors, name
            # NVIDIA: a graph depends on the state of the context that it was captured from.
            assert not self.is_captured, "a context changes after a graph was captured from it"
            assert address % ALIGNMENT == 0, f"{name} is not aligned"
            self.addresses[name] = int(address)
            return True

        def execute_async_v3(self, stream):
            if gpu.fail_on == "execute" or (gpu.fail_on == "capture" and stream in gpu.captures):
                return False
            missing = set(self.engine.tensors) - set(self.addresses)
            assert not missing, f"no address for {missing}"
            assert self.scratch is not None, "no device memory was given"
            addresses = dict(self.addresses)
            self.is_captured |= stream in gpu.captures
            # A kernel may read an input after another has written an output.
            assert len(set(addresses.values())) == len(addresses), "tensors share memory"
            listener = self.listener if self.engine.debug else None
            gpu.run(stream, lambda: self.engine.execute(addresses, listener, stream))
            return True

    class Engine:
        def __init__(self, facts):
            self.path, self.stage = facts["onnx"], facts["stage"]
            self.debug = facts["debug"]
            self.n_scratch = gpu.scratch_bytes[self.stage]
            options = ort.SessionOptions()
            options.log_severity_level = 3
            options.intra_op_num_threads = 1
            options.add_session_config_entry(
                "session.model_external_initializers_file_folder_path",
                str(Path(self.path).parent),
            )
            model = onnx.load(self.path, load_external_data=False)
            graph = onnx.load(self.path, load_external_data=False).graph
            model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in self.debug)
            self.session = ort.InferenceSession(
                model.SerializeToString(), options, providers=["CPUExecutionProvider"]
            )
            self.tensors = {}
            for mode, values in (("INPUT", graph.input), ("OUTPUT", graph.output)):
                for value in values:
                    tensor = value.type.tensor_type
                    shape = tuple(d.dim_value for d in tensor.shape.dim)
                    kind = _KINDS[tensor.elem_type]
                    self.tensors[value.name] = (trt.TensorIOMode[mode], shape, kind)

        @property
        def num_io_tensors(self):
            return len(self.tensors)

        def get_tensor_name(self, index):
            return list(self.tensors)[index]

        def get_tensor_mode(self, name):
            return self.tensors[name][0]

        def get_tensor_shape(self, name):
            return self.tensors[name][1]

        def get_tensor_dtype(self, name):
            return trt.DataType[self.tensors[name][2]]

        def create_engine_inspector(self):
            return Inspector(self.path)

        @property
        def device_memory_size_v2(self):
            return self.n_scratch

        def create_execution_context(self, strategy=strategies.STATIC):
            return ExecutionContext(self, strategy)

        def execute(self, addresses, listener, stream):
            def at(name):
                _, shape, kind = self.tensors[name]
                return view(addresses[name], shape, _NUMPY[kind])

            feeds = {n: at(n) for n, t in self.tensors.items() if t[0].name == "INPUT"}
            outputs = [n for n, t in self.tensors.items() if t[0].name == "OUTPUT"]
            named = [*outputs, *self.debug]
            answers = self.run(named, feeds)
            for name, value in zip(named, answers, strict=True):
                if gpu.corrupt is not None:
                    value = gpu.corrupt(self.stage, name, value)
                if name in outputs:
                    at(name)[...] = value
                elif listener is not None:
                    self.show(listener, name, np.ascontiguousarray(value), stream)

        def run(self, names, feeds):
            return self.session.run(names, feeds)

        @staticmethod
        def show(listener, name, value, stream):
            kind = next(k for k, dtype in _NUMPY.items() if value.dtype == dtype)
            # As the bindings do: ints for addresses, and what comes back is ignored.
            listener.process_debug_tensor(
                value.ctypes.data,
                trt.TensorLocation.DEVICE,
                trt.DataType[kind],
                value.shape,
                name,
                stream,
            )

    class Runtime:
        def __init__(self, logger):
            self.logger = logger

        def deserialize_cuda_engine(self, plan):
            gpu.calls.append("deserialize")
            assert not gpu.building, "an engine is loaded while parser or builder hold its weights"
            data = bytes(plan)
            if not data.startswith(b"{"):
                self.logger.log(Logger.Severity.ERROR, "magic tag does not match")
                return None
            return Engine(json.loads(data))

    trt.Builder, trt.OnnxParser, trt.Runtime = Builder, Parser, Runtime
    return trt


def inspector_layers(path: str) -> list[dict]:
    """Layers as TensorRT 10 lists them, for a graph whose products all run as typed."""
    graph = onnx.load(path, load_external_data=False).graph
    types_of = {x.name: x.data_type for x in graph.initializer}
    for value in (*graph.input, *graph.value_info, *graph.output):
        types_of[value.name] = value.type.tensor_type.elem_type
    words = {1: "Float", 10: "Half", 16: "BFloat16", 3: "Int8", 17: "FP8"}
    tactics = {
        "Int8": "sm80_xmma_gemm_i8i8_i8i32_f32_tn_n",
        "Half": "sm80_xmma_gemm_f16f16_f16f32_f32_tn_n",
        "Float": "sm80_xmma_gemm_f32f32_f32f32_f32_tn_n",
        "BFloat16": "sm80_xmma_gemm_bf16bf16_bf16f32_f32_tn_n",
    }
    sources = {out: node for node in graph.node for out in node.output}
    layers = []
    for node in graph.node:
        if node.op_type not in ("MatMul", "Conv"):
            continue
        source = sources.get(node.input[0])
        dq = source is not None and source.op_type == "DequantizeLinear"
        word = words[types_of[source.input[0] if dq else node.input[0]]]
        layers.append(
            {
                "Name": f"{node.name}_myl0_1",
                "LayerType": "gemm",
                "Inputs": [{"Name": node.input[0], "Format/Datatype": word}],
                "Outputs": [{"Name": node.output[0], "Format/Datatype": "Float"}],
                "TacticName": tactics.get(word, ""),
                "Metadata": f"[ONNX Layer: {node.name}]\x1e[ONNX Layer: {node.name}.add]",
            }
        )
    return layers


# -- libcuda ---------------------------------------------------------------------------------------


class FakeLibcuda:
    """The driver functions that trt_graph calls, each with an attribute argtypes to set."""

    def __init__(self, gpu: FakeGpu) -> None:
        self.gpu = gpu
        self.fail: dict[str, int] = {}
        self.times_ms: dict[int, float] = {}
        self.clock_ms = 0.0
        for name in [
            "cuStreamBeginCapture_v2",
            "cuStreamEndCapture",
            "cuGraphInstantiateWithFlags",
            "cuGraphLaunch",
            "cuGraphExecDestroy",
            "cuGraphDestroy",
            "cuEventCreate",
            "cuEventRecord",
            "cuEventRecordWithFlags",
            "cuEventElapsedTime",
            "cuEventDestroy_v2",
            "cuGetErrorName",
        ]:
            setattr(self, name, self._wrapped(name))

    def _wrapped(self, name):
        def call(*arguments):
            if name in self.fail:
                return self.fail[name]
            self.gpu.calls.append(name)
            getattr(self, "_" + name)(*arguments)
            return 0

        return call

    @staticmethod
    def _int(value):
        return value.value if hasattr(value, "value") else value

    def _cuStreamBeginCapture_v2(self, stream, mode):
        assert mode == 1
        assert stream not in self.gpu.captures
        self.gpu.captures[stream] = []

    def _cuStreamEndCapture(self, stream, out):
        out._obj.value = self.gpu.new_id()
        self.gpu.graphs[out._obj.value] = self.gpu.captures.pop(stream)

    def _cuGraphInstantiateWithFlags(self, out, graph, flags):
        assert flags == 0
        out._obj.value = self.gpu.new_id()
        self.gpu.graphs[out._obj.value] = self.gpu.graphs[self._int(graph)]

    def _cuGraphLaunch(self, executable, stream):
        for work in self.gpu.graphs[self._int(executable)]:
            work()

    def _cuGraphExecDestroy(self, executable):
        del self.gpu.graphs[self._int(executable)]

    def _cuGraphDestroy(self, graph):
        del self.gpu.graphs[self._int(graph)]

    def _cuEventCreate(self, out, flags):
        out._obj.value = self.gpu.new_id()

    def _mark(self, event):
        self.clock_ms += 1.5
        self.times_ms[event] = self.clock_ms

    def _cuEventRecord(self, event, stream):
        assert stream not in self.gpu.captures, "needs the external flag inside a capture"
        self._mark(self._int(event))

    def _cuEventRecordWithFlags(self, event, stream, flags):
        assert flags == 1
        assert stream in self.gpu.captures
        key = self._int(event)
        self.gpu.run(stream, lambda: self._mark(key))

    def _cuEventElapsedTime(self, out, first, second):
        out._obj.value = self.times_ms[self._int(second)] - self.times_ms[self._int(first)]

    def _cuEventDestroy_v2(self, event):
        pass

    def _cuGetErrorName(self, code, out):
        out._obj.value = b"CUDA_ERROR_ILLEGAL_ADDRESS"


@contextlib.contextmanager
def installed(monkeypatch, gpu: FakeGpu):
    """Put the stand-ins where the real libraries would be found."""
    from gwp_edge.engines import trt_graph

    modules = {**make_pycuda(gpu), "tensorrt": make_tensorrt(gpu)}
    with monkeypatch.context() as patch:
        for name, module in modules.items():
            patch.setitem(sys.modules, name, module)
        library = FakeLibcuda(gpu)
        gpu.library = library
        patch.setattr(trt_graph, "load_libcuda", lambda: library)
        yield gpu
