"""What the motor loop notes at every tick: a binary ring, histograms, counters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np

from gwp_edge.mailbox import N_HISTOGRAM_BINS, Board
from gwp_edge.protocols import Clock
from gwp_edge.safety import ACCELERATION, POSITION, VELOCITY, WORKSPACE, Limiter
from gwp_edge.schedule import Schedule
from gwp_edge.status import Mode, TickFlag, Word

_LATE_NS: Final = 1_000_000
_MAX_SEND_NS: Final = 2**31 - 1
# In the order of the board's columns.
_LIMIT_BITS: Final = (POSITION, VELOCITY, ACCELERATION, WORKSPACE)
# By the flags of a channel: what each of them adds to those columns.
_COUNTED: Final = np.array(
    [[bool(flags & bit) for bit in _LIMIT_BITS] for flags in range(2 * WORKSPACE)], np.int64
)


class TickLog:
    """Writes one record per tick; allocates nothing that stays. Threads: one owner."""

    def __init__(self, board: Board, clock: Clock, limiter: Limiter, schedule: Schedule) -> None:
        self._board = board
        self._clock = clock
        self._limiter = limiter
        self._schedule = schedule

    def write(
        self,
        *,
        t_planned_ns: int,
        t_woke_ns: int,
        t_feedback_ns: int,
        sent: bool,
        send_ns: int,
        mode: Mode,
    ) -> None:
        """Note one tick that has just been sent, or not; ``send_ns`` is the driver's share."""
        t_sent_ns = self._clock.now_ns()
        board, words = self._board, self._board.words
        late_ns = max(0, t_woke_ns - t_planned_ns)
        board.lateness_us[min(late_ns // 1000, N_HISTOGRAM_BINS - 1)] += 1
        board.busy_us[min((t_sent_ns - t_woke_ns) // 1000, N_HISTOGRAM_BINS - 1)] += 1
        words[Word.MOTOR_N_TICKS] += 1
        flags = 0 if sent else int(TickFlag.NOT_SENT)
        if late_ns > _LATE_NS:
            words[Word.MOTOR_N_LATE] += 1
            flags |= int(TickFlag.LATE)
        if self._limiter.rejected is not None:
            flags |= int(TickFlag.REJECTED)
        flags |= self._count_interventions(self._limiter.flags)
        board.ticks.append(
            (
                t_planned_ns,
                t_woke_ns,
                t_sent_ns,
                t_feedback_ns,
                self._schedule.t_observed_ns,
                self._schedule.chunk_idx,
                self._schedule.row(t_woke_ns),
                flags,
                int(mode),
                min(send_ns, _MAX_SEND_NS),
            )
        )

    def _count_interventions(self, flags: Sequence[int]) -> int:
        seen = 0
        for flag in flags:
            seen |= flag
        if seen:
            counts = self._board.interventions
            # One addition for all channels: counting them one by one took longer than the rest of
            # the tick's record when a limit acted on many. Wrapping never raises.
            np.add(counts, _COUNTED.take(flags, axis=0, mode="wrap"), out=counts)
        return seen
