"""Recording a run: what is kept, that nothing waits for it, and what a kill leaves."""

import contextlib
import dataclasses
import multiprocessing
import os
import resource
import shutil
import signal

import numpy as np
import pytest

from gwp_edge import runtime
from gwp_edge.child_process import start_shielded
from gwp_edge.errors import DeviceError, SpecError
from gwp_edge.mailbox import Board
from gwp_edge.motor import MotorOptions
from gwp_edge.observe import ObservationLimits
from gwp_edge.policy_options import PolicyOptions
from gwp_edge.record import Recorder
from gwp_edge.robots import load_robot
from gwp_edge.runtime import RunOptions, run
from gwp_edge.session_format import TABLES, Session, SessionWriter, table_dtype
from gwp_edge.shared_memory import PREFIX, SHM_DIR
from gwp_edge.status import EventKind, Mode
from gwp_edge.testing import make_spec
from gwp_edge.types import Frame

SPEC = make_spec(cameras=("cam_high", "cam_left_wrist"))
# Generous: nothing here measures speed.
LIMITS = ObservationLimits(
    frame_age_ns=1_500_000_000, state_age_ns=2_000_000_000, stall_ns=2_000_000_000
)
MOTOR = MotorOptions(
    feedback_warn_ns=1_000_000_000, feedback_hold_ns=2_000_000_000, feedback_fault_ns=4_000_000_000
)


def recorded_run(folder, *, on_status=None, **changes):
    options = RunOptions(
        spec=SPEC,
        robot=load_robot("kinematic", SPEC),
        policy=PolicyOptions(
            factory="gwp_edge.testing:create_scripted_policy",
            kwargs={"spec": SPEC, "swing_s": 1.0, "latency_s": 0.05},
            limits=LIMITS,
        ),
        motor=MOTOR,
        duration_s=1.0,
        guardian_timeout_s=2.0,
        record=folder,
    )
    return run(dataclasses.replace(options, **changes), on_status=on_status)


def memory_files():
    return {p.name for p in SHM_DIR.glob(f"{PREFIX}*") if "-tap-" in p.name}


