"""``gwp-edge record`` and ``replay``: a run on record, and again off the robot."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gwp_edge.commands.options import EngineOption, JsonFlag, ProviderOption, ThreadsOption
from gwp_edge.commands.running import run
from gwp_edge.console import (
    EXIT_FAILED,
    progress_bars,
    raise_on_signals,
    say,
    say_json,
    say_table,
)
from gwp_edge.errors import SpecError

if TYPE_CHECKING:
    from gwp_edge.replay import ReplayReport
    from gwp_edge.session_format import Session


def record(
    session: Annotated[Path, typer.Argument(help="New folder for the recording.")],
    **options: Any,  # noqa: ANN401 - those of run
) -> None:
    """Run a policy and keep frames, states, plans, commands and stamps; takes run's options.

    The same as gwp-edge run --record SESSION.

    Example: gwp-edge record session policy.gwp --robot sim --duration 10
    """
    from gwp_edge.manifest import MANIFEST

    if (session / MANIFEST).is_file():
        raise SpecError(
            f"{session}: is a bundle; name the new folder for the recording before it: gwp-edge "
            f"record SESSION {session}"
        )
    run(**options, record=session)


def _signature_of_record() -> inspect.Signature:
    """Return the parameters of ``run`` after the folder, which stands in for ``--record``."""
    own = inspect.signature(record, eval_str=True).parameters["session"]
    given = inspect.signature(run, eval_str=True).parameters
    return inspect.Signature([own, *(p for name, p in given.items() if name != "record")])


# Typer reads both: options are told from arguments wherever they stand, as they are by run.
record.__signature__ = _signature_of_record()  # type: ignore[attr-defined]
record.__annotations__ = {
    name: p.annotation for name, p in inspect.signature(record).parameters.items()
}


def replay(
    session: Annotated[Path, typer.Argument(help="Folder made by gwp-edge run --record.")],
    bundle: Annotated[
        Path | None,
        typer.Option("--bundle", help="Answer with this bundle; by default the one that ran."),
    ] = None,
    to_lerobot: Annotated[
        Path | None,
        typer.Option("--to-lerobot", help="Write a LeRobot v3.0 dataset there instead."),
    ] = None,
    task: Annotated[
        str | None, typer.Option("--task", help="Prompt; by default the one that was followed.")
    ] = None,
    tolerance: Annotated[
        float | None,
        typer.Option("--tolerance", help="Allowed difference, rad and m; the bundle's own else."),
    ] = None,
    engine: EngineOption = "ort",
    provider: ProviderOption = "cpu",
    threads: ThreadsOption = None,
    as_json: JsonFlag = False,
) -> None:
    """Compute a recorded run again with the same noise, and show where answers diverge.

    Exits with 1 when they do.

    Example: gwp-edge replay session-1 --bundle policy-int8.gwp
    """
    from gwp_edge.session_format import Session

    raise_on_signals()  # a kill removes half a dataset like Ctrl-C does
    recorded = Session.open(session)
    if to_lerobot is not None:
        _export(recorded, to_lerobot, task, as_json=as_json)
        return
    from gwp_edge.policy import load
    from gwp_edge.replay import replay as compute

    path = bundle or Path(recorded.header.policy.get("path", ""))
    if not path.name:
        raise SpecError(f"{session}: was not recorded with a bundle; name one by --bundle")
    if bundle is None and not path.exists():
        raise SpecError(
            f"{session}: the bundle that ran was {path}, which is not there from this folder; name "
            "it by --bundle"
        )
    with progress_bars() as bars:
        policy = load(
            path,
            engine=engine,
            task=task or recorded.header.task or None,
            provider=provider,
            threads=threads,
            progress=bars,
        )
        try:
            report = compute(
                recorded,
                policy,
                tolerance=(
                    policy.bundle.manifest.golden.tolerance if tolerance is None else tolerance
                ),
                progress=lambda done, total: bars("replay", done, total),
            )
        finally:
            policy.close()
    if as_json:
        say_json(
            {
                "session": str(session),
                "bundle": str(path),
                "cut_off": recorded.end is None,
                **report.to_dict(),
            }
        )
    else:
        _say_report(report, recorded)
    if report.n_diverged:
        raise typer.Exit(EXIT_FAILED)


def _say_report(report: ReplayReport, recorded: Session) -> None:
    skipped = ", ".join(f"{n} without {reason}" for reason, n in report.skipped.items())
    say(
        f"replayed {report.n_replayed} of {report.n_chunks} recorded chunks"
        + (f" (left out: {skipped})" if skipped else "")
        + (f"; {report.n_lost} more were not recorded" if report.n_lost else "")
    )
    if recorded.end is None:
        say("the recording was cut off; what is there was replayed")
    rows = [
        (c.name, c.unit, f"{report.channel_errors[c.name]:.3g}") for c in recorded.spec.channels
    ]
    say_table("Largest difference", ("channel", "unit", "difference"), rows)
    first = report.first_divergence
    if first is None:
        say(f"no divergence: every action within {report.tolerance:.3g}")
        return
    latent = "not comparable" if first.latent_error is None else f"off by {first.latent_error:.3g}"
    canvas = {True: "equal", False: "differs", None: "not comparable"}[first.canvas_equal]
    say(
        f"{report.n_diverged} chunks diverge, the first is chunk {first.chunk_idx} in its "
        f"{first.diverged}: canvas {canvas}, latent {latent}, joints off by "
        f"{first.actions_rad:.3g} rad, grippers by {first.actions_m:.3g} m "
        f"(allowed {report.tolerance:.3g})"
    )


def _export(recorded: Session, out: Path, task: str | None, *, as_json: bool) -> None:
    from dataclasses import asdict

    from gwp_edge.session_export import export_lerobot

    report = export_lerobot(recorded, out, task=task)
    if as_json:
        say_json({"out": str(out), "cut_off": recorded.end is None, **asdict(report)})
        return
    if recorded.end is None:
        say("the recording was cut off; what is there was exported")
    say(
        f"{out}: {report.n_episodes} episodes, {report.n_frames} frames at {report.fps} fps; "
        f"pictures are {report.picture_age_ms.p50:.0f} ms old at the median, "
        f"{report.picture_age_ms.max:.0f} ms at most"
    )
    if report.picture_repeats:
        say(
            f"{report.picture_repeats} rows repeat the picture before: the cameras were slower "
            "than the dataset, or only the policy's pictures were recorded"
        )
