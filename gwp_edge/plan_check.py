"""Which plans the motor loop may follow: finite, and of what the limits give."""

from __future__ import annotations

from typing import Final

import numpy as np

from gwp_edge.mailbox import Board
from gwp_edge.safety import Limiter
from gwp_edge.status import HoldReason, Word
from gwp_edge.types import Chunk

_REFUSED_IN_ROW: Final = 3
_OUTSIDE_TIME_NS: Final = 2_000_000_000

Hold = tuple[HoldReason, str]


class PlanCheck:
    """Judges every plan before the schedule gets it. Threads: one owner, the motor loop's."""

    def __init__(self, board: Board, limiter: Limiter) -> None:
        self._words = board.words
        self._limiter = limiter
        self._n_refused = 0
        self._t_outside_ns = 0

    def judge(self, chunk: Chunk, now_ns: int, *, moving: bool) -> tuple[bool, Hold | None]:
        """Return whether ``chunk`` may be followed, and what the arm must hold for.

        Args:
            chunk: the newest one.
            now_ns: the present.
            moving: the arm follows plans at present, or goes to one.
        """
        refused = self._limiter.reason_to_refuse(chunk.actions)
        if refused is not None:
            return False, self._refuse(chunk, refused)
        self._n_refused = 0
        hold = self._see_outside(chunk, now_ns) if moving else None
        if not moving:
            self._t_outside_ns = 0
        if hold is not None:
            self._words[Word.MOTOR_REFUSED] = chunk.chunk_idx + 1
            return False, hold
        self._words[Word.MOTOR_TAKEN] = chunk.chunk_idx + 1
        return True, None

    def _see_outside(self, chunk: Chunk, now_ns: int) -> Hold | None:
        """Find that plan after plan wants what the limits do not give; clipped, nobody sees it."""
        outside = self._limiter.outside(chunk.actions[len(chunk.actions) // 2])
        if outside is None:
            self._t_outside_ns = 0
            return None
        self._t_outside_ns = self._t_outside_ns or now_ns
        if now_ns - self._t_outside_ns < _OUTSIDE_TIME_NS:
            return None
        seconds = (now_ns - self._t_outside_ns) / 1e9
        text = f"for {seconds:.0f} s the plans want {outside}; are they for this robot?"
        return HoldReason.REJECTED, text

    def _refuse(self, chunk: Chunk, why: str) -> Hold | None:
        """Count a plan that is not finite or absurd; three in a row are a reason to hold."""
        self._words[Word.MOTOR_REFUSED] = chunk.chunk_idx + 1
        is_finite = bool(np.isfinite(chunk.actions).all())
        self._words[Word.MOTOR_N_REJECTED_CHUNKS if is_finite else Word.MOTOR_N_NOT_FINITE] += 1
        self._n_refused += 1
        if self._n_refused < _REFUSED_IN_ROW:
            return None
        text = (
            f"{self._n_refused} plans in a row were refused, the last because its {why}; "
            "check the bundle with gwp-edge verify"
        )
        return HoldReason.REJECTED if is_finite else HoldReason.NOT_FINITE, text
