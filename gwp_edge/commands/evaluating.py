"""``gwp-edge eval``: closed-loop success in the simulator."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gwp_edge.commands.execution import ExecutionOption, LeadOption, find_execution
from gwp_edge.commands.options import EngineOption, ProviderOption, ThreadsOption
from gwp_edge.console import EXIT_FAILED, progress_bars, remark, say, say_table, write_json
from gwp_edge.errors import SpecError

if TYPE_CHECKING:
    from gwp_edge.evaluation.episode import Ablation, EpisodeOptions
    from gwp_edge.evaluation.evaluate import Evaluation
    from gwp_edge.evaluation.tasks import TouchTask
    from gwp_edge.profiling.context import Context

_ABLATIONS = ("none", "blank-cameras", "swapped-prompt")


def evaluate(
    bundles: Annotated[
        list[Path], typer.Argument(help="Bundle folders; the first is compared to.")
    ],
    task: Annotated[str, typer.Option("--task", help="What is done: touch.")] = "touch",
    robot: Annotated[str, typer.Option("--robot", help="Where: sim.")] = "sim",
    episodes: Annotated[
        int, typer.Option("--episodes", min=1, help="Seeds for each instruction.")
    ] = 100,
    seed_start: Annotated[int, typer.Option("--seed-start", min=0, help="First seed.")] = 0,
    instruction: Annotated[
        list[str] | None, typer.Option("--instruction", help="Only this one; several times.")
    ] = None,
    execution: ExecutionOption = "soft",
    replan_hz: Annotated[
        float, typer.Option("--replan-hz", help="Chunks per second at most.")
    ] = 5.0,
    lead_ms: LeadOption = 0.0,
    latency_ms: Annotated[
        float, typer.Option("--latency-ms", help="Simulated time from observation to chunk.")
    ] = 0.0,
    latency_jitter_ms: Annotated[
        float, typer.Option("--latency-jitter-ms", help="Uniform, added to the latency.")
    ] = 0.0,
    camera_delay_ms: Annotated[
        float, typer.Option("--camera-delay-ms", help="How old pictures are when they arrive.")
    ] = 0.0,
    ablate: Annotated[
        str, typer.Option("--ablate", help="Take away: blank-cameras or swapped-prompt.")
    ] = "none",
    engine: EngineOption = "ort",
    provider: ProviderOption = "cpu",
    threads: ThreadsOption = None,
    compare: Annotated[
        bool, typer.Option("--compare", help="Compare all bundles with the first, in pairs.")
    ] = False,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write the report to this file.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="Folder for pictures of failures.")
    ] = None,
    fail_below: Annotated[
        float | None,
        typer.Option("--fail-below", min=0, max=1, help="Exit with 1 below this success rate."),
    ] = None,
) -> None:
    """Count how often a policy does its task in the simulator, on the same seeds for every bundle.

    Time is simulated: results do not depend on how fast this machine is.

    Example: gwp-edge eval int8.gwp fp32.gwp --compare --task touch --episodes 100
    """
    from gwp_edge.evaluation.episode import EpisodeOptions
    from gwp_edge.evaluation.evaluate import to_json, write_failures
    from gwp_edge.evaluation.tasks import find_task

    if robot != "sim":
        raise SpecError(f"--robot {robot}: closed-loop evaluation runs in the sim only")
    if compare and len(bundles) < 2:
        raise SpecError("--compare: give two bundles or more")
    method, blend, synchronous = find_execution(execution)
    chosen = find_task(task)
    options = EpisodeOptions(
        guidance=method,
        blend=blend,
        synchronous=synchronous,
        replan_hz=replan_hz,
        lead_ms=lead_ms,
        latency_ms=latency_ms,
        latency_jitter_ms=latency_jitter_ms,
        camera_delay_ms=camera_delay_ms,
        ablation=_ablation(ablate),
    )
    instructions = instruction or list(chosen.instructions)
    for text in instructions:
        chosen.cube_of(text)
    seeds = range(seed_start, seed_start + episodes)
    evaluations: list[Evaluation] = []
    contexts: list[Context] = []
    names = [bundle.stem for bundle in bundles]
    for bundle, name in zip(bundles, names, strict=True):
        label = name if names.count(name) == 1 else str(bundle)
        evaluation, context = _evaluate_bundle(
            bundle, label, chosen, instructions, seeds, options, (engine, provider, threads), out
        )
        evaluations.append(evaluation)
        contexts.append(context)
        if len(evaluation.results) < len(instructions) * len(seeds):
            remark("interrupted; what follows is about the episodes that were finished")
            break
    _say(evaluations, compare=compare)
    if json_file is not None:
        write_json(json_file, to_json(evaluations, contexts, chosen, options))
    if out is not None:
        n = sum(len(write_failures(e, out)) for e in evaluations)
        say(f"{n} pictures of failures in {out}")
    worst = min(s.success_rate for e in evaluations for s in e.summaries())
    if fail_below is not None and worst < fail_below:
        say(f"success rate {worst:.2f} is below {fail_below:g}")
        raise typer.Exit(EXIT_FAILED)


def _ablation(name: str) -> Ablation:
    for known in _ABLATIONS:
        if name == known:
            return known  # type: ignore[return-value]
    raise SpecError(f"--ablate {name}: expected {', '.join(_ABLATIONS)}")


def _evaluate_bundle(
    folder: Path,
    label: str,
    task: TouchTask,
    instructions: list[str],
    seeds: range,
    options: EpisodeOptions,
    machine: tuple[str, str, int | None],
    out: Path | None,
) -> tuple[Evaluation, Context]:
    from gwp_edge.bundle import Bundle
    from gwp_edge.evaluation.episode import ChunkPolicy, check_fits
    from gwp_edge.evaluation.evaluate import evaluate as run
    from gwp_edge.machine_limits import describe_machine
    from gwp_edge.policy import BundlePolicy, load
    from gwp_edge.profiling.context import make_context

    engine, provider, threads = machine
    bundle = Bundle.open(folder)
    check_fits(bundle.spec, task)
    swapped = options.ablation == "swapped-prompt"
    backwards = reversed(list(task.instructions))
    others = dict(zip(task.instructions, backwards, strict=True))
    opened: list[BundlePolicy] = []
    policies: dict[str, ChunkPolicy] = {}
    try:
        for instruction in instructions:
            told = others[instruction] if swapped else instruction
            policy = load(folder, engine=engine, task=told, threads=threads, provider=provider)
            opened.append(policy)
            policies[instruction] = policy
        with progress_bars() as report:
            evaluation = run(
                label,
                policies,
                task,
                seeds,
                options,
                keep_pictures=out is not None,
                progress=report,
            )
    finally:
        for policy in opened:
            policy.close()
    context = make_context(
        bundle.spec,
        describe_machine(),
        manifest=bundle.manifest,
        bundle=str(folder),
        robot="sim",
        engine=engine,
        provider=provider,
        threads=threads,
        motor_hz=200.0,
        duration_s=None,
        warmup_s=None,
        execution=options.guidance if options.blend == "seam" else options.blend,
    )
    return evaluation, context


def _say(evaluations: list[Evaluation], *, compare: bool) -> None:
    summaries = [(e.label, s) for e in evaluations for s in e.summaries()]
    say_table(
        "Closed loop",
        ("bundle", "instruction", "done", "success (95 %)", "wrong", "timeout"),
        [
            (
                label,
                s.instruction,
                f"{s.n_success}/{s.n}",
                f"{100 * s.success_rate:.0f} % "
                f"({100 * s.success_low:.0f} to {100 * s.success_high:.0f})",
                s.n_wrong_object,
                s.n_timeout,
            )
            for label, s in summaries
        ],
    )
    say_table(
        "Motion",
        ("bundle", "instruction", "p50 s", "p90 s", "directness", "jerk rad/s3", "limited"),
        [
            (
                label,
                s.instruction,
                _seconds(s.time_to_success_p50_s),
                _seconds(s.time_to_success_p90_s),
                f"{s.directness_mean:.2f}",
                f"{s.jerk_rms_rad_s3:.0f}",
                f"{100 * s.limited_share:.1f} %",
            )
            for label, s in summaries
        ],
    )
    if not compare:
        return
    for evaluation in evaluations[1:]:
        c = evaluation.compared_with(evaluations[0])
        say(
            f"{evaluation.label} against {evaluations[0].label}: {100 * c.difference:+.1f} points "
            f"({100 * c.low:+.1f} to {100 * c.high:+.1f}) over {c.n} pairs, only one succeeded in "
            f"{c.n_only_first} and {c.n_only_second}, p = {c.p:.2g}: {c.verdict}"
        )


def _seconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"
