"""Robot files: what fits, what does not, and what the message says."""

import importlib.metadata

import msgspec
import numpy as np
import pytest

from gwp_edge import robots
from gwp_edge.errors import SpecError
from gwp_edge.robot_config import ArmConfig, CameraConfig, ChannelLimits
from gwp_edge.robot_limits import intersect_limits
from gwp_edge.robots import create_arm, create_camera, load_robot, require_serials
from gwp_edge.testing import make_spec
from gwp_edge.types import JointLimits

FILE = """
name = "mine"
[arm]
kind = "kinematic"
guardian = false
[arm.options]
lag_s = 0.1
[[cameras]]
role = "cam_high"
kind = "kinematic"
[world]
kind = "kinematic"
[limits.left_joint_1]
velocity_max = 0.5
[park]
left_joint_1 = 0.0
left_joint_2 = 1.0
left_joint_3 = -1.0
left_joint_4 = 0.0
left_joint_5 = 0.0
left_joint_6 = 0.0
left_gripper = 0.0
"""

WORLD = '[world]\nkind = "kinematic"\n'
CAMERA = 'role = "cam_high"\nkind = "kinematic"\n'
REALSENSE = 'role = "cam_high"\nkind = "realsense"\noptions = { serial = "1", fps = "x" }\n'


def _write(tmp_path, text):
    path = tmp_path / "robot.toml"
    path.write_text(text)
    return str(path)


def test_robot_file_is_read(tmp_path):
    robot = load_robot(_write(tmp_path, FILE), make_spec())
    assert robot.arm.options == {"lag_s": 0.1}
    assert not robot.arm.guardian
    assert robot.limits["left_joint_1"].velocity_max == 0.5


def test_robot_file_with_a_byte_order_mark_is_read(tmp_path):
    """Editors of Windows put one in front; it was an invalid statement in line 1."""
    robot = load_robot(_write(tmp_path, f"\ufeff{FILE}"), make_spec())
    assert robot.arm.options == {"lag_s": 0.1}


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ('kind = "kinematic"\nguardian', "guardian", "kind"),
        ('name = "mine"', 'nom = "mine"', "nom"),
        ("lag_s = 0.1", "lag_s = ", "at line"),
        ('role = "cam_high"', 'role = "cam_low"', "cam_high"),
        ("limits.left_joint_1", "limits.left_joint_9", "left_joint_9"),
        ("velocity_max = 0.5", 'velocity_max = "fast"', "velocity_max"),
        # These were once found by the processes of a run only, and said three times.
        (WORLD, "", r'kinematic: lives in a world: add \[world\] kind = "kinematic"'),
        (CAMERA, CAMERA + "options = { lag = 1 }\n", "lag"),
        (CAMERA, REALSENSE, "fps"),
        (WORLD, WORLD + "options = { lag = 1 }\n", "lag"),
        ("left_gripper = 0.0\n", "", "park pose: expected a value for each of"),
        ("left_joint_2 = 1.0", "left_joint_2 = 57.3", "left_joint_2: 57.3 .* is it in degrees"),
        ("left_gripper = 0.0", "left_gripper = 70", "left_gripper: 70 .* in m; is it in mm"),
        ("velocity_max = 0.5", "velocity_max = 180", "left_joint_1: 180 .* is it in degrees"),
        ("velocity_max = 0.5", "position_min = -90", "left_joint_1: -90 .* is it in degrees"),
    ],
)
def test_robot_file_that_does_not_fit_names_what(tmp_path, old, new, words):
    assert old in FILE
    with pytest.raises(SpecError, match=f"robot.toml: .*{words}"):
        load_robot(_write(tmp_path, FILE.replace(old, new)), make_spec())


def test_unknown_robot_names_the_known_ones_and_the_nearest():
    with pytest.raises(SpecError, match="did you mean kinematic"):
        load_robot("kinematik", make_spec())
    with pytest.raises(SpecError, match="cannot read it"):
        load_robot("/nowhere/robot.toml", make_spec())


def test_built_in_robots_have_a_camera_for_every_role():
    cameras = ("cam_high", "cam_left_wrist", "cam_right_wrist")
    spec = make_spec(2, cameras=cameras)
    for name in ("kinematic", "sim", "piper-dual"):
        assert tuple(c.role for c in load_robot(name, spec).cameras) == cameras
    with pytest.raises(SpecError, match=r"no serial number for cam_high, cam_left.*--write"):
        require_serials(load_robot("piper-dual", spec))
    require_serials(load_robot("piper-dual", make_spec(2)))
    require_serials(load_robot("sim", spec))
    with pytest.raises(SpecError, match="use --robot piper-dual"):
        load_robot("piper", spec)
    with pytest.raises(SpecError, match="use --robot piper "):
        load_robot("piper-dual", make_spec(1))


