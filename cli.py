"""Command line of gwp-edge. Every command imports what it needs only when it runs."""

from __future__ import annotations

import logging
import sys
from typing import Annotated

try:
    import typer

    from gwp_edge.commands import (
        benchmarks,
        building,
        cameras,
        evaluating,
        exporting,
        inference,
        lag,
        machine,
        planning,
        profiling,
        running,
        sessions,
        statistics,
        verifying,
    )
    from gwp_edge.console import one_line_errors, open_closed_streams, say
except KeyboardInterrupt:  # they take a moment, before there is anybody to tell it in one line
    if sys.stderr is not None:
        sys.stderr.write("gwp-edge: interrupted\n")
    raise SystemExit(130) from None

app = typer.Typer(
    name="gwp-edge",
    help="Put a GigaWorld-Policy checkpoint on a robot: export, run, profile.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

for command in (
    exporting.export,
    exporting.inspect,
    verifying.verify,
    building.build,
    planning.plan,
    inference.infer,
    running.run,
    sessions.record,
    sessions.replay,
    machine.doctor,
    cameras.cameras,
    statistics.stats,
    lag.lag,
):
    app.command()(command)
app.command("eval")(evaluating.evaluate)
app.add_typer(profiling.app, name="profile")
app.add_typer(benchmarks.app, name="bench")


def _say_version(value: bool) -> None:
    if value:
        import gwp_edge

        say(f"gwp-edge {gwp_edge.__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_say_version, is_eager=True, help="Print and stop."),
    ] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Log what happens.")] = False,
) -> None:
    """Common options."""
    del version
    logging.basicConfig(
        level=logging.INFO if verbose else logging.WARNING,
        format="%(levelname)s %(name)s: %(message)s",
    )


def main() -> None:
    """Entry point."""
    open_closed_streams()
    with one_line_errors():
        app()


if __name__ == "__main__":
    main()
