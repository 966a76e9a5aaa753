"""The clock: absolute deadlines, no promise about how late."""

import os
import signal
import threading
import time

from gwp_edge.clock import MonotonicClock
from gwp_edge.testing import FakeClock


def test_sleep_never_ends_early():
    clock = MonotonicClock()
    for duration_ns in (0, 1, 50_000, 3_000_000):
        t_ns = time.monotonic_ns() + duration_ns
        clock.sleep_until_ns(t_ns)
        assert time.monotonic_ns() >= t_ns


def test_sleep_until_the_past_returns():
    MonotonicClock().sleep_until_ns(time.monotonic_ns() - 10**12)


def test_sleep_goes_on_after_a_signal():
    """clock_nanosleep returns early with EINTR; a tick must not come early for that."""
    clock, seen = MonotonicClock(), []
    before = signal.signal(signal.SIGUSR2, lambda *_: seen.append(1))
    timer = threading.Timer(0.02, os.kill, [os.getpid(), signal.SIGUSR2])
    try:
        timer.start()
        t_ns = time.monotonic_ns() + 150_000_000
        clock.sleep_until_ns(t_ns)
        assert time.monotonic_ns() >= t_ns
    finally:
        timer.join()
        signal.signal(signal.SIGUSR2, before)
    assert seen


def test_sleep_without_libc_is_kept_with_time_sleep(monkeypatch):
    clock = MonotonicClock()
    monkeypatch.setattr(clock, "_sleep", None)
    t_ns = time.monotonic_ns() + 2_000_000
    clock.sleep_until_ns(t_ns)
    assert time.monotonic_ns() >= t_ns


def test_fake_clock_moves_only_when_told():
    clock = FakeClock(100)
    clock.sleep_until_ns(50)
    assert clock.now_ns() == 100
    clock.sleep_until_ns(150)
    clock.advance(5)
    assert clock.now_ns() == 155
