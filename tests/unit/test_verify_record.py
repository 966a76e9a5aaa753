"""A bad calibration shows in its record: too few samples, growing ranges, other pictures."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("pyarrow")
pytest.importorskip("av")

from gwp_edge.calibration.observers import TensorObserver
from gwp_edge.calibration.record import CalibrationRecord, save_record
from gwp_edge.calibration.sampling import choose_frames, reference_samples, split_dataset
from gwp_edge.calibration.verify_record import MIN_SAMPLES, view_record
from gwp_edge.errors import SpecError
from gwp_edge.lerobot.dataset import LeRobotDataset

DATASET = Path(__file__).resolve().parents[1] / "data" / "dataset"


@pytest.fixture
def dataset():
    with LeRobotDataset.open(DATASET) as opened:
        yield opened


def record(folder, dataset, *, n_samples, growth=0.0, **options):
    """Write a record of one tensor whose magnitude grows with the sample's number."""
    frames = choose_frames(split_dataset(dataset, seed=0).calibration, n_samples=n_samples, seed=0)
    observer = TensorObserver("denoise/blocks.0.attn1.qkv")
    rng = np.random.default_rng(0)
    for i in range(n_samples):
        for step in range(2):
            x = rng.normal(size=(40, 8)).astype(np.float32) * (1 + growth * (i % 2) + step)
            observer.observe(x, sample_idx=i, step_idx=step)
    path = folder / "record.safetensors"
    save_record(
        path,
        CalibrationRecord(
            tensors={observer.name: observer},
            samples=reference_samples(dataset, frames),
            **options,
        ),
    )
    return path


def test_record_with_enough_samples_passes_and_shows_its_ranges(dataset, tmp_path):
    view = view_record(record(tmp_path, dataset, n_samples=16))
    assert [c.passed for c in view.checks] == [True]
    (found,) = view.ranges
    assert found.name == "denoise/blocks.0.attn1.qkv"
    assert len(found.steps) == 2
    assert found.steps[1] > 1.5 * found.steps[0]
    assert view.notes == ()
    assert len(view.frames(dataset)) == 16
    (check,) = view.check_samples(dataset, 48)
    assert check.passed
    assert check.text.startswith("4 of 16")


def test_calibration_on_one_sample_fails(dataset, tmp_path):
    (check,) = view_record(record(tmp_path, dataset, n_samples=1)).checks
    assert check.passed is False
    assert f"1 samples, expected at least {MIN_SAMPLES}" in check.text


def test_ranges_that_still_grow_fail(dataset, tmp_path):
    (check,) = view_record(record(tmp_path, dataset, n_samples=16, growth=2.0)).checks
    assert check.passed is False
    assert "1 of 1 ranges still grow" in check.text


def test_synthetic_calibration_is_noted(dataset, tmp_path):
    view = view_record(record(tmp_path, dataset, n_samples=8, is_synthetic=True))
    assert view.notes == ("the calibration samples are not recorded data",)


def test_exchanged_cameras_show_in_the_calibration_samples(dataset, tmp_path):
    path = record(tmp_path, dataset, n_samples=8)
    copy = tmp_path / "dataset"
    shutil.copytree(DATASET, copy)
    videos = copy / "videos"
    left, right = (videos / f"observation.images.cam_{side}_wrist" for side in ("left", "right"))
    left.rename(videos / "aside")
    right.rename(left)
    (videos / "aside").rename(right)
    with LeRobotDataset.open(copy) as exchanged:
        (check,) = view_record(path).check_samples(exchanged, 48)
    assert check.passed is False
    assert "is not what calibration saw" in check.text


def test_samples_of_another_dataset_are_not_called_checked(dataset, tmp_path):
    path = record(tmp_path, dataset, n_samples=8)
    copy = tmp_path / "other"
    shutil.copytree(DATASET, copy)
    with LeRobotDataset.open(copy) as other:
        (check,) = view_record(path).check_samples(other, 48)
        assert check.passed is None
        assert view_record(path).frames(other) == set()


def test_no_record_says_nothing(dataset):
    view = view_record(None)
    assert view.checks == view.ranges == view.check_samples(dataset, 48) == ()


def test_damaged_record_is_an_error(tmp_path):
    path = tmp_path / "record.safetensors"
    path.write_bytes(b"nothing")
    with pytest.raises(SpecError, match="not a readable calibration record"):
        view_record(path)
