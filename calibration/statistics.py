"""Normalisation statistics of LeRobot datasets, exactly as training computes them.

Every frame starts a window of H rows. The window stays inside its episode: past the end the last
row repeats. Delta channels are taken relative to the state at the window's start; the others stay
absolute. State statistics run over frames, action statistics over all rows of all windows; all
arithmetic on values is in float32, moments in float64. Episodes stream through; quantiles are
exact order statistics found in a second pass, so memory does not grow with the data.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from gwp_edge.calibration.quantiles import QuantileSelector
from gwp_edge.console import write_json
from gwp_edge.errors import SpecError
from gwp_edge.lerobot.dataset import LeRobotDataset
from gwp_edge.lerobot.episodes import EpisodeData
from gwp_edge.lerobot.files import ACTION, STATE
from gwp_edge.types import Float32Array, FloatArray

Stats = dict[str, dict[str, dict[str, list[float]]]]
Progress = Callable[[int, int], None]

_QUANTILES = (0.01, 0.99)
# Windows are expanded this many starts at a time: 2048 x 48 x 14 floats are 5.5 MB.
_N_STARTS = 2048
_JOINT_WORDS = ("joint", "shoulder", "elbow", "wrist", "waist", "forearm")


def delta_mask_from_names(names: Sequence[str]) -> tuple[bool, ...]:
    """Return which channels are trained as deltas: joints are, grippers are not.

    Raises:
        SpecError: a name is neither; the caller must then say so itself.
    """
    mask = []
    for name in names:
        lower = name.lower()
        if "gripper" in lower:
            mask.append(False)
        elif any(word in lower for word in _JOINT_WORDS):
            mask.append(True)
        else:
            raise SpecError(
                f"channel {name}: neither a joint nor a gripper by its name; give the delta mask"
            )
    return tuple(mask)


class _Moments:
    """Mean, deviation and extremes of D columns, merged batch by batch in float64."""

    def __init__(self, n_channels: int) -> None:
        self.n = 0
        self.mean: FloatArray = np.zeros(n_channels)
        self.squares: FloatArray = np.zeros(n_channels)
        self.min: FloatArray = np.full(n_channels, np.inf)
        self.max: FloatArray = np.full(n_channels, -np.inf)

    def update(self, rows: Float32Array) -> None:
        values = rows.astype(np.float64)
        mean = values.mean(axis=0)
        total = self.n + len(values)
        # Chan's update: no difference of two large sums.
        shift = mean - self.mean
        self.squares += np.square(values - mean).sum(axis=0)
        self.squares += np.square(shift) * (self.n * len(values) / total)
        self.mean += shift * (len(values) / total)
        self.min = np.minimum(self.min, values.min(axis=0))
        self.max = np.maximum(self.max, values.max(axis=0))
        self.n = total


def _batches(
    data: EpisodeData, n_rows: int, mask: npt.NDArray[np.bool_]
) -> Iterator[tuple[str, Float32Array]]:
    """Yield an episode's states, then the rows of all its windows, each of shape (n, D)."""
    yield STATE, data.state
    n = len(data.state)
    for start in range(0, n, _N_STARTS):
        starts = np.arange(start, min(start + _N_STARTS, n))
        rows = data.action[np.minimum(starts[:, None] + np.arange(n_rows), n - 1)]
        rows[:, :, mask] -= data.state[starts][:, None, mask]
        yield ACTION, rows.reshape(-1, rows.shape[-1])


