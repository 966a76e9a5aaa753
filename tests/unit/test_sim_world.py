"""The simulated table-top in one process: kinematics, motion, gripper, pictures, options."""

import numpy as np
import pytest

from gwp_edge.drivers import piper_model, sim_model
from gwp_edge.drivers.sim_options import SimOptions, parse_options
from gwp_edge.drivers.sim_world import SimWorld
from gwp_edge.errors import SafetyFault, SpecError

pytest.importorskip("mujoco")
pytestmark = pytest.mark.sim

DUAL_CAMERAS = ("cam_high", "cam_left_wrist", "cam_right_wrist")
ONE_SECOND = 500  # steps


def _options(**values) -> SimOptions:
    return SimOptions(width_px=160, height_px=120, **values)


def _random_position(n_arms: int, seed: int) -> np.ndarray:
    limits = piper_model.joint_limits(n_arms)
    return np.random.default_rng(seed).uniform(limits.position_min, limits.position_max)


def _over_table(x_m: float, y_m: float, z_m: float, opening_m: float) -> np.ndarray:
    """Command of one arm with the tool pointing down at a place."""
    target = np.diag([-1.0, 1.0, -1.0, 1.0])
    target[:3, 3] = x_m, y_m, z_m
    joints = piper_model.solve_joints(target, np.array([0.0, 1.4, -1.2, 0.0, 1.0, 0.0]))
    return np.append(joints, opening_m)


@pytest.fixture(scope="module")
def dual():
    with SimWorld(2, DUAL_CAMERAS, _options()) as world:
        yield world


# -- kinematics -------------------------------------------------------------------------------


@pytest.mark.parametrize("n_arms", [1, 2])
def test_link_poses_equal_piper_kinematics(n_arms):
    """The model's bodies against our DH product, which another test holds to the vendor's."""
    for seed in range(20):
        position = _random_position(n_arms, seed)
        world = SimWorld(n_arms, (), _options(start_position=tuple(position)))
        for arm_idx in range(n_arms):
            joints = position[7 * arm_idx : 7 * arm_idx + 6]
            base = sim_model.arm_base(n_arms, arm_idx)
            for link_idx, wanted in enumerate(piper_model.link_poses(joints)):
                wanted[:3, 3] += base
                np.testing.assert_allclose(world.link_pose(arm_idx, link_idx), wanted, atol=1e-6)
            tool = piper_model.tool_pose(joints)
            tool[:3, 3] += base
            np.testing.assert_allclose(world.tool_pose(arm_idx), tool, atol=1e-6)


def test_link_positions_equal_vendor_kinematics():
    kinematics = pytest.importorskip("piper_sdk.kinematics.piper_fk")
    vendor = kinematics.C_PiperForwardKinematics(dh_is_offset=0x01)
    for seed in range(20):
        position = _random_position(1, seed)
        world = SimWorld(1, (), _options(start_position=tuple(position)))
        theirs_m = np.array(vendor.CalFK(list(position[:6])))[:, :3] / 1000
        ours_m = [world.link_pose(0, i)[:3, 3] for i in range(6)]
        np.testing.assert_allclose(ours_m, theirs_m, atol=1e-4)


def test_left_arm_comes_first_and_stands_on_the_left(dual):
    assert sim_model.arm_prefixes(2) == ("left", "right")
    dual.reset(0)
    assert dual.tool_pose(0)[1, 3] > 0.2 > -0.2 > dual.tool_pose(1)[1, 3]
    target = dual.position
    target[0] += 0.3
    right_before = dual.tool_pose(1)
    dual.step(target, n_steps=ONE_SECOND)
    assert dual.position[0] == pytest.approx(target[0], abs=1e-3)
    np.testing.assert_allclose(dual.tool_pose(1), right_before, atol=1e-4)


# -- motion -----------------------------------------------------------------------------------


