"""A LeRobot robot of our own making behind the bridge: contracts, units, endings."""

import math
import os
import signal
import sys
import time
from pathlib import Path

import msgspec
import numpy as np
import pytest
from arm_suite import ArmContract
from camera_suite import CameraContract

from gwp_edge.drivers import lerobot_bridge
from gwp_edge.drivers.lerobot_options import map_features, parse_options
from gwp_edge.errors import DeviceError, SpecError
from gwp_edge.motor_options import MotorOptions
from gwp_edge.observe import ObservationLimits
from gwp_edge.policy_options import PolicyOptions
from gwp_edge.robots import load_robot
from gwp_edge.runtime import RunOptions, run
from gwp_edge.testing import make_spec

STAND_IN = Path(__file__).resolve().parents[1] / "data" / "lerobot_stand_in"
SPEC = make_spec(1)
START_DEG = (10.0, 60.0, -60.0, 0.0, 20.0, 0.0, 50.0)
PATIENCE_S = 30.0


@pytest.fixture(autouse=True)
def _lerobot_is_there(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(STAND_IN))


@pytest.fixture
def motors(tmp_path):
    """The file in which the robot's motors live; rows torque, was, target, time."""
    path = tmp_path / "ttyACM0"
    values = np.zeros((4, 7))
    values[1] = values[2] = START_DEG
    values.tofile(path)
    return np.memmap(path, np.float64, "r+", shape=(4, 7))


def options_for(motors, **more):
    config = {"port": str(motors.filename), **more.pop("config", {})}
    return {
        "type": "bench_arm",
        "units": dict.fromkeys((f"left_joint_{i}" for i in range(1, 7)), "deg")
        | {"left_gripper": "0..100"},
        "ranges": {"left_gripper": (0.0, 0.08)},
        "features": {"left_gripper": "gripper.pos"},
        "cameras": {"cam_high": "front"},
        "config": config,
        "python": sys.executable,
        "rate_hz": 200.0,
        "connect_timeout_s": 60.0,
        **more,
    }


@pytest.fixture
def started(motors):
    world = lerobot_bridge.create_world(options_for(motors), SPEC)
    extra = world.start()
    yield world, extra
    world.close()


def wait_for(condition):
    deadline_s = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline_s, "waited in vain"
        time.sleep(0.005)


class TestLerobotArm(ArmContract):
    @pytest.fixture
    def new_arm(self, started):
        return lambda: lerobot_bridge.create_arm(started[1], SPEC)


class TestLerobotCamera(CameraContract):
    @pytest.fixture
    def camera(self, started):
        camera = lerobot_bridge.create_camera("cam_high", started[1], SPEC)
        yield camera
        camera.close()


@pytest.fixture
def arm(started):
    arm = lerobot_bridge.create_arm(started[1], SPEC)
    arm.open(enable=True)
    yield arm
    arm.close()


def test_state_is_in_radians_and_metres(arm):
    expected = [math.radians(v) for v in START_DEG[:6]] + [0.04]
    np.testing.assert_allclose(arm.state().position, expected, atol=1e-6)


def test_picture_keeps_its_colours(started):
    camera = lerobot_bridge.create_camera("cam_high", started[1], SPEC)
    camera.open()
    wait_for(lambda: camera.latest() is not None)
    assert camera.latest().image.shape == (48, 64, 3)
    assert tuple(camera.latest().image[0, 0, :2]) == (200, 10)
    camera.close()


def test_sent_is_what_the_robot_sent_after_its_own_clipping(motors, caplog):
    options = options_for(motors, config={"highest_deg": 62.0})
    world = lerobot_bridge.create_world(options, SPEC)
    try:
        arm = lerobot_bridge.create_arm(world.start(), SPEC)
        arm.open(enable=True)
        target = arm.state().position.copy()
        target[1] = math.radians(90.0)

        def is_sent():
            arm.send(target)
            arm.state()
            return arm.sent is not None and arm.sent[1] > math.radians(61.0)

        wait_for(is_sent)
        assert arm.sent[1] == pytest.approx(math.radians(62.0))
        assert arm.n_clipped > 0
        assert "left_joint_2" in caplog.text
        arm.close()
    finally:
        world.close()


def test_killed_bridge_leaves_the_last_target_and_torque_and_is_reported(started, arm, motors):
    world, _ = started
    target = arm.state().position + 0.05
    target[6] = 0.05

    def is_there():
        arm.send(target)
        return np.abs(arm.state().position - target).max() < 0.001

    wait_for(is_there)
    os.kill(world.process_id, signal.SIGKILL)

    def is_reported():
        try:
            arm.state()
        except DeviceError as e:
            return "keeps its last target" in str(e)
        return False

    wait_for(is_reported)
    with pytest.raises(DeviceError):
        arm.send(target)
    with pytest.raises(DeviceError, match="ended with -9"):
        world.check()
    assert (motors[0] == 1.0).all()
    np.testing.assert_allclose(np.radians(motors[2, :6]), target[:6])


def test_world_close_holds_and_never_cuts_the_torque(started, motors):
    """lerobot disconnects in Robot.__del__, and its default is to let the arm fall."""
    started[0].close()
    assert (motors[0] == 1.0).all()
    np.testing.assert_allclose(motors[2], START_DEG, atol=0.01)


