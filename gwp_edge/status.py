"""Vocabulary of the processes of one run: who is in what state, who asks for what, and why."""

from __future__ import annotations

import enum
from dataclasses import dataclass


class Word(enum.IntEnum):
    """The single 64-bit values of a run, grouped by their writer."""

    # supervisor
    REQUEST = 0  # a Request
    SIGNAL_REQUEST = enum.auto()  # likewise, written by the signal handlers alone
    RESUME_COUNT = enum.auto()  # the operator's enter key, counted
    SUPERVISOR_PID = enum.auto()
    MOTOR_PID = enum.auto()
    POLICY_STOP = enum.auto()  # 1: the policy process is to end
    GUARDIAN_STOP = enum.auto()  # 1: the guardian is to end
    SUPERVISOR_HEARTBEAT_NS = enum.auto()  # 0: nobody supervises
    # motor process
    MOTOR_HEARTBEAT_NS = enum.auto()
    MOTOR_MODE = enum.auto()  # a Mode
    MOTOR_POWERING = enum.auto()  # 1 from the moment at which motors may get power
    MOTOR_ARMED = enum.auto()  # 1 while a sudden death would leave a moving target behind
    MOTOR_ENDED = enum.auto()  # 1: ended by itself, the arm holds
    MOTOR_HOLD_REASON = enum.auto()  # a HoldReason
    MOTOR_STANDING = enum.auto()  # 1: the commands stand still
    MOTOR_PLAN_ENDED = enum.auto()  # 1: the plan is used up (synchronous execution waits for it)
    MOTOR_N_TICKS = enum.auto()
    MOTOR_N_MISSED = enum.auto()
    MOTOR_N_LATE = enum.auto()  # woke more than 1 ms late
    MOTOR_N_NOT_FINITE = enum.auto()  # chunks rejected for NaN or infinity
    MOTOR_N_REJECTED_CHUNKS = enum.auto()  # chunks rejected for any other reason
    MOTOR_N_REJECTED_TICKS = enum.auto()
    MOTOR_N_SEND_DROPPED = enum.auto()
    MOTOR_N_HOLDS = enum.auto()
    MOTOR_TAKEN = enum.auto()  # index + 1 of the newest chunk that was found fit to follow
    MOTOR_REFUSED = enum.auto()  # index + 1 of the newest chunk that was refused
    # policy process
    POLICY_HEARTBEAT_NS = enum.auto()
    POLICY_PHASE = enum.auto()  # a PolicyPhase
    POLICY_CAMERA_STALL = enum.auto()  # 1: no usable frames for longer than the hold limit
    POLICY_N_CHUNKS = enum.auto()
    POLICY_N_STALE = enum.auto()  # stretches without a usable observation
    # guardian process
    GUARDIAN_HEARTBEAT_NS = enum.auto()
    GUARDIAN_READY = enum.auto()
    GUARDIAN_TRIPPED_NS = enum.auto()
    GUARDIAN_HOLD_SENT_NS = enum.auto()


class Request(enum.IntEnum):
    """What the supervisor wants of the motor process."""

    CONNECT = 0
    ENABLE = 1
    RUN = 2
    HOLD = 3
    PARK = 4
    STOP = 5
    STOP_NOW = 6


class Mode(enum.IntEnum):
    """State machine of the motor process."""

    DISCONNECTED = 0
    CONNECTED = 1
    ENABLED = 2
    APPROACH = 3
    RUN = 4
    HOLD = 5
    PARK = 6
    FAULT = 7


class HoldReason(enum.IntEnum):
    """Why the arm holds. Those up to ``STALE_CHUNK`` end by themselves."""

    NONE = 0
    CAMERA_STALL = 1
    STALE_CHUNK = 2
    OPERATOR = 3
    NOT_FINITE = 4
    REJECTED = 5
    TRACKING = 6
    FEEDBACK = 7
    STOP = 8
    ARM = 9
    UNWATCHED = 10
    WAITED = 11

    @property
    def ends_by_itself(self) -> bool:
        """Whether a fresh chunk may resume the run without a person."""
        return HoldReason.NONE < self <= HoldReason.STALE_CHUNK


class PolicyPhase(enum.IntEnum):
    """How far the policy process is."""

    LOADING = 0
    READY = 1
    RUNNING = 2
    ENDED = 3
    FAILED = 4


class EventKind(enum.IntEnum):
    """What a line in an event ring means."""

    INFO = 0
    WARNING = 1
    ERROR = 2
    CHECK_PASSED = 3
    CHECK_FAILED = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """One line that a process has to say."""

    t_ns: int
    kind: EventKind
    text: str


class TickFlag(enum.IntFlag):
    """Bits of the tick log's ``flags``."""

    POSITION = 1
    VELOCITY = 2
    ACCELERATION = 4
    REJECTED = 8
    LATE = 16
    NOT_SENT = 32
    WORKSPACE = 64
