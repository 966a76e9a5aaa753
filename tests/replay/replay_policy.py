"""A small deterministic policy with a trace: every stage depends on the one before."""

import numpy as np

from gwp_edge.chunking import shift_rows
from gwp_edge.policy import PredictTrace
from gwp_edge.preprocess import compose_canvas
from gwp_edge.telemetry import StageTimes
from gwp_edge.types import Chunk


class StagedPolicy:
    def __init__(self, spec, *, gain=0.05, latent_offset=0.0, seed=1):
        self._spec = spec
        self._gain = gain
        self._latent_offset = latent_offset
        self._rng = np.random.default_rng(seed)
        self._trace = None

    @property
    def spec(self):
        return self._spec

    @property
    def timing(self):
        return StageTimes(
            preprocess_ns=0, vision_ns=0, prefill_ns=0, denoise_ns=(1,), postprocess_ns=0
        )

    @property
    def trace(self):
        return self._trace

    def predict(self, observation, *, noise=None, previous=None, guidance=None):
        spec = self._spec
        if noise is None:
            shape = (spec.n_rows, spec.network.n_action_channels)
            noise = self._rng.standard_normal(shape, dtype=np.float32)
        canvas = compose_canvas(observation, spec.canvas)
        latent = np.full(spec.latent_shape, canvas.mean() / 255 + self._latent_offset, np.float32)
        # Rises slowly from the pose, with a trace of noise and picture in it.
        ramp = np.linspace(0.0, self._gain, spec.n_rows)[:, None]
        scale = np.array([1.0 if c.unit == "rad" else 0.05 for c in spec.channels])
        wobble = 1e-3 * noise[:, : spec.n_channels] * ramp + 1e-3 * latent.mean()
        actions = observation.state + (ramp + wobble) * scale
        if previous is not None and guidance is not None:
            rows, _ = shift_rows(previous, observation.t_observed_ns, spec.period_ns, spec.n_rows)
            d = guidance.n_frozen_rows
            actions[:d] = rows[:d]
        self._trace = PredictTrace(canvas=canvas, latent=latent, noise=noise)
        return Chunk(
            actions=actions, t_observed_ns=observation.t_observed_ns, period_ns=spec.period_ns
        )

    def check_golden(self):
        pass

    def close(self):
        pass


def create(**kwargs):
    return StagedPolicy(**kwargs)
