"""What runs in the process that logs to Rerun: frames, joints, chunks and limits of one run.

It reads the board and the policy's tap at low priority, as the recorder does, and holds a bounded
amount of memory: where the viewer is too slow, logging ends and the run does not notice.
"""

from __future__ import annotations

import os
import resource
import time
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from gwp_edge.child_process import leave_terminal
from gwp_edge.errors import DeviceError
from gwp_edge.mailbox import Board
from gwp_edge.profiling.raw import LIMIT_FLAGS, Records
from gwp_edge.record_tap import TapReader
from gwp_edge.spec import PolicySpec
from gwp_edge.status import EventKind

if TYPE_CHECKING:
    import rerun as rr

_POLL_S: Final = 0.02
_NICE: Final = 10
_PICTURE_EVERY_NS: Final = 100_000_000
_JPEG_QUALITY: Final = 75
_MAX_GROWTH_BYTES: Final = 1 << 30
_FLUSH_S: Final = 10.0
_LEVELS: Final = {
    EventKind.WARNING: "WARN",
    EventKind.ERROR: "ERROR",
    EventKind.CHECK_FAILED: "WARN",
}

# Seconds on the clock that every process of the run shares.
TIMELINE: Final = "monotonic"


@dataclass(frozen=True, slots=True, kw_only=True)
class RerunSetup:
    """What the process needs; crosses to it by pickle.

    Attributes:
        file: recording to write, or None.
        url: viewer to connect to, or None.
        board: name of the run's board.
        tap: name of the policy's tap.
        spec: of the policy.
    """

    file: str | None
    url: str | None
    board: str
    tap: str
    spec: PolicySpec


def rerun_main(setup: RerunSetup, pipe: Connection) -> None:
    """Log until told to stop, or until the run's process is gone."""
    # Ctrl-C ends the run; this process has the last moments to write.
    leave_terminal(killable=True)
    board: Board | None = None
    try:
        recording = open_recording(setup)
        board = Board.attach(setup.board, setup.spec.n_channels, setup.spec.n_rows)
        log = RunLog(recording, board, setup)
        pipe.send("ready")
        # From here on it must not be in the way; until here the run waits for it.
        os.nice(_NICE)
        while not pipe.poll(_POLL_S):
            log.step()
        log.step()
        log.close()
        recording.flush(timeout_sec=_FLUSH_S)
        recording.disconnect()
        pipe.send(log.n_lost)
    except (BrokenPipeError, EOFError):
        return  # the run's process died; what was flushed is there
    except (OSError, RuntimeError, ValueError, DeviceError) as e:
        # The library raises the first three. Whatever it is, it ends the logging and nothing else.
        pipe.send(f"{type(e).__name__}: {e}")
    finally:
        if board is not None:
            board.close()


def open_recording(setup: RerunSetup) -> rr.RecordingStream:
    """Open the stream to the file or the viewer."""
    import rerun as rr

    recording = rr.RecordingStream("gwp-edge")
    if setup.file is not None:
        recording.save(setup.file)
    else:
        recording.connect_grpc(setup.url)
    return recording


