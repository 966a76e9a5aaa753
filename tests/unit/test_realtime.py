"""Who is real-time, and who must not be."""

import os
import threading

import numpy as np
import pytest

from gwp_edge.realtime import ordinary_threads


def policies():
    found = {}
    for thread in os.listdir("/proc/self/task"):
        found[int(thread)] = os.sched_getscheduler(int(thread))
    return found


def may_be_realtime():
    before = os.sched_getscheduler(0), os.sched_getparam(0)
    try:
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))
    except PermissionError:
        return False
    os.sched_setscheduler(0, *before)
    return True


@pytest.mark.skipif(not may_be_realtime(), reason="this user may not be real-time")
def test_what_a_library_makes_real_time_is_ordinary_again():
    end = threading.Event()
    with ordinary_threads():
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))
        thread = threading.Thread(target=end.wait)  # inherits it
        thread.start()
        assert os.SCHED_FIFO in policies().values()
    try:
        assert os.sched_getscheduler(0) != os.SCHED_FIFO
        assert policies()[thread.native_id] == os.SCHED_OTHER
    finally:
        end.set()
        thread.join()


def test_video_encoder_makes_nobody_real_time(tmp_path):
    """Run as root, the encoder of LeRobot's videos once took the whole process along."""
    pytest.importorskip("av")
    from gwp_edge.lerobot.writer import DatasetWriter, EpisodeRows

    before = os.sched_getscheduler(0)
    writer = DatasetWriter(
        tmp_path, names=["a"], fps=30, robot_type="test", sizes={"cam_high": (64, 64)}
    )
    seen = []

    def pictures():
        for _ in range(40):
            seen.append(set(policies().values()))
            yield np.zeros((64, 64, 3), np.uint8)

    rows = EpisodeRows(
        state=np.zeros((40, 1), np.float32), action=np.zeros((40, 1), np.float32), task="none"
    )
    writer.add(rows, {"cam_high": pictures()})
    writer.close()
    assert os.sched_getscheduler(0) == before
    assert len(seen) == 40
    assert not set.union(*seen) & ({os.SCHED_FIFO, os.SCHED_RR} - {before})
