"""Training data: canvases of a LeRobot dataset, and windows of normalised states and actions."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from gwp_edge.export.layout import Layout, find_layout
from gwp_edge.lerobot.dataset import LeRobotDataset
from gwp_edge.preprocess import fit_view
from gwp_edge.types import Float32Array

#: Frames of the future clip are this far apart: H/4.
_QUARTER = 12
#: Canvases are kept every fourth frame: windows begin every second of them, and the offsets of
#: the future frames, multiples of 12, fall on them too.
CANVAS_STRIDE = 4
_ANCHOR_STRIDE = 8


@dataclass(frozen=True, kw_only=True)
class Episode:
    """One demonstration.

    Attributes:
        canvases: every ``CANVAS_STRIDE``-th frame and the last, uint8 (m, h, w, 3).
        state: (n, D), rad and m.
        action: absolute, (n, D).
        task: instruction.
    """

    canvases: npt.NDArray[np.uint8]
    state: Float32Array
    action: Float32Array
    task: str

    def canvas_idx(self, frame: int) -> int:
        """Return which canvas shows ``frame``, the last one beyond the end."""
        return min(-(-frame // CANVAS_STRIDE), len(self.canvases) - 1)

    def anchors(self) -> range:
        """Return the frames at which training windows begin."""
        return range(0, len(self.state), _ANCHOR_STRIDE)

    def clip(self, frame: int) -> npt.NDArray[np.uint8]:
        """Return the five canvases at offsets 0, H/4, H/2, 3H/4, H, (5, h, w, 3)."""
        return self.canvases[[self.canvas_idx(frame + i * _QUARTER) for i in range(5)]]


def example_layout() -> Layout:
    """Return the layout of the example's policy."""
    return find_layout(str(Path(__file__).with_name("layout.json")))


def read_episodes(roots: Sequence[Path]) -> list[Episode]:
    """Read every episode of the datasets.

    Raises:
        SpecError: a dataset is damaged.
    """
    layout = example_layout()
    episodes: list[Episode] = []
    for root in roots:
        with LeRobotDataset.open(root) as dataset:
            episodes += [read_episode(dataset, i, layout) for i in range(dataset.n_episodes)]
    return episodes


def read_episode(dataset: LeRobotDataset, idx: int, layout: Layout) -> Episode:
    """Read one episode and compose its canvases.

    Raises:
        SpecError: the episode is not there or damaged.
    """
    n = dataset.episode(idx).n_frames
    frames = sorted({*range(0, n, CANVAS_STRIDE), n - 1})
    size = (len(frames), layout.canvas.height_px, layout.canvas.width_px, 3)
    canvases = np.zeros(size, np.uint8)
    for view in layout.canvas.views:
        rows = slice(view.y_px, view.y_px + view.height_px)
        columns = slice(view.x_px, view.x_px + view.width_px)
        for canvas, frame in zip(canvases, frames, strict=True):
            canvas[rows, columns] = fit_view(dataset.image(idx, frame, view.camera), view)
    data = dataset.data(idx)
    return Episode(
        canvases=canvases,
        state=data.state,
        action=data.action,
        task=dataset.sample(idx, 0).task,
    )


@dataclass(frozen=True, kw_only=True)
class Windows:
    """Every training window, normalised and padded as the deployed policy does it.

    Attributes:
        state: (n, 1, A).
        actions: (n, H, A).
        episode: which episode, (n,).
        frame: which frame, (n,).
        task: which instruction, (n,).
    """

    state: Float32Array
    actions: Float32Array
    episode: npt.NDArray[np.int64]
    frame: npt.NDArray[np.int64]
    task: npt.NDArray[np.int64]


def read_limits(path: Path, key: str, n: int) -> tuple[Float32Array, Float32Array]:
    """Return q01 and the span to q99 of ``key`` in norm_stats.json, (n,) each."""
    stats = json.loads(path.read_text())["norm_stats"][key]
    q01 = np.array(stats["q01"][:n])
    return q01, np.maximum(np.array(stats["q99"][:n]) - q01, 1e-8)


def make_windows(
    episodes: Sequence[Episode], tasks: Sequence[str], stats: Path, width: int
) -> Windows:
    """Cut windows: H rows clamped inside the episode, deltas against the window's state.

    Args:
        episodes: demonstrations.
        tasks: instructions, in the order of their numbers.
        stats: norm_stats.json.
        width: padded width A.
    """
    layout = example_layout()
    D, H = len(layout.channels), layout.n_rows
    delta = np.array([c.kind == "delta" for c in layout.channels], np.float32)
    state_low, state_span = read_limits(stats, "observation.state", D)
    action_low, action_span = read_limits(stats, "action", D)
    where = [(e, f) for e, episode in enumerate(episodes) for f in episode.anchors()]
    state = np.zeros((len(where), 1, width), np.float32)
    actions = np.zeros((len(where), H, width), np.float32)
    for i, (e, f) in enumerate(where):
        episode = episodes[e]
        rows = np.minimum(np.arange(f, f + H), len(episode.action) - 1)
        relative = episode.action[rows] - delta * episode.state[f]
        state[i, 0, :D] = 2.0 * (episode.state[f] - state_low) / state_span - 1.0
        actions[i, :, :D] = 2.0 * (relative - action_low) / action_span - 1.0
    return Windows(
        state=state,
        actions=actions,
        episode=np.array([e for e, _ in where]),
        frame=np.array([f for _, f in where]),
        task=np.array([tasks.index(episodes[e].task) for e, _ in where]),
    )
