"""What an export is made of: everything is read and checked before the first byte is written."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

import numpy as np
import torch

from gwp_edge.calibration.collect import DEFAULT_N_HELD_OUT
from gwp_edge.calibration.quantize import Quantized
from gwp_edge.calibration.sampling import DEFAULT_N_SAMPLES
from gwp_edge.errors import SpecError
from gwp_edge.export.accounting import account
from gwp_edge.export.checkpoint import Checkpoint, open_checkpoint, open_module
from gwp_edge.export.companions import Companions, find_companions, read_statistics
from gwp_edge.export.layout import find_layout
from gwp_edge.export.ops import WeightSource
from gwp_edge.export.precision import (
    DEFAULT_INT4_BLOCK,
    QUANTIZED_FORMATS,
    Format,
    Recipe,
    make_recipe,
)
from gwp_edge.export.prompt_cache import needed_rows
from gwp_edge.export.prompts import encode_prompt, pad_rows, read_prompt_embedding, task_name
from gwp_edge.export.sizes import network_sizes
from gwp_edge.export.vision_encoder import VaeConfig
from gwp_edge.sampler import make_schedule
from gwp_edge.spec import PolicySpec
from gwp_edge.types import Float32Array

Progress = Callable[[str, int, int], None]
DEFAULT_OBSERVER: Final = "auto"
DEFAULT_PERCENTILE: Final = 99.9


def silent(stage: str, done: int, total: int) -> None:
    """Report to nobody."""


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """What ``gwp-edge export`` was asked for; see its help."""

    checkpoint: Path
    out: Path
    base_model: Path | None = None
    norm_stats: Path | None = None
    prompts: tuple[str, ...] = ()
    prompt_embeddings: tuple[Path, ...] = ()
    precision: str = "fp32"
    n_steps: int = 10
    timesteps: Literal["bfloat16", "exact"] = "bfloat16"
    embodiment: int = 0
    layout: str = "piper-dual"
    head_dim: int | None = None
    use_ema: bool = False
    engine_check: Literal["auto", "always", "never"] = "auto"
    # What follows is for quantized precisions; see QuantizeOptions.
    target: str = "cpu"
    calibration: Path | None = None
    calibration_record: Path | None = None
    samples: int = DEFAULT_N_SAMPLES
    held_out_samples: int = DEFAULT_N_HELD_OUT
    seed: int = 0
    observer: str = DEFAULT_OBSERVER
    percentile: float = DEFAULT_PERCENTILE
    smoothing: bool = True
    recipe_file: Path | None = None
    rest: Format | None = None  # None: what suits the target
    block: int = DEFAULT_INT4_BLOCK
    max_error_rad: float | None = 2e-3
    max_error_m: float | None = 2e-4
    allow_synthetic: bool = False
    go_on: bool = False
    device: str | None = None
    # Of samples, seed and smoothing: those asked for by name, to which a record is held.
    fixed: frozenset[str] = frozenset()


def check_idle(options: ExportOptions) -> None:
    """Refuse what would have no effect.

    Raises:
        SpecError: a flag of quantization with a precision that is not quantized, or of blocks
            with one that has none.
    """
    has_block = options.block != DEFAULT_INT4_BLOCK
    if options.precision in QUANTIZED_FORMATS:
        # A recipe may give any layer any format.
        idle = {"--block": has_block and options.precision != "w4" and options.recipe_file is None}
        known: tuple[Format, ...] = ("w4",)
    else:
        idle = {
            "--calibration": options.calibration is not None,
            "--calibration-record": options.calibration_record is not None,
            "--recipe": options.recipe_file is not None,
            "--observer": options.observer != DEFAULT_OBSERVER,
            "--percentile": options.percentile != DEFAULT_PERCENTILE,
            "--block": has_block,
            "--device": options.device is not None,
            "--rest": options.rest is not None,
        }
        known = QUANTIZED_FORMATS
    for flag, is_given in idle.items():
        if is_given:
            raise SpecError(
                f"{flag} has no effect with --precision {options.precision}; choose "
                f"{', '.join(known)}, or leave it out"
            )


class Source:
    """A checkpoint as a weight source: finite values only.

    Weights that every denoising step reads can be kept, as far as a budget goes.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        self._budget_bytes = 0
        self._kept: dict[str, torch.Tensor] = {}
        self._finite: set[str] = set()

    @contextmanager
    def keeping(self, budget_bytes: int) -> Iterator[None]:
        """Keep action weights in memory inside this block."""
        self._budget_bytes = budget_bytes
        try:
            yield
        finally:
            self._budget_bytes = 0
            self._kept.clear()

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor without reading it."""
        return self._checkpoint.info(name).shape

    def load(self, name: str) -> torch.Tensor:
        """Return a tensor; it was looked at for NaN and infinity once."""
        kept = self._kept.get(name)
        if kept is not None:
            return kept
        if name in self._finite:
            tensor = self._checkpoint.load(name)
        else:
            tensor = self._checkpoint.load_finite(name)
            self._finite.add(name)
        if ".visual_expert." not in name and tensor.nbytes <= self._budget_bytes:
            self._budget_bytes -= tensor.nbytes
            self._kept[name] = tensor
        return tensor


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """Everything read and checked before the first byte is written."""

    checkpoint: Checkpoint
    weights: Source
    vae_weights: Source
    vae: VaeConfig
    spec: PolicySpec
    recipe: Recipe
    embeddings: tuple[torch.Tensor, ...]
    unused: Mapping[str, int]
    quantized: Quantized | None = None

    @property
    def network(self) -> WeightSource:
        """The weights that the bundle holds: smoothing factors may be folded into them."""
        return self.weights if self.quantized is None else self.quantized.weights


def read_inputs(options: ExportOptions, stack: ExitStack, progress: Progress) -> Inputs:
    """Read and check all that an export needs; files stay open as long as ``stack``.

    Raises:
        SpecError: an input is missing or does not fit the others.
    """
    recipe = make_recipe(options.precision)
    schedule = make_schedule(options.n_steps, rounding=options.timesteps)
    layout = find_layout(options.layout)
    checkpoint = stack.enter_context(open_checkpoint(options.checkpoint, use_ema=options.use_ema))
    sizes = network_sizes(checkpoint, head_dim=options.head_dim)
    accounting = account(checkpoint, sizes)
    if not 0 <= options.embodiment < sizes.n_embodiments:
        raise SpecError(
            f"--embodiment {options.embodiment}: the checkpoint has 0..{sizes.n_embodiments - 1}"
        )
    companions = find_companions(
        options.checkpoint,
        norm_stats=options.norm_stats,
        base_model=options.base_model,
        prompt_embeddings=options.prompt_embeddings,
        has_prompt_text=bool(options.prompts),
    )
    vae_checkpoint = stack.enter_context(open_module(companions.vae))
    vae = VaeConfig.from_json(vae_checkpoint.config or {})
    if vae.z_dim != sizes.latent_channels:
        raise SpecError(
            f"VAE {companions.vae} has {vae.z_dim} latent channels, the network takes "
            f"{sizes.latent_channels}; pass the right base model with --base-model"
        )
    statistics = read_statistics(companions.norm_stats, len(layout.channels))
    tasks = _read_prompts(options, companions, sizes.text_dim, progress)
    embeddings = tuple(torch.from_numpy(rows) for rows in tasks.values())
    try:
        spec = PolicySpec(
            network=sizes.network_spec(n_text_rows=needed_rows(embeddings)),
            sampler=schedule,
            canvas=layout.canvas,
            channels=layout.channels,
            statistics=statistics,
            n_rows=layout.n_rows,
            period_ns=round(1e9 / layout.rate_hz),
            tasks=tuple(tasks),
            embodiment=options.embodiment,
        )
    except ValueError as e:
        raise SpecError(f"checkpoint and --layout {options.layout} do not fit: {e}") from e
    return Inputs(
        checkpoint=checkpoint,
        weights=Source(checkpoint),
        vae_weights=Source(vae_checkpoint),
        vae=vae,
        spec=spec,
        recipe=recipe,
        embeddings=embeddings,
        unused=_count_reasons({**accounting.unused, **accounting.dropped}),
    )


def _count_reasons(unused: Mapping[str, str]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for reason in unused.values():
        counts[reason] = counts.get(reason, 0) + 1
    return counts


def _read_prompts(
    options: ExportOptions, companions: Companions, text_dim: int, progress: Progress
) -> dict[str, Float32Array]:
    """Return padded embeddings (64, text_dim) by task name, in the order given."""
    tasks: dict[str, Float32Array] = {}

    def add(name: str, rows: Float32Array) -> None:
        if name in tasks and not np.array_equal(tasks[name], pad_rows(rows)):
            raise SpecError(f"two different prompts are called {name!r}; rename one file")
        tasks[name] = pad_rows(rows)

    for i, text in enumerate(options.prompts):
        progress("encode prompts", i, len(options.prompts))
        if companions.base_model is None:
            raise SpecError("--prompt needs the umT5 encoder: give its folder with --base-model")
        add(task_name(text=text), encode_prompt(text, companions.base_model))
    for path in companions.prompt_files:
        add(task_name(path=path), read_prompt_embedding(path, text_dim=text_dim))
    for name, rows in tasks.items():
        if rows.shape[1] != text_dim:
            raise SpecError(
                f"prompt {name!r} has {rows.shape[1]} columns, the network takes {text_dim}"
            )
    return tasks


@contextmanager
def bytes_progress(progress: Progress, stage: str, total: int) -> Iterator[Callable[[int], None]]:
    """Yield a function that adds bytes to the progress of a stage."""
    done = 0

    def advance(n_bytes: int) -> None:
        nonlocal done
        done += n_bytes
        progress(stage, done, total)

    progress(stage, 0, total)
    yield advance
    progress(stage, total, total)
