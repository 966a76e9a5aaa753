"""A recorded session as a LeRobot v3.0 dataset, ready for fine-tuning or calibration.

Every unbroken stretch in which the policy moved the arm becomes an episode. A row at time t has
the state measured at t, the command in force at t, and the newest pictures taken by then: what a
policy that plans at t sees and is to do. Rows are made only between the last of the first and the
first of the last record of states, commands and every camera: of a recording that was cut off,
each table ends elsewhere.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt

from gwp_edge.errors import SpecError
from gwp_edge.lerobot.writer import DatasetWriter, EpisodeRows
from gwp_edge.session_format import Session
from gwp_edge.status import Mode
from gwp_edge.telemetry import Distribution
from gwp_edge.types import Float32Array, ImageArray

_MIN_ROWS: Final = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportReport:
    """What was written.

    Attributes:
        n_episodes: unbroken stretches.
        n_frames: rows in all.
        fps: of the dataset.
        picture_age_ms: how old the picture of a row is; large where only the policy's own
            pictures were recorded.
        picture_repeats: rows whose picture is that of the row before.
    """

    n_episodes: int
    n_frames: int
    fps: int
    picture_age_ms: Distribution
    picture_repeats: int


class _Track:
    """The pictures of one camera in order of their capture. Threads: one owner."""

    def __init__(self, session: Session, camera_idx: int) -> None:
        table = session.frames
        rows = np.flatnonzero(table["camera"] == camera_idx)
        # The same picture may be there twice; the exact one (codec 0) is taken.
        order = np.lexsort((table["codec"][rows], table["t_captured_ns"][rows]))
        rows = rows[order]
        _, first = np.unique(table["t_captured_ns"][rows], return_index=True)
        self.rows = rows[first]
        self.t_ns: npt.NDArray[np.int64] = table["t_captured_ns"][self.rows]
        self._session = session

    def at(self, t_ns: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Return which picture is the newest at each time; -1 before the first."""
        return np.searchsorted(self.t_ns, t_ns, side="right") - 1

    def pictures(self, which: npt.NDArray[np.int64]) -> Iterator[ImageArray]:
        """Yield pictures; a repeated one is decoded once."""
        last, image = -1, None
        for i in which.tolist():
            if image is None or i != last:
                last, image = i, self._session.frame(int(self.rows[i])).image
            yield image


def export_lerobot(
    session: Session, out: Path, *, task: str | None = None, fps: int | None = None
) -> ExportReport:
    """Write ``session`` to a new folder ``out``.

    Args:
        session: recorded run.
        out: must not exist; is complete or not there at all.
        task: text of the task; by default the one that was followed.
        fps: rate of the dataset; by default the policy's own.

    Raises:
        SpecError: nothing moved, or something is missing or in the way.
        DeviceError: pyarrow or PyAV is missing.
    """
    if out.exists():
        raise SpecError(f"{out}: exists already; name a new folder")
    spec = session.spec
    fps = fps if fps is not None else round(1e9 / spec.period_ns)
    if fps <= 0:
        raise SpecError(f"fps: expected a positive rate, got {fps}")
    tracks = [_Track(session, i) for i in range(len(spec.cameras))]
    empty = [c for c, t in zip(spec.cameras, tracks, strict=True) if not len(t.rows)]
    if empty or not len(session.states) or not len(session.commands):
        what = ", ".join(empty) or "states or commands"
        raise SpecError(f"{session.folder}: has no {what}; nothing to export")
    columns = (*(t.t_ns for t in tracks), session.states["t_ns"], session.commands["t_ns"])
    covered = max(int(t_ns[0]) for t_ns in columns), min(int(t_ns[-1]) for t_ns in columns)
    every = [_rows_of(span, covered, fps) for span in _stretches(session)]
    times = [t_ns for t_ns in every if len(t_ns) >= _MIN_ROWS]
    if not times:
        raise SpecError(
            f"{session.folder}: the policy never moved the arm for {_MIN_ROWS} rows of {fps} fps "
            "while states, commands and pictures were recorded"
        )
    text = task or session.header.task or spec.tasks[0]
    part = out.with_name(f".{out.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    try:
        report = _write(session, part, tracks, times, text, fps)
        os.replace(part, out)
    except OSError as e:
        raise SpecError(f"{out}: cannot be written: {e.strerror}") from e
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return report


def _write(
    session: Session,
    root: Path,
    tracks: list[_Track],
    times: list[npt.NDArray[np.int64]],
    task: str,
    fps: int,
) -> ExportReport:
    spec = session.spec
    sizes = {}
    for camera, track in zip(spec.cameras, tracks, strict=True):
        h, w, _ = session.frame(int(track.rows[0])).image.shape
        sizes[camera] = (h, w)
    writer = DatasetWriter(
        root,
        names=[c.name for c in spec.channels],
        fps=fps,
        robot_type=str(session.header.robot.get("name", "unknown")),
        sizes=sizes,
    )
    ages, n_repeats = [], 0
    for t_ns in times:
        which = [track.at(t_ns) for track in tracks]
        for track, picture in zip(tracks, which, strict=True):
            ages.append(t_ns - track.t_ns[picture])
            n_repeats += int((np.diff(picture) == 0).sum())
        rows = EpisodeRows(
            state=_at(session.states["t_ns"], session.states["position"], t_ns),
            action=_at(session.commands["t_ns"], session.commands["position"], t_ns),
            task=task,
        )
        pictures = {
            camera: track.pictures(picture)
            for camera, track, picture in zip(spec.cameras, tracks, which, strict=True)
        }
        writer.add(rows, pictures)
    writer.close()
    return ExportReport(
        n_episodes=len(times),
        n_frames=sum(len(t) for t in times),
        fps=fps,
        picture_age_ms=Distribution.of(np.concatenate(ages), 1e-6),
        picture_repeats=n_repeats,
    )


def _stretches(session: Session) -> list[tuple[int, int]]:
    """Return begin and end of every unbroken stretch of motion, ns."""
    ticks = session.ticks
    moving = np.concatenate([[False], ticks["mode"] == Mode.RUN, [False]]).astype(np.int8)
    starts, stops = (np.flatnonzero(np.diff(moving) == s) for s in (1, -1))
    t_ns = ticks["t_woke_ns"]
    return [(int(t_ns[a]), int(t_ns[b - 1])) for a, b in zip(starts, stops, strict=True)]


def _rows_of(span: tuple[int, int], covered: tuple[int, int], fps: int) -> npt.NDArray[np.int64]:
    """Return the times, ns, of the rows within both ``span`` and ``covered``."""
    begin, end = max(span[0], covered[0]), min(span[1], covered[1])
    n = max(0, (end - begin) * fps // 1_000_000_000 + 1)
    return begin + np.arange(n, dtype=np.int64) * 1_000_000_000 // fps


def _at(
    t_ns: npt.NDArray[np.int64], values: npt.NDArray[np.float64], wanted_ns: npt.NDArray[np.int64]
) -> Float32Array:
    """Interpolate rows of ``values`` linearly at ``wanted_ns``, shape (n, D).

    All of ``wanted_ns`` lie within ``t_ns``: beyond its ends the edge would be held.
    """
    # Against the first time, so that float64 keeps the nanoseconds.
    x, wanted = t_ns - t_ns[0], wanted_ns - t_ns[0]
    columns = [np.interp(wanted, x, column) for column in values.T]
    return np.stack(columns, axis=1).astype(np.float32)
