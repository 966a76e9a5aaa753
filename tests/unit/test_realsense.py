"""RealSense cameras on the real SDK with its software device: order, loss, hang, unplug, replug."""

import os
import signal
import time

import numpy as np
import pytest

from gwp_edge.drivers import realsense
from gwp_edge.drivers.camera_host import HostedCamera, HostOptions, SourceConfig
from gwp_edge.errors import DeviceError, DeviceTimeoutError, SpecError
from gwp_edge.shared_memory import PREFIX, SHM_DIR
from gwp_edge.testing import make_spec

pytest.importorskip("pyrealsense2")

SOFTWARE = "gwp_edge.drivers.realsense_software:create_source"
PATIENCE_S = 60.0
PATIENT = {"open_timeout_s": 60.0, "hang_timeout_s": 30.0, "stall_timeout_s": 30.0}


def wait_for(condition, what):
    deadline_s = time.monotonic() + PATIENCE_S
    while not (found := condition()):
        assert time.monotonic() < deadline_s, f"{what} did not happen"
        time.sleep(0.01)
    return found


@pytest.fixture
def software_camera():
    """Return a function that opens a software camera."""
    before = set(SHM_DIR.glob(f"{PREFIX}*"))
    cameras = []

    def make(*, script=None, options=None, factory=SOFTWARE, **kwargs):
        stream = {"serial": "A1", "width_px": 64, "height_px": 48, **kwargs}
        source = SourceConfig(factory=factory, kwargs={**stream, "script": script or {}})
        camera = HostedCamera("cam_high", source, HostOptions(**{**PATIENT, **(options or {})}))
        cameras.append(camera)
        return camera

    yield make
    pids = [c.host_pid for c in cameras]
    names = [c.ring_name for c in cameras]
    for camera in cameras:
        camera.close()
    for pid in pids:
        if pid is not None:
            with pytest.raises(ProcessLookupError):
                os.kill(pid, 0)
    left = {p.name for p in set(SHM_DIR.glob(f"{PREFIX}*")) - before}
    assert not left & {n for n in names if n}


def test_frames_are_rgb_and_numbered(software_camera):
    camera = software_camera()
    camera.open()
    frame = wait_for(camera.latest, "a frame")
    left, right = frame.image[40, 5], frame.image[40, 60]
    np.testing.assert_array_equal(left, [200, 0, 0])
    np.testing.assert_array_equal(right, [0, 0, 200])
    assert frame.domain == "host"


@pytest.mark.parametrize(
    ("stamps", "domain"), [("hardware_clock", "hardware"), ("global_time", "global")]
)
def test_capture_time_domain_is_recorded_and_on_the_monotonic_clock(
    software_camera, stamps, domain
):
    camera = software_camera(script={"domain": stamps})
    t_open_ns = time.monotonic_ns()
    camera.open()
    frame = wait_for(camera.latest, "a frame")
    assert frame.domain == domain
    assert t_open_ns - 1e9 < frame.t_captured_ns <= frame.t_received_ns <= time.monotonic_ns()
    assert camera.health.n_implausible_stamps == 0


def test_missing_frame_numbers_are_counted_as_dropped(software_camera):
    camera = software_camera(script={"skip_every": 5}, fps=60)
    camera.open()
    health = wait_for(lambda: camera.health if camera.health.n_frames >= 20 else None, "20 frames")
    assert health.n_dropped >= 3
    assert not health.is_good


def test_open_absent_device_is_refused_at_once(software_camera, tmp_path):
    camera = software_camera(script={"plug": str(tmp_path / "plug")})
    with pytest.raises(DeviceError, match="no RealSense with serial A1"):
        camera.open()
    with pytest.raises(DeviceError, match="not open"):
        camera.latest()


def test_real_lookup_without_devices_says_what_to_do(software_camera):
    """The SDK itself would block for 15 s and then say "No device connected"."""
    if realsense.list_devices():
        pytest.skip("a camera is attached")
    source = realsense.create_source("cam_high", serial="123456")
    with pytest.raises(DeviceError, match=r"no RealSense with serial 123456; found none.*cable"):
        source.open()
    source.close()


def test_stream_that_the_device_lacks_is_refused(software_camera):
    from gwp_edge.drivers.realsense_software import SoftwareLookup, SoftwareScript

    has = realsense.RealSenseOptions(serial="A", width_px=64, height_px=48)
    wants = realsense.RealSenseOptions(serial="A", width_px=128, height_px=96)
    source = realsense.RealSenseSource(
        "cam_high", wants, SoftwareLookup("cam_high", has, SoftwareScript())
    )
    with pytest.raises(DeviceError, match="128x96"):
        source.open()
    source.close()


def test_exposure_without_such_an_option_is_refused(software_camera):
    camera = software_camera(exposure_us=5000)
    with pytest.raises(DeviceError, match="no option enable auto exposure"):
        camera.open()


