"""A look at the cameras while the policy predicts, so that a stall does not wait for its end."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator


class CameraWatch:
    """Calls ``look`` now and then while its owner is busy.

    An inference can take as long as the time after which a stall must hold the arm. Engines let
    other threads run meanwhile. What ``look`` uses is the owner's inside ``owned``, and else this
    thread's: the end of an inference does not wait for a look, only the owner's next one does.

    Args:
        look: what to do, given the time in ns. When it raises it is not called any more.
        period_s: time between looks.
    """

    def __init__(self, look: Callable[[int], None], period_s: float) -> None:
        self._look = look
        self._period_s = period_s
        self._lock = threading.Lock()
        self._busy = threading.Event()
        self._closing = threading.Event()
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._run, name="camera-watch", daemon=True)
        self._thread.start()

    @contextlib.contextmanager
    def busy(self) -> Iterator[None]:
        """Look on meanwhile."""
        self._busy.set()
        try:
            yield
        finally:
            self._busy.clear()

    @contextlib.contextmanager
    def owned(self) -> Iterator[None]:
        """Keep off meanwhile.

        Raises:
            Exception: what a look has raised before.
        """
        with self._lock:
            if self._error is not None:
                raise self._error
            yield

    def close(self) -> None:
        """End the thread; safe to call twice."""
        self._closing.set()
        self._busy.set()
        self._thread.join()

    def _run(self) -> None:
        while True:
            self._busy.wait()
            if self._closing.wait(self._period_s):
                return
            with self._lock:
                if not self._busy.is_set() or self._error is not None:
                    continue
                try:
                    self._look(time.monotonic_ns())
                except Exception as e:  # the owner raises it
                    self._error = e
