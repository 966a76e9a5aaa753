"""Waking a PiPER step by step, each refusal with its own reason. Never resets, never moves.

Order: fresh feedback, firmware and limits, mode and faults, targets seeded with the measured
pose, motors powered one by one, mode confirmed, gripper powered where it is.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

from gwp_edge.drivers import piper_codec as codec
from gwp_edge.drivers import piper_words
from gwp_edge.drivers.piper_can import CanBusyError
from gwp_edge.drivers.piper_feedback import (
    ALL_ENABLED,
    ERR_CONTROLLER,
    ERR_PROTOCOL,
    SILENCE_NS,
    PiperFeedback,
)
from gwp_edge.drivers.piper_limits import check_answers
from gwp_edge.drivers.piper_link import Command, PiperLink, joints_of, make_command
from gwp_edge.errors import DeviceError, DeviceTimeoutError
from gwp_edge.protocols import Clock

logger = logging.getLogger(__name__)

_MS = 1_000_000
_POLL_NS = _MS
_FEEDBACK_WAIT_NS = 500 * _MS
_ANSWER_WAIT_NS = 100 * _MS
_ASK_GAP_NS = 4 * _MS
_ENABLE_WAIT_NS = 3_000 * _MS
_ENABLE_RETRY_NS = 100 * _MS
_MODE_WAIT_NS = 1_000 * _MS
_SEED_PERIOD_NS = 10 * _MS
_FIRMWARE_BYTES = 88
# A joint may sag this far while it takes its load; more is a jump.
_MOST_SHIFT_MDEG = 5_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Port:
    """One arm's link, what it says, and the clock to wait by. Threads: one owner."""

    link: PiperLink
    feedback: PiperFeedback
    clock: Clock

    def wait(self, wait_ns: int, done: Callable[[], bool]) -> bool:
        """Poll until ``done`` or for ``wait_ns``; return whether it was done.

        Raises:
            DeviceError: the bus is off or gone.
        """
        deadline_ns = self.clock.now_ns() + wait_ns
        while True:
            self.link.poll(self.feedback)
            if self.feedback.bus_off:
                raise bus_off_error(self.feedback.name)
            if done():
                return True
            now_ns = self.clock.now_ns()
            if now_ns >= deadline_ns:
                return False
            self.clock.sleep_until_ns(now_ns + _POLL_NS)


def bus_off_error(name: str) -> DeviceError:
    """Return the error for a controller that went bus-off."""
    return DeviceError(
        f"{name}: the CAN controller went bus-off: check cable, termination (120 ohm at both "
        "ends) and bitrate (1000000), then start again"
    )


def connect(port: Port) -> None:
    """Wait for fresh feedback, then ask for firmware and limits. Sends questions only.

    Raises:
        DeviceError: no or partial feedback, wrong role or bitrate, absurd limits; says which.
    """
    feedback = port.feedback
    if not port.wait(_FEEDBACK_WAIT_NS, lambda: not feedback.missing()):
        raise _no_feedback(feedback)
    _ask(port)
    check_answers(feedback)
    stale = feedback.silence(port.clock.now_ns())
    if stale is not None:
        raise DeviceTimeoutError(f"{feedback.name}: {stale}")


def _no_feedback(feedback: PiperFeedback) -> DeviceError:
    name = feedback.name
    if feedback.leader_seen or feedback.foreign_command:
        return DeviceError(
            f"{name}: the arm is in the leader role (it sends commands instead of feedback): "
            "make it a follower in the vendor's tool and switch its power off and on"
        )
    if feedback.error_classes & (ERR_PROTOCOL | ERR_CONTROLLER) and feedback.mode < 0:
        return DeviceError(
            f"{name}: {feedback.n_error_frames} CAN error frames and no feedback: wrong bitrate or "
            "wiring; 'ip -details link show' must say bitrate 1000000"
        )
    if feedback.n_frames == feedback.n_error_frames:
        return DeviceTimeoutError(
            f"{name}: no frames within 0.5 s: the arm is switched off, on another CAN adapter, or "
            "in the leader role (a leader is silent until it is moved)"
        )
    return DeviceTimeoutError(
        f"{name}: incomplete feedback within 0.5 s, missing {'; '.join(feedback.missing())}: check "
        "the arm's inner cable and switch its power off and on"
    )


def _ask(port: Port) -> None:
    """Ask until every joint answered its limits, three times at most."""
    feedback = port.feedback
    for _ in range(3):
        feedback.firmware_text = b""
        for joint in range(codec.N_JOINTS + 1):
            _send_patiently(port, lambda joint=joint: port.link.ask(joint))  # type: ignore[misc]
            port.wait(_ASK_GAP_NS, lambda: False)
        if port.wait(_ANSWER_WAIT_NS, lambda: _answered(feedback)):
            return
    # Old firmware may not say its version or the gripper's parameters; limits are checked next.


def _answered(feedback: PiperFeedback) -> bool:
    return (
        None not in feedback.limits
        and None not in feedback.acceleration_crad_s2
        and feedback.gripper_parameter is not None
        and len(feedback.firmware_text) >= _FIRMWARE_BYTES
        # Another program's question at the same time mixes the answers: ask again then.
        and codec.parse_firmware(feedback.firmware_text) is not None
    )


def _send_patiently(port: Port, send: Callable[[], None]) -> None:
    """Send, trying again while the transmit queue is full.

    Raises:
        DeviceError: it stays full.
    """
    for _ in range(10):
        try:
            send()
        except CanBusyError:  # noqa: PERF203 - the retry is the point of this loop
            port.clock.sleep_until_ns(port.clock.now_ns() + 2 * _MS)
        else:
            return
    raise DeviceError(
        f"{port.feedback.name}: the CAN transmit queue stays full, nobody acknowledges frames: "
        "check the arm's power, cable and termination; txqueuelen should be 64"
    )


