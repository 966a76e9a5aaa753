"""The way of a command to the arm: what it got, when, and what no longer goes out."""

from __future__ import annotations

from typing import Final

import numpy as np

from gwp_edge.errors import DeviceError, DeviceTimeoutError
from gwp_edge.mailbox import Board
from gwp_edge.protocols import Arm, Clock
from gwp_edge.status import Word
from gwp_edge.types import FloatArray

# Some ticks may be late without a sign of it in the motion; the guardian waits for 50 ms.
_PAUSE_NS: Final = 35_000_000
# What a tick that was interrupted for longer than this has computed is for a time that is over.
_TOO_LATE_NS: Final = 15_000_000
_DROPPED_IN_ROW: Final = 5


class Sender:
    """Sends commands, unless it is too late for them. Threads: one owner, the motor loop's.

    Attributes:
        last: what the arm got last, shape (D,); meaningless before the first.
        send_ns: how long the last command took to go out.
    """

    def __init__(self, arm: Arm, board: Board, clock: Clock) -> None:
        self._arm = arm
        self._board = board
        self._words = board.words
        self._clock = clock
        self.last: FloatArray = np.zeros(len(arm.channels))
        self.send_ns = 0
        self._t_sent_ns: int | None = None
        self._n_dropped = 0

    def has_paused(self, now_ns: int) -> bool:
        """Return whether the arm has come to ``last`` and stopped, for want of anything newer."""
        return self._t_sent_ns is not None and now_ns - self._t_sent_ns > _PAUSE_NS

    def send(self, command: FloatArray, t_tick_ns: int) -> bool:
        """Send ``command``, shape (D,); return whether it went out.

        Args:
            command: rad and m.
            t_tick_ns: when the tick began that computed it.

        Raises:
            DeviceError: the arm's bus has failed, or took none of several commands in a row.
            SafetyFault: the driver refuses the command.
        """
        if self._words[Word.GUARDIAN_TRIPPED_NS]:
            return False  # it took over while this tick was computed; the next one says so
        t_begin_ns = self._clock.now_ns()
        if t_begin_ns - t_tick_ns > _TOO_LATE_NS:
            self._words[Word.MOTOR_N_SEND_DROPPED] += 1
            return False
        try:
            self._arm.send(command)
        except DeviceTimeoutError as e:
            self._words[Word.MOTOR_N_SEND_DROPPED] += 1
            self._n_dropped += 1
            if self._n_dropped >= _DROPPED_IN_ROW:
                raise DeviceError(
                    f"{self._n_dropped} commands in a row could not be sent: {e}"
                ) from e
            return False
        self._n_dropped = 0
        self.last[:] = command
        # Not the end: an interruption falls into the system calls rather than before them.
        self._t_sent_ns = t_begin_ns
        t_sent_ns = self._clock.now_ns()
        self.send_ns = t_sent_ns - t_begin_ns
        self._board.publish_command(command, t_sent_ns)
        return True
