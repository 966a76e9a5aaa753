"""The simulated robot in real time: arm and cameras by their contracts, and a clean end."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import msgspec
import numpy as np
import pytest

from gwp_edge.drivers import sim
from gwp_edge.drivers.sim_segment import SimSegment
from gwp_edge.errors import DeviceError, SafetyFault, SpecError
from gwp_edge.shared_memory import SHM_DIR, SharedSegment
from gwp_edge.spec import Channel
from gwp_edge.testing import make_spec

pytest.importorskip("mujoco")
pytestmark = pytest.mark.sim

CAMERAS = ("cam_high", "cam_left_wrist", "cam_right_wrist")
OPTIONS = {"width_px": 96, "height_px": 64, "seed": 3}
PATIENCE_S = 60.0


SPEC = make_spec(2, cameras=CAMERAS)
SINGLE_SPEC = make_spec(1)
ANGLES_ONLY = msgspec.structs.replace(
    SINGLE_SPEC,
    channels=tuple(Channel(name=c.name, unit="rad", kind="delta") for c in SINGLE_SPEC.channels),
)


def wait_for(condition, what: str) -> None:
    """Wait as long as a loaded machine may need; the answer, not the time, is tested."""
    deadline_s = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline_s, f"{what} did not happen in {PATIENCE_S} s"
        time.sleep(0.01)


def segments_of(extra: dict) -> list[Path]:
    return [SHM_DIR / name for name in (extra["sim_segment"], *extra["sim_rings"].values())]


def process_lives(pid: int) -> bool:
    """Say whether ``pid`` runs; a zombie that its new parent has not reaped does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.fixture(scope="module")
def running():
    world = sim.create_world(OPTIONS, SPEC)
    extra = {**OPTIONS, **world.start()}
    yield world, extra
    world.close()


@pytest.fixture
def arm(running):
    arm = sim.create_arm(running[1], SPEC)
    arm.open(enable=True)
    yield arm
    arm.close()


# -- arm --------------------------------------------------------------------------------------


def test_arm_open_and_enable_does_not_move(running):
    arm = sim.create_arm(running[1], SPEC)
    arm.open(enable=False)
    wait_for(lambda: np.abs(arm.state().velocity).max() < 1e-3, "rest")
    before = arm.state()
    arm.close()
    arm.open(enable=True)
    wait_for(lambda: arm.state().t_received_ns > before.t_received_ns + 200_000_000, "0.2 s")
    state = arm.state()
    assert state.enabled
    assert state.fault is None
    np.testing.assert_allclose(state.position, before.position, atol=2e-3)
    arm.close()


def test_arm_reaches_command_and_holds_it(arm):
    limits = arm.limits
    assert arm.channels == SPEC.channels
    target = np.clip(arm.state().position + 0.03, limits.position_min, limits.position_max)
    arm.send(target)
    wait_for(lambda: np.allclose(arm.state().position, target, atol=1e-3), "reaching the target")
    t_ns = arm.state().t_received_ns
    wait_for(lambda: arm.state().t_received_ns > t_ns + 200_000_000, "0.2 s")
    np.testing.assert_allclose(arm.state().position, target, atol=1e-3)
    assert arm.state().velocity.shape == target.shape


def test_arm_state_is_fresh_and_read_only(arm):
    first = arm.state()
    assert 0 <= time.monotonic_ns() - first.t_received_ns < 1_000_000_000
    wait_for(lambda: arm.state().t_received_ns > first.t_received_ns, "a newer state")
    with pytest.raises(ValueError, match="read-only"):
        first.position[0] = 0.0


@pytest.mark.parametrize("value", [np.nan, np.inf, -7.0])
def test_arm_bad_command_is_refused_and_nothing_is_sent(arm, running, value):
    segment = SimSegment.attach(running[1]["sim_segment"], 2)
    n_sent = segment.commands.count
    command = arm.state().position.copy()
    command[2] = value
    with pytest.raises(SafetyFault, match="nothing sent"):
        arm.send(command)
    with pytest.raises(SafetyFault, match="nothing sent"):
        arm.send(command[:7])
    assert segment.commands.count == n_sent
    segment.close()


def test_arm_not_open_refuses_everything(running):
    arm = sim.create_arm(running[1], SPEC)
    with pytest.raises(DeviceError, match="not open"):
        arm.state()
    with pytest.raises(DeviceError, match="not open"):
        arm.send(np.clip(np.zeros(14), arm.limits.position_min, arm.limits.position_max))
    arm.close()
    arm.close()


