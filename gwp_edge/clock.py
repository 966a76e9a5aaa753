"""The machine's monotonic clock, with a sleep that ends at an absolute time."""

from __future__ import annotations

import ctypes
import errno
import logging
import os
import time
from collections.abc import Callable

logger = logging.getLogger(__name__)

_NS_PER_S = 1_000_000_000
_CLOCK_MONOTONIC = 1
_TIMER_ABSTIME = 1


class _Timespec(ctypes.Structure):
    _fields_ = (("tv_sec", ctypes.c_long), ("tv_nsec", ctypes.c_long))


def _load_clock_nanosleep() -> Callable[..., int] | None:
    try:
        function = ctypes.CDLL(None).clock_nanosleep
    except (OSError, AttributeError):
        return None
    function.argtypes = (
        ctypes.c_int,
        ctypes.c_int,
        ctypes.POINTER(_Timespec),
        ctypes.POINTER(_Timespec),
    )
    function.restype = ctypes.c_int
    return function


class MonotonicClock:
    """CLOCK_MONOTONIC. Threads: one owner (the deadline is written to a field of the object).

    Args:
        spin_ns: stop sleeping so long before a deadline and watch the clock for the rest. The
            kernel wakes a sleeper some tens of microseconds late; this takes them out of the
            lateness for the price of so much processor time at every deadline.
    """

    def __init__(self, *, spin_ns: int = 0) -> None:
        self._spin_ns = spin_ns
        self._sleep = _load_clock_nanosleep()
        self._deadline = _Timespec()
        self._deadline_ref = ctypes.byref(self._deadline)
        if self._sleep is None:
            logger.warning(
                "libc has no clock_nanosleep: deadlines are kept with time.sleep, less precisely"
            )

    def now_ns(self) -> int:
        """Return the time, ns."""
        return time.monotonic_ns()

    def sleep_until_ns(self, t_ns: int) -> None:
        """Sleep until ``t_ns``; return at once when it is past.

        An absolute deadline does not add up oversleep as a relative one does: whatever runs
        between two ticks is paid out of the sleep.

        Raises:
            OSError: the kernel refuses the call, which no valid time does.
        """
        t_wake_ns = t_ns - self._spin_ns
        if t_wake_ns > time.monotonic_ns():
            self._sleep_until_ns(t_wake_ns)
        while time.monotonic_ns() < t_ns:
            pass

    def _sleep_until_ns(self, t_ns: int) -> None:
        if self._sleep is None:
            while (left_ns := t_ns - time.monotonic_ns()) > 0:
                time.sleep(left_ns / _NS_PER_S)
            return
        self._deadline.tv_sec, self._deadline.tv_nsec = divmod(t_ns, _NS_PER_S)
        while True:
            error = self._sleep(_CLOCK_MONOTONIC, _TIMER_ABSTIME, self._deadline_ref, None)
            if error == 0:
                return
            if error != errno.EINTR:
                raise OSError(error, f"clock_nanosleep: {os.strerror(error)}")
