"""PiPER's kinematics against the vendor's own, and the inverse against the forward."""

import numpy as np
import pytest

from gwp_edge.drivers import piper_model
from gwp_edge.errors import SpecError


def _random_joints(seed: int) -> np.ndarray:
    low, high = piper_model.command_range(1)
    return np.random.default_rng(seed).uniform(low[:6], high[:6])


def test_link_poses_equal_vendor_kinematics():
    kinematics = pytest.importorskip("piper_sdk.kinematics.piper_fk")
    vendor = kinematics.C_PiperForwardKinematics(dh_is_offset=0x01)
    for seed in range(200):
        joints = _random_joints(seed)
        theirs_m = np.array(vendor.CalFK(list(joints)))[:, :3] / 1000
        ours_m = piper_model.link_poses(joints)[:, :3, 3]
        np.testing.assert_allclose(ours_m, theirs_m, atol=1e-6)


def test_end_pose_equals_vendor_kinematics():
    kinematics = pytest.importorskip("piper_sdk.kinematics.piper_fk")
    vendor = kinematics.C_PiperForwardKinematics(dh_is_offset=0x01)
    for joints in map(_random_joints, range(200)):
        x, y, z, *turns = piper_model.end_pose(joints)
        theirs = vendor.CalFK(list(joints))[-1]
        np.testing.assert_allclose((x, y, z), np.array(theirs[:3]) / 1000, atol=1e-6)
        apart = np.radians(theirs[3:]) - turns
        np.testing.assert_allclose(np.remainder(apart + np.pi, 2 * np.pi) - np.pi, 0.0, atol=1e-6)


@pytest.mark.parametrize(("joint_5_deg", "ry_deg"), [(5.0, 90.0), (185.0, -90.0)])
def test_end_pose_where_angles_are_not_unique_is_one_of_the_same_rotation(joint_5_deg, ry_deg):
    joints = np.array([0.4, 0.0, 0.0, 0.0, np.radians(joint_5_deg), 0.0])
    _, _, _, rx, ry, rz = piper_model.end_pose(joints)
    assert np.degrees(ry) == pytest.approx(ry_deg, abs=1e-4)
    assert rz == 0.0
    rotation = piper_model.link_poses(joints)[-1][:3, :3]
    np.testing.assert_allclose(_rotation(rx, ry, rz), rotation, atol=1e-5)


def _rotation(rx, ry, rz):
    cx, sx, cy, sy, cz, sz = (f(a) for a in (rx, ry, rz) for f in (np.cos, np.sin))
    about_x = np.array([[1, 0, 0], [0, cx, -sx], [0, sx, cx]])
    about_y = np.array([[cy, 0, sy], [0, 1, 0], [-sy, 0, cy]])
    about_z = np.array([[cz, -sz, 0], [sz, cz, 0], [0, 0, 1]])
    return about_z @ about_y @ about_x


def test_command_range_is_vendor_joint_limit():
    manager = pytest.importorskip("piper_sdk.piper_param.piper_param_manager")
    vendor = manager.C_PiperParamManager()
    low, high = piper_model.command_range(1)
    for i in range(6):
        wanted = vendor.GetJointLimitParam(f"j{i + 1}")
        np.testing.assert_allclose((low[i], high[i]), wanted, atol=2e-3)  # they round


def test_limits_lie_within_command_range():
    for n_arms in (1, 2):
        limits = piper_model.joint_limits(n_arms)
        low, high = piper_model.command_range(n_arms)
        assert limits.position_min.shape == (7 * n_arms,)
        assert (limits.position_min >= low).all()
        assert (limits.position_max <= high).all()


def test_tool_jacobian_equals_finite_differences():
    joints, step_rad = _random_joints(1), 1e-6
    jacobian = piper_model.tool_jacobian(joints)
    for i in range(6):
        moved = joints + step_rad * (np.arange(6) == i)
        change = piper_model.tool_pose(moved) - piper_model.tool_pose(joints)
        np.testing.assert_allclose(jacobian[:3, i], change[:3, 3] / step_rad, atol=1e-5)
        spin = (change[:3, :3] / step_rad) @ piper_model.tool_pose(joints)[:3, :3].T
        turned = np.array([spin[2, 1], spin[0, 2], spin[1, 0]])
        np.testing.assert_allclose(jacobian[3:, i], turned, atol=1e-5)


def test_solve_joints_reaches_pose_over_table():
    target = np.diag([-1.0, 1.0, -1.0, 1.0])
    for x_m, y_m in ((0.25, 0.0), (0.32, 0.15), (0.38, -0.15)):
        target[:3, 3] = x_m, y_m, 0.03
        joints = piper_model.solve_joints(target, np.array([0, 1.4, -1.2, 0, 1.0, 0]))
        np.testing.assert_allclose(piper_model.tool_pose(joints), target, atol=1.5e-3)


def test_solve_joints_out_of_reach_is_refused():
    target = np.diag([-1.0, 1.0, -1.0, 1.0])
    target[:3, 3] = 0.9, 0.0, 0.03
    with pytest.raises(SpecError, match="does not reach"):
        piper_model.solve_joints(target, np.zeros(6))


@pytest.mark.parametrize("joints", [np.zeros(5), np.full(6, np.nan)])
def test_link_poses_of_bad_joints_is_refused(joints):
    with pytest.raises(SpecError, match="6 finite joint angles"):
        piper_model.link_poses(joints)
