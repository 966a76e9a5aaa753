"""TensorRT's nested build phases as one fraction, and a way to stop them. Needs no GPU."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType
from typing import Final, TypeVar

T = TypeVar("T")

_SIGNALS: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_POLL_S: Final = 0.2


@dataclass(slots=True, kw_only=True)
class _Phase:
    parent: str | None
    n_steps: int
    done: int = 0
    children: float = 0.0


@dataclass(kw_only=True)
class BuildProgress:
    """Counts phases and steps. Threads: any, as TensorRT calls it from its own.

    Attributes:
        report: called with the fraction done of the whole build, 0 to 1, never falling.
    """

    report: Callable[[float], None]
    _phases: dict[str, _Phase] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _cancelled: threading.Event = field(default_factory=threading.Event)
    _best: float = 0.0

    def cancel(self) -> None:
        """Ask the builder to stop at its next step."""
        self._cancelled.set()

    @property
    def is_cancelled(self) -> bool:
        """Whether ``cancel`` was called."""
        return self._cancelled.is_set()

    def phase_start(self, name: str, parent: str | None, n_steps: int) -> None:
        """Note that a phase begins."""
        with self._lock:
            self._phases[name] = _Phase(parent=parent, n_steps=max(n_steps, 1))

    def step_complete(self, name: str) -> bool:
        """Note a step; return False to stop the build."""
        with self._lock:
            phase = self._phases.get(name)
            if phase is not None:
                phase.done = min(phase.done + 1, phase.n_steps)
                phase.children = 0.0
                self._tell(name)
        return not self._cancelled.is_set()

    def phase_finish(self, name: str) -> None:
        """Note that a phase ended, whether or not all its steps were reported."""
        with self._lock:
            phase = self._phases.pop(name, None)
            if phase is None:
                return
            if phase.parent in self._phases:
                self._tell(phase.parent)
            elif phase.parent is None and not self._cancelled.is_set():
                self._set(1.0)

    def _tell(self, name: str) -> None:
        """Carry a phase's fraction up to the outermost phase; the lock is held."""
        phase = self._phases[name]
        fraction = min((phase.done + phase.children) / phase.n_steps, 1.0)
        while phase.parent is not None and phase.parent in self._phases:
            outer = self._phases[phase.parent]
            # A running child is a part of the outer phase's current step.
            outer.children = fraction
            fraction = min((outer.done + outer.children) / outer.n_steps, 1.0)
            phase = outer
        self._set(fraction)

    def _set(self, fraction: float) -> None:
        if fraction > self._best:
            self._best = fraction
            self.report(fraction)


def run_interruptible(work: Callable[[], T], cancel: Callable[[], None]) -> T:
    """Run ``work`` in a thread, so that Ctrl-C is noticed while the library is busy.

    Python handles a signal between two instructions of the main thread; waiting here makes sure
    that there are some. The signal only asks ``work`` to end: raising from a handler could leave
    this function before the thread is done with files that are about to be removed.

    Args:
        work: called once; what it returns or raises comes back.
        cancel: called on SIGINT, SIGTERM or SIGHUP; ``work`` is then waited for.

    Raises:
        KeyboardInterrupt: a signal came; ``work`` has ended.
    """
    results: list[T] = []
    failures: list[BaseException] = []
    interrupted = threading.Event()

    def run() -> None:
        try:
            results.append(work())
        except BaseException as e:
            failures.append(e)

    def ask_to_end(number: int, frame: FrameType | None) -> None:
        del number, frame
        interrupted.set()
        cancel()

    thread = threading.Thread(target=run, name="tensorrt build")
    with _handling(ask_to_end):
        thread.start()
        while thread.is_alive():
            thread.join(_POLL_S)
    if interrupted.is_set():
        raise KeyboardInterrupt
    if failures:
        raise failures[0]
    return results[0]


@contextmanager
def _handling(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Let ``handler`` take what asks for an end; signals go to the main thread only."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, handler) for number in _SIGNALS}
    try:
        yield
    finally:
        for number, known in before.items():
            signal.signal(number, known)
