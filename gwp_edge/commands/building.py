"""``gwp-edge build``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gwp_edge.commands.options import BundleArgument, JsonFlag
from gwp_edge.console import (
    Interrupted,
    progress_bars,
    raise_on_signals,
    remark,
    say,
    say_json,
    say_table,
)
from gwp_edge.errors import SpecError

if TYPE_CHECKING:
    from gwp_edge.engines.trt_options import BuildOptions

_MIB = 1 << 20
# More would hide the rest of the answer; build.json has all of them.
_SHOWN_LAYERS = 10


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
    allow_unproven: Annotated[
        bool,
        typer.Option(
            "--allow-unproven",
            help="Accept quantized layers that TensorRT does not show; those that it shows in "
            "another type still fail the build.",
        ),
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

    Takes minutes. Ctrl-C or a kill leaves nothing half-written.

    Example: gwp-edge build policy.gwp
    """
    if list_only and clean:
        raise SpecError("--list and --clean exclude each other")
    if (list_only or clean) and not bundle.is_dir():
        raise SpecError(f"{bundle}: no such bundle, so it has no engines")
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
    from gwp_edge.engines.trt_options import BuildOptions

    options = BuildOptions(
        level=level,
        workspace_bytes=workspace * _MIB,
        tf32=tf32,
        allow_unproven=allow_unproven,
    )
    raise_on_signals()  # a kill while hashing or testing cleans up like Ctrl-C does
    try:
        _build(bundle, options, as_json=as_json)
    except KeyboardInterrupt:  # what a signal becomes while TensorRT is at work
        raise Interrupted from None


def _build(bundle: Path, options: BuildOptions, *, as_json: bool) -> None:
    import msgspec

    from gwp_edge.bundle import Bundle
    from gwp_edge.engines.trt_build import build_engines

    with progress_bars() as progress:
        result = build_engines(Bundle.open(bundle, progress=progress), options, progress)
    if as_json:
        say_json({"folder": str(result.folder), **msgspec.to_builtins(result.record)})
        return
    n_bytes = sum(entry.n_bytes for entry in result.record.files.values())
    say(f"engines      {result.folder}  {n_bytes / 1e6:.1f} MB in {result.seconds:.0f} s")
    for line in result.record.proof:
        say(f"proof        {line}")
    others = result.record.not_as_asked
    for layer in others[:_SHOWN_LAYERS]:
        say(f"  not so     {layer.stage} {layer.name}: {layer.got}, asked {layer.asked}")
    if len(others) > _SHOWN_LAYERS:
        say(f"  not so     and {len(others) - _SHOWN_LAYERS} more, all in build.json")
    for what, peak_bytes in result.record.memory.items():
        say(f"memory       {what}: {peak_bytes / 1e9:.2f} GB at the peak, gwp-edge plan models it")
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
