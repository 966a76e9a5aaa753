"""Choosing samples, holding episodes out, refusing filler, and the record of it all."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("pyarrow")
pytest.importorskip("av")

from hypothesis import given, settings
from hypothesis import strategies as st
from lerobot_writer import edit_table, motion, picture, write_dataset

from gwp_edge.calibration.observers import ChannelObserver, TensorObserver
from gwp_edge.calibration.provenance import judge_dataset, require_recorded
from gwp_edge.calibration.record import CalibrationRecord, load_record, save_record
from gwp_edge.calibration.sampling import (
    FrameRange,
    SampleRef,
    choose_frames,
    hash_sample,
    load_samples,
    reference_samples,
    split_dataset,
)
from gwp_edge.errors import SpecError
from gwp_edge.lerobot.dataset import LeRobotDataset

pytestmark = pytest.mark.export
ROOT = Path(__file__).parents[1] / "data" / "dataset"


@pytest.fixture(scope="module")
def real():
    with LeRobotDataset.open(ROOT) as dataset:
        yield dataset


@settings(deadline=None)
@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=12),
    n_samples=st.integers(1, 60),
    seed=st.integers(0, 99),
)
def test_choose_frames_spreads_over_episodes_and_time(lengths, n_samples, seed):
    ranges = [FrameRange(episode=i, start=3, stop=3 + n) for i, n in enumerate(lengths)]
    n_samples = min(n_samples, sum(lengths))
    frames = choose_frames(ranges, n_samples=n_samples, seed=seed)
    assert len(set(frames)) == len(frames) == n_samples
    assert list(frames) == sorted(frames)
    counts = np.bincount([e for e, _ in frames], minlength=len(lengths))
    # Equal shares, as far as an episode has frames.
    assert all(c >= min(n, counts.max() - 1) for c, n in zip(counts, lengths, strict=True))
    for r in ranges:
        mine = np.array([f for e, f in frames if e == r.episode]) - r.start
        parts = [i * r.n_frames // len(mine) for i in range(len(mine) + 1)] if len(mine) else []
        for value, low, high in zip(mine, parts, parts[1:], strict=False):
            assert low <= value < high
    assert frames == choose_frames(ranges[::-1], n_samples=n_samples, seed=seed)


def test_choose_frames_is_the_same_on_every_machine_and_differs_by_seed():
    ranges = [FrameRange(episode=i, start=0, stop=100) for i in range(3)]
    assert choose_frames(ranges, n_samples=4, seed=0) == choose_frames(ranges, n_samples=4, seed=0)
    many = {choose_frames(ranges, n_samples=4, seed=s) for s in range(20)}
    assert len(many) == 20
    # A recorded choice: if this changes, records of earlier versions cannot be reproduced.
    assert choose_frames(ranges, n_samples=4, seed=7) == (
        (0, 7),
        (1, 26),
        (1, 68),
        (2, 5),
    )


@pytest.mark.parametrize("n_samples", [0, -1, 11])
def test_choose_frames_impossible_number_is_refused(n_samples):
    with pytest.raises(SpecError, match="expected 1 to 10"):
        choose_frames([FrameRange(episode=0, start=0, stop=10)], n_samples=n_samples, seed=0)


def test_split_holds_out_whole_episodes(real):
    seen = set()
    for seed in range(12):
        split = split_dataset(real, seed=seed)
        a = {r.episode for r in split.calibration}
        b = {r.episode for r in split.verification}
        assert a | b == {0, 1, 2, 3}
        assert not a & b
        assert len(b) == 1
        assert split.by == "episode"
        assert split == split_dataset(real, seed=seed)
        assert all(r.n_frames == real.episode(r.episode).n_frames for r in split.calibration)
        seen |= b
    assert seen == {0, 1, 2, 3}
    assert len(split_dataset(real, seed=0, held_out_share=0.99).calibration) == 1


def test_split_of_a_single_episode_is_in_time_with_a_gap(real):
    split = split_dataset(real, seed=0, episodes=[3], n_rows=20)
    (a,), (b,) = split.calibration, split.verification
    assert (a.start, b.stop) == (0, 96)
    assert b.start - a.stop == 20
    assert b.n_frames == 19
    assert split.by == "time"
    assert "one episode" in split.note


def test_split_leaves_episodes_out_that_are_shorter_than_a_window(tmp_path):
    """One of 400 recordings broken off once kept all of them from being used."""
    root = write_dataset(tmp_path, lengths=(20, 7, 20), files=(0, 0, 0))
    with LeRobotDataset.open(root) as dataset:
        split = split_dataset(dataset, seed=0, n_rows=8)
        used = {r.episode for r in (*split.calibration, *split.verification)}
        assert used == {0, 2}
        assert "1 of 3 episodes are shorter than a chunk of 8 frames" in split.note
        assert split_dataset(dataset, seed=0, n_rows=7).note == ""
        with pytest.raises(SpecError, match="chunk of 21 frames, the longest has 20"):
            split_dataset(dataset, seed=0, n_rows=21)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"episodes": []}, "no episode to calibrate on"),
        ({"episodes": [9]}, "no episode 9"),
        ({"held_out_share": 1.0}, "held-out share"),
        ({"episodes": [0], "n_rows": 70}, "record a second episode"),
    ],
)
def test_split_impossible_is_refused(real, options, message):
    with pytest.raises(SpecError, match=message):
        split_dataset(real, seed=0, **options)


def test_samples_load_by_reference_and_a_changed_one_is_refused(tmp_path):
    root = write_dataset(tmp_path, lengths=(20, 20), files=(0, 0))
    with LeRobotDataset.open(root) as dataset:
        refs = reference_samples(dataset, [(0, 3), (1, 7)], n_rows=8)
        assert len({r.sha256 for r in refs}) == 2
        assert [hash_sample(s) for s in load_samples(dataset, refs, n_rows=8)] == [
            r.sha256 for r in refs
        ]
        with pytest.raises(SpecError, match="episode 0, frame 3 is not the sample"):
            list(load_samples(dataset, refs, n_rows=9))
    # The last action in the window of the second sample, and nothing else.
    edit_table(
        root / "data/chunk-000/file-000.parquet",
        "action",
        lambda v: [*v[:34], [0.0, 0.0, 0.0], *v[35:]],
    )
    with LeRobotDataset.open(root) as dataset:
        loaded = load_samples(dataset, refs, n_rows=8)
        next(loaded)
        with pytest.raises(SpecError, match="episode 1, frame 7"):
            next(loaded)


# --- recorded or filler


def noise_picture(i, f, cell=1):
    rng = np.random.default_rng([i, f])
    small = rng.integers(0, 256, (48 // cell, 64 // cell, 3), dtype=np.uint8)
    return np.kron(small, np.ones((cell, cell, 1), np.uint8))


def noise_motion(n, D, i):
    return np.random.default_rng(i).standard_normal((n, D)).astype(np.float32)


FILLER = {
    "declared": ({"info": {"synthetic": True}}, "says synthetic"),
    "robot type": ({"info": {"robot_type": "Mock"}}, "robot_type Mock"),
    "flat": ({"video": lambda i, f: np.full((48, 64, 3), 90, np.uint8)}, "one flat colour"),
    "frozen": ({"video": lambda i, f: picture(0, 0)}, "front never changes"),
    "noise": ({"video": noise_picture}, "front shows noise"),
    "blocks": ({"video": lambda i, f: noise_picture(i, f, 8)}, "unrelated pictures"),
    "still arm": ({"state": lambda n, D, i: np.ones((n, D))}, "state never changes"),
    "noisy state": ({"state": noise_motion}, "state is noise"),
    "noisy action": ({"action": noise_motion}, "action is noise"),
}


# mpeg4 makes a still picture flicker by as much as a slow scene changes.
CASES = [(k, c) for k in FILLER for c in ("h264", "mpeg4") if (k, c) != ("frozen", "mpeg4")]


@pytest.mark.parametrize(("kind", "codec"), CASES)
def test_filler_is_refused_unless_allowed(tmp_path, kind, codec):
    options, message = FILLER[kind]
    root = write_dataset(tmp_path, lengths=(40, 30), files=(0, 0), codec=codec, **options)
    with LeRobotDataset.open(root) as dataset:
        with pytest.raises(SpecError, match=rf"{message}.*--allow-synthetic"):
            require_recorded(dataset)
        verdict = require_recorded(dataset, allow_synthetic=True)
    assert verdict.is_synthetic
    assert len(verdict.reasons) == 1


def test_smooth_recordings_pass(real, tmp_path):
    verdict = require_recorded(real)
    assert verdict.reasons == ()
    assert "little detail" in verdict.notes[0]  # its scene is drawn
    with LeRobotDataset.open(write_dataset(tmp_path)) as dataset:
        assert judge_dataset(dataset).reasons == ()


def test_arm_with_one_still_channel_passes(tmp_path):
    def state(n, D, i):
        s = motion(n, D, i)[0]
        s[:, 2] = 0.05
        return s

    with LeRobotDataset.open(write_dataset(tmp_path, state=state)) as dataset:
        assert judge_dataset(dataset).reasons == ()


# --- the record


def make_record():
    rng = np.random.default_rng(0)
    tensors = {f"blocks.{b}/ffn": TensorObserver(f"blocks.{b}/ffn", n_bins=512) for b in range(2)}
    channels = {"blocks.0/norm": ChannelObserver("blocks.0/norm")}
    for i in range(8):
        for step_idx in (9, 0):
            for observer in tensors.values():
                observer.observe(rng.standard_normal(50), sample_idx=i, step_idx=step_idx)
            channels["blocks.0/norm"].observe(rng.standard_normal((5, 3)), step_idx=step_idx)
    tensors["zero"] = TensorObserver("zero")
    tensors["zero"].observe([0.0], sample_idx=0)
    return CalibrationRecord(
        tensors=tensors,
        channels=channels,
        samples=(SampleRef(dataset="d", episode=1, frame=2, sha256="ab"),),
        is_synthetic=True,
        provenance={"seed": 3},
    )


def test_record_round_trip_is_exact_and_reproducible(tmp_path):
    record, path = make_record(), tmp_path / "record.safetensors"
    save_record(path, record)
    back = load_record(path)
    assert (back.samples, back.is_synthetic, back.provenance) == (
        record.samples,
        True,
        {"seed": 3},
    )
    assert back.tensors.keys() == record.tensors.keys()
    for name, observer in record.tensors.items():
        again = back.tensors[name]
        assert again.steps == observer.steps
        for step_idx in (None, *observer.steps):
            assert again.histogram(step_idx).to_dict() == observer.histogram(step_idx).to_dict()
        assert again.convergence() == observer.convergence()
    for step_idx in (None, 0, 9):
        np.testing.assert_array_equal(
            back.channels["blocks.0/norm"].amax(step_idx),
            record.channels["blocks.0/norm"].amax(step_idx),
        )
    # Neither reading back nor another order of collection changes a byte.
    backwards = dict(reversed(list(back.tensors.items())))
    save_record(tmp_path / "again", dataclasses.replace(back, tensors=backwards))
    assert (tmp_path / "again").read_bytes() == path.read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["again", "record.safetensors"]


def test_record_is_written_through_a_link(tmp_path):
    (tmp_path / "link").symlink_to("record.safetensors")
    save_record(tmp_path / "link", make_record())
    assert (tmp_path / "link").is_symlink()
    load_record(tmp_path / "record.safetensors")


def test_record_missing_damaged_or_foreign_is_refused(tmp_path):
    from safetensors.numpy import save_file

    path = tmp_path / "record"
    with pytest.raises(SpecError, match="not a readable calibration record"):
        load_record(path)
    save_record(path, make_record())
    content = path.read_bytes()
    path.write_bytes(content[:-9])
    with pytest.raises(SpecError, match="not a readable calibration record"):
        load_record(path)
    save_file({"x": np.zeros(1)}, path)
    with pytest.raises(SpecError, match="version 2, got None"):
        load_record(path)
    header = {"version": "2", "tensors": {"t": {"n_bins": 300, "step": {}, "group": {}}}}
    save_file({"x": np.zeros(1)}, path, metadata={"gwp-edge": json.dumps(header)})
    with pytest.raises(SpecError):
        load_record(path)
