"""``gwp-edge eval``: closed-loop success in the simulator."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gwp_edge.commands.closed_loop import (
    EngineChoice,
    check_outputs,
    make_report_context,
    open_policies,
    rate_text,
    seconds_text,
    seeds_text,
)
from gwp_edge.commands.execution import ExecutionOption, LeadOption, find_execution
from gwp_edge.commands.options import EngineOption, ProviderOption, ThreadsOption
from gwp_edge.console import (
    EXIT_FAILED,
    EXIT_INTERRUPTED,
    progress_bars,
    raise_on_signals,
    remark,
    say,
    say_table,
    write_json,
)
from gwp_edge.errors import SpecError

if TYPE_CHECKING:
    from gwp_edge.evaluation.evaluate import Evaluation
    from gwp_edge.evaluation.options import Ablation, EpisodeOptions
    from gwp_edge.evaluation.tasks import TouchTask
    from gwp_edge.profiling.context import Context


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
        float,
        typer.Option(
            "--camera-delay-ms",
            help="How old pictures are when they arrive; the state is that of their moment.",
        ),
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
    within: Annotated[
        float | None,
        typer.Option(
            "--within",
            min=0,
            help="With --compare: exit with 1 unless the whole interval of every difference lies "
            "within so many points.",
        ),
    ] = None,
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
    from gwp_edge.evaluation.evaluate import to_json, write_failures
    from gwp_edge.evaluation.options import EpisodeOptions
    from gwp_edge.evaluation.tasks import find_task

    if robot != "sim":
        raise SpecError(f"--robot {robot}: closed-loop evaluation runs in the sim only")
    if compare and len(bundles) < 2:
        raise SpecError("--compare: give two bundles or more")
    if within is not None and not compare:
        raise SpecError("--within: judges the differences of --compare; give that too")
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
    instructions = list(dict.fromkeys(instruction or chosen.instructions))
    for text in instructions:
        chosen.cube_of(text)
    check_outputs(json_file, out)
    raise_on_signals(KeyboardInterrupt)  # a kill keeps the finished episodes like Ctrl-C does
    evaluations, contexts = _evaluate_bundles(
        bundles,
        chosen,
        instructions,
        range(seed_start, seed_start + episodes),
        options,
        EngineChoice(engine=engine, provider=provider, threads=threads),
        execution=execution,
        keep_pictures=out is not None,
    )
    wanted = len(bundles) * len(instructions) * episodes
    interrupted = sum(len(e.results) for e in evaluations) < wanted
    if interrupted:
        remark("interrupted; what follows is about the episodes that were finished")
    _say(evaluations)
    if compare:
        _say_comparisons(evaluations, within)
    if json_file is not None:
        write_json(json_file, to_json(evaluations, contexts, chosen, options))
    if out is not None:
        n = sum(len(write_failures(e, out)) for e in evaluations)
        say(f"{n} pictures of failures in {out}")
    if interrupted:
        raise typer.Exit(EXIT_INTERRUPTED)
    if not _passes(evaluations, within, fail_below):
        raise typer.Exit(EXIT_FAILED)


def _passes(evaluations: list[Evaluation], within: float | None, fail_below: float | None) -> bool:
    passes = True
    worst = min(s.success_rate for e in evaluations for s in e.summaries())
    if fail_below is not None and worst < fail_below:
        say(f"success rate {worst:.2f} is below {fail_below:g}")
        passes = False
    for evaluation in evaluations[1:] if within is not None else ():
        if not evaluation.compared_with(evaluations[0]).is_within((within or 0.0) / 100):
            say(f"{evaluation.label} is not shown to be within {within:g} points")
            passes = False
    return passes


def _ablation(name: str) -> Ablation:
    from gwp_edge.evaluation.options import ABLATIONS

    for known in ABLATIONS:
        if name == known:
            return known
    raise SpecError(f"--ablate {name}: expected {', '.join(ABLATIONS)}")


def _evaluate_bundles(
    bundles: list[Path],
    task: TouchTask,
    instructions: list[str],
    seeds: range,
    options: EpisodeOptions,
    choice: EngineChoice,
    *,
    execution: str,
    keep_pictures: bool,
) -> tuple[list[Evaluation], list[Context]]:
    """Evaluate one bundle after the other; ends early, with what is finished, on Ctrl-C."""
    from gwp_edge.bundle import Bundle
    from gwp_edge.evaluation.episode import check_fits
    from gwp_edge.evaluation.evaluate import evaluate as run
    from gwp_edge.evaluation.evaluate import told_instead_of

    opened = [Bundle.open(folder) for folder in bundles]
    for bundle in opened:  # before the first episode: hours may lie between them
        check_fits(bundle.spec, task)
    names = [folder.stem for folder in bundles]
    evaluations: list[Evaluation] = []
    contexts: list[Context] = []
    told = [told_instead_of(text, task, options) for text in instructions]
    for folder, bundle, name in zip(bundles, opened, names, strict=True):
        with open_policies(folder, told, choice) as policies, progress_bars() as report:
            evaluation = run(
                name if names.count(name) == 1 else str(folder),
                policies,
                task,
                seeds,
                options,
                instructions=instructions,
                keep_pictures=keep_pictures,
                progress=report,
            )
        if evaluation.results or not evaluations:
            evaluations.append(evaluation)
            contexts.append(make_report_context(bundle, folder, choice, execution))
        if len(evaluation.results) < len(instructions) * len(seeds):
            break
    return evaluations, contexts


def _say(evaluations: list[Evaluation]) -> None:
    summaries = [(e.label, s) for e in evaluations for s in e.summaries()]
    say_table(
        "Closed loop",
        ("bundle", "instruction", "done", "success (95 %)", "wrong", "timeout"),
        [
            (
                label,
                s.instruction,
                f"{s.n_success}/{s.n}",
                rate_text(s),
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
                seconds_text(s.time_to_success_p50_s),
                seconds_text(s.time_to_success_p90_s),
                f"{s.directness_mean:.2f}",
                f"{s.jerk_rms_rad_s3:.0f}",
                f"{100 * s.limited_share:.0f} % by {1e3 * s.withheld_p50_rad:.1f}, "
                f"p99 {1e3 * s.withheld_p99_rad:.0f} mrad",
            )
            for label, s in summaries
        ],
    )
    for evaluation in evaluations:
        for text in dict.fromkeys(r.instruction for r in evaluation.results):
            found = [
                (r.seed, r.outcome)
                for r in evaluation.results
                if r.instruction == text and r.outcome != "success"
            ]
            if found:
                say(f"{evaluation.label}, {text}: failed seeds {seeds_text(found)}")


def _say_comparisons(evaluations: list[Evaluation], within: float | None) -> None:
    for evaluation in evaluations[1:]:
        c = evaluation.compared_with(evaluations[0])
        verdict = c.verdict
        if within is not None and c.is_within(within / 100):
            verdict += f", within {within:g} points"
        say(
            f"{evaluation.label} against {evaluations[0].label}: {100 * c.difference:+.1f} points "
            f"({100 * c.low:+.1f} to {100 * c.high:+.1f}) over {c.n} pairs, only one succeeded in "
            f"{c.n_only_first} and {c.n_only_second}, p = {c.p:.2g}: {verdict}"
        )
