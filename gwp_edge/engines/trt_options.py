"""What a user may decide about a build of TensorRT engines. Needs no GPU."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from gwp_edge.bundle import Bundle
from gwp_edge.engines.trt_device import DeviceFacts
from gwp_edge.engines.trt_record import EngineKey, make_key
from gwp_edge.errors import SpecError
from gwp_edge.planning.memory import WORKSPACE_BYTES

_LEVELS: Final = range(6)
_DEFAULT_LEVEL: Final = 3
_MIN_WORKSPACE_BYTES: Final = 16 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildOptions:
    """What a user may decide about a build.

    Attributes:
        level: builder optimisation level, 0 (fast build) to 5 (fast engine).
        workspace_bytes: scratch that kernels may use.
        tf32: let float32 products round their operands to 10 bits; off, so that a layer that the
            manifest keeps in float32 is float32.
        allow_unproven: accept quantized layers that the inspector does not show; changes what is
            accepted, not the engine.
    """

    level: int = _DEFAULT_LEVEL
    workspace_bytes: int = WORKSPACE_BYTES
    tf32: bool = False
    allow_unproven: bool = False

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


def key_of(bundle: Bundle, facts: DeviceFacts, options: BuildOptions) -> EngineKey:
    """Return the key of a bundle's engines on a device."""
    return make_key(bundle, facts, options.flags())
