"""Read LeRobot v3.0 datasets: episodes, states, actions, and pictures exact to the frame.

v3.0 packs several episodes into one Parquet and one video file; the episode table says where each
begins. Nothing here imports lerobot.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import numpy as np

from gwp_edge.errors import SpecError
from gwp_edge.lerobot import files
from gwp_edge.lerobot.check import check_against
from gwp_edge.lerobot.episodes import Episode, EpisodeData, RowReader, cameras_of, read_episodes
from gwp_edge.lerobot.files import ACTION, CAMERA_PREFIX, STATE
from gwp_edge.lerobot.video import VideoReader
from gwp_edge.spec import PolicySpec
from gwp_edge.types import Float32Array, ImageArray, frozen_array


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """What the policy saw and what was done, at one frame.

    Attributes:
        dataset: name of the dataset.
        episode: episode index.
        frame: frame index within the episode.
        images: uint8 RGB per camera role, each of shape (h, w, 3).
        state: shape (D,), float32.
        actions: absolute actions of this and the next frames, shape (H, D); past the end of the
            episode its last row repeats.
        task: task text of this frame.
        prompt_path: file with the prompt embedding, or None.
    """

    dataset: str
    episode: int
    frame: int
    images: Mapping[str, ImageArray]
    state: Float32Array
    actions: Float32Array
    task: str
    prompt_path: Path | None


class LeRobotDataset:
    """A LeRobot v3.0 dataset on disk. Threads: one owner; holds one decoder per camera.

    Attributes:
        root: folder of the dataset.
        info: meta/info.json.
        cameras: role names, ``observation.images.`` stripped, sorted.
        state_names: names of the state's entries as the dataset has them; empty if it has none.
        action_names: the same of the action.
        episodes: all episodes in order.
        tasks: task texts by index.
    """

    def __init__(
        self, root: Path, info: files.DatasetInfo, tasks: dict[int, str], episodes: list[Episode]
    ) -> None:
        self.root = root
        self.info = info
        self.tasks = tasks
        self.episodes = tuple(episodes)
        self.cameras = cameras_of(info)
        self.state_names = files.feature_names(info.features[STATE])
        self.action_names = files.feature_names(info.features[ACTION])
        self._readers: dict[str, tuple[Path, VideoReader]] = {}
        self._rows = RowReader(info)

    @classmethod
    def open(cls, root: Path | str) -> LeRobotDataset:
        """Open the dataset in folder ``root``; reads only tables under meta/.

        Raises:
            SpecError: not a v3.0 dataset, or one whose tables are damaged or disagree.
        """
        root = Path(root)
        info = files.read_info(root)
        return cls(root, info, files.read_tasks(root), read_episodes(root, info))

    @property
    def name(self) -> str:
        """Name of the dataset: its folder."""
        return self.root.resolve().name

    @property
    def n_episodes(self) -> int:
        """Number of episodes."""
        return len(self.episodes)

    @property
    def n_frames(self) -> int:
        """Number of frames over all episodes."""
        return self.episodes[-1].stop

    @property
    def fps(self) -> float:
        """Frames per second."""
        return self.info.fps

    def fingerprint(self) -> str:
        """Return the SHA-256 of meta/info.json and the episode tables, in hexadecimal."""
        digest = hashlib.sha256((self.root / "meta" / "info.json").read_bytes())
        for path in files.episode_tables(self.root):
            digest.update(path.read_bytes())
        return digest.hexdigest()

    def episode(self, idx: int) -> Episode:
        """Return episode ``idx``.

        Raises:
            SpecError: there is no such episode.
        """
        if not 0 <= idx < self.n_episodes:
            raise SpecError(
                f"{self.name}: no episode {idx}; it has episodes 0 to {self.n_episodes - 1}"
            )
        return self.episodes[idx]

    def data(self, idx: int) -> EpisodeData:
        """Return the rows of episode ``idx``; the last data file read stays in memory.

        Raises:
            SpecError: the file is missing or damaged, or its rows, time stamps or frame numbers
                do not fit the episode table.
        """
        return self._rows.read(self.episode(idx))

    def state(self, idx: int) -> Float32Array:
        """Return the states of episode ``idx``, shape (n, D)."""
        return self.data(idx).state

    def action(self, idx: int) -> Float32Array:
        """Return the absolute actions of episode ``idx``, shape (n, D)."""
        return self.data(idx).action

    def image(self, episode: int, frame: int, camera: str) -> ImageArray:
        """Return one picture, uint8 RGB, shape (h, w, 3).

        Raises:
            SpecError: no such camera, episode or frame; the video is missing, damaged, ends
                early, or has another size than meta/info.json says.
        """
        where = self._check_frame(episode, frame)
        if camera not in where.videos:
            raise SpecError(f"{self.name}: no camera {camera}; it has {', '.join(self.cameras)}")
        span = where.videos[camera]
        path, reader = self._readers.get(camera, (None, None))
        if reader is None or path != span.path:
            if reader is not None:
                reader.close()
            reader = VideoReader(span.path, fps=self.fps)
            self._readers[camera] = (span.path, reader)
        image = reader.frame(span.t_start_s + frame / self.fps)
        expected = self.info.features[CAMERA_PREFIX + camera].shape
        if image.shape != expected:
            raise SpecError(f"{span.path}: expected pictures of {expected}, got {image.shape}")
        return image

    def sample(
        self, episode: int, frame: int, *, n_rows: int = 48, cameras: Sequence[str] | None = None
    ) -> Sample:
        """Return what the policy saw at one frame and the ``n_rows`` actions from there.

        Args:
            episode: episode index.
            frame: frame index within the episode.
            n_rows: rows H of the action window.
            cameras: which cameras to decode; all by default.

        Raises:
            SpecError: as :meth:`data` and :meth:`image`; ``n_rows`` below 1.
        """
        if n_rows < 1:
            raise SpecError(f"n_rows: expected at least 1, got {n_rows}")
        where, data = self._check_frame(episode, frame), self.data(episode)
        rows = np.minimum(frame + np.arange(n_rows), where.n_frames - 1)
        images = {c: self.image(episode, frame, c) for c in cameras or self.cameras}
        return Sample(
            dataset=self.name,
            episode=episode,
            frame=frame,
            images=MappingProxyType(images),
            state=frozen_array(data.state[frame].copy(), np.float32),
            actions=frozen_array(data.action[rows], np.float32),
            task=self.tasks.get(int(data.task_idx[frame]), where.task),
            prompt_path=where.prompt_path,
        )

    def samples(self, frames: Iterable[tuple[int, int]], *, n_rows: int = 48) -> Iterator[Sample]:
        """Yield the samples at (episode, frame) pairs; fastest when the pairs are sorted."""
        for episode, frame in frames:
            yield self.sample(episode, frame, n_rows=n_rows)

    def check_against(self, spec: PolicySpec, *, episodes: Sequence[int] | None = None) -> None:
        """Check that the dataset fits a policy: cameras, channels, units, rate, lengths.

        Args:
            spec: the policy.
            episodes: episodes that will be used; all by default.

        Raises:
            SpecError: the first thing that does not fit; see :func:`dataset_check.check_against`.
        """
        check_against(self, spec, episodes=episodes)

    def close(self) -> None:
        """Close the decoders; safe to call twice, and the dataset can be used again."""
        for _, reader in self._readers.values():
            reader.close()
        self._readers.clear()

    def __enter__(self) -> LeRobotDataset:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _check_frame(self, episode: int, frame: int) -> Episode:
        where = self.episode(episode)
        if not 0 <= frame < where.n_frames:
            raise SpecError(
                f"{self.name}: episode {episode} has frames 0 to {where.n_frames - 1}, "
                f"asked for {frame}"
            )
        return where
