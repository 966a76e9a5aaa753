"""The policy process's loop with a board of its own: what leads a plan, and who is watched."""

import os
import threading
import time

import numpy as np
import pytest

from gwp_edge.errors import DeviceError
from gwp_edge.mailbox import Board
from gwp_edge.observe import ObservationLimits
from gwp_edge.policy_options import PolicyOptions, PolicySetup
from gwp_edge.policy_process import _Runner
from gwp_edge.robots import load_robot
from gwp_edge.status import Mode, PolicyPhase, Word
from gwp_edge.testing import create_scripted_policy, make_spec
from gwp_edge.types import ArmState, Chunk, Frame, Observation

MS = 1_000_000
LIMITS = ObservationLimits(
    frame_age_ns=400 * MS, state_age_ns=20_000 * MS, frame_skew_ns=100 * MS, stall_ns=800 * MS
)


class FreezingCamera:
    """Delivers until it is told to freeze."""

    name = "cam_high"

    def __init__(self):
        self.frozen_at_ns = None
        self.error = None

    def latest(self):
        if self.error is not None:
            raise self.error
        t_ns = self.frozen_at_ns or time.monotonic_ns()
        image = np.zeros((8, 8, 3), np.uint8)
        return Frame(
            camera=self.name, image=image, t_captured_ns=t_ns, t_received_ns=t_ns, frame_idx=0
        )


class Rig:
    def __init__(self, **options):
        self.spec = make_spec()
        self.D = self.spec.n_channels
        self.board = Board.create(self.D, self.spec.n_rows)
        self.motor = Board.attach(self.board.name, self.D, self.spec.n_rows)
        self.camera = FreezingCamera()
        setup = PolicySetup(
            board=self.board.name,
            spec=self.spec,
            robot=load_robot("kinematic", self.spec),
            supervisor_pid=os.getppid(),
        )
        self.runner = _Runner(
            self.board,
            create_scripted_policy(spec=self.spec, script="hold"),
            [self.camera],
            setup,
            PolicyOptions(factory="", limits=LIMITS, **options),
        )
        self.words = self.motor.words
        state = ArmState(
            position=np.array([0.0, 1.0, -1.0, 0.0, 0.3, 0.0, 0.03]),
            velocity=np.zeros(self.D),
            t_received_ns=time.monotonic_ns(),
            enabled=True,
        )
        self.motor.publish_state(state)

    def close(self):
        self.runner.close()
        self.motor.close()
        self.board.close()
        self.board.unlink()


@pytest.fixture
def make_rig():
    rigs = []

    def make(**options):
        rigs.append(Rig(**options))
        return rigs[-1]

    yield make
    for rig in rigs:
        rig.close()


def await_word(rig, word, value):
    deadline_s = time.monotonic() + 30.0
    while rig.words[word] != value and time.monotonic() < deadline_s:
        time.sleep(0.005)
    return rig.words[word] == value


@pytest.mark.parametrize("options", [{"replan_hz": 0.001}, {"synchronous": True}])
def test_cameras_are_watched_between_plans(make_rig, options):
    """A stall was once noticed with the next plan only, after the old one was executed."""
    rig = make_rig(**options)
    found = []

    def play():
        found.append(await_word(rig, Word.POLICY_PHASE, PolicyPhase.READY))
        rig.camera.frozen_at_ns = time.monotonic_ns()
        found.append(await_word(rig, Word.POLICY_CAMERA_STALL, 1))
        rig.camera.frozen_at_ns = None
        found.append(await_word(rig, Word.POLICY_CAMERA_STALL, 0))
        rig.words[Word.POLICY_STOP] = 1

    player = threading.Thread(target=play)
    player.start()
    rig.runner.run()
    player.join()
    assert found == [True, True, True]
    assert rig.words[Word.POLICY_N_STALE] == 1


class LongInference:
    """Makes a runner's policy wait inside ``predict``, as for a GPU, until it is let go."""

    def __init__(self, rig):
        self.began, self.let_go, self.ended = (threading.Event() for _ in range(3))
        predict = rig.runner._policy.predict

        def wait(observation, **how):
            if rig.words[Word.POLICY_PHASE] == PolicyPhase.READY:
                self.began.set()
                self.let_go.wait(30.0)
                self.ended.set()
            return predict(observation, **how)

        rig.runner._policy.predict = wait


def play_beside(rig, play):
    """Run the loop with ``play`` beside it, which is to end it; return the loop's error or None."""
    player = threading.Thread(target=play)
    player.start()
    try:
        rig.runner.run()
    except DeviceError as e:
        return e
    finally:
        player.join()
    return None


