"""The float32 side of a verification, made from the checkpoint and not from the bundle.

Only the number of steps, the rounding of timesteps and the embodiment are the bundle's choice.
Statistics, canvas, channels and prompts are read again from where training left them, so that a
bundle with the wrong ones is found out instead of being followed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
import torch

from gwp_edge.bundle import Bundle
from gwp_edge.calibration.verify_frames import Prompt
from gwp_edge.errors import SpecError
from gwp_edge.export.checkpoint import Checkpoint, network_sizes, open_checkpoint, open_module
from gwp_edge.export.companions import find_companions, read_statistics
from gwp_edge.export.layout import LAYOUTS, Layout, find_layout
from gwp_edge.export.ops import WeightSource
from gwp_edge.export.precision import make_recipe
from gwp_edge.export.prompt_cache import prompt_cache
from gwp_edge.export.prompts import pad_rows, read_prompt_embedding
from gwp_edge.export.reference import ChunkInput, Reference
from gwp_edge.export.vision_encoder import VaeConfig
from gwp_edge.sampler import make_schedule
from gwp_edge.spec import NetworkSpec, PolicySpec, Statistics
from gwp_edge.types import FloatArray

Progress = Callable[[str, int, int], None]
PromptCache = Mapping[str, torch.Tensor]
# K/V in bfloat16 are 0.4 % off, and so are encoders of one text in two precisions; another text
# is off by about 100 %.
_SAME_PROMPT = 0.05


@dataclass(frozen=True, slots=True, kw_only=True)
class ReferenceOptions:
    """Where the reference comes from.

    Attributes:
        checkpoint: file or folder.
        base_model: folder with ``vae/``; looked for beside the checkpoint by default.
        norm_stats: statistics; looked for beside the checkpoint by default.
        prompt_embeddings: embeddings by file stem, before those found beside the checkpoint.
        layout: name or JSON file; the built-in one with the bundle's channels by default.
        use_ema: take the EMA copy.
    """

    checkpoint: Path
    base_model: Path | None = None
    norm_stats: Path | None = None
    prompt_embeddings: tuple[Path, ...] = ()
    layout: str | None = None
    use_ema: bool = False


class FiniteWeights:
    """A checkpoint as a weight source that refuses non-finite values. Threads: one owner."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor."""
        return self._checkpoint.info(name).shape

    def load(self, name: str) -> torch.Tensor:
        """Read a tensor."""
        return self._checkpoint.load_finite(name)


@dataclass(frozen=True, kw_only=True)
class FloatReference:
    """An open reference. Threads: one owner.

    Attributes:
        weights: the network.
        vae_weights: the encoder.
        vae: its sizes.
        spec: what the checkpoint's own files say.
        sources: hash of each checkpoint file.
        prompt_files: embeddings beside the checkpoint.
        notes: what could not be checked.
    """

    weights: WeightSource
    vae_weights: WeightSource
    vae: VaeConfig
    spec: PolicySpec
    sources: Mapping[str, str]
    prompt_files: tuple[Path, ...]
    notes: tuple[str, ...]

    def embedding(self, file: Path) -> torch.Tensor:
        """Read a prompt embedding, padded, shape (64, text_dim)."""
        rows = read_prompt_embedding(file, text_dim=self.spec.network.text_dim)
        return torch.from_numpy(pad_rows(rows))

    def cache(self, held: PromptCache, prompt: Prompt) -> PromptCache:
        """Return the text K/V in float32; those that the bundle holds where there is no file."""
        if prompt.file is None:
            return {name: value.to(torch.float32) for name, value in held.items()}
        return prompt_cache(
            self.weights, self.spec, self.embedding(prompt.file), make_recipe("fp32")
        )

    def answer(
        self,
        inputs: Sequence[ChunkInput],
        caches: Sequence[PromptCache],
        progress: Callable[[], None] | None = None,
    ) -> list[FloatArray]:
        """Return absolute actions (H, D), rad and m, for each input under its prompt."""
        reference = Reference(
            self.weights, self.vae_weights, self.vae, self.spec, make_recipe("fp32")
        )
        answers = []
        for one, cache in zip(inputs, caches, strict=True):
            answers.append(reference.run([one], cache)[0].actions)
            if progress is not None:
                progress()
        return answers


@contextmanager
def open_reference(
    bundle: Bundle, options: ReferenceOptions, progress: Progress
) -> Iterator[FloatReference]:
    """Open the checkpoint and read what lies beside it.

    Raises:
        SpecError: a part is missing, or the checkpoint is of another kind than the bundle.
    """
    given = bundle.spec
    with ExitStack() as stack:
        checkpoint = stack.enter_context(
            open_checkpoint(options.checkpoint, use_ema=options.use_ema)
        )
        # Shapes alone do not say how wide a head is; without config.json the bundle has to.
        hint = None if checkpoint.config else given.network.head_dim
        sizes = network_sizes(checkpoint, head_dim=hint)
        companions = find_companions(
            options.checkpoint,
            norm_stats=options.norm_stats,
            base_model=options.base_model,
            has_prompt_text=True,
        )
        vae_checkpoint = stack.enter_context(open_module(companions.vae))
        layout, notes = _layout(given, options.layout)
        if len(layout.channels) != given.n_channels or layout.n_rows != given.n_rows:
            raise SpecError(
                f"--layout {options.layout}: {len(layout.channels)} channels and {layout.n_rows} "
                f"rows, the bundle has {given.n_channels} and {given.n_rows}: not comparable"
            )
        spec = _expected_spec(
            given,
            network=sizes.network_spec(n_text_rows=given.network.n_text_rows),
            layout=layout,
            statistics=read_statistics(companions.norm_stats, len(layout.channels)),
        )
        if spec.network.n_action_channels != given.network.n_action_channels:
            raise SpecError(
                f"{options.checkpoint}: the network is {spec.network.n_action_channels} wide in "
                f"actions, the bundle {given.network.n_action_channels}: another checkpoint"
            )
        total, done = checkpoint.source_bytes, 0

        def advance(n_bytes: int) -> None:
            nonlocal done
            done += n_bytes
            progress("hash checkpoint", done, total)

        yield FloatReference(
            weights=FiniteWeights(checkpoint),
            vae_weights=FiniteWeights(vae_checkpoint),
            vae=VaeConfig.from_json(vae_checkpoint.config or {}),
            spec=spec,
            sources=checkpoint.source_hashes(advance),
            prompt_files=_prompt_files(options),
            notes=notes,
        )


