"""The tool stays inside of its box for any stream of targets, and no other limit pays for it."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gwp_edge.drivers import piper_model
from gwp_edge.drivers.piper_model import CHAIN, N_JOINTS, TOOL_OFFSET_M, tool_pose
from gwp_edge.errors import SpecError
from gwp_edge.safety import WORKSPACE, Limiter
from gwp_edge.testing import make_spec
from gwp_edge.workspace import Workspace, WorkspaceBox, find_arms

PERIOD_S = 0.005
LIMITS = piper_model.joint_limits(1)
READY = np.array([0.0, 1.0, -1.0, 0.0, 0.3, 0.0, 0.03])
AT_READY = np.array(CHAIN.tool_position(READY[:N_JOINTS].tolist()))
EPS = 1e-9

joints = st.lists(st.floats(-2.5, 2.5, allow_nan=False), min_size=N_JOINTS, max_size=N_JOINTS)


def box(margin_m=0.05):
    low, high = AT_READY - margin_m, AT_READY + margin_m
    return WorkspaceBox(min_m=tuple(low.tolist()), max_m=tuple(high.tolist()))


def limiter_in(a_box, *, n_arms=1):
    spec = make_spec(n_arms)
    names = ("arm",) if n_arms == 1 else ("left", "right")
    limits = piper_model.joint_limits(n_arms)
    arms = find_arms(dict.fromkeys(names, a_box), spec.channels, "piper")
    limiter = Limiter(
        limits,
        period_s=PERIOD_S,
        channels=spec.channels,
        refuse_far=False,
        workspace=arms if a_box is not None else (),
    )
    limiter.seed(np.tile(READY, n_arms))
    return limiter


def tools(commands):
    return np.array([tool_pose(q[:N_JOINTS])[:3, 3] for q in commands])


def check_joint_limits(commands):
    path = np.concatenate([READY[None], commands])
    v = np.concatenate([np.zeros((1, 7)), np.diff(path, axis=0) / PERIOD_S])
    a = np.diff(v, axis=0) / PERIOD_S
    assert (commands >= LIMITS.position_min - EPS).all()
    assert (commands <= LIMITS.position_max + EPS).all()
    assert (np.abs(v) <= LIMITS.velocity_max + 1e-6).all()
    assert (np.abs(a) <= LIMITS.acceleration_max + 1e-6).all()


@given(joints)
def test_tool_position_is_that_of_the_frames(angles):
    expected = tool_pose(np.array(angles))[:3, 3]
    np.testing.assert_allclose(CHAIN.tool_position(angles), expected, atol=1e-12)
    np.testing.assert_allclose(CHAIN.tool_positions(np.array([angles] * 2)), [expected] * 2)


@given(joints, joints)
def test_levers_bound_the_motion_of_the_tool(angles, others):
    moved = np.abs(np.subtract(others, angles)) @ np.array(CHAIN.levers_m)
    way = np.subtract(CHAIN.tool_position(others), CHAIN.tool_position(angles))
    assert np.linalg.norm(way) <= moved + 1e-12
    assert CHAIN.levers_m[-1] == TOOL_OFFSET_M


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.tuples(joints, st.integers(1, 80)), min_size=1, max_size=5),
    st.floats(0.005, 0.1),
    st.booleans(),
)
def test_any_targets_keep_the_tool_inside_and_every_other_limit(stretches, margin_m, brakes):
    a_box = box(margin_m)
    limiter = limiter_in(a_box)
    commands = []
    for target, n in stretches:
        for _ in range(n):
            commands.append(limiter.step(np.append(target, 0.03)).copy())
    for _ in range(150 if brakes else 0):
        commands.append(limiter.brake().copy())
    commands = np.array(commands)
    reached = tools(commands)
    assert (reached >= np.array(a_box.min_m) - EPS).all()
    assert (reached <= np.array(a_box.max_m) + EPS).all()
    check_joint_limits(commands)


@settings(max_examples=15, deadline=None)
@given(st.floats(-0.04, 0.04), st.floats(-0.04, 0.04), st.integers(20, 60))
def test_motion_that_stays_inside_passes_as_without_a_box(first_rad, second_rad, n):
    with_box, without = limiter_in(box(0.2)), limiter_in(None)
    for i in range(n):
        share = 0.5 - 0.5 * np.cos(np.pi * i / n)
        target = READY + share * np.array([first_rad, second_rad, 0.0, 0.0, 0.0, 0.0, 0.0])
        np.testing.assert_array_equal(with_box.step(target), without.step(target))
        assert not any(flag & WORKSPACE for flag in with_box.flags)


def test_tool_stops_near_the_wall_and_comes_back():
    """A wall is no trap: the arm stands close to it and follows again once the target is inside."""
    limiter = limiter_in(box(0.05))
    outside = READY + np.array([0.8, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0])
    for _ in range(400):
        command = limiter.step(outside).copy()
    (tool,) = tools([command])
    assert limiter.standing or np.abs(limiter.velocity).max() < 0.02
    assert 0.0 <= AT_READY[1] + 0.05 - tool[1] < 0.005
    assert all(flag & WORKSPACE for flag in limiter.flags[:N_JOINTS])
    assert not limiter.flags[N_JOINTS] & WORKSPACE
    for _ in range(600):
        command = limiter.step(READY).copy()
    np.testing.assert_allclose(command, READY, atol=1e-9)


def test_wall_of_one_arm_does_not_stop_the_other():
    limiter = limiter_in(box(0.02), n_arms=2)
    target = np.tile(READY, 2)
    target[0] += 0.8
    target[12] += 0.3
    for _ in range(600):
        command = limiter.step(target)
    assert command[0] < 0.2
    assert command[12] == pytest.approx(READY[5] + 0.3)


def test_start_outside_is_refused_with_the_axis():
    low, high = AT_READY + 0.01, AT_READY + 0.2
    a_box = WorkspaceBox(min_m=tuple(low.tolist()), max_m=tuple(high.tolist()))
    with pytest.raises(
        SpecError, match=r"tool of arm is outside of its workspace: x is .* by hand"
    ):
        limiter_in(a_box)


def test_share_of_a_wish_is_never_more_than_what_stops_inside():
    spec = make_spec()
    arms = find_arms({"arm": box(0.03)}, spec.channels, "piper")
    steps = (LIMITS.acceleration_max * PERIOD_S**2).tolist()
    workspace = Workspace(arms, steps)
    wish = [1.5 * PERIOD_S, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0]
    share = workspace.share(0, READY.tolist(), [0.0] * 7, wish)
    assert 0.0 < share < 1.0
    angle, speed = 0.0, share * wish[0]
    while speed > 0.0:
        angle += speed
        speed -= steps[0]
    stopped = CHAIN.tool_position([angle, *READY[1:N_JOINTS]])
    assert stopped[1] <= AT_READY[1] + 0.03


@pytest.mark.parametrize(
    ("boxes", "kind", "n_channels", "words"),
    [
        ({"left": None}, "piper", 7, r"expected \[workspace.arm\]"),
        ({"arm": None}, "piper", 14, r"the robot has left, right"),
        ({"arm": None}, "lerobot-robot", 7, "kinematics are known for PiPER arms alone"),
        ({"arm": None}, "piper", 6, "kinematics are known for PiPER arms alone"),
    ],
)
def test_arms_that_do_not_fit_are_refused(boxes, kind, n_channels, words):
    channels = make_spec(2).channels[:n_channels]
    with pytest.raises(SpecError, match=words):
        find_arms(dict.fromkeys(boxes, box()), channels, kind)


@pytest.mark.parametrize("low", [(0.5, 0.0, 0.0), (float("nan"), 0.0, 0.0), (-11.0, 0.0, 0.0)])
def test_box_that_is_none_is_refused(low):
    with pytest.raises(ValueError, match="min_m below max_m"):
        WorkspaceBox(min_m=low, max_m=(0.5, 0.5, 0.5))
