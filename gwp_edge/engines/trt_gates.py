"""What is refused before and after a build. Needs no GPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Final

import numpy as np

from gwp_edge.errors import BuildError, SpecError
from gwp_edge.manifest import Manifest

if TYPE_CHECKING:
    from gwp_edge.types import FloatArray

Capability = tuple[int, int]

# First compute capability with tensor cores for a format; int8 and fp16 are everywhere.
_FIRST_CAPABILITY: Final[dict[str, Capability]] = {"bf16": (8, 0), "fp8": (8, 9)}
_OLDEST: Final[Capability] = (7, 5)
TENSORRT_MAJOR: Final = 10
# The oldest that the stubs in typings/ were compared with; pyproject.toml asks pip for it as well.
TENSORRT_OLDEST: Final = (10, 3)
# An answer to other noise must be further away than this many tolerances.
_WRONG_SEED_FACTOR: Final = 2.0


def parse_capability(text: str) -> Capability:
    """Return ``8.7`` as (8, 7)."""
    major, _, minor = text.partition(".")
    try:
        return int(major), int(minor)
    except ValueError:
        raise SpecError(f"compute capability {text!r}: expected two numbers as 8.7") from None


def check_capability(manifest: Manifest, capability: Capability, device: str) -> None:
    """Refuse formats that the GPU has no units for.

    Raises:
        BuildError: a layer's format needs a newer GPU; says what to export instead.
    """
    sm = f"SM{capability[0]}{capability[1]}"
    if capability < _OLDEST:
        raise BuildError(f"{device} ({sm}): TensorRT 10 needs SM75 or newer; use --engine ort")
    for layer in manifest.precision.layers:
        first = _FIRST_CAPABILITY.get(layer.format)
        if first is not None and capability < first:
            instead = "int8" if layer.format == "fp8" else "fp16"
            raise BuildError(
                f"{device} ({sm}) has no {layer.format} units (SM{first[0]}{first[1]} and newer "
                f"have), {layer.stage} {layer.name} asks for them; export with --precision "
                f"{instead}"
            )


def tensorrt_problem(version: str) -> tuple[str, str] | None:
    """Return what is expected instead of ``version`` and how to get it; None where it fits."""
    numbers = tuple(int(part) for part in version.split(".")[:2] if part.isdigit())
    if len(numbers) == 2 and numbers[0] == TENSORRT_MAJOR and numbers >= TENSORRT_OLDEST:
        return None
    oldest = ".".join(map(str, TENSORRT_OLDEST))
    return (
        f"{TENSORRT_MAJOR}.x from {oldest} on",
        f"install JetPack 6.1 to 7.2 on a Jetson, elsewhere: pip install "
        f"'tensorrt>={oldest},<{TENSORRT_MAJOR + 1}'",
    )


def check_tensorrt(version: str) -> None:
    """Refuse a TensorRT that this code is not written for.

    Raises:
        BuildError: another major version, or one older than ``TENSORRT_OLDEST``.
    """
    problem = tensorrt_problem(version)
    if problem is not None:
        raise BuildError(
            f"TensorRT {version} is installed, this gwp-edge needs {problem[0]}; {problem[1]}"
        )


def judge_golden(
    *,
    answer: FloatArray,
    wanted: FloatArray,
    other_seed: FloatArray,
    tolerance: float,
    blame: Callable[[], str],
) -> float:
    """Return the error of an engine's golden answer, rad and m.

    Args:
        answer: actions for the golden input, (H, D).
        wanted: golden actions, (H, D).
        other_seed: actions for the same input and other noise, (H, D).
        tolerance: allowed distance, rad and m.
        blame: says what is at fault; asked only where the answer is off.

    Raises:
        BuildError: the answer is off, or would be accepted with other noise as well.
    """
    error = np.abs(answer - wanted)
    if not np.isfinite(answer).all() or error.max() > tolerance:
        seen = float(error.max()) if np.isfinite(error).all() else float("nan")
        raise BuildError(
            f"the engines do not reproduce the golden output: off by {seen:.3g}, allowed "
            f"{tolerance:.3g}; {blame()}; they were deleted"
        )
    distance = float(np.abs(other_seed - wanted).max())
    if not distance > _WRONG_SEED_FACTOR * tolerance:
        raise BuildError(
            f"other noise moves the golden answer by {distance:.3g} only, tolerance "
            f"{tolerance:.3g}: the check proves nothing, the noise may not reach the network; "
            "the engines were deleted"
        )
    return float(error.max())


def judge_replay(replayed: FloatArray, stages: FloatArray, tolerance: float) -> None:
    """Compare the actions of a replayed graph with those of its stages, rad and m, (H, D).

    Raises:
        BuildError: they differ by more than ``tolerance``.
    """
    distance = float(np.abs(replayed - stages).max())
    if not distance <= tolerance:
        raise BuildError(
            f"the chunk replayed as a CUDA graph differs from its stages by {distance:.3g}, "
            f"allowed {tolerance:.3g}; the engines were deleted; report TensorRT's version"
        )