def test_arm_reaches_commanded_pose_and_holds_it_against_gravity(dual):
    dual.reset(1)
    target = np.array(sim_model.READY * 2)
    target += np.tile([0.4, 0.3, -0.3, 0.5, -0.4, 0.6, -0.03], 2)
    dual.step(target, n_steps=2 * ONE_SECOND)
    np.testing.assert_allclose(dual.position, target, atol=1e-3)
    dual.step(n_steps=2 * ONE_SECOND)
    np.testing.assert_allclose(dual.position, target, atol=1e-3)
    assert np.abs(dual.velocity).max() < 1e-3


def test_step_far_command_keeps_speed_and_acceleration_and_does_not_overshoot():
    limits = piper_model.joint_limits(1)
    start = np.array([-2.4, 1.3, -1.1, 0.0, 1.1, 0.0, 0.0])
    target = np.array([2.4, 1.3, -1.1, 0.0, 0.2, 1.5, 0.07])
    world = SimWorld(1, (), _options(start_position=tuple(start)))
    velocities, positions = [], []
    for _ in range(4 * ONE_SECOND):
        world.step(target)
        velocities.append(world.velocity)
        positions.append(world.position)
    peak = np.abs(velocities).max(axis=0)
    assert (peak <= 1.05 * limits.velocity_max + 0.05).all()
    assert peak[0] > 0.95 * limits.velocity_max[0]  # 4.8 rad: it does get to full speed
    acceleration = np.abs(np.diff(velocities, axis=0)) / (world.period_ns * 1e-9)
    assert acceleration[:, 0].max() < 1.2 * limits.acceleration_max[0]
    np.testing.assert_allclose(positions[-1], target, atol=1e-3)
    assert np.max(positions, axis=0)[0] < target[0] + 2e-3


def test_measured_velocity_is_derivative_of_measured_position():
    world = SimWorld(1, (), _options())
    target = world.position + np.array([0.5, 0.3, -0.3, 0.4, -0.3, 0.4, -0.04])
    world.step(target, n_steps=100)
    before, velocity_before = world.position, world.velocity
    world.step()
    slope = (world.position - before) / (world.period_ns * 1e-9)
    np.testing.assert_allclose(slope, (velocity_before + world.velocity) / 2, atol=2e-2)
    assert np.abs(velocity_before[[0, 6]]).min() > 0.02


def test_gripper_opening_is_metres_between_the_pads():
    world = SimWorld(1, (), _options())
    for opening_m in (0.0, 0.035, 0.07):
        target = world.target.copy()
        target[6] = opening_m
        world.step(target, n_steps=2 * ONE_SECOND)
        assert world.position[6] == pytest.approx(opening_m, abs=1e-3)
        a, b = (world.body_pose(f"arm_finger_{side}")[:3, 3] for side in "ab")
        pad_thickness_m = 0.014
        assert np.linalg.norm(a - b) == pytest.approx(opening_m + pad_thickness_m, abs=1e-3)
        middle = (a + b) / 2
        across = (a - b) / np.linalg.norm(a - b)
        assert (middle - world.tool_pose()[:3, 3]) @ across == pytest.approx(0.0, abs=1e-3)


def test_gripper_picks_cube_up():
    objects = {"red_cube": (0.3, 0.0, 0.0), "blue_cube": (0.3, 0.2, 0.0)}
    world = SimWorld(1, (), _options(objects=objects))
    assert not world.touching("red_cube")
    world.step(_over_table(0.3, 0.0, 0.10, 0.07), n_steps=2 * ONE_SECOND)
    world.step(_over_table(0.3, 0.0, 0.02, 0.07), n_steps=ONE_SECOND)
    world.step(_over_table(0.3, 0.0, 0.02, 0.0), n_steps=ONE_SECOND)
    assert world.touching("red_cube")
    assert world.position[6] == pytest.approx(2 * sim_model.CUBE_HALF_M, abs=3e-3)
    world.step(_over_table(0.3, 0.0, 0.10, 0.0), n_steps=2 * ONE_SECOND)
    assert world.body_pose("red_cube")[2, 3] > 0.08
    assert not world.touching("blue_cube")


