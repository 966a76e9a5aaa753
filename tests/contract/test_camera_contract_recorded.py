"""Recordings as live cameras: the camera contract, pace, order, looping and the end."""

import importlib.util
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from camera_suite import CameraContract

from gwp_edge.drivers import recorded
from gwp_edge.errors import DeviceError, SpecError
from gwp_edge.robot_config import CameraConfig
from gwp_edge.robots import create_camera
from gwp_edge.testing import make_spec

DATA = Path(__file__).parents[1] / "data"
DATASET = DATA / "dataset"
PATIENCE_S = 60.0
needs_reader = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("av", "pyarrow")),
    reason="needs the extra recorded (av, pyarrow)",
)
N_FRAMES = 12


@pytest.fixture(scope="session", params=["db3", "bag"])
def rs_recording(request, tmp_path_factory):
    """A file that the SDK's own recorder has written: 12 colour frames at 30 fps.

    The .db3 is made here. The recorder of today's releases writes no .bag any more, so that one is
    of an older release; see the README beside it.
    """
    rs = pytest.importorskip("pyrealsense2")
    if request.param == "bag":
        return DATA / "realsense" / "colour.bag"
    from gwp_edge.drivers.realsense import RealSenseOptions
    from gwp_edge.drivers.realsense_software import draw, make_device, push_frame

    path = tmp_path_factory.mktemp("rs") / "colour.db3"
    options = RealSenseOptions(width_px=64, height_px=48)
    device, sensor, profile = make_device(rs, options, "R1")
    recorder = rs.recorder(str(path), device)
    stage = recorder.query_sensors()[0]
    stage.open(stage.get_stream_profiles()[0])
    delivered = threading.Semaphore(0)
    stage.start(lambda _frame: delivered.release())
    for i in range(N_FRAMES):
        push_frame(
            rs,
            sensor,
            profile,
            draw(i + 1, 64, 48),
            stamp_ms=1_700_000_000_000.0 + i * 100 / 3,
            number=i + 1,
            domain="system_time",
        )
        # At once after each other: frames that lie close together must not get lost in playing.
        assert delivered.acquire(timeout=PATIENCE_S)
    stage.stop()
    stage.close()
    recorder.pause()
    del stage, recorder, sensor, profile, device
    return path


@pytest.fixture
def opened():
    cameras = []

    def make(kind, **options):
        config = CameraConfig(role="cam_high", kind=kind, options=options)
        cameras.append(create_camera(config, make_spec(), {}))
        return cameras[-1]

    yield make
    for camera in cameras:
        camera.close()


def collect_until_end(camera):
    """Return every frame seen until the recording ends, and what it says then."""
    frames = []
    deadline_s = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline_s:
        try:
            frame = camera.latest()
        except DeviceError as e:
            return frames, str(e)
        if frame is not None and (not frames or frame.frame_idx != frames[-1].frame_idx):
            frames.append(frame)
        time.sleep(0.002)
    raise AssertionError("the recording did not end")


class TestRsFileCamera(CameraContract):
    @pytest.fixture
    def camera(self, rs_recording, opened):
        return opened("rs-file", path=str(rs_recording), loop=True, speed="max")


@needs_reader
class TestLeRobotCamera(CameraContract):
    @pytest.fixture
    def camera(self, opened):
        return opened("lerobot", root=str(DATASET), loop=True, speed="max")


def test_rs_file_at_real_speed_keeps_the_recorded_times(rs_recording, opened):
    camera = opened("rs-file", path=str(rs_recording))
    camera.open()
    frames, message = collect_until_end(camera)
    assert f"ended after {N_FRAMES} frames" in message
    assert "loop = true" in message
    numbers = [int(f.image[0, 0, 1]) for f in frames]
    assert numbers == sorted(set(numbers))
    assert len(numbers) >= N_FRAMES // 2
    t0_ns, n0 = frames[0].t_captured_ns, numbers[0]
    for frame, number in zip(frames, numbers, strict=True):
        assert frame.t_captured_ns - t0_ns == pytest.approx((number - n0) * 1e9 / 30, abs=2e3)
        np.testing.assert_array_equal(frame.image[40, 5], [200, 0, 0])
        assert frame.domain == "recorded"


