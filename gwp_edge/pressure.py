"""When an arm that is held presses on something, and where its command goes then."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

import numpy as np

from gwp_edge.spec import Channel
from gwp_edge.types import FloatArray

# Servos sag by a few degrees under load, and lag: that is no obstacle.
PRESSING_RAD: Final = math.radians(5.0)
_STILL_RAD: Final = math.radians(0.5)
_SETTLE_NS: Final = 200_000_000
_PATIENCE: Final = 5


class Pressure:
    """Tells, once per hold, that joints at rest are kept away from a command that stands.

    A command that stays ahead of a blocked joint presses on for good, and the arm leaps when that
    gives way. Only an arm that has come to rest is judged: one that lags gets there by itself, and
    by then a drift of its angles has been seen. Only once: an arm that sags must not be followed
    all the way down, and a push by hand is no reason to move. Grippers hold objects and do not
    count. Threads: one owner, the motor loop's.

    Attributes:
        going: the command goes back to where the arm is.
    """

    def __init__(self, channels: Sequence[Channel], *, period_ns: int) -> None:
        self._allowed = np.array([PRESSING_RAD if c.unit == "rad" else math.inf for c in channels])
        self._n_settle = max(3, _SETTLE_NS // period_ns)
        self._last: FloatArray = np.full(len(channels), np.nan)
        self._n_still = 0
        self.reset()

    def reset(self) -> None:
        """Begin anew, as at the begin of a hold."""
        self._judged = False
        self.going = False

    def check(
        self, command: FloatArray, measured: FloatArray, *, n_standing: int, trusted: bool
    ) -> FloatArray | None:
        """Look at one tick; return where the command is to go, shape (D,), or None.

        Args:
            command: of this tick, (D,), rad and m.
            measured: likewise.
            n_standing: for how many ticks the command has not moved.
            trusted: ``measured`` is of now and not known to be wrong.
        """
        if not trusted:
            self._n_still = 0
        # Written so that NaN counts as motion.
        elif (np.abs(measured - self._last) <= np.minimum(self._allowed, _STILL_RAD)).all():
            self._n_still += 1
        else:
            self._n_still = 0
            self._last = measured
        if self.going and n_standing > 0:
            self.going = False
        if self._judged or n_standing < self._n_settle:
            return None
        if self._n_still < self._n_settle:
            self._judged = n_standing >= _PATIENCE * self._n_settle
            return None
        self._judged = True
        pressed = np.abs(command - measured) > self._allowed
        if not pressed.any():
            return None
        self.going = True
        return np.where(pressed, measured, command)

    def is_relieved(self, command: FloatArray, measured: FloatArray) -> bool:
        """Whether nothing is pressed on, or that was dealt with as far as it is."""
        return self._judged or bool((np.abs(command - measured) <= self._allowed).all())
