"""From pictures and joint angles to what the network sees; defined to the bit by the spec."""

from __future__ import annotations

import numpy as np
from PIL import Image

from gwp_edge.errors import SpecError
from gwp_edge.spec import CameraView, CanvasSpec, PolicySpec
from gwp_edge.types import Float32Array, FloatArray, ImageArray, Observation

# Statistics of a constant channel would divide by zero; training uses the same floor.
MIN_SPAN = 1e-8


def fit_view(image: ImageArray, view: CameraView) -> ImageArray:
    """Scale a picture to cover a view, then cut its centre; uint8 RGB (height_px, width_px, 3).

    Source: open-gigaai/giga-world-policy at f3d5a88 (Pillow BILINEAR on uint8, Python round).
    """
    height, width = image.shape[:2]
    scale = max(view.width_px / width, view.height_px / height)
    size = (
        max(view.width_px, round(width * scale)),
        max(view.height_px, round(height * scale)),
    )
    picture = Image.fromarray(image)
    if size != (width, height):
        picture = picture.resize(size, Image.Resampling.BILINEAR)
    left = (size[0] - view.width_px) // 2
    top = (size[1] - view.height_px) // 2
    box = (left, top, left + view.width_px, top + view.height_px)
    return np.asarray(picture.crop(box))


def compose_canvas(observation: Observation, canvas: CanvasSpec) -> ImageArray:
    """Paste every camera's view on the canvas; uint8 RGB (height_px, width_px, 3).

    Raises:
        SpecError: the observation lacks a camera of the canvas.
    """
    result = np.zeros((canvas.height_px, canvas.width_px, 3), dtype=np.uint8)
    for view in canvas.views:
        rows = slice(view.y_px, view.y_px + view.height_px)
        columns = slice(view.x_px, view.x_px + view.width_px)
        result[rows, columns] = fit_view(observation.frame(view.camera).image, view)
    return result


def _span(low: tuple[float, ...], high: tuple[float, ...]) -> tuple[FloatArray, FloatArray]:
    q01 = np.asarray(low)
    return q01, np.maximum(np.asarray(high) - q01, MIN_SPAN)


def normalise_state(state: FloatArray, spec: PolicySpec) -> Float32Array:
    """Return the state as the network sees it: q01..q99 to -1..1, then zeros up to A; (1, A).

    No clamp: a state outside the statistics must show.

    Raises:
        SpecError: the state has the wrong length or is not finite.
    """
    state = np.asarray(state, dtype=np.float64)
    if state.shape != (spec.n_channels,):
        raise SpecError(f"state: expected {spec.n_channels} values, got shape {state.shape}")
    if not np.isfinite(state).all():
        bad = [c.name for c, ok in zip(spec.channels, np.isfinite(state), strict=True) if not ok]
        raise SpecError(f"state is not finite: {', '.join(bad)}")
    q01, span = _span(spec.statistics.state_q01, spec.statistics.state_q99)
    result = np.zeros((1, spec.network.n_action_channels), dtype=np.float32)
    result[0, : spec.n_channels] = 2 * (state - q01) / span - 1
    return result


def actions_from_network(x: Float32Array, state: FloatArray, spec: PolicySpec) -> FloatArray:
    """Return absolute actions (H, D), rad and m, from network output (H, A).

    Delta channels are relative to the state at observation time, the same for every row.
    """
    q01, span = _span(spec.statistics.action_q01, spec.statistics.action_q99)
    actions = (np.asarray(x[:, : spec.n_channels], dtype=np.float64) + 1) / 2 * span + q01
    return actions + spec.delta_mask * np.asarray(state, dtype=np.float64)


def actions_to_network(actions: FloatArray, state: FloatArray, spec: PolicySpec) -> Float32Array:
    """Return absolute actions (H, D) as the network expresses them from ``state``; (H, A)."""
    q01, span = _span(spec.statistics.action_q01, spec.statistics.action_q99)
    relative = np.asarray(actions, dtype=np.float64) - spec.delta_mask * np.asarray(state)
    result = np.zeros((len(relative), spec.network.n_action_channels), dtype=np.float32)
    result[:, : spec.n_channels] = 2 * (relative - q01) / span - 1
    return result
