"""What the arm says about itself, tick by tick, and what the motor loop must do about it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum, auto
from typing import Final

import numpy as np

from gwp_edge.errors import DeviceError
from gwp_edge.mailbox import Board
from gwp_edge.motor_options import MotorOptions
from gwp_edge.protocols import Arm, SlowArm
from gwp_edge.status import HoldReason
from gwp_edge.types import ArmState, FloatArray

_UNPOWERED_IN_ROW: Final = 2
_WARN_EVERY_NS: Final = 1_000_000_000


class Need(Enum):
    """What a finding calls for."""

    WARNING = auto()
    HOLD_IF_MOVING = auto()
    HOLD = auto()
    FAULT = auto()


@dataclass(frozen=True, slots=True)
class Finding:
    """Something that the arm said, or did not say.

    Attributes:
        need: what it calls for.
        text: one line for the operator.
        reason: of the hold, where one is called for.
    """

    need: Need
    text: str
    reason: HoldReason = HoldReason.NONE


class ArmWatch:
    """Reads the arm once per tick, publishes its state and judges it. Threads: one owner.

    Attributes:
        position: the newest usable measurement, shape (D,), rad and m.
        t_received_ns: when the oldest part of it arrived.
        trusted: it is of now, and not known to be wrong.
    """

    def __init__(self, arm: Arm, board: Board, options: MotorOptions) -> None:
        self._arm = arm
        self._board = board
        self._dry_run = options.dry_run
        self._ages_ns = options.feedback_ages_ns(
            arm.feedback_period_ns if isinstance(arm, SlowArm) else 0
        )
        self._n_unpowered = 0
        self._caution: str | None = None
        self._t_warned_ns = 0
        self.position: FloatArray = np.zeros(len(arm.channels))
        self.t_received_ns = 0
        self.trusted = False

    def take(self, state: ArmState) -> None:
        """Publish ``state`` and keep it as the newest."""
        self.position, self.t_received_ns = state.position, state.t_received_ns
        self._board.publish_state(state)

    def read(self, now_ns: int) -> Sequence[Finding]:
        """Read the arm; return what the loop must act on, in order."""
        self.trusted = False
        try:
            state = self._arm.state()
        except DeviceError as e:
            return (Finding(Need.FAULT, str(e)),)
        if not np.isfinite(state.position).all():
            text = "the arm's measured joints are not finite; check driver and firmware"
            return (Finding(Need.FAULT, text),)
        self.take(state)
        self.trusted = not state.drifted and now_ns - state.t_received_ns <= self._ages_ns[1]
        return [
            finding
            for finding in (
                self._judge_motors(state),
                self._judge_caution(state),
                self._judge_age(now_ns),
            )
            if finding is not None
        ]

    def _judge_motors(self, state: ArmState) -> Finding | None:
        if state.fault is not None:
            return Finding(Need.FAULT, state.fault)
        if state.enabled or self._dry_run:
            self._n_unpowered = 0
            return None
        self._n_unpowered += 1
        if self._n_unpowered < _UNPOWERED_IN_ROW:
            return None
        return Finding(Need.FAULT, "the arm's motors have lost their power; support the arm")

    def _judge_caution(self, state: ArmState) -> Finding | None:
        """A caution counts when it appears: once a person has resumed, it does not hold again."""
        if state.caution == self._caution:
            return None
        self._caution = state.caution
        if state.caution is None:
            return None
        return Finding(Need.HOLD_IF_MOVING, state.caution, HoldReason.ARM)

    def _judge_age(self, now_ns: int) -> Finding | None:
        age_ns = now_ns - self.t_received_ns
        warn_ns, hold_ns, fault_ns = self._ages_ns
        if age_ns <= warn_ns:
            return None
        text = f"no joint feedback for {age_ns / 1e6:.0f} ms; check cable, power and bus"
        if age_ns > fault_ns:
            return Finding(Need.FAULT, text)
        if age_ns > hold_ns:
            return Finding(Need.HOLD, text, HoldReason.FEEDBACK)
        if now_ns - self._t_warned_ns <= _WARN_EVERY_NS:
            return None
        self._t_warned_ns = now_ns
        return Finding(Need.WARNING, text)