def _expected_spec(
    given: PolicySpec, *, network: NetworkSpec, layout: Layout, statistics: Statistics
) -> PolicySpec:
    """Return the spec that an export with the bundle's steps, rounding and tasks should have."""
    try:
        return msgspec.structs.replace(
            given,
            network=network,
            sampler=make_schedule(given.sampler.n_steps, rounding=given.sampler.rounding),
            canvas=layout.canvas,
            channels=layout.channels,
            statistics=statistics,
            period_ns=round(1e9 / layout.rate_hz),
        )
    except ValueError as e:
        raise SpecError(f"checkpoint and layout do not fit: {e}") from e


def _layout(spec: PolicySpec, name: str | None) -> tuple[Layout, tuple[str, ...]]:
    """Return the layout to hold the bundle against, and what that leaves unchecked."""
    if name is not None:
        return find_layout(name), ()
    for layout in LAYOUTS.values():
        if layout.channels == spec.channels and layout.n_rows == spec.n_rows:
            return layout, ()
    own = Layout(
        channels=spec.channels,
        canvas=spec.canvas,
        n_rows=spec.n_rows,
        rate_hz=1e9 / spec.period_ns,
    )
    return own, (
        "channels and camera places were not checked: no built-in layout has these channels, "
        "give the one that the policy was trained with by --layout FILE",
    )


def _prompt_files(options: ReferenceOptions) -> tuple[Path, ...]:
    """Return the given embeddings, and those beside the checkpoint of other names."""
    own = options.checkpoint.resolve()
    own = own if own.is_dir() else own.parent
    beside: tuple[Path, ...] = ()
    if any((root / "t5_embedding").is_dir() for root in (own, own.parent, own.parent.parent)):
        beside = find_companions(
            options.checkpoint, norm_stats=options.norm_stats, base_model=options.base_model
        ).prompt_files
    given = {path.stem for path in options.prompt_embeddings}
    missing = [path for path in options.prompt_embeddings if not path.is_file()]
    if missing:
        raise SpecError(f"--prompt-embedding {missing[0]}: no such file")
    return (*options.prompt_embeddings, *(p for p in beside if p.stem not in given))


def prompt_difference(held: PromptCache, expected: PromptCache) -> float:
    """Return how far the text K/V in a bundle are from what they should be, relative."""
    if set(held) != set(expected):
        return float("inf")
    keys = [name for name in expected if name != "prompt_bias"]
    bias = (held["prompt_bias"].float() - expected["prompt_bias"].float()).abs()
    if float(bias.max()) > _SAME_PROMPT:
        return float("inf")
    error = sum(float((held[k].float() - expected[k].float()).square().sum()) for k in keys)
    power = sum(float(expected[k].float().square().sum()) for k in keys)
    return float(np.sqrt(error / power)) if power > 0 else float("inf")


def is_same_prompt(difference: float) -> bool:
    """Tell rounding from another text."""
    return difference <= _SAME_PROMPT


def spec_differences(given: PolicySpec, expected: PolicySpec) -> list[str]:
    """Return in words where a bundle's spec departs from what the checkpoint's files say."""
    found = []
    for name in ("network", "sampler"):
        have, want = getattr(given, name), getattr(expected, name)
        fields = [f for f in want.__struct_fields__ if getattr(have, f) != getattr(want, f)]
        found += [f"{name}.{f} is {getattr(have, f)}, not {getattr(want, f)}" for f in fields[:2]]
    if given.canvas != expected.canvas:
        have, want = (
            ", ".join(f"{v.camera} at ({v.x_px}, {v.y_px})" for v in spec.canvas.views)
            for spec in (given, expected)
        )
        found.append(f"cameras are {have}, not {want}")
    for have_c, want_c in zip(given.channels, expected.channels, strict=True):
        if have_c != want_c:
            found.append(f"channel {have_c.name} stands where {want_c.name} should")
            break
    found += _statistics_differences(given, expected)
    if given.period_ns != expected.period_ns:
        found.append(f"a row lasts {given.period_ns} ns, not {expected.period_ns}")
    return found


def _statistics_differences(given: PolicySpec, expected: PolicySpec) -> list[str]:
    differing = [
        (key, channel.name, have, want)
        for key in given.statistics.__struct_fields__
        for channel, have, want in zip(
            given.channels,
            getattr(given.statistics, key),
            getattr(expected.statistics, key),
            strict=True,
        )
        if have != want
    ]
    if not differing:
        return []
    key, name, have, want = differing[0]
    more = f", and {len(differing) - 1} other values" if len(differing) > 1 else ""
    return [f"statistics differ: {key} of {name} is {have:.5g}, not {want:.5g}{more}"]
