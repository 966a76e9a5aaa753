"""What a policy is pulled towards: the rows that the old plan has, and none beyond its end."""

from contextlib import closing

import numpy as np
import pytest

from gwp_edge.chunking import Guidance
from gwp_edge.policy import load
from gwp_edge.types import Chunk, Frame, Observation

pytestmark = pytest.mark.export

T_NS = 10**12


def look(spec):
    image = np.zeros((48, 64, 3), np.uint8)
    frames = tuple(
        Frame(camera=c, image=image, t_captured_ns=T_NS, t_received_ns=T_NS, frame_idx=0)
        for c in spec.cameras
    )
    return Observation(frames=frames, state=np.zeros(spec.n_channels), t_state_ns=T_NS)


@pytest.mark.parametrize("method", ["hard", "soft", "identity"])
def test_rows_beyond_the_end_of_the_old_plan_are_free(exported, method):
    """With many frozen rows a plan was once pinned to the old one's last row, held for ever."""
    with closing(load(exported("gwp05"), check_golden=False)) as policy:
        spec, n_real = policy.spec, 5
        previous = Chunk(
            actions=np.full((spec.n_rows, spec.n_channels), 0.1),
            t_observed_ns=T_NS - (spec.n_rows - n_real) * spec.period_ns,
            period_ns=spec.period_ns,
            chunk_idx=0,
        )
        given = []
        engine_pass = policy._pass

        def note(engine, what):
            given.append(what)
            return engine_pass(engine, what)

        policy._pass = note
        guidance = Guidance(method=method, n_frozen_rows=20)
        policy.predict(look(spec), previous=previous, guidance=guidance)
    gain = given[0].prefix_gain[:, :, 0]
    assert (gain[:, n_real:] == 0.0).all()
    assert (gain[:, :n_real] > 0.0).all()