def test_rs_file_at_maximum_speed_plays_every_frame(rs_recording, opened):
    camera = opened("rs-file", path=str(rs_recording), speed="max")
    camera.open()
    _, message = collect_until_end(camera)
    assert f"ended after {N_FRAMES} frames" in message
    assert camera.health.n_frames == N_FRAMES
    assert camera.health.n_dropped == 0


def test_rs_file_that_is_no_recording_is_refused(tmp_path, opened):
    with pytest.raises(SpecError, match="no such recording"):
        opened("rs-file", path=str(tmp_path / "none.db3"))
    pytest.importorskip("pyrealsense2")
    bad = tmp_path / "bad.db3"
    bad.write_bytes(b"not a database")
    camera = opened("rs-file", path=str(bad))
    with pytest.raises(DeviceError, match="librealsense"):
        camera.open()


@needs_reader
def test_lerobot_frames_are_those_of_the_dataset_at_its_pace(opened):
    pytest.importorskip("av")
    from gwp_edge.lerobot.dataset import LeRobotDataset

    camera = opened("lerobot", root=str(DATASET), episode=1)
    camera.open()
    frames, message = collect_until_end(camera)
    with LeRobotDataset.open(DATASET) as dataset:
        n = dataset.episode(1).n_frames
        assert f"ended after {n} frames" in message
        assert len(frames) > n // 4
        for frame in frames[:: max(1, len(frames) // 8)]:
            expected = dataset.image(1, frame.frame_idx, "cam_high")
            np.testing.assert_array_equal(frame.image, expected)
    t0_ns, n0 = frames[0].t_captured_ns, frames[0].frame_idx
    spacing = [(f.t_captured_ns - t0_ns) - (f.frame_idx - n0) * round(1e9 / 30) for f in frames]
    assert spacing == [0] * len(frames)


@needs_reader
def test_lerobot_cameras_made_together_show_the_same_moment(opened):
    """Started one after the other, they would show pictures of different times."""
    spec = make_spec(cameras=("cam_high", "cam_left_wrist"))
    cameras = [
        create_camera(
            CameraConfig(role=r, kind="lerobot", options={"root": str(DATASET), "loop": True}),
            spec,
            {},
        )
        for r in spec.cameras
    ]
    try:
        for camera in cameras:
            camera.open()
        deadline_s = time.monotonic() + PATIENCE_S
        while any(c.latest() is None for c in cameras):
            assert time.monotonic() < deadline_s
            time.sleep(0.01)
        a, b = (c.latest() for c in cameras)
        assert (a.t_captured_ns - b.t_captured_ns) == (a.frame_idx - b.frame_idx) * round(1e9 / 30)
    finally:
        for camera in cameras:
            camera.close()


@needs_reader
@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"episode": 99}, "no episode 99"),
        ({"camera": "cam_low"}, "no camera cam_low"),
    ],
)
def test_lerobot_with_wrong_episode_or_camera_is_refused(opened, options, text):
    camera = opened("lerobot", root=str(DATASET), **options)
    with pytest.raises(DeviceError, match=text):
        camera.open()


def test_playback_options_are_checked(opened):
    with pytest.raises(SpecError, match="is no LeRobot dataset"):
        opened("lerobot", root="/nowhere")
    with pytest.raises(SpecError, match="speed"):
        opened("lerobot", root=str(DATASET), speed="fast")


def test_lerobot_without_its_libraries_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "gwp_edge.lerobot.dataset", None)
    source = recorded.create_lerobot_source("cam_high", root=str(DATASET))
    with pytest.raises(DeviceError, match=r"gwp-edge\[recorded\]"):
        source.open()
