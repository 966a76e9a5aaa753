"""What built engines were built for, and what was found out about them. Needs no GPU.

An engine fits exactly one graph, one TensorRT, one GPU and one set of flags.
"""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Final

import msgspec

from gwp_edge.bundle import Bundle
from gwp_edge.engines.trt_device import DeviceFacts
from gwp_edge.engines.trt_proof import Proof
from gwp_edge.engines.trt_timing import StageTiming
from gwp_edge.errors import BuildError, SpecError
from gwp_edge.manifest import STAGES, Stage

SCHEMA: Final = "gwp-edge.engines"
SCHEMA_VERSION: Final = 2
RECORD: Final = "build.json"
_DIGEST_CHARS: Final = 12


class EngineKey(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What an engine is good for.

    Attributes:
        graphs: SHA-256 of each stage's native graph.
        weights: SHA-256 of the weight file.
        precision: precision of the bundle.
        tensorrt: version that built it; engines are not portable between versions.
        compute_capability: of the GPU, such as ``8.7``.
        device: name of the GPU.
        n_multiprocessors: of the GPU: every Orin is called Orin, with 4 to 16 of them.
        board: what the system calls the machine, empty where it does not say.
        flags: builder options that change the engine.
    """

    graphs: dict[str, str]
    weights: str
    precision: str
    tensorrt: str
    compute_capability: str
    device: str
    n_multiprocessors: int
    board: str
    flags: dict[str, str]

    def digest(self) -> str:
        """Return a short name for everything in the key."""
        content = json.dumps(msgspec.to_builtins(self), sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()[:_DIGEST_CHARS]

    def folder(self) -> str:
        """Return the folder name, readable first."""
        device = re.sub(r"[^a-z0-9]+", "-", self.device.lower()).strip("-")
        return f"{device}-sm{self.compute_capability.replace('.', '')}-{self.digest()}"

    def differences(self, other: EngineKey) -> tuple[str, ...]:
        """Say what of ``other`` (an engine) differs from this key (what is wanted)."""
        found = [
            f"{label} {theirs!r} instead of {ours!r}"
            for label, ours, theirs in (
                ("TensorRT", self.tensorrt, other.tensorrt),
                ("GPU", self.device, other.device),
                ("multiprocessors", self.n_multiprocessors, other.n_multiprocessors),
                ("board", self.board, other.board),
                ("compute capability", self.compute_capability, other.compute_capability),
                ("precision", self.precision, other.precision),
            )
            if ours != theirs
        ]
        for stage, sha in self.graphs.items():
            if other.graphs.get(stage) != sha:
                found.append(f"another {stage} graph")
        if self.weights != other.weights:
            found.append("other weights")
        for flag in sorted({*self.flags, *other.flags}):
            ours, theirs = self.flags.get(flag, "unset"), other.flags.get(flag, "unset")
            if ours != theirs:
                found.append(f"flag {flag} {theirs} instead of {ours}")
        return tuple(found)


class EngineFile(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One engine on disk; ``scratch_bytes`` is the device memory that a pass of it needs."""

    sha256: str
    n_bytes: int
    build_s: float
    scratch_bytes: int


class EngineRecord(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The content of build.json.

    Attributes:
        schema: always ``gwp-edge.engines``.
        schema_version: of this layout.
        key: what the engines are for.
        bundle_id: of the bundle they were built from.
        created_at: UTC, ISO 8601.
        files: by stage.
        proof: lines of the precision report.
        not_as_asked: every layer that fell back or is not shown, with what it runs as.
        golden_error: largest distance from the golden actions, rad and m.
        timing: measured stage times against the planner's.
        memory: by what was done, such as ``build prefill``: by how many bytes the machine's free
            memory fell meanwhile at most.
    """

    schema: str
    schema_version: int
    key: EngineKey
    bundle_id: str
    created_at: str
    files: dict[Stage, EngineFile]
    proof: tuple[str, ...]
    not_as_asked: tuple[Proof, ...] = ()
    golden_error: float | None
    timing: tuple[StageTiming, ...] = ()
    memory: dict[str, int] = {}


class _Head(msgspec.Struct, frozen=True, kw_only=True):
    schema: str
    schema_version: int


def make_key(bundle: Bundle, facts: DeviceFacts, flags: dict[str, str]) -> EngineKey:
    """Return the key of a bundle's engines on a device."""
    manifest = bundle.manifest
    if "native" not in manifest.graphs:
        raise SpecError(f"{bundle.root}: has no native graphs; export the policy again")
    names = {stage: getattr(manifest.graphs["native"], stage) for stage in STAGES}
    return EngineKey(
        graphs={stage: manifest.files[name].sha256 for stage, name in names.items()},
        weights=manifest.files[manifest.weights].sha256,
        precision=manifest.precision.name,
        tensorrt=facts.tensorrt,
        compute_capability=facts.capability_text,
        device=facts.name,
        n_multiprocessors=facts.n_multiprocessors,
        board=facts.board,
        flags=flags,
    )


def read_record(folder: Path) -> EngineRecord:
    """Read what a folder of engines says about itself.

    Raises:
        BuildError: it says nothing readable, or was written by another version.
    """
    path = folder / RECORD
    try:
        text = path.read_bytes()
        head = msgspec.json.decode(text, type=_Head)
        if (head.schema, head.schema_version) != (SCHEMA, SCHEMA_VERSION):
            raise BuildError(
                f"{path}: layout {head.schema} {head.schema_version}, this gwp-edge reads "
                f"{SCHEMA} {SCHEMA_VERSION}; build again"
            )
        return msgspec.json.decode(text, type=EngineRecord)
    except OSError as e:
        raise BuildError(f"{path}: {e.strerror}; run: gwp-edge build --clean") from e
    except (msgspec.DecodeError, UnicodeDecodeError) as e:
        raise BuildError(f"{path}: {e}; run: gwp-edge build --clean") from e


def write_record(folder: Path, record: EngineRecord) -> None:
    """Write build.json into a folder under construction."""
    text = json.dumps(msgspec.to_builtins(record), indent=1)
    (folder / RECORD).write_text(text + "\n", encoding="utf-8")
