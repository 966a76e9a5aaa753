"""Processes of a run that no terminal reaches: how they are started, and how they begin.

A terminal sends Ctrl-C, Ctrl-Z, quit and its own end to every process of the foreground group,
and a service manager may signal a whole group too. Only the main process may act on that: it knows
how to bring the arm to rest, and those who move and hold the arm must live until it has.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
from collections.abc import Callable
from multiprocessing import resource_tracker
from multiprocessing.process import BaseProcess
from typing import Final

_PR_SET_PDEATHSIG: Final = 1
FROM_OUTSIDE: Final = frozenset(
    {
        signal.SIGINT,
        signal.SIGTERM,
        signal.SIGHUP,
        signal.SIGQUIT,
        signal.SIGTSTP,
        signal.SIGUSR1,
    }
)


def start_shielded(process: BaseProcess) -> None:
    """Start ``process``; what comes from outside waits until it calls ``leave_terminal``."""
    # A mask is inherited, a handler is not: until the child's own code runs, nothing else helps.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, FROM_OUTSIDE)
    try:
        # A program's first process brings the tracker with it, whose start unblocks SIGINT and
        # SIGTERM; so it comes first, and then everything is blocked again.
        resource_tracker.ensure_running()
        signal.pthread_sigmask(signal.SIG_BLOCK, FROM_OUTSIDE)
        process.start()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def leave_terminal(
    on_terminate: Callable[[], None] | None = None, *, killable: bool = False
) -> None:
    """Begin a session of its own and ignore what is meant for the main process.

    Args:
        on_terminate: called from the handler of SIGTERM; without it SIGTERM is ignored.
        killable: leave SIGTERM its meaning, for processes that their owner ends by it.
    """
    # A group's leader cannot; then somebody has put this process into a group of its own already.
    with contextlib.suppress(PermissionError):
        os.setsid()
    for number in FROM_OUTSIDE - {signal.SIGTERM}:
        signal.signal(number, signal.SIG_IGN)
    if killable:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    elif on_terminate is None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    else:
        signal.signal(signal.SIGTERM, lambda _number, _frame: on_terminate())
    signal.pthread_sigmask(signal.SIG_UNBLOCK, FROM_OUTSIDE)


def die_with_parent(parent_pid: int) -> None:
    """Have the kernel kill this process when the thread that started it ends."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent_pid:  # it went before the call
        sys.exit(1)