def test_arm_pressed_on_table_stops_there():
    world = SimWorld(
        1, (), _options(objects={"red_cube": (0.3, 0.3, 0), "blue_cube": (0.3, -0.3, 0)})
    )
    target = _over_table(0.3, 0.0, 0.02, 0.0)
    world.step(target, n_steps=2 * ONE_SECOND)
    target[1] += 0.5
    world.step(target, n_steps=2 * ONE_SECOND)
    assert world.tool_pose()[2, 3] > 0.0
    assert np.abs(world.velocity).max() < 0.05


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({0: np.nan}, "not finite"),
        ({3: np.inf}, "not finite"),
        ({1: -0.01}, "channel 1"),
        ({6: 0.0711}, "channel 6"),
    ],
)
def test_command_beyond_protocol_is_refused_and_keeps_the_last(dual, change, message):
    dual.reset(0)
    before = dual.target.copy()
    command = before.copy()
    for i, value in change.items():
        command[i] = value
    with pytest.raises(SafetyFault, match=message):
        dual.step(command)
    np.testing.assert_array_equal(dual.target, before)
    assert dual.time_ns == 0


def test_command_of_wrong_length_is_refused(dual):
    with pytest.raises(SafetyFault, match=r"expected shape \(14,\)"):
        dual.command(np.zeros(7))


# -- pictures and seeds -----------------------------------------------------------------------


def _count(image: np.ndarray, colour: str) -> int:
    main, other = (0, 2) if colour == "red" else (2, 0)
    image = image.astype(int)
    strong = image[..., main] > 80
    return int((strong & (image[..., main] > 2 * image[..., other]) & (image[..., 1] < 90)).sum())


def test_same_seed_gives_same_pictures_and_states():
    def run(seed: int):
        with SimWorld(2, DUAL_CAMERAS, _options(lighting=1.0, seed=seed)) as world:
            world.step(world.position - 0.02, n_steps=50)
            return world.qpos, [world.render(role) for role in DUAL_CAMERAS]

    qpos, images = run(5)
    qpos_again, images_again = run(5)
    qpos_other, images_other = run(6)
    np.testing.assert_array_equal(qpos, qpos_again)
    np.testing.assert_array_equal(images, images_again)
    assert not np.array_equal(qpos, qpos_other)
    assert not np.array_equal(images, images_other)


def test_reset_equals_new_world(dual):
    dual.step(np.array(sim_model.READY * 2) - 0.02, n_steps=20)
    dual.reset(9)
    with SimWorld(2, DUAL_CAMERAS, _options(seed=9)) as fresh:
        np.testing.assert_array_equal(dual.qpos, fresh.qpos)
        np.testing.assert_array_equal(dual.render("cam_high"), fresh.render("cam_high"))


def test_lighting_changes_pictures_and_not_the_cubes():
    places, images = [], []
    for lighting in (0.0, 1.0):
        with SimWorld(1, ("cam_high",), _options(seed=4, lighting=lighting)) as world:
            places.append(world.qpos)
            images.append(world.render("cam_high").astype(int))
    np.testing.assert_array_equal(*places)
    assert np.abs(images[0] - images[1]).mean() > 2.0


@pytest.mark.parametrize("n_arms", [1, 2])
def test_both_cubes_are_seen_from_above_for_any_seed(n_arms):
    world = SimWorld(n_arms, ("cam_high",), _options())
    for seed in range(20):
        world.reset(seed)
        image = world.render("cam_high")
        assert image.shape == (120, 160, 3)
        assert _count(image, "red") > 10, f"seed {seed}"
        assert _count(image, "blue") > 10, f"seed {seed}"
    world.close()


def test_red_cube_is_on_its_side_of_the_picture():
    """Left of the arms is left in the picture, further away is up."""
    objects = {"red_cube": (0.25, 0.15, 0.0), "blue_cube": (0.38, -0.15, 0.0)}
    with SimWorld(2, ("cam_high",), _options(objects=objects)) as world:
        image = world.render("cam_high").astype(int)
    red = np.argwhere((image[..., 0] > 100) & (image[..., 2] < 60) & (image[..., 1] < 60))
    blue = np.argwhere((image[..., 2] > 100) & (image[..., 0] < 60) & (image[..., 1] < 90))
    assert red[:, 1].mean() < 80 < blue[:, 1].mean()
    assert red[:, 0].mean() > blue[:, 0].mean()


