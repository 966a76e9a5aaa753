"""What a verification runs on: frames that calibration did not see, each with its prompt."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from gwp_edge.calibration.sampling import FrameRange, choose_frames, split_dataset
from gwp_edge.errors import SpecError
from gwp_edge.export.prompts import clean_prompt
from gwp_edge.lerobot.dataset import LeRobotDataset, Sample
from gwp_edge.spec import PolicySpec
from gwp_edge.types import Float32Array, Frame, Observation

# One short episode may well stay in a corner of the training data; these are far from that.
_MAX_OUTSIDE = 0.25
_MIN_FILL = 0.05


@dataclass(frozen=True, slots=True, kw_only=True)
class Frames:
    """Which frames to verify on.

    Attributes:
        frames: (episode, frame) pairs, sorted.
        episodes: those of ``frames``.
        excluded: episodes left out because calibration saw them or may have seen them.
        split_by: in words, how they were kept apart.
        note: one line where the separation is weaker than by episode, else empty.
    """

    frames: tuple[tuple[int, int], ...]
    episodes: tuple[int, ...]
    excluded: tuple[int, ...]
    split_by: str
    note: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """A prompt of the bundle, and where the embedding that it should come from is.

    Attributes:
        task: name in the bundle.
        file: the embedding, or None where there is none to check against.
    """

    task: str
    file: Path | None


def choose_verification(
    dataset: LeRobotDataset,
    spec: PolicySpec,
    *,
    n_samples: int,
    seed: int,
    calibrated: Collection[tuple[int, int]] = (),
) -> Frames:
    """Choose frames of episodes that calibration did not see.

    The held-out side of the split with the same seed is taken, less what the bundle names as its
    calibration samples. Where nothing of it is left, any episode that the bundle does not name
    will do. A dataset of one episode is cut in time.

    Args:
        dataset: the dataset.
        spec: the policy.
        n_samples: how many frames; fewer where the dataset has fewer.
        seed: of split and choice.
        calibrated: (episode, frame) pairs that the bundle was calibrated on.

    Raises:
        SpecError: calibration saw every episode, or the dataset is too short.
    """
    if n_samples < 1:
        raise SpecError(f"--samples: expected at least 1, got {n_samples}")
    split = split_dataset(dataset, seed=seed, n_rows=spec.n_rows)
    if split.by == "time":
        ranges = _before_samples(dataset, split.verification, calibrated, spec.n_rows)
        split_by = "time within the only episode"
    else:
        seen = {episode for episode, _ in calibrated}
        ranges = [r for r in split.verification if r.episode not in seen]
        split_by = f"held-out episodes of seed {seed}"
        if not ranges:
            ranges = [r for r in split.calibration if r.episode not in seen]
            split_by = "episodes that the bundle was not calibrated on"
        if not ranges:
            raise SpecError(
                f"{dataset.name}: the bundle was calibrated on all of its {dataset.n_episodes} "
                "episodes; verify on another dataset of the same robot"
            )
    n = min(n_samples, sum(r.n_frames for r in ranges))
    frames = choose_frames(ranges, n_samples=n, seed=seed)
    episodes = sorted({episode for episode, _ in frames})
    used = {r.episode for r in ranges}
    return Frames(
        frames=frames,
        episodes=tuple(episodes),
        excluded=tuple(i for i in range(dataset.n_episodes) if i not in used),
        split_by=split_by,
        note=split.note,
    )


def _before_samples(
    dataset: LeRobotDataset,
    held_out: Sequence[FrameRange],
    calibrated: Collection[tuple[int, int]],
    n_rows: int,
) -> list[FrameRange]:
    """Refuse held-out frames of the only episode that a calibration window reaches."""
    last = max((frame for _, frame in calibrated), default=-n_rows)
    if any(last + n_rows > r.start for r in held_out):
        raise SpecError(
            f"{dataset.name}: the bundle was calibrated on the end of its only episode; "
            "verify on another dataset of the same robot"
        )
    return list(held_out)


def choose_prompts(
    dataset: LeRobotDataset,
    spec: PolicySpec,
    episodes: Sequence[int],
    *,
    task: str | None,
    files: Sequence[Path] = (),
) -> dict[int, Prompt]:
    """Return the bundle's prompt for each episode, and the embedding to check it against.

    Without ``task``, an episode's prompt is the bundle's prompt that is named like the episode's
    embedding file, or else like its task text. With it, every episode runs under that prompt.

    Args:
        dataset: the dataset.
        spec: of the bundle; its tasks.
        episodes: which episodes.
        task: one of the bundle's prompts, or None to match by name.
        files: embeddings beside the checkpoint or given by the user; the stem is the name.

    Raises:
        SpecError: the bundle has no prompt of that name; says how to export it.
    """
    by_name = {path.stem: path for path in files}
    if task is not None:
        if task not in spec.tasks:
            raise SpecError(f"--task {task!r} is not in this bundle; it has {_listed(spec.tasks)}")
        prompt = Prompt(task=task, file=by_name.get(task) or _of_dataset(dataset, task))
        return dict.fromkeys(episodes, prompt)
    return {idx: _match(dataset, spec, idx, by_name) for idx in episodes}


def _match(dataset: LeRobotDataset, spec: PolicySpec, idx: int, by_name: dict[str, Path]) -> Prompt:
    episode = dataset.episode(idx)
    own = episode.prompt_path
    names = ([own.stem] if own is not None else []) + [episode.task, clean_prompt(episode.task)]
    for name in names:
        if name in spec.tasks:
            return Prompt(task=name, file=own or by_name.get(name))
    how = f"--prompt-embedding {own}" if own is not None else f"--prompt {episode.task!r}"
    raise SpecError(
        f"{dataset.name}: episode {idx} is {episode.task!r}, the bundle has prompts "
        f"{_listed(spec.tasks)}; export it with {how}, or choose one with --task"
    )


def _of_dataset(dataset: LeRobotDataset, task: str) -> Path | None:
    """Return the dataset's embedding of a prompt: by file name, or else by text."""
    known = [e for e in dataset.episodes if e.prompt_path is not None]
    for episode in known:
        if episode.prompt_path is not None and episode.prompt_path.stem == task:
            return episode.prompt_path
    for episode in known:
        if task in (episode.task, clean_prompt(episode.task)):
            return episode.prompt_path
    return None


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(repr(name) for name in names[:4])
    return shown if len(names) <= 4 else f"{shown} and {len(names) - 4} more"


