"""Which frames and prompts a verification takes."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

pytest.importorskip("av")
pytest.importorskip("pyarrow")

from lerobot_writer import write_dataset

from gwp_edge.calibration.sampling import split_dataset
from gwp_edge.calibration.verify_frames import (
    choose_prompts,
    choose_verification,
    judge_statistics,
    noise_of,
)
from gwp_edge.errors import SpecError
from gwp_edge.lerobot.dataset import LeRobotDataset

DATASET = Path(__file__).resolve().parents[1] / "data" / "dataset"


@pytest.fixture
def dataset():
    with LeRobotDataset.open(DATASET) as opened:
        yield opened


def spec(**values):
    network = SimpleNamespace(n_action_channels=32)
    return SimpleNamespace(**{"n_rows": 48, "tasks": (), "network": network, **values})


def test_frames_come_from_the_held_out_side_of_the_same_seed(dataset):
    for seed in range(4):
        chosen = choose_verification(dataset, spec(), n_samples=8, seed=seed)
        held_out = {r.episode for r in split_dataset(dataset, seed=seed).verification}
        assert set(chosen.episodes) == held_out
        assert set(chosen.excluded) == set(range(4)) - held_out
        assert len(chosen.frames) == 8


def test_frames_avoid_episodes_that_the_bundle_was_calibrated_on(dataset):
    (held_out,) = choose_verification(dataset, spec(), n_samples=4, seed=0).episodes
    others = [i for i in range(4) if i != held_out]
    seen = [(held_out, 3), (others[0], 7)]
    chosen = choose_verification(dataset, spec(), n_samples=4, seed=0, calibrated=seen)
    assert set(chosen.episodes) <= set(others[1:])
    assert set(chosen.excluded) >= {held_out, others[0]}


def test_frames_of_a_dataset_calibrated_on_whole_are_refused(dataset):
    with pytest.raises(SpecError, match="all of its 4 episodes"):
        choose_verification(
            dataset, spec(), n_samples=4, seed=0, calibrated=[(i, 0) for i in range(4)]
        )


def test_frames_of_a_single_episode_keep_a_window_from_calibration(tmp_path):
    write_dataset(tmp_path, lengths=(100,), files=(0,))
    with LeRobotDataset.open(tmp_path) as single:
        chosen = choose_verification(
            single, spec(n_rows=10), n_samples=4, seed=0, calibrated=[(0, 60)]
        )
        assert min(frame for _, frame in chosen.frames) >= 70
        assert "one episode" in chosen.note
        with pytest.raises(SpecError, match="end of its only episode"):
            choose_verification(single, spec(n_rows=10), n_samples=4, seed=0, calibrated=[(0, 75)])


def test_more_samples_than_frames_takes_what_is_there(dataset):
    chosen = choose_verification(dataset, spec(), n_samples=5000, seed=0)
    assert len(chosen.frames) == sum(dataset.episode(i).n_frames for i in chosen.episodes)


def test_prompt_is_matched_by_file_name_then_by_text(dataset):
    by_file = choose_prompts(dataset, spec(tasks=("episode_000002",)), [2], task=None)
    assert by_file[2].task == "episode_000002"
    assert by_file[2].file == dataset.episode(2).prompt_path
    by_text = choose_prompts(dataset, spec(tasks=("pick the apple",)), [0, 2], task=None)
    assert {p.task for p in by_text.values()} == {"pick the apple"}
    assert by_text[0].file != by_text[2].file


def test_prompt_that_the_bundle_lacks_says_how_to_export_it(dataset):
    with pytest.raises(SpecError, match=r"--prompt-embedding .*episode_000001\.pt.*--task"):
        choose_prompts(dataset, spec(tasks=("fold the towel",)), [1], task=None)


def test_prompt_of_a_dataset_without_embeddings_says_how_to_export_it(tmp_path):
    write_dataset(tmp_path)
    with (
        LeRobotDataset.open(tmp_path) as plain,
        pytest.raises(SpecError, match="export it with --prompt '"),
    ):
        choose_prompts(plain, spec(tasks=("fold the towel",)), [1], task=None)


def test_given_task_serves_every_episode_and_finds_its_embedding(dataset):
    beside = (Path("/somewhere/episode_000001.pt"),)
    tasks = ("episode_000001", "pick the lemon", "wave")
    found = choose_prompts(dataset, spec(tasks=tasks), [0, 3], task=tasks[0], files=beside)
    assert {p.file for p in found.values()} == {beside[0]}
    found = choose_prompts(dataset, spec(tasks=tasks), [0, 3], task=tasks[1])
    assert found[0].file == dataset.episode(1).prompt_path
    assert choose_prompts(dataset, spec(tasks=tasks), [0], task="wave")[0].file is None
    with pytest.raises(SpecError, match="'nod' is not in this bundle"):
        choose_prompts(dataset, spec(tasks=tasks), [0], task="nod")


def test_noise_follows_from_seed_and_place_alone():
    a = noise_of(spec(), 0, 1, 2)
    assert a.shape == (48, 32)
    assert a.dtype == np.float32
    np.testing.assert_array_equal(a, noise_of(spec(), 0, 1, 2))
    for other in ((1, 1, 2), (0, 2, 2), (0, 1, 3)):
        assert not np.array_equal(a, noise_of(spec(), *other))


def test_statistics_of_another_robot_are_noted(dataset):
    states = np.concatenate([dataset.state(i) for i in range(4)])
    low, high = np.quantile(states, [0.01, 0.99], axis=0)

    def judged(scale):
        channels = [SimpleNamespace(name=name) for name in dataset.state_names]
        statistics = SimpleNamespace(state_q01=low * scale, state_q99=high * scale)
        return judge_statistics(dataset, spec(channels=channels, statistics=statistics), [3])

    assert judged(1.0) == []
    assert "left_joint1" in judged(0.2)[0]
    assert "left_joint1" in judged(100.0)[0]


@pytest.mark.export
def test_one_prompt_serves_a_dataset_with_other_instructions_and_the_report_says_so(dataset):
    from types import SimpleNamespace

    from gwp_edge.calibration.verify import _prompts

    chosen = SimpleNamespace(episodes=(0, 3))
    prompts, notes = _prompts(dataset, spec(tasks=("fold the towel",)), chosen, None, ())
    assert {p.task for p in prompts.values()} == {"fold the towel"}
    assert "error against recorded actions says nothing" in notes[0]
    with pytest.raises(SpecError, match="has prompts"):
        _prompts(dataset, spec(tasks=("fold the towel", "wave")), chosen, None, ())
    with pytest.raises(SpecError, match="is not in this bundle"):
        _prompts(dataset, spec(tasks=("fold the towel",)), chosen, "wave", ())
