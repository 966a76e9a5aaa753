"""Replay: equal where nothing changed, and the first stage named where something did."""

import dataclasses
import json
import os
import shutil
import signal
from pathlib import Path

import msgspec
import numpy as np
import pytest
import typer
from replay_policy import StagedPolicy
from typer.testing import CliRunner

from gwp_edge.commands.sessions import replay as replay_command
from gwp_edge.console import EXIT_INTERRUPTED, one_line_errors
from gwp_edge.errors import SpecError
from gwp_edge.motor import MotorOptions
from gwp_edge.observe import ObservationLimits
from gwp_edge.policy_options import PolicyOptions
from gwp_edge.replay import replay
from gwp_edge.robots import load_robot
from gwp_edge.runtime import RunOptions, run
from gwp_edge.session_export import export_lerobot
from gwp_edge.session_format import Session, chunk_dtype, table_dtype
from gwp_edge.status import Mode
from gwp_edge.testing import make_spec

SPEC = make_spec(cameras=("cam_high", "cam_left_wrist"))
LIMITS = ObservationLimits(
    frame_age_ns=400_000_000, state_age_ns=2_000_000_000, stall_ns=2_000_000_000
)
MOTOR = MotorOptions(
    feedback_warn_ns=1_000_000_000, feedback_hold_ns=2_000_000_000, feedback_fault_ns=4_000_000_000
)


def record(folder, spec, factory, kwargs, **changes):
    options = RunOptions(
        spec=spec,
        robot=load_robot("kinematic", spec),
        policy=PolicyOptions(factory=factory, kwargs=kwargs, limits=LIMITS, replan_hz=8.0),
        motor=MOTOR,
        duration_s=2.0,
        guardian_timeout_s=2.0,
        record=folder,
    )
    run(dataclasses.replace(options, **changes))
    return Session.open(folder)


@pytest.fixture(scope="module")
def session(tmp_path_factory):
    folder = tmp_path_factory.mktemp("replay") / "session"
    session = record(folder, SPEC, "replay_policy:create", {"spec": SPEC})
    assert session.end is not None
    return session


@pytest.fixture
def copy_of(session, tmp_path):
    """Return a function that copies the session with its chunk table changed."""

    def change(edit):
        folder = tmp_path / "copy"
        shutil.copytree(session.folder, folder)
        path = folder / "chunks.tbl"
        chunks = np.frombuffer(path.read_bytes(), chunk_dtype(SPEC)).copy()
        edit(chunks)
        path.write_bytes(chunks.tobytes())
        return Session.open(folder)

    return change


def test_replay_of_the_same_policy_is_equal_to_the_bit(session):
    report = replay(session, StagedPolicy(SPEC, seed=99), tolerance=0.0)
    assert report.n_replayed == report.n_chunks == len(session.chunks)
    assert report.n_replayed >= 4
    assert (session.chunks["previous_idx"] >= 0).any()
    assert report.first_divergence is None
    assert set(report.channel_errors.values()) == {0.0}
    assert all(c.canvas_equal for c in report.chunks)


def test_replay_of_another_policy_names_the_actions(session):
    report = replay(session, StagedPolicy(SPEC, gain=0.06), tolerance=1e-4)
    first = report.first_divergence
    assert first.diverged == "actions"
    assert first.canvas_equal
    assert first.latent_error == 0.0
    assert first.actions_rad == pytest.approx(0.01, rel=0.2)
    assert first.actions_m == pytest.approx(0.01 * 0.05, rel=0.2)
    assert report.n_diverged == report.n_replayed


def test_replay_of_another_vision_names_the_latent(session):
    report = replay(session, StagedPolicy(SPEC, latent_offset=0.1), tolerance=1.0)
    first = report.first_divergence
    assert (first.diverged, first.canvas_equal) == ("latent", True)
    assert first.latent_error == pytest.approx(0.1, rel=1e-3)


def test_replay_with_another_picture_names_the_canvas_of_that_chunk(copy_of):
    def exchange(chunks):
        # A picture of the other camera is of another tint.
        chunks["canvas_sha256"][2] ^= 1

    report = replay(copy_of(exchange), StagedPolicy(SPEC), tolerance=0.0)
    assert report.first_divergence.diverged == "canvas"
    assert [c.chunk_idx for c in report.chunks if c.diverged] == [2]


