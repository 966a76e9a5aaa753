"""The trained example policy, closed loop: it does its task, and does it by seeing and listening.

Few episodes, so the bounds are wide; `gwp-edge eval` has the figures.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("mujoco")
pytest.importorskip("av")

import torch
from typer.testing import CliRunner

from gwp_edge.cli import app
from gwp_edge.drivers.sim_world import SimWorld
from gwp_edge.evaluation.episode import EpisodeRunner
from gwp_edge.evaluation.evaluate import Evaluation, evaluate
from gwp_edge.evaluation.options import Ablation, EpisodeOptions
from gwp_edge.evaluation.tasks import TouchTask
from gwp_edge.mailbox import command_dtype, state_dtype
from gwp_edge.policy import BundlePolicy, load
from gwp_edge.record import make_header
from gwp_edge.robots import load_robot
from gwp_edge.session_format import SessionWriter
from gwp_edge.types import Chunk, FloatArray, Observation

pytestmark = [pytest.mark.export, pytest.mark.sim]

REACH = Path(__file__).resolve().parents[2] / "examples" / "reach"
RED, BLUE = TouchTask.instructions
N_SEEDS = 8
# Nine of ten successes come within 2.1 s: half of the time limit saves half of what failures cost.
LIMIT_S = 3.0
_ROBOT_SEED = 11  # of robot.toml


class ShortTouchTask(TouchTask):
    time_limit_s = LIMIT_S


@pytest.fixture(scope="module")
def policies(reach_bundle: Path) -> Any:
    opened = {i: load(reach_bundle, engine="ort", task=i, threads=1) for i in (RED, BLUE)}
    yield opened
    for policy in opened.values():
        policy.close()


def _run(policies: dict[str, BundlePolicy], ablation: Ablation = "none") -> Evaluation:
    options = EpisodeOptions(ablation=ablation, replan_hz=2.5)
    return evaluate("policy", policies, ShortTouchTask(), range(N_SEEDS), options)


@pytest.fixture(scope="module")
def whole(policies: dict[str, BundlePolicy]) -> Evaluation:
    """With eyes and ears: what the ablations are compared with."""
    return _run(policies)


def test_policy_touches_the_cube_that_it_is_told_to(whole: Evaluation) -> None:
    for summary in whole.summaries():
        assert summary.n_success >= 0.7 * summary.n
    assert whole.summaries()[-1].n == 2 * N_SEEDS


def test_policy_told_the_other_cube_touches_the_other_cube(
    policies: dict[str, BundlePolicy], whole: Evaluation
) -> None:
    summary = _run(policies, "swapped-prompt").summaries()[-1]
    assert summary.n_success <= 0.2 * summary.n
    assert summary.n_wrong_object >= 0.6 * summary.n
    assert whole.summaries()[-1].n_wrong_object <= 0.3 * summary.n


def test_policy_without_pictures_does_not_find_the_cube(
    policies: dict[str, BundlePolicy], whole: Evaluation
) -> None:
    blind = _run(policies, "blank-cameras").summaries()[-1]
    assert blind.n == 16
    assert blind.n_success <= 4
    assert whole.summaries()[-1].n_success > 4  # the same bound tells a policy that sees


def _network_and_inputs(policy: BundlePolicy, image: Any, state: FloatArray) -> Any:
    """The shipped checkpoint whole, and what it is given for a canvas and a state."""
    from model import prompts
    from vae import encode, load_vae, scale

    from gwp_edge.export.unreduced_serving import load_network
    from gwp_edge.preprocess import normalise_state

    network = load_network(REACH / "policy" / "checkpoint")
    vae = load_vae(REACH / "policy" / "base_model" / "vae")
    mean, std = scale(vae)
    with torch.autocast("cpu", enabled=False):
        reference = (encode(vae, image[None, None]) - mean) / std
    given = {
        "state": torch.from_numpy(normalise_state(state, policy.spec))[None],
        "reference": reference,
        "prompt": prompts([policy.task]),
    }
    return network, given


def test_joint_pass_bundle_and_action_only_pass_agree_on_the_shipped_weights(
    policies: dict[str, BundlePolicy], reach_modules: None
) -> None:
    """What the export leaves out must not matter; the tiny random network is tested elsewhere."""
    from gwp_edge.preprocess import compose_canvas, normalise_state

    policy, task = policies[RED], TouchTask()
    spec = policy.spec
    runner = EpisodeRunner(task, spec, EpisodeOptions(), keep_pictures=False)
    task.reset(runner.world, 3)
    runner.remember()
    observation = runner.observe(1_000_000_000, 0)
    runner.close()
    canvas = compose_canvas(observation, spec.canvas)
    network, given = _network_and_inputs(policy, canvas, observation.state)
    g = torch.Generator().manual_seed(0)
    noise = torch.randn((1, spec.n_rows, spec.network.n_action_channels), generator=g)
    future = torch.randn(given["reference"].shape, generator=g)

    engine = policy._engine
    latent = engine.vision(canvas)
    # The example encodes in bfloat16, the bundle in float32; the network gets the bundle's.
    torch.testing.assert_close(
        given["reference"][:, :, 0], torch.from_numpy(latent), rtol=0, atol=0.15
    )
    given["reference"] = torch.from_numpy(latent)[:, :, None]
    given["action_timestep"] = torch.tensor([spec.sampler.timesteps[0]])
    with torch.no_grad():
        alone, nothing = network(**given, actions=noise)
        joint, video = network(
            **given, actions=noise, future=future, future_timestep=torch.tensor([500.0])
        )
    assert nothing is None
    assert video.abs().max() > 0.1
    scale = float(alone.abs().max())
    torch.testing.assert_close(joint, alone, rtol=0, atol=1e-5 * scale)  # float32, another order

    engine.prefill(latent, normalise_state(observation.state, spec))
    x = noise[0].numpy()
    x_next = engine.denoise(x, 0, np.zeros_like(x), np.zeros((spec.n_rows, 1), np.float32))
    step = np.float32(spec.sampler.sigmas[1]) - np.float32(spec.sampler.sigmas[0])
    velocity = torch.from_numpy((x_next - x) / step)
    # As in the parity tests of the reference networks: 2e-4 of the velocity's scale.
    torch.testing.assert_close(velocity, joint[0], rtol=0, atol=2e-4 * scale)


def test_imagined_future_is_nearer_than_standing_still_and_depends_on_the_instruction(
    reach_modules: None,
) -> None:
    import imagine

    from gwp_edge.lerobot.dataset import LeRobotDataset

    policy = REACH / "policy"
    imagination = imagine.Imagination(policy)
    with LeRobotDataset.open(REACH / "episodes") as dataset:
        first = dataset.n_episodes - 3
        layout = imagine.example_layout()
        episodes = [imagine.read_episode(dataset, i, layout) for i in range(first, first + 3)]
    windows = [
        imagine.window_at(policy, episode, frame) for episode in episodes for frame in (0, 8)
    ]
    assert {w.task for w in windows} == {RED, BLUE}
    mean = imagine.mean_errors([imagination.errors(w) for w in windows])
    assert mean.latent < 0.9 * mean.latent_still
    assert mean.latent < 0.9 * mean.latent_swapped
    assert mean.pixel_ceiling < mean.pixel < mean.pixel_still


@pytest.fixture(scope="module")
def session(policies: dict[str, BundlePolicy], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's run in simulated time, as a session: the same on an idle and on a busy machine."""
    folder = tmp_path_factory.mktemp("session")
    policy = policies[BLUE]
    robot = load_robot(str(REACH / "robot.toml"), policy.spec)
    writer = SessionWriter(folder, make_header(policy.spec, robot, policy={}, task=BLUE))
    runner = EpisodeRunner(TouchTask(), policy.spec, EpisodeOptions(), keep_pictures=False)
    world, step = runner.world, SimWorld.step
    D, T0_NS = policy.spec.n_channels, 1_000_000_000

    def record(command: FloatArray) -> None:
        t_ns = T0_NS + world.time_ns
        state = (t_ns, 1, world.position, world.velocity)
        writer.append("states", np.array([state], state_dtype(D)))
        writer.append("commands", np.array([(t_ns, command)], command_dtype(D)))

    def recorded_step(self: SimWorld, target: FloatArray, *, n_steps: int = 1) -> None:
        record(target)
        step(self, target, n_steps=n_steps)

    class Recorded:
        spec = policy.spec

        def predict(self, observation: Observation, **rest: Any) -> Chunk:
            for i, frame in enumerate(observation.frames):
                writer.append_frame(i, frame, "png")
            return policy.predict(observation, **rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SimWorld, "step", recorded_step)
        result = runner.run(Recorded(), BLUE, _ROBOT_SEED)
    record(world.target)  # a run goes on after the touch
    runner.close()
    writer.close({})
    assert result.outcome == "success"
    return folder