def compute_statistics(
    roots: Sequence[Path],
    *,
    n_rows: int = 48,
    width: int,
    delta_mask: Sequence[bool] | None = None,
    progress: Progress | None = None,
) -> Stats:
    """Compute the content of norm_stats.json over one or several datasets.

    Args:
        roots: folders of the datasets; their statistics are pooled.
        n_rows: rows H of a window.
        width: width A of the model; entries past the real channels are zero.
        delta_mask: which channels are deltas, D entries; from the channel names when None.
        progress: called with episodes done and in all; each episode counts twice, once a pass.

    Returns:
        ``{"norm_stats": {"observation.state": {...}, "action": {...}}}`` with mean, std, min, max,
        q01, q99 of ``width`` numbers each, in the datasets' units.

    Raises:
        SpecError: no dataset, datasets that are damaged or do not fit each other, state and
            action whose delta channels differ, a bad width, window or mask.
    """
    if not roots or n_rows < 1:
        raise SpecError(f"statistics: expected datasets and n_rows of 1 or more, got {n_rows}")
    datasets = [LeRobotDataset.open(root) for root in roots]
    mask = _checked_mask(datasets, delta_mask, width)
    D = len(mask)
    moments = {key: _Moments(D) for key in (STATE, ACTION)}
    selectors = {key: QuantileSelector(D, _QUANTILES) for key in moments}
    n_done, n_all = 0, 2 * sum(d.n_episodes for d in datasets)
    for is_first in (True, False):
        for dataset in datasets:
            for idx in range(dataset.n_episodes):
                for key, rows in _batches(dataset.data(idx), n_rows, mask):
                    if is_first:
                        moments[key].update(rows)
                        selectors[key].count(rows)
                    else:
                        selectors[key].refine(rows)
                n_done += 1
                if progress is not None:
                    progress(n_done, n_all)
    return {"norm_stats": {key: _summary(moments[key], selectors[key], width) for key in moments}}


def _summary(moments: _Moments, selector: QuantileSelector, width: int) -> dict[str, list[float]]:
    q01, q99 = selector.quantiles()
    columns = {
        "mean": moments.mean,
        "std": np.sqrt(moments.squares / moments.n),
        "min": moments.min,
        "max": moments.max,
        "q01": q01,
        "q99": q99,
    }
    return {k: np.pad(v, (0, width - len(v))).tolist() for k, v in columns.items()}


def _checked_mask(
    datasets: Sequence[LeRobotDataset], delta_mask: Sequence[bool] | None, width: int
) -> npt.NDArray[np.bool_]:
    """Return the delta mask, shape (D,), after checking that the datasets are alike."""
    first = datasets[0]
    for dataset in datasets:
        state, action = (dataset.info.features[k].shape for k in (STATE, ACTION))
        if state != action:
            raise SpecError(f"{dataset.name}: state has {state[0]} channels, action {action[0]}")
        if dataset.state_names != dataset.action_names:
            raise SpecError(
                f"{dataset.name}: state and action channels differ: "
                f"{_difference(dataset.state_names, dataset.action_names)}"
            )
        if dataset.state_names != first.state_names or state != _shape(first):
            raise SpecError(
                f"{dataset.name} and {first.name} have different channels: "
                f"{_difference(dataset.state_names, first.state_names)}"
            )
        if dataset.fps != first.fps:
            raise SpecError(
                f"{dataset.name} runs at {dataset.fps:g} fps, {first.name} at {first.fps:g}; "
                "windows of both cannot be pooled"
            )
    (D,) = _shape(first)
    if width < D:
        raise SpecError(f"width: expected at least the {D} channels of {first.name}, got {width}")
    if delta_mask is None:
        if not first.action_names:
            raise SpecError(f"{first.name}: its channels have no names; give the delta mask")
        delta_mask = delta_mask_from_names(first.action_names)
    if len(delta_mask) != D:
        raise SpecError(f"delta mask: expected {D} entries, got {len(delta_mask)}")
    return np.array(delta_mask, dtype=bool)


def _shape(dataset: LeRobotDataset) -> tuple[int, ...]:
    return dataset.info.features[ACTION].shape


def _difference(a: Sequence[str], b: Sequence[str]) -> str:
    for i in range(max(len(a), len(b))):
        x, y = (names[i] if i < len(names) else "nothing" for names in (a, b))
        if x != y:
            return f"channel {i} is {x} and {y}"
    return "their number differs"


def write_statistics(path: Path, stats: Stats) -> None:
    """Write norm_stats.json, whole or not at all.

    Raises:
        SpecError: it cannot be written.
    """
    write_json(path, stats)
