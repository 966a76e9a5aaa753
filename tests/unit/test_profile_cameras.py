"""Which frames a camera is said to have lost, from made-up looks at it."""

from __future__ import annotations

import numpy as np
import pytest
from profile_story import MS, PERIOD, T0, Story

from gwp_edge.profiling.cameras import camera_reports
from gwp_edge.profiling.schema import CameraReport
from gwp_edge.profiling.verdicts import _camera


def test_camera_reports_complete_frames_miss_nothing():
    """A loop slower than its camera skips frames; that is nobody's loss."""
    story = Story(n=60, every=71.0)
    story.stages["vision"] += 54.0
    number = np.floor(np.arange(60) * 71.0 / (PERIOD / MS)).astype(int)
    story.frame_idx = number
    story.age = np.arange(60) * 71.0 - number * PERIOD / MS + 2.5
    found = camera_reports(story.raw(), ("cam",), warmup_s=0.0)[0]
    assert found.n_missing == 0
    assert found.n_expected >= 50
    assert found.period_ms == pytest.approx(33.33, abs=0.01)


def test_camera_reports_lost_frames_are_counted():
    """The loop waits for each frame; five never come, so it begins one period later.

    It looked in vain 3 ms before each frame that it began with.
    """
    number = np.delete(np.arange(65), [10, 20, 30, 31, 50])
    raw = Story(n=60).raw()
    raw.stamps["frame_idx"][:, 0] = number
    shift = number * PERIOD + T0 - raw.stamps["t_observed_ns"]
    for name in (
        "t_observed_ns", "t_started_ns", "t_built_ns", "t_predicted_ns", "t_published_ns",
    ):  # fmt: skip
        raw.stamps[name] += shift
    for name in ("t_captured_ns", "t_received_ns"):
        raw.stamps[name][:, 0] += shift
    raw.stamps["t_looked_ns"] = raw.stamps["t_started_ns"] - 3 * MS
    raw.stamps["looked_idx"][1:, 0] = number[:-1]
    raw.ticks["t_woke_ns"][-1] = raw.stamps["t_published_ns"][-1] + MS
    found = camera_reports(raw, ("cam",), warmup_s=0.0)[0]
    assert (found.n_missing, found.n_late, found.n_expected) == (5, 0, 64)


def beside_each_other(lost):
    """Two cameras in step; what ``lost`` says never comes from the second one."""
    number = np.setdiff1d(np.arange(60 + len(lost)), lost)
    raw = Story(n=60, every=PERIOD / MS).raw()
    shift = (number - np.arange(60)) * PERIOD
    for name in (
        "t_observed_ns", "t_started_ns", "t_built_ns", "t_predicted_ns", "t_published_ns",
    ):  # fmt: skip
        raw.stamps[name] += shift
    raw.stamps["n_cameras"] = 2
    for name in ("t_captured_ns", "t_received_ns", "frame_idx", "domain"):
        if name.startswith("t_"):
            raw.stamps[name][:, 0] += shift
        raw.stamps[name][:, 1] = raw.stamps[name][:, 0]
    raw.stamps["frame_idx"][:, :2] = number[:, None]
    raw.stamps["t_looked_ns"] = raw.stamps["t_started_ns"] - 3 * MS
    # The first one's newest frame at the look in vain is the one before, lost by the other or not.
    raw.stamps["looked_idx"][:, 0] = number - 1
    raw.stamps["looked_idx"][1:, 1] = number[:-1]
    raw.ticks["t_woke_ns"][-1] = raw.stamps["t_published_ns"][-1] + MS
    return raw


def test_camera_reports_blame_the_one_of_two_that_lost_frames():
    """The loop waits for both, and the good one was counted with the bad one."""
    good, bad = camera_reports(beside_each_other([10, 20, 30, 31]), ("a", "b"), warmup_s=0.0)
    assert (good.n_missing, bad.n_missing) == (0, 4)


def test_camera_reports_loop_that_did_not_look_blames_no_camera():
    """Two perfect cameras on a loaded machine: "7.0 % missing: check cable, USB bus".

    The loop had not been run between the time a frame was due and the next look, and by then a
    newer one had taken its place.
    """
    raw = beside_each_other([10, 20, 30, 31])
    raw.stamps["t_looked_ns"] = 0
    for camera in camera_reports(raw, ("a", "b"), warmup_s=0.0):
        assert (camera.n_missing, camera.n_late) == (0, 0)
        assert camera.n_expected == camera.n_used - 1 >= 58


def test_camera_reports_frames_that_come_late_are_not_lost():
    """Ten milliseconds after it was due a look was in vain, and then it came."""
    raw = beside_each_other([])
    late = [10, 20]
    raw.stamps["t_looked_ns"] = 0
    raw.stamps["looked_idx"][late, 0] = late
    for j in late:
        raw.stamps["t_started_ns"][j] += 12 * MS
        raw.stamps["t_looked_ns"][j] = raw.stamps["t_started_ns"][j] - MS
    good, bad = camera_reports(raw, ("a", "b"), warmup_s=0.0)
    assert (good.n_missing, good.n_late) == (0, 0), "its frame was there at the look"
    assert (bad.n_missing, bad.n_late) == (0, 2)


def test_camera_reports_uneven_clock_blames_nobody():
    """A renderer that was starved made frames late by itself, and 8 % of them "never came".

    Its frames were 25 ms or 50 ms apart as it pleased, so none was due at any moment.
    """
    raw = beside_each_other([])
    shift = np.where(np.arange(60) % 5 == 0, 12 * MS, 0)
    raw.stamps["t_captured_ns"][:, 0] += shift
    raw.stamps["t_received_ns"][:, 0] += shift
    uneven, even = camera_reports(raw, ("a", "b"), warmup_s=0.0)
    assert (uneven.period_ms, uneven.n_expected, uneven.n_missing) == (None, 0, 0)
    assert even.period_ms == pytest.approx(33.33, abs=0.01)


def camera_verdict(n_missing, n_expected):
    camera = CameraReport(
        name="cam", clock="sim", n_made=1000, n_used=900, period_ms=33.3, n_expected=n_expected,
        n_missing=n_missing, n_late=0, transport_ms=None,
    )  # fmt: skip
    return _camera(camera)


@pytest.mark.parametrize(
    ("n_missing", "n_expected", "level"), [(2, 60, "good"), (30, 900, "warn"), (1, 900, "good")]
)
def test_camera_verdict_warns_where_the_whole_interval_is_above_one_percent(
    n_missing, n_expected, level
):
    assert camera_verdict(n_missing, n_expected).level == level
