"""Hold a bench report to the budgets of a file."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path

from gwp_edge.bench import BenchReport
from gwp_edge.errors import SpecError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


def read_budgets(path: Path) -> dict[str, object]:
    """Read a budgets file.

    Raises:
        SpecError: it is not there, or not TOML.
    """
    try:
        table: dict[str, object] = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as e:
        raise SpecError(f"{path}: cannot be read: {e.strerror}") from e
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as e:
        raise SpecError(f"{path}: is not TOML: {e}") from e
    return table


def check_budgets(report: BenchReport, budgets: Mapping[str, object]) -> list[str]:
    """Return one line for every budget that the report misses.

    Args:
        report: a measurement.
        budgets: table ``bench`` of a budgets file, which has ``size``, ``precision``, ``threads``
            and the limits for each family.

    Raises:
        SpecError: there are no budgets for what was measured; they would say nothing about it.
    """
    table = budgets.get("bench")
    entry = table.get(report.family) if isinstance(table, Mapping) else None
    if not isinstance(entry, Mapping):
        raise SpecError(f'budgets: no table [bench."{report.family}"]')
    measured: dict[str, object] = {
        "size": report.size,
        "precision": report.context.precision,
        "provider": report.context.provider,
        "threads": report.limits.threads,
    }
    for name, given in measured.items():
        if entry.get(name) != given:
            raise SpecError(
                f"budgets: those of {report.family} are for {name} {entry.get(name)!r}, "
                f"but {given!r} was measured; run bench with that"
            )
    values: dict[str, float | None] = {
        "max_ratio_to_eager": report.eager.ratio if report.eager else None,
        "max_ratio_to_gemm_floor": report.chunk.ratio_to_gemm_floor,
        "max_difference_from_eager": report.eager.largest_difference if report.eager else None,
    }
    unknown = sorted(set(entry) - set(values) - set(measured))
    if unknown:
        raise SpecError(f"budgets: {report.family} has the unknown entry {unknown[0]}")
    missed = []
    for name, value in values.items():
        limit = entry.get(name)
        if not isinstance(limit, (int, float)):
            raise SpecError(f"budgets: {report.family} has no number {name}")
        if value is None:
            missed.append(f"{name}: not measured, run bench with the eager baseline")
        elif not value <= limit:
            missed.append(f"{name}: {value:.3g}, at most {limit:.3g} is allowed")
    return missed
