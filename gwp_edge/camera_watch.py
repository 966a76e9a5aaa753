"""A look at the cameras while the policy predicts, so that a stall does not wait for its end."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from types import TracebackType


class CameraWatch:
    """Calls ``look`` again and again while its owner is inside the ``with`` block.

    An inference can take as long as the time after which a stall must hold the arm. Engines let
    other threads run meanwhile. What ``look`` uses belongs to this thread inside the block and to
    the owner outside of it: the block is left only between two looks.

    Args:
        look: what to do, given the time in ns. Once it raises it is called no more in this block,
            whose end raises the same.
        period_s: time between looks.
    """

    def __init__(self, look: Callable[[int], None], period_s: float) -> None:
        self._look = look
        self._period_s = period_s
        self._lock = threading.Lock()
        self._busy = threading.Event()
        self._closed = False
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._run, name="camera-watch", daemon=True)
        self._thread.start()

    def __enter__(self) -> None:
        self._busy.set()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._busy.clear()
        with self._lock:
            found, self._error = self._error, None
        if found is not None and error is None:
            raise found

    def close(self) -> None:
        """End the thread; safe to call twice."""
        self._closed = True
        self._busy.set()
        self._thread.join()

    def _run(self) -> None:
        while True:
            self._busy.wait()
            if self._closed:
                return
            time.sleep(self._period_s)
            with self._lock:
                if not self._busy.is_set() or self._closed or self._error is not None:
                    continue
                try:
                    self._look(time.monotonic_ns())
                except Exception as e:  # the block's end raises it
                    self._error = e