def check_ready(feedback: PiperFeedback) -> None:
    """Check that mode and status allow powering the motors.

    Raises:
        DeviceError: a person must act first; says how.
    """
    if feedback.latched is not None:
        raise DeviceError(f"{feedback.name}: {feedback.latched}")
    if feedback.leader_seen or feedback.foreign_command:
        raise DeviceError(
            f"{feedback.name}: another program or a leader arm sends joint commands on this bus: "
            "stop it, or give each arm its own CAN adapter"
        )
    if feedback.mode not in (codec.MODE_STANDBY, codec.MODE_CAN):
        words = piper_words.mode(feedback.mode)
        raise DeviceError(f"{feedback.name}: the arm is in {words}")


def check_alone(port: Port) -> None:
    """Check that nobody else commands the arm.

    A last frame of a program that has just ended may still have been under way, so one sighting
    makes this listen a while longer.

    Raises:
        DeviceError: someone goes on commanding it.
    """
    feedback = port.feedback
    if feedback.foreign_command:
        feedback.foreign_command = False
        port.wait(SILENCE_NS, lambda: feedback.foreign_command)
    check_ready(feedback)


def enable(port: Port, *, speed_percent: int, gripper_effort_mnm: int) -> None:
    """Power the motors so that the arm holds the pose that it has.

    Args:
        port: a connected arm.
        speed_percent: cap on the speed, 0 to 100.
        gripper_effort_mnm: gripper torque, 0.001 N.m.

    Raises:
        DeviceError: refused, did not enable, or moved while enabling.
    """
    check_ready(port.feedback)
    # A pose from before a busy moment would be a wrong target, and frames may have waited since
    # then: a receive queue that nobody read is full of old ones. Their stamps tell.
    begin_ns = port.clock.now_ns()
    if not port.wait(SILENCE_NS, lambda: port.feedback.t_pose_ns >= begin_ns):
        raise DeviceTimeoutError(f"{port.feedback.name}: the joint angles stopped coming")
    seed = make_command(port.feedback.joint_mdeg, None)
    _send_patiently(port, lambda: port.link.command(seed))
    _enable_joints(port, seed)
    _enter_can_mode(port, seed, speed_percent)
    _enable_gripper(port, seed, gripper_effort_mnm)
    port.feedback.set_armed(True)


def _enable_joints(port: Port, seed: Command) -> None:
    feedback = port.feedback
    deadline_ns = port.clock.now_ns() + _ENABLE_WAIT_NS
    while feedback.enabled_mask != ALL_ENABLED:
        if port.clock.now_ns() >= deadline_ns:
            off = [j + 1 for j in range(codec.N_JOINTS) if not feedback.enabled_mask >> j & 1]
            raise DeviceTimeoutError(
                f"{feedback.name}: joint {', '.join(map(str, off))} did not enable within 3 s: "
                "switch the arm's power off and on; if it stays, the joint's driver needs the "
                "vendor"
            )
        for joint in range(1, codec.N_JOINTS + 1):
            if not feedback.enabled_mask >> (joint - 1) & 1:
                _send_patiently(port, lambda joint=joint: port.link.enable(joint))  # type: ignore[misc]
                _hold(port, seed, _SEED_PERIOD_NS, lambda: False)
        _hold(port, seed, _ENABLE_RETRY_NS, lambda: feedback.enabled_mask == ALL_ENABLED)


def _hold(port: Port, seed: Command, wait_ns: int, done: Callable[[], bool]) -> bool:
    """Wait like ``Port.wait`` while streaming the seed; stop at a fault or a jump."""
    deadline_ns = port.clock.now_ns() + wait_ns
    feedback = port.feedback
    while True:
        _send_patiently(port, lambda: port.link.command(seed))
        if port.wait(_SEED_PERIOD_NS, done):
            return True
        check_ready(feedback)
        now_ns = port.clock.now_ns()
        stale = feedback.silence(now_ns)
        if stale is not None:
            raise DeviceTimeoutError(f"{feedback.name}: {stale}")
        for j, (now, then) in enumerate(zip(feedback.joint_mdeg, joints_of(seed), strict=True)):
            if abs(now - then) > _MOST_SHIFT_MDEG:
                raise DeviceError(
                    f"{feedback.name}: joint {j + 1} moved {(now - then) / 1000:.1f} deg while "
                    "its motors were powered: support the arm, switch its power off and on"
                )
        if now_ns >= deadline_ns:
            return False


def _enter_can_mode(port: Port, seed: Command, speed_percent: int) -> None:
    feedback = port.feedback

    def in_mode() -> bool:
        return feedback.mode == codec.MODE_CAN and feedback.move_mode == codec.MOVE_J

    for _ in range(_MODE_WAIT_NS // _ENABLE_RETRY_NS):
        _send_patiently(port, lambda: port.link.mode(speed_percent))
        if _hold(port, seed, _ENABLE_RETRY_NS, in_mode):
            return
    raise DeviceTimeoutError(
        f"{feedback.name}: the arm did not take CAN joint control within 1 s (mode "
        f"{feedback.mode}, move mode {feedback.move_mode}; expected 1 and 1): switch its power "
        "off and on"
    )


def _enable_gripper(port: Port, seed: Command, effort_mnm: int) -> None:
    feedback = port.feedback
    here = make_command(joints_of(seed), (feedback.gripper_um or 0, effort_mnm))
    if not _hold(port, here, _MODE_WAIT_NS, lambda: feedback.gripper_enabled):
        raise DeviceTimeoutError(
            f"{feedback.name}: the gripper did not enable within 1 s: check its cable"
        )
