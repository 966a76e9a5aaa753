"""``gwp-edge bench``: engine speed with random weights, no checkpoint needed."""

from __future__ import annotations

import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gwp_edge.commands.options import EngineOption, JsonFlag, ProviderOption
from gwp_edge.commands.profiling_tables import say_roofline
from gwp_edge.console import (
    progress_bars,
    raise_on_signals,
    remark,
    require_writable,
    say,
    say_json,
    say_table,
    write_json,
)
from gwp_edge.errors import BuildError, PerformanceIssue, SpecError

if TYPE_CHECKING:
    from collections.abc import Callable

    from gwp_edge.bench import BenchReport, ChunkInput
    from gwp_edge.bundle import Bundle
    from gwp_edge.types import Float32Array

_DTYPES = ("float32", "float16", "bfloat16")


def bench(
    size: Annotated[
        str,
        typer.Option(
            "--size",
            help="gwp05-wide4, gwp0-wide4 (full width, 4 layers), gwp05-full, gwp0-full, "
            "gwp05-tiny, gwp0-tiny.",
        ),
    ] = "gwp05-wide4",
    bundle: Annotated[
        Path | None, typer.Option("--bundle", help="Time this bundle instead of random weights.")
    ] = None,
    precision: Annotated[str, typer.Option("--precision", help="Of the random bundle.")] = "fp32",
    steps: Annotated[int, typer.Option("--steps", help="Denoising steps.")] = 10,
    engine: EngineOption = "ort",
    provider: ProviderOption = "cpu",
    threads: Annotated[int, typer.Option("--threads", min=1, max=256, help="CPU threads.")] = 2,
    repeats: Annotated[int, typer.Option("--repeats", min=1, help="Measured chunks.")] = 5,
    runs: Annotated[
        int,
        typer.Option(
            "--runs", min=1, help="Times to load and measure; profile compare judges from 3 on."
        ),
    ] = 1,
    warmup: Annotated[int, typer.Option("--warmup", min=0, help="Chunks before that.")] = 1,
    eager_repeats: Annotated[
        int,
        typer.Option(
            "--eager-repeats",
            min=0,
            help="Chunks of the unreduced network in eager torch beside it; 0 for none.",
        ),
    ] = 1,
    keep: Annotated[
        Path | None,
        typer.Option("--keep", help="Folder for random weights, used again next time."),
    ] = None,
    check: Annotated[
        Path | None, typer.Option("--check", help="Budgets (.toml) that must be kept.")
    ] = None,
    json_file: Annotated[Path | None, typer.Option("--json-file", help="Write the report.")] = None,
    make_checkpoint: Annotated[
        Path | None,
        typer.Option(
            "--make-checkpoint", help="Only write a random checkpoint of --size into this folder."
        ),
    ] = None,
    dtype: Annotated[
        str, typer.Option("--dtype", help="With --make-checkpoint: bfloat16, float16, float32.")
    ] = "bfloat16",
    as_json: JsonFlag = False,
) -> None:
    """Time every stage of a chunk, beside the machine's limits and the original in eager torch.

    Example: gwp-edge bench --size gwp05-wide4 --threads 2 --check tests/budgets.toml
    """
    raise_on_signals()  # a kill removes gigabytes of random weights like Ctrl-C does
    if make_checkpoint is not None:
        _make_checkpoint(make_checkpoint, size, dtype)
        return
    require_writable(json_file)
    if engine not in ("ort", "trt"):
        raise SpecError(f"--engine {engine}: expected ort or trt")
    if bundle is not None and check is not None:
        raise SpecError("--check is for random weights of a named --size; leave out --bundle")
    budgets = None
    if check is not None:
        from gwp_edge.budgets import read_budgets

        budgets = read_budgets(check)
    with ExitStack() as stack:
        bars = stack.enter_context(progress_bars())
        if bundle is not None:
            from gwp_edge.bundle import Bundle

            opened, folder = Bundle.open(bundle), None
        else:
            folder = keep or Path(stack.enter_context(tempfile.TemporaryDirectory()))
            opened = _random_bundle(folder, size, precision, steps, bars)
        report = _measure(
            opened,
            folder / size if folder is not None and eager_repeats else None,
            {"size": size if bundle is None else str(bundle), "engine": engine},
            provider=provider,
            threads=threads,
            repeats=repeats,
            runs=runs,
            warmup=warmup,
            eager_repeats=eager_repeats,
            progress=bars,
        )
    _tell(report, json_file, as_json)
    if budgets is not None:
        from gwp_edge.budgets import check_budgets

        missed = check_budgets(report, budgets)
        if missed:
            raise PerformanceIssue(f"over budget: {'; '.join(missed)}")
        remark("within budget")


def _export_side() -> Any:  # noqa: ANN401 - a module
    try:
        from gwp_edge.export import baseline
    except ModuleNotFoundError as e:
        raise BuildError(
            f"random weights need {e.name}, which is not installed: pip install "
            "'gwp-edge[export]', or time a bundle with --bundle"
        ) from e
    return baseline


def _make_checkpoint(folder: Path, size: str, dtype: str) -> None:
    if dtype not in _DTYPES:
        raise SpecError(f"--dtype {dtype} is not known; choose from {', '.join(_DTYPES)}")
    with progress_bars() as bars:
        made = _export_side().make_checkpoint(folder, size, dtype=dtype, progress=bars)
    say(str(made))


