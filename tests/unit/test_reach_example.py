"""The reach example: what its expert does, what it trains, and what its files hold."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import reach_rig

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")
pytest.importorskip("mujoco")

pytestmark = [pytest.mark.export, pytest.mark.sim]

_EXAMPLE = reach_rig.EXAMPLE


@pytest.fixture(scope="module", autouse=True)
def _example_path() -> Any:
    sys.path.insert(0, str(_EXAMPLE))
    yield
    sys.path.remove(str(_EXAMPLE))


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return reach_rig.four_episodes(tmp_path_factory)


@pytest.fixture(scope="module")
def network() -> Any:
    import model

    net = model.make_network(0)
    torch.manual_seed(1)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.05 * torch.randn_like(p))
    return net


def _batch(n: int = 2) -> Any:
    import model

    g = torch.Generator().manual_seed(2)
    s = model.SIZES
    latent = (n, s.latent_channels, 1, 14, 12)
    prompt = model.prompts(["touch the red cube", "touch the blue cube"])
    return model.Batch(
        state=torch.randn((n, 1, s.n_action_channels), generator=g),
        actions=torch.randn((n, 48, s.n_action_channels), generator=g),
        reference=torch.randn(latent, generator=g),
        future=torch.randn(latent, generator=g),
        prompt=prompt[torch.arange(n) % 2],
    )


def test_joint_pass_and_action_only_pass_give_equal_actions(network: Any) -> None:
    batch = _batch()
    t = torch.tensor([976.0, 396.0])
    common = {
        "state": batch.state,
        "reference": batch.reference,
        "actions": batch.actions,
        "action_timestep": t,
        "prompt": batch.prompt,
    }
    with torch.no_grad():
        joint, video = network(
            **common, future=batch.future, future_timestep=torch.tensor([500.0, 20.0])
        )
        alone, nothing = network(**common)
        other, _ = network(
            **common, future=batch.future + 1.0, future_timestep=torch.tensor([20.0, 500.0])
        )
    assert nothing is None
    assert video.shape == batch.future.shape
    torch.testing.assert_close(joint, alone, rtol=0, atol=2e-6)
    torch.testing.assert_close(joint, other, rtol=0, atol=2e-6)


def test_several_copies_of_the_actions_cost_what_separate_passes_do(network: Any) -> None:
    import model

    batch = _batch()
    with torch.no_grad():
        action, video = model.losses(network, batch, torch.Generator().manual_seed(5), n_copies=2)
        g = torch.Generator().manual_seed(5)
        copies = []
        for _ in range(2):
            t = model.draw_timesteps(2, model.ACTION_SHIFT, g)
            copies.append((t, *model.noised(batch.actions, t, g)))
        t_video = model.draw_timesteps(2, model.VIDEO_SHIFT, g)
        x_video, target_video = model.noised(batch.future, t_video, g)
        expected = []
        for t, x, target in copies:
            velocity, video_velocity = network(
                state=batch.state,
                reference=batch.reference,
                actions=x,
                action_timestep=model.told(t),
                prompt=batch.prompt,
                future=x_video,
                future_timestep=model.told(t_video),
            )
            expected.append((velocity - target).square().mean())
            if len(expected) == 1:
                expected_video = (video_velocity - target_video).square().mean()
    torch.testing.assert_close(action, sum(expected) / 2, rtol=1e-5, atol=0)
    torch.testing.assert_close(video, expected_video, rtol=1e-5, atol=0)


def test_velocity_leads_back_to_the_clean_values() -> None:
    import model

    g = torch.Generator().manual_seed(0)
    clean = torch.randn((3, 48, 8), generator=g)
    t = model.draw_timesteps(3, model.ACTION_SHIFT, g)
    x, velocity = model.noised(clean, t, g)
    torch.testing.assert_close(x - (t / 1000.0)[:, None, None] * velocity, clean)


def test_timesteps_are_whole_and_told_in_bfloat16() -> None:
    import model

    t = model.draw_timesteps(4000, model.ACTION_SHIFT, torch.Generator().manual_seed(0))
    assert torch.equal(t, t.round())
    assert 0 <= t.min() < 30
    assert t.max() <= 1000
    # The median of s r / (1 + (s - 1) r) is at r = 1/2: s / (s + 1).
    assert abs(float(t.median()) - 1000 * 5 / 6) < 15
    told = model.told(t)
    assert torch.equal(told, told.bfloat16().float())
    assert not torch.equal(told, t)


def test_fast_convolutions_equal_the_library_s() -> None:
    import vae
    from diffusers.models.autoencoders.autoencoder_kl_wan import WanCausalConv3d

    torch.manual_seed(0)
    model = vae.make_vae(4).eval()
    x = torch.rand(1, 3, 5, 32, 48) * 2 - 1
    with torch.no_grad():
        z = model.encode(x).latent_dist.mode()
        y = model.decode(z).sample
        for module in model.modules():
            if isinstance(module, WanCausalConv3d):
                module.__class__ = WanCausalConv3d
        z_library = model.encode(x).latent_dist.mode()
        y_library = model.decode(z).sample
    assert z.shape == (1, 48, 2, 2, 3)
    torch.testing.assert_close(z, z_library, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(y, y_library, rtol=1e-4, atol=1e-5)


def test_demonstrations_touch_the_named_cube_and_read_back(dataset: Path) -> None:
    import data

    episodes = data.read_episodes([dataset])
    assert [e.task for e in episodes] == [
        "touch the red cube",
        "touch the red cube",
        "touch the blue cube",
        "touch the blue cube",
    ]
    for episode in episodes:
        assert len(episode.state) == len(episode.action) > 30
        assert np.abs(episode.action[-1] - episode.action[-8]).max() < 1e-3  # it rests
        assert np.abs(episode.state[-1] - episode.action[-1])[:6].max() < 0.05  # and has arrived


def test_windows_are_clamped_and_relative_to_their_first_state(
    dataset: Path, tmp_path: Path
) -> None:
    import data

    from gwp_edge.calibration.statistics import compute_statistics, write_statistics

    stats = tmp_path / "norm_stats.json"
    write_statistics(stats, compute_statistics([dataset], n_rows=48, width=8))
    episodes = data.read_episodes([dataset])
    tasks = ["touch the red cube", "touch the blue cube"]
    windows = data.make_windows(episodes, tasks, stats, 8)
    last = int(np.flatnonzero(windows.episode == 0)[-1])
    episode, f = episodes[0], int(windows.frame[last])
    low, span = data.read_limits(stats, "action", 7)
    undone = (windows.actions[last][:, :7] + 1) / 2 * span + low
    undone[:, :6] += episode.state[f, :6]
    n = len(episode.action) - f
    assert n < 48
    np.testing.assert_allclose(undone[:n], episode.action[f:], atol=1e-5)
    np.testing.assert_allclose(undone[n:], np.repeat(episode.action[-1:], 48 - n, 0), atol=1e-5)
    assert not windows.actions[:, :, 7].any()
    assert windows.task[last] == 0


def test_clip_shows_the_quarters_of_the_window(dataset: Path) -> None:
    import data

    episode = data.read_episodes([dataset])[0]
    n = len(episode.canvases)
    assert [episode.canvas_idx(f) for f in (0, 4, 12, 10_000)] == [0, 1, 3, n - 1]
    clip = episode.clip(0)
    assert clip.shape == (5, 224, 192, 3)
    np.testing.assert_array_equal(clip[1], episode.canvases[3])


def test_plots_show_losses_and_methods_and_name_what_is_missing(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    import plots

    from gwp_edge.errors import SpecError

    rows = "".join(f"{i},{1 / (i + 1)},{0 if i % 2 else 2.0}\n" for i in range(120))
    (tmp_path / "losses.csv").write_text("step,action,video\n" + rows)
    (axes,) = plots.losses([tmp_path]).axes
    action, video = axes.lines
    assert len(action.get_xdata()) == 120 - 49
    assert video.get_ydata()[-1] == pytest.approx(1.0)
    with pytest.raises(SpecError, match="not there"):
        plots.losses([tmp_path / "nowhere"])

    report = tmp_path / "methods.json"
    row = {"method": "soft", "n": 100, "success_low": 0.8, "success_high": 0.96}
    cells = [{**row, "latency_ms": ms, "success_rate": 0.9} for ms in (0.0, 200.0)]
    report.write_text(json.dumps({"rows": cells}))
    (axes,) = plots.methods(report).axes
    assert list(axes.get_xticks()) == [0.0, 200.0]
    report.write_text("{}")
    with pytest.raises(SpecError, match="not a report"):
        plots.methods(report)


def test_demonstrations_never_take_seeds_of_evaluations(tmp_path: Path) -> None:
    """A first seed of -1000000 made demonstrations of the scenes that policies are judged by."""
    import collect

    from gwp_edge.errors import SpecError

    with pytest.raises(SpecError, match="first seed -1000000: expected 0 or more"):
        collect.collect(tmp_path / "data", 1, -1_000_000)
    assert not (tmp_path / "data").exists()


def test_shipped_policy_and_episodes_stay_small_and_name_no_folder() -> None:
    files = [p for part in ("policy", "episodes") for p in (_EXAMPLE / part).rglob("*")]
    sizes = {p: p.stat().st_size for p in files if p.is_file()}
    assert len(sizes) > 15
    assert 6_000_000 < sum(sizes.values()) <= 8_000_000
    vae = json.loads((_EXAMPLE / "policy/base_model/vae/config.json").read_text())
    assert vae["z_dim"] == 48
    assert "_name_or_path" not in vae


def test_real_lerobot_opens_the_shipped_episodes() -> None:
    lerobot_dataset = pytest.importorskip("lerobot.datasets.lerobot_dataset")
    opened = lerobot_dataset.LeRobotDataset("reach/episodes", root=_EXAMPLE / "episodes")
    assert opened.num_episodes == 10
    assert opened.fps == 30
    for row in (0, len(opened) - 1):
        sample = opened[row]
        assert sample["task"] in {"touch the red cube", "touch the blue cube"}
        assert sample["observation.images.cam_high"].shape == (3, 160, 240)
        assert sample["observation.state"].shape == (7,)
    assert [int(opened[row]["episode_index"]) for row in (0, len(opened) - 1)] == [0, 9]


@pytest.mark.parametrize(
    ("script", "words", "message"),
    [
        ("collect", ["{tmp}/data", "--crf", "99"], "expected 0 to 63, got 99"),
        ("collect", ["{tmp}/data", "--first-seed", "-1"], "whole number of 0 or more, got -1"),
        ("train", ["{tmp}/out", "{data}", "--steps", "0"], "whole number of 1 or more, got 0"),
        ("train", ["{tmp}/out", "{data}", "--vae-steps", "0"], "whole number of 12 or more"),
        ("train", ["{tmp}/out", "{data}", "--copies", "x"], "whole number of 1 or more, got x"),
        ("train", ["{tmp}/out", "{tmp}/none"], "none: not a LeRobot dataset"),
        (
            "train",
            ["{tmp}/out", "{data}", "--vae-from", "{tmp}"],
            "has no base_model/vae/diffusion_pytorch_model.safetensors",
        ),
        ("imagine", ["{tmp}/none", "{data}", "{tmp}/x.png"], "no autoencoder there"),
        ("imagine", ["{policy}", "{tmp}/none", "{tmp}/x.png"], "none: not a LeRobot dataset"),
        ("imagine", ["{policy}", "{data}", "{tmp}/none/x.png"], "its folder does not exist"),
        ("imagine", ["{policy}", "{data}", "{tmp}/x.tga"], "expected a name in .png, .jpg"),
        ("imagine", ["{policy}", "{data}", "{tmp}/x.png", "--frame", "3"], "expected one of 0, 8"),
        ("plots", ["losses", "{tmp}/x.xyz", "{tmp}"], "expected a name in .svg, .png"),
        ("plots", ["losses", "{tmp}/x.svg", "{tmp}"], "losses.csv: not what train.py wrote"),
    ],
)
def test_bad_input_is_named_in_one_line_and_writes_nothing(
    script: str,
    words: list[str],
    message: str,
    dataset: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Each of these was a traceback, or wrote an untrained checkpoint and said success."""
    if script == "plots":
        pytest.importorskip("matplotlib")
    import importlib

    (tmp_path / "losses.csv").write_text("step,action,video\n1,soon,2\n")
    names = {"tmp": tmp_path, "data": dataset, "policy": _EXAMPLE / "policy"}
    with pytest.raises(SystemExit) as caught:
        importlib.import_module(script).main([word.format(**names) for word in words])
    said = capsys.readouterr().err if caught.value.code == 2 else str(caught.value.code)
    assert message in said
    assert caught.value.code == 2 or "\n" not in said
    written = {p.name for p in tmp_path.rglob("*") if p.is_file()}
    assert not written & {"x.png", "x.svg", "training.pt", "diffusion_pytorch_model.safetensors"}
