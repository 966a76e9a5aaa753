"""How far a machine's free memory falls while something is done."""

from __future__ import annotations

import threading
from collections.abc import Callable
from types import TracebackType

from gwp_edge.planning.memory import available_bytes


class MemoryWatch:
    """Looks at the machine's free memory again and again, in a thread of its own.

    A Jetson's GPU takes from the same memory, and no process counts that as its own; so the whole
    machine is looked at, and what other programs do meanwhile counts too. Threads: one owner.

    Args:
        period_s: between two looks.
        free_bytes: tells what is free, bytes.

    Attributes:
        peak_bytes: the most by which it was less than at the begin; known at the end.
    """

    def __init__(
        self, *, period_s: float = 0.05, free_bytes: Callable[[], int] = available_bytes
    ) -> None:
        self._period_s = period_s
        self._free_bytes = free_bytes
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="memory watch", daemon=True)
        self._begin_bytes = self._least_bytes = 0
        self.peak_bytes = 0

    def __enter__(self) -> MemoryWatch:
        self._begin_bytes = self._least_bytes = self._free_bytes()
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        del kind, error, trace
        self._stop.set()
        self._thread.join()
        self.peak_bytes = self._begin_bytes - min(self._least_bytes, self._free_bytes())

    def _watch(self) -> None:
        while not self._stop.wait(self._period_s):
            self._least_bytes = min(self._least_bytes, self._free_bytes())
