"""The shared memory of one simulated robot: commands in, joint states and configurations out."""

from __future__ import annotations

from enum import IntEnum
from typing import Final

import numpy as np

from gwp_edge.drivers import piper_model, sim_model
from gwp_edge.errors import DeviceError
from gwp_edge.shared_memory import LatestRing, SharedSegment, aligned, unique_name

_N_SLOTS: Final = 4


class SimWord(IntEnum):
    """Single words of the segment; the writer is the process that the comment names."""

    N_ARMS = 0  # parent
    STOP = 1  # parent
    T_START_NS = 2  # physics
    N_STEPS = 3  # physics
    LOST_NS = 4  # physics: time given up because it could not keep pace
    N_DRAWN = 5  # renderer: times that all cameras were drawn
    DRAWING_NS = 6  # renderer: total time that this took


class SimSegment:
    """Shared memory of one simulated robot. Threads: one owner per process.

    Attributes:
        words: by ``SimWord``.
        commands: enabled, position (D,). Writer: the arm's owner.
        states: t_ns, enabled, position (D,), velocity (D,). Writer: physics.
        configurations: t_ns, qpos (nq,). Writer: physics.
    """

    def __init__(self, segment: SharedSegment, n_arms: int) -> None:
        self.name = segment.name
        self._segment = segment
        self.words = segment.buffer[:_WORDS_BYTES].cast("q")
        n_made = self.words[SimWord.N_ARMS]
        if n_made not in (0, n_arms):
            self.words.release()
            raise DeviceError(
                f"shared memory {segment.name}: the sim has {n_made} arms, expected {n_arms}; "
                "start it with the policy's spec"
            )
        start = _WORDS_BYTES
        rings = []
        for dtype in _dtypes(n_arms):
            rings.append(LatestRing(segment.buffer[start:], dtype, _N_SLOTS))
            start += aligned(LatestRing.size_bytes(dtype, _N_SLOTS))
        self.commands, self.states, self.configurations = rings

    @classmethod
    def create(cls, n_arms: int) -> SimSegment:
        """Make the segment of a new world."""
        n_bytes = _WORDS_BYTES + sum(
            aligned(LatestRing.size_bytes(dtype, _N_SLOTS)) for dtype in _dtypes(n_arms)
        )
        segment = cls(SharedSegment.create(unique_name("sim"), n_bytes), n_arms)
        segment.words[SimWord.N_ARMS] = n_arms
        return segment

    @classmethod
    def attach(cls, name: str, n_arms: int) -> SimSegment:
        """Open the segment of a running world.

        Raises:
            DeviceError: it is not there or is of another robot.
        """
        segment = SharedSegment.attach(name)
        try:
            return cls(segment, n_arms)
        except DeviceError:
            segment.close()
            raise

    def close(self) -> None:
        """Unmap; call once."""
        for ring in (self.commands, self.states, self.configurations):
            ring.release()
        self.words.release()
        self._segment.close()

    def unlink(self) -> None:
        """Remove the name; safe to call twice."""
        self._segment.unlink()


_WORDS_BYTES: Final = aligned(8 * len(SimWord))


def _dtypes(n_arms: int) -> tuple[np.dtype[np.void], ...]:
    D = piper_model.N_CHANNELS * n_arms
    channels = ("position", np.float64, (D,))
    return (
        np.dtype([("enabled", np.int64), channels]),
        np.dtype(
            [("t_ns", np.int64), ("enabled", np.int64), channels, ("velocity", np.float64, (D,))]
        ),
        np.dtype([("t_ns", np.int64), ("qpos", np.float64, (sim_model.n_coordinates(n_arms),))]),
    )
