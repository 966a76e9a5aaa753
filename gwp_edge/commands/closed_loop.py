"""What ``eval`` and ``bench methods`` share: policies, outputs, and what a reader must know."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from gwp_edge.console import require_writable
from gwp_edge.errors import SpecError

if TYPE_CHECKING:
    from gwp_edge.bundle import Bundle
    from gwp_edge.evaluation.episode import ChunkPolicy
    from gwp_edge.evaluation.evaluate import Summary
    from gwp_edge.profiling.context import Context

_MOTOR_HZ = 200.0


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineChoice:
    """What runs a bundle.

    Attributes:
        engine: ort or trt.
        provider: of ort.
        threads: of the processor; None is the engine's choice.
    """

    engine: str
    provider: str
    threads: int | None


def check_outputs(json_file: Path | None, folder: Path | None = None) -> None:
    """Check before the first episode that what is found can be written; makes ``folder``.

    Raises:
        SpecError: it cannot.
    """
    require_writable(json_file)
    if folder is not None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as e:
            raise SpecError(f"--out {folder}: cannot be a folder for pictures: {e.strerror}") from e


@contextmanager
def open_policies(
    folder: Path, instructions: Iterable[str], choice: EngineChoice
) -> Iterator[dict[str, ChunkPolicy]]:
    """Give a policy of the bundle for each instruction that is told, each opened once."""
    from gwp_edge.policy import load

    with ExitStack() as stack:
        policies: dict[str, ChunkPolicy] = {}
        for text in dict.fromkeys(instructions):
            policy = load(
                folder,
                engine=choice.engine,
                task=text,
                threads=choice.threads,
                provider=choice.provider,
            )
            stack.callback(policy.close)
            policies[text] = policy
        yield policies


def make_report_context(
    bundle: Bundle, folder: Path, choice: EngineChoice, execution: str | None
) -> Context:
    """Return what a reader of a report must know: bundle, engine, machine, commit."""
    from gwp_edge.machine_limits import describe_machine
    from gwp_edge.profiling.context import make_context

    return make_context(
        bundle.spec,
        describe_machine(("numpy", "onnxruntime", "mujoco")),
        manifest=bundle.manifest,
        bundle=str(folder),
        robot="sim",
        engine=choice.engine,
        provider=choice.provider,
        threads=choice.threads,
        motor_hz=_MOTOR_HZ,
        duration_s=None,
        warmup_s=None,
        execution=execution,
    )


def rate_text(summary: Summary) -> str:
    """Return the success rate with its interval, in percent."""
    return (
        f"{100 * summary.success_rate:.0f} % "
        f"({100 * summary.success_low:.0f} to {100 * summary.success_high:.0f})"
    )


def seconds_text(value: float | None) -> str:
    """Return a time, or a dash where there is none."""
    return "-" if value is None else f"{value:.2f}"


def seeds_text(found: Sequence[tuple[int, str]], most: int = 20) -> str:
    """Return seeds with how they ended, at most ``most`` of them."""
    shown = ", ".join(f"{seed} {outcome}" for seed, outcome in found[:most])
    return shown if len(found) <= most else f"{shown}, and {len(found) - most} more"
