"""A bad calibration shows: too few samples, growing ranges, other pictures, under any name."""

from __future__ import annotations

import shutil
import types
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("pyarrow")
pytest.importorskip("av")

from gwp_edge.calibration.observers import TensorObserver
from gwp_edge.calibration.sample_search import check_samples, find_samples, seen_frames
from gwp_edge.calibration.sampling import choose_frames, reference_samples, split_dataset
from gwp_edge.calibration.verify_frames import choose_verification
from gwp_edge.calibration.verify_record import MIN_SAMPLES, check_settled, settling_of
from gwp_edge.lerobot.dataset import LeRobotDataset

DATASET = Path(__file__).resolve().parents[1] / "data" / "dataset"
N_ROWS = 48


@pytest.fixture
def dataset():
    with LeRobotDataset.open(DATASET) as opened:
        yield opened


@pytest.fixture
def refs(dataset):
    """Eight calibration samples."""
    frames = choose_frames(split_dataset(dataset, seed=0).calibration, n_samples=8, seed=0)
    return reference_samples(dataset, frames)


def copy_to(folder, *cameras):
    """Return a copy of the dataset; pictures of ``cameras`` go to the next one's place."""
    shutil.copytree(DATASET, folder)
    videos = [folder / "videos" / f"observation.images.{camera}" for camera in cameras]
    for i, video in enumerate(videos):
        video.rename(folder / f"aside{i}")
    for i in range(len(videos)):
        (folder / f"aside{i}").rename(videos[(i + 1) % len(videos)])
    return folder


def look(root, refs):
    """Return what a dataset has of samples, and the check of them."""
    with LeRobotDataset.open(root) as opened:
        found = find_samples(opened, refs, N_ROWS)
        (check,) = check_samples(opened, refs, found, N_ROWS)
    return found, check


def settling(n_samples, growth):
    """Return the ranges of a tensor whose magnitude grows with every second sample."""
    observer = TensorObserver("denoise/blocks.0.attn1.qkv")
    rng = np.random.default_rng(0)
    for i in range(n_samples):
        x = rng.normal(size=(40, 8)).astype(np.float32) * (1 + growth * (i % 2))
        observer.observe(x, sample_idx=i)
    return settling_of({observer.name: observer.convergence("mse")}, "mse")


def test_enough_samples_of_settled_ranges_pass():
    check = check_settled(64, settling(64, 0.0))
    assert check.passed
    assert check.text == "64 samples, 0 of 1 ranges (mse) still grow"
    assert check_settled(MIN_SAMPLES, None).passed


def test_calibration_on_one_sample_fails():
    check = check_settled(1, None)
    assert check.passed is False
    assert f"1 samples, expected at least {MIN_SAMPLES}" in check.text


def test_ranges_that_still_grow_fail():
    found = settling(16, 2.0)
    check = check_settled(16, found)
    assert check.passed is False
    assert "1 of 1 ranges (mse) still grow: calibrate with more" in check.text
    (seen,) = found.ranges
    assert found.fractions == (0.125, 0.25, 0.5, 1.0)
    assert seen.amax[3] > 2 * seen.amax[2]
    assert seen.growth == pytest.approx(seen.thresholds[3] / seen.thresholds[2] - 1)


def test_samples_are_found_in_the_dataset_itself(dataset, refs):
    found, check = look(DATASET, refs)
    assert check.passed
    assert check.text.startswith("4 of 8")
    assert {(ref.episode, ref.frame) for ref in refs} <= seen_frames(found)
    assert all(sample.places[0] == (sample.ref.episode, sample.ref.frame) for sample in found)


@pytest.mark.parametrize("name", ["dataset", "swapped"])
def test_exchanged_cameras_show_whatever_the_folder_is_called(refs, tmp_path, name):
    """Samples were known by their folder's name: of ``swapped`` nothing was checked, and passed."""
    copy = copy_to(tmp_path / name, "cam_left_wrist", "cam_right_wrist")
    _, check = look(copy, refs)
    assert check.passed is False
    assert "is not what calibration saw: cameras are exchanged" in check.text
    assert "cam_right_wrist in place of cam_left_wrist" in check.text


def test_three_cameras_in_each_others_place_are_named(refs, tmp_path):
    copy = copy_to(tmp_path / "turned", "cam_high", "cam_left_wrist", "cam_right_wrist")
    _, check = look(copy, refs)
    assert check.passed is False
    assert check.text.count("in place of") == 3


def test_renamed_copy_of_the_calibration_set_is_not_verified_on(refs, tmp_path):
    """A copy under another name was taken for unseen data: its error was that of the training."""
    copy = copy_to(tmp_path / "renamed")
    found, check = look(copy, refs)
    assert check.passed
    spec = types.SimpleNamespace(n_rows=N_ROWS)
    with LeRobotDataset.open(copy) as opened:
        # The split of another seed would hold out an episode that calibration saw.
        for seed in range(6):
            chosen = choose_verification(
                opened, spec, n_samples=2, seed=seed, calibrated=seen_frames(found)
            )
            assert {ref.episode for ref in refs}.isdisjoint(chosen.episodes)


def rewrite(folder, change):
    """Apply ``change`` to the rows (dict of columns) of every data file."""
    import pyarrow.parquet as pq

    for path in (folder / "data").rglob("*.parquet"):
        table = pq.read_table(path)
        columns = change({name: table[name].to_pylist() for name in table.column_names})
        pq.write_table(type(table).from_pydict(columns, schema=table.schema), path)


def add_to_state(columns):
    columns["observation.state"] = [[x + 0.01 for x in row] for row in columns["observation.state"]]
    return columns


def test_other_motion_is_another_dataset_unless_it_has_the_name(refs, tmp_path):
    other, edited = copy_to(tmp_path / "other"), copy_to(tmp_path / "dataset")
    for folder in (other, edited):
        rewrite(folder, add_to_state)
    found, check = look(other, refs)
    assert found == ()
    assert check.passed is None
    assert "none of them is in other" in check.text
    found, check = look(edited, refs)
    assert check.passed is False
    assert "state, actions or task differ" in check.text
    assert seen_frames(found) == {(ref.episode, ref.frame) for ref in refs}


def test_video_of_other_pictures_is_told_from_exchanged_cameras(refs, tmp_path):
    """One camera recorded in the place of two: no exchange explains it."""
    copy = copy_to(tmp_path / "doubled")
    videos = copy / "videos"
    shutil.rmtree(videos / "observation.images.cam_left_wrist")
    shutil.copytree(
        videos / "observation.images.cam_right_wrist", videos / "observation.images.cam_left_wrist"
    )
    _, check = look(copy, refs)
    assert check.passed is False
    assert "pictures or cameras differ" in check.text


def test_no_samples_say_nothing(dataset):
    assert find_samples(dataset, (), N_ROWS) == ()
    assert check_samples(dataset, (), (), N_ROWS) == ()
    assert seen_frames(()) == frozenset()