@pytest.fixture
def source_with_exposure(monkeypatch):
    """Return a function that opens a source whose sensor has the options of an RGB module.

    ``before``: values that another program has left.
    """
    import pyrealsense2 as rs

    from gwp_edge.drivers import realsense_software as software

    sensors, sources = [], []
    left = {}
    make_device = software.make_device

    def make_with_options(*given):
        device, sensor, profile = make_device(*given)
        for option, low, high, now in (
            (rs.option.enable_auto_exposure, 0, 1, left.get("enable_auto_exposure", 1)),
            (rs.option.exposure, 1, 10_000, 156),
            (rs.option.gain, 0, 128, 64),
        ):
            allowed = rs.option_range()
            allowed.min, allowed.max, allowed.default, allowed.step = low, high, now, 1
            sensor.add_option(option, allowed, True)
        sensors.append(sensor)
        return device, sensor, profile

    def open_source(before=None, **options):
        left.clear()
        left.update(before or {})
        has = realsense.RealSenseOptions(serial="A", width_px=64, height_px=48, **options)
        lookup = software.SoftwareLookup("cam_high", has, software.SoftwareScript())
        sources.append(realsense.RealSenseSource("cam_high", has, lookup))
        sources[-1].open()
        return {name: sensors[-1].get_option(getattr(rs.option, name)) for name in NAMES}

    NAMES = ("enable_auto_exposure", "exposure", "gain")
    monkeypatch.setattr(software, "make_device", make_with_options)
    yield open_source
    for source in sources:
        source.close()


def test_exposure_and_gain_are_set_and_switch_the_automatic_off(source_with_exposure):
    """An RGB module counts exposure in steps of 100 us."""
    left_alone = source_with_exposure(before={"enable_auto_exposure": 0})
    assert left_alone["enable_auto_exposure"] == 1
    chosen = source_with_exposure(exposure_us=8000, gain=32)
    assert chosen == {"enable_auto_exposure": 0, "exposure": 80, "gain": 32}


def test_exposure_outside_of_the_sensors_range_is_refused(source_with_exposure):
    with pytest.raises(DeviceError, match="exposure 50000 is outside 1 to 10000"):
        source_with_exposure(exposure_us=5_000_000)


def test_unplug_and_replug_goes_on_with_frame_numbers(software_camera, tmp_path):
    plug = tmp_path / "plug"
    plug.touch()
    camera = software_camera(
        script={"plug": str(plug)},
        options={"stall_timeout_s": 0.5, "backoff_s": 0.05, "backoff_max_s": 0.1},
    )
    camera.open()
    wait_for(lambda: camera.health.n_frames >= 10, "ten frames")
    plug.unlink()
    wait_for(lambda: camera.health.n_restarts >= 2, "the second attempt")
    stale = camera.latest()
    assert stale.frame_idx >= 9
    assert "no RealSense" in camera.health.last_error
    assert not camera.health.is_good
    plug.touch()
    # The device counts from 1 again, the camera does not.
    fresh = wait_for(
        lambda: f if (f := camera.latest()).t_captured_ns > stale.t_captured_ns else None,
        "a new frame",
    )
    assert fresh.frame_idx > stale.frame_idx
    assert "restarted" in str(camera.health)


def test_hung_process_is_killed_and_replaced(software_camera):
    camera = software_camera(options={"hang_timeout_s": 0.5, "backoff_s": 0.05})
    camera.open()
    stale = wait_for(camera.latest, "a frame")
    pid = camera.host_pid
    os.kill(pid, signal.SIGSTOP)
    wait_for(lambda: camera.health.n_restarts == 1, "the restart")
    assert "hangs" in camera.health.last_error
    wait_for(lambda: camera.latest().frame_idx > stale.frame_idx + 5, "new frames")
    assert camera.host_pid != pid


def test_killed_process_is_replaced(software_camera):
    camera = software_camera(options={"backoff_s": 0.05})
    camera.open()
    wait_for(camera.latest, "a frame")
    os.kill(camera.host_pid, signal.SIGKILL)
    wait_for(lambda: camera.health.n_restarts == 1, "the restart")
    assert "signal 9" in camera.health.last_error


def test_latest_of_a_hung_camera_does_not_block(software_camera):
    camera = software_camera()
    camera.open()
    wait_for(camera.latest, "a frame")
    os.kill(camera.host_pid, signal.SIGSTOP)
    frames = {camera.latest().frame_idx for _ in range(1000)}
    assert len(frames) <= 3
    camera.close()


def test_device_that_never_opens_times_out(software_camera):
    camera = software_camera(options={"open_timeout_s": 0.001})
    with pytest.raises(DeviceTimeoutError, match="did not open"):
        camera.open()


def test_source_that_fails_says_how(software_camera):
    with pytest.raises(DeviceError, match="camera source 'gwp_edge:nothing' cannot be loaded"):
        software_camera(factory="gwp_edge:nothing").open()
    with pytest.raises(DeviceError, match="cam_high: fps must be positive"):
        software_camera(fps=0).open()


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"serial": "1", "widht_px": 3}, "widht_px"),
        ({"serial": "1", "fps": 0}, "fps must be positive"),
        ({"serial": 5}, "str"),
        ({"serial": "1", "exposure_us": -1}, "exposure_us"),
    ],
)
def test_create_camera_with_wrong_options_is_refused(options, text):
    with pytest.raises(SpecError, match=text):
        realsense.create_camera("cam_high", options, make_spec())


def test_create_camera_without_serial_needs_a_single_camera():
    realsense.create_camera("cam_high", {}, make_spec())
    spec = make_spec(cameras=("cam_high", "cam_left_wrist"))
    with pytest.raises(SpecError, match="expected a serial"):
        realsense.create_camera("cam_high", {}, spec)
