"""The board under a writer in another process that goes as fast as it can: nothing torn."""

import multiprocessing

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gwp_edge.errors import SpecError
from gwp_edge.mailbox import Board, EventKind, RecordRing
from gwp_edge.shared_memory import SHM_DIR
from gwp_edge.status import Word
from gwp_edge.types import ArmState, Chunk

D, H = 14, 48
# Long enough for the reader to be interrupted in the middle of a copy many times.
N_CHUNKS = 20_000


def _chunk(i: int) -> Chunk:
    """Every number in it is i, so that a mixture shows."""
    return Chunk(actions=np.full((H, D), float(i)), t_observed_ns=i, period_ns=i + 1, chunk_idx=i)


def _hammer(name: str) -> None:
    board = Board.attach(name, D, H)
    for i in range(N_CHUNKS):
        board.publish_chunk(_chunk(i))
        board.publish_command(np.full(D, float(i)), i)
        board.publish_state(
            ArmState(
                position=np.full(D, float(i)),
                velocity=np.full(D, float(i)),
                t_received_ns=i,
                enabled=True,
            )
        )
    board.words[Word.POLICY_N_CHUNKS] = N_CHUNKS
    board.close()


@pytest.fixture
def board():
    board = Board.create(D, H)
    yield board
    board.close()
    board.unlink()
    assert not (SHM_DIR / board.name).exists()


def test_board_under_hammering_writer_never_gives_torn_values(board):
    writer = multiprocessing.get_context("spawn").Process(target=_hammer, args=(board.name,))
    writer.start()
    reader = Board.attach(board.name, D, H)
    chunks, states = [], []
    try:
        while writer.is_alive() or reader.words[Word.POLICY_N_CHUNKS] == 0:
            assert writer.exitcode in (None, 0)
            chunk = reader.new_chunk()
            if chunk is not None:
                i = chunk.chunk_idx
                assert (chunk.actions == i).all()
                assert (chunk.t_observed_ns, chunk.period_ns) == (i, i + 1)
                chunks.append(i)
            command = reader.last_command()
            if command is not None:
                assert (command[0] == command[1]).all()
            new = reader.new_states()
            assert (new["position"] == new["t_ns"][:, None]).all()
            assert (new["velocity"] == new["t_ns"][:, None]).all()
            states += new["t_ns"].tolist()
        chunk = reader.new_chunk()
        assert (chunk.chunk_idx if chunk else chunks[-1]) == N_CHUNKS - 1
        assert reader.new_chunk() is None
    finally:
        writer.join()
        reader.close()
    assert len(chunks) > 10
    assert chunks == sorted(set(chunks))
    assert states == sorted(set(states))


@settings(max_examples=50, deadline=None)
@given(bursts=st.lists(st.integers(0, 20), max_size=20), n_slots=st.integers(2, 8))
def test_record_ring_gives_every_record_once_or_counts_it_as_lost(bursts, n_slots):
    dtype = np.dtype([("a", np.int64)])
    buffer = memoryview(bytearray(RecordRing.size_bytes(dtype, n_slots)))
    writer, reader = RecordRing(buffer, dtype, n_slots), RecordRing(buffer, dtype, n_slots)
    n, seen = 0, []
    for burst in bursts:
        for _ in range(burst):
            writer.append((n,))
            n += 1
        seen += reader.drain()["a"].tolist()
    assert seen == sorted(set(seen))
    assert len(seen) + reader.n_lost == n
    assert not seen or seen[-1] == n - 1 or bursts[-1] == 0
    writer.release()
    reader.release()


def test_record_overwritten_while_it_is_copied_is_lost_not_torn():
    """Between copy and check the writer goes on; what it may have touched is not given out."""
    dtype = np.dtype([("a", np.int64)])
    buffer = memoryview(bytearray(RecordRing.size_bytes(dtype, 4)))
    writer, reader = RecordRing(buffer, dtype, 4), RecordRing(buffer, dtype, 4)
    for i in range(3):
        writer.append((i,))

    class Lapping:
        def __getitem__(self, idx):
            copies = writer.records[idx]
            for i in range(3, 6):
                writer.append((i,))
            return copies

    records, reader.records = reader.records, Lapping()
    # With 6 written, the slots of 0, 1 and (being written next) 2 are suspect.
    assert reader.drain()["a"].tolist() == []
    assert reader.n_lost == 3
    reader.records = records
    assert reader.drain()["a"].tolist() == [3, 4, 5]


def test_events_arrive_in_order_and_long_lines_are_cut(board):
    board.events["motor"].say(EventKind.WARNING, "one\nline")
    board.events["motor"].say(EventKind.ERROR, "ü" * 1000)
    first, second = board.events["motor"].drain()
    assert (first.kind, first.text) == (EventKind.WARNING, "one line")
    assert second.text.startswith("üüü")
    assert len(second.text.encode()) <= 480
    assert board.events["policy"].drain() == []


def test_chunk_of_another_shape_is_refused(board):
    chunk = Chunk(actions=np.zeros((H, D + 1)), t_observed_ns=1, period_ns=1)
    with pytest.raises(SpecError, match="policy and its spec disagree"):
        board.publish_chunk(chunk)
    assert board.new_chunk() is None
