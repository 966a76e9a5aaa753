"""Run a policy on a robot."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from typing import Protocol

from gwp_edge.errors import DeviceError
from gwp_edge.mailbox import Board
from gwp_edge.operator_input import SignalInput
from gwp_edge.record import Recorder
from gwp_edge.robots import create_world
from gwp_edge.run_options import KeySource, RunOptions, RunStatus, StatusCallback
from gwp_edge.run_report import Findings, summarise
from gwp_edge.shared_memory import remove_leftovers
from gwp_edge.supervisor import Supervisor
from gwp_edge.telemetry import RunSummary

__all__ = ["RunOptions", "RunStatus", "RunSummary", "run"]

logger = logging.getLogger(__name__)


class Watcher(Protocol):
    """Listens to the board of a run from a thread of its own, such as a profiler."""

    def begin(self, board_name: str) -> None:
        """Begin; the board is there and nothing runs yet."""
        ...

    def end(self) -> None:
        """Take the last records and let go of the board; every process has ended. Safe twice."""
        ...


def run(
    options: RunOptions,
    *,
    on_status: StatusCallback | None = None,
    keys: KeySource | None = None,
    watcher: Watcher | None = None,
) -> RunSummary:
    """Run a policy on a robot until the duration, a signal, a key or a fault ends it.

    Args:
        options: what to run.
        on_status: called from this thread about 20 times a second.
        keys: polled for operator keys; see ``operator_input.TerminalKeys``.
        watcher: listens to the board; it never makes the run wait.

    Returns:
        The summary; ``exit_code`` and ``message`` say how it ended. Faults of devices and
        processes end in it too, rather than in an exception.

    Raises:
        SpecError: the options or the robot do not fit; nothing was started.
    """
    for name in remove_leftovers():
        logger.info("removed shared memory %s of a run that was killed", name)
    world = create_world(options.robot, options.spec)
    board = Board.create(options.spec.n_channels, options.spec.n_rows)
    findings = Findings()
    recorder: Recorder | None = None
    try:
        # Around the recorder too: a signal that ended this process while it starts would leave its
        # memory and half a session behind.
        with SignalInput(board.ask_at_once) as signals:
            if options.record is not None:
                recorder = _start_recorder(options, options.record, board)
                policy = dataclasses.replace(options.policy, tap=recorder.tap_name)
                options = dataclasses.replace(options, policy=policy)
                on_status = _watch_recorder(recorder, findings, on_status)
            if watcher is not None:
                watcher.begin(board.name)
            Supervisor(options, board, world, findings, on_status, keys, signals).run()
            if recorder is not None:
                for problem in recorder.stop():
                    findings.note_fault(problem)
        return summarise(board, options.spec, findings)
    finally:
        if watcher is not None:
            watcher.end()
        if recorder is not None:
            recorder.stop()
        board.close()
        board.unlink()


def _start_recorder(options: RunOptions, folder: Path, board: Board) -> Recorder:
    recorder = Recorder(
        folder,
        board,
        options.spec,
        options.robot,
        policy={"factory": options.policy.factory, **options.policy.kwargs},
        task=str(options.policy.kwargs.get("task") or ""),
    )
    try:
        recorder.await_ready()
    except DeviceError:
        recorder.discard()
        raise
    return recorder


def _watch_recorder(
    recorder: Recorder, findings: Findings, on_status: StatusCallback | None
) -> StatusCallback:
    """Return ``on_status``, which also says at once when the recording ends before the run."""

    def watch(status: RunStatus) -> None:
        failure = recorder.failure()
        if failure is not None:
            logger.warning("%s; the run goes on", failure)
            findings.note_fault(failure)
        if on_status is not None:
            on_status(status)

    return watch
