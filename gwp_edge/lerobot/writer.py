"""Write LeRobot v3.0 datasets: one data file, one video for each camera, tables and statistics.

The layout is that of LeRobot 0.4 and later; pyarrow and PyAV are imported when a dataset is
written (extra ``recorded``).
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from gwp_edge.errors import DeviceError, SpecError
from gwp_edge.lerobot.stats import Stats, column_stats, merge_stats, numeric_stats
from gwp_edge.realtime import ordinary_threads
from gwp_edge.types import Float32Array, ImageArray

_DATA_PATH: Final = "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
_VIDEO_PATH: Final = "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4"
_FIRST: Final = {"chunk_index": 0, "file_index": 0}
# LeRobot's own settings: key frames every second frame make random access cheap.
_CODEC: Final = "libsvtav1"
_KEY_FRAME_EVERY: Final = 2
_CRF: Final = 30
_N_IMAGE_SAMPLES: Final = 50
_SAMPLE_STEP_PX: Final = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class EpisodeRows:
    """One episode of n frames at the dataset's rate.

    Attributes:
        state: shape (n, D), rad and m.
        action: absolute, shape (n, D).
        task: text.
    """

    state: Float32Array
    action: Float32Array
    task: str


class DatasetWriter:
    """Writes one dataset into an empty folder. Threads: one owner.

    Args:
        root: folder, made where it is missing.
        names: of the D channels.
        fps: frames per second.
        robot_type: for meta/info.json.
        sizes: (h, w) of each camera by role.
        crf: constant rate factor of the videos; higher is smaller and coarser.

    Raises:
        DeviceError: pyarrow or PyAV is missing.
        SpecError: a picture has an odd side, which video cannot hold.
    """

    def __init__(
        self,
        root: Path,
        *,
        names: Sequence[str],
        fps: int,
        robot_type: str,
        sizes: Mapping[str, tuple[int, int]],
        crf: int = _CRF,
    ) -> None:
        odd = [f"{role} {w}x{h}" for role, (h, w) in sizes.items() if h % 2 or w % 2]
        if odd:
            raise SpecError(f"video needs even sides, got {', '.join(odd)}")
        self._root = root
        self._names = list(names)
        self._fps = fps
        self._robot_type = robot_type
        self._sizes = dict(sizes)
        self._codec_options = {"g": str(_KEY_FRAME_EVERY), "crf": str(crf)}
        self._av, self._pa, self._pq = _import_libraries()
        self._videos = {role: self._open_video(role) for role in sizes}
        self._rows: list[EpisodeRows] = []
        self._image_stats: list[dict[str, dict[str, Any]]] = []
        self._n_pictures = dict.fromkeys(sizes, 0)

    def add(self, rows: EpisodeRows, pictures: Mapping[str, Iterator[ImageArray]]) -> None:
        """Append an episode; every camera gives as many pictures as there are rows.

        Raises:
            SpecError: the numbers of rows and pictures differ, or a value is not finite.
        """
        n, D = len(rows.state), len(self._names)
        if rows.state.shape != (n, D) or rows.action.shape != (n, D) or n == 0:
            raise SpecError(f"episode: expected (n, {D}) rows, got {rows.state.shape}")
        if not (np.isfinite(rows.state).all() and np.isfinite(rows.action).all()):
            raise SpecError("episode: a state or an action is not finite")
        stats = {}
        for role, images in pictures.items():
            stats[f"observation.images.{role}"] = self._encode(role, images, n)
        self._rows.append(rows)
        self._image_stats.append(stats)

    def close(self) -> None:
        """Finish the videos and write every table.

        Raises:
            SpecError: there is no episode.
        """
        for container, stream in self._videos.values():
            container.mux(stream.encode())
            container.close()
        if not self._rows:
            raise SpecError("no episode to write")
        tasks = list(dict.fromkeys(r.task for r in self._rows))
        episodes = [self._columns(i, tasks) for i in range(len(self._rows))]
        self._write_data(episodes)
        self._write_tasks(tasks)
        stats = [
            {**numeric_stats(e), **s} for e, s in zip(episodes, self._image_stats, strict=True)
        ]
        self._write_episodes(episodes, stats)
        total = merge_stats(stats)
        self._write_json("meta/stats.json", total)
        self._write_json("meta/info.json", self._info(sum(len(r.state) for r in self._rows), tasks))

    # Videos

    def _open_video(self, role: str) -> tuple[Any, Any]:
        path = self._root / _VIDEO_PATH.format(video_key=f"observation.images.{role}", **_FIRST)
        path.parent.mkdir(parents=True, exist_ok=True)
        container = self._av.open(str(path), "w")
        stream = container.add_stream(_CODEC, rate=self._fps, options=dict(self._codec_options))
        stream.height, stream.width = self._sizes[role]
        stream.pix_fmt = "yuv420p"
        with ordinary_threads():
            stream.codec_context.open()
        return container, stream

    def _encode(self, role: str, images: Iterator[ImageArray], n: int) -> dict[str, Any]:
        container, stream = self._videos[role]
        step = max(1, n // _N_IMAGE_SAMPLES)
        samples = []
        n_seen = 0
        for image in images:
            if image.shape != (*self._sizes[role], 3):
                raise SpecError(f"{role}: expected {self._sizes[role]} px, got {image.shape}")
            frame = self._av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
            frame.pts = self._n_pictures[role]
            frame.time_base = Fraction(1, self._fps)
            container.mux(stream.encode(frame))
            if n_seen % step == 0:
                samples.append(image[::_SAMPLE_STEP_PX, ::_SAMPLE_STEP_PX].reshape(-1, 3))
            self._n_pictures[role] += 1
            n_seen += 1
        if n_seen != n:
            raise SpecError(f"{role}: expected {n} pictures, got {n_seen}")
        stats = column_stats(np.concatenate(samples) / 255.0, count=n)
        return {
            key: value if key == "count" else np.reshape(value, (3, 1, 1)).tolist()
            for key, value in stats.items()
        }

    # Tables

    def _columns(self, idx: int, tasks: list[str]) -> dict[str, npt.NDArray[Any]]:
        rows = self._rows[idx]
        n = len(rows.state)
        start = sum(len(r.state) for r in self._rows[:idx])
        frame = np.arange(n)
        return {
            "observation.state": rows.state,
            "action": rows.action,
            "timestamp": (frame / self._fps).astype(np.float32),
            "frame_index": frame,
            "episode_index": np.full(n, idx),
            "index": start + frame,
            "task_index": np.full(n, tasks.index(rows.task)),
        }

    def _write_data(self, episodes: list[dict[str, npt.NDArray[Any]]]) -> None:
        pa, D = self._pa, len(self._names)
        columns = {}
        for key in episodes[0]:
            values = np.concatenate([e[key] for e in episodes])
            if values.ndim == 2:
                flat = pa.array(values.astype(np.float32).ravel())
                columns[key] = pa.FixedSizeListArray.from_arrays(flat, D)
            else:
                columns[key] = pa.array(values)
        self._write_table(_DATA_PATH.format(**_FIRST), pa.table(columns))

    def _write_tasks(self, tasks: list[str]) -> None:
        pa = self._pa
        table = pa.table(
            {
                "task_index": pa.array(range(len(tasks)), pa.int64()),
                "__index_level_0__": pa.array(tasks, pa.large_string()),
            }
        )
        # LeRobot reads the texts as the index of a pandas table.
        index = {
            "name": None,
            "field_name": "__index_level_0__",
            "pandas_type": "object",
            "numpy_type": "str",
            "metadata": None,
        }
        names = {
            "name": None,
            "field_name": None,
            "pandas_type": "unicode",
            "numpy_type": "str",
            "metadata": {"encoding": "UTF-8"},
        }
        column = {
            "name": "task_index",
            "field_name": "task_index",
            "pandas_type": "int64",
            "numpy_type": "int64",
            "metadata": None,
        }
        pandas = {
            "index_columns": ["__index_level_0__"],
            "column_indexes": [names],
            "columns": [column, index],
            "creator": {"library": "pyarrow", "version": pa.__version__},
            "pandas_version": "3.1.1",
        }
        table = table.replace_schema_metadata({b"pandas": json.dumps(pandas).encode()})
        self._write_table("meta/tasks.parquet", table)

    def _write_episodes(
        self, episodes: list[dict[str, npt.NDArray[Any]]], stats: list[Stats]
    ) -> None:
        table = []
        for idx, (columns, mine) in enumerate(zip(episodes, stats, strict=True)):
            start, n = int(columns["index"][0]), len(columns["index"])
            row: dict[str, Any] = {
                "episode_index": idx,
                "tasks": [self._rows[idx].task],
                "length": n,
                "data/chunk_index": 0,
                "data/file_index": 0,
                "dataset_from_index": start,
                "dataset_to_index": start + n,
            }
            for role in self._sizes:
                prefix = f"videos/observation.images.{role}/"
                row |= {f"{prefix}{key}": value for key, value in _FIRST.items()}
                row[f"{prefix}from_timestamp"] = start / self._fps
                row[f"{prefix}to_timestamp"] = (start + n) / self._fps
            for feature, values in mine.items():
                row |= {f"stats/{feature}/{key}": value for key, value in values.items()}
            row |= {f"meta/episodes/{key}": value for key, value in _FIRST.items()}
            table.append(row)
        path = "meta/episodes/chunk-000/file-000.parquet"
        self._write_table(path, self._pa.Table.from_pylist(table))

    def _info(self, n_frames: int, tasks: list[str]) -> dict[str, Any]:
        vector = {"dtype": "float32", "shape": [len(self._names)], "names": self._names}
        features: dict[str, Any] = {
            f"observation.images.{role}": self._video_feature(h, w)
            for role, (h, w) in self._sizes.items()
        }
        features |= {"observation.state": vector, "action": vector}
        features["timestamp"] = {"dtype": "float32", "shape": [1], "names": None}
        for key in ("frame_index", "episode_index", "index", "task_index"):
            features[key] = {"dtype": "int64", "shape": [1], "names": None}
        n_episodes = len(self._rows)
        return {
            "codebase_version": "v3.0",
            "robot_type": self._robot_type,
            "total_episodes": n_episodes,
            "total_frames": n_frames,
            "total_tasks": len(tasks),
            "chunks_size": 1000,
            "data_files_size_in_mb": 100,
            "video_files_size_in_mb": 200,
            "fps": self._fps,
            "splits": {"train": f"0:{n_episodes}"},
            "data_path": _DATA_PATH,
            "video_path": _VIDEO_PATH,
            "features": features,
        }

    def _video_feature(self, h: int, w: int) -> dict[str, Any]:
        return {
            "dtype": "video",
            "shape": [h, w, 3],
            "names": ["height", "width", "channels"],
            "info": {
                "video.height": h,
                "video.width": w,
                "video.codec": "av1",
                "video.pix_fmt": "yuv420p",
                "video.is_depth_map": False,
                "video.fps": self._fps,
                "video.channels": 3,
                "has_audio": False,
            },
        }

    def _write_table(self, path: str, table: Any) -> None:  # noqa: ANN401 - pyarrow has no types
        target = self._root / path
        target.parent.mkdir(parents=True, exist_ok=True)
        self._pq.write_table(table, target)

    def _write_json(self, path: str, value: object) -> None:
        target = self._root / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(json.dumps(value, indent=4) + "\n")


def _import_libraries() -> tuple[Any, Any, Any]:
    try:
        import av
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as e:
        raise DeviceError(
            f"writing a LeRobot dataset needs pyarrow and PyAV ({e}); "
            "pip install 'gwp-edge[recorded]'"
        ) from e
    # The encoder prints a page to stderr for every video; only its errors matter here.
    os.environ.setdefault("SVT_LOG", "1")
    return av, pa, pq