def test_replay_with_other_noise_diverges(copy_of):
    def shift(chunks):
        chunks["noise"][1] += 1.0

    report = replay(copy_of(shift), StagedPolicy(SPEC), tolerance=1e-6)
    assert [(c.chunk_idx, c.diverged) for c in report.chunks if c.diverged] == [(1, "actions")]


def test_replay_of_a_recorded_nan_answered_by_a_number_diverges(copy_of):
    def break_one(chunks):
        chunks["actions"][-1] = np.nan

    report = replay(copy_of(break_one), StagedPolicy(SPEC), tolerance=1.0)
    assert report.chunks[-1].diverged == "actions"
    assert report.chunks[-1].actions_rad == np.inf


def test_replay_that_answers_nan_diverges(session):
    report = replay(session, StagedPolicy(SPEC, gain=np.nan), tolerance=1.0)
    assert report.first_divergence.diverged == "actions"
    assert report.first_divergence.actions_rad == np.inf


def test_replay_leaves_out_what_was_lost_and_counts_it(copy_of):
    def lose(chunks):
        chunks["has_trace"][0] = 0
        chunks["frame_rows"][1, 0] = -1
        chunks["previous_idx"][2] = 12345

    report = replay(copy_of(lose), StagedPolicy(SPEC), tolerance=0.0)
    assert report.skipped == {"noise": 1, "pictures": 1, "the chunk that guided it": 1}
    assert report.n_replayed == report.n_chunks - 3


def test_replay_with_nothing_to_replay_is_refused(copy_of):
    def lose(chunks):
        chunks["has_trace"] = 0

    with pytest.raises(SpecError, match="without noise"):
        replay(copy_of(lose), StagedPolicy(SPEC), tolerance=0.0)


@pytest.mark.parametrize(
    ("spec", "text"),
    [
        (make_spec(cameras=("cam_right_wrist",)), "needs camera cam_right_wrist"),
        (make_spec(2, cameras=SPEC.cameras), "other channels"),
        (make_spec(n_rows=24, cameras=SPEC.cameras), "noise is of shape"),
    ],
)
def test_replay_with_a_policy_that_does_not_fit_is_refused(session, spec, text):
    with pytest.raises(SpecError, match=text):
        replay(session, StagedPolicy(spec), tolerance=0.0)


def test_replay_on_another_canvas_compares_the_actions_alone(session):
    view = SPEC.canvas.views[0]
    canvas = msgspec.structs.replace(SPEC.canvas, views=(view,))
    spec = msgspec.structs.replace(SPEC, canvas=canvas)
    report = replay(session, StagedPolicy(spec), tolerance=10.0)
    assert report.chunks[0].canvas_equal is None
    assert report.first_divergence is None or report.first_divergence.diverged == "latent"


def test_export_is_a_dataset_that_calibration_reads(session, tmp_path):
    pytest.importorskip("av")
    pytest.importorskip("pyarrow")
    from gwp_edge.lerobot.dataset import LeRobotDataset

    report = export_lerobot(session, tmp_path / "dataset", task="swing")
    with LeRobotDataset.open(tmp_path / "dataset") as dataset:
        assert dataset.n_frames == report.n_frames >= SPEC.n_rows
        assert dataset.n_episodes == report.n_episodes
        assert dataset.fps == 30
        assert set(dataset.cameras) == set(SPEC.cameras)
        dataset.check_against(
            SPEC, episodes=[e.idx for e in dataset.episodes if e.n_frames >= SPEC.n_rows]
        )
        assert dataset.tasks == {0: "swing"}
        longest = max(dataset.episodes, key=lambda e: e.n_frames).idx
        states, actions = dataset.state(longest), dataset.action(longest)
        assert np.ptp(states[:, 0]) > 0.005, "the arm moved"
        # The command leads the joints that lag behind it, never by much.
        assert np.abs(actions - states).max() < 0.1
        for camera in SPEC.cameras:
            image = dataset.image(longest, 5, camera).astype(int)
            tint = sum(camera.encode()) % 64
            # The background, within what AV1 does to a flat colour.
            assert np.abs(image[:3, :3] - [tint, 48, 96 - tint]).max() < 12