@dataclass(slots=True)
class RunLog:
    """Fetches from the run's shared memory and logs it. Threads: one owner.

    Args:
        recording: where to.
        board: of the run.
        setup: see there.

    Attributes:
        n_lost: records that were overwritten before they were fetched, by kind.
    """

    recording: rr.RecordingStream
    board: Board
    setup: RerunSetup
    n_lost: dict[str, int] = field(default_factory=dict)
    _tap: TapReader | None = None
    _t_picture_ns: int = 0
    _n_start_bytes: int = 0
    _is_full: bool = False

    def __post_init__(self) -> None:
        import rerun as rr

        names = [channel.name for channel in self.setup.spec.channels]
        for path in ("joints/measured", "joints/commanded", "limits/acted"):
            self.recording.log(path, rr.SeriesLines(names=names), static=True)
        kinds = [str(flag.name).lower() for flag in LIMIT_FLAGS]
        self.recording.log("limits/kinds", rr.SeriesLines(names=kinds), static=True)
        self._n_start_bytes = _peak_bytes()

    def step(self) -> None:
        """Fetch and log what is new."""
        if self._is_full:
            return
        states, commands = self.board.new_states(), self.board.new_commands()
        self._columns("joints/measured", states["t_ns"], states["position"])
        self._columns("joints/commanded", commands["t_ns"], commands["position"])
        self._log_ticks(self.board.ticks.drain())
        self._log_events()
        self._log_chunks()
        if _peak_bytes() - self._n_start_bytes > _MAX_GROWTH_BYTES:
            self._is_full = True

    def close(self) -> None:
        """Count what was lost and let go of the tap."""
        lost = self.board.n_lost
        self.n_lost = {kind: lost[kind] for kind in ("states", "commands", "ticks")}
        if self._tap is not None:
            self.n_lost["chunks"] = self._tap.n_lost
            self._tap.close()
            self._tap = None
        if self._is_full:
            raise DeviceError(
                f"more than {_MAX_GROWTH_BYTES >> 30} GiB waited for the viewer or the disk, so "
                "logging ended early; log to a file, or to a faster disk"
            )

    def _columns(self, path: str, t_ns: Records, values: Records) -> None:
        """Log a series of (n, D) at its times."""
        import rerun as rr

        if not len(t_ns):
            return
        self.recording.send_columns(
            path,
            indexes=[rr.TimeColumn(TIMELINE, duration=t_ns / 1e9)],
            columns=rr.Scalars.columns(scalars=np.asarray(values, np.float64).ravel()).partition(
                lengths=[values.shape[1]] * len(t_ns)
            ),
        )

    def _log_ticks(self, ticks: Records) -> None:
        if not len(ticks):
            return
        late_ms = np.maximum(0, ticks["t_woke_ns"] - ticks["t_planned_ns"]) / 1e6
        self._columns("motor/late_ms", ticks["t_woke_ns"], late_ms[:, None])
        acted = np.stack([(ticks["flags"] & int(flag)) != 0 for flag in LIMIT_FLAGS], axis=1)
        self._columns("limits/kinds", ticks["t_woke_ns"], acted)
        # How often the limits of each channel have acted so far.
        counts = self.board.interventions.sum(axis=1)
        self._columns("limits/acted", ticks["t_woke_ns"][-1:], counts[None])

    def _log_events(self) -> None:
        import rerun as rr

        for who, ring in self.board.events.items():
            for event in ring.drain():
                self._at(event.t_ns)
                text = rr.TextLog(event.text, level=_LEVELS.get(event.kind, "INFO"))
                self.recording.log(f"events/{who}", text)

    def _log_chunks(self) -> None:
        if self._tap is None:
            self._tap = TapReader.attach(self.setup.tap, self.setup.spec)
            if self._tap is None:
                return
        records = self._tap.drain()
        for record in records:
            self._log_chunk(record)
        if len(records) and time.monotonic_ns() - self._t_picture_ns > _PICTURE_EVERY_NS:
            self._t_picture_ns = time.monotonic_ns()
            self._log_pictures(records[-1])

    def _log_chunk(self, record: Any) -> None:  # noqa: ANN401 - one record of the tap
        """Log one plan as lines over the seconds that it is meant for."""
        import rerun as rr

        spec = self.setup.spec
        ahead_s = np.arange(spec.n_rows) * int(record["period_ns"]) / 1e9
        begin_s = int(record["t_observed_ns"]) / 1e9
        lines = [
            np.column_stack([begin_s + ahead_s, record["actions"][:, d]])
            for d in range(spec.n_channels)
        ]
        self._at(int(record["t_published_ns"]))
        names = [channel.name for channel in spec.channels]
        self.recording.log("chunks/plan", rr.LineStrips2D(lines, labels=names))
        latency_ms = int(record["t_published_ns"] - record["t_observed_ns"]) / 1e6
        self.recording.log("chunks/frame_to_chunk_ms", rr.Scalars(latency_ms))

    def _log_pictures(self, record: Any) -> None:  # noqa: ANN401 - one record of the tap
        import rerun as rr

        for i, camera in enumerate(self.setup.spec.cameras):
            self._at(int(record[f"t_captured_ns_{i}"]))
            picture = rr.Image(record[f"image_{i}"]).compress(jpeg_quality=_JPEG_QUALITY)
            self.recording.log(f"cameras/{camera}", picture)

    def _at(self, t_ns: int) -> None:
        self.recording.set_time(TIMELINE, duration=t_ns / 1e9)


def _peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
