"""When a person must agree, by enter, before the arm starts or goes on."""

from __future__ import annotations

from typing import Final

from gwp_edge.mailbox import Board
from gwp_edge.motor_options import MotorOptions
from gwp_edge.status import HoldReason, Mode, Word

# A start or an enter that is not followed by then must not move the arm when nobody thinks of it.
_LASTS_NS: Final = 10_000_000_000


class Agreement:
    """The enter key as the motor loop sees it. Threads: one owner, the motor loop's."""

    def __init__(self, board: Board, options: MotorOptions) -> None:
        self._words = board.words
        self._options = options
        self._used_up = self._seen = self._words[Word.RESUME_COUNT]
        self._t_pressed_ns = 0

    @property
    def is_given(self) -> bool:
        """Whether enter was pressed and has not been used up."""
        return self._words[Word.RESUME_COUNT] != self._used_up

    def use_up(self) -> None:
        """Let what was pressed until now count no more."""
        self._used_up = self._words[Word.RESUME_COUNT]

    def see(self, now_ns: int, *, awaited: bool) -> str | None:
        """Look at the key; return why an enter was not followed, once it is clear, else None.

        Args:
            now_ns: the present.
            awaited: the arm is in a hold that nothing but enter ends.
        """
        count = self._words[Word.RESUME_COUNT]
        if count != self._seen:
            self._seen = count
            self._t_pressed_ns = now_ns
        if not (awaited and self.is_given):
            return None
        if self._words[Word.POLICY_CAMERA_STALL]:
            why = "there are no usable camera frames"
        elif now_ns - self._t_pressed_ns > _LASTS_NS:
            why = f"no plan came for {_LASTS_NS // 1_000_000_000} s"
        else:
            return None
        self.use_up()
        return f"enter was not followed, {why}; press it again later"

    def is_missing(self, now_ns: int, mode: Mode, reason: HoldReason, t_mode_ns: int) -> bool:
        """Whether starting now would be a surprise: somebody may have come near by now.

        Args:
            now_ns: the present.
            mode: of the state machine.
            reason: of a hold.
            t_mode_ns: since when ``mode`` lasts.
        """
        limit_ns = self._options.resume_ns
        if limit_ns is None or (self.is_given and now_ns - self._t_pressed_ns <= _LASTS_NS):
            return False
        if mode is Mode.ENABLED:
            # The first plan of a slow policy that the arm waits for anyway is no surprise.
            if self._options.synchronous:
                return False
            limit_ns = max(limit_ns, _LASTS_NS)
        elif mode is not Mode.HOLD or not reason.ends_by_itself:
            return False
        return now_ns - t_mode_ns > limit_ns
