"""``gwp-edge plan``: what devices that are not here would do."""

from __future__ import annotations

import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gwp_edge.commands.options import JsonFlag
from gwp_edge.console import progress_bars, raise_on_signals, remark, say, say_json, say_table
from gwp_edge.errors import BuildError, PerformanceIssue, SpecError

if TYPE_CHECKING:
    from collections.abc import Callable

    from gwp_edge.bundle import Bundle
    from gwp_edge.manifest import Manifest
    from gwp_edge.planning import Device

    Progress = Callable[[str, int, int], None]

_LABEL = "modelled, not measured; docs/jetson.md says how far to trust it"


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
    check: Annotated[
        bool,
        typer.Option(
            "--check",
            help="Compare the model with measured float32 stages on this processor instead; "
            "needs an idle machine.",
        ),
    ] = False,
    threads: Annotated[
        int, typer.Option("--threads", min=1, max=256, help="With --check: CPU threads.")
    ] = 2,
    as_json: JsonFlag = False,
) -> None:
    """Show modelled latency and memory on devices that are not here. Nothing is measured.

    With --check the model is held to measured stages of this processor, the one device at hand.

    Example: gwp-edge plan policy.gwp --device orin-agx-64 --device thor
    """
    if check:
        if device or tf32 or rest is not None:
            raise SpecError("--check is about this processor; leave --device, --tf32, --rest away")
        _check(bundle, size, precision, threads, as_json=as_json)
        return
    from gwp_edge.planning import device_names, find_device

    devices = [find_device(name) for name in device or device_names()]
    manifest = _manifest(bundle, size, precision, rest)
    rows = [_row(manifest, found, tf32=tf32) for found in devices]
    if as_json:
        say_json({"label": "modelled", "precision": manifest.precision.name, "devices": rows})
        return
    _say_latency(rows)
    _say_memory(rows)
    remark(_LABEL)


def say_modelled(manifest: Manifest) -> None:
    """Print the modelled times of a bundle on every device of the table."""
    from gwp_edge.planning import device_names, find_device

    _say_latency([_row(manifest, find_device(name), tf32=False) for name in device_names()])
    remark(_LABEL)


def _check(
    bundle: Path | None, size: str | None, precision: str | None, threads: int, *, as_json: bool
) -> None:
    """Compare modelled and measured stages here; fail where they are too far apart."""
    from gwp_edge.bundle import Bundle
    from gwp_edge.planning.self_check import ALLOWED_ERROR, compare_here, require_agreement

    if (bundle is None) == (size is None):
        raise SpecError("give a bundle, or --size with --precision")
    if size is not None and precision != "fp32":
        raise SpecError("--check knows float32 rates alone; give --precision fp32")
    raise_on_signals()  # a kill removes the random weights like Ctrl-C does
    with ExitStack() as stack:
        bars = stack.enter_context(progress_bars())
        if bundle is not None:
            opened = Bundle.open(bundle, progress=bars)
        else:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            opened = _random_bundle(folder, str(size), bars)
        rows = compare_here(opened, threads=threads)
    if as_json:
        say_json(
            {
                "allowed_error": ALLOWED_ERROR,
                "stages": [
                    {
                        "stage": row.stage,
                        "modelled_ms": row.expected_ms,
                        "measured_ms": row.measured_ms,
                        "error": row.error,
                    }
                    for row in rows
                ],
            }
        )
    else:
        table = [
            (
                row.stage,
                f"{row.expected_ms:.1f}",
                f"{row.measured_ms:.1f}",
                f"{100 * row.error:+.0f} %",
            )
            for row in rows
        ]
        header = ("stage", "modelled ms", "measured ms", "modelled - measured")
        say_table(f"One pass on this processor, {threads} threads", header, table)
    require_agreement(rows)
    if not as_json:
        say(f"the model agrees within {100 * ALLOWED_ERROR:.0f} %")


def _random_bundle(folder: Path, size: str, bars: Progress) -> Bundle:
    try:
        from gwp_edge.export.baseline import make_random_bundle
    except ModuleNotFoundError as e:
        raise BuildError(
            f"--size needs {e.name}, which is not installed: pip install 'gwp-edge[export]'"
        ) from e
    return make_random_bundle(folder, size, precision="fp32", n_steps=10, progress=bars)


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
