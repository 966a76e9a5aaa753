"""Which precisions a target can compute, said before an hour of calibration."""

from __future__ import annotations

from collections.abc import Mapping

from gwp_edge.errors import SpecError
from gwp_edge.export.precision import PRECISIONS, Format

_WITHOUT_FP8 = tuple(p for p in PRECISIONS if p != "fp8")
# Compute capability 8.7 (Orin) is Ampere; FP8 units came with 8.9 (Ada) and 9.0 (Hopper).
TARGETS: Mapping[str, tuple[Format, ...]] = {
    "cpu": PRECISIONS,
    "orin": _WITHOUT_FP8,
    "ampere": _WITHOUT_FP8,
    "ada": PRECISIONS,
    "hopper": PRECISIONS,
    "thor": PRECISIONS,
    "blackwell": PRECISIONS,
}


def check_target_precision(target: str, precision: str) -> None:
    """Refuse a precision that the target has no units for.

    Raises:
        SpecError: an unknown target, or a precision it cannot compute; says which it can.
    """
    if target not in TARGETS:
        raise SpecError(f"--target {target} is not known; choose from {', '.join(TARGETS)}")
    if precision not in TARGETS[target]:
        raise SpecError(
            f"--target {target}: has no {precision.upper()} units; use --precision int8, which it "
            "has"
        )
