"""The clock: absolute deadlines, no promise about how late."""

import os
import signal
import threading
import time

import pytest

from gwp_edge.clock import MonotonicClock
from gwp_edge.testing import FakeClock


@pytest.mark.parametrize("spin_ns", [0, 100_000])
def test_sleep_never_ends_early(spin_ns):
    clock = MonotonicClock(spin_ns=spin_ns)
    for duration_ns in (0, 1, 50_000, 3_000_000):
        t_ns = time.monotonic_ns() + duration_ns
        clock.sleep_until_ns(t_ns)
        assert time.monotonic_ns() >= t_ns


def test_sleep_until_the_past_returns():
    MonotonicClock().sleep_until_ns(time.monotonic_ns() - 10**12)


def test_spinning_wakes_before_the_deadline_and_watches_the_clock(monkeypatch):
    clock, asked = MonotonicClock(spin_ns=400_000), []
    monkeypatch.setattr(clock, "_sleep_until_ns", asked.append)
    t_ns = time.monotonic_ns() + 2_000_000
    clock.sleep_until_ns(t_ns)
    assert time.monotonic_ns() >= t_ns
    assert asked == [t_ns - 400_000]
    t_ns = time.monotonic_ns() + 100_000  # too near to sleep at all
    clock.sleep_until_ns(t_ns)
    assert time.monotonic_ns() >= t_ns
    assert len(asked) == 1


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
