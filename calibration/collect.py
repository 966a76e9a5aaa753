"""Collect the ranges of a network's layers over a dataset: prefix and every denoising step.

All samples pass each layer together, so that a checkpoint is read once for the prefix and once for
each step, whatever the number of samples, and never is in memory as a whole.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch

from gwp_edge.calibration.forward import BatchRunner, Network, Prepared, Progress, prepare
from gwp_edge.calibration.observers import ChannelObserver, TensorObserver
from gwp_edge.calibration.record import CalibrationRecord
from gwp_edge.calibration.sampling import (
    DEFAULT_N_SAMPLES,
    SampleRef,
    choose_frames,
    hash_sample,
    split_dataset,
)
from gwp_edge.calibration.smooth import ChannelMoments, smoothing_factors
from gwp_edge.errors import SpecError
from gwp_edge.export.folding import FoldedWeights
from gwp_edge.export.network import streams
from gwp_edge.export.precision import input_name, is_quantizable, make_recipe, scale_key
from gwp_edge.lerobot.dataset import LeRobotDataset, Sample
from gwp_edge.types import Float32Array, FloatArray

DEFAULT_N_HELD_OUT = 16
# Prefix of names whose values were seen in the network with smoothing factors folded in.
SMOOTHED = "smoothed:"

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class CollectOptions:
    """How to calibrate.

    Attributes:
        n_samples: samples to observe.
        n_held_out: samples, of other episodes, to measure the error on.
        seed: of the split, the choice of samples and the noise.
        smoothing: fold factors of channels where that is predicted to lower the noise.
        device: where torch computes; a GPU has not yet been run on hardware.
    """

    n_samples: int = DEFAULT_N_SAMPLES
    n_held_out: int = DEFAULT_N_HELD_OUT
    seed: int = 0
    smoothing: bool = True
    device: str = "cpu"


@dataclass(frozen=True, kw_only=True)
class SampleSet:
    """Prepared samples and what they are."""

    prepared: Prepared
    refs: tuple[SampleRef, ...]


def load_set(
    network: Network,
    dataset: LeRobotDataset,
    options: CollectOptions,
    *,
    held_out: bool,
    known_prompts: Mapping[str, Float32Array],
    progress: Progress | None = None,
) -> SampleSet:
    """Choose samples on one side of the split and prepare them.

    Args:
        network: the checkpoint.
        dataset: a LeRobot dataset.
        options: how many, and the seed.
        held_out: the side that calibration does not see.
        known_prompts: embeddings by task, for datasets without t5_embedding.
        progress: called with stage, done and total.

    Raises:
        SpecError: the dataset does not fit the policy, or is too small.
    """
    split = split_dataset(dataset, seed=options.seed, n_rows=network.spec.n_rows)
    if split.note:
        logger.warning("%s", split.note)
    ranges = split.verification if held_out else split.calibration
    n_samples = options.n_held_out if held_out else options.n_samples
    n_samples = min(n_samples, sum(r.n_frames for r in ranges))
    frames = choose_frames(ranges, n_samples=n_samples, seed=options.seed)
    dataset.check_against(network.spec, episodes=sorted({episode for episode, _ in frames}))
    stage = "encode held-out samples" if held_out else "encode samples"
    refs: list[SampleRef] = []

    def samples() -> Iterator[Sample]:
        for i, sample in enumerate(dataset.samples(frames, n_rows=network.spec.n_rows)):
            refs.append(
                SampleRef(
                    dataset=sample.dataset,
                    episode=sample.episode,
                    frame=sample.frame,
                    sha256=hash_sample(sample),
                )
            )
            yield sample
            if progress is not None:
                progress(stage, i + 1, len(frames))

    prepared = prepare(
        network,
        samples(),
        seed=options.seed,
        known_prompts=known_prompts,
        device=options.device,
    )
    return SampleSet(prepared=prepared, refs=tuple(refs))


class _Ranges:
    """Histograms and means of every layer's input. Threads: one owner."""

    def __init__(self, prefix: str = "") -> None:
        self._prefix = prefix
        self.tensors: dict[str, TensorObserver] = {}
        self._sums: dict[str, FloatArray] = {}
        self._counts: dict[str, int] = {}

    def __call__(self, stage: str, step: int, name: str, sample: int, x: torch.Tensor) -> None:
        if not is_quantizable(name) or _is_repeated(name):
            return
        key, values = self._prefix + scale_key(stage, name), x.cpu().numpy()
        observer = self.tensors.setdefault(key, TensorObserver(key))
        observer.observe(values, sample_idx=sample, step_idx=step)
        total = values.sum(axis=0, dtype=np.float64)
        self._sums[key] = self._sums[key] + total if key in self._sums else total
        self._counts[key] = self._counts.get(key, 0) + len(values)

    def means(self) -> dict[str, Float32Array]:
        """Return the mean input of every layer."""
        return {k: (s / self._counts[k]).astype(np.float32) for k, s in self._sums.items()}