def _random_bundle(
    folder: Path, size: str, precision: str, steps: int, bars: Callable[[str, int, int], None]
) -> Bundle:
    folder.mkdir(parents=True, exist_ok=True)
    made: Bundle = _export_side().make_random_bundle(
        folder, size, precision=precision, n_steps=steps, progress=bars
    )
    return made


def _measure(
    bundle: Bundle,
    eager_root: Path | None,
    labels: dict[str, str],
    *,
    provider: str,
    threads: int,
    repeats: int,
    runs: int,
    warmup: int,
    eager_repeats: int,
    progress: Callable[[str, int, int], None],
) -> BenchReport:
    """Time engine and baseline between two measurements of the machine's limits."""
    import numpy as np

    from gwp_edge import bench
    from gwp_edge.engines import create_engine
    from gwp_edge.machine_limits import describe_machine, measure_limits
    from gwp_edge.profiling.context import make_context, with_timing
    from gwp_edge.profiling.roofline import NO_LIMITS_ELSEWHERE

    spec, manifest = bundle.spec, bundle.manifest
    context = make_context(
        spec,
        describe_machine(("numpy", "onnxruntime", "torch")),
        manifest=manifest,
        bundle=labels["size"],
        robot=None,
        engine=labels["engine"],
        provider=provider,
        threads=threads,
        motor_hz=None,
        duration_s=None,
        warmup_s=None,
        repeat=runs,
    )
    limits = measure_limits(threads, progress=progress)
    given = bench.random_input(spec, np.random.default_rng(1))
    every = []
    for _ in range(runs):
        runner = create_engine(labels["engine"], bundle, provider=provider, threads=threads)
        try:
            runner.set_prompt(spec.tasks[0])
            every.append(
                bench.time_engine(runner, spec, repeats=repeats, warmup=warmup, progress=progress)
            )
            answer, _ = bench.run_chunk(runner, spec, given)
        finally:
            runner.close()
    times = bench.joined(every)
    # The better of before and after: another program may have taken its share meanwhile.
    limits = limits.merged(measure_limits(threads, progress=progress))
    stages, chunk = bench.judge_engine(times, manifest, limits)
    eager = None
    if eager_root is not None:
        eager = _eager(
            eager_root, bundle, given, answer, chunk.times.p50_ms, threads, eager_repeats, progress
        )
    return bench.BenchReport(
        schema=bench.SCHEMA,
        schema_version=bench.SCHEMA_VERSION,
        # It calls stage by stage.
        context=with_timing(context, len(times.chunks), 0),
        size=labels["size"],
        family=spec.network.family,
        warmup=warmup,
        limits=limits,
        stages=stages,
        chunk=chunk,
        phases=bench.chunk_phases(times.columns),
        roofline=bench.chunk_roofline(times.columns, manifest, limits)
        if (labels["engine"], provider) == ("ort", "cpu")
        else bench.Roofline(limits=None, stages={}, why_not=NO_LIMITS_ELSEWHERE),
        chunks=times.columns,
        eager=eager,
    )


def _eager(
    root: Path,
    bundle: Bundle,
    given: ChunkInput,
    answer: Float32Array,
    engine_p50_ms: float,
    threads: int,
    repeats: int,
    progress: Callable[[str, int, int], None],
) -> Any:  # noqa: ANN401 - an EagerReport; its module needs torch
    baseline = _export_side()
    progress("load eager baseline", 0, 1)
    policy = baseline.EagerPolicy.load(root)
    progress("load eager baseline", 1, 1)
    return baseline.time_eager(
        policy,
        bundle.spec,
        given,
        threads=threads,
        repeats=repeats,
        engine_p50_ms=engine_p50_ms,
        engine_actions=answer,
        progress=progress,
    )


def _tell(report: BenchReport, json_file: Path | None, as_json: bool) -> None:
    import msgspec

    plain = msgspec.to_builtins(report)
    if as_json:
        say_json(plain)
    else:
        _say_report(report)
    # After it was said: a full disk must not take the figures with it.
    if json_file is not None:
        write_json(json_file, plain)


def _say_report(report: BenchReport) -> None:
    context = report.context
    rows = []
    for name, stage in {**report.stages, "chunk": report.chunk}.items():
        times = stage.times
        rows.append(
            (
                name,
                times.n,
                *(round(ms, 1) for ms in (times.p50_ms, times.p95_ms, times.p99_ms, times.min_ms)),
                round(stage.ratio_to_gemm_floor, 2),
                round(stage.percent_of_limit),
            )
        )
    header = ("stage", "n", "p50 ms", "p95 ms", "p99 ms", "min ms", "x GEMM floor", "% limit")
    say_table(
        f"{report.size} {context.precision} on {context.engine} {context.provider}", header, rows
    )
    limits, machine = report.limits, context.machine
    say_roofline(report.roofline)
    say(
        f"limits: {limits.best_gflop_s:.1f} GFLOP/s float32 GEMM, {limits.stream_gb_s:.1f} GB/s, "
        f"{limits.threads} threads of {machine.cpu}"
    )
    if report.eager is not None:
        eager = report.eager
        parts = ", ".join(f"{name} {t.p50_ms:.0f}" for name, t in eager.stages.items())
        say(
            f"eager torch, unreduced: {eager.chunk.p50_ms:.0f} ms ({parts}); "
            f"engine / eager {eager.ratio:.3f}; answers differ by {eager.largest_difference:.1e}"
        )
    if max(machine.load_average) > machine.n_cpus / 2:
        remark(
            f"load average {machine.load_average[0]:.1f} before the run: other programs took part"
        )
