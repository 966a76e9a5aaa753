"""One PiPER with its gripper: seven channels over one bus."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence

from gwp_edge.drivers import piper_codec as codec
from gwp_edge.drivers import piper_words
from gwp_edge.drivers.piper_bringup import Port, bus_off_error, check_alone, connect, enable
from gwp_edge.drivers.piper_can import CanBusyError
from gwp_edge.drivers.piper_feedback import SILENCE_NS, PiperFeedback
from gwp_edge.drivers.piper_limits import PiperLimits, check_firmware, limits_from
from gwp_edge.drivers.piper_link import Command, PiperLink, make_command
from gwp_edge.drivers.piper_options import PiperOptions
from gwp_edge.errors import DeviceError, DeviceTimeoutError, SafetyFault
from gwp_edge.protocols import Clock

logger = logging.getLogger(__name__)

N_CHANNELS = codec.N_JOINTS + 1
MODE_PERIOD_NS = 200_000_000
MAX_DROPPED_IN_ROW = 5
# Four times the slowest report's period.
_SETTLE_NS = 100_000_000
# The caller has limited every target; one this far outside is a mistake, not a wish.
_BEYOND_RAD = math.radians(10.0)
_BEYOND_M = 0.01
_DRIFT_RAD = math.radians(10.0)
_AGREE_RAD = math.radians(2.0)
# Frames of a fast joint are a moment apart; more than this is no moment.
_DOUBT_RAD = math.radians(3.0)
_DRIFT_TIME_NS = 200_000_000
_COMPARE_PERIOD_NS = 40_000_000


class PiperUnit:
    """One arm: connection, state, commands. Threads: one owner.

    Attributes:
        name: how messages call it.
        feedback: the newest of what it says.
        firmware: version text; known after ``connect``.
        limits: known after ``connect``.
        n_dropped: ticks that were dropped because the transmit queue was full.
        drifted: a joint's angle and its motor were seen to differ, since ``connect``.
        doubtful: they differ at present, by less than what counts as drifted or for a shorter time.
        accepted: (least, largest) target that is sent to each channel, rad and m; known after
            ``connect``.
    """

    def __init__(
        self,
        name: str,
        *,
        options: PiperOptions,
        clock: Clock,
        open_link: Callable[[], PiperLink],
    ) -> None:
        self.name = name
        self.feedback = PiperFeedback(name)
        self.firmware = "unknown"
        self.limits: PiperLimits | None = None
        self.n_dropped = 0
        self.drifted = self.doubtful = self._has_doubted = False
        self._options = options
        self._effort_mnm = round(options.gripper_effort_nm * 1000)
        self._clock = clock
        self._open_link = open_link
        self._link: PiperLink | None = None
        self._n_dropped_in_row = 0
        self._t_mode_ns = 0
        self._drift_faults = False
        self._compares_motors = False
        self._t_drift_ns = self._t_compare_ns = 0
        self._silent_motors: set[int] = set()
        self._failed: str | None = None
        self._held: Command | None = None
        self.accepted: list[tuple[float, float]] = []

    def connect(self) -> None:
        """Open the bus and check the arm, sending questions only.

        Raises:
            DeviceError: see ``piper_bringup.connect``.
        """
        self.feedback.reset()
        self._failed = None
        self._held = None
        self._t_drift_ns = self._t_compare_ns = 0
        self._silent_motors.clear()
        self._n_dropped_in_row = 0
        self.drifted = self.doubtful = self._has_doubted = False
        self._link = self._open_link()
        connect(self._port())
        self.firmware, drifts = check_firmware(self.feedback)
        self.limits = limits_from(self.feedback, gripper_max_m=self._options.gripper_max_m)
        beyond = [_BEYOND_RAD] * codec.N_JOINTS + [_BEYOND_M]
        self.accepted = [
            (float(low) - more, float(high) + more)
            for low, high, more in zip(
                self.limits.position_min, self.limits.position_max, beyond, strict=True
            )
        ]
        policy = self._options.drift
        self._drift_faults = policy == "fault" or (policy == "auto" and drifts)
        self._compares_motors = policy != "off" and self._motors_agree()

    def check_ready(self) -> None:
        """Check that mode and status allow powering the motors, and that nobody else drives.

        Raises:
            DeviceError: a person must act first; says how.
        """
        check_alone(self._port())
        self._check_pose()

    def _check_pose(self) -> None:
        """Check that the first command, the measured pose, will be one that may be sent.

        Raises:
            DeviceError: a joint or the gripper stands where none may be.
        """
        feedback = self.feedback
        if feedback.joint_rad is None or feedback.gripper_um is None:
            return  # connect has waited for both
        measured = (*feedback.joint_rad, feedback.gripper_um * 1e-6)
        for i, (value, (low, high)) in enumerate(zip(measured, self.accepted, strict=True)):
            if low <= value <= high:
                continue
            if i == codec.N_JOINTS:
                what = f"the gripper is open by {value * 1e3:.0f} mm"
                advice = "close it, or set gripper_max_m to its stroke"
            else:
                what = f"joint {i + 1} is at {math.degrees(value):.0f} deg"
                advice = "move it inside by hand"
            raise DeviceError(f"{self.name}: {what}, far outside of its range: {advice}")

    def enable(self) -> None:
        """Power the motors; the arm holds its measured pose.

        Raises:
            DeviceError: see ``piper_bringup.enable``.
        """
        enable(
            self._port(),
            speed_percent=self._options.speed_percent,
            gripper_effort_mnm=self._effort_mnm,
        )
        self._t_mode_ns = self._clock.now_ns()

    def settle(self) -> None:
        """Read until everything that the arm reports is of now, after time spent elsewhere."""
        begin_ns = self._clock.now_ns()
        self._port().wait(_SETTLE_NS, lambda: self.feedback.t_oldest_ns >= begin_ns)

    def _port(self) -> Port:
        return Port(link=self._opened(), feedback=self.feedback, clock=self._clock)

    def _opened(self) -> PiperLink:
        if self._failed is not None:
            raise DeviceError(self._failed)
        if self._link is None:
            raise DeviceError(f"{self.name} is not open: call open first")
        return self._link

    def _motors_agree(self) -> bool:
        """Whether motor positions can be compared with joint angles on this arm.

        Raises:
            DeviceError: most joints agree and one does not: its angle has drifted.
        """
        differences = self._differences()
        agreeing = sum(abs(d) < _AGREE_RAD for d in differences)
        if agreeing < codec.N_JOINTS // 2:
            if self._drift_faults:
                raise DeviceError(
                    f"{self.name}: firmware {self.firmware} is known to report wrong joint angles "
                    "after a hard push, and its motor positions (0x25x) have no zero in common "
                    'with them to tell by: update the firmware, or set drift = "warn" in the '
                    "robot file and watch the arm yourself"
                )
            logger.warning(
                "%s: motor positions (0x25x) and joint angles have no common zero; a drift of the "
                "joint angles cannot be seen",
                self.name,
            )
            return False
        worst = max(range(codec.N_JOINTS), key=lambda j: abs(differences[j]))
        if not abs(differences[worst]) <= _DRIFT_RAD:
            self._report_drift(worst, differences[worst])
            if self._drift_faults:
                raise DeviceError(f"{self.name}: {self.feedback.latched}")
        return True

    def _differences(self) -> list[float]:
        joints = self.feedback.joint_rad or [math.nan] * codec.N_JOINTS
        return [m - q for m, q in zip(self.feedback.motor_rad, joints, strict=True)]

    def _report_drift(self, j: int, difference_rad: float) -> None:
        self.drifted = True
        text = (
            f"joint {j + 1}: its angle and its motor differ by "
            f"{math.degrees(difference_rad):.1f} deg: the feedback has drifted (known on firmware "
            "S-V1.8-6); support the arm, switch its power off and on, update the firmware"
        )
        if self._drift_faults:
            self.feedback.latch(text)
        else:
            logger.warning("%s: %s; until then no hold follows its angles", self.name, text)

    def poll(self, now_ns: int) -> None:
        """Read everything that waits.

        Raises:
            DeviceError: the bus is off or gone; stays so until the arm is opened again.
        """
        link = self._link
        if link is None or self._failed is not None:
            link = self._opened()
        try:
            link.poll(self.feedback)
        except DeviceError as e:
            self._failed = f"{self.name}: {e}"
            raise DeviceError(self._failed) from e
        if self.feedback.bus_off:
            error = bus_off_error(self.name)
            self._failed = str(error)
            raise error
        if self._compares_motors and now_ns >= self._t_compare_ns:
            self._t_compare_ns = now_ns + _COMPARE_PERIOD_NS
            self._watch_drift(now_ns)

    def _watch_drift(self, now_ns: int) -> None:
        joints, oldest_ns = self.feedback.joint_rad, now_ns - SILENCE_NS
        if joints is None or self.feedback.t_pose_ns < oldest_ns:
            return  # the whole arm is silent, or was not read for a while
        self.doubtful = False
        t_fast_ns = self.feedback.t_fast_ns
        for j, (motor, joint) in enumerate(zip(self.feedback.motor_rad, joints, strict=True)):
            if t_fast_ns[j] < oldest_ns:
                self._see_silent_motor(j)
                continue
            if abs(motor - joint) > _DOUBT_RAD:
                self._doubt(j, motor - joint)
            if abs(motor - joint) > _DRIFT_RAD:
                if self._t_drift_ns == 0:
                    self._t_drift_ns = now_ns
                elif now_ns - self._t_drift_ns > _DRIFT_TIME_NS:
                    # Once is enough: a latched fault stays, a warning must not flood the log.
                    self._compares_motors = False
                    self._report_drift(j, motor - joint)
                return
        self._t_drift_ns = 0

    def _doubt(self, j: int, difference_rad: float) -> None:
        """Follow the angles by no hold while this lasts; the guardian's would move the arm."""
        self.doubtful = True
        if not self._has_doubted:
            self._has_doubted = True
            logger.warning(
                "%s: joint %d: its angle and its motor differ by %.1f deg; while such a difference "
                "lasts, no hold follows the arm's angles, the guardian's included",
                self.name,
                j + 1,
                math.degrees(difference_rad),
            )

    def _see_silent_motor(self, j: int) -> None:
        """Say once that a joint's drift cannot be seen: an old value beside a new one is none."""
        if j not in self._silent_motors:
            self._silent_motors.add(j)
            logger.warning(
                "%s: joint %d: no motor feedback (0x25%d); a drift of its angle cannot be seen",
                self.name,
                j + 1,
                j + 1,
            )

    def check(self, position: Sequence[float]) -> None:
        """Check seven targets, rad and m, against what this arm accepts.

        Raises:
            SafetyFault: one is not finite, or far outside of what this arm can do; says which.
        """
        limits = self.limits
        for i, (value, (low, high)) in enumerate(zip(position, self.accepted, strict=True)):
            if low <= value <= high:
                continue
            what = f"joint {i + 1}" if i < codec.N_JOINTS else "gripper"
            if limits is None or not math.isfinite(value):
                text = f"{what} target is {value}, not a number"
            else:
                text = (
                    f"{what} target {value:.6g} is far outside its range "
                    f"{limits.position_min[i]:.4f} to {limits.position_max[i]:.4f}"
                )
            raise SafetyFault(f"{self.name}: {text}; nothing was sent")

    def send(self, command: Command, now_ns: int) -> None:
        """Send one tick of targets that have been checked.

        Raises:
            DeviceTimeoutError: the transmit queue is full, the rest of this tick was dropped.
            DeviceError: opened for reading only, someone else has the arm, five ticks in a row
                were dropped, or the bus is gone.
        """
        link, feedback = self._link, self.feedback
        if link is None or self._failed is not None:
            link = self._opened()
        if not feedback.armed:
            raise DeviceError(f"{self.name} is open for reading only: open it with enable")
        if feedback.stop_streaming:
            raise DeviceError(f"{self.name}: {feedback.latched}")
        try:
            if now_ns - self._t_mode_ns >= MODE_PERIOD_NS:
                link.mode(self._options.speed_percent)
                self._t_mode_ns = now_ns
            link.command(command)
        except CanBusyError as e:
            self._drop(e)
        except DeviceError as e:
            self._failed = f"{self.name}: {e}"
            raise DeviceError(self._failed) from e
        else:
            self._n_dropped_in_row = 0

    def _drop(self, cause: CanBusyError) -> None:
        self.n_dropped += 1
        self._n_dropped_in_row += 1
        if self._n_dropped_in_row >= MAX_DROPPED_IN_ROW:
            self._failed = (
                f"{self.name}: the CAN transmit queue was full {MAX_DROPPED_IN_ROW} times in a "
                "row: nobody acknowledges frames; check the arm's power, cable and termination"
            )
            raise DeviceError(self._failed) from cause
        raise DeviceTimeoutError(
            f"{self.name}: the CAN transmit queue is full, this tick was dropped "
            f"({self._n_dropped_in_row} of {MAX_DROPPED_IN_ROW} in a row)"
        ) from cause

    def hold(self, now_ns: int) -> None:
        """Command the pose of the first call; the gripper and the mode are left alone.

        Raises:
            DeviceError: not under CAN control, no fresh pose, or it could not be sent.
        """
        self.poll(now_ns)
        feedback = self.feedback
        if feedback.mode != codec.MODE_CAN:
            words = piper_words.mode(feedback.mode)
            raise DeviceError(f"{self.name}: nothing to hold, the arm is in {words}")
        if self._held is None:
            if self.drifted or self.doubtful:
                raise DeviceError(
                    f"{self.name}: its joint angles have drifted, a hold by them would move it; "
                    "nothing was sent, the arm holds its last target"
                )
            if now_ns - feedback.t_pose_ns > SILENCE_NS:
                raise DeviceError(f"{self.name}: no fresh joint angles to hold; nothing was sent")
            self._held = make_command(feedback.joint_mdeg, None)
        try:
            self._opened().command(self._held)
        except CanBusyError as e:
            raise DeviceTimeoutError(
                f"{self.name}: the CAN transmit queue is full, the hold was not sent"
            ) from e

    def close(self) -> None:
        """Close the bus; the arm keeps holding its last target. Safe to call twice."""
        link, self._link = self._link, None
        self.feedback.set_armed(False)
        if link is not None:
            link.close()
