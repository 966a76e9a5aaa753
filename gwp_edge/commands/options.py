"""Options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

BundleArgument = Annotated[Path, typer.Argument(help="Bundle folder, such as policy.gwp.")]
JsonFlag = Annotated[bool, typer.Option("--json", help="Print the answer as JSON.")]
TaskOption = Annotated[
    str | None, typer.Option("--task", help="Prompt to follow; the bundle's first by default.")
]
EngineOption = Annotated[str, typer.Option("--engine", help="ort, or trt where it was built.")]
ProviderOption = Annotated[str, typer.Option("--provider", help="For ort: cpu or cuda.")]
ThreadsOption = Annotated[
    int | None, typer.Option("--threads", min=1, max=256, help="CPU threads of the engine.")
]
DriverOption = Annotated[
    str | None,
    typer.Option("--driver", help="For PiPER arms: native, or piper-sdk for the vendor's library."),
]

RerunOption = Annotated[
    str | None,
    typer.Option(
        "--rerun",
        help="Log frames, joints, chunks and limits live: viewer (the Rerun viewer of this "
        "machine), its URL, or a new file ending in .rrd. Needs the rerun extra.",
    ),
]


def group_with_default(default: str) -> type[TyperGroup]:
    """Return a command group in which ``default`` is meant where no command is named.

    An argument that is called like a command needs the default's name in front of it.
    """

    class DefaultGroup(TyperGroup):
        """Puts the command in where it was left out."""

        def parse_args(self, ctx: Any, args: list[str]) -> list[str]:  # noqa: ANN401 - typer's own
            if not args or (args[0] not in self.commands and args[0] not in ("-h", "--help")):
                args = [default, *args]
            parsed: list[str] = super().parse_args(ctx, args)
            return parsed

    return DefaultGroup
