"""How far free memory falls: told by a list of figures, and by memory that is really taken."""

import time

import numpy as np
import pytest

from gwp_edge.planning.memory_watch import MemoryWatch


def test_peak_is_the_lowest_that_was_seen_in_between():
    seen = []

    def free_bytes():
        seen.append(1)
        return {1: 1000, 2: 900, 3: 400}.get(len(seen), 800)

    with MemoryWatch(period_s=0.001, free_bytes=free_bytes) as watch:
        while len(seen) < 6:
            time.sleep(0.001)
    assert watch.peak_bytes == 600


def test_peak_of_memory_that_was_taken_and_given_back():
    with MemoryWatch(period_s=0.005) as watch:
        block = np.ones(300_000_000, np.uint8)
        time.sleep(0.1)
        del block
    assert watch.peak_bytes > 200_000_000


def test_watch_ends_with_an_error_as_well():
    with pytest.raises(ZeroDivisionError), MemoryWatch(period_s=0.001) as watch:
        _ = 1 // 0
    assert not watch._thread.is_alive()
