"""Choose calibration samples: spread over episodes and time, seeded, listed with their hashes.

Verification must see episodes that calibration did not, so both draw from the two sides of one
split. Everything follows from the seed and the episode lengths alone.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from gwp_edge.errors import SpecError
from gwp_edge.lerobot.dataset import LeRobotDataset, Sample
from gwp_edge.types import Float32Array, ImageArray

DEFAULT_N_SAMPLES = 64
# Digits of each half of a sample's hash: 128 bits of a SHA-256.
HALF_DIGITS = 32
_HELD_OUT_SHARE = 0.2


@dataclass(frozen=True, slots=True, kw_only=True, order=True)
class FrameRange:
    """Frames ``start`` to ``stop`` (exclusive) of one episode."""

    episode: int
    start: int
    stop: int

    @property
    def n_frames(self) -> int:
        """Number of frames."""
        return self.stop - self.start


@dataclass(frozen=True, slots=True, kw_only=True)
class Split:
    """Which frames are for calibration and which for verification.

    Attributes:
        calibration: ranges to calibrate on.
        verification: ranges to verify on; no frame and no window shared with ``calibration``.
        by: whether whole episodes were held out, or the end of the only one.
        note: one line for reports when the split is weaker than by episode, or leaves episodes
            out; else empty.
    """

    calibration: tuple[FrameRange, ...]
    verification: tuple[FrameRange, ...]
    by: Literal["episode", "time"]
    note: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleRef:
    """One sample, by place and by content.

    Attributes:
        dataset: name of the dataset.
        episode: episode index.
        frame: frame index within the episode.
        sha256: hash of what the sample holds, in two halves; see :func:`hash_sample`.
    """

    dataset: str
    episode: int
    frame: int
    sha256: str

    @property
    def motion_hash(self) -> str:
        """The half that state, actions and task give: it finds the sample in any copy."""
        return self.sha256[:HALF_DIGITS]

    @property
    def pictures_hash(self) -> str:
        """The half that the cameras' pictures give."""
        return self.sha256[HALF_DIGITS:]


def split_dataset(
    dataset: LeRobotDataset,
    *,
    seed: int,
    n_rows: int = 48,
    held_out_share: float = _HELD_OUT_SHARE,
    episodes: Sequence[int] | None = None,
) -> Split:
    """Split a dataset into calibration and verification frames.

    Whole episodes are held out: a fifth, at least one, never all. A dataset of one episode is cut
    in time, with ``n_rows`` frames between the sides so that no action window spans both. Episodes
    shorter than a window are left out.

    Args:
        dataset: the dataset.
        seed: which episodes are held out follows from it.
        n_rows: rows H of a window, frames.
        held_out_share: share of episodes (or of the only one) for verification, in (0, 1).
        episodes: episodes to use; all by default.

    Raises:
        SpecError: a share out of range, no episode that is long enough, or a single one too short
            to cut.
    """
    if not 0.0 < held_out_share < 1.0:
        raise SpecError(f"held-out share: expected a number in (0, 1), got {held_out_share}")
    used = sorted(set(range(dataset.n_episodes) if episodes is None else episodes))
    if not used:
        raise SpecError(f"{dataset.name}: no episode to calibrate on")
    lengths = {i: dataset.episode(i).n_frames for i in used}
    ranges = [FrameRange(episode=i, start=0, stop=n) for i, n in lengths.items() if n >= n_rows]
    if not ranges:
        raise SpecError(
            f"{dataset.name}: no episode is as long as a chunk of {n_rows} frames, the longest "
            f"has {max(lengths.values())}"
        )
    n_short = len(used) - len(ranges)
    note = (
        f"{dataset.name}: {n_short} of {len(used)} episodes are shorter than a chunk of {n_rows} "
        "frames and are left out"
        if n_short
        else ""
    )
    if len(ranges) == 1:
        split = _split_in_time(dataset.name, ranges[0], n_rows, held_out_share)
        return replace(split, note="; ".join(filter(None, (note, split.note))))
    n_held = min(max(1, round(held_out_share * len(ranges))), len(ranges) - 1)
    held = {r.episode for r in _shuffled(ranges, random.Random(seed))[:n_held]}
    return Split(
        calibration=tuple(r for r in ranges if r.episode not in held),
        verification=tuple(r for r in ranges if r.episode in held),
        by="episode",
        note=note,
    )


