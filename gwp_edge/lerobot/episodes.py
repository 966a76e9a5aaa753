"""Episodes of a LeRobot v3.0 dataset: where each lies, and its rows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt

from gwp_edge.errors import SpecError
from gwp_edge.lerobot import files
from gwp_edge.lerobot.files import ACTION, CAMERA_PREFIX, STATE, DatasetInfo
from gwp_edge.types import Float32Array, FloatArray, frozen_array

# LeRobot's own tolerance between a time stamp and frame_index / fps, s.
_TIMESTAMP_TOLERANCE_S = 1e-4
_INTEGERS = ("index", "episode_index", "frame_index", "task_index")


@dataclass(frozen=True, slots=True, kw_only=True)
class VideoSpan:
    """Where an episode lies in a camera's video file.

    Attributes:
        path: the file.
        t_start_s: time stamp of the episode's first frame in the file, s.
    """

    path: Path
    t_start_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Episode:
    """One episode: rows ``start`` to ``stop`` of the dataset's running index.

    Attributes:
        idx: episode index.
        start: first row, counted over the whole dataset.
        stop: one past the last row.
        task: task text, the first where an episode has several.
        data_path: Parquet file with its rows.
        videos: span per camera role.
        prompt_path: its prompt embedding, or None where the dataset has none.
    """

    idx: int
    start: int
    stop: int
    task: str
    data_path: Path
    videos: Mapping[str, VideoSpan]
    prompt_path: Path | None

    @property
    def n_frames(self) -> int:
        """Number of frames."""
        return self.stop - self.start


@dataclass(frozen=True, slots=True, kw_only=True)
class EpisodeData:
    """The rows of one episode; n frames.

    Attributes:
        state: shape (n, D), float32, in the units of the dataset.
        action: absolute actions, shape (n, D).
        task_idx: shape (n,).
    """

    state: Float32Array
    action: Float32Array
    task_idx: npt.NDArray[np.int64]


def cameras_of(info: DatasetInfo) -> tuple[str, ...]:
    """Return the role names of the dataset's cameras, sorted.

    Raises:
        SpecError: a camera is not stored as video, or there is no path to videos.
    """
    roles = []
    for key, feature in info.features.items():
        if not key.startswith(CAMERA_PREFIX):
            continue
        if feature.dtype != "video":
            raise SpecError(
                f"{key}: expected a camera stored as video, got {feature.dtype}; "
                "record with videos or convert the dataset"
            )
        roles.append(key.removeprefix(CAMERA_PREFIX))
    if roles and info.video_path is None:
        raise SpecError("meta/info.json: has cameras but no video_path")
    return tuple(sorted(roles))


def read_episodes(root: Path, info: DatasetInfo) -> list[Episode]:
    """Read the episode tables.

    Raises:
        SpecError: a table is damaged, an episode is missing, empty or out of order, or the totals
            of meta/info.json disagree.
    """
    cameras = cameras_of(info)
    episodes: list[Episode] = []
    for path in files.episode_tables(root):
        episodes += _read_episode_table(root, path, info, cameras)
    episodes.sort(key=lambda e: e.idx)
    if [e.idx for e in episodes] != list(range(info.total_episodes)):
        raise SpecError(
            f"{root}: expected episodes 0 to {info.total_episodes - 1} under meta/episodes, "
            f"found {len(episodes)}; the dataset is incomplete or was edited by hand"
        )
    end = 0
    for episode in episodes:
        if episode.start != end or episode.stop <= episode.start:
            raise SpecError(
                f"{root}: episode {episode.idx} should begin at row {end} and hold at least one, "
                f"got rows {episode.start} to {episode.stop - 1}"
            )
        end = episode.stop
    if end != info.total_frames:
        raise SpecError(f"{root}: expected {info.total_frames} frames, the episodes hold {end}")
    return episodes


def _read_episode_table(
    root: Path, path: Path, info: DatasetInfo, cameras: tuple[str, ...]
) -> list[Episode]:
    plain = [
        "episode_index",
        "length",
        "dataset_from_index",
        "dataset_to_index",
        "data/chunk_index",
        "data/file_index",
    ]
    spans = [f"videos/{CAMERA_PREFIX}{c}/" for c in cameras]
    video_idx = [f"{s}{key}" for s in spans for key in ("chunk_index", "file_index")]
    video_t = [f"{s}from_timestamp" for s in spans]
    table = files.read_table(path, [*plain, *video_idx, *video_t, "tasks"])
    whole = {name: files.integers(table, name, path) for name in [*plain, *video_idx]}
    start_s = {name: files.floats(table, name, path) for name in video_t}
    tasks = table.column("tasks").to_pylist()
    episodes = []
    for row, idx in enumerate(whole["episode_index"].tolist()):
        start = int(whole["dataset_from_index"][row])
        stop = int(whole["dataset_to_index"][row])
        if stop - start != whole["length"][row]:
            raise SpecError(
                f"{path}: episode {idx} says {whole['length'][row]} frames and rows {start} to "
                f"{stop - 1}"
            )
        videos = {}
        for camera, span in zip(cameras, spans, strict=True):
            video = files.file_of(
                root,
                info.video_path or "",
                video_key=CAMERA_PREFIX + camera,
                chunk_index=int(whole[f"{span}chunk_index"][row]),
                file_index=int(whole[f"{span}file_index"][row]),
            )
            videos[camera] = VideoSpan(
                path=video, t_start_s=float(start_s[f"{span}from_timestamp"][row])
            )
        prompt = root / "t5_embedding" / f"episode_{idx:06d}.pt"
        episodes.append(
            Episode(
                idx=idx,
                start=start,
                stop=stop,
                task=str((tasks[row] or [""])[0]),
                data_path=files.file_of(
                    root,
                    info.data_path,
                    chunk_index=int(whole["data/chunk_index"][row]),
                    file_index=int(whole["data/file_index"][row]),
                ),
                videos=MappingProxyType(videos),
                prompt_path=prompt if prompt.is_file() else None,
            )
        )
    return episodes


class RowReader:
    """Read the rows of episodes. Threads: one owner.

    The last file and the last episode stay in memory: about one file's numbers, never its
    pictures.
    """

    def __init__(self, info: DatasetInfo) -> None:
        self._info = info
        self._file: tuple[Path, dict[str, npt.NDArray[Any]]] | None = None
        self._episode: tuple[int, EpisodeData] | None = None

    def read(self, episode: Episode) -> EpisodeData:
        """Return the rows of ``episode``.

        Raises:
            SpecError: the file is missing or damaged, or does not fit the episode table.
        """
        if self._episode is None or self._episode[0] != episode.idx:
            self._episode = (episode.idx, self._read(episode))
        return self._episode[1]

    def _read(self, episode: Episode) -> EpisodeData:
        if self._file is None or self._file[0] != episode.data_path:
            self._file = (episode.data_path, _read_file(episode.data_path, self._info))
        columns = self._file[1]
        index = columns["index"]
        start = int(np.searchsorted(index, episode.start))
        rows = slice(start, start + episode.n_frames)
        mine = {name: column[rows] for name, column in columns.items()}
        _check_rows(episode, mine, self._info.fps)
        return EpisodeData(
            state=frozen_array(mine[STATE].copy(), np.float32),
            action=frozen_array(mine[ACTION].copy(), np.float32),
            task_idx=mine["task_index"].copy(),
        )


def _read_file(path: Path, info: DatasetInfo) -> dict[str, npt.NDArray[Any]]:
    table = files.read_table(path, [*_INTEGERS, "timestamp", STATE, ACTION])
    columns: dict[str, npt.NDArray[Any]] = {
        name: files.integers(table, name, path) for name in _INTEGERS
    }
    columns["timestamp"] = files.floats(table, "timestamp", path)
    for key in (STATE, ACTION):
        columns[key] = files.matrix(table, key, info.features[key].shape[0], path)
    return columns


def _check_rows(episode: Episode, rows: dict[str, npt.NDArray[Any]], fps: float) -> None:
    """Check that the rows are the episode's, in order, at the rate of the dataset.

    Raises:
        SpecError: they are not.
    """
    where = f"{episode.data_path}: episode {episode.idx}"
    counts = np.arange(episode.n_frames)
    if not np.array_equal(rows["index"], episode.start + counts):
        raise SpecError(
            f"{where}: expected rows {episode.start} to {episode.stop - 1} in order, found "
            f"{len(rows['index'])}, not all of these; the file is incomplete or out of order"
        )
    if (rows["episode_index"] != episode.idx).any():
        raise SpecError(f"{where}: its rows say they belong to another episode")
    if not np.array_equal(rows["frame_index"], counts):
        raise SpecError(f"{where}: frame_index does not count up from 0")
    t_s: FloatArray = rows["timestamp"]
    step_s = np.diff(t_s)
    if (step_s <= 0).any():
        frame = int(np.flatnonzero(step_s <= 0)[0]) + 1
        raise SpecError(
            f"{where}: time stamps do not increase at frame {frame} "
            f"({t_s[frame - 1]:.4f} s, then {t_s[frame]:.4f} s)"
        )
    late_s = np.abs(t_s - counts / fps)
    if (late_s > _TIMESTAMP_TOLERANCE_S).any():
        frame = int(np.argmax(late_s > _TIMESTAMP_TOLERANCE_S))
        raise SpecError(
            f"{where}: expected frame {frame} at {frame / fps:.4f} s for {fps:g} fps, "
            f"got {t_s[frame]:.4f} s; meta/info.json or the recording is wrong"
        )
