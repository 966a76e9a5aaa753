"""Logging to Rerun: with the real library where it is installed, into a file."""

from __future__ import annotations

import importlib.util
import socket
import types
from collections import Counter

import numpy as np
import pytest
from profile_story import MS, SPEC, T0

from gwp_edge.errors import DeviceError, SpecError
from gwp_edge.mailbox import Board
from gwp_edge.profiling.rerun_log import DEFAULT_URL, RerunLogger, parse_target
from gwp_edge.record_tap import PolicyTap
from gwp_edge.shared_memory import SHM_DIR
from gwp_edge.status import EventKind, Mode, TickFlag
from gwp_edge.types import ArmState, Chunk, Frame, Observation

needs_rerun = pytest.mark.skipif(
    importlib.util.find_spec("rerun") is None, reason="needs the rerun extra"
)


@pytest.mark.parametrize(
    "target",
    ["viewer2", "http://127.0.0.1:9876", "rerun+http://127.0.0.1/proxy", "", "x.rrdx",
     "rerun+http://192.168.1.7:9876/proxy", "rerun+http://example.org:9876/proxy",
     "rerun+http://127.0.0.1:port/proxy"],
)  # fmt: skip
def test_parse_target_of_other_machines_and_nonsense_is_refused(target):
    with pytest.raises(SpecError, match="--rerun"):
        parse_target(target)


def test_parse_target_reads_files_and_viewers_of_this_machine(tmp_path):
    file = str(tmp_path / "a.rrd")
    assert parse_target(file) == (file, None)
    assert parse_target("viewer") == (None, DEFAULT_URL)
    for host in ("127.0.0.1", "localhost", "[::1]"):
        url = f"rerun+http://{host}:9000/proxy"
        assert parse_target(url) == (None, url)
    with pytest.raises(SpecError, match="does not exist"):
        parse_target(str(tmp_path / "no" / "a.rrd"))


def test_logger_without_the_library_names_the_extra(monkeypatch):
    monkeypatch.setattr("gwp_edge.profiling.rerun_log.importlib.util.find_spec", lambda _: None)
    with pytest.raises(DeviceError, match=r"gwp-edge\[rerun\]"):
        RerunLogger("viewer", SPEC)


@needs_rerun
def test_logger_without_a_viewer_says_how_to_start_one():
    with socket.socket() as taken:  # bound and not listening: nobody else can answer there
        taken.bind(("127.0.0.1", 0))
        url = f"rerun+http://127.0.0.1:{taken.getsockname()[1]}/proxy"
        with pytest.raises(DeviceError, match=r"rerun --bind 127\.0\.0\.1"):
            RerunLogger(url, SPEC)


def publish(board, tap):
    """What a run would publish: two plans, states, commands, ticks, a line."""
    D, H = SPEC.n_channels, SPEC.n_rows
    for i in range(10):
        t_ns = T0 + i * 5 * MS
        board.publish_state(
            ArmState(
                position=np.full(D, 0.1 * i), velocity=np.zeros(D), t_received_ns=t_ns, enabled=True
            )
        )
        board.publish_command(np.full(D, 0.2 * i), t_ns)
        flags = int(TickFlag.VELOCITY) if i == 4 else 0
        board.ticks.append((t_ns, t_ns + MS, t_ns + MS, t_ns, T0, 0, 1.0, flags, int(Mode.RUN), 1))
    for idx in range(2):
        captured_ns = T0 + idx * 30 * MS
        frames = tuple(
            Frame(camera=c, image=np.full((24, 32, 3), 90, np.uint8), t_captured_ns=captured_ns,
                  t_received_ns=captured_ns, frame_idx=idx)
            for c in SPEC.cameras
        )  # fmt: skip
        observation = Observation(frames=frames, state=np.zeros(D), t_state_ns=captured_ns)
        chunk = Chunk(actions=np.full((H, D), 0.5 * idx), t_observed_ns=captured_ns,
                      period_ns=SPEC.period_ns, chunk_idx=idx)  # fmt: skip
        tap.write(chunk, observation, types.SimpleNamespace(), t_started_ns=captured_ns,
                  t_published_ns=captured_ns + 20 * MS, previous_idx=-1, guidance=None)  # fmt: skip
    board.events["motor"].say(EventKind.WARNING, "a line")


@needs_rerun
def test_logger_writes_frames_joints_chunks_and_limits(tmp_path):
    from rerun.chunk import RrdReader

    file = tmp_path / "run.rrd"
    logger = RerunLogger(str(file), SPEC)
    board = Board.create(SPEC.n_channels, SPEC.n_rows)
    tap = PolicyTap(logger.tap_name, SPEC, [])
    try:
        logger.begin(board.name)
        publish(board, tap)
    finally:
        logger.end()
        logger.end()
        tap.close()
        board.close()
        board.unlink()
    assert logger.problems == []
    assert not (SHM_DIR / logger.tap_name).exists()
    chunks = list(RrdReader(file).stream())
    rows = Counter()
    for chunk in chunks:
        if not chunk.is_static:
            rows[chunk.entity_path] += chunk.num_rows
    assert rows["/joints/measured"] == rows["/joints/commanded"] == 10
    assert rows["/limits/kinds"] == rows["/motor/late_ms"] == 10
    assert rows["/chunks/plan"] == rows["/chunks/frame_to_chunk_ms"] == 2
    assert rows["/events/motor"] == 1
    for camera in SPEC.cameras:
        assert rows[f"/cameras/{camera}"] >= 1
    table = next(c for c in chunks if c.entity_path == "/joints/commanded" and not c.is_static)
    columns = table.to_record_batch().to_pydict()
    values = next(v for k, v in columns.items() if "scalars" in k.lower())
    assert values[3] == pytest.approx([0.6] * SPEC.n_channels)


@needs_rerun
def test_logger_whose_file_cannot_be_written_does_not_start(tmp_path):
    (tmp_path / "a.rrd").mkdir()
    logger = RerunLogger(str(tmp_path / "a.rrd"), SPEC)
    board = Board.create(SPEC.n_channels, SPEC.n_rows)
    try:
        with pytest.raises(DeviceError, match="did not start"):
            logger.begin(board.name)
    finally:
        logger.end()
        board.close()
        board.unlink()


@needs_rerun
@pytest.mark.export
def test_run_with_rerun_writes_a_recording(exported, tmp_path):
    pytest.importorskip("torch")
    from typer.testing import CliRunner

    from gwp_edge.cli import app

    path = tmp_path / "run.rrd"
    words = ["run", str(exported("gwp05")), "--robot", "kinematic", "--duration", "1"]
    words += ["--threads", "1", "--no-realtime", "--rerun", str(path)]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.output
    assert path.read_bytes()[:4] == b"RRF2"
    assert path.stat().st_size > 10_000
    refused = CliRunner().invoke(app, [*words[:-1], "nowhere"])
    assert refused.exit_code != 0
