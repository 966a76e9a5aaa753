"""The bundle answers as the original implementation did."""

from __future__ import annotations

import numpy as np
import pytest

import gwp_edge
from gwp_edge import Frame, Observation
from gwp_edge.bundle import Bundle
from gwp_edge.engines.ort import OrtEngine
from gwp_edge.preprocess import compose_canvas, normalise_state

pytestmark = pytest.mark.export

LATENT_TOLERANCE = 1e-4
VELOCITY_TOLERANCE = 2e-4  # of the reference's own scale
ACTION_TOLERANCE = 2e-4  # rad and m


def observation(arrays) -> Observation:
    frames = tuple(
        Frame(
            camera=name,
            image=arrays[f"observation.{name}"],
            t_captured_ns=0,
            t_received_ns=0,
            frame_idx=0,
        )
        for name in ("cam_high", "cam_left_wrist", "cam_right_wrist")
    )
    return Observation(frames=frames, state=arrays["observation.state"], t_state_ns=0)


def test_canvas_of_reference_observation_is_bit_equal(reference, exported, family):
    spec = Bundle.open(exported(family, timesteps="exact")).spec
    canvas = compose_canvas(observation(reference), spec.canvas)
    np.testing.assert_array_equal(canvas, reference["composite"])


def test_every_stage_in_float32_equals_the_original(reference, exported, family):
    bundle = Bundle.open(exported(family, timesteps="exact"))
    spec = bundle.spec
    np.testing.assert_allclose(spec.sampler.timesteps, reference["timesteps"], rtol=1e-6)
    np.testing.assert_allclose(spec.sampler.sigmas, reference["sigmas"], atol=1e-7)
    engine = OrtEngine(bundle, threads=2)
    engine.set_prompt(spec.tasks[0])
    latent = engine.vision(reference["composite"])
    assert np.abs(latent - reference["latent"][:, :, 0]).max() < LATENT_TOLERANCE
    engine.prefill(latent, normalise_state(reference["observation.state"], spec))
    x = reference["noise"][0]
    no_prefix, no_gain = np.zeros_like(x), np.zeros((spec.n_rows, 1), np.float32)
    scale = np.abs(reference["velocity"]).max()
    for i, expected in enumerate(reference["velocity"][:, 0]):
        x_next = engine.denoise(x, i, no_prefix, no_gain)
        step = np.float32(spec.sampler.sigmas[i + 1]) - np.float32(spec.sampler.sigmas[i])
        velocity = (x_next - x) / step
        assert np.abs(velocity - expected).max() < VELOCITY_TOLERANCE * scale, f"step {i}"
        assert np.abs(x_next - reference["sample"][i, 0]).max() < 1e-4, f"step {i}"
        x = x_next
    engine.close()


def test_three_lines_give_the_original_actions(reference, exported, family):
    policy = gwp_edge.load(exported(family, timesteps="exact"), threads=2)
    chunk = policy.predict(observation(reference), noise=reference["noise"])
    assert np.abs(chunk.actions - reference["action"]).max() < ACTION_TOLERANCE
    other = policy.predict(observation(reference), noise=-reference["noise"])
    assert np.abs(other.actions - reference["action"]).max() > 100 * ACTION_TOLERANCE
    policy.close()


def test_rounded_timesteps_change_the_answer(reference, exported, family):
    """The default serves what was trained; it must not be mistaken for the exact schedule."""
    policy = gwp_edge.load(exported(family), threads=2)
    assert policy.spec.sampler.timesteps[1] == 976.0
    chunk = policy.predict(observation(reference), noise=reference["noise"])
    error = np.abs(chunk.actions - reference["action"]).max()
    assert error > ACTION_TOLERANCE
    policy.close()


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_reduced_precision_error_is_in_the_manifest(reference, exported, family, precision):
    path = exported(family, precision=precision, timesteps="exact")
    policy = gwp_edge.load(path, threads=2)
    recorded = policy.bundle.manifest.error.joints_rad
    chunk = policy.predict(observation(reference), noise=reference["noise"])
    error = np.abs(chunk.actions - reference["action"])[:, policy.spec.delta_mask > 0]
    assert recorded is not None
    assert 1e-5 < recorded.max < 2e-2
    # The recorded error was measured on another input; this one is of its size.
    assert recorded.mean / 5 < error.mean() < recorded.mean * 5
    policy.close()
