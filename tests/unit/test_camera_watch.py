"""The watch beside a busy owner: when it looks, when it keeps off, what becomes of an error."""

import threading
import time

import pytest

from gwp_edge.camera_watch import CameraWatch


@pytest.fixture
def make_watch():
    watches = []

    def make(look):
        watches.append(CameraWatch(look, 0.002))
        return watches[-1]

    yield make
    for watch in watches:
        watch.close()
        watch.close()


def test_watch_looks_inside_the_block_only(make_watch):
    looks, third = [], threading.Event()

    def look(now_ns):
        looks.append(now_ns)
        if len(looks) % 3 == 0:
            third.set()

    watch = make_watch(look)
    time.sleep(0.05)
    assert looks == []
    for n_before in (0, 3):
        third.clear()
        with watch:
            assert third.wait(10.0)
        n_looks = len(looks)
        assert n_looks >= n_before + 3
        time.sleep(0.05)
        assert len(looks) == n_looks
    assert looks == sorted(looks)


def test_block_is_left_between_two_looks(make_watch):
    began, state = threading.Event(), []

    def look(_):
        began.set()
        state.append("looking")
        time.sleep(0.1)
        state.append("done")

    with make_watch(look):
        assert began.wait(10.0)
    assert state[-1] == "done"


def test_error_of_a_look_is_raised_once_by_the_blocks_end(make_watch):
    n_looks, failed = [], threading.Event()

    def look(_):
        n_looks.append(1)
        failed.set()
        raise KeyError("a mistake in a camera's code")

    watch = make_watch(look)

    def go_on_past_the_failure():
        with watch:
            assert failed.wait(10.0)
            time.sleep(0.05)

    for n_blocks in (1, 2):  # the watch goes on afterwards
        failed.clear()
        with pytest.raises(KeyError, match="a mistake"):
            go_on_past_the_failure()
        assert len(n_looks) == n_blocks


def test_error_of_the_block_itself_is_not_replaced(make_watch):
    failed = threading.Event()

    def look(_):
        failed.set()
        raise KeyError("of the look")

    def fail():
        with make_watch(look):
            assert failed.wait(10.0)
            raise ValueError("of the block")

    with pytest.raises(ValueError, match="of the block"):
        fail()
