"""What a person may do while it runs: keys in the terminal, and signals."""

from __future__ import annotations

import enum
import os
import select
import signal
import sys
import termios
import threading
import tty
from types import FrameType, TracebackType
from typing import Any


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
            termios.tcsetattr(self._fd, termios.TCSADRAIN, self._before)
            self._fd = None

    def __call__(self) -> Key | None:
        """Return a key that was pressed since the last call, or None."""
        if self._fd is None or not select.select([self._fd], [], [], 0)[0]:
            return None
        pressed = os.read(self._fd, 1).decode(errors="ignore")
        try:
            return Key(pressed.lower().replace("\r", "\n"))
        except ValueError:
            return None


class SignalInput:
    """Counts signals while it is entered; a context manager. Threads: the main thread.

    Ctrl-C, SIGTERM and SIGHUP ask for the end; SIGUSR1 is the input for an external e-stop. The
    handlers do nothing but count: what follows is decided where the arm's state is known.

    Attributes:
        n_interrupts: Ctrl-C.
        n_terminates: SIGTERM and SIGHUP.
        n_estops: SIGUSR1.
    """

    def __init__(self) -> None:
        self.n_interrupts = 0
        self.n_terminates = 0
        self.n_estops = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> SignalInput:
        # Python installs handlers from the main thread only; a run from another thread is ended
        # by its caller.
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
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