@pytest.fixture(scope="module")
def session(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "session"
    before = memory_files()
    summary = recorded_run(folder)
    assert summary.exit_code == 0, summary.message
    assert memory_files() <= before
    return summary, Session.open(folder)


def test_signal_while_the_recorder_starts_ends_the_run_and_the_session(tmp_path, monkeypatch):
    """SIGTERM once killed the main process there, which left memory and half a session."""
    start = runtime._start_recorder

    def signalled(*arguments):
        os.kill(os.getpid(), signal.SIGTERM)
        return start(*arguments)

    monkeypatch.setattr(runtime, "_start_recorder", signalled)
    before = {p.name for p in SHM_DIR.glob(f"{PREFIX}*")}
    summary = recorded_run(tmp_path / "session")
    assert (summary.outcome, summary.exit_code) == ("terminated", 1)
    assert summary.message == "asked to terminate; the arm was not moved"
    assert Session.open(tmp_path / "session").end is not None
    assert {p.name for p in SHM_DIR.glob(f"{PREFIX}*")} <= before


def test_session_holds_every_chunk_with_what_made_it(session):
    summary, recorded = session
    assert recorded.end is not None
    lost = recorded.end.n_lost
    assert len(recorded.chunks) + lost["chunks"] == summary.n_chunks
    assert len(recorded.chunks) >= 3
    for chunk in recorded.chunks:
        frames = [recorded.frame(int(row)) for row in chunk["frame_rows"]]
        assert [f.camera for f in frames] == list(SPEC.cameras)
        assert min(f.t_captured_ns for f in frames) == chunk["t_observed_ns"]
        assert {f.domain for f in frames} == {"sim"}
        assert chunk["t_observed_ns"] <= chunk["t_started_ns"] <= chunk["t_published_ns"]
        assert np.isfinite(chunk["actions"]).all()
        assert chunk["period_ns"] == SPEC.period_ns
    guided = recorded.chunks[recorded.chunks["previous_idx"] >= 0]
    assert (guided["previous_idx"] == guided["chunk_idx"] - 1).all()
    assert len(guided) >= 1
    assert (guided["n_frozen_rows"] > 0).all()


def test_session_holds_states_commands_and_ticks_in_order(session):
    summary, recorded = session
    for table in (recorded.states["t_ns"], recorded.commands["t_ns"], recorded.ticks["t_woke_ns"]):
        assert len(table) > 50
        assert (np.diff(table) > 0).all()
    assert len(recorded.ticks) + recorded.end.n_lost["ticks"] == summary.n_ticks
    # What was commanded is what the ticks say was sent.
    assert len(recorded.commands) == pytest.approx(len(recorded.ticks), abs=2)
    assert Mode.RUN in recorded.ticks["mode"]


def test_session_says_what_ran_and_what_was_said(session):
    _, recorded = session
    assert recorded.spec == SPEC
    assert recorded.header.policy["factory"] == "gwp_edge.testing:create_scripted_policy"
    assert recorded.header.robot["name"] == "kinematic"
    assert recorded.header.software["numpy"] == np.__version__
    events = recorded.events()
    assert {who for who, _ in events} >= {"policy"}
    assert any(e.kind is EventKind.CHECK_PASSED for _, e in events)


def test_recorded_pictures_of_the_policy_are_exact(session, tmp_path):
    _, recorded = session
    rows = recorded.chunks["frame_rows"].ravel()
    assert set(recorded.frames["codec"][rows]) == {0}
    noise = np.random.default_rng(0).integers(0, 256, (48, 64, 3), np.uint8)
    frame = Frame(
        camera="cam_left_wrist",
        image=noise,
        t_captured_ns=3,
        t_received_ns=4,
        frame_idx=5,
        domain="global",
    )
    writer = SessionWriter(tmp_path, recorded.header)
    writer.append_frame(1, frame, "png")
    writer.append_frame(1, frame, "jpeg")
    writer.close({})
    again = Session.open(tmp_path)
    exact, lossy = again.frame(0), again.frame(1)
    np.testing.assert_array_equal(exact.image, noise)
    assert not np.array_equal(lossy.image, noise)
    for name in ("camera", "t_captured_ns", "t_received_ns", "frame_idx", "domain"):
        assert getattr(exact, name) == getattr(frame, name)


def test_session_cut_off_by_a_kill_is_read_up_to_its_last_record(session, tmp_path):
    _, recorded = session
    cut = tmp_path / "cut"
    cut.mkdir()
    for path in recorded.folder.iterdir():
        data = path.read_bytes()
        if path.name == "end.json":
            continue
        (cut / path.name).write_bytes(data[:-3] if path.suffix == ".tbl" else data)
    again = Session.open(cut)
    assert again.end is None
    assert len(again.chunks) == len(recorded.chunks) - 1
    assert len(again.states) == len(recorded.states) - 1
    assert (again.commands == recorded.commands[:-1]).all()


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("name", TABLES)
def test_session_copied_in_part_is_refused_by_table_and_counts(session, tmp_path, name, whole):
    """A folder of which half had been copied was replayed and exported as if it were all."""
    _, recorded = session
    shutil.copytree(recorded.folder, tmp_path, dirs_exist_ok=True)
    path, n_bytes = tmp_path / f"{name}.tbl", table_dtype(name, SPEC).itemsize
    n = path.stat().st_size // n_bytes
    os.truncate(path, n_bytes * (n - 2) + (0 if whole else 5))
    part = "" if whole else " and a part of one"
    with pytest.raises(SpecError) as refused:
        Session.open(tmp_path)
    assert str(refused.value) == (
        f"{path}: expected the {n} records that end.json counts, got {n - 2}{part}; "
        "copy the session again"
    )


@pytest.mark.parametrize("left", [100, None])
def test_session_copied_without_all_of_its_pictures_is_refused(session, tmp_path, left):
    _, recorded = session
    shutil.copytree(recorded.folder, tmp_path, dirs_exist_ok=True)
    path = tmp_path / "frames.bin"
    if left is None:
        path.unlink()
    else:
        os.truncate(path, left)
    with pytest.raises(SpecError, match=r"frames\.bin: .*; copy the session again"):
        Session.open(tmp_path)


def test_record_into_a_used_folder_is_refused_before_anything_starts(tmp_path):
    (tmp_path / "something").touch()
    with pytest.raises(SpecError, match="is not empty"):
        recorded_run(tmp_path)


def test_recorder_that_dies_does_not_stop_the_run(tmp_path):
    board = Board.create(SPEC.n_channels, SPEC.n_rows)
    recorder = Recorder(
        tmp_path / "s", board, SPEC, load_robot("kinematic", SPEC), policy={"factory": "x"}
    )
    try:
        recorder.await_ready()
        os.kill(recorder._process.pid, signal.SIGKILL)
        (problem,) = recorder.stop()
        assert "incomplete" in problem
        assert recorder.stop() == []
    finally:
        board.close()
        board.unlink()
    assert Session.open(tmp_path / "s").end is None


def test_recording_on_a_full_disk_ends_and_says_why_during_the_run(tmp_path):
    """Said at the end only, and without its reason, an hour of demonstrations would be lost."""
    folder = tmp_path / "s"
    seen = []

    def fill_the_disk(status):
        if status.mode is Mode.RUN and not seen:
            seen.append(status.run_s)
            (recorder,) = [c for c in multiprocessing.active_children() if c.name == "gwp-record"]
            resource.prlimit(recorder.pid, resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))

    summary = recorded_run(folder, on_status=fill_the_disk)
    assert summary.exit_code == 0, summary.message
    (fault,) = [f for f in summary.faults if "recording" in f]
    assert fault == f"recording to {folder} is incomplete: {folder}: File too large"
    assert len(Session.open(folder).states) > 0


