"""Training the reach example: its stages, what they refuse to mix up, and how it resumes."""

from __future__ import annotations

import functools
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import reach_rig

from gwp_edge.errors import SpecError

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")
pytest.importorskip("mujoco")

pytestmark = [pytest.mark.export, pytest.mark.sim]


@pytest.fixture(scope="module", autouse=True)
def _example_path() -> Any:
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)  # small tensors: two threads mostly wait for each other
    sys.path.insert(0, str(reach_rig.EXAMPLE))
    yield
    torch.set_num_threads(n_threads)
    sys.path.remove(str(reach_rig.EXAMPLE))


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return reach_rig.four_episodes(tmp_path_factory)


@pytest.fixture(scope="module")
def prepared(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Real windows with random latents: what the network learns does not matter here."""
    import data
    import stages
    import train

    from gwp_edge.calibration.statistics import compute_statistics, write_statistics

    stats = tmp_path_factory.mktemp("statistics") / "norm_stats.json"
    write_statistics(stats, compute_statistics([dataset], n_rows=48, width=8))
    tasks = list(train.TouchTask.instructions)
    windows = data.make_windows(data.read_episodes([dataset]), tasks, stats, 8)
    size = (len(windows.frame), 48, 2, 14, 12)
    latents = torch.randn(size, generator=torch.Generator().manual_seed(0)).half()
    return stages.Prepared(windows=windows, latents=latents, source={"data": "four episodes"})


@pytest.fixture
def trainer(prepared: Any, tmp_path: Path) -> Callable[..., Any]:
    import train

    def make(name: str, **changes: Any) -> Any:
        out = tmp_path / name
        out.mkdir(exist_ok=True)
        recipe = {"n_steps": 3, "n_copies": 1, "with_video": True, "seed": 0, "batch": 2}
        return train.Trainer(out, prepared, **{**recipe, **changes})

    return make


def test_interrupted_training_ends_as_an_uninterrupted_one(
    trainer: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import model
    import train

    from gwp_edge.export.unreduced_serving import load_network

    monkeypatch.setattr(train, "_SAVE_EVERY_S", 0.0)
    whole = trainer("whole")
    average = whole.train()

    stopped = trainer("stopped")
    step = stopped._train_step

    def interrupted_step() -> None:
        if len(stopped.rows) == 2:
            raise KeyboardInterrupt
        step()

    monkeypatch.setattr(stopped, "_train_step", interrupted_step)
    with pytest.raises(KeyboardInterrupt):
        stopped.train()
    resumed = trainer("stopped")
    again = resumed.train()
    assert [row[0] for row in stopped.rows] == [1, 2]
    assert resumed.rows == whole.rows
    for name, value in average.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name
    for name, value in whole.network.state_dict().items():
        assert torch.equal(resumed.network.state_dict()[name], value), name
    assert (tmp_path / "stopped" / "losses.csv").read_text().count("\n") == 4

    model.write_checkpoint(average.state_dict(), tmp_path / "checkpoint")
    loaded = load_network(tmp_path / "checkpoint")
    for name, value in average.state_dict().items():
        torch.testing.assert_close(loaded.state_dict()[name], value.bfloat16().float())


def test_state_of_another_training_is_refused(trainer: Callable[..., Any], tmp_path: Path) -> None:
    """A finished training, run again without video and with another seed, gave the old network."""
    trainer("a").train()
    for changes in ({"with_video": False}, {"seed": 1}, {"n_steps": 4}, {"batch": 3}):
        with pytest.raises(SpecError, match=f"{next(iter(changes))} differ"):
            trainer("a", **changes).train()
    assert len(trainer("a").train().state_dict()) > 50  # the same again is what is there
    (tmp_path / "a" / "training.pt").write_bytes(b"no checkpoint")
    with pytest.raises(SpecError, match=r"training.pt: not the state of a training"):
        trainer("a").train()


def test_latents_that_do_not_fit_the_windows_are_refused(prepared: Any, tmp_path: Path) -> None:
    import stages
    import train

    n = len(prepared.latents)
    for latents in (prepared.latents[:-1], torch.cat((prepared.latents, prepared.latents[:1]))):
        wrong = stages.Prepared(windows=prepared.windows, latents=latents, source={})
        with pytest.raises(SpecError, match=f"latents of {n} windows, got {len(latents)}"):
            train.Trainer(tmp_path, wrong, n_steps=1, n_copies=1, with_video=True, seed=0)


def test_every_stage_runs_and_says_what_was_run_and_refuses_other_data(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import stages
    import train

    from gwp_edge.export.unreduced_serving import load_network

    monkeypatch.setattr(stages, "train_vae", functools.partial(stages.train_vae, batch=2))
    few = ["--steps", "2", "--batch", "2", "--copies", "1", "--vae-steps", "12"]
    first, second = tmp_path / "video", tmp_path / "alone"
    train.main([str(first), str(dataset), *few])
    log = json.loads((first / "training.json").read_text())
    assert list(log["stages"]) == ["statistics", "autoencoder", "latents", "network"]
    assert log["seconds_in_all"] == pytest.approx(sum(s["seconds"] for s in log["stages"].values()))
    assert log["stages"]["network"]["n_steps"] == 2
    assert log["stages"]["network"]["steps_per_s"] > 0
    assert log["stages"]["statistics"]["data"][0]["n_episodes"] == 4
    assert log["versions"].keys() >= {"python", "torch", "diffusers", "numpy", "gwp-edge"}
    config = json.loads((first / "base_model" / "vae" / "config.json").read_text())
    assert np.std(config["latents_std"]) > 0  # measured, not the ones it began with
    assert "_name_or_path" not in config
    losses = np.loadtxt(first / "losses.csv", delimiter=",", skiprows=1)
    assert (losses[:, 1:] > 0).all()
    before = load_network(first / "checkpoint").state_dict()

    train.main([str(second), str(dataset), *few, "--no-video", "--vae-from", str(first)])
    alone = np.loadtxt(second / "losses.csv", delimiter=",", skiprows=1)
    assert (alone[:, 1] > 0).all()
    assert (alone[:, 2] == 0).all()
    assert "autoencoder" not in json.loads((second / "training.json").read_text())["stages"]
    after = load_network(second / "checkpoint").state_dict()
    assert any(not torch.equal(before[name], after[name]) for name in before)

    # What is there and fits is used again; other options and other data are not mixed in.
    made = (first / "latents.pt").stat().st_mtime_ns
    with pytest.raises(SystemExit, match=r"training.pt: was made from something else \(with_video"):
        train.main([str(first), str(dataset), *few, "--no-video"])
    assert (first / "latents.pt").stat().st_mtime_ns == made
    with pytest.raises(SystemExit, match=r"vae: was made from something else \(n_steps"):
        train.main([str(first), str(dataset), *few[:-1], "13"])
    other = tmp_path / "other"
    shutil.copytree(dataset, other)
    info = json.loads((other / "meta" / "info.json").read_text())
    (other / "meta" / "info.json").write_text(json.dumps({**info, "robot_type": "another"}))
    with pytest.raises(SystemExit, match=r"norm_stats.json: was made from something else \(data"):
        train.main([str(first), str(other), *few])


def test_file_of_unknown_origin_is_refused(tmp_path: Path) -> None:
    import records

    path = tmp_path / "latents.pt"
    assert not records.is_made_from(path, {"n_windows": 3})
    records.write_made(path, {"n_windows": 3}, lambda beside: beside.write_bytes(b"x"))
    assert records.is_made_from(path, {"n_windows": 3})
    with pytest.raises(SpecError, match=r"n_windows differ: 3 then, 4 now"):
        records.is_made_from(path, {"n_windows": 4})
    (tmp_path / "latents.pt.made-from.json").unlink()
    with pytest.raises(SpecError, match="does not say what it was made from"):
        records.is_made_from(path, {"n_windows": 3})

    def fails(beside: Path) -> None:
        beside.write_bytes(b"half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        records.write_made(tmp_path / "new.pt", {}, fails)
    assert not (tmp_path / "new.pt").exists()