def test_arm_hold_stops_motion_near_first_measured_pose_and_stays(running, arm):
    """As the guardian does it: on a second connection, without enable, again and again."""
    target = arm.state().position.copy()
    target[0] += 1.0 if target[0] < 0 else -1.0
    target[[6, 13]] = 0.03
    arm.send(target)
    wait_for(lambda: abs(arm.state().velocity[0]) > 0.5, "motion")
    guardian = sim.create_arm(running[1], SPEC)
    guardian.open(enable=False)
    guardian.hold()
    held = arm.state().position

    def rests() -> bool:
        guardian.hold()
        return np.abs(guardian.state().velocity).max() < 1e-3

    wait_for(rests, "rest")
    assert guardian.state().enabled
    assert abs(guardian.state().position[0] - target[0]) > 0.1
    np.testing.assert_allclose(guardian.state().position, held, atol=0.1)
    guardian.close()


def test_arm_holds_last_target_after_close(running):
    arm = sim.create_arm(running[1], SPEC)
    arm.open(enable=True)
    target = arm.state().position.copy()
    target[0] += 0.1 if target[0] < 0 else -0.1
    target[[6, 13]] = 0.03
    arm.send(target)
    arm.close()
    arm.open(enable=False)
    wait_for(lambda: np.allclose(arm.state().position, target, atol=1e-3), "reaching the target")
    arm.close()


# -- cameras ----------------------------------------------------------------------------------


@pytest.mark.parametrize("role", CAMERAS)
def test_camera_delivers_new_stamped_frames(running, role):
    camera = sim.create_camera(role, running[1], SPEC)
    camera.open()
    wait_for(lambda: camera.latest() is not None, "a first frame")
    first = camera.latest()
    wait_for(lambda: camera.latest().frame_idx > first.frame_idx, "a second frame")
    second = camera.latest()
    assert (first.camera, first.image.shape, first.domain) == (role, (64, 96, 3), "sim")
    assert first.t_captured_ns < second.t_captured_ns <= second.t_received_ns
    assert second.t_received_ns <= time.monotonic_ns()
    assert first.image.std() > 5
    camera.close()
    camera.close()
    with pytest.raises(DeviceError, match="not open"):
        camera.latest()


def test_camera_frame_shows_the_moment_of_its_stamp(running, arm):
    """A frame from after a move differs from one before it, and its stamp says so."""
    camera = sim.create_camera("cam_high", running[1], SPEC)
    camera.open()
    start = np.clip(arm.state().position, arm.limits.position_min, arm.limits.position_max)
    target = start.copy()
    target[0] += 0.6 if start[0] < 0 else -0.6
    wait_for(lambda: camera.latest() is not None, "a first frame")
    before = camera.latest()
    arm.send(target)
    wait_for(lambda: np.allclose(arm.state().position, target, atol=1e-3), "reaching the target")
    t_reached_ns = arm.state().t_received_ns
    wait_for(lambda: camera.latest().t_captured_ns > t_reached_ns, "a frame of the new pose")
    change = np.abs(camera.latest().image.astype(int) - before.image.astype(int)).max(axis=2)
    assert (change > 40).mean() > 0.005
    camera.close()


# -- world ------------------------------------------------------------------------------------


def test_world_keeps_real_time_unless_it_says_so(running):
    """Steps done and time given up add up to the time that passed, on any machine."""
    world, extra = running
    world.check()
    with pytest.raises(DeviceError, match="runs already"):
        world.start()
    wait_for(lambda: world.real_time_factor > 0, "a step")
    assert world.backend in ("egl", "osmesa")
    wait_for(lambda: world.drawing_ms > 0, "a picture")
    segment = SimSegment.attach(extra["sim_segment"], 2)
    words = segment.words
    elapsed_ns = time.monotonic_ns() - words[2]
    accounted_ns = words[3] * 2_000_000 + words[4]
    segment.close()
    # Behind by up to 0.1 s before time is given up, and a step while this line runs.
    assert accounted_ns == pytest.approx(elapsed_ns, abs=500_000_000)


def test_new_world_is_not_enabled_and_says_when_its_physics_is_killed():
    world = sim.create_world(OPTIONS, SPEC)
    extra = world.start()
    arm = sim.create_arm(extra, SPEC)
    world.check()
    arm.open(enable=False)
    assert not arm.state().enabled
    with pytest.raises(DeviceError, match="for reading only"):
        arm.send(arm.state().position)
    physics_pid = world.process_ids[0]
    os.kill(physics_pid, signal.SIGKILL)

    def physics_is_missed() -> bool:
        # The kernel reports the end once the last thread is gone, a moment after the first.
        try:
            world.check()
        except DeviceError as e:
            return "physics has ended with exit code -9" in str(e)
        return False

    wait_for(physics_is_missed, "the world's error")

    def arm_is_gone() -> bool:
        try:
            arm.state()
        except DeviceError as e:
            return "sends no joint states" in str(e)
        return False

    wait_for(arm_is_gone, "the arm's error")
    arm.close()
    world.close()
    world.close()
    assert not any(path.exists() for path in segments_of(extra))