@pytest.mark.parametrize(("role", "channel"), [("cam_left_wrist", 6), ("cam_right_wrist", 13)])
def test_wrist_camera_sees_its_own_gripper(dual, role, channel):
    dual.reset(0)
    open_image = dual.render(role).astype(int)
    assert open_image.std() > 10
    target = dual.position
    target[channel] = 0.0
    dual.step(target, n_steps=ONE_SECOND)
    changed = np.abs(dual.render(role).astype(int) - open_image).max(axis=2) > 30
    assert changed.mean() > 0.01


def test_set_qpos_shows_what_the_other_world_shows(dual):
    dual.reset(3)
    dual.step(dual.position + 0.01, n_steps=30)
    with SimWorld(2, DUAL_CAMERAS, _options(seed=3)) as viewer:
        viewer.set_qpos(dual.qpos)
        for role in DUAL_CAMERAS:
            np.testing.assert_array_equal(viewer.render(role), dual.render(role))


def test_render_unknown_camera_is_refused(dual):
    with pytest.raises(SpecError, match="no camera cam_back"):
        dual.render("cam_back")


# -- options ----------------------------------------------------------------------------------


def test_single_arm_takes_any_one_wrist_role():
    for role in ("cam_wrist", "cam_left_wrist", "cam_right_wrist"):
        assert sim_model.camera_mounts(1, ("cam_high", role))[role] == "wrist"


def test_single_arm_with_two_wrist_roles_is_refused_unless_mounted_elsewhere():
    with pytest.raises(SpecError, match="one wrist camera"):
        sim_model.camera_mounts(1, DUAL_CAMERAS)
    mounts = sim_model.camera_mounts(1, DUAL_CAMERAS, {"cam_right_wrist": "front"})
    assert mounts["cam_right_wrist"] == "front"


@pytest.mark.parametrize("chosen", [None, {"cam_odd": "ceiling"}, {"cam_odd": "wrist"}])
def test_camera_without_mount_is_refused(chosen):
    with pytest.raises(SpecError, match="cam_odd: expected a mount of high"):
        sim_model.camera_mounts(2, ("cam_odd",), chosen)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sed": 1}, "unknown field `sed`"),
        ({"seed": -1}, "seed: expected 0"),
        ({"fps": 0}, "fps: expected"),
        ({"width_px": "wide"}, "width_px"),
        ({"lighting": float("nan")}, "lighting: expected"),
        ({"objects": {"green_cube": [0.3, 0, 0]}}, "no green_cube"),
        ({"objects": {"red_cube": [0.3, float("inf"), 0]}}, "must be finite"),
        ({"object_area_m": [0.4, 0.3, 0, 1]}, "object_area_m: expected"),
    ],
)
def test_bad_option_is_refused_by_name(options, message):
    with pytest.raises(SpecError, match=message):
        parse_options(options)


def test_options_of_running_world_are_left_aside():
    options = {"seed": "7", "sim_segment": "gwp-sim-x", "sim_rings": {"cam_high": "gwp-y"}}
    assert parse_options(options) == SimOptions(seed=7)


def test_area_without_room_for_both_cubes_is_refused():
    with pytest.raises(SpecError, match="no room for blue_cube"):
        SimWorld(1, (), _options(object_area_m=(0.30, 0.31, 0.0, 0.01)))


@pytest.mark.parametrize("start", [(0.0,) * 6, (0.0, -1.0, -1.0, 0.0, 0.0, 0.0, 0.0)])
def test_start_position_out_of_range_is_refused(start):
    with pytest.raises(SpecError, match="start_position"):
        SimWorld(1, (), _options(start_position=start))
