"""The manifest of a bundle: what ``manifest.json`` says, and how it is read.

It names every other file of the bundle with its size and SHA-256; ``docs/bundle-format.md``
describes the files.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import msgspec

from gwp_edge.errors import SpecError
from gwp_edge.spec import PolicySpec

SCHEMA = "gwp-edge.bundle"
SCHEMA_VERSION = 1
MANIFEST = "manifest.json"

Stage = Literal["vision", "prefill", "denoise"]
STAGES: tuple[Stage, ...] = ("vision", "prefill", "denoise")


class FileEntry(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Size and hash of one file."""

    sha256: str
    n_bytes: int


class GraphSet(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """File names of the three graphs in one form."""

    vision: str
    prefill: str
    denoise: str


class Layer(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One layer of one stage.

    Attributes:
        stage: where it runs.
        name: its name in the checkpoint; products of activations end in ``qk`` or ``pv``.
        format: what it computes in.
        reason: why.
        flops: operations in one pass, a multiply-add counted as two.
        weight_bytes: weights read in one pass.
    """

    stage: Stage
    name: str
    format: str
    reason: str
    flops: int
    weight_bytes: int


class Precision(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What computes in which format, and why.

    Attributes:
        name: precision of the bundle as asked for.
        cache: format of prefix and prompt K/V.
        layers: every layer that carries weights or multiplies activations.
        ranges: safetensors file with what quantization followed from: clipping thresholds, mean
            inputs, folded factors and ranges by step; None where nothing is quantized. No engine
            reads it: the graphs hold the resulting scales.
    """

    name: str
    cache: str
    layers: tuple[Layer, ...]
    ranges: str | None = None


class ChannelError(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Action error of a group of channels; rad for joints, m for grippers."""

    mean: float
    p50: float
    p99: float
    max: float


class MeasuredError(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Error of this bundle's arithmetic against the float32 reference, same noise.

    Attributes:
        inputs: what it was measured on.
        n_chunks: how many chunks.
        joints_rad: joints, or None where the robot has none.
        grippers_m: grippers, or None where the robot has none.
    """

    inputs: str
    n_chunks: int
    joints_rad: ChannelError | None
    grippers_m: ChannelError | None


class CurvePoint(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A recipe that the budget search measured.

    Attributes:
        quantized_share: quantized bytes as a share of all that could be.
        joints_rad_p99: 99th percentile of the error of joints; None where there are none.
        grippers_m_p99: the same of grippers.
    """

    quantized_share: float
    joints_rad_p99: float | None
    grippers_m_p99: float | None


class CalibrationSample(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One frame that ranges come from, by place and by content.

    ``sha256`` is 32 digits of the SHA-256 of its motion, then 32 of that of its pictures; see
    ``calibration/sampling.py``.
    """

    dataset: str
    episode: int
    frame: int
    sha256: str


class UnitCost(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What quantizing one layer or group of layers alone costs and saves.

    Attributes:
        name: layer or group.
        format: the format that was tried.
        is_quantized: it computes in that format in this bundle.
        joints_rad_p99: 99th percentile of the error of joints; None where there are none.
        grippers_m_p99: the same of grippers.
        saved_bytes: of weights, by quantizing it.
        flops: operations in one chunk that then run in the cheaper format.
    """

    name: str
    format: str
    is_quantized: bool
    joints_rad_p99: float | None
    grippers_m_p99: float | None
    saved_bytes: int
    flops: int


class Calibration(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How a bundle was calibrated.

    Attributes:
        dataset: name of the dataset.
        n_samples: samples that the ranges come from.
        samples: all of them.
        samples_sha256: hash over place and content of every one of them.
        record_sha256: hash of the calibration record.
        seed: of the choice of samples and of the noise.
        is_synthetic: the dataset was not recorded on a robot.
        observer: how ranges follow from what was seen.
        is_smoothed: factors of channels were folded into weights and tables.
        budget_rad: largest allowed 99th percentile of the joints' error; None without a search.
        budget_m: the same of grippers.
        curve: recipes that the search measured, most quantized first.
        sensitivity: what each part alone costs, in the order of the network; empty where the
            whole fits the budget at once, or no search was asked for.
    """

    dataset: str
    n_samples: int
    samples: tuple[CalibrationSample, ...]
    samples_sha256: str
    record_sha256: str
    seed: int
    is_synthetic: bool
    observer: str
    is_smoothed: bool
    budget_rad: float | None
    budget_m: float | None
    curve: tuple[CurvePoint, ...]
    sensitivity: tuple[UnitCost, ...] = ()


class Golden(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """An input and what the bundle must answer to it.

    Attributes:
        file: safetensors with ``canvas``, ``state``, ``noise``, ``latent``, ``actions`` (what
            this bundle's arithmetic answers) and ``actions_reference`` (float32).
        task: prompt it was made with.
        tolerance: largest allowed difference of any action from ``actions``, rad and m.
        checked_with: engines that reproduced it at export.
    """

    file: str
    task: str
    tolerance: float
    checked_with: tuple[str, ...]


class Provenance(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where a bundle comes from.

    Attributes:
        gwp_edge: version that wrote it.
        created_at: UTC, ISO 8601.
        checkpoint: SHA-256 of each source file by name.
        libraries: versions that took part.
        unused: checkpoint tensors that the action path does not need, by reason: how many.
        notes: anything a user must know, such as synthetic calibration data.
    """

    gwp_edge: str
    created_at: str
    checkpoint: dict[str, str]
    libraries: dict[str, str]
    unused: dict[str, int]
    notes: tuple[str, ...]


class Manifest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The content of manifest.json.

    Attributes:
        schema: always ``gwp-edge.bundle``.
        schema_version: of this layout.
        bundle_id: hash over spec and files; equal inputs give equal ids.
        spec: the policy.
        precision: formats of every layer.
        graphs: graph files by form, ``native`` or ``portable``.
        prompts: prompt cache file of each task.
        tables: safetensors file with the modulation of every step.
        weights: the weight file that all graphs share.
        golden: the self-test.
        error: measured error against float32.
        files: every file but the manifest.
        provenance: origin.
        calibration: how ranges were found; None where no activation was looked at.
    """

    schema: str
    schema_version: int
    bundle_id: str
    spec: PolicySpec
    precision: Precision
    graphs: dict[Literal["native", "portable"], GraphSet]
    prompts: dict[str, str]
    tables: str
    weights: str
    golden: Golden
    error: MeasuredError
    files: dict[str, FileEntry]
    provenance: Provenance
    calibration: Calibration | None = None


def bundle_id(spec: PolicySpec, files: Mapping[str, FileEntry]) -> str:
    """Return the identity of a bundle: a hash over its spec and its files."""
    content = {"spec": msgspec.to_builtins(spec), "files": {k: v.sha256 for k, v in files.items()}}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def read_manifest(path: Path | str) -> Manifest:
    """Return the manifest of a bundle without checking its other files.

    Raises:
        SpecError: not a bundle, or a newer layout.
    """
    root = Path(path)
    if not root.exists():
        raise SpecError(f"{root}: no such bundle; make one with: gwp-edge export CHECKPOINT")
    if root.is_file():
        raise SpecError(f"{root}: is a file; name the folder of a bundle")
    path = root / MANIFEST
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise SpecError(
            f"{root}: has no {MANIFEST}, so it is not a bundle; "
            "make one with: gwp-edge export CHECKPOINT"
        ) from None
    except OSError as e:
        raise SpecError(f"{root}: cannot read {MANIFEST}: {e.strerror}") from e
    try:
        head = msgspec.json.decode(data)
        schema, version = head["schema"], head["schema_version"]
    except (msgspec.DecodeError, KeyError, TypeError, UnicodeDecodeError) as e:
        raise SpecError(f"{path}: is not a gwp-edge manifest; export the policy again") from e
    if schema != SCHEMA:
        raise SpecError(f"{path}: schema is {schema!r}, expected {SCHEMA!r}")
    if version != SCHEMA_VERSION:
        raise SpecError(
            f"{path}: layout version {version!r}, this gwp-edge reads {SCHEMA_VERSION}; "
            "export the policy again or install the matching gwp-edge"
        )
    try:
        return msgspec.json.decode(data, type=Manifest)
    except (msgspec.ValidationError, msgspec.DecodeError) as e:
        raise SpecError(f"{path}: {e}; export the policy again") from e


def read_spec(path: Path | str) -> PolicySpec:
    """Return the spec of a bundle without checking its other files.

    For checking a user's input early; nothing is run on it.

    Raises:
        SpecError: not a bundle, or a newer layout.
    """
    return read_manifest(path).spec


def referenced_files(manifest: Manifest) -> set[str]:
    """Return the names of the files that a manifest's fields refer to."""
    names = {manifest.tables, manifest.weights, manifest.golden.file, *manifest.prompts.values()}
    if manifest.precision.ranges is not None:
        names.add(manifest.precision.ranges)
    for graphs in manifest.graphs.values():
        names |= {graphs.vision, graphs.prefill, graphs.denoise}
    return names
