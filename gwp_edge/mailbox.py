"""What the processes of one run tell each other, all in one shared memory segment.

Everything has one writer: chunks and their timings come from the policy process, states, commands,
ticks and histograms from the motor process, events from each process by its own ring, and every
single word from the process that its comment names. Nobody ever waits for anybody.
"""

from __future__ import annotations

import time
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from gwp_edge.errors import SpecError
from gwp_edge.profiling.stamps import STAMP_DTYPE
from gwp_edge.shared_memory import LatestRing, SharedSegment, aligned, fence, unique_name
from gwp_edge.status import Event, EventKind, Request, Word
from gwp_edge.types import ArmState, Chunk

_TEXT_BYTES: Final = 480
N_HISTOGRAM_BINS: Final = 20_001


TICK_DTYPE: Final = np.dtype(
    [
        ("t_planned_ns", np.int64),
        ("t_woke_ns", np.int64),
        ("t_sent_ns", np.int64),
        ("t_feedback_ns", np.int64),
        ("t_observed_ns", np.int64),
        ("chunk_idx", np.int64),
        ("row", np.float32),
        ("flags", np.int32),
        ("mode", np.int32),
        # What the driver took to send; 0 where nothing was sent.
        ("send_ns", np.int32),
    ]
)
TIMING_DTYPE: Final = np.dtype(
    [
        ("chunk_idx", np.int64),
        ("t_observed_ns", np.int64),
        ("t_started_ns", np.int64),
        ("t_published_ns", np.int64),
        ("frame_age_ns", np.int64),
        ("frame_skew_ns", np.int64),
        ("preprocess_ns", np.int64),
        ("vision_ns", np.int64),
        ("prefill_ns", np.int64),
        ("denoise_ns", np.int64),
        ("postprocess_ns", np.int64),
        ("n_frozen_rows", np.int64),
    ]
)
_EVENT_DTYPE: Final = np.dtype(
    [("t_ns", np.int64), ("kind", np.int64), ("text", f"S{_TEXT_BYTES}")]
)


class RecordRing:
    """Records in order, the oldest overwritten; a reader that is too slow learns how many it lost.

    Threads: one writer, any readers, each with its own object.
    """

    def __init__(self, buffer: memoryview, dtype: npt.DTypeLike, n_slots: int) -> None:
        self._count = buffer[:8].cast("q")
        self._n_slots = n_slots
        self.records: npt.NDArray[Any] = np.ndarray((n_slots,), dtype, buffer, offset=64)
        self._next = 0
        self.n_lost = 0

    @classmethod
    def size_bytes(cls, dtype: npt.DTypeLike, n_slots: int) -> int:
        """Return the bytes of buffer that a ring needs."""
        return 64 + aligned(np.dtype(dtype).itemsize * n_slots)

    @property
    def count(self) -> int:
        """Records appended so far."""
        return self._count[0]

    def append(self, record: tuple[Any, ...]) -> None:
        """Write one record, fields in order."""
        count = self._count[0]
        # The count before says which slot is written next; a reader must see it before the data.
        fence()
        self.records[count % self._n_slots] = record
        fence()
        self._count[0] = count + 1

    def newest(self) -> npt.NDArray[Any] | None:
        """Return a copy of the newest record, or None before the first."""
        while True:
            count = self._count[0]
            if count == 0:
                return None
            fence()
            record: npt.NDArray[Any] = self.records[(count - 1) % self._n_slots].copy()
            fence()
            if self._count[0] - count < self._n_slots - 1:
                return record

    def drain(self) -> npt.NDArray[Any]:
        """Return copies of the records since the last call, oldest first."""
        end = self._count[0]
        fence()
        start = max(self._next, end - self._n_slots + 1, 0)
        idx = np.arange(start, end)
        copies = self.records[idx % self._n_slots]
        fence()
        # The slot of record i is being overwritten once the count has reached i + n_slots.
        n_overwritten = max(0, min(self._count[0] - self._n_slots + 1 - start, end - start))
        self.n_lost += start - self._next + n_overwritten
        self._next = end
        return copies[n_overwritten:]

    def release(self) -> None:
        """Let go of the buffer, so that its segment can be unmapped."""
        self.records = np.empty(0, self.records.dtype)
        self._count.release()


class EventRing:
    """Lines of text of one process for the supervisor. Threads: one writer, one reader."""

    def __init__(self, ring: RecordRing) -> None:
        self._ring = ring

    def say(self, kind: EventKind, text: str) -> None:
        """Append one line; longer than about 480 bytes is cut."""
        line = " ".join(text.split())
        self._ring.append((time.monotonic_ns(), int(kind), line.encode()[:_TEXT_BYTES]))

    def drain(self) -> list[Event]:
        """Return the lines since the last call."""
        return [
            Event(
                t_ns=int(r["t_ns"]),
                kind=EventKind(int(r["kind"])),
                text=bytes(r["text"]).decode(errors="replace"),
            )
            for r in self._ring.drain()
        ]


