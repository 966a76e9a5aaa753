"""What every engine must do, whatever runs it. A test module gives the fixture ``engine``.

``engine`` is a function: bundle, options -> Engine. ``bundle`` is a bundle of a reference
checkpoint. Tolerances of all engines stand in one table.
"""

from __future__ import annotations

import numpy as np
import pytest

from gwp_edge.chunking import Guidance, warm_start_step
from gwp_edge.errors import DeviceError, SpecError
from gwp_edge.policy import BundlePolicy
from gwp_edge.protocols import ChunkEngine
from gwp_edge.types import Frame, Observation

# Largest distance between two engines on one bundle, of normalised values, by engine and
# precision. float32 differs by the order of sums; 16 bits by where they are rounded; quantized
# products by codes that flip at a boundary. TensorRT's are set by reason, not yet by measurement.
TOLERANCE = {
    ("ort", "fp32"): 2e-4,
    ("ort", "fp16"): 2e-2,
    ("ort", "bf16"): 8e-2,
    ("trt", "fp32"): 5e-4,
    ("trt", "fp16"): 2e-2,
    ("trt", "bf16"): 8e-2,
    ("trt", "int8"): 1e-1,
    ("trt", "fp8"): 1e-1,
    ("trt", "w4"): 1e-1,
}


def inputs(spec, seed=0):
    """Return canvas, state (1, A), x (H, A), no prefix (H, A) and no gain (H, 1)."""
    rng = np.random.default_rng(seed)
    A, H = spec.network.n_action_channels, spec.n_rows
    shape = (spec.canvas.height_px, spec.canvas.width_px, 3)
    canvas = rng.integers(0, 256, shape, dtype=np.uint8)
    state = rng.uniform(-1, 1, (1, A)).astype(np.float32)
    x = rng.standard_normal((H, A), dtype=np.float32)
    return canvas, state, x, np.zeros((H, A), np.float32), np.zeros((H, 1), np.float32)


def observation(spec, seed=0):
    """Return a random picture of every camera at one time, and a state inside the limits."""
    rng = np.random.default_rng(seed)
    frames = tuple(
        Frame(
            camera=view.camera,
            image=rng.integers(0, 256, (48, 64, 3), dtype=np.uint8),
            t_captured_ns=1 + seed,
            t_received_ns=1 + seed,
            frame_idx=0,
        )
        for view in spec.canvas.views
    )
    return Observation(
        frames=frames, state=rng.uniform(-0.1, 0.1, spec.n_channels), t_state_ns=1 + seed
    )


def run_steps(engine, spec, seed=0, n_steps=None):
    canvas, state, x, prefix, gain = inputs(spec, seed)
    engine.prefill(engine.vision(canvas), state)
    for step_idx in range(n_steps or spec.sampler.n_steps):
        x = engine.denoise(x, step_idx, prefix, gain)
    return x


