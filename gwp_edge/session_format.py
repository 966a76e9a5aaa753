"""A recorded run on disk: append-only files that survive a kill, and their reader.

``session.json`` says what ran; every table is a file of fixed-size records whose layout follows
from the policy's spec; ``frames.bin`` holds the pictures that ``frames.tbl`` points at.
``end.json`` is there only when the recording was closed, and counts what was written: a session
that holds anything else was copied in part and is refused. Without it the process was killed, and
the session is read up to its last whole record.
"""

from __future__ import annotations

import contextlib
import io
import json
import zlib
from pathlib import Path
from typing import Any, BinaryIO, Final, Literal, get_args

import msgspec
import numpy as np
import numpy.typing as npt
from PIL import Image

from gwp_edge.chunking import Method
from gwp_edge.errors import SpecError
from gwp_edge.mailbox import TICK_DTYPE, TIMING_DTYPE, command_dtype, state_dtype
from gwp_edge.spec import PolicySpec
from gwp_edge.status import Event, EventKind
from gwp_edge.types import ClockDomain, Frame, ImageArray

VERSION: Final = 1
TABLES: Final = ("states", "commands", "ticks", "timings", "chunks", "frames")
#: What is made at the start, in this order; ``end.json`` comes last.
FILES: Final = ("session.json", *(f"{name}.tbl" for name in TABLES), "frames.bin", "events.jsonl")
METHODS: Final[tuple[Method, ...]] = get_args(Method)
DOMAINS: Final[tuple[ClockDomain, ...]] = get_args(ClockDomain)
Codec = Literal["png", "jpeg"]
_CODECS: Final[tuple[Codec, ...]] = get_args(Codec)
_JPEG_QUALITY: Final = 95

FRAME_DTYPE: Final = np.dtype(
    [
        ("camera", np.int64),
        ("frame_idx", np.int64),
        ("t_captured_ns", np.int64),
        ("t_received_ns", np.int64),
        ("domain", np.int64),
        ("codec", np.int64),
        ("offset_bytes", np.int64),
        ("n_bytes", np.int64),
    ]
)


class SessionHeader(msgspec.Struct, frozen=True, kw_only=True):
    """What ran.

    Attributes:
        version: of this format.
        spec: of the policy.
        policy: what made the policy, and with which options; strings, for the reader.
        task: prompt that was followed; empty for the policy's own choice.
        robot: the robot file as a mapping.
        software: names and versions.
        t_start_unix_ns: wall clock at the start.
        t_start_ns: the monotonic clock at the same moment.
    """

    version: int
    spec: PolicySpec
    policy: dict[str, str]
    task: str
    robot: dict[str, Any]
    software: dict[str, str]
    t_start_unix_ns: int
    t_start_ns: int


class SessionEnd(msgspec.Struct, frozen=True, kw_only=True):
    """How the recording ended: records written, and records lost because it was too slow."""

    n_written: dict[str, int]
    n_lost: dict[str, int]


def chunk_dtype(spec: PolicySpec) -> np.dtype[np.void]:
    """Return the record of one chunk and of everything that made it.

    ``frame_rows`` are rows of the frame table in the order of the spec's cameras, -1 where the
    picture was lost. ``previous_idx`` is the chunk that guided it, -1 for none. Without a trace
    (``has_trace`` 0) noise, canvas hash and latent are zero.
    """
    n_cameras, D, H = len(spec.cameras), spec.n_channels, spec.n_rows
    return np.dtype(
        [
            ("chunk_idx", np.int64),
            ("t_observed_ns", np.int64),
            ("t_state_ns", np.int64),
            ("t_started_ns", np.int64),
            ("t_published_ns", np.int64),
            ("period_ns", np.int64),
            ("previous_idx", np.int64),
            ("method", np.int64),
            ("n_frozen_rows", np.int64),
            ("n_horizon_rows", np.int64),
            ("beta", np.float64),
            ("warm_start_sigma", np.float64),
            ("has_trace", np.int64),
            ("frame_rows", np.int64, (n_cameras,)),
            ("state", np.float64, (D,)),
            ("actions", np.float64, (H, D)),
            ("noise", np.float32, (H, spec.network.n_action_channels)),
            ("canvas_sha256", np.uint8, (32,)),
            ("latent", np.float32, spec.latent_shape),
        ]
    )


def table_dtype(name: str, spec: PolicySpec) -> np.dtype[Any]:
    """Return the record of a table."""
    return {
        "states": lambda: state_dtype(spec.n_channels),
        "commands": lambda: command_dtype(spec.n_channels),
        "ticks": lambda: TICK_DTYPE,
        "timings": lambda: TIMING_DTYPE,
        "chunks": lambda: chunk_dtype(spec),
        "frames": lambda: FRAME_DTYPE,
    }[name]()


