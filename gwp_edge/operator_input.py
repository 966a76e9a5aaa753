"""What a person may do while it runs: keys in the terminal, and signals."""

from __future__ import annotations

import contextlib
import enum
import os
import select
import signal
import sys
import termios
import threading
import tty
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any

from gwp_edge.child_process import FROM_OUTSIDE
from gwp_edge.status import Request


class Key(enum.Enum):
    """What a key means."""

    HOLD = " "
    RESUME = "\n"
    QUIT = "q"


class TerminalKeys:
    """Reads single keys from the terminal; a context manager. Threads: one owner.

    Call it to get the next key, or None. Where standard input is no terminal it never has one.
    """

    def __init__(self) -> None:
        self._fd: int | None = None
        self._before: list[Any] | None = None

    @property
    def available(self) -> bool:
        """Whether there is a terminal to read from."""
        return self._fd is not None

    def __enter__(self) -> TerminalKeys:
        if sys.stdin is not None and sys.stdin.isatty():
            self._fd = sys.stdin.fileno()
            self._before = termios.tcgetattr(self._fd)
            tty.setcbreak(self._fd)  # Ctrl-C stays a signal
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._fd is not None and self._before is not None:
            with contextlib.suppress(termios.error):  # the terminal may be gone
                termios.tcsetattr(self._fd, termios.TCSADRAIN, self._before)
        self._fd = None

    def __call__(self) -> Key | None:
        """Return a key that was pressed since the last call, or None."""
        if self._fd is None or not select.select([self._fd], [], [], 0)[0]:
            return None
        try:
            pressed = os.read(self._fd, 1).decode(errors="ignore")
        except OSError:  # the terminal is gone; SIGHUP tells the rest
            pressed = ""
        try:
            return Key(pressed.lower().replace("\r", "\n"))
        except ValueError:
            return None


class SignalInput:
    """Counts signals while it is entered; a context manager. Threads: the main thread.

    Ctrl-C, SIGTERM, SIGHUP (the terminal is gone), SIGQUIT and SIGTSTP (Ctrl-Z: a run that is
    suspended would hear nobody) ask for the end; SIGUSR1 is the input for an external e-stop.

    Attributes:
        n_interrupts: Ctrl-C.
        n_terminates: the others that ask for the end.
        n_estops: SIGUSR1.
    """

    def __init__(self, at_once: Callable[[Request], None] | None = None) -> None:
        """Prepare.

        Args:
            at_once: called inside of the handler with what the signal asks of the motor process:
                the rest of the program may be waiting for a terminal that does not take its text.
        """
        self.n_interrupts = 0
        self.n_terminates = 0
        self.n_estops = 0
        self._at_once = at_once
        self._before: dict[int, Any] = {}

    def __enter__(self) -> SignalInput:
        # Python installs handlers from the main thread only; a run from another thread is ended
        # by its caller.
        if threading.current_thread() is threading.main_thread():
            for number in FROM_OUTSIDE:
                self._before[number] = signal.signal(number, self._count)
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()

    def _count(self, number: int, _frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            self.n_interrupts += 1
        elif number == signal.SIGUSR1:
            self.n_estops += 1
        else:
            self.n_terminates += 1
        if self._at_once is not None:
            is_urgent = number == signal.SIGUSR1 or self.n_interrupts > 1
            self._at_once(Request.STOP_NOW if is_urgent else Request.STOP)
