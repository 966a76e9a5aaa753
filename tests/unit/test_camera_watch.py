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


def test_watch_looks_while_busy_only(make_watch):
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
        with watch.busy():
            assert third.wait(10.0)
        with watch.owned():
            n_looks = len(looks)
        assert n_looks >= n_before + 3
        time.sleep(0.05)
        assert len(looks) == n_looks
    assert looks == sorted(looks)


def test_owner_waits_for_a_look_and_the_end_of_being_busy_does_not(make_watch):
    began, go_on, done = threading.Event(), threading.Event(), []

    def look(_):
        began.set()
        go_on.wait(10.0)
        done.append(True)

    watch = make_watch(look)
    with watch.busy():
        assert began.wait(10.0)
    assert not done
    go_on.set()
    with watch.owned():
        assert done
        n_done = len(done)
        with watch.busy():
            time.sleep(0.05)
        assert len(done) == n_done  # it keeps off


def test_error_of_a_look_ends_the_looking_and_is_the_owners(make_watch):
    n_looks, failed = [], threading.Event()

    def look(_):
        n_looks.append(1)
        failed.set()
        raise KeyError("a mistake in a camera's code")

    watch = make_watch(look)
    with watch.owned():
        pass
    with watch.busy():
        assert failed.wait(10.0)
        time.sleep(0.05)
    assert len(n_looks) == 1
    with pytest.raises(KeyError, match="a mistake"), watch.owned():
        raise AssertionError("not reached")


def test_close_does_not_wait_for_the_next_look():
    watch = CameraWatch(lambda _: None, 600.0)
    with watch.busy():
        time.sleep(0.02)
    closing = threading.Thread(target=watch.close, daemon=True)
    closing.start()
    closing.join(30.0)
    assert not closing.is_alive()