def test_export_has_the_layout_of_a_dataset_of_lerobot(session, tmp_path):
    """Compared with a dataset that LeRobot itself has written."""
    pq = pytest.importorskip("pyarrow.parquet")
    model = Path(__file__).parents[1] / "data" / "dataset"
    out = tmp_path / "dataset"
    export_lerobot(session, out)
    theirs, ours = (json.loads((r / "meta" / "info.json").read_text()) for r in (model, out))
    assert ours.keys() == theirs.keys()
    fixed = ("codebase_version", "data_path", "video_path", "chunks_size")
    assert {k: ours[k] for k in fixed} == {k: theirs[k] for k in fixed}
    vector = ours["features"]["observation.state"]
    assert vector["names"] == [c.name for c in SPEC.channels]
    video = theirs["features"]["observation.images.cam_high"]
    mine = ours["features"]["observation.images.cam_high"]
    assert mine["info"].keys() == video["info"].keys()
    for name in ("data/chunk-000/file-000.parquet", "meta/tasks.parquet"):
        a, b = pq.read_schema(model / name), pq.read_schema(out / name)
        # The width differs: the model robot has 14 channels.
        strip = str.maketrans("", "", "0123456789")
        assert [(f.name, str(f.type).translate(strip)) for f in b] == [
            (f.name, str(f.type).translate(strip)) for f in a
        ]
    name = "meta/episodes/chunk-000/file-000.parquet"
    a, b = pq.read_schema(model / name), pq.read_schema(out / name)
    columns = {f.name: str(f.type) for f in a if "cam_right_wrist" not in f.name}
    assert {f.name: str(f.type) for f in b} == columns
    stats = [json.loads((r / "meta" / "stats.json").read_text()) for r in (model, out)]
    assert stats[1]["action"].keys() == stats[0]["action"].keys()
    image = np.shape(stats[1]["observation.images.cam_high"]["mean"])
    assert image == np.shape(stats[0]["observation.images.cam_high"]["mean"])


def test_export_over_something_is_refused_and_leaves_nothing(session, tmp_path):
    pytest.importorskip("pyarrow")
    (tmp_path / "dataset").mkdir()
    with pytest.raises(SpecError, match="exists already"):
        export_lerobot(session, tmp_path / "dataset")
    with pytest.raises(SpecError, match="expected a positive rate"):
        export_lerobot(session, tmp_path / "other", fps=0)
    assert [p.name for p in tmp_path.iterdir()] == ["dataset"]


