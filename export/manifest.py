"""The manifest of a bundle: formats and reasons of every layer, files and their hashes, origin."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import onnx_ir as ir
import torch

import gwp_edge
from gwp_edge.bundle import hash_file
from gwp_edge.calibration.applied_ranges import RANGES_FILE
from gwp_edge.export.graphs import WEIGHTS_FILE, Graph
from gwp_edge.export.inputs import Inputs, Progress, bytes_progress
from gwp_edge.export.precision import (
    cache_format,
)
from gwp_edge.manifest import (
    SCHEMA,
    SCHEMA_VERSION,
    FileEntry,
    Golden,
    GraphSet,
    Layer,
    Manifest,
    MeasuredError,
    Precision,
    Provenance,
    bundle_id,
)

TABLES_FILE = "tables.safetensors"


def graph_file(graph: Graph) -> str:
    """Return the file name of a graph."""
    return f"{graph.stage}.onnx" if graph.form == "native" else f"{graph.stage}.portable.onnx"


def hash_files(work: Path, known: Mapping[str, str], progress: Progress) -> dict[str, FileEntry]:
    """Return size and hash of every file; those in ``known`` were hashed while written."""
    sizes = {
        p.relative_to(work).as_posix(): p.stat().st_size
        for p in sorted(work.rglob("*"))
        if p.is_file()
    }
    total = sum(size for name, size in sizes.items() if name not in known)
    with bytes_progress(progress, "hash bundle", total) as advance:
        return {
            name: FileEntry(sha256=known.get(name) or hash_file(work / name, advance), n_bytes=size)
            for name, size in sizes.items()
        }


def make_manifest(
    inputs: Inputs,
    graphs: Sequence[Graph],
    prompts: dict[str, str],
    golden: Golden,
    error: MeasuredError,
    files: dict[str, FileEntry],
    sources: dict[str, str],
) -> Manifest:
    """Return the manifest of what was written."""
    return Manifest(
        schema=SCHEMA,
        schema_version=SCHEMA_VERSION,
        bundle_id=bundle_id(inputs.spec, files),
        spec=inputs.spec,
        precision=_precision(inputs, graphs),
        graphs={form: _graph_set(graphs, form) for form in dict.fromkeys(g.form for g in graphs)},
        prompts=prompts,
        tables=TABLES_FILE,
        weights=WEIGHTS_FILE,
        golden=golden,
        error=error,
        files=files,
        provenance=Provenance(
            gwp_edge=gwp_edge.__version__,
            created_at=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            checkpoint=sources,
            libraries={"torch": str(torch.__version__), "onnx_ir": str(ir.__version__)},
            unused=dict(inputs.unused),
            notes=inputs.quantized.notes if inputs.quantized else (),
        ),
        calibration=inputs.quantized.calibration if inputs.quantized else None,
    )


def _graph_set(graphs: Sequence[Graph], form: str) -> GraphSet:
    files = {g.stage: graph_file(g) for g in graphs if g.form == "native"}
    return GraphSet(**{**files, **{g.stage: graph_file(g) for g in graphs if g.form == form}})


def _precision(inputs: Inputs, graphs: Sequence[Graph]) -> Precision:
    recipe = inputs.recipe
    layers = tuple(
        Layer(
            stage=graph.stage,
            name=cost.name,
            format=cost.format,
            reason=recipe.explain(cost.name)[1],
            flops=cost.flops,
            weight_bytes=cost.weight_bytes,
        )
        for graph in graphs
        if graph.form == "native"
        for cost in graph.costs
    )
    return Precision(
        name=recipe.name,
        cache=cache_format(recipe),
        layers=layers,
        ranges=RANGES_FILE if inputs.quantized is not None else None,
    )