def _split_in_time(name: str, only: FrameRange, n_rows: int, held_out_share: float) -> Split:
    n_held = max(1, round(held_out_share * only.n_frames))
    end = only.stop - n_held - n_rows
    if end < 1:
        raise SpecError(
            f"{name}: its only usable episode has {only.n_frames} frames; calibration, {n_rows} "
            f"frames between and {n_held} for verification do not fit; record a second episode"
        )
    return Split(
        calibration=(FrameRange(episode=only.episode, start=0, stop=end),),
        verification=(FrameRange(episode=only.episode, start=only.stop - n_held, stop=only.stop),),
        by="time",
        note=(
            f"{name} has one episode to use: verified on its last {n_held} frames, "
            "the same scene that calibration saw"
        ),
    )


def _shuffled(items: Sequence[FrameRange], rng: random.Random) -> list[FrameRange]:
    # Only Random.random() is documented to repeat over Python versions; shuffle() is not.
    return [item for _, item in sorted((rng.random(), item) for item in sorted(items))]


def choose_frames(
    ranges: Sequence[FrameRange], *, n_samples: int = DEFAULT_N_SAMPLES, seed: int
) -> tuple[tuple[int, int], ...]:
    """Choose frames spread over episodes and, within each, over time.

    Every episode gets the same number, as far as it has frames; with fewer samples than episodes,
    that many episodes get one. An episode with k samples is cut into k equal parts and one frame
    is drawn from each.

    Args:
        ranges: frames to draw from, one range for each episode.
        n_samples: how many.
        seed: the choice follows from it.

    Returns:
        (episode, frame) pairs, sorted, none twice.

    Raises:
        SpecError: ``n_samples`` below 1 or beyond the frames there are.
    """
    n_frames = sum(r.n_frames for r in ranges)
    if not 1 <= n_samples <= n_frames:
        raise SpecError(
            f"samples: expected 1 to {n_frames} (the frames there are), got {n_samples}"
        )
    rng = random.Random(seed)
    order = _shuffled(ranges, rng)
    counts = dict.fromkeys((r.episode for r in ranges), 0)
    n_left = n_samples
    while n_left:
        for r in order:
            if n_left and counts[r.episode] < r.n_frames:
                counts[r.episode] += 1
                n_left -= 1
    frames = []
    for r in sorted(ranges, key=lambda r: r.episode):
        k = counts[r.episode]
        for i in range(k):
            low, high = r.start + i * r.n_frames // k, r.start + (i + 1) * r.n_frames // k
            frames.append((r.episode, low + int(rng.random() * (high - low))))
    return tuple(frames)


def hash_sample(sample: Sample) -> str:
    """Return a hash of a sample's motion, then one of its pictures; 32 hexadecimal digits each.

    Place and file names do not count: a copy of a dataset has the same hashes. The halves are
    apart, so that a sample whose cameras were exchanged is still found by how the robot moved.
    """
    motion = hash_motion(sample.task, sample.state, sample.actions)
    return motion + hash_pictures(sample.images)


def hash_motion(task: str, state: Float32Array, actions: Float32Array) -> str:
    """Return 32 digits of the SHA-256 of task, state (D,) and actions (H, D)."""
    header = {"task": task, "actions": list(actions.shape)}
    digest = hashlib.sha256(json.dumps(header, sort_keys=True).encode())
    for array in (state, actions):
        digest.update(np.ascontiguousarray(array, dtype="<f4").tobytes())
    return digest.hexdigest()[:HALF_DIGITS]


def hash_pictures(images: Mapping[str, ImageArray]) -> str:
    """Return 32 digits of the SHA-256 of every camera's name and picture."""
    header = [[camera, list(images[camera].shape)] for camera in sorted(images)]
    digest = hashlib.sha256(json.dumps(header).encode())
    for camera in sorted(images):
        digest.update(np.ascontiguousarray(images[camera]).tobytes())
    return digest.hexdigest()[:HALF_DIGITS]


def reference_samples(
    dataset: LeRobotDataset, frames: Sequence[tuple[int, int]], *, n_rows: int = 48
) -> tuple[SampleRef, ...]:
    """Return references with hashes to the samples at (episode, frame) pairs; decodes them."""
    return tuple(
        SampleRef(dataset=s.dataset, episode=s.episode, frame=s.frame, sha256=hash_sample(s))
        for s in dataset.samples(frames, n_rows=n_rows)
    )


def load_samples(
    dataset: LeRobotDataset, refs: Sequence[SampleRef], *, n_rows: int = 48
) -> Iterator[Sample]:
    """Yield the samples of ``refs``, one in memory at a time.

    Raises:
        SpecError: a sample is not what its reference says: another dataset, or changed since.
    """
    for ref in refs:
        sample = dataset.sample(ref.episode, ref.frame, n_rows=n_rows)
        if hash_sample(sample) != ref.sha256:
            raise SpecError(
                f"{dataset.name}: episode {ref.episode}, frame {ref.frame} is not the sample in "
                "the record; the dataset or its decoder changed, calibrate again"
            )
        yield sample
