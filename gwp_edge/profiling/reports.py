"""Reports of profile and bench: read back, and what differs between two besides their times."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

import msgspec
import numpy as np

from gwp_edge import bench
from gwp_edge.bench import BenchReport
from gwp_edge.errors import SpecError
from gwp_edge.profiling import schema
from gwp_edge.profiling.schema import ProfileReport

Report = ProfileReport | BenchReport
_LAYOUTS: Final[dict[tuple[str, int], type[Report]]] = {
    (schema.SCHEMA, schema.SCHEMA_VERSION): ProfileReport,
    (bench.SCHEMA, bench.SCHEMA_VERSION): BenchReport,
}


def read_report(path: Path) -> Report:
    """Read a profile or a bench.

    Raises:
        SpecError: it is not there, neither of them, or of another layout.
    """
    try:
        data = path.read_bytes()
    except OSError as e:
        raise SpecError(f"{path}: cannot be read: {e.strerror}") from e
    try:
        head = msgspec.json.decode(data)
        schema, version = head["schema"], head["schema_version"]
    except (msgspec.DecodeError, KeyError, TypeError, UnicodeDecodeError) as e:
        raise SpecError(
            f"{path}: is no report; make one with gwp-edge profile --json, or bench --json-file"
        ) from e
    layout = _LAYOUTS.get((schema, version))
    if layout is None:
        known = ", ".join(f"{name!r} {number}" for name, number in _LAYOUTS)
        raise SpecError(f"{path}: is {schema!r} version {version!r}, expected one of {known}")
    try:
        return msgspec.json.decode(data, type=layout)
    except (msgspec.ValidationError, msgspec.DecodeError) as e:
        raise SpecError(f"{path}: {e}; measure again with this gwp-edge") from e


def differs_in(before: Report, after: Report) -> list[str]:
    """Return what else differs between two reports and may explain a difference of times."""
    found = []
    if before.schema != after.schema:
        found.append(f"kind: {before.schema} and {after.schema}")
    for name in (
        "robot", "bundle_id", "precision", "engine", "provider", "threads", "n_steps", "motor_hz",
        "execution", "disturbances", "watched_by", "power_mode", "duration_s", "warmup_s", "repeat",
    ):  # fmt: skip
        a, b = getattr(before.context, name), getattr(after.context, name)
        if a != b:
            found.append(f"{name}: {a} and {b}")
    for name in ("cpu", "n_cpus", "governor", "system", "versions", "commit"):
        a, b = getattr(before.context.machine, name), getattr(after.context.machine, name)
        if a != b:
            found.append(f"{name}: {a} and {b}")
    for name, least, kind in _LOADS:
        a, b = _state(before, name), _state(after, name)
        if a is not None and b is not None and abs(a - b) > least * (abs(a) if kind == "%" else 1):
            found.append(f"{name}: {a:.1f} and {b:.1f}")
    return found


# What a machine is like for the moment, and from which difference on it is told: a share of the
# first, or that much.
_LOADS: Final = (
    ("load before", 0.5, "abs"),
    ("other programs, % of a core", 10.0, "abs"),
    ("core clock, MHz", 0.03, "%"),
    ("temperature, C", 5.0, "abs"),
)


def _state(report: Report, name: str) -> float | None:
    machine = report.context.machine
    system = report.system if isinstance(report, ProfileReport) else None
    if name == "load before":
        return machine.load_average[0]
    if name == "other programs, % of a core":
        return system.load.others_percent if system is not None and system.load else None
    if name == "temperature, C":
        return machine.temperature_c
    # Clocks while it ran say more than the one before.
    clocks = [
        v
        for column, values in (system.columns if system is not None else {}).items()
        if re.fullmatch(r"cpu\d+_mhz", column)
        for v in values
        if v is not None
    ]
    return float(np.median(clocks)) if clocks else machine.clock_mhz
