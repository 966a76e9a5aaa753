"""The chunks of a report, one by one: what profile and bench both write, and compare reads."""

from __future__ import annotations

from typing import Literal

import msgspec

Phase = Literal["cold", "warm", "steady"]

# One chunk from the capture of its oldest frame to the first command of it, in order and without
# gaps: the sum is "frame to command".
#
# A camera that pushes says when a frame was received, so its "transport" and the "frame wait" of
# the loop are told apart. One that is asked has the frame when it is asked and not before: its
# "frame age" is both, and nobody is blamed for it.
SEGMENTS = (
    "frame age",
    "transport",
    "frame wait",
    "observe",
    "unaccounted",
    "preprocess",
    "guide",
    "vision",
    "prefill",
    "denoise",
    "postprocess",
    "publish",
    "adopt",
    "tick",
    "send",
)
GROUPS = {
    "frame age": "undivided",
    "transport": "camera",
    "frame wait": "phase",
    "observe": "camera",
    "unaccounted": "unaccounted",
    "preprocess": "engine",
    "guide": "engine",
    "vision": "engine",
    "prefill": "engine",
    "denoise": "engine",
    "postprocess": "engine",
    "publish": "loop",
    "adopt": "loop",
    "tick": "loop",
    "send": "bus",
}
# From the complete observation to the prediction; their sum is "predict".
PREDICTION = (
    "unaccounted",
    "preprocess",
    "guide",
    "vision",
    "prefill",
    "denoise",
    "postprocess",
)


class Chunks(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The chunks themselves, one column each; ms, None where it does not apply.

    Attributes:
        t_s: start of the chunk since the first stamp.
        phase: of each.
        run: which repetition, from 0.
        segments_ms: by name of the segment.
        steps_ms: every denoising step of every chunk.
        cpu_ms: processor time of the policy's process for the prediction, all its threads.
        frame_to_chunk_ms: capture to published.
        frame_to_command_ms: capture to the first command of the chunk.
        interval_ms: from the adoption of the chunk before.
        slack_ms: what was left of the plan before, when this one took over.
        n_decimated: chunks left out of these columns, never out of percentiles.
        extreme_rows: rows that are here only for being slow, where others were left out; a
            statistic over the columns must leave them out.
    """

    t_s: list[float]
    phase: list[Phase]
    run: list[int]
    segments_ms: dict[str, list[float | None]]
    steps_ms: list[list[float]]
    cpu_ms: list[float | None]
    frame_to_chunk_ms: list[float | None]
    frame_to_command_ms: list[float | None]
    interval_ms: list[float | None]
    slack_ms: list[float | None]
    n_decimated: int = 0
    extreme_rows: tuple[int, ...] = ()