class SessionWriter:
    """Writes a session. Threads: one owner.

    Args:
        folder: an existing, empty folder.
        header: what runs.

    Raises:
        OSError: a file cannot be made or is there already; what was made is removed.
    """

    def __init__(self, folder: Path, header: SessionHeader) -> None:
        self._folder = folder
        self._spec = header.spec
        self.n_written = dict.fromkeys(TABLES, 0)
        files: dict[str, BinaryIO] = {}
        try:
            for name in FILES:
                files[name] = (folder / name).open("xb")
            with files["session.json"] as file:
                file.write(_header_text(header))
        except OSError:
            # A full disk takes empty files; they would be in the way of the next try.
            for name, file in files.items():
                (folder / name).unlink()
                with contextlib.suppress(OSError):
                    file.close()
            raise
        self._tables: dict[str, BinaryIO] = {name: files[f"{name}.tbl"] for name in TABLES}
        self._pictures: BinaryIO = files["frames.bin"]
        self._events: BinaryIO = files["events.jsonl"]

    def append(self, table: str, records: npt.NDArray[Any]) -> None:
        """Write records of a table.

        Raises:
            SpecError: they have another layout than the table.
        """
        records = np.atleast_1d(records)
        expected = table_dtype(table, self._spec)
        if records.dtype != expected:
            raise SpecError(f"session table {table}: expected {expected}, got {records.dtype}")
        self._tables[table].write(records.tobytes())
        self.n_written[table] += len(records)

    def append_frame(self, camera_idx: int, frame: Frame, codec: Codec) -> int:
        """Write a picture; return its row in the frame table."""
        data = io.BytesIO()
        picture = Image.fromarray(frame.image)
        if codec == "png":
            # Run lengths alone: of camera pictures smaller and faster than the usual search.
            picture.save(data, "png", compress_level=1, compress_type=zlib.Z_RLE)
        else:
            picture.save(data, "jpeg", quality=_JPEG_QUALITY, subsampling=0)
        record = (
            camera_idx,
            frame.frame_idx,
            frame.t_captured_ns,
            frame.t_received_ns,
            DOMAINS.index(frame.domain),
            _CODECS.index(codec),
            self._pictures.tell(),
            data.tell(),
        )
        # The picture first: a row must never point at what is not there.
        self._pictures.write(data.getbuffer())
        self._pictures.flush()
        self.append("frames", np.array([record], FRAME_DTYPE))
        return self.n_written["frames"] - 1

    def append_event(self, who: str, event: Event) -> None:
        """Write a line that a process said."""
        line = {"t_ns": event.t_ns, "who": who, "kind": event.kind.name, "text": event.text}
        self._events.write(json.dumps(line).encode() + b"\n")

    def flush(self) -> None:
        """Hand everything to the kernel, so that a kill of this process loses nothing."""
        for file in (*self._tables.values(), self._pictures, self._events):
            file.flush()

    def close(self, n_lost: dict[str, int]) -> None:
        """Finish; safe to call twice."""
        if self._events.closed:
            return
        for file in (*self._tables.values(), self._pictures, self._events):
            file.close()
        end = SessionEnd(n_written=self.n_written, n_lost=n_lost)
        path = self._folder / "end.json"
        try:
            path.write_bytes(msgspec.json.encode(end))
        except OSError:
            # Half of it would make the whole session unreadable; without it, it was cut off.
            path.unlink(missing_ok=True)
            raise


def remove_session(folder: Path, header: SessionHeader) -> None:
    """Remove the files of the session that ``header`` began; those of another one stay.

    Raises:
        OSError: it cannot be read or removed.
    """
    if (folder / FILES[0]).read_bytes() == _header_text(header):
        for name in (*FILES, "end.json"):
            (folder / name).unlink(missing_ok=True)


def _header_text(header: SessionHeader) -> bytes:
    return msgspec.json.format(msgspec.json.encode(header), indent=2)