class EngineSuite:
    """The cases; a subclass in a test module runs them."""

    def test_engine_golden_output_is_reproduced(self, bundle, engine):
        policy = BundlePolicy(bundle, engine(bundle))
        try:
            policy.check_golden()
        finally:
            policy.close()

    def test_engine_other_noise_is_not_the_golden_output(self, bundle, engine):
        """A check that any answer passes would prove nothing."""
        arrays = bundle.arrays(bundle.manifest.golden.file)
        policy = BundlePolicy(bundle, engine(bundle))
        try:
            noise = np.random.default_rng(1).standard_normal(arrays["noise"].shape)
            _, actions = policy.predict_from_canvas(
                arrays["canvas"], np.asarray(arrays["state"], float), noise.astype(np.float32)
            )
        finally:
            policy.close()
        assert np.abs(actions - arrays["actions"]).max() > 2 * bundle.manifest.golden.tolerance

    def test_engine_same_input_twice_answers_the_same(self, bundle, engine):
        running = engine(bundle)
        running.set_prompt(bundle.spec.tasks[0])
        first, second = (run_steps(running, bundle.spec, n_steps=2) for _ in range(2))
        running.close()
        np.testing.assert_array_equal(first, second)

    def test_engine_answers_are_copies_of_their_own(self, bundle, engine):
        """The next call must not change what an earlier one returned."""
        running = engine(bundle)
        running.set_prompt(bundle.spec.tasks[0])
        canvas, _, _, _, _ = inputs(bundle.spec)
        latent = running.vision(canvas)
        kept = latent.copy()
        running.vision(255 - canvas)
        np.testing.assert_array_equal(latent, kept)
        running.close()

    def test_engine_prefix_stays_between_steps_and_follows_the_picture(self, bundle, engine):
        running = engine(bundle)
        running.set_prompt(bundle.spec.tasks[0])
        canvas, state, x, prefix, gain = inputs(bundle.spec)
        answers = []
        for picture in (canvas, 255 - canvas, canvas):
            running.prefill(running.vision(picture), state)
            answers.append(running.denoise(x, 0, prefix, gain))
        running.close()
        np.testing.assert_array_equal(answers[0], answers[2])
        assert np.abs(answers[0] - answers[1]).max() > 1e-6

    def test_engine_every_step_uses_its_own_time(self, bundle, engine):
        running = engine(bundle)
        running.set_prompt(bundle.spec.tasks[0])
        canvas, state, x, prefix, gain = inputs(bundle.spec)
        running.prefill(running.vision(canvas), state)
        answers = [running.denoise(x, i, prefix, gain) for i in range(bundle.spec.sampler.n_steps)]
        running.close()
        assert len({a.tobytes() for a in answers}) == len(answers)

    def test_engine_full_gain_pins_the_clean_actions_to_the_prefix(self, bundle, engine):
        running = engine(bundle)
        running.set_prompt(bundle.spec.tasks[0])
        spec = bundle.spec
        canvas, state, x, _, gain = inputs(spec)
        prefix = np.full_like(x, 0.25)
        running.prefill(running.vision(canvas), state)
        last = spec.sampler.n_steps - 1
        sigma = np.float32(spec.sampler.sigmas[last])
        pinned = running.denoise(x, last, prefix, np.full_like(gain, 1 / sigma))
        free = running.denoise(x, last, prefix, gain)
        running.close()
        np.testing.assert_allclose(pinned, prefix, atol=2e-3)
        assert np.abs(free - prefix).max() > 0.05

    def test_engine_gain_acts_row_by_row(self, bundle, engine):
        running = engine(bundle)
        running.set_prompt(bundle.spec.tasks[0])
        canvas, state, x, prefix, gain = inputs(bundle.spec)
        running.prefill(running.vision(canvas), state)
        half = gain.copy()
        half[: len(half) // 2] = 1.0
        free, guided = (running.denoise(x, 0, prefix, g) for g in (gain, half))
        running.close()
        moved = np.abs(free - guided).max(axis=1) > 1e-6
        assert moved[: len(half) // 2].all()
        assert not moved[len(half) // 2 :].any()

    @pytest.mark.parametrize("call", ["shape", "dtype", "step", "gain"])
    def test_engine_wrong_input_is_refused_with_its_name(self, bundle, engine, call):
        running = engine(bundle)
        running.set_prompt(bundle.spec.tasks[0])
        canvas, _, x, prefix, gain = inputs(bundle.spec)
        try:
            if call == "shape":
                with pytest.raises(SpecError, match="canvas: expected uint8"):
                    running.vision(canvas[1:])
            elif call == "dtype":
                with pytest.raises(SpecError, match="canvas: expected uint8"):
                    running.vision(canvas.astype(np.float32))
            elif call == "step":
                with pytest.raises(SpecError, match="step 99 is not in"):
                    running.denoise(x, 99, prefix, gain)
            else:
                with pytest.raises(SpecError, match="prefix_gain: expected"):
                    running.denoise(x, 0, prefix, gain[1:])
        finally:
            running.close()

    def test_engine_without_prompt_refuses_and_names_it(self, bundle, engine):
        running = engine(bundle)
        canvas, state, _, _, _ = inputs(bundle.spec)
        latent = running.vision(canvas)
        with pytest.raises(SpecError, match="no prompt is set"):
            running.prefill(latent, state)
        with pytest.raises(SpecError, match="'dance' is not in this bundle"):
            running.set_prompt("dance")
        running.close()

    def test_engine_close_twice_is_safe(self, bundle, engine):
        running = engine(bundle)
        running.close()
        running.close()

    def test_engine_agrees_with_the_reference_engine(self, bundle, engine, engine_name):
        """Against ONNX Runtime on the CPU, which stands in for the original."""
        from gwp_edge.engines.ort import OrtEngine

        answers = []
        for make in (OrtEngine, engine):
            running = make(bundle)
            running.set_prompt(bundle.spec.tasks[0])
            answers.append(run_steps(running, bundle.spec))
            running.close()
        tolerance = TOLERANCE[engine_name, bundle.manifest.precision.name]
        np.testing.assert_allclose(answers[0], answers[1], atol=tolerance)


class ChunkSuite:
    """Cases for engines that run a chunk at once; the stages are the reference."""

    def chunk(self, running, spec, seed=0, first_step=0, gain_value=0.0):
        canvas, state, x, prefix, gain = inputs(spec, seed)
        gains = np.full((spec.sampler.n_steps, *gain.shape), gain_value, np.float32)
        return running.chunk(canvas, state, x, prefix, gains, first_step=first_step)[0]

    def test_chunk_engine_is_known_by_its_protocol(self, bundle, engine):
        running = engine(bundle)
        assert isinstance(running, ChunkEngine)
        assert running.chunk_laps_ns == ()
        running.close()

    def test_chunk_gives_the_latent_of_its_picture(self, bundle, engine):
        running = engine(bundle)
        running.set_prompt(bundle.spec.tasks[0])
        canvas, state, x, prefix, gain = inputs(bundle.spec)
        gains = np.zeros((bundle.spec.sampler.n_steps, *gain.shape), np.float32)
        for picture in (canvas, 255 - canvas, canvas):
            _, latent = running.chunk(picture, state, x, prefix, gains)
            np.testing.assert_array_equal(latent, running.vision(picture))
        running.close()

    @pytest.mark.parametrize("warm_start_sigma", [1.0, 0.5])
    def test_policy_takes_whole_chunks_and_answers_as_by_stages(
        self, bundle, engine, warm_start_sigma
    ):
        """Free, guided and again: what the run loop does; its latent and times come along."""
        spec, running = bundle.spec, engine(bundle)
        guidance = Guidance(method="soft", warm_start_sigma=warm_start_sigma)
        first = warm_start_step(guidance, np.asarray(spec.sampler.sigmas))
        noise = inputs(spec)[2]
        answers = []
        for whole in (False, True):
            policy = BundlePolicy(bundle, running, whole=whole)
            free = policy.predict(observation(spec, seed=0), noise=noise)
            guided = policy.predict(
                observation(spec, seed=1), noise=noise, previous=free, guidance=guidance
            )
            assert len(policy.timing.denoise_ns) == spec.sampler.n_steps - first
            assert policy.timing.total_ns > 0
            answers.append((free.actions, guided.actions, policy.trace.latent))
        assert len(running.chunk_laps_ns) == 2 + spec.sampler.n_steps - first
        running.close()
        for by_stages, at_once in zip(*answers, strict=True):
            np.testing.assert_array_equal(by_stages, at_once)
        assert np.abs(answers[0][0] - answers[0][1]).max() > 1e-4

    def test_chunk_equals_the_stages_first_and_replayed(self, bundle, engine):
        running = engine(bundle)
        running.set_prompt(bundle.spec.tasks[0])
        wanted = [run_steps(running, bundle.spec, seed) for seed in (0, 1, 0)]
        got = [self.chunk(running, bundle.spec, seed) for seed in (0, 1, 0)]
        running.close()
        for a, b in zip(wanted, got, strict=True):
            np.testing.assert_array_equal(a, b)
        assert np.abs(got[0] - got[1]).max() > 1e-3

    def test_chunk_follows_the_gain_of_each_call(self, bundle, engine):
        running = engine(bundle)
        running.set_prompt(bundle.spec.tasks[0])
        free, held, again = (
            self.chunk(running, bundle.spec, gain_value=g) for g in (0.0, 1.0, 0.0)
        )
        running.close()
        assert np.abs(held).mean() < np.abs(free).mean()
        np.testing.assert_array_equal(free, again)

    def test_chunk_warm_start_takes_only_the_last_steps(self, bundle, engine):
        running = engine(bundle)
        running.set_prompt(bundle.spec.tasks[0])
        spec = bundle.spec
        first = spec.sampler.n_steps - 2
        canvas, state, x, prefix, gain = inputs(spec)
        running.prefill(running.vision(canvas), state)
        wanted = x
        for step_idx in range(first, spec.sampler.n_steps):
            wanted = running.denoise(wanted, step_idx, prefix, gain)
        for _ in range(2):
            got = self.chunk(running, spec, first_step=first)
            np.testing.assert_array_equal(wanted, got)
            assert len(running.chunk_laps_ns) == 4
        running.close()

    def test_chunk_wrong_gain_or_step_is_refused(self, bundle, engine):
        running = engine(bundle)
        running.set_prompt(bundle.spec.tasks[0])
        canvas, state, x, prefix, gain = inputs(bundle.spec)
        with pytest.raises(SpecError, match="prefix_gain"):
            running.chunk(canvas, state, x, prefix, gain)
        with pytest.raises(SpecError, match="step 99"):
            self.chunk(running, bundle.spec, first_step=99)
        running.close()
        with pytest.raises(DeviceError, match="closed"):
            self.chunk(running, bundle.spec)