class _Channels:
    """Maxima and moments of every channel of every layer's input. Threads: one owner."""

    def __init__(self) -> None:
        self.channels: dict[str, ChannelObserver] = {}
        self.moments: dict[str, ChannelMoments] = {}

    def __call__(self, stage: str, step: int, name: str, sample: int, x: torch.Tensor) -> None:
        del sample
        if is_quantizable(name) and not _is_repeated(name):
            key, values = scale_key(stage, name), x.cpu().numpy()
            self.channels.setdefault(key, ChannelObserver(key)).observe(values, step_idx=step)
            self.moments.setdefault(key, ChannelMoments()).observe(values)


def _is_repeated(name: str) -> bool:
    """Q and v read what k reads, and every block that runs has a k."""
    return input_name(name) != name and not name.endswith("attn1.to_k")


def quantizable_layers(network: Network) -> tuple[str, ...]:
    """Return the names of all layers that a quantized recipe may touch, in order."""
    kinds = [f"attn1.to_{x}" for x in ("q", "k", "v", "out.0")]
    kinds += ["attn2.to_q", "attn2.to_out.0", "ffn.net.0.proj", "ffn.net.2"]
    spec = network.spec.network
    return tuple(
        f"{stream.block.format(i)}{kind}"
        for i in range(spec.n_layers)
        for stream in streams(spec)
        for kind in kinds
    )


def collect(
    network: Network,
    samples: SampleSet,
    options: CollectOptions,
    *,
    is_synthetic: bool,
    provenance: Mapping[str, object],
    progress: Progress | None = None,
) -> CalibrationRecord:
    """Observe the network on ``samples`` in float32 and return the record.

    With smoothing, the factors follow from the first pass, and a second one observes the folded
    network; its names begin with ``SMOOTHED``. Which of the two serves better is measured later.

    Raises:
        SpecError: an activation is not finite.
    """
    plain, channels = _Ranges(), _Channels()

    def both(stage: str, step: int, name: str, sample: int, x: torch.Tensor) -> None:
        plain(stage, step, name, sample, x)
        channels(stage, step, name, sample, x)

    runner = BatchRunner(network, samples.prepared, device=options.device)
    exact = make_recipe("fp32")
    runner.run(
        exact,
        observe=both if options.smoothing else plain,
        progress=_renamed(progress, "ranges"),
    )
    if not plain.tensors:
        raise SpecError("calibration: the network has no layer to quantize")
    smoothed = _Ranges(prefix=SMOOTHED)
    factors: dict[str, Float32Array] = {}
    gains: dict[str, float] = {}
    if options.smoothing:
        layers = quantizable_layers(network)
        factors, gains = smoothing_factors(network.weights, channels.moments, layers)
    if factors:
        runner.run(
            exact,
            weights=FoldedWeights(network.weights, factors),
            observe=smoothed,
            progress=_renamed(progress, "smoothed ranges"),
        )
    return CalibrationRecord(
        tensors={**plain.tensors, **smoothed.tensors},
        channels=channels.channels,
        means={**plain.means(), **smoothed.means()},
        smoothing=factors,
        samples=samples.refs,
        is_synthetic=is_synthetic,
        provenance={
            **provenance,
            "seed": options.seed,
            "n_steps": network.spec.sampler.n_steps,
            "timesteps": list(network.spec.sampler.timesteps),
            "predicted_noise_with_smoothing": gains,
        },
    )


def _renamed(progress: Progress | None, what: str) -> Progress | None:
    if progress is None:
        return None
    return lambda _, done, total: progress(f"calibrate: {what}", done, total)
