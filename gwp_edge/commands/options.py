"""Options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

BundleArgument = Annotated[Path, typer.Argument(help="Bundle folder, such as policy.gwp.")]
JsonFlag = Annotated[bool, typer.Option("--json", help="Print the answer as JSON.")]
TaskOption = Annotated[
    str | None, typer.Option("--task", help="Prompt to follow; the bundle's first by default.")
]
EngineOption = Annotated[str, typer.Option("--engine", help="ort, or trt where it was built.")]
ProviderOption = Annotated[str, typer.Option("--provider", help="For ort: cpu or cuda.")]
ThreadsOption = Annotated[
    int | None, typer.Option("--threads", min=1, help="CPU threads of the engine.")
]
