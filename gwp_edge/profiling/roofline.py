"""Stages against what this machine can do at best, as ``gwp-edge bench`` measures it."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np

from gwp_edge.bench import against_roof, judge, stage_costs
from gwp_edge.machine_limits import Limits, Machine, measure_limits
from gwp_edge.manifest import STAGES, Manifest
from gwp_edge.profiling.chunks import ChunkTable
from gwp_edge.profiling.schema import Roofline, RooflineStage
from gwp_edge.types import FloatArray

_VERSION = 2
NO_LIMITS_ELSEWHERE = (
    "limits are measured by products through ONNX Runtime on the processor, and this engine runs "
    "elsewhere, where nothing here has measured any; gwp-edge plan models its floors"
)


def cached_limits(
    machine: Machine,
    threads: int,
    *,
    again: bool = False,
    progress: Callable[[str, int, int], None] | None = None,
) -> Limits:
    """Return this machine's limits, measured once and kept in the user's cache folder.

    They are measured again when processor, thread count, governor or ONNX Runtime change, or with
    ``again``. A cache that cannot be read or written costs a measurement, nothing else.
    """
    key = (_VERSION, machine.cpu, machine.n_cpus, machine.governor, machine.system, threads)
    text = repr((*key, machine.versions.get("onnxruntime")))
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gwp-edge"
    path = folder / f"limits-{hashlib.sha256(text.encode()).hexdigest()[:16]}.json"
    if not again:
        try:
            return msgspec.json.decode(path.read_bytes(), type=Limits)
        except (OSError, msgspec.DecodeError, msgspec.ValidationError):
            pass
    limits = measure_limits(threads, progress=progress)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(f".{os.getpid()}")
        part.write_bytes(msgspec.json.encode(limits))
        part.replace(path)
    except OSError:
        pass
    return limits


def roofline(steady: ChunkTable, manifest: Manifest, limits: Limits) -> Roofline:
    """Return every stage of the engine against its limits; ``denoise`` is all steps of a chunk."""
    costs = stage_costs(manifest)
    stages: dict[str, RooflineStage] = {}
    for stage in STAGES:
        times: FloatArray = steady.segment(stage)
        times = times[times > 0]
        if not len(times):
            continue
        cost = costs[stage]
        if stage == "denoise":
            cost = cost.times(round(float(np.median((~np.isnan(steady.steps)).sum(axis=1)))))
        report = judge([round(t * 1e6) for t in times], cost, limits)
        stages[stage] = against_roof(report)
    return Roofline(limits=limits, stages=stages)