def test_unknown_kind_and_bad_option_are_refused(tmp_path):
    spec = make_spec()
    tank = _write(tmp_path, FILE.replace('[arm]\nkind = "kinematic"', '[arm]\nkind = "tank"'))
    with pytest.raises(SpecError, match=r"robot.*toml: arm kind 'tank' is not known; there are"):
        load_robot(tank, spec)
    with pytest.raises(SpecError, match=r"robot.*toml: .*lagg_s"):
        load_robot(_write(tmp_path, FILE.replace("lag_s", "lagg_s")), spec)
    robot = load_robot("kinematic", spec)
    robot = msgspec.structs.replace(robot, arm=ArmConfig(kind="kinematic", options={"lagg_s": 1}))
    with pytest.raises(SpecError, match="lagg_s"):
        create_arm(robot, spec, {"kinematic_segment": "x"})


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        ("velocity_max = 0.0", r"velocity_max: expected a positive number, got 0\.0"),
        ("acceleration_max = nan", "acceleration_max: expected a positive number, got nan"),
        ("position_min = inf", "position_min: expected a finite number, got inf"),
        ("position_min = 1.0\nposition_max = 0.5", r"position_min 1\.0 is not below"),
    ],
)
def test_limits_that_cannot_be_meant_are_refused_with_the_file(tmp_path, lines, words):
    """They used to end a run after all its processes had started, without a name."""
    path = _write(tmp_path, FILE + f"\n[limits.left_joint_3]\n{lines}\n")
    with pytest.raises(SpecError, match=f"robot file .*toml: limits of left_joint_3: {words}"):
        load_robot(path, make_spec())


def test_park_pose_that_is_no_number_is_refused(tmp_path):
    path = _write(tmp_path, FILE.replace("left_joint_1 = 0.0", "left_joint_1 = nan"))
    with pytest.raises(SpecError, match="park: left_joint_1 is nan"):
        load_robot(path, make_spec())


def test_every_registered_factory_exists_or_names_its_extra():
    for registry in (robots.ARMS, robots.CAMERAS, robots.WORLDS):
        for reference in registry.values():
            module, _, function = reference.partition(":")
            assert module.startswith("gwp_edge.drivers.")
            assert function.startswith("create_")


def test_limits_only_ever_tighten():
    spec = make_spec()
    D = spec.n_channels
    own = JointLimits(
        position_min=np.full(D, -1.0),
        position_max=np.full(D, 1.0),
        velocity_max=np.full(D, 2.0),
        acceleration_max=np.full(D, 5.0),
    )
    overrides = {
        "left_joint_1": ChannelLimits(position_min=-2.0, position_max=0.5, velocity_max=9.0),
        "left_joint_2": ChannelLimits(velocity_max=0.1, acceleration_max=1.0),
    }
    tight = intersect_limits(own, overrides, spec.channels)
    assert (tight.position_min[0], tight.position_max[0], tight.velocity_max[0]) == (-1, 0.5, 2)
    assert (tight.velocity_max[1], tight.acceleration_max[1]) == (0.1, 1.0)
    with pytest.raises(SpecError, match="elbow"):
        intersect_limits(own, {"elbow": ChannelLimits()}, spec.channels)
    with pytest.raises(SpecError, match="below position_max"):
        intersect_limits(own, {"left_joint_1": ChannelLimits(position_min=3.0)}, spec.channels)


PIPER_FILE = FILE.replace('kind = "kinematic"\nguardian = false', 'kind = "piper"').replace(
    "lag_s = 0.1", 'can = "can_left"'
)


def test_real_arm_before_simulated_cameras_is_no_simulated_robot(tmp_path):
    """Else nobody would compare the plan with the pose before a real arm moves."""
    assert load_robot(_write(tmp_path, FILE), make_spec()).is_simulated
    robot = load_robot(_write(tmp_path, PIPER_FILE), make_spec())
    assert robot.world is not None
    assert not robot.is_simulated
    disturbed = msgspec.structs.replace(
        robot, arm=ArmConfig(kind="disturbed", options={"disturbed_kind": "kinematic"})
    )
    assert disturbed.is_simulated


def test_driver_is_chosen_for_piper_arms_only(tmp_path):
    path = _write(tmp_path, PIPER_FILE)
    assert load_robot(path, make_spec()).arm.options == {"can": "can_left"}
    robot = load_robot(path, make_spec(), driver="piper-sdk")
    assert robot.arm.options == {"can": "can_left", "driver": "piper-sdk"}
    assert load_robot("piper", make_spec(), driver="native").arm.options["driver"] == "native"
    with pytest.raises(SpecError, match="only PiPER arms"):
        load_robot("kinematic", make_spec(), driver="piper-sdk")


@pytest.mark.parametrize(
    ("new", "driver", "words"),
    [
        ('can = "can_left"', "sdk", "driver"),
        ('left = "can0"\nright = "can0"', None, "one CAN bus cannot carry two arms"),
        ("speed = 3", None, "speed"),
    ],
)
def test_piper_options_are_refused_before_anything_starts(tmp_path, new, driver, words):
    path = _write(tmp_path, PIPER_FILE.replace('can = "can_left"', new))
    with pytest.raises(SpecError, match=words):
        load_robot(path, make_spec(), driver=driver)


class FixedCamera:
    """A third party's camera."""

    def __init__(self, role, port):
        self.name, self.port = role, port


def create_fixed_camera(role, options, spec):
    return FixedCamera(role, **options)


def test_camera_of_a_third_party_is_found_by_its_entry_point(monkeypatch):
    entry = importlib.metadata.EntryPoint(
        "fixed", f"{__name__}:create_fixed_camera", "gwp_edge.cameras"
    )
    monkeypatch.setattr(
        importlib.metadata, "entry_points", lambda group: [entry] if group == entry.group else []
    )
    config = CameraConfig(role="cam_high", kind="fixed", options={"port": 3})
    camera = create_camera(config, make_spec(), {})
    assert (camera.name, camera.port) == ("cam_high", 3)
    other = msgspec.structs.replace(config, kind="fixt")
    with pytest.raises(SpecError, match=r"camera kind 'fixt' is not known; there are .*fixed"):
        create_camera(other, make_spec(), {})
