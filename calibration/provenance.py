"""Is a dataset recorded, or is it filler? Ranges from filler would break a robot's policy.

The check finds what calibration must never see: data that says it is synthetic, pictures that are
one colour, frozen or noise, and motion that is frozen or noise. It measures correlation between
neighbours, in the picture and in time, which recorded data has and filler has not. It cannot tell
a drawn or simulated scene that moves smoothly from a camera's; low detail is reported as a note.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from gwp_edge.errors import SpecError
from gwp_edge.lerobot.dataset import LeRobotDataset
from gwp_edge.types import FloatArray, ImageArray

_DECLARED = ("synthetic", "random", "fake", "mock", "dummy")
_N_PROBES = 8
# Grey levels of 255: less spread within a picture is one flat colour.
_FLAT = 1.0
# Where something moves, some pixels change by more; a still picture that was encoded as video
# flickers by less, unless it was encoded coarsely. Grey levels, 99.9th percentile of pixels.
_FROZEN = 10.0
# Correlation of neighbours. Measured: smooth pictures 0.95 to 0.99 in space and 0.89 in time,
# white noise within 0.1 of zero in both, also after h264, mpeg4 and AV1. The bound lies between.
_NOISE = 0.5
# Mean absolute step between neighbouring pixels. A drawn scene measured 0.3; where cameras begin
# is a judgement, so this is a note and never a reason.
_LOW_DETAIL = 1.0
_STILL = 1e-6


@dataclass(frozen=True, slots=True, kw_only=True)
class DataVerdict:
    """What was found about a dataset.

    Attributes:
        is_synthetic: at least one reason was found.
        reasons: why it is not recorded data, one line each.
        notes: what is odd but does not disqualify, one line each.
    """

    is_synthetic: bool
    reasons: tuple[str, ...]
    notes: tuple[str, ...] = ()


def judge_dataset(dataset: LeRobotDataset) -> DataVerdict:
    """Judge a dataset by its description, its motion, and a few frames of every camera.

    Reads all rows and decodes at most 16 frames for each camera.
    """
    reasons, notes = _declared(dataset), []
    reasons += _judge_motion(dataset)
    for camera in dataset.cameras:
        bad, odd = _judge_camera(dataset, camera)
        reasons += bad
        notes += odd
    return DataVerdict(is_synthetic=bool(reasons), reasons=tuple(reasons), notes=tuple(notes))


def require_recorded(dataset: LeRobotDataset, *, allow_synthetic: bool = False) -> DataVerdict:
    """Judge a dataset and refuse one that is not recorded.

    Args:
        dataset: the dataset.
        allow_synthetic: go on all the same; the caller then marks the bundle.

    Raises:
        SpecError: the dataset is synthetic and that was not allowed.
    """
    verdict = judge_dataset(dataset)
    if verdict.is_synthetic and not allow_synthetic:
        raise SpecError(
            f"{dataset.name}: not recorded data ({'; '.join(verdict.reasons)}); calibrate on "
            "recorded episodes, or pass --allow-synthetic and never run the bundle on a robot"
        )
    return verdict


def _declared(dataset: LeRobotDataset) -> list[str]:
    reasons = []
    if dataset.info.synthetic:
        reasons.append("meta/info.json says synthetic")
    if (dataset.info.robot_type or "").lower() in _DECLARED:
        reasons.append(f"meta/info.json says robot_type {dataset.info.robot_type}")
    return reasons


def _judge_motion(dataset: LeRobotDataset) -> list[str]:
    reasons = []
    for what in ("state", "action"):
        series = [
            getattr(dataset.data(i), what).astype(np.float64) for i in range(dataset.n_episodes)
        ]
        spread = np.max([np.ptp(s, axis=0) for s in series], axis=0)
        if spread.max() < _STILL:
            reasons.append(f"{what} never changes")
            continue
        smooth = [_lag_correlation(s[:, spread >= _STILL]) for s in series if len(s) > 2]
        if smooth and np.nanmedian(smooth) < _NOISE:
            reasons.append(
                f"{what} is noise (correlation of neighbouring rows {np.nanmedian(smooth):.2f})"
            )
    return reasons


def _lag_correlation(rows: FloatArray) -> float:
    """Return the median over channels of the correlation of a series with itself one row on."""
    a, b = rows[:-1] - rows.mean(axis=0), rows[1:] - rows.mean(axis=0)
    power = np.square(rows - rows.mean(axis=0)).mean(axis=0)
    moving = power > _STILL**2
    if not moving.any():
        return float("nan")
    return float(np.median((a * b).mean(axis=0)[moving] / power[moving]))


def _judge_camera(dataset: LeRobotDataset, camera: str) -> tuple[list[str], list[str]]:
    pairs = [
        (_grey(dataset.image(e, f, camera)), _grey(dataset.image(e, f + 1, camera)))
        for e, f in _probe_frames(dataset)
    ]
    if not pairs:
        return [f"{camera}: no episode has two frames"], []
    greys = [a for a, _ in pairs]
    if max(float(g.std()) for g in greys) < _FLAT:
        return [f"{camera} shows one flat colour"], []
    neighbours = float(np.median([_pixel_correlation(g) for g in greys]))
    if neighbours < _NOISE:
        return [f"{camera} shows noise (correlation of neighbouring pixels {neighbours:.2f})"], []
    following = float(np.median([_correlation(a, b) for a, b in pairs]))
    if following < _NOISE:
        return [f"{camera} shows unrelated pictures (correlation in time {following:.2f})"], []
    rest = [*greys[1:], pairs[0][1]]
    change = max(float(np.percentile(np.abs(g - greys[0]), 99.9)) for g in rest)
    if change < _FROZEN:
        return [f"{camera} never changes"], []
    detail = float(np.mean([np.abs(np.diff(g, axis=1)).mean() for g in greys]))
    if detail < _LOW_DETAIL:
        return [], [f"{camera} has little detail ({detail:.2f} grey levels a pixel): drawn?"]
    return [], []


def _probe_frames(dataset: LeRobotDataset) -> list[tuple[int, int]]:
    """Return frames spread over the dataset, each with a successor in its episode."""
    rows = np.linspace(0, dataset.n_frames - 1, _N_PROBES).astype(int)
    starts = np.array([e.start for e in dataset.episodes])
    frames = set()
    for row in rows.tolist():
        episode = dataset.episodes[int(np.searchsorted(starts, row, side="right")) - 1]
        if episode.n_frames > 1:
            frames.add((episode.idx, min(row - episode.start, episode.n_frames - 2)))
    return sorted(frames)


def _grey(image: ImageArray) -> FloatArray:
    return np.asarray(image.mean(axis=2), dtype=np.float64)


def _correlation(a: FloatArray, b: FloatArray) -> float:
    """Return the correlation of two pictures; 1 where neither has any content."""
    a, b = a - a.mean(), b - b.mean()
    power = float(np.sqrt(np.square(a).sum() * np.square(b).sum()))
    return float((a * b).sum()) / power if power > 0 else 1.0


def _pixel_correlation(grey: FloatArray) -> float:
    across = _correlation(grey[:, 1:], grey[:, :-1])
    down = _correlation(grey[1:], grey[:-1])
    return min(across, down)
