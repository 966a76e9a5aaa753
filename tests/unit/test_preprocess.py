"""Canvas and normalisation, to the bit and back."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from gwp_edge.errors import SpecError
from gwp_edge.preprocess import (
    actions_from_network,
    actions_to_network,
    compose_canvas,
    fit_view,
    normalise_state,
)
from gwp_edge.sampler import make_schedule
from gwp_edge.spec import (
    CameraView,
    CanvasSpec,
    Channel,
    NetworkSpec,
    PolicySpec,
    Statistics,
)
from gwp_edge.types import Frame, Observation


def make_spec(**changes) -> PolicySpec:
    values = {
        "network": NetworkSpec(
            family="gwp-0.5", n_layers=1, n_heads=1, head_dim=8, visual_dim=8, action_dim=8,
            visual_ffn_dim=8, action_ffn_dim=8, n_action_channels=4, n_text_rows=4,
            latent_channels=4, freq_dim=8, text_dim=8, eps=1e-6,
        ),
        "sampler": make_schedule(2),
        "canvas": CanvasSpec(
            width_px=64,
            height_px=64,
            views=(
                CameraView(camera="a", x_px=0, y_px=0, width_px=64, height_px=32),
                CameraView(camera="b", x_px=0, y_px=32, width_px=32, height_px=32),
            ),
        ),
        "channels": (
            Channel(name="joint1", unit="rad", kind="delta"),
            Channel(name="gripper", unit="m", kind="absolute"),
        ),
        "statistics": Statistics(
            state_q01=(-1.0, 0.0), state_q99=(1.0, 0.1),
            action_q01=(-0.5, 0.0), action_q99=(0.5, 0.0),
        ),
        "n_rows": 3,
        "period_ns": 10,
        "tasks": ("t",),
        "embodiment": 0,
    }  # fmt: skip
    return PolicySpec(**{**values, **changes})


def frame(name, image):
    return Frame(camera=name, image=image, t_captured_ns=0, t_received_ns=0, frame_idx=0)


@pytest.mark.parametrize(
    ("w", "h"), [(424, 240), (320, 240), (64, 32), (65, 32), (31, 200), (1, 1)]
)
def test_fit_view_of_any_size_is_a_centred_pillow_resize(w, h):
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (h, w, 3), dtype=np.uint8)
    view = CameraView(camera="a", x_px=0, y_px=0, width_px=64, height_px=32)
    got = fit_view(image, view)
    scale = max(64 / w, 32 / h)
    size = (round(w * scale), round(h * scale))
    whole = np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BILINEAR))
    left, top = (size[0] - 64) // 2, (size[1] - 32) // 2
    np.testing.assert_array_equal(got, whole[top : top + 32, left : left + 64])


def test_compose_canvas_pastes_views_and_leaves_the_rest_black():
    red, green = np.zeros((10, 20, 3), np.uint8), np.zeros((5, 5, 3), np.uint8)
    red[..., 0], green[..., 1] = 200, 100
    observation = Observation(
        frames=(frame("b", green), frame("a", red)), state=[0, 0], t_state_ns=0
    )
    canvas = compose_canvas(observation, make_spec().canvas)
    assert (canvas[:32] == [200, 0, 0]).all()
    assert (canvas[32:, :32] == [0, 100, 0]).all()
    assert (canvas[32:, 32:] == 0).all()


def test_compose_canvas_without_a_camera_names_it():
    image = np.zeros((4, 4, 3), np.uint8)
    observation = Observation(frames=(frame("a", image),), state=[0, 0], t_state_ns=0)
    with pytest.raises(SpecError, match="no camera b; it has a"):
        compose_canvas(observation, make_spec().canvas)


def test_normalise_state_maps_quantiles_and_pads_after():
    got = normalise_state(np.array([1.0, 0.2]), make_spec())
    np.testing.assert_allclose(got, [[1.0, 3.0, 0.0, 0.0]], rtol=1e-6)
    assert got.dtype == np.float32


@pytest.mark.parametrize("state", [[0.0], [0.0, np.nan], [np.inf, 0.0], [0.0, 0.0, 0.0]])
def test_normalise_state_refuses_what_is_no_state(state):
    with pytest.raises(SpecError, match="state"):
        normalise_state(np.array(state), make_spec())


def test_actions_are_deltas_from_one_state_and_absolute_grippers():
    spec, state = make_spec(), np.array([0.3, 0.05])
    x = np.zeros((3, 4), np.float32)
    x[:, 0] = [-1, 0, 1]
    actions = actions_from_network(x, state, spec)
    np.testing.assert_allclose(actions[:, 0], [-0.2, 0.3, 0.8], atol=1e-7)
    # A constant channel keeps its one value whatever the network says.
    np.testing.assert_allclose(actions[:, 1], 0.0, atol=1e-7)


def test_actions_to_network_is_the_inverse():
    statistics = Statistics(
        state_q01=(-1.0, 0.0), state_q99=(1.0, 0.1), action_q01=(-0.5, 0.0), action_q99=(0.7, 0.08)
    )
    spec, state = make_spec(statistics=statistics), np.array([0.3, 0.05])
    x = np.random.default_rng(1).normal(size=(3, 4)).astype(np.float32)
    x[:, 2:] = 0
    back = actions_to_network(actions_from_network(x, state, spec), state, spec)
    np.testing.assert_allclose(back, x, atol=1e-5)
