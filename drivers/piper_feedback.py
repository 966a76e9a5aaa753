"""What one PiPER says about itself: what its frames mean for the motion, and in plain words.

The compiled part keeps the newest of every frame (``FrameStore``); what may say something new is
judged here.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

from gwp_edge.drivers import piper_codec as codec
from gwp_edge.drivers import piper_words
from gwp_edge.drivers.piper_core import FrameStore
from gwp_edge.drivers.piper_words import DRIVER_FAULT, GRIPPER_FAULT

N = codec.N_JOINTS

# Identifier with flags, data, receive time in ns.
StampedFrame = tuple[int, bytes, int]

SILENCE_NS = 100_000_000
SLOW_SILENCE_NS = 500_000_000

CAN_ERR_FLAG = 0x20000000
ERR_TX_TIMEOUT, ERR_CONTROLLER, ERR_PROTOCOL = 0x01, 0x04, 0x08
ERR_NO_ACK, ERR_BUS_OFF, ERR_RESTARTED = 0x20, 0x40, 0x100

# These pass by themselves; every other status stays until the arm is opened again.
_PASSING_STATUS = frozenset({2, 3, 4})

_ENABLED = 0b0100_0000
ALL_ENABLED = (1 << N) - 1


class PiperFeedback(FrameStore):
    """The newest of everything that one arm reports. Threads: one owner.

    Attributes:
        name: how messages call the arm, such as ``left arm (can_left)``.
        enabled_mask: bit j is set while joint j + 1 reports its motor enabled.
        mode, arm_status, move_mode: bytes 0 to 2 of the status frame; -1 before the first.
        armed: this driver has powered the arm and commands it; see ``set_armed``.
        limits: what 0x473 answered per joint: (max, min) in 0.1 degree and the raw speed.
        latched: the first lasting fault since ``reset``, or None.
        stop_streaming: a lasting fault after which nothing may be sent any more.
        passing: what the arm complains about and may stop to by itself, or None.
    """

    # A tick reads them: of a fixed layout, and no attribute appears by a slip of the pen.
    __slots__ = (
        "acceleration_crad_s2",
        "arm_status",
        "armed",
        "bus_off",
        "enabled_mask",
        "error_classes",
        "firmware_text",
        "foreign_command",
        "gripper_enabled",
        "gripper_parameter",
        "latched",
        "leader_seen",
        "limits",
        "mode",
        "move_mode",
        "n_error_frames",
        "n_restarts",
        "name",
        "passing",
        "stop_streaming",
    )

    def __init__(self, name: str) -> None:
        self.name = name
        self.reset()

    def reset(self) -> None:
        """Forget everything, as after a new connection."""
        self.clear()
        self.gripper_enabled = False
        self.enabled_mask = 0
        self.mode = self.arm_status = self.move_mode = -1
        self.limits: list[tuple[int, int, int] | None] = [None] * N
        self.acceleration_crad_s2: list[int | None] = [None] * N
        self.gripper_parameter: tuple[int, ...] | None = None
        self.firmware_text = b""
        self.foreign_command = False
        self.leader_seen = False
        self.bus_off = False
        self.n_error_frames = self.n_restarts = 0
        self.error_classes = 0
        self.latched: str | None = None
        self.stop_streaming = False
        self.passing: str | None = None
        self.armed = False

    def latch(self, fault: str, *, stop_streaming: bool = False) -> None:
        """Keep ``fault`` until the arm is opened again; the first one stays.

        Args:
            fault: one line for the operator.
            stop_streaming: someone else has the arm, or it has no power: send nothing more.
        """
        if self.latched is None:
            self.latched = fault
        self.stop_streaming = self.stop_streaming or stop_streaming

    def set_armed(self, armed: bool) -> None:  # noqa: FBT001 - the value itself
        """Say whether this driver commands the arm; what the arm said before is judged again."""
        self.armed = armed
        self.forget_judged()

    def ingest(self, frames: Iterable[StampedFrame]) -> None:
        """Take frames in the order of their arrival.

        Args:
            frames: (identifier with error flag, data, receive time in ns).
        """
        news = self.take_frames(frames)
        if news is not None:
            self.judge(news)

    def judge(self, frames: Iterable[StampedFrame]) -> None:
        """Draw the conclusions from frames that may say something new."""
        for can_id, data, _ in frames:
            if can_id == codec.ID_STATUS:
                self._judge_status(codec.DECODERS[can_id](data))
            elif can_id == codec.ID_GRIPPER_FEEDBACK:
                self._judge_gripper(data[6])
            elif 0x261 <= can_id <= 0x266:
                self._judge_driver(can_id - 0x261, data[5])
            else:
                self._other(can_id, data)

    def _judge_status(self, fields: tuple[int, ...]) -> None:
        self.mode, self.arm_status, self.move_mode = fields[0], fields[1], fields[2]
        over, silent = fields[6], fields[7]
        self.passing = None
        if over & ALL_ENABLED:
            self.passing = f"{piper_words.joints(over)} is at its angle limit"
        if silent & ALL_ENABLED:
            self.latch(
                f"{piper_words.joints(silent)} does not answer the controller: check the arm's "
                "inner cable"
            )
        if self.arm_status:
            words = piper_words.status(self.arm_status)
            if self.arm_status in _PASSING_STATUS:
                self.passing = words
            else:
                self.latch(words)
        if self.armed and self.mode != codec.MODE_CAN:
            words = piper_words.mode(self.mode)
            self.latch(
                f"the arm left CAN control, streaming stopped; it is in {words}",
                stop_streaming=True,
            )

    def _judge_gripper(self, status: int) -> None:
        if status & GRIPPER_FAULT:
            self.latch(f"gripper: {piper_words.gripper(status)}")
        enabled = bool(status & _ENABLED)
        if self.armed and not enabled:
            self.latch("gripper: its motor lost power or was disabled from elsewhere")
        self.gripper_enabled = enabled

    def _judge_driver(self, j: int, status: int) -> None:
        if status & DRIVER_FAULT:
            self.latch(f"joint {j + 1}: {piper_words.driver(status)}")
        if status & _ENABLED:
            self.enabled_mask |= 1 << j
            return
        self.enabled_mask &= ~(1 << j)
        if self.armed:
            self.latch(
                f"joint {j + 1}: its motor lost power or was disabled from elsewhere",
                stop_streaming=True,
            )

    def _other(self, can_id: int, data: bytes) -> None:
        """Take a frame that does not come by itself."""
        if can_id in codec.DECODERS:
            self._answer(can_id, codec.DECODERS[can_id](data))
        elif can_id & CAN_ERR_FLAG:
            self.n_error_frames += 1
            self.error_classes |= can_id & 0x1FFFFFFF
            if can_id & ERR_BUS_OFF:
                self.bus_off = True
            if can_id & ERR_RESTARTED:
                self.n_restarts += 1
        elif can_id == codec.ID_FIRMWARE:
            self.firmware_text = (self.firmware_text + data)[-256:]
        elif codec.ID_JOINTS_12 <= can_id <= codec.ID_JOINTS_56:
            self.foreign_command = True
            if self.armed:
                self.latch(
                    "another program or a leader arm sends joint commands to this arm: stop it",
                    stop_streaming=True,
                )
        elif can_id in (0x2B1, 0x2C1):
            self.leader_seen = True

    def _answer(self, can_id: int, fields: tuple[int, ...]) -> None:
        """Take an answer to a question."""
        if can_id == codec.ID_LIMIT and 1 <= fields[0] <= N:
            self.limits[fields[0] - 1] = (fields[1], fields[2], fields[3])
        elif can_id == codec.ID_ACCELERATION and 1 <= fields[0] <= N:
            self.acceleration_crad_s2[fields[0] - 1] = fields[1]
        elif can_id == codec.ID_GRIPPER_PARAMETER:
            self.gripper_parameter = fields

    def _fast(self, k: int) -> list[float]:
        """Return field ``k`` of the six motor_fast frames; NaN before the first of a joint."""
        return [
            math.nan if (data := self.data_of(i)) is None else codec.DECODERS[i](data)[k] * 1e-3
            for i in codec.ID_MOTOR_FAST
        ]

    @property
    def joint_rad(self) -> list[float] | None:
        """Six angles of one moment, rad; None before the first whole pose."""
        if self.n_poses == 0:
            return None
        return [angle * codec.RAD_PER_MDEG for angle in self.joint_mdeg]

    @property
    def velocity_rad_s(self) -> list[float]:
        """Six joint speeds, rad/s; NaN before the first frame of a joint."""
        return self._fast(0)

    @property
    def current_a(self) -> list[float]:
        """Six motor currents, A; NaN before the first frame of a joint."""
        return self._fast(1)

    @property
    def motor_rad(self) -> list[float]:
        """Six motor positions, rad; NaN before the first frame of a joint."""
        return self._fast(2)

    @property
    def t_gripper_ns(self) -> int:
        """Stamp of the newest gripper frame; 0: never."""
        return self.t_ns_of(codec.ID_GRIPPER_FEEDBACK)

    @property
    def t_fast_ns(self) -> tuple[int, ...]:
        """Stamps of the six motor_fast frames (0x251 to 0x256); 0: never."""
        return tuple(map(self.t_ns_of, codec.ID_MOTOR_FAST))

    def missing(self) -> list[str]:
        """Return what the arm should report and has not yet, in words."""
        gaps = []
        if self.mode < 0:
            gaps.append("status (0x2A1)")
        if self.joint_rad is None:
            gaps.append("joint angles (0x2A5 to 0x2A7)")
        if self.gripper_um is None:
            gaps.append("gripper (0x2A8)")
        slow_ns = [self.t_ns_of(can_id) for can_id in codec.ID_MOTOR_SLOW]
        gaps += [f"joint {j + 1} driver (0x26{j + 1})" for j in range(N) if not slow_ns[j]]
        return gaps

    def silence(self, now_ns: int) -> str | None:
        """Return what has been silent for too long at ``now_ns``, in words, or None."""
        slow_ns = [self.t_ns_of(can_id) for can_id in codec.ID_MOTOR_SLOW]
        for what, t_ns in (
            ("joint angles", self.t_pose_ns),
            ("gripper", self.t_gripper_ns),
            ("status", self.t_ns_of(codec.ID_STATUS)),
        ):
            if now_ns - t_ns > SILENCE_NS:
                age_ms = (now_ns - t_ns) // 1_000_000
                return (
                    f"no {what} feedback for {age_ms} ms (expected every 5 ms): check the CAN "
                    "cable and the arm's power"
                )
        oldest_ns = min(slow_ns)
        if now_ns - oldest_ns <= SLOW_SILENCE_NS:
            return None
        return (
            f"joint {slow_ns.index(oldest_ns) + 1}: no driver feedback for "
            f"{(now_ns - oldest_ns) // 1_000_000} ms (expected every 25 ms): check the arm's "
            "inner cable"
        )

    def fault(self, now_ns: int) -> str | None:
        """Return the most important fault at ``now_ns`` as one line for the operator, or None."""
        text = self.latched
        if text is None:
            text = self.silence(now_ns)
        return None if text is None else f"{self.name}: {text}"

    @property
    def caution(self) -> str | None:
        """``passing`` as one line for the operator, or None."""
        return None if self.passing is None else f"{self.name}: {self.passing}"