def test_cameras_are_watched_during_an_inference(make_rig):
    """A stall was once noticed after the inference only, which may take as long as the plan."""
    rig = make_rig()
    inference, found = LongInference(rig), []

    def play():
        found.append(inference.began.wait(30.0))
        rig.camera.frozen_at_ns = time.monotonic_ns()
        found.append(await_word(rig, Word.POLICY_CAMERA_STALL, 1))
        frozen_s = (time.monotonic_ns() - rig.camera.frozen_at_ns) / 1e9
        found.append(frozen_s > 0.8)
        rig.camera.frozen_at_ns = None
        found.append(await_word(rig, Word.POLICY_CAMERA_STALL, 0))
        found.append(not inference.ended.is_set())
        inference.let_go.set()
        # It is said by the loop itself, at its next look: two chunks are two looks.
        found.append(await_word(rig, Word.POLICY_N_CHUNKS, 2))
        rig.words[Word.POLICY_STOP] = 1

    assert play_beside(rig, play) is None
    assert found == [True] * 6
    said = [e.text for e in rig.motor.events["policy"].drain()]
    told = [text for text in said if text.startswith("during an inference: camera cam_high")]
    assert len(told) == 1


def test_camera_that_fails_during_an_inference_holds_at_once_and_ends_the_loop(make_rig):
    rig = make_rig()
    inference, found = LongInference(rig), []

    def play():
        found.append(inference.began.wait(30.0))
        rig.camera.error = DeviceError("camera cam_high: unplugged")
        found.append(await_word(rig, Word.POLICY_CAMERA_STALL, 1))
        found.append(not inference.ended.is_set())
        inference.let_go.set()

    assert str(play_beside(rig, play)) == "camera cam_high: unplugged"
    assert found == [True] * 3


def test_cameras_may_be_late_while_the_arm_is_being_enabled(make_rig):
    rig = make_rig()
    rig.words[Word.MOTOR_MODE] = Mode.CONNECTED
    rig.camera.frozen_at_ns = 1
    rig.runner._watch_cameras(time.monotonic_ns())
    assert rig.words[Word.POLICY_CAMERA_STALL] == 0


def publish(rig, idx, value):
    """Publish a chunk by hand; value may be NaN."""
    now_ns = time.monotonic_ns()
    frame = rig.camera.latest()
    chunk = Chunk(
        actions=np.full((rig.spec.n_rows, rig.D), value),
        t_observed_ns=now_ns,
        period_ns=rig.spec.period_ns,
        chunk_idx=idx,
    )
    observation = Observation(frames=(frame,), state=np.zeros(rig.D), t_state_ns=now_ns)
    rig.runner._publish(chunk, observation, now_ns)


def test_refused_plan_does_not_lead_the_next(make_rig):
    """A plan guided by an absurd one begins where that ended, and is refused too."""
    rig = make_rig()
    assert rig.runner._to_follow() is None
    publish(rig, 0, 0.1)
    assert rig.runner._to_follow().chunk_idx == 0  # nobody has judged it yet
    rig.words[Word.MOTOR_TAKEN] = 1
    publish(rig, 1, 9.0)
    assert rig.runner._to_follow().chunk_idx == 1
    rig.words[Word.MOTOR_REFUSED] = 2
    assert rig.runner._to_follow().chunk_idx == 0
    publish(rig, 2, 9.0)
    rig.words[Word.MOTOR_REFUSED] = 3
    assert rig.runner._to_follow().chunk_idx == 0
    publish(rig, 3, np.nan)
    assert rig.runner._to_follow().chunk_idx == 0
    publish(rig, 4, 0.2)
    assert rig.runner._to_follow().chunk_idx == 4
    rig.words[Word.MOTOR_TAKEN] = 5
    assert rig.runner._to_follow().chunk_idx == 4


def test_plan_that_the_motor_process_never_saw_does_not_lead(make_rig):
    rig = make_rig()
    for idx in range(3):
        publish(rig, idx, 0.1)
    rig.words[Word.MOTOR_TAKEN] = 3
    publish(rig, 3, 0.1)
    rig.words[Word.MOTOR_REFUSED] = 4
    assert rig.runner._to_follow().chunk_idx == 2


def test_guided_plans_follow_what_the_arm_follows(make_rig):
    rig = make_rig()
    publish(rig, 0, 0.1)
    rig.words[Word.MOTOR_TAKEN] = 1
    publish(rig, 1, 9.0)
    rig.words[Word.MOTOR_REFUSED] = 2
    rig.words[Word.MOTOR_MODE] = Mode.RUN
    seen = []
    predict = rig.runner._policy.predict

    def note(observation, **how):
        seen.append(how)
        return predict(observation)

    rig.runner._policy.predict = note
    now_ns = time.monotonic_ns()
    frame = rig.camera.latest()
    rig.runner._predict(Observation(frames=(frame,), state=np.zeros(rig.D), t_state_ns=now_ns))
    assert seen[0]["previous"].chunk_idx == 0