@contextlib.contextmanager
def full_disk():
    """Let no file of this process grow, nor of those that it starts."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_recording_whose_disk_is_full_at_the_very_end_can_be_read(tmp_path, session):
    """An empty end.json was left: every command refused the session as malformed."""
    _, recorded = session
    writer = SessionWriter(tmp_path, recorded.header)
    writer.append("states", recorded.states)
    writer.flush()
    with pytest.raises(OSError, match="File too large"), full_disk():
        writer.close({})
    again = Session.open(tmp_path)
    assert again.end is None
    assert len(again.states) == len(recorded.states)


@pytest.mark.parametrize("is_there", [False, True])
def test_recording_that_cannot_start_on_a_full_disk_leaves_nothing(tmp_path, monkeypatch, is_there):
    """An empty session.json was left, and the next try was refused: the folder is not empty."""
    folder = tmp_path / "s"
    if is_there:
        folder.mkdir()

    def start_on_a_full_disk(process):
        with full_disk():
            start_shielded(process)

    monkeypatch.setattr("gwp_edge.record.start_shielded", start_on_a_full_disk)
    with pytest.raises(DeviceError, match=r"did not start: .*File too large"):
        recorded_run(folder)
    assert list(tmp_path.rglob("*")) == ([folder] if is_there else [])


def test_recorder_that_died_while_it_started_leaves_nothing_but_what_is_not_its_own(
    tmp_path, monkeypatch
):
    folder = tmp_path / "s"

    await_ready = Recorder.await_ready

    def die(recorder):
        await_ready(recorder)
        (folder / "notes.txt").touch()  # by a user, meanwhile
        raise DeviceError("did not start")

    monkeypatch.setattr(Recorder, "await_ready", die)
    with pytest.raises(DeviceError, match="did not start"):
        recorded_run(folder)
    assert [p.name for p in folder.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize("name", ["session.json", "frames.bin"])
def test_recording_beside_another_that_began_meanwhile_leaves_that_alone(
    tmp_path, monkeypatch, name
):
    """Both saw an empty folder; the second must neither write over the first nor remove it."""

    def start_second(process):
        (tmp_path / name).write_text("of the first")
        start_shielded(process)

    monkeypatch.setattr("gwp_edge.record.start_shielded", start_second)
    with pytest.raises(DeviceError, match=r"did not start: .*File exists"):
        recorded_run(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == [name]
    assert (tmp_path / name).read_text() == "of the first"


def test_recorder_that_cannot_start_says_why(tmp_path):
    board = Board.create(SPEC.n_channels, SPEC.n_rows)
    board.unlink()
    recorder = Recorder(
        tmp_path / "s", board, SPEC, load_robot("kinematic", SPEC), policy={"factory": "x"}
    )
    try:
        with pytest.raises(DeviceError, match=r"did not start.*is not there"):
            recorder.await_ready()
    finally:
        recorder.stop()
        board.close()


@pytest.mark.parametrize("damage", ["missing", "version", "malformed"])
def test_open_what_is_no_session_is_refused(tmp_path, session, damage):
    _, recorded = session
    text = (recorded.folder / "session.json").read_text()
    if damage == "version":
        (tmp_path / "session.json").write_text(text.replace('"version": 1', '"version": 99'))
    elif damage == "malformed":
        (tmp_path / "session.json").write_text(text[: len(text) // 2])
    expected = {
        "missing": "is no session",
        "version": "of version 1, got 99",
        "malformed": "malformed",
    }
    with pytest.raises(SpecError, match=expected[damage]):
        Session.open(tmp_path)
