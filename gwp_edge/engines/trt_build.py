"""Build TensorRT engines on the device that will run them. Not yet run on hardware.

Strongly typed networks from the bundle's native graphs: the types in the graph are the types that
compute. Nothing of the API that TensorRT 11 removed.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from gwp_edge.bundle import STAGES, Bundle, Stage, hash_file
from gwp_edge.engines.trt_cache import (
    SCHEMA,
    SCHEMA_VERSION,
    EngineFile,
    EngineKey,
    EngineRecord,
    building,
    engine_file,
    engines_root,
    make_key,
    timing_cache_file,
    write_record,
)
from gwp_edge.engines.trt_device import (
    DeviceFacts,
    PrimaryContext,
    last_error,
    make_logger,
    require_tensorrt,
)
from gwp_edge.engines.trt_gates import check_capability, check_tensorrt
from gwp_edge.engines.trt_progress import BuildProgress, run_interruptible
from gwp_edge.engines.trt_proof import Proof, parse_inspector, prove, require_proof, summarize
from gwp_edge.engines.trt_timing import judge_build
from gwp_edge.errors import BuildError, SpecError
from gwp_edge.planning.memory import WORKSPACE_BYTES, check_free, memory_plan

if TYPE_CHECKING:
    import tensorrt as trt


Progress = Callable[[str, int, int], None]
_LEVELS: Final = range(6)
_DEFAULT_LEVEL: Final = 3
_PERMILLE: Final = 1000
_MIN_WORKSPACE_BYTES: Final = 16 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildOptions:
    """What a user may decide about a build.

    Attributes:
        level: builder optimisation level, 0 (fast build) to 5 (fast engine).
        workspace_bytes: scratch that kernels may use.
        tf32: let float32 products round their operands to 10 bits; off, so that a layer that the
            manifest keeps in float32 is float32.
    """

    level: int = _DEFAULT_LEVEL
    workspace_bytes: int = WORKSPACE_BYTES
    tf32: bool = False

    def __post_init__(self) -> None:
        if self.level not in _LEVELS:
            raise SpecError(f"--level must be 0 to 5, got {self.level}")
        if self.workspace_bytes < _MIN_WORKSPACE_BYTES:
            raise SpecError(f"--workspace must be at least 16 MiB, got {self.workspace_bytes}")

    def flags(self) -> dict[str, str]:
        """Return what of it changes the engine."""
        return {
            "level": str(self.level),
            "workspace": str(self.workspace_bytes),
            "tf32": "on" if self.tf32 else "off",
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildResult:
    """What a build made."""

    folder: Path
    record: EngineRecord
    proofs: tuple[Proof, ...]
    seconds: float


def key_of(bundle: Bundle, facts: DeviceFacts, options: BuildOptions) -> EngineKey:
    """Return the key of a bundle's engines on a device."""
    return make_key(
        bundle,
        tensorrt=facts.tensorrt,
        compute_capability=facts.capability_text,
        device=facts.name,
        flags=options.flags(),
    )


def check_buildable(
    bundle: Bundle, facts: DeviceFacts, options: BuildOptions, free_bytes: int
) -> None:
    """Refuse what cannot become a good engine here, before anything is built.

    Raises:
        BuildError: format, version or memory; says what to do.
    """
    manifest = bundle.manifest
    check_tensorrt(manifest, facts.tensorrt)
    check_capability(manifest, facts.capability, facts.name)
    plan = memory_plan(manifest, workspace_bytes=options.workspace_bytes)
    check_free(
        "building",
        plan.build_bytes,
        free_bytes,
        "close the desktop and other programs, add swap on NVMe, lower --workspace, or export "
        "with a smaller --precision",
    )