def test_commander_that_dies_makes_the_bridge_hold_the_measured_pose(started, arm, motors):
    target = arm.state().position.copy()
    target[0] += 1.0
    arm.send(target)
    wait_for(lambda: motors[2, 0] > START_DEG[0] + 50.0)
    arm._wire.sock.close()  # as the kernel does for a killed process
    wait_for(lambda: motors[2, 0] < START_DEG[0] + 57.2)
    held = motors[2, 0]
    reader = lerobot_bridge.create_arm(started[1], SPEC)
    reader.open(enable=False)
    wait_for(lambda: abs(math.degrees(reader.state().position[0]) - held) < 0.5)
    assert motors[2, 0] == held
    reader.close()


def test_hold_by_another_takes_the_right_to_command(started, arm):
    guardian = lerobot_bridge.create_arm(started[1], SPEC)
    guardian.open(enable=False)
    guardian.hold()
    wait_for(lambda: arm.state().fault is not None)
    before = guardian.state().position
    arm.send(before + 0.2)
    t_ns = guardian.state().t_received_ns
    wait_for(lambda: guardian.state().t_received_ns > t_ns + 100_000_000)
    np.testing.assert_allclose(guardian.state().position, before, atol=0.01)
    guardian.close()


def test_second_commander_is_refused(started, arm):
    other = lerobot_bridge.create_arm(started[1], SPEC)
    with pytest.raises(DeviceError, match="another process commands"):
        other.open(enable=True)


def test_unplugged_robot_ends_with_its_own_words(started, arm, motors):
    Path(str(motors.filename) + ".unplugged").touch()

    def is_reported():
        try:
            arm.state()
        except DeviceError:
            return True
        return False

    wait_for(is_reported)
    wait_for(lambda: started[0]._process.poll() is not None)
    with pytest.raises(DeviceError, match="Failed to sync read"):
        started[0].check()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"type": "no_such_arm"}, "knows no robot 'no_such_arm'.*bench_arm"),
        ({"features": {}}, "left_gripper.pos.*gripper.pos"),
        ({"cameras": {"cam_high": "rear"}}, "cameras are front"),
        ({"config": {"calibrated": False}}, "lerobot-calibrate"),
        ({"config": {"port": "/nowhere"}}, "Could not connect on port"),
        ({"config": {"prot": 1}}, "not valid"),
        ({"python": "/no/python"}, "interpreter that has lerobot"),
    ],
)
def test_robot_that_cannot_start_says_why_and_leaves_no_process(motors, change, message):
    world = lerobot_bridge.create_world(options_for(motors, **change), SPEC)
    with pytest.raises(DeviceError, match=message):
        world.start()
    with pytest.raises(DeviceError, match="not running"):
        world.check()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"units": "furlong"}, "expected one of deg"),
        ({"units": "deg"}, "left_gripper is in m"),
        ({"units": {"left_joint_1": "deg"}}, "left_joint_2: say its unit"),
        ({"ranges": {}}, "say in ranges"),
        ({"ranges": {"gripper": (0.0, 1.0)}}, "channels are left_joint_1"),
        ({"ranges": {"left_gripper": (0.1, 0.1)}}, "range of two ends"),
        ({"features": {"left_gripper": "left_joint_1.pos"}}, "two channels"),
        ({"rate_hz": 0.0}, "expected 1 to 500"),
        ({"speed": 1}, "speed"),
    ],
)
def test_options_that_do_not_fit_are_refused(motors, change, message):
    with pytest.raises(SpecError, match=message):
        map_features(parse_options({**options_for(motors), **change}), SPEC)


def test_map_inverted_range_turns_the_direction(motors):
    options = {**options_for(motors), "ranges": {"left_gripper": (0.08, 0.0)}}
    features = map_features(parse_options(options), SPEC)
    values = np.array([0.0] * 6 + [25.0])
    assert features.to_channels(values)[6] == pytest.approx(0.06)
    np.testing.assert_allclose(features.to_features(features.to_channels(values)), values)
    assert features.limits.position_max[6] == 0.08


def test_robot_name_gives_type_and_options():
    robot = load_robot("lerobot:so101_follower,units=deg,config.port=/dev/ttyACM0", SPEC)
    assert robot.world.options["type"] == "so101_follower"
    assert robot.world.options["config"] == {"port": "/dev/ttyACM0"}
    assert not robot.is_simulated
    with pytest.raises(SpecError, match="key=value"):
        load_robot("lerobot:so101_follower,units", SPEC)


def test_run_on_a_lerobot_robot_moves_it_and_ends_holding(motors):
    robot = load_robot("lerobot:bench_arm", SPEC)
    world = msgspec.structs.replace(robot.world, options=options_for(motors))
    robot = msgspec.structs.replace(robot, world=world)
    n_moved = [0]

    def watch(status):
        n_moved[0] += abs(motors[2, 0] - START_DEG[0]) > 0.5

    summary = run(
        RunOptions(
            spec=SPEC,
            robot=robot,
            policy=PolicyOptions(
                factory="gwp_edge.testing:create_scripted_policy",
                kwargs={"spec": SPEC, "swing_s": 1.0},
                limits=ObservationLimits(
                    frame_age_ns=2_000_000_000, state_age_ns=2_000_000_000, stall_ns=4_000_000_000
                ),
            ),
            motor=MotorOptions(
                feedback_warn_ns=1_000_000_000,
                feedback_hold_ns=2_000_000_000,
                feedback_fault_ns=4_000_000_000,
            ),
            duration_s=1.5,
            guardian_timeout_s=2.0,
            skip_checks=frozenset({"statistics", "first action"}),
        ),
        on_status=watch,
    )
    assert summary.outcome == "duration", summary.message
    assert n_moved[0] > 0
    assert (motors[0] == 1.0).all()
