"""The way of a command to the arm: what went out last, and what it is too late for."""

from __future__ import annotations

from typing import Final

from gwp_edge.errors import DeviceError, DeviceTimeoutError
from gwp_edge.mailbox import Board
from gwp_edge.protocols import Arm, Clock
from gwp_edge.status import Word
from gwp_edge.types import FloatArray

# Some ticks may be late without a sign of it in the motion; the guardian waits for 50 ms.
_PAUSE_NS: Final = 35_000_000
_PAUSE_TICKS: Final = 3
_DROPPED_IN_ROW: Final = 5


class Sender:
    """Sends commands, unless it is too late for them. Threads: one owner, the motor loop's.

    A command that the driver could not send counts as sent here: of two arms one may have got it.

    Args:
        arm: an enabled arm; it gets nothing in a dry run.
        board: where commands that went out are told.
        clock: of the motor loop.
        period_ns: of its ticks.
        dry_run: send nothing.

    Attributes:
        last: the last command, shape (D,).
        send_ns: how long the last command took to go out.
    """

    def __init__(
        self, arm: Arm, board: Board, clock: Clock, *, period_ns: int, dry_run: bool = False
    ) -> None:
        self._arm = arm
        self._board = board
        self._words = board.words
        self._clock = clock
        self._dry_run = dry_run
        self._pause_ns = max(_PAUSE_NS, _PAUSE_TICKS * period_ns)
        self.send_ns = 0
        self._n_dropped = 0

    def begin(self, position: FloatArray) -> None:
        """Take it that the arm holds ``position``, shape (D,)."""
        self.last = position.copy()
        self._t_last_ns = self._t_sent_ns = self._clock.now_ns()

    def paused_ns(self, now_ns: int) -> int:
        """Return for how long the arm has had nothing newer than ``last``, ns.

        0 while that is too short for it to have come there and stopped.
        """
        since_ns = now_ns - self._t_last_ns
        return since_ns if since_ns > self._pause_ns else 0

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
        if self.paused_ns(t_begin_ns) and not self.paused_ns(t_tick_ns):
            # Computed for an arm in motion, which has stopped since.
            self._words[Word.MOTOR_N_SEND_DROPPED] += 1
            return False
        if self.paused_ns(t_tick_ns) and not self._n_dropped:
            # The pause is no sign of a bus that takes nothing: nobody offered it anything.
            self._t_sent_ns = t_begin_ns
        self.last[:] = command
        # Not the end: an interruption falls into the system calls rather than before them.
        self._t_last_ns = t_begin_ns
        if self._dry_run:
            return False
        try:
            self._arm.send(command)
        except DeviceTimeoutError as e:
            self._words[Word.MOTOR_N_SEND_DROPPED] += 1
            self._n_dropped += 1
            if self._n_dropped >= _DROPPED_IN_ROW or t_begin_ns - self._t_sent_ns > self._pause_ns:
                raise DeviceError(
                    f"{self._n_dropped} commands in a row could not be sent: {e}"
                ) from e
            return False
        self._n_dropped = 0
        self._t_sent_ns = t_begin_ns
        t_sent_ns = self._clock.now_ns()
        self.send_ns = t_sent_ns - t_begin_ns
        self._board.publish_command(command, t_sent_ns)
        return True