class Board:
    """The shared memory of one run. Threads: one owner per process; see the module's rule.

    Attributes:
        name: of the segment, for ``attach``.
        n_channels: D.
        n_rows: H.
        words: by ``Word``; one aligned 64-bit load or store each.
        events: a ring per process: ``motor``, ``policy``, ``guardian``.
        ticks: the motor's tick log.
        timings: one record per chunk, by the policy process.
        stamps: likewise, in detail, for profiles.
        lateness_us: histogram of the motor's wake-up lateness, 1 us bins; the last one is open.
        busy_us: histogram of the time from wake-up to sent, likewise.
        interventions: shape (D, 4), ticks limited by position, velocity, acceleration, workspace.
    """

    def __init__(self, segment: SharedSegment, n_channels: int, n_rows: int) -> None:
        self.name = segment.name
        self.n_channels = n_channels
        self.n_rows = n_rows
        self._segment = segment
        buffer = segment.buffer
        sections = _sections(n_channels, n_rows)
        parts = {key: buffer[start : start + size] for key, (start, size) in sections.items()}
        self.words = parts["words"][: 8 * len(Word)].cast("q")
        self._chunks = LatestRing(parts["chunks"], _chunk_dtype(n_channels, n_rows), 4)
        self._states = RecordRing(parts["states"], state_dtype(n_channels), _N_STATES)
        self._commands = RecordRing(parts["commands"], command_dtype(n_channels), _N_STATES)
        self.ticks = RecordRing(parts["ticks"], TICK_DTYPE, _N_TICKS)
        self.timings = RecordRing(parts["timings"], TIMING_DTYPE, _N_TIMINGS)
        self.stamps = RecordRing(parts["stamps"], STAMP_DTYPE, _N_STAMPS)
        self._event_rings = {
            who: RecordRing(parts[f"events_{who}"], _EVENT_DTYPE, _N_EVENTS) for who in _SPEAKERS
        }
        self.events = {who: EventRing(ring) for who, ring in self._event_rings.items()}
        self.lateness_us = _array(parts["lateness"], (N_HISTOGRAM_BINS,))
        self.busy_us = _array(parts["busy"], (N_HISTOGRAM_BINS,))
        self.interventions = _array(parts["interventions"], (n_channels, 4))
        self._n_chunks_read = 0
        self._closed = False

    @classmethod
    def create(cls, n_channels: int, n_rows: int) -> Board:
        """Make the board of a new run.

        Raises:
            DeviceError: shared memory is missing or too small.
        """
        sections = _sections(n_channels, n_rows)
        n_bytes = max(start + size for start, size in sections.values())
        return cls(SharedSegment.create(unique_name("run"), n_bytes), n_channels, n_rows)

    @classmethod
    def attach(cls, name: str, n_channels: int, n_rows: int) -> Board:
        """Open the board that the supervisor made.

        Raises:
            DeviceError: there is none of this name.
        """
        return cls(SharedSegment.attach(name), n_channels, n_rows)

    def publish_chunk(self, chunk: Chunk) -> None:
        """Make ``chunk`` the newest one. Writer: policy process.

        Raises:
            SpecError: its shape is not (H, D).
        """
        if chunk.actions.shape != (self.n_rows, self.n_channels):
            raise SpecError(
                f"chunk {chunk.chunk_idx}: expected actions of shape "
                f"({self.n_rows}, {self.n_channels}), got {chunk.actions.shape}; "
                "the policy and its spec disagree"
            )
        with self._chunks.writing() as slot:
            slot["t_observed_ns"] = chunk.t_observed_ns
            slot["period_ns"] = chunk.period_ns
            slot["chunk_idx"] = chunk.chunk_idx
            slot["actions"][...] = chunk.actions

    def new_chunk(self) -> Chunk | None:
        """Return the newest chunk if this object has not returned it before."""
        if self._chunks.count == self._n_chunks_read:
            return None
        newest = self._chunks.latest()
        if newest is None:
            return None
        record, self._n_chunks_read = newest
        return Chunk(
            actions=record["actions"],
            t_observed_ns=int(record["t_observed_ns"]),
            period_ns=int(record["period_ns"]),
            chunk_idx=int(record["chunk_idx"]),
        )

    def publish_state(self, state: ArmState) -> None:
        """Append a measured state. Writer: motor process."""
        self._states.append((state.t_received_ns, state.enabled, state.position, state.velocity))

    def new_states(self) -> npt.NDArray[Any]:
        """Return the states since the last call: t_ns, enabled, position (D,), velocity (D,)."""
        return self._states.drain()

    def publish_command(self, position: npt.NDArray[np.float64], t_ns: int) -> None:
        """Note the command that was sent. Writer: motor process."""
        self._commands.append((t_ns, position))

    def ask(self, request: Request) -> None:
        """Ask the motor process for something; never takes a stronger request back."""
        if self.words[Word.REQUEST] < request:
            self.words[Word.REQUEST] = int(request)

    def ask_at_once(self, request: Request) -> None:
        """Ask from inside of a signal handler, which may interrupt ``ask`` between look and store.

        Nothing takes such a request back.
        """
        if self.words[Word.SIGNAL_REQUEST] < request:
            self.words[Word.SIGNAL_REQUEST] = int(request)

    @property
    def request(self) -> Request:
        """What the motor process is asked for."""
        return Request(max(self.words[Word.REQUEST], self.words[Word.SIGNAL_REQUEST]))

    def last_command(self) -> tuple[npt.NDArray[np.float64], int] | None:
        """Return the last command sent, (D,), and its time."""
        record = self._commands.newest()
        if record is None:
            return None
        return np.array(record["position"]), int(record["t_ns"])

    def new_commands(self) -> npt.NDArray[Any]:
        """Return the commands since the last call: t_ns, position (D,)."""
        return self._commands.drain()

    @property
    def n_lost(self) -> dict[str, int]:
        """Records that this object was too slow to read, by kind."""
        rings = {
            "states": self._states,
            "commands": self._commands,
            "ticks": self.ticks,
            "timings": self.timings,
            "stamps": self.stamps,
        }
        return {kind: ring.n_lost for kind, ring in rings.items()}

    def close(self) -> None:
        """Unmap; safe to call twice. The arrays of this object must not be used any more."""
        if self._closed:
            return
        self._closed = True
        for ring in (self._chunks, self._commands, self._states, self.ticks, self.timings):
            ring.release()
        self.stamps.release()
        for ring in self._event_rings.values():
            ring.release()
        self.lateness_us = self.busy_us = self.interventions = np.empty(0, np.int64)
        self.words.release()
        self._segment.close()

    def unlink(self) -> None:
        """Remove the name, once everybody is attached; the memory goes with its last user."""
        self._segment.unlink()


