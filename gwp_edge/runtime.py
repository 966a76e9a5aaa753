"""Run a policy on a robot."""

from __future__ import annotations

import logging

from gwp_edge.mailbox import Board
from gwp_edge.operator_input import SignalInput
from gwp_edge.robots import create_world
from gwp_edge.run_options import KeySource, RunOptions, RunStatus, StatusCallback
from gwp_edge.run_report import Findings, summarise
from gwp_edge.shared_memory import remove_leftovers
from gwp_edge.supervisor import Supervisor
from gwp_edge.telemetry import RunSummary

__all__ = ["RunOptions", "RunStatus", "RunSummary", "run"]

logger = logging.getLogger(__name__)


def run(
    options: RunOptions,
    *,
    on_status: StatusCallback | None = None,
    keys: KeySource | None = None,
) -> RunSummary:
    """Run a policy on a robot until the duration, a signal, a key or a fault ends it.

    Args:
        options: what to run.
        on_status: called from this thread about 20 times a second.
        keys: polled for operator keys; see ``operator_input.TerminalKeys``.

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
    supervisor = Supervisor(options, board, world, findings, on_status, keys)
    try:
        with SignalInput() as signals:
            supervisor.signals = signals
            supervisor.run()
        return summarise(board, options.spec, findings)
    finally:
        board.close()
        board.unlink()