def test_demo_s_session_is_judged_and_shown(
    session: Path, reach_modules: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import show

    show.main([str(session), str(tmp_path / "strip.png")])
    assert "told to 'touch the blue cube': touched after" in capsys.readouterr().out
    assert (tmp_path / "strip.png").stat().st_size > 10_000
    assert (tmp_path / "strip.gif").stat().st_size > 10_000


def test_session_of_the_other_cube_is_a_failure(
    session: Path, reach_modules: None, tmp_path: Path
) -> None:
    import shutil

    import show

    other = tmp_path / "other"
    shutil.copytree(session, other)
    header = (other / "session.json").read_text()
    assert header.count(f'"task": "{BLUE}"') == 1
    (other / "session.json").write_text(header.replace(f'"task": "{BLUE}"', f'"task": "{RED}"'))
    with pytest.raises(SystemExit, match="told to 'touch the red cube': wrong object"):
        show.main([str(other), str(tmp_path / "strip.png")])


def test_demo_s_robot_runs_and_records_the_policy(
    reach_bundle: Path, reach_modules: None, tmp_path: Path
) -> None:
    import show

    words = ["run", str(reach_bundle), "--robot", str(REACH / "robot.toml"), "--task", BLUE]
    # A run is in real time, and a busy machine may fail its preflight or lose some of the recording
    # (exit code 1): it is tried twice, and what it comes to is left to the test above.
    for attempt in range(2):
        folder = tmp_path / f"session{attempt}"
        result = CliRunner().invoke(app, [*words, "--duration", "3", "--record", str(folder)])
        assert result.exit_code in (0, 1), result.output
        recorded = show.Session.open(folder)
        if len(recorded.commands) > 0 and len(recorded.chunks) > 0:
            break
    assert len(recorded.chunks) > 0, result.output
    assert recorded.header.task == BLUE
    assert set(recorded.frames["camera"].tolist()) == {0, 1, 2}
    assert show.judge(recorded)[0] in {"success", "wrong object", "timeout"}
    assert np.ptp(recorded.commands["position"], axis=0).max() > 0.01
