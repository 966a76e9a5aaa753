"""The files of a LeRobot v3.0 dataset: meta/info.json and the Parquet tables.

All use of pyarrow is here. What is read is checked against the schema that LeRobot documents, and
every fault names the file.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from string import Formatter
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from gwp_edge.errors import SpecError

CAMERA_PREFIX = "observation.images."
STATE, ACTION = "observation.state", "action"


class Feature(msgspec.Struct, frozen=True, kw_only=True):
    """One column of the dataset; ``shape`` in entries, or (h, w, 3) px for a camera."""

    dtype: str
    shape: tuple[int, ...]
    names: Any = None


class DatasetInfo(msgspec.Struct, frozen=True, kw_only=True):
    """meta/info.json, as far as it is used here; ``fps`` in Hz."""

    codebase_version: str
    fps: float
    total_episodes: int
    total_frames: int
    data_path: str
    features: dict[str, Feature]
    video_path: str | None = None
    robot_type: str | None = None
    synthetic: bool = False


class _Version(msgspec.Struct, frozen=True):
    codebase_version: str


def read_info(root: Path) -> DatasetInfo:
    """Read meta/info.json of the dataset at ``root``.

    Raises:
        SpecError: no dataset there, a version other than 3, or a malformed file.
    """
    path = root / "meta" / "info.json"
    try:
        text = path.read_bytes()
    except OSError as e:
        raise SpecError(
            f"{root}: not a LeRobot dataset, {path} cannot be read ({e.strerror})"
        ) from e
    try:
        version = msgspec.json.decode(text, type=_Version).codebase_version
        if not version.startswith("v3."):
            raise SpecError(
                f"{root}: expected a LeRobot v3.0 dataset, got {version}; convert it with "
                "LeRobot's own convert_dataset_v21_to_v30 script"
            )
        info = msgspec.json.decode(text, type=DatasetInfo)
    except msgspec.MsgspecError as e:
        raise SpecError(f"{path}: malformed ({e})") from e
    if not (info.fps > 0 and info.total_episodes > 0 and info.total_frames > 0):
        raise SpecError(
            f"{path}: expected fps, episodes and frames above 0, got {info.fps}, "
            f"{info.total_episodes}, {info.total_frames}"
        )
    for key in (STATE, ACTION):
        feature = info.features.get(key)
        if feature is None or len(feature.shape) != 1 or feature.shape[0] < 1:
            raise SpecError(f"{path}: expected a feature {key} of shape [D]")
    return info


def feature_names(feature: Feature) -> tuple[str, ...]:
    """Return the names of a feature's entries; empty where the dataset has none.

    LeRobot writes a list, or a list under one key such as ``motors``.
    """
    names = feature.names
    if isinstance(names, dict) and len(names) == 1:
        names = next(iter(names.values()))
    if isinstance(names, list) and all(isinstance(n, str) for n in names):
        return tuple(names) if len(names) == feature.shape[0] else ()
    return ()


def file_of(root: Path, template: str, **values: int | str) -> Path:
    """Return a file of the dataset from a path template of meta/info.json.

    Raises:
        SpecError: the template asks for other values, or leaves the dataset.
    """
    try:
        # A field such as {x.__class__} would reach into our objects.
        fields = {field for _, field, _, _ in Formatter().parse(template) if field is not None}
        if not fields <= set(values):
            raise SpecError(
                f"{root}: the path template {template!r} asks for {', '.join(sorted(fields))}; "
                f"expected only {', '.join(sorted(values))}"
            )
        relative = PurePosixPath(template.format(**values))
    except ValueError as e:
        raise SpecError(f"{root}: cannot use the path template {template!r} ({e})") from e
    if relative.is_absolute() or ".." in relative.parts:
        raise SpecError(f"{root}: the path template {template!r} leaves the dataset")
    return root / relative


def read_table(path: Path, columns: Sequence[str]) -> Any:  # noqa: ANN401 - pyarrow has no types
    """Read ``columns`` of a Parquet file as a pyarrow table.

    Raises:
        SpecError: the file is missing, truncated or corrupt, or lacks a column.
    """
    try:
        with pq.ParquetFile(path) as file:
            missing = sorted(set(columns) - set(file.schema_arrow.names))
            if missing:
                raise SpecError(f"{path}: expected the column(s) {', '.join(missing)}")
            return file.read(columns=list(columns))
    except FileNotFoundError as e:
        raise SpecError(f"{path}: file is missing; copy the dataset again") from e
    except (pa.ArrowException, OSError) as e:
        raise SpecError(f"{path}: Parquet file is corrupt or truncated ({e})") from e


def matrix(table: Any, column: str, width: int, path: Path) -> npt.NDArray[np.float32]:  # noqa: ANN401
    """Return a column of vectors as float32, shape (rows, width).

    Raises:
        SpecError: a row of another width, an empty cell, or a number that is not finite.
    """
    array = table.column(column).combine_chunks()
    if array.null_count:
        raise SpecError(f"{path}: column {column} has empty cells")
    # flatten() of a sliced list array honours the slice, which .values does not.
    values = np.asarray(array.flatten().to_numpy(zero_copy_only=False), dtype=np.float32)
    lengths = np.unique(pc.list_value_length(array).to_numpy(zero_copy_only=False))
    if lengths.tolist() not in ([width], []):
        raise SpecError(
            f"{path}: expected {width} numbers in every row of {column}, got {lengths.tolist()}"
        )
    rows = values.reshape(-1, width)
    if not np.isfinite(rows).all():
        row = int(np.flatnonzero(~np.isfinite(rows).all(axis=1))[0])
        raise SpecError(f"{path}: {column} is not finite in row {row}")
    return rows


def integers(table: Any, column: str, path: Path) -> npt.NDArray[np.int64]:  # noqa: ANN401
    """Return a column of integers, shape (rows,).

    Raises:
        SpecError: an empty cell or a value that is not an integer.
    """
    array = table.column(column)
    if array.null_count or not pa.types.is_integer(array.type):
        raise SpecError(f"{path}: expected integers in column {column}")
    return np.asarray(array.to_numpy(), dtype=np.int64)


def floats(table: Any, column: str, path: Path) -> npt.NDArray[np.float64]:  # noqa: ANN401
    """Return a column of finite numbers, shape (rows,).

    Raises:
        SpecError: an empty cell, or a value that is not a finite number.
    """
    array = table.column(column)
    if array.null_count or not pa.types.is_floating(array.type):
        raise SpecError(f"{path}: expected numbers in column {column}")
    values = np.asarray(array.to_numpy(), dtype=np.float64)
    if not np.isfinite(values).all():
        raise SpecError(f"{path}: column {column} is not finite")
    return values


def read_tasks(root: Path) -> dict[int, str]:
    """Return the task texts of meta/tasks.parquet by task index.

    Raises:
        SpecError: the file is missing, damaged, or has no column of texts.
    """
    path = root / "meta" / "tasks.parquet"
    try:
        schema = pq.read_schema(path)
    except FileNotFoundError as e:
        raise SpecError(f"{path}: file is missing; copy the dataset again") from e
    except (pa.ArrowException, OSError) as e:
        raise SpecError(f"{path}: Parquet file is corrupt or truncated ({e})") from e
    # LeRobot keeps the text as the index of a pandas table, whose name varies.
    texts = [
        f.name for f in schema if pa.types.is_string(f.type) or pa.types.is_large_string(f.type)
    ]
    if len(texts) != 1:
        raise SpecError(f"{path}: expected one column of task texts, got {texts or 'none'}")
    table = read_table(path, [texts[0], "task_index"])
    idx = integers(table, "task_index", path)
    return dict(zip(idx.tolist(), table.column(texts[0]).to_pylist(), strict=True))


def episode_tables(root: Path) -> list[Path]:
    """Return the Parquet files under meta/episodes in order.

    Raises:
        SpecError: there is none.
    """
    paths = sorted((root / "meta" / "episodes").glob("chunk-*/file-*.parquet"))
    if not paths:
        raise SpecError(f"{root}: expected Parquet files under meta/episodes, found none")
    return paths