def test_world_close_fails_cameras_and_leaves_nothing():
    world = sim.create_world(OPTIONS, SPEC)
    extra = world.start()
    camera = sim.create_camera("cam_high", extra, SPEC)
    camera.open()
    pids = world.process_ids
    assert all(path.exists() for path in segments_of(extra))
    world.close()
    with pytest.raises(DeviceError, match="has been closed"):
        camera.latest()
    camera.close()
    assert not any(process_lives(pid) for pid in pids)
    assert not any(path.exists() for path in segments_of(extra))
    with pytest.raises(DeviceError, match="not running"):
        world.check()


PARENT = """
import json, os, sys, time
sys.path.insert(0, {tests!r})
from test_sim_contract import OPTIONS, SPEC
from gwp_edge.drivers import sim
if __name__ == "__main__":
    world = sim.create_world(OPTIONS, SPEC)
    extra = world.start()
    print(json.dumps([world.process_ids, dict(extra)]), flush=True)
    time.sleep(600)
"""


def test_world_whose_parent_is_killed_ends_and_leaves_nothing(tmp_path):
    script = tmp_path / "parent.py"
    script.write_text(PARENT.format(tests=str(Path(__file__).parent)))
    with subprocess.Popen(
        [sys.executable, str(script)], stdout=subprocess.PIPE, text=True, start_new_session=True
    ) as parent:
        pids, extra = json.loads(parent.stdout.readline())
        assert len(pids) == 2
        assert all(process_lives(pid) for pid in pids)
        parent.kill()
        parent.wait()
    wait_for(lambda: not any(process_lives(pid) for pid in pids), "the end of the processes")
    assert not any(path.exists() for path in segments_of(extra))


def test_world_without_renderer_names_the_packages(monkeypatch):
    """EGL is asked for and its library hidden: no start, no fallback, nothing left behind."""
    made: list[Path] = []
    create = SharedSegment.create

    def create_and_note(name: str, n_bytes: int) -> SharedSegment:
        made.append(SHM_DIR / name)
        return create(name, n_bytes)

    monkeypatch.setattr(SharedSegment, "create", create_and_note)
    monkeypatch.setenv("MUJOCO_GL", "egl")
    monkeypatch.setenv("PYOPENGL_PLATFORM", "osmesa")
    world = sim.create_world(OPTIONS, SPEC)
    with pytest.raises(DeviceError, match="apt-get install libegl1"):
        world.start()
    assert len(made) == 1 + len(CAMERAS)
    assert not any(path.exists() for path in made)
    assert world.process_ids == ()


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (make_spec(1, cameras=CAMERAS), "one wrist camera"),
        (make_spec(1, cameras=("cam_odd",)), "cam_odd: expected a mount"),
        (ANGLES_ONLY, "one or two PiPER arms"),
    ],
)
def test_world_of_unfit_spec_is_refused(spec, message):
    with pytest.raises(SpecError, match=message):
        sim.create_world({}, spec)


def test_mount_of_no_camera_is_refused_by_its_name():
    """A mistyped name left the camera at its ordinary place, without a word."""
    mounts = {"cam_hi": "front", "cam_left_wrist": "left_wrist"}
    with pytest.raises(SpecError) as refused:
        sim.create_world({**OPTIONS, "mounts": mounts}, SPEC)
    assert str(refused.value) == (
        "option mounts of the sim: cam_hi is no camera of the robot; it has cam_high, "
        "cam_left_wrist, cam_right_wrist"
    )


def test_arm_and_camera_without_world_are_refused(running):
    with pytest.raises(SpecError, match="world in the robot file"):
        sim.create_arm({}, SPEC)
    with pytest.raises(SpecError, match="world in the robot file"):
        sim.create_camera("cam_high", {}, SPEC)
    with pytest.raises(SpecError, match="no camera cam_back"):
        sim.create_camera("cam_back", running[1], SPEC)
    with pytest.raises(SpecError, match="unknown field `can`; options are"):
        sim.create_arm({**running[1], "can": "can0"}, SPEC)
    arm = sim.create_arm(running[1], SINGLE_SPEC)
    with pytest.raises(DeviceError, match="has 2 arms"):
        arm.open(enable=False)
