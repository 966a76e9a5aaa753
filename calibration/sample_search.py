"""Find calibration samples in a dataset by what they hold, whatever the folders are called.

Motion finds a sample: state, actions and task of every frame are hashed, no picture is decoded.
Pictures then say whether calibration saw the same: exchanged cameras move as the originals do.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from gwp_edge.calibration.sampling import SampleRef, hash_motion, hash_pictures
from gwp_edge.calibration.verify_schema import Check
from gwp_edge.lerobot.dataset import LeRobotDataset
from gwp_edge.types import ImageArray

_N_REHASHED = 4
# A robot that stands still gives many frames one motion: so many are looked at.
_MAX_PLACES = 3
# All orders of more cameras would take longer to try than the hint is worth.
_MAX_PERMUTED = 4
_NAME = "calibration samples"


@dataclass(frozen=True, slots=True, kw_only=True)
class FoundSample:
    """A calibration sample in a dataset.

    Attributes:
        ref: the sample.
        places: (episode, frame) pairs that move as it does, its own place first; empty where the
            dataset has the name of the sample's own and no such motion: it was changed.
    """

    ref: SampleRef
    places: tuple[tuple[int, int], ...]


def find_samples(
    dataset: LeRobotDataset, refs: Sequence[SampleRef], n_rows: int
) -> tuple[FoundSample, ...]:
    """Return those of ``refs`` that are in a dataset; reads its tables, no picture.

    Args:
        dataset: where to look.
        refs: calibration samples.
        n_rows: rows H of an action window, as calibration had.
    """
    if not refs:
        return ()
    wanted = {ref.motion_hash for ref in refs}
    places: dict[str, list[tuple[int, int]]] = {}
    for place, motion in _motions(dataset, n_rows):
        if motion in wanted:
            places.setdefault(motion, []).append(place)
    found = []
    for ref in refs:
        own = (ref.episode, ref.frame)
        there = sorted(places.get(ref.motion_hash, ()), key=lambda place: (place != own, place))
        if there or ref.dataset == dataset.name:
            found.append(FoundSample(ref=ref, places=tuple(there)))
    return tuple(found)


def _motions(dataset: LeRobotDataset, n_rows: int) -> Iterator[tuple[tuple[int, int], str]]:
    """Yield place and motion hash of every frame, as ``hash_sample`` of its sample would."""
    for episode in dataset.episodes:
        data = dataset.data(episode.idx)
        for frame in range(episode.n_frames):
            rows = np.minimum(frame + np.arange(n_rows), episode.n_frames - 1)
            task = dataset.tasks.get(int(data.task_idx[frame]), episode.task)
            yield (episode.idx, frame), hash_motion(task, data.state[frame], data.action[rows])


def seen_frames(found: Sequence[FoundSample]) -> frozenset[tuple[int, int]]:
    """Return the (episode, frame) pairs that calibration saw, copies of them included."""
    return frozenset(
        place
        for sample in found
        for place in (sample.places or ((sample.ref.episode, sample.ref.frame),))
    )


def check_samples(
    dataset: LeRobotDataset, refs: Sequence[SampleRef], found: Sequence[FoundSample], n_rows: int
) -> tuple[Check, ...]:
    """Look at a few calibration samples again: are they what the dataset holds?

    Cameras that were exchanged, an edited episode or another decoder show here.

    Args:
        dataset: where they are.
        refs: all calibration samples.
        found: those in the dataset; see :func:`find_samples`.
        n_rows: rows H of an action window.
    """
    if not refs:
        return ()
    if not found:
        text = f"none of them is in {dataset.name}, by state, actions and task"
        return (Check(name=_NAME, passed=None, text=text),)
    picked = found[:: -(-len(found) // _N_REHASHED)]
    for sample in picked:
        difference = _difference(dataset, sample, n_rows)
        if difference is not None:
            episode, frame = (*sample.places, (sample.ref.episode, sample.ref.frame))[0]
            text = f"episode {episode}, frame {frame} is not what calibration saw: {difference}"
            return (Check(name=_NAME, passed=False, text=text),)
    text = f"{len(picked)} of {len(found)} looked at, as calibration saw them"
    return (Check(name=_NAME, passed=True, text=text),)


def _difference(dataset: LeRobotDataset, sample: FoundSample, n_rows: int) -> str | None:
    """Return how the dataset differs from a sample, or None where it holds the same."""
    if not sample.places:
        return "state, actions or task differ"
    exchanged = None
    for episode, frame in sample.places[:_MAX_PLACES]:
        images = dataset.sample(episode, frame, n_rows=n_rows).images
        if hash_pictures(images) == sample.ref.pictures_hash:
            return None
        exchanged = exchanged or _exchanged(images, sample.ref.pictures_hash)
    if exchanged is not None:
        return f"cameras are exchanged: it had {exchanged}"
    return "pictures or cameras differ (other videos, or another decoder)"


def _exchanged(images: Mapping[str, ImageArray], pictures_hash: str) -> str | None:
    """Return which cameras calibration saw in whose place, or None where none explains it."""
    cameras = sorted(images)
    if len(cameras) > _MAX_PERMUTED:
        return None
    for order in itertools.permutations(cameras):
        if hash_pictures(dict(zip(cameras, (images[c] for c in order), strict=True))) == (
            pictures_hash
        ):
            pairs = zip(cameras, order, strict=True)
            return ", ".join(f"{b} in place of {a}" for a, b in pairs if a != b)
    return None
