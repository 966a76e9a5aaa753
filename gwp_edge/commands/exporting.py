"""``gwp-edge export`` and ``gwp-edge inspect``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from gwp_edge.commands.calibration_tables import say_calibration
from gwp_edge.commands.options import BundleArgument, JsonFlag
from gwp_edge.commands.planning import say_modelled
from gwp_edge.console import progress_bars, raise_on_signals, remark, say, say_json, say_table
from gwp_edge.errors import SpecError

if TYPE_CHECKING:
    from gwp_edge.bundle import Bundle
    from gwp_edge.manifest import ChannelError

_TIMESTEPS = ("bfloat16", "exact")
_CHECKS = ("auto", "always", "never")
_RESTS = ("fp32", "fp16", "bf16")
_LARGE_FLOAT_BYTES = 8_000_000_000


def _choice(flag: str, value: str, known: tuple[str, ...]) -> Any:  # noqa: ANN401 - a literal
    if value not in known:
        raise SpecError(f"{flag} {value} is not known; choose from {', '.join(known)}")
    return value


def export(
    checkpoint: Annotated[
        Path,
        typer.Argument(
            help="diffusers folder, .safetensors, .pt/.bin, or DeepSpeed mp_rank_00_model_states.pt"
        ),
    ],
    out: Annotated[Path, typer.Option("--out", help="Bundle folder to write.")] = Path(
        "policy.gwp"
    ),
    base_model: Annotated[
        Path | None,
        typer.Option("--base-model", help="Folder with vae/ (and text_encoder/, tokenizer/)."),
    ] = None,
    norm_stats: Annotated[
        Path | None, typer.Option("--norm-stats", help="norm_stats.json of the training data.")
    ] = None,
    prompt: Annotated[
        list[str] | None,
        typer.Option("--prompt", help="Instruction to encode; may be given several times."),
    ] = None,
    prompt_embedding: Annotated[
        list[Path] | None,
        typer.Option("--prompt-embedding", help=".pt, .npy or .safetensors; several times."),
    ] = None,
    precision: Annotated[
        str,
        typer.Option("--precision", help="fp32, fp16, bf16, int8, fp8, w8 or w4 (weights only)."),
    ] = "fp32",
    target: Annotated[
        str, typer.Option("--target", help="cpu, orin, thor, ampere, ada, hopper, blackwell.")
    ] = "cpu",
    calibration: Annotated[
        Path | None,
        typer.Option("--calibration", help="LeRobot v3.0 dataset, for int8, fp8, w8, w4."),
    ] = None,
    calibration_record: Annotated[
        Path | None,
        typer.Option("--calibration-record", help="Ranges to reuse, or to write when absent."),
    ] = None,
    samples: Annotated[
        int | None,
        typer.Option(
            "--samples", min=1, help="Calibration frames over episodes and time; 64 if not given."
        ),
    ] = None,
    held_out: Annotated[
        int, typer.Option("--held-out", min=1, help="Frames that the error is measured on.")
    ] = 8,
    observer: Annotated[
        str,
        typer.Option("--observer", help="auto, minmax, percentile, mse or entropy."),
    ] = "auto",
    percentile: Annotated[
        float,
        typer.Option("--percentile", help="Share of values that --observer percentile keeps."),
    ] = 99.9,
    smoothing: Annotated[
        bool | None,
        typer.Option(
            "--smoothing/--no-smoothing", help="Fold activation outliers away; on if not given."
        ),
    ] = None,
    block: Annotated[
        int, typer.Option("--block", help="Inputs that share a scale in w4: 64, 128; 32 on cpu.")
    ] = 64,
    device: Annotated[
        str | None,
        typer.Option("--device", help="Where torch calibrates: cpu, cuda; a GPU if there is one."),
    ] = None,
    rest: Annotated[
        str | None,
        typer.Option("--rest", help="What is not quantized: fp32 (cpu), fp16 (GPUs) or bf16."),
    ] = None,
    recipe: Annotated[
        Path | None,
        typer.Option("--recipe", help="JSON or TOML: the format of layers by pattern."),
    ] = None,
    max_error: Annotated[
        float, typer.Option("--max-error", help="Budget of p99 on joints, rad.")
    ] = 2e-3,
    max_gripper_error: Annotated[
        float, typer.Option("--max-gripper-error", help="Budget of p99 on grippers, m.")
    ] = 2e-4,
    no_budget: Annotated[
        bool, typer.Option("--no-budget", help="Take the default recipe whatever its error.")
    ] = False,
    go_on: Annotated[
        bool,
        typer.Option("--go-on", help="Where the budget is not met, write the whole recipe anyway."),
    ] = False,
    allow_synthetic: Annotated[
        bool, typer.Option("--allow-synthetic", help="Calibrate on data that is not recorded.")
    ] = False,
    seed: Annotated[
        int | None, typer.Option("--seed", min=0, help="Of samples and noise; 0 if not given.")
    ] = None,
    steps: Annotated[int, typer.Option("--steps", min=1, help="Denoising steps.")] = 10,
    timesteps: Annotated[
        str,
        typer.Option("--timesteps", help="bfloat16 as trained, or exact for float32 parity."),
    ] = "bfloat16",
    embodiment: Annotated[int, typer.Option("--embodiment", min=0, help="Which projections.")] = 0,
    layout: Annotated[
        str, typer.Option("--layout", help="piper-dual, piper, or a JSON file.")
    ] = "piper-dual",
    head_dim: Annotated[
        int | None, typer.Option("--head-dim", help="Head size where no config.json says it.")
    ] = None,
    use_ema: Annotated[bool, typer.Option("--use-ema", help="Take the EMA copy.")] = False,
    check: Annotated[
        str,
        typer.Option("--check", help="Run the result on ONNX Runtime: auto, always, never."),
    ] = "auto",
    as_json: JsonFlag = False,
) -> None:
    """Turn a checkpoint into a verified, action-only bundle.

    Statistics, VAE and prompt embeddings are looked for beside the checkpoint and in its parent
    folder where no flag gives them.

    Example: gwp-edge export ckpt.pt --base-model wan2.2 --prompt "fold the towel" --precision bf16
    """
    from gwp_edge.errors import BuildError

    try:
        from gwp_edge.export.pipeline import ExportOptions, export_bundle
    except ModuleNotFoundError as e:
        raise BuildError(
            f"export needs {e.name}, which is not installed: pip install 'gwp-edge[export]'"
        ) from e
    asked = {"samples": samples, "seed": seed, "smoothing": smoothing}
    options = ExportOptions(
        checkpoint=checkpoint,
        out=out,
        base_model=base_model,
        norm_stats=norm_stats,
        prompts=tuple(prompt or ()),
        prompt_embeddings=tuple(prompt_embedding or ()),
        precision=precision,
        n_steps=steps,
        timesteps=_choice("--timesteps", timesteps, _TIMESTEPS),
        embodiment=embodiment,
        layout=layout,
        head_dim=head_dim,
        use_ema=use_ema,
        engine_check=_choice("--check", check, _CHECKS),
        target=target,
        calibration=calibration,
        calibration_record=calibration_record,
        samples=64 if samples is None else samples,
        held_out_samples=held_out,
        seed=seed or 0,
        observer=observer,
        percentile=percentile,
        smoothing=smoothing is not False,
        fixed=frozenset(name for name, value in asked.items() if value is not None),
        block=block,
        device=device,
        recipe_file=recipe,
        rest=None if rest is None else _choice("--rest", rest, _RESTS),
        max_error_rad=None if no_budget else max_error,
        max_error_m=None if no_budget else max_gripper_error,
        allow_synthetic=allow_synthetic,
        go_on=go_on,
    )
    raise_on_signals()
    with progress_bars() as progress:
        result = export_bundle(options, progress)
    summary = _export_summary(result.bundle, result.seconds)
    if as_json:
        say_json(summary)
        return
    _say_export(result.bundle, summary, dict(result.unused))


def _export_summary(bundle: Bundle, seconds: float) -> dict[str, Any]:
    import resource

    import msgspec

    manifest = bundle.manifest
    return {
        "bundle": str(bundle.root),
        "bundle_id": manifest.bundle_id,
        "precision": manifest.precision.name,
        "n_bytes": bundle.n_bytes,
        "tasks": list(manifest.spec.tasks),
        "error": msgspec.to_builtins(manifest.error),
        "notes": list(manifest.provenance.notes),
        "golden_tolerance": manifest.golden.tolerance,
        "checked_with": list(manifest.golden.checked_with),
        "export_s": round(seconds, 2),
        "peak_resident_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


def _say_export(bundle: Bundle, summary: dict[str, Any], unused: dict[str, int]) -> None:
    error = bundle.manifest.error
    say(f"bundle       {bundle.root}  {bundle.n_bytes / 1e6:.1f} MB  {summary['precision']}")
    say(f"tasks        {', '.join(summary['tasks'])}")
    for reason, count in unused.items():
        say(f"left out     {count} tensors: {reason}")
    for name, part, unit, scale in (
        ("joints", error.joints_rad, "mrad", 1e3),
        ("grippers", error.grippers_m, "mm", 1e3),
    ):
        if part is not None:
            say(f"error        {name} {_error_text(part, unit, scale)}")
    checked = ", ".join(summary["checked_with"]) or "no engine here: the golden check at load will"
    say(f"measured on  {error.inputs}; reproduced by {checked}")
    for note in summary["notes"]:
        say(f"note         {note}")
    peak = summary["peak_resident_bytes"] / 1e9
    say(f"took         {summary['export_s']:.1f} s, peak resident memory {peak:.2f} GB")
    if summary["precision"] == "fp32" and bundle.n_bytes > _LARGE_FLOAT_BYTES:
        remark("hint: --precision bf16 halves the bundle")


def _error_text(part: ChannelError, unit: str, scale: float) -> str:
    values = (part.mean, part.p99, part.max)
    mean, p99, largest = (f"{v * scale:.3g}" for v in values)
    return f"mean {mean}, p99 {p99}, max {largest} {unit} against float32"


def inspect(bundle: BundleArgument, as_json: JsonFlag = False) -> None:
    """Show what a bundle holds: spec, sizes, formats and why, modelled times of devices.

    Example: gwp-edge inspect policy.gwp
    """
    import msgspec

    from gwp_edge.bundle import Bundle

    found = Bundle.open(bundle)
    if as_json:
        say_json(msgspec.to_builtins(found.manifest))
        return
    _say_spec(found)
    _say_stages(found)
    _say_formats(found)
    say_calibration(found.manifest.calibration)
    say_modelled(found.manifest)


def _say_spec(found: Bundle) -> None:
    spec, manifest = found.spec, found.manifest
    net = spec.network
    say(f"bundle       {found.root}  {found.n_bytes / 1e6:.1f} MB  id {manifest.bundle_id[:12]}")
    say(
        f"network      {net.family}, {net.n_layers} layers, widths {net.visual_dim}/"
        f"{net.action_dim}, {net.n_heads} heads x {net.head_dim}"
    )
    say(
        f"chunk        {spec.n_rows} rows of {spec.period_ns / 1e6:.2f} ms, {spec.n_channels} "
        f"channels, {spec.sampler.n_steps} steps ({spec.sampler.rounding} timesteps)"
    )
    say(f"cameras      {', '.join(spec.cameras)}")
    say(f"tasks        {', '.join(spec.tasks)}")
    say(f"golden       {manifest.golden.tolerance:.2g} allowed; {manifest.error.inputs}")
    for name, part, unit in (
        ("joints", manifest.error.joints_rad, "mrad"),
        ("grippers", manifest.error.grippers_m, "mm"),
    ):
        if part is not None:
            say(f"error        {name} {_error_text(part, unit, 1e3)}")
    for note in manifest.provenance.notes:
        say(f"note         {note}")
    rows = [
        (
            c.name,
            c.unit,
            c.kind,
            *(
                f"{low:+.3f} .. {high:+.3f}"
                for low, high in (
                    (spec.statistics.state_q01[i], spec.statistics.state_q99[i]),
                    (spec.statistics.action_q01[i], spec.statistics.action_q99[i]),
                )
            ),
        )
        for i, c in enumerate(spec.channels)
    ]
    say_table("Channels", ("name", "unit", "action", "state q01..q99", "action q01..q99"), rows)


def _say_stages(found: Bundle) -> None:
    rows = []
    for stage in ("vision", "prefill", "denoise"):
        layers = [layer for layer in found.manifest.precision.layers if layer.stage == stage]
        runs = found.spec.sampler.n_steps if stage == "denoise" else 1
        flops = sum(layer.flops for layer in layers)
        n_bytes = sum(layer.weight_bytes for layer in layers)
        rows.append((stage, runs, round(flops / 1e9, 3), round(n_bytes / 1e6, 2)))
    say_table("Stages", ("stage", "runs per chunk", "GFLOP per run", "weights MB"), rows)


def _say_formats(found: Bundle) -> None:
    groups: dict[tuple[str, str, str], tuple[int, int]] = {}
    for layer in found.manifest.precision.layers:
        key = (layer.stage, layer.format, layer.reason)
        count, n_bytes = groups.get(key, (0, 0))
        groups[key] = (count + 1, n_bytes + layer.weight_bytes)
    rows = [
        (stage, fmt, count, round(n_bytes / 1e6, 2), reason)
        for (stage, fmt, reason), (count, n_bytes) in groups.items()
    ]
    say_table("Formats", ("stage", "format", "layers", "weights MB", "why"), cast("Any", rows))
