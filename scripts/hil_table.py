"""What was measured on devices, as a table for people. Used by ``scripts/hil.py --table``.

A number stands here only with what makes it one: device, power mode, clocks, temperature,
versions, commit, how many passes, and what was waited for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from gwp_edge.errors import SpecError

BEGIN: Final = "<!-- hil:begin, written by scripts/hil.py --table -->"
END: Final = "<!-- hil:end -->"
_NONE: Final = "not measured"
_HEADER: Final = (
    "device",
    "bundle",
    "vision + prefill + step, ms (modelled)",
    "predict p50 / p95 / p99 / max, ms",
    "golden error",
    "hardware tests",
)
_STAGES: Final = ("vision", "prefill", "denoise")

Record = Mapping[str, Any]


def table(records: Sequence[Record]) -> str:
    """Return the table of some records, one row each, and below it how each was measured."""
    rows = [_row(record) for record in records]
    lines = [_line(_HEADER), _line(["---"] * len(_HEADER)), *(_line(row) for row in rows)]
    notes = [f"- {_device(record)}: {_circumstances(record)}" for record in records]
    return "\n".join([*lines, "", *notes])


def rewrite_block(path: Path, text: str) -> None:
    """Replace what stands between the two marks of a file.

    Raises:
        SpecError: the file cannot be read, or the marks are not there once each, in order.
    """
    try:
        before = path.read_text(encoding="utf-8")
    except OSError as e:
        raise SpecError(f"{path}: {e.strerror}") from e
    head, begin, rest = before.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not begin or not end or BEGIN in rest or END in tail:
        raise SpecError(f"{path}: expected one {BEGIN} and one {END} after it")
    path.write_text(f"{head}{BEGIN}\n{text}\n{END}{tail}", encoding="utf-8")


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "/") for cell in cells) + " |"


def _result(record: Record, test: str) -> dict[str, Any]:
    """Return what a test that passed found; empty where there is nothing."""
    for entry in record.get("tests", ()):
        if entry["name"] == test and entry["status"] == "passed":
            return entry.get("result") or {}
    return {}


def _device(record: Record) -> str:
    key = _result(record, "build").get("key", {})
    name = key.get("board") or key.get("device") or record["machine"]["system"]
    return f"{name}, {key['n_multiprocessors']} SM" if key else str(name)


def _row(record: Record) -> tuple[str, ...]:
    build = _result(record, "build")
    statuses = [entry["status"] for entry in record["tests"]]
    counts = [f"{statuses.count(s)} {s}" for s in ("passed", "failed", "skipped") if s in statuses]
    error = build.get("golden_error")
    return (
        _device(record),
        str(build.get("key", {}).get("precision", _NONE)),
        _stages(build),
        _predict(_result(record, "latency")),
        _NONE if error is None else f"{error:.2g}",
        ", ".join(counts),
    )


def _stages(build: Mapping[str, Any]) -> str:
    timing = {entry["stage"]: entry for entry in build.get("timing", ())}
    if not all(stage in timing for stage in _STAGES):
        return _NONE
    measured = " + ".join(f"{timing[s]['measured_ms']:.1f}" for s in _STAGES)
    expected = [timing[s]["expected_ms"] for s in _STAGES]
    if None in expected:
        return measured
    return f"{measured} ({' + '.join(f'{ms:.1f}' for ms in expected)})"


def _predict(latency: Mapping[str, Any]) -> str:
    times = (latency.get("phases") or {}).get("steady", {}).get("predict")
    if not times:
        return _NONE
    shown = " / ".join(f"{times[name]:.1f}" for name in ("p50", "p95", "p99", "max"))
    return f"{shown} (n = {times['n']})"


def _circumstances(record: Record) -> str:
    build, context = _result(record, "build"), _result(record, "latency").get("context", {})
    machine = {**record["machine"], **context.get("machine", {})}
    key = build.get("key", {})
    timing = {entry["stage"]: entry["n"] for entry in build.get("timing", ())}
    passes = ", ".join(f"{n} {stage}" for stage, n in timing.items())
    facts = (
        ("", record["created_at"]),
        ("power mode ", context.get("power_mode")),
        ("CPU at MHz ", machine.get("clock_mhz")),
        ("C ", machine.get("temperature_c")),
        ("TensorRT ", key.get("tensorrt")),
        ("flags ", " ".join(f"{k}={v}" for k, v in key.get("flags", {}).items()) or None),
        ("commit ", machine.get("commit")),
        ("medians of ", f"{passes} passes by the GPU's clock" if passes else None),
        ("after warm-up s ", context.get("warmup_s")),
        ("predict: ", context.get("synchronised")),
    )
    return "; ".join(f"{label}{value}" for label, value in facts if value is not None)