class Session:
    """A recorded run, read. Threads: one owner.

    Attributes:
        folder: where it is.
        header: what ran.
        end: how the recording ended, or None where it was cut off.
        states: table; see ``table_dtype`` for the fields of each.
        commands: table.
        ticks: table.
        timings: table.
        chunks: table.
        frames: table.
    """

    def __init__(self, folder: Path, header: SessionHeader, end: SessionEnd | None) -> None:
        self.folder = folder
        self.header = header
        self.end = end
        self.states = self._table("states")
        self.commands = self._table("commands")
        self.ticks = self._table("ticks")
        self.timings = self._table("timings")
        self.chunks = self._table("chunks")
        self.frames = self._table("frames")
        if end is not None:
            self._check_pictures()

    @classmethod
    def open(cls, folder: Path | str) -> Session:
        """Open a session.

        Raises:
            SpecError: there is none, it is of another version or damaged, or it was closed with
                other counts of records than it has now.
        """
        folder = Path(folder)
        try:
            header = msgspec.json.decode((folder / "session.json").read_bytes(), type=SessionHeader)
        except OSError as e:
            raise SpecError(
                f"{folder}: is no session ({e.strerror}: session.json); record one by "
                "gwp-edge run --record"
            ) from e
        except msgspec.MsgspecError as e:
            raise SpecError(f"{folder}/session.json: malformed ({e})") from e
        if header.version != VERSION:
            raise SpecError(
                f"{folder}: expected a session of version {VERSION}, got {header.version}; "
                "use the gwp-edge that recorded it"
            )
        end_path = folder / "end.json"
        try:
            end = (
                msgspec.json.decode(end_path.read_bytes(), type=SessionEnd)
                if end_path.exists()
                else None
            )
        except msgspec.MsgspecError as e:
            raise SpecError(f"{end_path}: malformed ({e})") from e
        return cls(folder, header, end)

    @property
    def spec(self) -> PolicySpec:
        """Of the policy that ran."""
        return self.header.spec

    def frame(self, row: int) -> Frame:
        """Return the frame at a row of the frame table.

        Raises:
            SpecError: there is no such row, or its picture is damaged.
        """
        if not 0 <= row < len(self.frames):
            raise SpecError(f"{self.folder}: no frame row {row}; it has {len(self.frames)}")
        record = self.frames[row]
        return Frame(
            camera=self.spec.cameras[int(record["camera"])],
            image=self._picture(record, row),
            t_captured_ns=int(record["t_captured_ns"]),
            t_received_ns=int(record["t_received_ns"]),
            frame_idx=int(record["frame_idx"]),
            domain=DOMAINS[int(record["domain"])],
        )

    def events(self) -> list[tuple[str, Event]]:
        """Return what the processes said, as (process, event)."""
        lines = (self.folder / "events.jsonl").read_text().splitlines()
        found = []
        for line in lines:
            try:
                entry = json.loads(line)
            except ValueError:
                continue  # cut off by a kill
            event = Event(t_ns=entry["t_ns"], kind=EventKind[entry["kind"]], text=entry["text"])
            found.append((str(entry["who"]), event))
        return found

    def _picture(self, record: npt.NDArray[Any], row: int) -> ImageArray:
        try:
            with (self.folder / "frames.bin").open("rb") as file:
                file.seek(int(record["offset_bytes"]))
                data = file.read(int(record["n_bytes"]))
            return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
        except (OSError, SyntaxError, ValueError) as e:
            raise SpecError(f"{self.folder}/frames.bin: frame row {row} is damaged ({e})") from e

    def _table(self, name: str) -> npt.NDArray[Any]:
        dtype = table_dtype(name, self.spec)
        path = self.folder / f"{name}.tbl"
        try:
            data = path.read_bytes()
        except OSError as e:
            raise SpecError(f"{path}: cannot be read: {e.strerror}") from e
        n_whole, n_over_bytes = divmod(len(data), dtype.itemsize)
        n_counted = n_whole if self.end is None else self.end.n_written.get(name, 0)
        if n_whole != n_counted or (self.end is not None and n_over_bytes):
            part = " and a part of one" if n_over_bytes else ""
            raise SpecError(
                f"{path}: expected the {n_counted} records that end.json counts, got "
                f"{n_whole}{part}; copy the session again"
            )
        # A kill may cut the last record; what was before it is whole.
        return np.frombuffer(data[: n_whole * dtype.itemsize], dtype)

    def _check_pictures(self) -> None:
        """Check that no picture of the frame table was cut off, without reading them."""
        path = self.folder / "frames.bin"
        ends = self.frames["offset_bytes"] + self.frames["n_bytes"]
        expected = int(ends.max(initial=0))
        try:
            found = path.stat().st_size
        except OSError as e:
            raise SpecError(f"{path}: cannot be read: {e.strerror}; copy the session again") from e
        if found < expected:
            raise SpecError(
                f"{path}: expected the {expected} bytes that frames.tbl points at, got {found}; "
                "copy the session again"
            )
