"""``gwp-edge verify``: a bundle's error against the reference and against recorded actions."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gwp_edge.commands.options import (
    BundleArgument,
    EngineOption,
    JsonFlag,
    ProviderOption,
    TaskOption,
    ThreadsOption,
)
from gwp_edge.console import (
    EXIT_FAILED,
    progress_bars,
    remark,
    require_writable,
    say,
    say_table,
    write_file,
)
from gwp_edge.errors import BuildError, SpecError

if TYPE_CHECKING:
    from gwp_edge.calibration.verify import VerifyOptions
    from gwp_edge.calibration.verify_reference import ReferenceOptions
    from gwp_edge.calibration.verify_schema import Comparison, VerifyReport
    from gwp_edge.manifest import ChannelError, MeasuredError

_N_LAYERS_SHOWN = 12


def verify(
    bundle: BundleArgument,
    dataset: Annotated[
        Path, typer.Option("--dataset", help="Root of a LeRobot v3.0 dataset of this robot.")
    ],
    against: Annotated[
        Path | None,
        typer.Option("--against", help="Checkpoint that the bundle was exported from."),
    ] = None,
    base_model: Annotated[
        Path | None, typer.Option("--base-model", help="Folder with vae/, as for export.")
    ] = None,
    norm_stats: Annotated[
        Path | None, typer.Option("--norm-stats", help="norm_stats.json of the training data.")
    ] = None,
    prompt_embedding: Annotated[
        list[Path] | None,
        typer.Option("--prompt-embedding", help="Check prompts against this; several times."),
    ] = None,
    layout: Annotated[
        str | None,
        typer.Option("--layout", help="Layout of training: piper-dual, piper, or a JSON file."),
    ] = None,
    use_ema: Annotated[bool, typer.Option("--use-ema", help="Take the EMA copy.")] = False,
    task: TaskOption = None,
    samples: Annotated[int, typer.Option("--samples", min=1, help="Chunks to measure.")] = 16,
    seed: Annotated[
        int, typer.Option("--seed", min=0, help="Of split and noise; the one of calibration.")
    ] = 0,
    first_rows: Annotated[
        int | None,
        typer.Option("--first-rows", help="Rows executed before the next chunk; of 0.4 s."),
    ] = None,
    gripper_threshold: Annotated[
        float | None,
        typer.Option("--gripper-threshold", help="Opening that counts as open, m."),
    ] = None,
    max_error: Annotated[
        float | None, typer.Option("--max-error", help="Largest p99 of the joints, rad.")
    ] = None,
    max_gripper_error: Annotated[
        float | None, typer.Option("--max-gripper-error", help="Largest p99 of the grippers, m.")
    ] = None,
    factor: Annotated[
        float, typer.Option("--factor", help="Times the manifest's error that is still accepted.")
    ] = 4.0,
    layers: Annotated[bool, typer.Option("--layers", help="Judge every layer in torch.")] = False,
    calibration_record: Annotated[
        Path | None,
        typer.Option("--calibration-record", help="The bundle's own: show ranges of all inputs."),
    ] = None,
    engine: EngineOption = "ort",
    provider: ProviderOption = "cpu",
    threads: ThreadsOption = None,
    json_file: Annotated[Path | None, typer.Option("--json-file", help="Write the report.")] = None,
    html: Annotated[Path | None, typer.Option("--html", help="Write a page with plots.")] = None,
    as_json: JsonFlag = False,
) -> None:
    """Measure a bundle's error on episodes that calibration did not see, in radians and metres.

    Exits with 1 when the error is above what the manifest records or what --max-error allows.

    Example: gwp-edge verify policy.gwp --against ckpt.pt --dataset DATASET --html report.html
    """
    options = _options(
        bundle,
        dataset,
        reference=_reference(against, base_model, norm_stats, prompt_embedding, layout, use_ema),
        task=task,
        samples=samples,
        seed=seed,
        first_rows=first_rows,
        gripper_threshold=gripper_threshold,
        limits=(factor, max_error, max_gripper_error),
        layers=layers,
        record=calibration_record,
        engine=(engine, provider, threads),
    )
    require_writable(json_file, html)
    from gwp_edge.calibration.report import to_html, to_json
    from gwp_edge.calibration.verify import verify_bundle

    with progress_bars() as progress:
        report = verify_bundle(options, progress)
    if as_json:
        say(to_json(report).decode().rstrip())
    else:
        _say_report(report)
    # After it was said: a full disk must not take the figures with it.
    if json_file is not None:
        write_file(json_file, lambda file: file.write(to_json(report)))
    if html is not None:
        write_file(html, lambda file: file.write(to_html(report).encode()))
    if not report.passed:
        remark(f"gwp-edge: verify {report.verdict}")
        raise typer.Exit(EXIT_FAILED)


def _reference(
    against: Path | None,
    base_model: Path | None,
    norm_stats: Path | None,
    prompt_embedding: list[Path] | None,
    layout: str | None,
    use_ema: bool,
) -> ReferenceOptions | None:
    if against is None:
        given = {
            "--base-model": base_model,
            "--norm-stats": norm_stats,
            "--prompt-embedding": prompt_embedding,
            "--layout": layout,
            "--use-ema": use_ema or None,
        }
        idle = [flag for flag, value in given.items() if value is not None]
        if idle:
            raise SpecError(f"{idle[0]} describes the reference: give its checkpoint by --against")
        return None
    try:
        from gwp_edge.calibration.verify_reference import ReferenceOptions
    except ModuleNotFoundError as e:
        raise _missing(e) from e
    return ReferenceOptions(
        checkpoint=against,
        base_model=base_model,
        norm_stats=norm_stats,
        prompt_embeddings=tuple(prompt_embedding or ()),
        layout=layout,
        use_ema=use_ema,
    )


def _options(
    bundle: Path,
    dataset: Path,
    *,
    reference: ReferenceOptions | None,
    task: str | None,
    samples: int,
    seed: int,
    first_rows: int | None,
    gripper_threshold: float | None,
    limits: tuple[float, float | None, float | None],
    layers: bool,
    record: Path | None,
    engine: tuple[str, str, int | None],
) -> VerifyOptions:
    try:
        from gwp_edge.calibration.verify import VerifyOptions
    except ModuleNotFoundError as e:
        raise _missing(e) from e
    from gwp_edge.calibration.verify_checks import Limits
    from gwp_edge.calibration.verify_engine import EngineChoice

    factor, joints, grippers = limits
    name, provider, threads = engine
    return VerifyOptions(
        bundle=bundle,
        dataset=dataset,
        reference=reference,
        task=task,
        n_samples=samples,
        seed=seed,
        n_first_rows=first_rows,
        gripper_threshold_m=gripper_threshold,
        limits=Limits(factor=factor, joints_p99_rad=joints, grippers_p99_m=grippers),
        engine=EngineChoice(name=name, provider=provider, threads=threads),
        layers=layers,
        calibration_record=record,
    )


def _missing(error: ModuleNotFoundError) -> BuildError:
    return BuildError(
        f"verify needs {error.name}, which is not installed: pip install 'gwp-edge[export]'"
    )


def _say_report(report: VerifyReport) -> None:
    context = report.context
    say(f"bundle       {context.bundle}  {context.precision} on {context.engine}")
    episodes = ", ".join(map(str, context.episodes))
    say(
        f"measured on  {len(context.samples)} chunks of {context.dataset}, episodes {episodes} "
        f"({context.split_by})"
    )
    for note in report.notes:
        say(f"note         {note}")
    judged = report.reference or report.bundle_open_loop
    _say_channels(judged, context.n_first_rows)
    _say_summary(report)
    if report.layers:
        _say_layers(report)
    words = {True: "ok", False: "FAILED", None: "not checked"}
    say_table(
        "Checks", ("", "check", "found"), [(words[c.passed], c.name, c.text) for c in report.checks]
    )
    if report.passed:
        say(report.verdict)


def _milli(value: float) -> str:
    return f"{value * 1e3:.0f}" if value >= 1 else f"{value * 1e3:.3g}"


def _cells(error: ChannelError) -> tuple[str, ...]:
    return tuple(_milli(v) for v in (error.mean, error.p50, error.p99, error.max))


def _say_channels(judged: Comparison, n_first_rows: int) -> None:
    units = {"rad": "mrad", "m": "mm"}
    say_table(
        f"{judged.of} against {judged.against}; 1st: the first {n_first_rows} rows",
        ("channel", "mean", "p50", "p99", "max", "1st p99", "1st max"),
        [
            (
                f"{c.name.removesuffix('.pos')} {units[c.unit]}",
                *_cells(c.all_rows),
                _milli(c.first_rows.p99),
                _milli(c.first_rows.max),
            )
            for c in judged.channels
        ],
    )


def _say_summary(report: VerifyReport) -> None:
    rows: list[tuple[object, ...]] = []

    def add(name: str, error: MeasuredError) -> None:
        for part, unit, found in (
            ("joints", "mrad", error.joints_rad),
            ("grippers", "mm", error.grippers_m),
        ):
            if found is not None:
                rows.append((name, f"{part} {unit}", *_cells(found)))

    if report.reference is not None:
        add("bundle, reference", report.reference.all_rows)
        add("  first rows", report.reference.first_rows)
        add("  in the manifest", report.recorded_error)
    if report.emulation is not None:
        add("emulation, reference", report.emulation.all_rows)
    add("bundle, recording", report.bundle_open_loop.all_rows)
    if report.reference_open_loop is not None:
        add("reference, recording", report.reference_open_loop.all_rows)
    say_table("Errors", ("", "", "mean", "p50", "p99", "max"), rows)
    for flip in (report.reference or report.bundle_open_loop).flips:
        say(
            f"flips        {flip.name} at {_milli(flip.threshold_m)} mm: {flip.all_rows} of "
            f"{flip.n_all_rows} rows, {flip.first_rows} of the first {flip.n_first_rows}"
        )


def _say_layers(report: VerifyReport) -> None:
    lossy = [layer for layer in report.layers if layer.own_sqnr_db is not None]
    lossy.sort(key=lambda layer: layer.own_sqnr_db or 0.0)
    rows = [
        (x.stage, x.name, x.format, f"{x.cosine:.6f}", _decibel(x.sqnr_db), _decibel(x.own_sqnr_db))
        for x in lossy[:_N_LAYERS_SHOWN]
    ]
    title = f"Layers that lose most, {len(rows)} of {len(report.layers)} (own: the layer alone)"
    say_table(title, ("stage", "layer", "format", "cosine", "SQNR dB", "own SQNR dB"), rows)


def _decibel(value: float | None) -> str:
    return "equal" if value is None else f"{value:.1f}"
