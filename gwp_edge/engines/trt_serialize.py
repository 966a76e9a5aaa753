"""One network through TensorRT's builder: parse, build, write, inspect. Not yet run on hardware.

Strongly typed: the types in the graph are the types that compute. Nothing of the API that
TensorRT 11 removed.
"""

from __future__ import annotations

import traceback
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from gwp_edge.engines.trt_device import (
    PrimaryContext,
    last_error,
    require_tensorrt,
    shared_logger,
)
from gwp_edge.engines.trt_options import BuildOptions
from gwp_edge.engines.trt_progress import BuildProgress
from gwp_edge.errors import BuildError

if TYPE_CHECKING:
    import tensorrt as trt


@dataclass(frozen=True, slots=True, kw_only=True)
class Written:
    """An engine on disk: the inspector's report, and the device memory that a pass needs."""

    report: str
    scratch_bytes: int


def write_engine(
    graph: Path,
    path: Path,
    cache: Path,
    options: BuildOptions,
    build: BuildProgress,
    debug: Collection[str] = (),
) -> Written:
    """Build one engine into ``path``. Threads: any; a CUDA context is opened for this one.

    Args:
        graph: ONNX file, its weights beside it.
        path: written whole.
        cache: timing cache, read where it is usable and replaced.
        options: for the builder.
        build: is told how far it is, and may cancel.
        debug: tensors whose values the engine shall be able to show, at the price of fusions.

    Raises:
        BuildError: TensorRT refuses, or the build was cancelled.
    """
    context = PrimaryContext()
    try:
        _serialize(graph, path, cache, options, build, debug)
        # Parser, network, builder and plan are gone by now: their weights and these would not
        # fit beside each other on every device.
        return _inspect(path)
    except BaseException as e:
        # Its frames hold builder, network and engine, which go before CUDA's context.
        traceback.clear_frames(e.__traceback__)
        raise
    finally:
        context.close()


def _serialize(
    graph: Path,
    path: Path,
    cache: Path,
    options: BuildOptions,
    build: BuildProgress,
    debug: Collection[str],
) -> None:
    require_tensorrt()
    import tensorrt

    log = shared_logger()
    builder = tensorrt.Builder(log)
    network = builder.create_network(
        1 << int(tensorrt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    )
    parser = tensorrt.OnnxParser(network, log)
    # From the file, so that the weights beside it are found; nothing is read into Python.
    if not parser.parse_from_file(str(graph)):
        raise BuildError(f"{graph}: {_parser_errors(parser, log)}")
    _mark(network, debug)
    config = builder.create_builder_config()
    config.set_memory_pool_limit(tensorrt.MemoryPoolType.WORKSPACE, options.workspace_bytes)
    config.builder_optimization_level = options.level
    config.profiling_verbosity = tensorrt.ProfilingVerbosity.DETAILED
    # Left to itself TensorRT adds streams of its own, which share nothing with our order.
    config.max_aux_streams = 0
    if not options.tf32:
        config.clear_flag(tensorrt.BuilderFlag.TF32)
    # The monitor must outlive the builder's work, so it has a name.
    monitor = _monitor(build)
    config.progress_monitor = monitor
    timing = _use_timings(config, cache)
    plan = builder.build_serialized_network(network, config)
    if build.is_cancelled:
        raise BuildError(f"{graph.name}: the build was cancelled")
    if plan is None:
        raise BuildError(f"{graph}: TensorRT cannot build it: {last_error(log)}")
    path.write_bytes(plan)
    if timing is not None:
        _write_beside(cache, bytes(timing.serialize()))


def _use_timings(config: trt.IBuilderConfig, cache: Path) -> trt.ITimingCache | None:
    """Give the builder the timings of earlier builds, or an empty cache to fill."""
    contents = [cache.read_bytes()] if cache.is_file() else []
    # A damaged cache gives None. One of another driver or power state is refused: start afresh
    # rather than trust other timings.
    for content in (*contents, b""):
        timing = config.create_timing_cache(content)
        if timing is not None and config.set_timing_cache(timing, ignore_mismatch=False):
            return timing
    return None


def _inspect(path: Path) -> Written:
    import tensorrt

    log = shared_logger()
    # Mapped, so that the plan's pages can be dropped while the engine is made from them.
    plan = np.memmap(path, np.uint8, mode="r")
    runtime = tensorrt.Runtime(log)
    engine = runtime.deserialize_cuda_engine(plan)
    if engine is None:
        raise BuildError(f"{path.name}: TensorRT cannot load what it built: {last_error(log)}")
    inspector = engine.create_engine_inspector()
    return Written(
        report=inspector.get_engine_information(tensorrt.LayerInformationFormat.JSON),
        scratch_bytes=int(engine.device_memory_size_v2),
    )


def _mark(network: trt.INetworkDefinition, debug: Collection[str]) -> None:
    if not debug:
        return
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        for number in range(layer.num_outputs):
            tensor = layer.get_output(number)
            if tensor.name in debug and not network.mark_debug(tensor):
                raise BuildError(f"TensorRT cannot show {tensor.name}")


def _monitor(build: BuildProgress) -> trt.IProgressMonitor:
    import tensorrt

    class _Monitor(tensorrt.IProgressMonitor):
        def __init__(self) -> None:
            tensorrt.IProgressMonitor.__init__(self)

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            build.phase_start(phase_name, parent_phase, num_steps)

        def step_complete(self, phase_name: str, step: int) -> bool:
            del step
            return build.step_complete(phase_name)

        def phase_finish(self, phase_name: str) -> None:
            build.phase_finish(phase_name)

    return _Monitor()


def _parser_errors(parser: trt.OnnxParser, log: trt.ILogger) -> str:
    found = [parser.get_error(i) for i in range(parser.num_errors)]
    if not found:
        return f"TensorRT cannot parse it: {last_error(log)}"
    more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
    return f"TensorRT cannot parse {found[0].node_name()}: {found[0].desc()}{more}"


def _write_beside(path: Path, data: bytes) -> None:
    """Replace a file whole; a timing cache is shared by all builds of the device."""
    temporary = path.with_name(f".{path.name}.new")
    temporary.write_bytes(data)
    temporary.replace(path)
