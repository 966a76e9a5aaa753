"""What runs in the recorder's process."""

from __future__ import annotations

import hashlib
import os
import time
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from gwp_edge.child_process import leave_terminal
from gwp_edge.errors import DeviceError
from gwp_edge.frame_ring import FrameRing
from gwp_edge.mailbox import Board
from gwp_edge.record_tap import TapReader
from gwp_edge.session_format import DOMAINS, SessionHeader, SessionWriter, chunk_dtype
from gwp_edge.types import Frame

_POLL_S: Final = 0.005
_FLUSH_NS: Final = 500_000_000
_NICE: Final = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordSetup:
    """What the process needs; crosses to it by pickle."""

    folder: Path
    board: str
    tap: str
    header: SessionHeader


def record_main(setup: RecordSetup, pipe: Connection) -> None:
    """Record until told to stop, or until the run's process is gone."""
    # Ctrl-C ends the run; the recorder has the last moments to write.
    leave_terminal(killable=True)
    spec = setup.header.spec
    try:
        board = Board.attach(setup.board, spec.n_channels, spec.n_rows)
        listener = Listener(board, setup, SessionWriter(setup.folder, setup.header))
        pipe.send("ready")
        # The run waits for the recorder until here, and never after.
        os.nice(_NICE)
        while not pipe.poll():
            listener.step()
            time.sleep(_POLL_S)
        listener.step()
        pipe.send(listener.close())
    except (BrokenPipeError, EOFError):
        return  # the run's process died; everything is on disk
    except (OSError, DeviceError) as e:
        # A full disk ends the recording and nothing else.
        text = e.strerror if isinstance(e, OSError) else str(e)
        pipe.send(f"{setup.folder}: {text or e}")


class Listener:
    """Fetches from the run's shared memory and writes to a session. Threads: one owner."""

    def __init__(self, board: Board, setup: RecordSetup, writer: SessionWriter) -> None:
        self._board = board
        self._setup = setup
        self._spec = setup.header.spec
        self._writer = writer
        self._tap: TapReader | None = None
        self._rings: dict[str, FrameRing] = {}
        self._last_idx: dict[str, int] = {}
        self._n_frames_missed = 0
        self._t_flushed_ns = 0

    def step(self) -> None:
        """Fetch and write what is new."""
        board, writer = self._board, self._writer
        writer.append("states", board.new_states())
        writer.append("commands", board.new_commands())
        writer.append("ticks", board.ticks.drain())
        writer.append("timings", board.timings.drain())
        for who, ring in board.events.items():
            for event in ring.drain():
                writer.append_event(who, event)
        self._fetch_chunks()
        self._fetch_frames()
        now_ns = time.monotonic_ns()
        if now_ns - self._t_flushed_ns > _FLUSH_NS:
            self._t_flushed_ns = now_ns
            writer.flush()

    def close(self) -> dict[str, int]:
        """Finish the session; return how much was lost, by kind."""
        lost = {**self._board.n_lost, "frames": self._n_frames_missed}
        lost["chunks"] = 0 if self._tap is None else self._tap.n_lost
        self._writer.close(lost)
        for frames in self._rings.values():
            frames.close()
        if self._tap is not None:
            self._tap.close()
        self._board.close()
        return lost

    def _fetch_chunks(self) -> None:
        if self._tap is None:
            self._tap = TapReader.attach(self._setup.tap, self._spec)
            if self._tap is None:
                return
            for role, name in self._tap.rings.items():
                self._rings[role] = FrameRing.attach(name)
        for record in self._tap.drain():
            self._write_chunk(record)

    def _write_chunk(self, record: npt.NDArray[Any]) -> None:
        chunk = np.zeros(1, chunk_dtype(self._spec))
        for name in chunk.dtype.names or ():
            if name in (record.dtype.names or ()):
                chunk[name][0] = record[name]
        for i, camera in enumerate(self._spec.cameras):
            frame = Frame(
                camera=camera,
                image=record[f"image_{i}"],
                t_captured_ns=int(record[f"t_captured_ns_{i}"]),
                t_received_ns=int(record[f"t_received_ns_{i}"]),
                frame_idx=int(record[f"frame_idx_{i}"]),
                domain=DOMAINS[int(record[f"domain_{i}"])],
            )
            # What the policy saw is kept to the bit, so that it can be replayed.
            chunk["frame_rows"][0, i] = self._writer.append_frame(i, frame, "png")
            # Each takes as long as a camera's period.
            self._fetch_frames()
        if record["has_trace"]:
            digest = hashlib.sha256(record["canvas"].tobytes()).digest()
            chunk["canvas_sha256"][0] = np.frombuffer(digest, np.uint8)
        self._writer.append("chunks", chunk)

    def _fetch_frames(self) -> None:
        for role, frames in self._rings.items():
            self._fetch_frame(role, frames)

    def _fetch_frame(self, role: str, frames: FrameRing) -> None:
        try:
            frame = frames.latest(role)
        except DeviceError:
            return  # it has failed for good; the run says so itself
        last_idx = self._last_idx.get(role)
        if frame is None or frame.frame_idx == last_idx:
            return
        if last_idx is not None:
            self._n_frames_missed += max(0, frame.frame_idx - last_idx - 1)
        self._last_idx[role] = frame.frame_idx
        self._writer.append_frame(self._spec.cameras.index(role), frame, "jpeg")