_SPEAKERS: Final = ("motor", "policy", "guardian")
_N_STATES: Final = 512
_N_TICKS: Final = 1 << 16
_N_TIMINGS: Final = 1024
_N_STAMPS: Final = 256
_N_EVENTS: Final = 128


def _array(part: memoryview, shape: tuple[int, ...]) -> npt.NDArray[np.int64]:
    array: npt.NDArray[np.int64] = np.ndarray(shape, np.int64, part)
    return array


def _chunk_dtype(n_channels: int, n_rows: int) -> np.dtype[np.void]:
    return np.dtype(
        [
            ("t_observed_ns", np.int64),
            ("period_ns", np.int64),
            ("chunk_idx", np.int64),
            ("actions", np.float64, (n_rows, n_channels)),
        ]
    )


def state_dtype(n_channels: int) -> np.dtype[np.void]:
    """Return the record of one state: t_ns, enabled, position (D,), velocity (D,)."""
    return np.dtype(
        [
            ("t_ns", np.int64),
            ("enabled", np.int64),
            ("position", np.float64, (n_channels,)),
            ("velocity", np.float64, (n_channels,)),
        ]
    )


def command_dtype(n_channels: int) -> np.dtype[np.void]:
    """Return the record of one command: t_ns, position (D,)."""
    return np.dtype([("t_ns", np.int64), ("position", np.float64, (n_channels,))])


def _sections(n_channels: int, n_rows: int) -> dict[str, tuple[int, int]]:
    """Start and size of every part of the segment, bytes; both sides compute the same."""
    sizes = {
        "words": 8 * len(Word),
        "chunks": LatestRing.size_bytes(_chunk_dtype(n_channels, n_rows), 4),
        "commands": RecordRing.size_bytes(command_dtype(n_channels), _N_STATES),
        "states": RecordRing.size_bytes(state_dtype(n_channels), _N_STATES),
        "ticks": RecordRing.size_bytes(TICK_DTYPE, _N_TICKS),
        "timings": RecordRing.size_bytes(TIMING_DTYPE, _N_TIMINGS),
        "stamps": RecordRing.size_bytes(STAMP_DTYPE, _N_STAMPS),
        "lateness": 8 * N_HISTOGRAM_BINS,
        "busy": 8 * N_HISTOGRAM_BINS,
        "interventions": 8 * 4 * n_channels,
    }
    for who in _SPEAKERS:
        sizes[f"events_{who}"] = RecordRing.size_bytes(_EVENT_DTYPE, _N_EVENTS)
    sections: dict[str, tuple[int, int]] = {}
    start = 0
    for key, size in sizes.items():
        sections[key] = (start, size)
        start += aligned(size)
    return sections
