"""Capture times of a camera on the monotonic clock, whatever clock the camera stamps with."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from typing import Final, Literal

from gwp_edge.types import ClockDomain

StampClock = Literal["wall", "device"]

_MEASURE_EVERY_NS: Final = 1_000_000_000
_N_READINGS: Final = 5
# A picture is on the host within a second, and not before it was taken (clocks wobble a little).
_OLDEST_NS: Final = 1_000_000_000
_EARLY_NS: Final = 5_000_000
_N_DELAYS: Final = 150
# So many pictures in a row that look too old are not late ones out of a queue: their clock is off.
_N_OLD: Final = 30


class CameraClock:
    """Maps stamps to CLOCK_MONOTONIC. Threads: one owner.

    Wall-clock stamps are moved by one offset, measured again every second, because NTP slews the
    wall clock and never the monotonic one. Device stamps have an unknown origin and drift: the
    least delay seen among the last 150 frames ties them to the host, so that jitter of the
    transport vanishes while its constant part stays in.

    Attributes:
        n_implausible: stamps that lay in the future, or more than a second back for the 30th time
            in a row, even with a fresh offset; the time of arrival was taken for them.
    """

    def __init__(
        self,
        wall_ns: Callable[[], int] = time.time_ns,
        monotonic_ns: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        self._wall_ns = wall_ns
        self._monotonic_ns = monotonic_ns
        self._offset_ns = 0
        self._t_measured_ns: int | None = None
        self._delays_ns: deque[int] = deque(maxlen=_N_DELAYS)
        self._last_stamp_ns = 0
        self._n_old = 0
        self.n_implausible = 0

    def capture_time_ns(
        self, stamp_ns: int, clock: StampClock, t_received_ns: int, domain: ClockDomain
    ) -> tuple[int, ClockDomain]:
        """Return the capture time on the monotonic clock, and where it comes from.

        Args:
            stamp_ns: the camera's stamp.
            clock: which clock it is of.
            t_received_ns: arrival on the monotonic clock; the result is never later.
            domain: what a plausible stamp is labelled with.
        """
        if clock == "device":
            return self._from_device(stamp_ns, t_received_ns), domain
        due = self._t_measured_ns is None or (
            t_received_ns - self._t_measured_ns > _MEASURE_EVERY_NS
        )
        if due:
            self._measure()
        t_ns = stamp_ns - self._offset_ns
        if not _is_plausible(t_ns, t_received_ns) and not due:
            # The wall clock may have been set since; then the old offset is wrong, not the stamp.
            self._measure()
            t_ns = stamp_ns - self._offset_ns
        is_late = self._is_late(t_ns, t_received_ns)
        if not _is_plausible(t_ns, t_received_ns) and not is_late:
            self.n_implausible += 1
            return t_received_ns, "host"
        return min(t_ns, t_received_ns), domain

    def _is_late(self, t_ns: int, t_received_ns: int) -> bool:
        """Whether a picture is really old, as those are that wait while a reader hangs.

        To take one for fresh would let the policy act on the past.
        """
        is_old = t_received_ns - t_ns > _OLDEST_NS
        self._n_old = self._n_old + 1 if is_old else 0
        return 0 < self._n_old < _N_OLD

    def _from_device(self, stamp_ns: int, t_received_ns: int) -> int:
        delay_ns = t_received_ns - stamp_ns
        if stamp_ns < self._last_stamp_ns:
            # The device was reset, or its counter wrapped: what was learnt is void.
            self._delays_ns.clear()
        self._last_stamp_ns = stamp_ns
        least_ns = min(self._delays_ns, default=delay_ns)
        if self._is_late(stamp_ns + least_ns, t_received_ns):
            return stamp_ns + least_ns
        if abs(delay_ns - least_ns) > _OLDEST_NS:
            self._delays_ns.clear()  # it was set, ahead or for good
        self._delays_ns.append(delay_ns)
        return stamp_ns + min(self._delays_ns)

    def _measure(self) -> None:
        """Read both clocks a few times; the reading with the least time in between counts."""
        best_ns: int | None = None
        for _ in range(_N_READINGS):
            before_ns = self._monotonic_ns()
            wall_ns = self._wall_ns()
            after_ns = self._monotonic_ns()
            if best_ns is None or after_ns - before_ns < best_ns:
                best_ns = after_ns - before_ns
                self._offset_ns = wall_ns - (before_ns + after_ns) // 2
                self._t_measured_ns = after_ns


def _is_plausible(t_ns: int, t_received_ns: int) -> bool:
    return -_EARLY_NS <= t_received_ns - t_ns <= _OLDEST_NS