def build_engines(
    bundle: Bundle, options: BuildOptions, progress: Progress | None = None
) -> BuildResult:
    """Build, prove and test the engines of a bundle; they appear whole or not at all.

    Raises:
        PerformanceIssue: TensorRT or PyCUDA is not here.
        BuildError: a gate refused, TensorRT failed, a layer fell back, or the golden output is
            not reproduced; nothing is left behind.
        KeyboardInterrupt: after Ctrl-C, with nothing left behind.
    """
    t_start = time.monotonic()
    tell = progress if progress is not None else _silent
    context = PrimaryContext()
    try:
        facts = context.facts()
        check_buildable(bundle, facts, options, context.free_bytes(facts))
    finally:
        context.close()
    key = key_of(bundle, facts, options)
    with building(bundle.root, key) as work:
        files: dict[Stage, EngineFile] = {}
        proofs: list[Proof] = []
        for stage in STAGES:
            files[stage], report = _build_one(bundle, stage, key, options, work, tell)
            proofs += prove(stage, bundle.manifest.precision.layers, parse_inspector(report))
        require_proof(proofs)
        tell("golden gate", 0, 1)
        # Imported late: running needs building's options.
        from gwp_edge.engines.trt_golden import golden_gate

        golden = golden_gate(bundle, work, options)
        tell("golden gate", 1, 1)
        record = EngineRecord(
            schema=SCHEMA,
            schema_version=SCHEMA_VERSION,
            key=key,
            bundle_id=bundle.manifest.bundle_id,
            created_at=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            files=files,
            proof=summarize(proofs),
            golden_error=golden.error,
            timing=judge_build(bundle.manifest, facts, golden.times_ns, tf32=options.tf32),
        )
        write_record(work, record)
    return BuildResult(
        folder=engines_root(bundle.root) / key.folder(),
        record=record,
        proofs=tuple(proofs),
        seconds=time.monotonic() - t_start,
    )


def _silent(stage: str, done: int, total: int) -> None:
    """Report to nobody."""


def _build_one(
    bundle: Bundle,
    stage: Stage,
    key: EngineKey,
    options: BuildOptions,
    work: Path,
    tell: Progress,
) -> tuple[EngineFile, str]:
    """Build one engine into ``work``; return its entry and the inspector's report."""
    t_start = time.monotonic()

    def report(fraction: float) -> None:
        tell(f"build {stage}", round(fraction * _PERMILLE), _PERMILLE)

    report(0.0)
    build = BuildProgress(report=report)
    graph = bundle.file(getattr(bundle.manifest.graphs["native"], stage))
    cache = timing_cache_file(bundle.root, key)
    path = engine_file(work, stage)
    text = run_interruptible(lambda: _in_thread(graph, path, cache, options, build), build.cancel)
    entry = EngineFile(
        sha256=hash_file(path), n_bytes=path.stat().st_size, build_s=time.monotonic() - t_start
    )
    return entry, text


def _in_thread(
    graph: Path, path: Path, cache: Path, options: BuildOptions, build: BuildProgress
) -> str:
    """Run in the builder's thread: a CUDA context belongs to a thread."""
    context = PrimaryContext()
    try:
        return _serialize(graph, path, cache, options, build)
    finally:
        context.close()


def _serialize(
    graph: Path, path: Path, cache: Path, options: BuildOptions, build: BuildProgress
) -> str:
    require_tensorrt()
    import tensorrt

    log = make_logger()
    builder = tensorrt.Builder(log)
    network = builder.create_network(
        1 << int(tensorrt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    )
    parser = tensorrt.OnnxParser(network, log)
    # From the file, so that the weights beside it are found; nothing is read into Python.
    if not parser.parse_from_file(str(graph)):
        raise BuildError(f"{graph}: {_parser_errors(parser, log)}")
    config = builder.create_builder_config()
    config.set_memory_pool_limit(tensorrt.MemoryPoolType.WORKSPACE, options.workspace_bytes)
    config.builder_optimization_level = options.level
    config.profiling_verbosity = tensorrt.ProfilingVerbosity.DETAILED
    if not options.tf32:
        config.clear_flag(tensorrt.BuilderFlag.TF32)
    # The monitor must outlive the builder's work, so it has a name.
    monitor = _monitor(build)
    config.progress_monitor = monitor
    timing = config.create_timing_cache(cache.read_bytes() if cache.is_file() else b"")
    if not config.set_timing_cache(timing, ignore_mismatch=False):
        # Of another driver or power state: start afresh rather than trust other timings.
        timing = config.create_timing_cache(b"")
        config.set_timing_cache(timing, ignore_mismatch=False)
    plan = builder.build_serialized_network(network, config)
    if build.is_cancelled:
        raise BuildError(f"{graph.name}: the build was cancelled")
    if plan is None:
        raise BuildError(f"{graph}: TensorRT cannot build it: {last_error(log)}")
    path.write_bytes(plan)
    _write_beside(cache, bytes(timing.serialize()))
    runtime = tensorrt.Runtime(log)
    engine = runtime.deserialize_cuda_engine(plan)
    if engine is None:
        raise BuildError(f"{graph}: TensorRT cannot load what it built: {last_error(log)}")
    inspector = engine.create_engine_inspector()
    return inspector.get_engine_information(tensorrt.LayerInformationFormat.JSON)


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
