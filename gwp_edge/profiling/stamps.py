"""What the policy process notes about every chunk, on the one clock of the machine.

One binary record per chunk in a ring of the board, written after the chunk was published, so that
noting it delays no command. Adoption and first command come from the motor's tick log.
"""

from __future__ import annotations

from typing import Final, get_args

import numpy as np

from gwp_edge.telemetry import StageTimes
from gwp_edge.types import ClockDomain, Observation

MAX_STEPS: Final = 64
MAX_CAMERAS: Final = 8
_DOMAINS: Final[tuple[ClockDomain, ...]] = get_args(ClockDomain)

# Stages of one prediction end at ``t_predicted_ns`` and follow each other without gaps, so their
# moments need no stamps of their own. ``chunk_idx`` is negative for the calls of the preflight:
# -1 the first. What exceeds MAX_STEPS is summed in ``denoise_rest_ns``. ``cpu_ns`` is 0 where it
# was not taken, ``t_looked_ns`` where no look at the cameras was in vain.
STAMP_DTYPE: Final = np.dtype(
    [
        ("chunk_idx", np.int64),
        ("n_cameras", np.int64),
        ("n_steps", np.int64),
        ("n_frozen_rows", np.int64),
        ("t_observed_ns", np.int64),
        ("t_state_ns", np.int64),
        ("t_started_ns", np.int64),
        ("t_built_ns", np.int64),
        ("t_predicted_ns", np.int64),
        ("t_published_ns", np.int64),
        ("preprocess_ns", np.int64),
        ("guide_ns", np.int64),
        ("vision_ns", np.int64),
        ("prefill_ns", np.int64),
        ("postprocess_ns", np.int64),
        ("denoise_rest_ns", np.int64),
        ("denoise_ns", np.int64, (MAX_STEPS,)),
        ("t_captured_ns", np.int64, (MAX_CAMERAS,)),
        ("t_received_ns", np.int64, (MAX_CAMERAS,)),
        ("frame_idx", np.int64, (MAX_CAMERAS,)),
        # Index into the values of ``ClockDomain``: whose clock told the time of capture.
        ("domain", np.int64, (MAX_CAMERAS,)),
        # Processor time of the process from ``t_built_ns`` to ``t_predicted_ns``, all threads.
        ("cpu_ns", np.int64),
        # 1 where the stages were timed on the device, which ran the chunk as one call.
        ("device_timed", np.int64),
        # The last look before this chunk that would have begun a plan, and found no newer frames;
        # and what each camera's newest frame was then.
        ("t_looked_ns", np.int64),
        ("looked_idx", np.int64, (MAX_CAMERAS,)),
    ]
)


def stamp_record(
    chunk_idx: int,
    observation: Observation | None,
    timing: StageTimes,
    *,
    t_started_ns: int,
    t_built_ns: int,
    t_predicted_ns: int,
    t_published_ns: int,
    n_frozen_rows: int = 0,
    cpu_ns: int = 0,
    t_looked_ns: int = 0,
    looked_idx: tuple[int, ...] = (),
) -> tuple[object, ...]:
    """Return one record of ``STAMP_DTYPE``, fields in order.

    Args:
        chunk_idx: of the chunk; negative for a call of the preflight.
        observation: what it was predicted from; None for an input from a file.
        timing: stage times of the prediction.
        t_started_ns: the loop turned to the cameras.
        t_built_ns: the observation was complete.
        t_predicted_ns: the prediction was there.
        t_published_ns: the chunk was handed over.
        n_frozen_rows: rows that guidance kept.
        cpu_ns: processor time of the process for the prediction.
        t_looked_ns: the last look that found no newer frames, 0 for none.
        looked_idx: number of each camera's newest frame at that look.
    """
    frames = () if observation is None else observation.frames[:MAX_CAMERAS]
    looked = looked_idx[:MAX_CAMERAS]
    no_frames = (0,) * (MAX_CAMERAS - len(frames))
    steps = timing.denoise_ns[:MAX_STEPS]
    return (
        chunk_idx,
        len(frames),
        len(timing.denoise_ns),
        n_frozen_rows,
        t_built_ns if observation is None else observation.t_observed_ns,
        t_built_ns if observation is None else observation.t_state_ns,
        t_started_ns,
        t_built_ns,
        t_predicted_ns,
        t_published_ns,
        timing.preprocess_ns,
        timing.guide_ns,
        timing.vision_ns,
        timing.prefill_ns,
        timing.postprocess_ns,
        sum(timing.denoise_ns[MAX_STEPS:]),
        steps + (0,) * (MAX_STEPS - len(steps)),
        tuple(f.t_captured_ns for f in frames) + no_frames,
        tuple(f.t_received_ns for f in frames) + no_frames,
        tuple(f.frame_idx for f in frames) + no_frames,
        tuple(_DOMAINS.index(f.domain) for f in frames) + no_frames,
        cpu_ns,
        int(timing.device_timed),
        t_looked_ns,
        looked + (0,) * (MAX_CAMERAS - len(looked)),
    )