def test_export_without_motion_is_refused(session, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(session.folder, folder)
    ticks = session.ticks.copy()
    ticks["mode"] = Mode.HOLD
    (folder / "ticks.tbl").write_bytes(ticks.tobytes())
    with pytest.raises(SpecError, match="never moved the arm"):
        export_lerobot(Session.open(folder), tmp_path / "out")


def killed(session, folder, **kept):
    """Return a copy of what a kill leaves: no end.json, and of some tables the first records."""
    shutil.copytree(session.folder, folder)
    (folder / "end.json").unlink()
    for name, n_records in kept.items():
        # A kill cuts records as well.
        os.truncate(folder / f"{name}.tbl", n_records * table_dtype(name, SPEC).itemsize + 5)
    return Session.open(folder)


@pytest.mark.parametrize("name", ["states", "commands", "frames"])
def test_export_of_a_killed_recording_ends_where_its_first_table_ends(session, tmp_path, name):
    """The last state or command was held to the end of the motion, as if the arm had stood."""
    pytest.importorskip("av")
    pytest.importorskip("pyarrow")
    from gwp_edge.lerobot.dataset import LeRobotDataset

    moving_ns = session.ticks["t_woke_ns"][session.ticks["mode"] == Mode.RUN]
    t_cut_ns = (moving_ns[0] + moving_ns[-1]) // 2
    stamps = getattr(session, name)["t_captured_ns" if name == "frames" else "t_ns"]
    cut = killed(session, tmp_path / "killed", **{name: int(np.argmax(stamps > t_cut_ns))})
    whole = export_lerobot(session, tmp_path / "whole")
    report = export_lerobot(cut, tmp_path / "part")
    assert 0 < report.n_frames < whole.n_frames
    assert report.n_frames <= (t_cut_ns - moving_ns[0]) / 1e9 * report.fps + report.n_episodes
    with (
        LeRobotDataset.open(tmp_path / "part") as part,
        LeRobotDataset.open(tmp_path / "whole") as all_of_it,
    ):
        for i in range(report.n_episodes):
            n = part.episodes[i].n_frames
            for now, then in (
                (part.state(i), all_of_it.state(i)),
                (part.action(i), all_of_it.action(i)),
            ):
                np.testing.assert_array_equal(now, then[:n])


def test_replay_of_a_killed_recording_says_so_and_leaves_out_pictures_that_it_lost(
    session, tmp_path
):
    """Tables are written one after the other: a chunk may be there before its frame rows."""
    n_frames = int(session.chunks["frame_rows"][-1].min())
    cut = killed(session, tmp_path / "killed", frames=n_frames)
    report = replay(cut, StagedPolicy(SPEC), tolerance=0.0)
    n_without = int((session.chunks["frame_rows"] >= n_frames).any(axis=1).sum())
    assert report.skipped == {"pictures": n_without}
    assert report.n_replayed == report.n_chunks - n_without
    assert report.n_lost is None, "nobody counted"
    counted = replay(session, StagedPolicy(SPEC), tolerance=0.0)
    assert counted.n_lost == session.end.n_lost["chunks"]


def command(*arguments):
    app = typer.Typer()
    app.command()(replay_command)
    return CliRunner().invoke(app, [str(a) for a in arguments])


def test_command_exports(session, tmp_path):
    pytest.importorskip("pyarrow")
    result = command(session.folder, "--to-lerobot", tmp_path / "d")
    assert result.exit_code == 0, result.output
    assert "30 fps" in result.output
    assert (tmp_path / "d" / "meta" / "info.json").is_file()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_command_killed_while_it_exports_leaves_nothing(session, tmp_path, monkeypatch, number):
    """SIGTERM left the folder of the unfinished dataset behind."""
    pytest.importorskip("pyarrow")

    def killed(writer, *_):
        assert [p.name for p in tmp_path.iterdir()] == [".d.part"]
        os.kill(os.getpid(), number)
        pytest.fail("the signal did nothing")

    monkeypatch.setattr("gwp_edge.session_export.DatasetWriter.add", killed)
    with pytest.raises(SystemExit) as stopped, one_line_errors():
        replay_command(session.folder, to_lerobot=tmp_path / "d")
    assert stopped.value.code == EXIT_INTERRUPTED
    assert list(tmp_path.iterdir()) == []


def test_command_says_that_a_recording_was_cut_off(session, tmp_path):
    pytest.importorskip("pyarrow")
    folder = killed(session, tmp_path / "killed").folder
    result = command(folder, "--to-lerobot", tmp_path / "d")
    assert result.exit_code == 0, result.output
    assert "the recording was cut off" in result.output
    for source, cut_off in ((folder, True), (session.folder, False)):
        result = command(source, "--to-lerobot", tmp_path / str(cut_off), "--json")
        assert json.loads(result.stdout)["cut_off"] is cut_off


@pytest.mark.parametrize("words", [(), ("--to-lerobot", "dataset")])
def test_command_on_a_session_copied_in_part_is_refused(session, tmp_path, monkeypatch, words):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(session.folder, "copy")
    for name in ("states", "commands"):
        path = Path("copy") / f"{name}.tbl"
        os.truncate(path, path.stat().st_size // 3)
    result = command("copy", *words)
    assert isinstance(result.exception, SpecError)
    n = len(session.states)
    assert f"states.tbl: expected the {n} records" in str(result.exception)
    assert not Path("dataset").exists()


def test_command_without_a_bundle_asks_for_one(session):
    result = command(session.folder)
    assert isinstance(result.exception, SpecError)
    assert "--bundle" in str(result.exception)


@pytest.mark.export
def test_bundle_replays_itself_and_not_another_seed_of_weights(exported, tmp_path):
    """The whole way: a real bundle on the engine, recorded in a run, replayed by the command."""
    from gwp_edge.manifest import read_spec

    bundle = exported("gwp05")
    spec = read_spec(bundle)
    kwargs = {"path": str(bundle), "threads": 1, "check_golden": False}
    session = record(
        tmp_path / "session",
        spec,
        "gwp_edge.policy:load",
        kwargs,
        skip_checks=frozenset({"statistics", "first action", "latency"}),
    )
    # An untrained policy may be stopped soon; what it answered until then is replayed.
    assert len(session.chunks) >= 2
    result = command(session.folder, "--json", "--threads", 1)
    assert result.exit_code == 0, result.output
    fewer = exported("gwp05", n_steps=3)
    result = command(session.folder, "--bundle", fewer, "--threads", 1)
    assert result.exit_code == 1, result.output
    assert "in its actions: canvas equal" in " ".join(result.output.split())
