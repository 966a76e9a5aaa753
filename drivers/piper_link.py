"""The seam between a PiPER driver and what carries its commands: our codec, or the vendor's SDK."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from struct import Struct
from typing import Protocol

from gwp_edge.drivers import piper_codec as codec
from gwp_edge.drivers.piper_can import CanTransport, open_transport
from gwp_edge.drivers.piper_feedback import PiperFeedback

_PAIR, _GRIPPER = Struct(">ii"), Struct(">iHBB")

logger = logging.getLogger(__name__)

# Everything that a driver listens to. 0x155 to 0x157 are heard only from someone else: another
# program, or a leader arm on the same wires. 0x2B1 and 0x2C1 are the status of a leader.
RECEIVED_IDS = (
    codec.ID_STATUS,
    *codec.ID_JOINT_FEEDBACK,
    codec.ID_GRIPPER_FEEDBACK,
    *codec.ID_MOTOR_FAST,
    *codec.ID_MOTOR_SLOW,
    codec.ID_LIMIT,
    codec.ID_ACCELERATION,
    codec.ID_GRIPPER_PARAMETER,
    codec.ID_FIRMWARE,
    codec.ID_JOINTS_12,
    codec.ID_JOINTS_34,
    codec.ID_JOINTS_56,
    0x2B1,
    0x2C1,
)


# One tick's targets, checked and packed: three frames of joints, then the gripper's if it is meant.
N_JOINT_FRAMES = 3
Command = tuple[codec.Frame, ...]


def make_command(joint_mdeg: Sequence[int], gripper: tuple[int, int] | None) -> Command:
    """Return a checked command; nothing is sent.

    Args:
        joint_mdeg: six targets, 0.001 degree.
        gripper: (opening in 0.001 mm, torque in 0.001 N.m), or None to leave the gripper alone.

    Raises:
        SafetyFault: a value does not fit the protocol.
    """
    frames: Command = codec.encode_joints(joint_mdeg)
    return frames if gripper is None else (*frames, codec.encode_gripper(*gripper))


def joints_of(command: Command) -> list[int]:
    """Return the six targets of ``command``, 0.001 degree."""
    return [angle for _, data in command[:N_JOINT_FRAMES] for angle in _PAIR.unpack(data)]


def gripper_of(command: Command) -> tuple[int, int] | None:
    """Return (opening in 0.001 mm, torque in 0.001 N.m), or None: the gripper is left alone."""
    if len(command) <= N_JOINT_FRAMES:
        return None
    opening_um, effort_mnm, _, _ = _GRIPPER.unpack(command[N_JOINT_FRAMES][1])
    return opening_um, effort_mnm


class PiperLink(Protocol):
    """Commands to one arm and its feedback. Threads: one owner.

    Every sending method raises CanBusyError when the queue is full and DeviceError when the bus
    is gone.
    """

    def poll(self, feedback: PiperFeedback, /) -> object:
        """Move all waiting frames into ``feedback`` without blocking; returns nothing of use."""
        ...

    def command(self, command: Command) -> None:
        """Send one tick's targets."""
        ...

    def mode(self, speed_percent: int) -> None:
        """Ask for joint targets over CAN, position-velocity, at most ``speed_percent`` fast."""
        ...

    def enable(self, joint: int) -> None:
        """Power the motor of ``joint``, 1 to 6."""
        ...

    def ask(self, joint: int) -> None:
        """Ask for the limits of ``joint``; 0: firmware and gripper parameters. Changes nothing."""
        ...

    def close(self) -> None:
        """Close; safe to call twice; sends nothing."""
        ...


class CodecLink:
    """The default link: our codec on a CAN transport. Threads: one owner."""

    def __init__(self, transport: CanTransport) -> None:
        self._transport = transport
        # Without a call in between: these two are for every tick.
        self.poll: Callable[[PiperFeedback], object] = transport.receive
        self.command: Callable[[Command], None] = transport.send

    @classmethod
    def open(cls, channel: str) -> CodecLink:
        """Open ``channel``; see ``piper_can.open_transport``."""
        return cls(open_transport(channel, RECEIVED_IDS))

    def mode(self, speed_percent: int) -> None:
        """Send the mode command."""
        self._transport.send((codec.encode_mode(speed_percent),))

    def enable(self, joint: int) -> None:
        """Power one motor."""
        self._transport.send((codec.encode_enable(joint, enable=True),))

    def ask(self, joint: int) -> None:
        """Send the questions about ``joint``, or with 0 those about the arm."""
        if joint == 0:
            gripper = codec.encode_query_parameter(codec.PARAMETER_GRIPPER)
            self._transport.send((codec.encode_query_firmware(), gripper))
        else:
            self._transport.send(
                (
                    codec.encode_query_limit(joint, codec.QUERY_LIMIT),
                    codec.encode_query_limit(joint, codec.QUERY_ACCELERATION),
                )
            )

    def close(self) -> None:
        """Close the transport."""
        self._transport.close()
