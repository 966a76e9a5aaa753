"""Build TensorRT engines on the device that will run them. Not yet run on hardware.

Gates, three engines from the bundle's native graphs, proof of precision, golden gate; what comes
out is whole or nothing.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from gwp_edge.bundle import Bundle, hash_file
from gwp_edge.engines.trt_cache import (
    building,
    engine_file,
    engines_root,
    failure_file,
    timing_cache_file,
    write_failure,
)
from gwp_edge.engines.trt_device import DeviceFacts, PrimaryContext
from gwp_edge.engines.trt_gates import check_capability, check_tensorrt
from gwp_edge.engines.trt_golden import golden_gate
from gwp_edge.engines.trt_options import BuildOptions, key_of
from gwp_edge.engines.trt_progress import BuildProgress, run_interruptible
from gwp_edge.engines.trt_proof import (
    Proof,
    narrow_sums,
    parse_inspector,
    prove,
    require_proof,
    summarize,
)
from gwp_edge.engines.trt_record import (
    SCHEMA,
    SCHEMA_VERSION,
    EngineFile,
    EngineKey,
    EngineRecord,
    write_record,
)
from gwp_edge.engines.trt_serialize import Written, write_engine
from gwp_edge.engines.trt_timing import judge_build
from gwp_edge.errors import BuildError
from gwp_edge.manifest import STAGES, Stage
from gwp_edge.planning.memory import check_free, disk_swap_bytes, memory_plan
from gwp_edge.planning.memory_watch import MemoryWatch

Progress = Callable[[str, int, int], None]
_PERMILLE: Final = 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildResult:
    """What a build made."""

    folder: Path
    record: EngineRecord
    proofs: tuple[Proof, ...]
    seconds: float


def check_buildable(
    bundle: Bundle, facts: DeviceFacts, options: BuildOptions, free_bytes: int
) -> None:
    """Refuse what cannot become a good engine here, before anything is built.

    Raises:
        BuildError: format, version or memory; says what to do.
    """
    manifest = bundle.manifest
    check_tensorrt(facts.tensorrt)
    check_capability(manifest, facts.capability, facts.name)
    plan = memory_plan(manifest, workspace_bytes=options.workspace_bytes)
    # Swap counts for the host's copies of the weights alone, and where memory is shared alone: a
    # GPU of its own has told what it has free.
    swap_bytes = min(disk_swap_bytes(), plan.swappable_bytes) if facts.integrated else 0
    check_free(
        "building",
        plan.build_bytes,
        free_bytes + swap_bytes,
        "close the desktop and other programs, add swap on NVMe, lower --workspace, or export "
        "with a smaller --precision",
    )
    # Without workspace, of which the engines may turn out to need none: what is refused here could
    # not be loaded in any case, and swap does not help with that.
    least = memory_plan(manifest, workspace_bytes=0)
    check_free(
        "loading what would be built",
        least.load_bytes if facts.integrated else least.run_bytes,
        free_bytes,
        "close the desktop and other programs, or export with a smaller --precision",
    )


def build_engines(
    bundle: Bundle, options: BuildOptions, progress: Progress | None = None
) -> BuildResult:
    """Build, prove and test the engines of a bundle; they appear whole or not at all.

    Raises:
        PerformanceIssue: TensorRT or PyCUDA is not here.
        BuildError: a gate refused, TensorRT failed, a layer fell back, or the golden output is
            not reproduced; no engine is left behind, but a report of what was found.
        KeyboardInterrupt: after Ctrl-C, with nothing left behind.
    """
    t_start = time.monotonic()
    context = PrimaryContext()
    try:
        facts = context.facts()
        check_buildable(bundle, facts, options, context.free_bytes(facts))
    finally:
        context.close()
    build = _Build(bundle, facts, options, progress if progress is not None else _silent)
    try:
        with building(bundle.root, build.key) as work:
            record = build.run(work)
    except BuildError as e:
        if not build.summary:
            raise
        # Only the engines are deleted: what was learnt took minutes.
        path = write_failure(bundle.root, build.key, str(e), build.summary, build.proofs)
        raise BuildError(f"{e}; what was found: {path}") from e
    failure_file(bundle.root, build.key).unlink(missing_ok=True)
    return BuildResult(
        folder=engines_root(bundle.root) / build.key.folder(),
        record=record,
        proofs=tuple(build.proofs),
        seconds=time.monotonic() - t_start,
    )


def _silent(stage: str, done: int, total: int) -> None:
    """Report to nobody."""


class _Build:
    """One build and what it has found out so far. Threads: one owner."""

    def __init__(
        self, bundle: Bundle, facts: DeviceFacts, options: BuildOptions, tell: Progress
    ) -> None:
        self.bundle, self.facts, self.options, self.tell = bundle, facts, options, tell
        self.key: EngineKey = key_of(bundle, facts, options)
        self.proofs: list[Proof] = []
        self.summary: tuple[str, ...] = ()

    def run(self, work: Path) -> EngineRecord:
        """Build into ``work``; return the record, which is written there too."""
        manifest = self.bundle.manifest
        files: dict[Stage, EngineFile] = {}
        narrow: list[str] = []
        memory: dict[str, int] = {}
        for stage in STAGES:
            with MemoryWatch() as watch:
                files[stage], report = self._build_one(stage, work)
            memory[f"build {stage}"] = watch.peak_bytes
            layers = parse_inspector(report)
            self.proofs += prove(stage, manifest.precision.layers, layers)
            narrow += narrow_sums(stage, layers)
        self.summary = (*summarize(self.proofs), *narrow)
        require_proof(self.proofs, allow_unproven=self.options.allow_unproven)
        self.tell("golden gate", 0, 1)
        with MemoryWatch() as watch:
            golden = golden_gate(self.bundle, work, files, self._build_debug)
        memory["load and run"] = watch.peak_bytes
        self.tell("golden gate", 1, 1)
        record = EngineRecord(
            schema=SCHEMA,
            schema_version=SCHEMA_VERSION,
            key=self.key,
            bundle_id=manifest.bundle_id,
            created_at=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            files=files,
            proof=self.summary,
            not_as_asked=tuple(x for x in self.proofs if x.outcome != "as asked"),
            golden_error=golden.error,
            timing=judge_build(manifest, self.facts, golden.times_ns, tf32=self.options.tf32),
            memory=memory,
        )
        write_record(work, record)
        return record

    def _build_one(self, stage: Stage, work: Path) -> tuple[EngineFile, str]:
        """Build one engine into ``work``; return its entry and the inspector's report."""
        t_start = time.monotonic()
        path = engine_file(work, stage)
        written = self._write(stage, path, f"build {stage}", frozenset())
        entry = EngineFile(
            sha256=hash_file(path),
            n_bytes=path.stat().st_size,
            build_s=time.monotonic() - t_start,
            scratch_bytes=written.scratch_bytes,
        )
        return entry, written.report

    def _build_debug(self, stage: Stage, path: Path, names: frozenset[str]) -> None:
        """Build an engine that shows the values of ``names``, to find a fault."""
        self._write(stage, path, f"diagnose {stage}", names)

    def _write(self, stage: Stage, path: Path, title: str, debug: frozenset[str]) -> Written:
        def report(fraction: float) -> None:
            self.tell(title, round(fraction * _PERMILLE), _PERMILLE)

        report(0.0)
        build = BuildProgress(report=report)
        graph = self.bundle.file(getattr(self.bundle.manifest.graphs["native"], stage))
        cache = timing_cache_file(self.bundle.root, self.key)
        return run_interruptible(
            lambda: write_engine(graph, path, cache, self.options, build, debug), build.cancel
        )
