"""What ``gwp-edge profile`` shows while it measures: figures in place, or lines without a terminal.

Drawn by whoever calls it, at most four times a second, never by a thread of its own; what it costs
is part of the profile.
"""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING, Final

from gwp_edge.console import remark

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from gwp_edge.profiling.live import LiveFigures, Spread
    from gwp_edge.run_options import RunStatus

_DRAW_EVERY_S: Final = 0.25
_LINE_EVERY_S: Final = 5.0


class LiveView:
    """Follows a profile on stderr; a context manager.

    Threads: one owner draws; ``take`` may be called by another thread.

    Args:
        console: to draw on; None takes stderr.
        draw_taken: draw when figures are taken, for a profile without a robot's status.
    """

    def __init__(self, console: Console | None = None, *, draw_taken: bool = False) -> None:
        from rich.console import Console
        from rich.live import Live

        self._console = console or Console(stderr=True)
        self._live: Live | None = None
        if self._console.is_terminal:
            self._live = Live(console=self._console, auto_refresh=False, transient=True)
        self._draw_taken = draw_taken
        self._figures: LiveFigures | None = None
        self._status: RunStatus | None = None
        self._stage = ""
        self._t_begin_s = self._t_drawn_s = time.monotonic()

    def __enter__(self) -> LiveView:
        """Start drawing."""
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Leave the terminal as it was."""
        if self._live is not None:
            self._live.stop()

    def __call__(self, status: RunStatus) -> None:
        """Take a status of the run: its events are printed, the rest is drawn."""
        for event in status.events:
            self._say(f"{status.run_s:7.2f} s  {event.text}")
        self._status = status
        self._draw()

    def take(self, figures: LiveFigures) -> None:
        """Take the figures so far."""
        self._figures = figures
        if self._draw_taken:
            self._draw()

    def progress(self, stage: str, done: int, total: int) -> None:
        """Say what is done before and between measurements."""
        if self._live is not None:
            self._live.update(f"{stage} {done}/{total}", refresh=True)
        elif stage != self._stage:
            self._say(f"{stage} ...")
        self._stage = stage

    def _say(self, line: str) -> None:
        if self._live is not None:
            self._console.print(line, highlight=False, markup=False)
        else:
            remark(line)

    def _draw(self) -> None:
        now_s = time.monotonic()
        every_s = _DRAW_EVERY_S if self._live is not None else _LINE_EVERY_S
        if now_s - self._t_drawn_s < every_s:
            return
        self._t_drawn_s = now_s
        rows = live_rows(self._figures, self._status, now_s - self._t_begin_s)
        if self._live is None:
            remark("; ".join(f"{name}: {text}" for name, text in rows))
        else:
            self._live.update(_table(rows), refresh=True)


def live_rows(
    figures: LiveFigures | None, status: RunStatus | None, elapsed_s: float
) -> list[tuple[str, str]]:
    """Return what there is to say, name by name; what is not known is left out."""
    rows = [("time", f"{elapsed_s:.0f} s")]
    if status is not None:
        rows[0] = ("time", f"{status.run_s:.1f} s, {status.mode.name}")
    if figures is None:
        return rows
    from gwp_edge.profiling.live import MAX_LATE_MS

    if figures.chunk is not None:
        of = "frame to chunk" if status is not None else "prediction"
        rows.append((of, _spread(figures.chunk)))
    if figures.lateness is not None and status is not None:
        missed = f"; {figures.n_missed} of {figures.n_ticks} periods missed"
        rows.append(("motor late", _spread(figures.lateness, MAX_LATE_MS) + missed))
    dropped = [f"{name} {n} of {of}" for name, (n, of) in figures.missing.items() if of]
    if dropped:
        rows.append(("frames missing", ", ".join(dropped)))
    if status is not None:
        acted = f"{figures.n_limited} ticks limited, {figures.n_not_sent} not sent"
        rows.append(("interventions", acted))
    machine = []
    if figures.hottest is not None:
        machine.append(f"{figures.hottest[0]} {figures.hottest[1]:.0f} C")
    if figures.busiest_percent is not None:
        machine.append(f"busiest core {figures.busiest_percent:.0f} %")
    if machine:
        rows.append(("machine", ", ".join(machine)))
    return rows


def _spread(s: Spread, open_from_ms: float = math.inf) -> str:
    """Return it in words; a value that was cut off is marked."""

    def said(ms: float) -> str:
        return f"{open_from_ms:.0f} or more" if ms >= open_from_ms else f"{ms:.2f}"

    return f"p50 {said(s.p50_ms)}, p99 {said(s.p99_ms)}, max {said(s.max_ms)} ms ({s.n})"


def _table(rows: list[tuple[str, str]]) -> Table:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, show_header=False, pad_edge=False)
    for name, text in rows:
        table.add_row(Text(name, style="bold"), Text(text))
    return table
