"""``gwp-edge build`` and ``gwp-edge plan``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gwp_edge.commands.options import BundleArgument, JsonFlag
from gwp_edge.console import progress_bars, remark, say, say_json, say_table
from gwp_edge.errors import BuildError, PerformanceIssue, SpecError

if TYPE_CHECKING:
    from gwp_edge.bundle import Manifest
    from gwp_edge.planning import Device

_MIB = 1 << 20


def build(
    bundle: BundleArgument = Path("policy.gwp"),
    level: Annotated[
        int, typer.Option("--level", help="0 builds fast, 5 runs fastest; 3 is usual.")
    ] = 3,
    workspace: Annotated[
        int, typer.Option("--workspace", help="MiB of scratch that kernels may use.")
    ] = 1024,
    tf32: Annotated[
        bool,
        typer.Option("--tf32", help="Let float32 products round to 10 bits; faster, less exact."),
    ] = False,
    list_only: Annotated[
        bool, typer.Option("--list", help="List the engines that were built, build nothing.")
    ] = False,
    clean: Annotated[
        bool, typer.Option("--clean", help="Remove all engines of this bundle, build nothing.")
    ] = False,
    as_json: JsonFlag = False,
) -> None:
    """Build TensorRT engines for this very device, prove their precision, test their answer.

    Takes minutes. Ctrl-C leaves nothing half-written.

    Example: gwp-edge build policy.gwp
    """
    if list_only and clean:
        raise SpecError("--list and --clean exclude each other")
    if list_only:
        _list(bundle, as_json=as_json)
        return
    if clean:
        from gwp_edge.engines.trt_cache import clean as remove

        removed = [str(path) for path in remove(bundle)]
        if as_json:
            say_json({"removed": removed})
        else:
            say(f"removed {len(removed)}: {', '.join(removed) or 'there was nothing'}")
        return
    _build(bundle, level, workspace, tf32=tf32, as_json=as_json)


def _build(bundle: Path, level: int, workspace: int, *, tf32: bool, as_json: bool) -> None:
    import msgspec

    from gwp_edge.bundle import Bundle
    from gwp_edge.engines.trt_build import BuildOptions, build_engines

    options = BuildOptions(level=level, workspace_bytes=workspace * _MIB, tf32=tf32)
    with progress_bars() as progress:
        result = build_engines(Bundle.open(bundle, progress=progress), options, progress)
    if as_json:
        say_json({"folder": str(result.folder), **msgspec.to_builtins(result.record)})
        return
    n_bytes = sum(entry.n_bytes for entry in result.record.files.values())
    say(f"engines      {result.folder}  {n_bytes / 1e6:.1f} MB in {result.seconds:.0f} s")
    for line in result.record.proof:
        say(f"proof        {line}")
    say(f"golden       off by {result.record.golden_error:.2g} rad or m")
    for timing in result.record.timing:
        say(f"time         {timing}")
        if timing.is_suspect:
            remark(f"suspect: {timing.stage} is {timing.verdict}; see docs/jetson.md")


def _list(bundle: Path, *, as_json: bool) -> None:
    import msgspec

    from gwp_edge.engines.trt_cache import list_engines

    found = list_engines(bundle)
    if as_json:
        say_json(
            [
                {"folder": str(f), "record": None if r is None else msgspec.to_builtins(r)}
                for f, r in found
            ]
        )
        return
    rows = [
        (folder.name, "unreadable", "", "", "", "")
        if record is None
        else (
            folder.name,
            record.key.device,
            record.key.tensorrt,
            record.key.precision,
            " ".join(f"{name}={value}" for name, value in record.key.flags.items()),
            record.created_at,
        )
        for folder, record in found
    ]
    header = ("engines", "GPU", "TensorRT", "precision", "flags", "built")
    say_table(f"Engines of {bundle}", header, rows)


def plan(
    bundle: Annotated[
        Path | None, typer.Argument(help="Bundle folder; or give --size and --precision.")
    ] = None,
    device: Annotated[
        list[str] | None,
        typer.Option("--device", help="As in the table, such as orin-agx-64; several times."),
    ] = None,
    size: Annotated[
        str | None, typer.Option("--size", help="Plan for a size without a bundle: gwp05-full.")
    ] = None,
    precision: Annotated[
        str | None, typer.Option("--precision", help="With --size: int8, fp16 and so on.")
    ] = None,
    rest: Annotated[
        str | None, typer.Option("--rest", help="With --size: format of what stays unquantized.")
    ] = None,
    tf32: Annotated[bool, typer.Option("--tf32", help="As for build.")] = False,
    as_json: JsonFlag = False,
) -> None:
    """Show modelled latency and memory on devices that are not here. Nothing is measured.

    Example: gwp-edge plan policy.gwp --device orin-agx-64 --device thor
    """
    from gwp_edge.planning import device_names, find_device

    devices = [find_device(name) for name in device or device_names()]
    manifest = _manifest(bundle, size, precision, rest)
    rows = [_row(manifest, found, tf32=tf32) for found in devices]
    if as_json:
        say_json({"label": "modelled", "precision": manifest.precision.name, "devices": rows})
        return
    _say_latency(rows)
    _say_memory(rows)
    remark("modelled, not measured; docs/jetson.md says how far to trust it")


def _manifest(
    bundle: Path | None, size: str | None, precision: str | None, rest: str | None
) -> Manifest:
    if (bundle is None) == (size is None):
        raise SpecError("give a bundle, or --size with --precision")
    if bundle is not None:
        if precision is not None or rest is not None:
            raise SpecError("--precision and --rest belong to --size; a bundle has its own")
        from gwp_edge.bundle import Bundle

        return Bundle.open(bundle).manifest
    if precision is None:
        raise SpecError("--size needs --precision, such as int8")
    try:
        from gwp_edge.export.blueprint import blueprint
        from gwp_edge.export.precision import FLOAT_FORMATS
    except ModuleNotFoundError as e:
        raise BuildError(
            f"--size needs {e.name}, which is not installed: pip install 'gwp-edge[export]'"
        ) from e
    if rest is not None and rest not in FLOAT_FORMATS:
        raise SpecError(f"--rest {rest} is not known; choose from {', '.join(FLOAT_FORMATS)}")
    chosen = next((known for known in FLOAT_FORMATS if known == rest), None)
    return blueprint(str(size), precision, rest=chosen)


def _row(manifest: Manifest, device: Device, *, tf32: bool) -> dict[str, Any]:
    """Return what a device would do, as JSON; ``refused`` says why it would not."""
    from gwp_edge.planning import estimate, memory_plan, workload
    from gwp_edge.planning.memory import fits

    memory = memory_plan(manifest)
    row: dict[str, Any] = {
        "device": device.id,
        "source": device.source,
        "assumed": list(device.assumed),
        "memory_bytes": dict(memory.rows()),
        "usable_bytes": device.usable_bytes,
        "fits": fits(memory, device),
        "refused": None,
    }
    try:
        found = estimate(workload(manifest), device, tf32=tf32)
    except PerformanceIssue as e:
        return {**row, "refused": str(e)}
    stages = {
        s.stage: {
            "passes": s.n_passes,
            "floor_ms": s.floor_ms,
            "expected_ms": s.expected_ms,
            "compute_share": s.compute_share,
        }
        for s in found.stages
    }
    return {
        **row,
        "stages": stages,
        "floor_ms": found.floor_ms,
        "expected_ms": found.expected_ms,
    }


def _say_latency(rows: list[dict[str, Any]]) -> None:
    table = []
    for row in rows:
        if row["refused"] is not None:
            table.append((row["device"], "-", "-", "-", "-", row["refused"]))
            continue
        parts = [
            f"{s['passes']} x {s['expected_ms']:.1f}"
            if s["passes"] > 1
            else f"{s['expected_ms']:.1f}"
            for s in row["stages"].values()
        ]
        missing = [what for what, ok in row["fits"].items() if not ok]
        memory = f"memory too small to {', '.join(missing)}" if missing else ""
        table.append(
            (
                row["device"],
                " + ".join(parts),
                f"{row['floor_ms']:.0f}",
                f"{row['expected_ms']:.0f}",
                f"{1e3 / row['expected_ms']:.1f}",
                memory,
            )
        )
    header = ("device", "vision + prefill + steps, ms", "floor ms", "expected ms", "per s", "")
    say_table("One chunk, modelled", header, table)


def _say_memory(rows: list[dict[str, Any]]) -> None:
    first = rows[0]["memory_bytes"]
    table = [(name, f"{n_bytes / 1e9:.2f}") for name, n_bytes in first.items()]
    say_table("Memory, modelled", ("part", "GB"), table)
