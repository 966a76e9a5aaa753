"""Whether the arm follows its commands."""

from __future__ import annotations

import math
from typing import Final

import numpy as np

from gwp_edge.protocols import Arm, CurrentArm
from gwp_edge.types import FloatArray

TRACKING_ERROR_RAD: Final = math.radians(10.0)
TRACKING_TIME_S: Final = 0.2


class TrackingMonitor:
    """Tells when the arm does not follow: a joint away from its command for too long.

    Grippers (channels in metres) do not count: holding an object is not following the command.
    Threads: one owner, the motor loop's.
    """

    def __init__(
        self, arm: Arm, *, error_rad: float = TRACKING_ERROR_RAD, time_s: float = TRACKING_TIME_S
    ) -> None:
        channels = arm.channels
        self._current_arm = arm if isinstance(arm, CurrentArm) else None
        self._names = [c.name for c in channels]
        self._allowed = np.array([error_rad if c.unit == "rad" else math.inf for c in channels])
        self._time_ns = round(time_s * 1e9)
        self._since_ns: int | None = None

    def reset(self) -> None:
        """Begin anew."""
        self._since_ns = None

    def check(self, command: FloatArray, measured: FloatArray, now_ns: int) -> str | None:
        """Return one line when a joint has been off for too long, else None."""
        error = np.abs(command - measured)
        if (error <= self._allowed).all():
            self._since_ns = None
            return None
        if self._since_ns is None:
            self._since_ns = now_ns
        if now_ns - self._since_ns < self._time_ns:
            return None
        i = int(np.argmax(np.where(np.isfinite(self._allowed), error, -1.0)))
        return (
            f"{self._names[i]} does not follow: commanded {command[i]:.3f} rad, measured "
            f"{measured[i]:.3f} rad for {self._time_ns / 1e9:.1f} s; is it blocked or overloaded?"
            f"{self._current(i)}"
        )

    def _current(self, i: int) -> str:
        """Return what tells an obstacle from a joint that does not try, as far as the arm knows."""
        if self._current_arm is None:
            return ""
        current_a = abs(self._current_arm.current_a[i])
        return "" if np.isnan(current_a) else f" (its motor takes {current_a:.1f} A)"
