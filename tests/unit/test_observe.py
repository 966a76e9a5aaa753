"""When there is an observation, what its time is, and why there is none."""

import numpy as np
import pytest

from gwp_edge.errors import SpecError, StaleError
from gwp_edge.mailbox import Board
from gwp_edge.observe import ObservationLimits, Observer, StateHistory
from gwp_edge.types import ArmState, Frame

MS = 1_000_000
NOW = 10_000 * MS
LIMITS = ObservationLimits()


class Camera:
    def __init__(self, name, age_ms=10):
        self.name = name
        self.t_ns = None if age_ms is None else NOW - age_ms * MS

    def latest(self):
        if self.t_ns is None:
            return None
        return Frame(
            camera=self.name,
            image=np.zeros((2, 2, 3), np.uint8),
            t_captured_ns=self.t_ns,
            t_received_ns=self.t_ns,
            frame_idx=0,
        )


@pytest.fixture
def board():
    board = Board.create(2, 4)
    yield board
    board.close()
    board.unlink()


def _publish(board, age_ms, value):
    board.publish_state(
        ArmState(
            position=np.full(2, value),
            velocity=np.zeros(2),
            t_received_ns=NOW - age_ms * MS,
            enabled=True,
        )
    )


def test_time_is_the_oldest_frames_and_state_is_of_that_time(board):
    for age_ms in range(100, -1, -5):
        _publish(board, age_ms, -age_ms)
    cameras = [Camera("a", 12), Camera("b", 38), Camera("c", 5)]
    observation = Observer(cameras, StateHistory(board), LIMITS).observe(NOW)
    assert observation.t_observed_ns == NOW - 38 * MS
    assert observation.t_state_ns == NOW - 38 * MS
    np.testing.assert_allclose(observation.state, -38.0)
    assert [f.camera for f in observation.frames] == ["a", "b", "c"]


@pytest.mark.parametrize(
    ("ages_ms", "words"),
    [
        ((10, None), "has delivered no frame yet"),
        ((10, 101), "camera b: the newest frame is 101 ms old"),
        ((10, 61), "frames are 51 ms apart \\(oldest: b\\)"),
    ],
)
def test_stale_frames_are_refused(board, ages_ms, words):
    _publish(board, 0, 1.0)
    cameras = [Camera(name, age) for name, age in zip("ab", ages_ms, strict=True)]
    with pytest.raises(StaleError, match=words):
        Observer(cameras, StateHistory(board), LIMITS).observe(NOW)


def test_frames_at_the_limits_are_accepted(board):
    _publish(board, 0, 1.0)
    cameras = [Camera("a", 50), Camera("b", 100)]
    assert Observer(cameras, StateHistory(board), LIMITS).observe(NOW) is not None


def test_missing_old_or_broken_state_is_refused(board):
    observer = Observer([Camera("a")], StateHistory(board), LIMITS)
    with pytest.raises(StaleError, match="state"):
        observer.observe(NOW)
    _publish(board, 101, 1.0)
    with pytest.raises(StaleError, match="the arm's state is 101 ms old"):
        observer.observe(NOW)
    _publish(board, 20, np.nan)
    _publish(board, 0, np.nan)
    with pytest.raises(StaleError, match="not finite"):
        observer.observe(NOW)


def test_limits_must_be_positive():
    with pytest.raises(SpecError, match="frame_age_ns"):
        ObservationLimits(frame_age_ns=0)


def test_stall_counts_from_the_capture_of_the_oldest_camera(board):
    """A look that comes late, after a long inference, finds the stall at once."""
    _publish(board, 0, 0.0)
    cameras = [Camera("a", 10), Camera("b", 10)]
    observer = Observer(cameras, StateHistory(board), LIMITS)
    observer.observe(NOW)
    assert not observer.is_stalled(NOW + 10_000 * MS)  # the last look was good
    cameras[0].t_ns = NOW + 600 * MS
    with pytest.raises(StaleError):
        observer.observe(NOW + 480 * MS)
    assert not observer.is_stalled(NOW + 480 * MS)
    assert not observer.is_stalled(NOW + 489 * MS)
    assert observer.is_stalled(NOW + 491 * MS)


def test_frames_that_cannot_be_used_stall_after_the_limit(board):
    _publish(board, 0, 0.0)
    cameras = [Camera("a", 10), Camera("b", 70)]
    observer = Observer(cameras, StateHistory(board), LIMITS)
    for wait_ms in range(0, 501, 20):
        for camera, age_ms in zip(cameras, (10, 70), strict=True):
            camera.t_ns = NOW + (wait_ms - age_ms) * MS
        with pytest.raises(StaleError, match="apart"):
            observer.observe(NOW + wait_ms * MS)
        assert not observer.is_stalled(NOW + wait_ms * MS)
    assert observer.is_stalled(NOW + 501 * MS)