def observation_of(sample: Sample) -> Observation:
    """Return a dataset sample as the robot would have seen it, stamped with time 0."""
    frames = tuple(
        Frame(
            camera=camera,
            image=image,
            t_captured_ns=0,
            t_received_ns=0,
            frame_idx=sample.frame,
            domain="recorded",
        )
        for camera, image in sample.images.items()
    )
    return Observation(frames=frames, state=np.asarray(sample.state, np.float64), t_state_ns=0)


def noise_of(spec: PolicySpec, seed: int, episode: int, frame: int) -> Float32Array:
    """Return the starting noise (H, A) of one sample; it follows from seed and place alone."""
    rng = np.random.default_rng([seed, episode, frame])
    shape = (spec.n_rows, spec.network.n_action_channels)
    return rng.standard_normal(shape, dtype=np.float32)


def judge_statistics(
    dataset: LeRobotDataset, spec: PolicySpec, episodes: Sequence[int]
) -> list[str]:
    """Return notes on channels whose states do not look like the bundle's statistics.

    Of the data that the statistics are from, 2 % lies outside q01..q99 and the rest fills it.
    """
    states = np.concatenate([dataset.state(i) for i in episodes]).astype(np.float64)
    low, high = np.array(spec.statistics.state_q01), np.array(spec.statistics.state_q99)
    outside = ((states < low) | (states > high)).mean(axis=0)
    span = np.ptp(np.quantile(states, [0.01, 0.99], axis=0), axis=0)
    fills = span / np.maximum(high - low, 1e-8)
    odd = [
        f"{c.name} ({outside[i]:.0%} of states outside q01..q99, which they fill by {fills[i]:.0%})"
        for i, c in enumerate(spec.channels)
        if outside[i] > _MAX_OUTSIDE or fills[i] < _MIN_FILL
    ]
    if not odd:
        return []
    more = f" and {len(odd) - 2} more" if len(odd) > 2 else ""
    return [
        f"the bundle's statistics do not look like this dataset's: {', '.join(odd[:2])}{more}; "
        "then errors against the recorded actions say little"
    ]
