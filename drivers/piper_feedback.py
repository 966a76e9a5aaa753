"""What one PiPER says about itself, put together from its frames, and in plain words.

The joints come as three frames. They become a new pose only when all three carry stamps within
one short window, so two halves of different moments are never shown as one.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from operator import itemgetter
from struct import Struct

from gwp_edge.drivers import piper_codec as codec
from gwp_edge.drivers import piper_words
from gwp_edge.drivers.piper_words import DRIVER_FAULT, GRIPPER_FAULT

N = codec.N_JOINTS

# The three joint frames leave the arm back to back (0.4 ms at 1 Mbit/s) every 5 ms: frames of one
# moment are closer than this window, frames of neighbouring moments are not.
POSE_WINDOW_NS = 3_000_000
SILENCE_NS = 100_000_000
SLOW_SILENCE_NS = 500_000_000
_WILD_MDEG = 360_000
_WILD_UM = 150_000

CAN_ERR_FLAG = 0x20000000
ERR_TX_TIMEOUT, ERR_CONTROLLER, ERR_PROTOCOL = 0x01, 0x04, 0x08
ERR_NO_ACK, ERR_BUS_OFF, ERR_RESTARTED = 0x20, 0x40, 0x100

# These pass by themselves; every other status stays until the arm is opened again.
_PASSING_STATUS = frozenset({2, 3, 4})

_ENABLED = 0b0100_0000
_FAST_IDS = frozenset(codec.ID_MOTOR_FAST)
_PART_BIT = {can_id: 1 << part for part, can_id in enumerate(codec.ID_JOINT_FEEDBACK)}
_ALL_PARTS = 0b111
# What is judged whenever it changes.
_JUDGED_IDS = (codec.ID_STATUS, codec.ID_GRIPPER_FEEDBACK, *codec.ID_MOTOR_SLOW)
_PERIODIC_IDS = (*codec.ID_JOINT_FEEDBACK, *codec.ID_MOTOR_FAST, *_JUDGED_IDS)
# One call in place of a look at each.
_parts_of = itemgetter(*codec.ID_JOINT_FEEDBACK)
_fast_of = itemgetter(*codec.ID_MOTOR_FAST)
_slow_of = itemgetter(*codec.ID_MOTOR_SLOW)
_PAIR, _SIX = Struct(">ii"), Struct(">6i")
_FAST = Struct(">hhi")
_FAST_SPEEDS = Struct(">" + "h6x" * N)
ALL_ENABLED = (1 << N) - 1


class PiperFeedback:
    """The newest of everything that one arm reports. Threads: one owner.

    Attributes:
        name: how messages call the arm, such as ``left arm (can_left)``.
        joint_rad: six angles of one moment, rad; None before the first whole pose.
        joint_mdeg: the same as the arm sent them, 0.001 degree.
        t_pose_ns: stamp of the oldest of the three frames of ``joint_rad``.
        gripper_um: total opening, 0.001 mm; None before the first frame.
        enabled_mask: bit j is set while joint j + 1 reports its motor enabled.
        mode, arm_status, move_mode: bytes 0 to 2 of the status frame; -1 before the first.
        armed: this driver has powered the arm and commands it; see ``set_armed``.
        limits: what 0x473 answered per joint: (max, min) in 0.1 degree and the raw speed.
        latched: the first lasting fault since ``reset``, or None.
        stop_streaming: a lasting fault after which nothing may be sent any more.
    """

    # More attributes than Python keeps in an object's own table; they are read at every tick.
    __slots__ = (
        "_newest",
        "_parts_new",
        "_passing",
        "_t_ns",
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
        "gripper_um",
        "joint_mdeg",
        "joint_rad",
        "latched",
        "leader_seen",
        "limits",
        "mode",
        "move_mode",
        "n_bad",
        "n_error_frames",
        "n_frames",
        "n_poses",
        "n_restarts",
        "name",
        "stop_streaming",
        "t_pose_ns",
    )

    def __init__(self, name: str) -> None:
        self.name = name
        self.reset()

    def reset(self) -> None:
        """Forget everything, as after a new connection."""
        self.joint_rad: list[float] | None = None
        self.joint_mdeg: list[int] = [0] * N
        self.t_pose_ns = 0
        self.n_poses = 0
        # By identifier: the newest data and stamps of everything that comes by itself.
        self._newest: dict[int, bytes | None] = dict.fromkeys(_PERIODIC_IDS)
        self._t_ns = dict.fromkeys(_PERIODIC_IDS, 0)
        self._parts_new = 0
        self.gripper_um: int | None = None
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
        self.n_frames = self.n_bad = self.n_error_frames = self.n_restarts = 0
        self.error_classes = 0
        self.latched: str | None = None
        self.stop_streaming = False
        self._passing: str | None = None
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
        for can_id in _JUDGED_IDS:
            self._newest[can_id] = None

    def ingest(self, frames: Iterable[tuple[int, bytes, int]]) -> None:
        """Take frames in the order of their arrival.

        Args:
            frames: (identifier with error flag, data, receive time in ns).
        """
        # The hot loop of the driver: a dozen frames per tick and arm. Half of them are motor_fast,
        # decoded when somebody asks; of the others most say what they said before.
        newest, stamps, part_bit, n = self._newest, self._t_ns, _PART_BIT, 0
        for can_id, data, t_ns in frames:
            n += 1
            if len(data) != 8:
                self.n_bad += 1
            elif can_id in _FAST_IDS:
                newest[can_id], stamps[can_id] = data, t_ns
            elif can_id in part_bit:
                newest[can_id], stamps[can_id] = data, t_ns
                self._parts_new |= part_bit[can_id]
                if self._parts_new == _ALL_PARTS:
                    self._take_pose()
            elif can_id not in newest:
                self._other(can_id, data, t_ns)
            elif newest[can_id] == data:
                stamps[can_id] = t_ns
            else:
                newest[can_id] = data
                self.take(can_id, codec.DECODERS[can_id](data), t_ns)
        self.n_frames += n

    def take(self, can_id: int, fields: tuple[int, ...], t_ns: int) -> None:
        """Take the decoded ``fields`` of the feedback frame ``can_id``, received at ``t_ns``."""
        if 0x261 <= can_id <= 0x266:
            self._take_slow(can_id - 0x261, fields[3], t_ns)
        elif can_id == codec.ID_STATUS:
            self._take_status(fields, t_ns)
        elif can_id == codec.ID_GRIPPER_FEEDBACK:
            self._take_gripper(fields, t_ns)
        elif can_id in _PART_BIT:
            self._newest[can_id], self._t_ns[can_id] = _PAIR.pack(*fields), t_ns
            self._parts_new |= _PART_BIT[can_id]
            if self._parts_new == _ALL_PARTS:
                self._take_pose()
        elif can_id in _FAST_IDS:
            self._newest[can_id], self._t_ns[can_id] = _FAST.pack(*fields), t_ns
        elif can_id == codec.ID_LIMIT and 1 <= fields[0] <= N:
            self.limits[fields[0] - 1] = (fields[1], fields[2], fields[3])
        elif can_id == codec.ID_ACCELERATION and 1 <= fields[0] <= N:
            self.acceleration_crad_s2[fields[0] - 1] = fields[1]
        elif can_id == codec.ID_GRIPPER_PARAMETER:
            self.gripper_parameter = fields

    def _take_pose(self) -> None:
        """Make a pose of the three joint frames if they are of one moment."""
        stamps = _parts_of(self._t_ns)
        oldest = min(stamps)
        if max(stamps) - oldest > POSE_WINDOW_NS:
            return
        self._parts_new = 0
        angles = _SIX.unpack(b"".join(_parts_of(self._newest)))
        if min(angles) < -_WILD_MDEG or max(angles) > _WILD_MDEG:
            self.n_bad += 1
            return
        self.joint_mdeg = [*angles]
        self.joint_rad = [angle * codec.RAD_PER_MDEG for angle in angles]
        self.t_pose_ns = oldest
        self.n_poses += 1

    def _take_status(self, fields: tuple[int, ...], t_ns: int) -> None:
        self._t_ns[codec.ID_STATUS] = t_ns
        self.mode, self.arm_status, self.move_mode = fields[0], fields[1], fields[2]
        over, silent = fields[6], fields[7]
        self._passing = None
        if over & ALL_ENABLED:
            self._passing = f"{piper_words.joints(over)} is at its angle limit"
        if silent & ALL_ENABLED:
            self.latch(
                f"{piper_words.joints(silent)} does not answer the controller: check the arm's "
                "inner cable"
            )
        if self.arm_status:
            words = piper_words.status(self.arm_status)
            if self.arm_status in _PASSING_STATUS:
                self._passing = words
            else:
                self.latch(words)
        if self.armed and self.mode != codec.MODE_CAN:
            words = piper_words.mode(self.mode)
            self.latch(
                f"the arm left CAN control, streaming stopped; it is in {words}",
                stop_streaming=True,
            )

    def _take_gripper(self, fields: tuple[int, ...], t_ns: int) -> None:
        if not -_WILD_UM <= fields[0] <= _WILD_UM:
            self.n_bad += 1
            self._newest[codec.ID_GRIPPER_FEEDBACK] = None  # nor is the same once more a sign
            return
        self.gripper_um = fields[0]
        self._t_ns[codec.ID_GRIPPER_FEEDBACK] = t_ns
        status = fields[2]
        if status & GRIPPER_FAULT:
            self.latch(f"gripper: {piper_words.gripper(status)}")
        enabled = bool(status & _ENABLED)
        if self.armed and not enabled:
            self.latch("gripper: its motor lost power or was disabled from elsewhere")
        self.gripper_enabled = enabled

    def _take_slow(self, j: int, status: int, t_ns: int) -> None:
        self._t_ns[0x261 + j] = t_ns
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

    def _other(self, can_id: int, data: bytes, t_ns: int) -> None:
        """Take a frame that does not come by itself."""
        if can_id in codec.DECODERS:
            self.take(can_id, codec.DECODERS[can_id](data), t_ns)
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

    @property
    def velocity_rad_s(self) -> list[float]:
        """Six joint speeds, rad/s; NaN before the first frame of a joint."""
        frames = _fast_of(self._newest)
        if None in frames:
            return [math.nan if d is None else _FAST.unpack(d)[0] * 1e-3 for d in frames]
        a, b, c, d, e, f = _FAST_SPEEDS.unpack(b"".join(frames))
        return [a * 1e-3, b * 1e-3, c * 1e-3, d * 1e-3, e * 1e-3, f * 1e-3]

    @property
    def current_a(self) -> list[float]:
        """Six motor currents, A; NaN before the first frame of a joint."""
        return [
            math.nan if d is None else _FAST.unpack(d)[1] * 1e-3 for d in _fast_of(self._newest)
        ]

    @property
    def motor_rad(self) -> list[float]:
        """Six motor positions, rad; NaN before the first frame of a joint."""
        return [
            math.nan if d is None else _FAST.unpack(d)[2] * 1e-3 for d in _fast_of(self._newest)
        ]

    @property
    def t_gripper_ns(self) -> int:
        """Stamp of the newest gripper frame; 0: never."""
        return self._t_ns[codec.ID_GRIPPER_FEEDBACK]

    @property
    def t_fast_ns(self) -> tuple[int, ...]:
        """Stamps of the six motor_fast frames (0x251 to 0x256); 0: never."""
        stamps: tuple[int, ...] = _fast_of(self._t_ns)
        return stamps

    @property
    def t_received_ns(self) -> int:
        """Stamp of the oldest part of the position, joints and gripper; 0 before it is whole."""
        if self.joint_rad is None or self.gripper_um is None:
            return 0
        return min(self.t_pose_ns, self._t_ns[codec.ID_GRIPPER_FEEDBACK])

    @property
    def t_oldest_ns(self) -> int:
        """Stamp of what has not been heard for longest of what comes by itself; 0: never."""
        return min(self.t_pose_ns, *(self._t_ns[can_id] for can_id in _JUDGED_IDS))

    def missing(self) -> list[str]:
        """Return what the arm should report and has not yet, in words."""
        gaps = []
        if self.mode < 0:
            gaps.append("status (0x2A1)")
        if self.joint_rad is None:
            gaps.append("joint angles (0x2A5 to 0x2A7)")
        if self.gripper_um is None:
            gaps.append("gripper (0x2A8)")
        slow_ns = _slow_of(self._t_ns)
        gaps += [f"joint {j + 1} driver (0x26{j + 1})" for j in range(N) if not slow_ns[j]]
        return gaps

    def silence(self, now_ns: int) -> str | None:
        """Return what has been silent for too long at ``now_ns``, in words, or None."""
        stamps = self._t_ns
        slow_ns = _slow_of(stamps)
        for what, t_ns in (
            ("joint angles", self.t_pose_ns),
            ("gripper", stamps[codec.ID_GRIPPER_FEEDBACK]),
            ("status", stamps[codec.ID_STATUS]),
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
            if now_ns - min(self.t_pose_ns, *self._t_ns.values()) <= SILENCE_NS:
                return None  # nothing at all is silent, as at nearly every tick
            text = self.silence(now_ns)
        return None if text is None else f"{self.name}: {text}"

    @property
    def caution(self) -> str | None:
        """What the arm complains about and may stop to by itself, as one line, or None."""
        return None if self._passing is None else f"{self.name}: {self._passing}"
