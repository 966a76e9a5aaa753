"""How chunks follow each other: what ``run`` and ``profile`` alike are asked."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from gwp_edge.errors import SpecError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from gwp_edge.chunking import Method
    from gwp_edge.schedule import Blend

# Checks whose failure is told and passed over where no arm can be harmed.
ADVISORY_IN_SIMULATION = frozenset({"statistics", "first action", "calibration"})
# Every line that some run has, besides one for each bus; which of them, the run itself finds out.
CHECKS = ADVISORY_IN_SIMULATION | {
    *("bundle", "engine", "golden", "latency", "memory", "cameras", "camera pictures"),
    *("arm", "workspace", "can names", "can receivers"),
    *("power mode", "cpu clocks", "gpu clocks", "throttling"),
}

ExecutionOption = Annotated[
    str,
    typer.Option(
        "--execution",
        help="How chunks follow each other: soft, hard, identity (real-time chunking), "
        "naive, ensemble, sync.",
    ),
]
LeadOption = Annotated[
    float, typer.Option("--lead-ms", help="Lag of the arm: how far ahead to command.")
]
WarmStartOption = Annotated[
    float, typer.Option("--warm-start", help="Start denoising at this sigma, 0 to 1.")
]

# Guidance inside the network, blend between plans, synchronous.
_EXECUTIONS: dict[str, tuple[Method, Blend, bool]] = {
    "soft": ("soft", "seam", False),
    "hard": ("hard", "seam", False),
    "identity": ("identity", "seam", False),
    "naive": ("none", "seam", False),
    "ensemble": ("none", "ensemble", False),
    "sync": ("none", "none", True),
}


def lead_ns_of(lead_ms: float) -> int:
    """Return ``--lead-ms`` in ns.

    Raises:
        SpecError: not a lag that an arm can have.
    """
    if not 0.0 <= lead_ms <= 1000.0:
        raise SpecError(f"--lead-ms: expected 0 to 1000 ms, got {lead_ms:g}; gwp-edge lag finds it")
    return round(lead_ms * 1e6)


def find_skipped(names: Sequence[str] | None) -> frozenset[str]:
    """Return the checks that ``--skip-check`` names, before a process is started.

    Raises:
        SpecError: no run has a check of this name.
    """
    for name in names or ():
        if name not in CHECKS and not name.startswith("can "):
            raise SpecError(
                f"--skip-check {name}: no check is called so; they are "
                f"{', '.join(sorted(CHECKS))}, can INTERFACE"
            )
    return frozenset(names or ())


def find_execution(name: str) -> tuple[Method, Blend, bool]:
    """Return guidance method, blend between plans, and whether planning waits for the arm.

    Raises:
        SpecError: there is none of this name.
    """
    if name not in _EXECUTIONS:
        raise SpecError(f"--execution {name} is not known; choose from {', '.join(_EXECUTIONS)}")
    return _EXECUTIONS[name]
