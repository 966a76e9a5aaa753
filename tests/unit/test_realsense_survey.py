"""The camera survey: a picture of each camera, roles, and a robot file that can be read."""

import numpy as np
import pytest
import typer
from PIL import Image
from typer.testing import CliRunner

from gwp_edge import camera_survey
from gwp_edge.commands.cameras import cameras
from gwp_edge.drivers import realsense
from gwp_edge.drivers.camera_host import HostedCamera, HostOptions, SourceConfig
from gwp_edge.drivers.realsense import DeviceInfo
from gwp_edge.errors import DeviceError, SpecError
from gwp_edge.robots import read_robot_file
from gwp_edge.testing import FakeClock

SOFTWARE = "gwp_edge.drivers.realsense_software:create_source"
DEVICES = tuple(
    DeviceInfo(serial=s, name="Intel RealSense D435I", usb="3.2", firmware="5.16")
    for s in ("111", "222", "333")
)


def software(serial, **script):
    source = SourceConfig(
        factory=SOFTWARE,
        kwargs={"serial": serial, "width_px": 64, "height_px": 48, "fps": 60, "script": script},
    )
    options = HostOptions(open_timeout_s=60, hang_timeout_s=30, stall_timeout_s=30)
    return HostedCamera(serial, source, options)


def test_take_pictures_writes_one_each_and_reports_failures(tmp_path):
    pytest.importorskip("pyrealsense2")

    def make(serial):
        return software(serial, **({"plug": "/nowhere"} if serial == "222" else {}))

    good, bad = camera_survey.take_pictures(("111", "222"), tmp_path / "pictures", make)
    assert (good.path, good.error) == (tmp_path / "pictures" / "111.png", None)
    image = np.asarray(Image.open(good.path))
    np.testing.assert_array_equal(image[40, 5], [200, 0, 0])
    assert bad.path is None
    assert "no RealSense with serial 222" in bad.error


def test_take_pictures_without_frames_says_so(tmp_path, monkeypatch):
    class Dark:
        name = "111"

        def open(self):
            pass

        def latest(self):
            return None

        def close(self):
            pass

    clock = FakeClock()
    monkeypatch.setattr(camera_survey.time, "monotonic", lambda: clock.now_ns() / 1e9)
    monkeypatch.setattr(camera_survey.time, "sleep", lambda s: clock.advance(round(s * 1e9)))
    (picture,) = camera_survey.take_pictures(("111",), tmp_path, lambda _serial: Dark())
    assert "no frame came" in picture.error


def test_robot_file_of_given_and_guessed_roles_reads_back(tmp_path):
    roles = camera_survey.assign_roles(DEVICES, {"cam_left_wrist": "111"})
    assert roles == {"cam_left_wrist": "111", "cam_high": "222", "cam_right_wrist": "333"}
    text = camera_survey.robot_file(
        "piper-dual", DEVICES, roles, guessed={"cam_high", "cam_right_wrist"}
    )
    assert text.count("guessed") == 2
    path = tmp_path / "robot.toml"
    path.write_text(text)
    robot = read_robot_file(path)
    assert robot.arm.options == {"left": "can_left", "right": "can_right"}
    assert {c.role: c.options["serial"] for c in robot.cameras} == roles
    for camera in robot.cameras:
        realsense.parse_options(camera.role, camera.options)


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"cam_high": "999"}, "attached are 111, 222, 333"),
        ({"cam_high": "111", "cam_left_wrist": "111"}, "two roles"),
    ],
)
def test_assign_roles_refuses(given, text):
    with pytest.raises(SpecError, match=text):
        camera_survey.assign_roles(DEVICES, given)


def test_assign_roles_with_too_many_cameras_asks_for_names():
    more = (*DEVICES, DeviceInfo(serial="444", name="x", usb="", firmware=""))
    with pytest.raises(SpecError, match="--role ROLE=SERIAL"):
        camera_survey.assign_roles(more, {})


def run(*arguments):
    app = typer.Typer()
    app.command()(cameras)
    return CliRunner().invoke(app, arguments)


def test_command_without_cameras_fails_and_says_what_to_check(tmp_path):
    pytest.importorskip("pyrealsense2")
    if realsense.list_devices():
        pytest.skip("a camera is attached")
    robot = tmp_path / "robot.toml"
    result = run("--out", str(tmp_path / "p"), "--write", str(robot))
    assert result.exit_code == 1
    assert "no RealSense camera is attached" in result.output
    assert not robot.exists()


def test_command_lists_and_writes_the_robot_file(tmp_path, monkeypatch):
    monkeypatch.setattr(realsense, "list_devices", lambda: DEVICES)
    robot = tmp_path / "robot.toml"
    result = run("--list", "--write", str(robot), "--role", "cam_high=333")
    assert result.exit_code == 0, result.output
    assert all(d.serial in result.output for d in DEVICES)
    roles = {c.role: c.options["serial"] for c in read_robot_file(robot).cameras}
    assert roles == {"cam_high": "333", "cam_left_wrist": "111", "cam_right_wrist": "222"}


def test_command_with_a_malformed_role_is_refused(monkeypatch):
    monkeypatch.setattr(realsense, "list_devices", lambda: DEVICES)
    result = run("--list", "--role", "cam_high")
    assert isinstance(result.exception, SpecError)


def test_missing_sdk_names_the_extra(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pyrealsense2", None)
    with pytest.raises(DeviceError, match=r"gwp-edge\[realsense\]"):
        realsense.list_devices()


def test_robot_file_names_the_pictures_relative_to_itself(tmp_path):
    roles = camera_survey.assign_roles(DEVICES[:1], {})
    serial = DEVICES[0].serial
    text = camera_survey.robot_file(
        "piper", DEVICES[:1], roles, guessed=set(), pictures={serial: 'a "b"/1.png'}
    )
    path = tmp_path / "robot.toml"
    path.write_text(text)
    (camera,) = read_robot_file(path).cameras
    assert camera.picture == str(tmp_path / 'a "b"/1.png')
    assert camera.options["serial"] == serial
