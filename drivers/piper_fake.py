"""A PiPER that is not there: its protocol, its state machine, slow joints, and faults on demand.

It stands in for hardware in tests and trials; the vendor's piper-sdk can enable, read and move it.
What the real controller does was taken from the SDK's documents and public reports, so an
agreement with this fake says nothing about a real arm beyond the bytes on the bus.
``FakePiper`` is pure: frames and time in, frames out. ``piper_fake_bus`` puts it on a bus.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass, field

import numpy as np

from gwp_edge.drivers import piper_codec as codec
from gwp_edge.drivers.piper_feedback import CAN_ERR_FLAG, ERR_BUS_OFF
from gwp_edge.drivers.piper_model import end_pose

N = codec.N_JOINTS
_NS_PER_S = 1_000_000_000
_DEG = 1000  # in 0.001 degree
_FIRMWARE_FRAMES = 11

# Rest pose, 0.001 degree: folded, within every limit.
REST_MDEG = (0, 10 * _DEG, -20 * _DEG, 0, 15 * _DEG, 0)
_STATUS_OVER_LIMIT = 4
_MDEG_PER_DDEG = 100
_LIMITS_DDEG = ((1500, -1500), (1800, 0), (0, -1700), (1000, -1000), (700, -700), (1200, -1200))


@dataclass(kw_only=True)
class Faults:
    """What goes wrong; every field may be changed while the arm runs.

    Attributes:
        silent: sends nothing and hears nothing, as with the power off.
        mute_ids: these frames are not sent.
        drop_every: of the joint feedback every n-th frame is lost; 0 for none.
        arm_status: byte 1 of the status frame, or None for the true one.
        mode: byte 0 of the status frame, or None for the true one.
        over_limit: bits that byte 6 of the status frame has beside the true ones.
        joint_silent: byte 7 of the status frame.
        driver_bits: joint number to extra bits of its driver status.
        gripper_bits: extra bits of the gripper status.
        stuck: joints that do not move.
        no_enable: joints that ignore the enable command.
        drift_mdeg: joint number to an error of its reported angle, 0.001 degree.
        limits: joint number to (max, min) in 0.1 degree that it answers and stops at.
        gripper_unset: the stroke was never set: parameter 0, feedback stuck at 0.
        no_answers: ignores questions.
        leader: silent but for joint commands, as a leader arm that is moved.
    """

    silent: bool = False
    mute_ids: frozenset[int] = frozenset()
    drop_every: int = 0
    arm_status: int | None = None
    mode: int | None = None
    over_limit: int = 0
    joint_silent: int = 0
    driver_bits: dict[int, int] = field(default_factory=dict)
    gripper_bits: int = 0
    stuck: frozenset[int] = frozenset()
    no_enable: frozenset[int] = frozenset()
    drift_mdeg: dict[int, int] = field(default_factory=dict)
    limits: dict[int, tuple[int, int]] = field(default_factory=dict)
    gripper_unset: bool = False
    no_answers: bool = False
    leader: bool = False


class FakePiper:
    """The arm itself: ``hear`` commands, ``step`` time. Threads: one owner.

    Attributes:
        faults: what goes wrong.
        joint_mdeg: true angles, 0.001 degree.
        heard: how often each identifier was heard.
        forbidden: MIT, 0xAD and reset frames that were heard; a driver must send none.
    """

    def __init__(
        self,
        *,
        firmware: str = "S-V1.8-8",
        fast_hz: int = 200,
        slow_hz: int = 40,
        joint_mdeg: tuple[int, ...] = REST_MDEG,
        needs_two_enables: bool = False,
    ) -> None:
        self.faults = Faults()
        self.firmware = firmware
        self.joint_mdeg = [float(q) for q in joint_mdeg]
        self.speed_mdeg_s = [0.0] * N
        self.target_mdeg = list(self.joint_mdeg)
        self.gripper_um = 20_000.0
        self.gripper_target_um = 20_000.0
        self.gripper_enabled = False
        self.gripper_max_mm = 70
        self.enabled = [False] * N
        self.mode = codec.MODE_STANDBY
        self.move_mode = 0
        self.arm_status = 0
        self.speed_percent = 100
        self.heard: dict[int, int] = {}
        self.forbidden: list[codec.Frame] = []
        self._enables_needed = [2 if needs_two_enables else 1] * N
        self._replies: list[codec.Frame] = []
        self._errors: list[codec.Frame] = []
        self._fast_period_ns = _NS_PER_S // fast_hz
        self._slow_every = max(1, fast_hz // slow_hz)
        self._t_next_ns: int | None = None
        self._n_steps = 0
        self._n_joint_frames = 0
        self.reports_end_pose = True
        self._end_pose: list[codec.Frame] = []
        self._end_pose_mdeg: list[int] = []

    # --- commands -------------------------------------------------------------------------

    def hear(self, can_id: int, data: bytes, t_sent_ns: int = 0) -> None:
        """Take one frame from the bus; ``t_sent_ns`` is for those who judge the sender."""
        if self.faults.silent or can_id & CAN_ERR_FLAG or len(data) != 8:
            return
        self.heard[can_id] = self.heard.get(can_id, 0) + 1
        if 0x15A <= can_id <= 0x15F:
            self.forbidden.append((can_id, data))
        elif can_id == codec.ID_MODE:
            self._hear_mode(data)
        elif codec.ID_JOINTS_12 <= can_id <= codec.ID_JOINTS_56:
            if self._follows():
                j = 2 * (can_id - codec.ID_JOINTS_12)
                self.target_mdeg[j : j + 2] = struct.unpack(">ii", data)
        elif can_id == codec.ID_GRIPPER:
            self._hear_gripper(data)
        elif can_id == codec.ID_ENABLE:
            self._hear_enable(data[0], data[1])
        elif can_id == codec.ID_MOTION:
            self._hear_stop(data)
        elif not self.faults.no_answers:
            self._hear_question(can_id, data)

    def _follows(self) -> bool:
        return self.mode == codec.MODE_CAN and self.move_mode == codec.MOVE_J and not self.frozen

    @property
    def frozen(self) -> bool:
        """Whether a status such as e-stop or collision keeps the arm from following."""
        status = self.arm_status if self.faults.arm_status is None else self.faults.arm_status
        return status not in (0, 2, 3, 4)

    def _limits_ddeg(self, j: int) -> tuple[int, int]:
        """Return (max, min) of joint j + 1, 0.1 degree, as 0x473 answers them."""
        return self.faults.limits.get(j + 1, _LIMITS_DDEG[j])

    def _limits_mdeg(self, j: int) -> tuple[int, int]:
        high_ddeg, low_ddeg = self._limits_ddeg(j)
        return low_ddeg * _MDEG_PER_DDEG, high_ddeg * _MDEG_PER_DDEG

    def _within_limits(self, j: int, angle_mdeg: float) -> float:
        low_mdeg, high_mdeg = self._limits_mdeg(j)
        return min(max(angle_mdeg, low_mdeg), high_mdeg)

    @property
    def over_limit(self) -> int:
        """Bit j is set while joint j + 1 is commanded beyond its limit."""
        if not self._follows():
            return 0
        return sum(
            1 << j
            for j, target in enumerate(self.target_mdeg)
            if self.enabled[j] and self._within_limits(j, target) != target
        )

    def _hear_mode(self, data: bytes) -> None:
        if data[3] == 0xAD or data[1] in (4, 6):
            self.forbidden.append((codec.ID_MODE, data))
            return
        # Out of teach and linkage only a reset leads; an e-stop keeps what it is.
        if self.mode in (codec.MODE_STANDBY, codec.MODE_CAN) and not self.frozen:
            if data[0] == codec.MODE_CAN and self.mode != codec.MODE_CAN:
                self.target_mdeg = list(self.joint_mdeg)
            self.mode, self.move_mode, self.speed_percent = data[0], data[1], data[2]

    def _hear_gripper(self, data: bytes) -> None:
        stroke_um, _effort, code, zero = struct.unpack(">iHBB", data)
        self.gripper_enabled = code in (codec.GRIPPER_ENABLE, codec.GRIPPER_ENABLE_CLEAR)
        if zero == 0xAE and not self.gripper_enabled:
            self.gripper_um = 0.0
        elif self.gripper_enabled:
            self.gripper_target_um = min(max(stroke_um, 0), self.gripper_max_mm * 1000)

    def _hear_enable(self, motor: int, flag: int) -> None:
        joints = range(N) if motor in (7, 0xFF) else [motor - 1] if 1 <= motor <= N else []
        for j in joints:
            if flag == 1:
                self.enabled[j] = False
            elif flag == 2 and j + 1 not in self.faults.no_enable:
                self._enables_needed[j] -= 1
                if self._enables_needed[j] <= 0 and not self.enabled[j]:
                    self.enabled[j] = True
                    self.target_mdeg[j] = self.joint_mdeg[j]
        if motor in (7, 0xFF):
            self.gripper_enabled = flag == 2
        self._replies.append((codec.ID_ACKNOWLEDGE, bytes((0x71, 0, 0, 0, 0, 0, 0, 0))))

    def _hear_stop(self, data: bytes) -> None:
        if data[0] == 1:
            self.arm_status = 1
        elif data[0] == 2:
            self.forbidden.append((codec.ID_MOTION, data))
            self.arm_status, self.mode, self.move_mode = 0, codec.MODE_STANDBY, 0
            self.enabled = [False] * N
            self._enables_needed = [2] * N

    def _hear_question(self, can_id: int, data: bytes) -> None:
        joint, content = data[0], data[1]
        if can_id == codec.ID_QUERY_LIMIT and 1 <= joint <= N:
            if content == codec.QUERY_LIMIT:
                answer = struct.pack(">BhhHx", joint, *self._limits_ddeg(joint - 1), 300)
                self._replies.append((codec.ID_LIMIT, answer))
            elif content == codec.QUERY_ACCELERATION:
                self._replies.append((codec.ID_ACCELERATION, struct.pack(">BH5x", joint, 500)))
        elif can_id == codec.ID_FIRMWARE:
            text = b"H-V1.2-1".ljust(60, b"\0") + self.firmware.encode().ljust(8, b"\0") + b"250826"
            text = text.ljust(8 * _FIRMWARE_FRAMES, b"\0")
            self._replies += [(codec.ID_FIRMWARE, text[i : i + 8]) for i in range(0, len(text), 8)]
        elif can_id == codec.ID_QUERY_PARAMETER and data[0] == codec.PARAMETER_GRIPPER:
            stroke = 0 if self.faults.gripper_unset else self.gripper_max_mm
            self._replies.append((codec.ID_GRIPPER_PARAMETER, bytes((100, stroke, 1, *bytes(5)))))
        elif can_id == codec.ID_SET_GRIPPER_PARAMETER:
            self.gripper_max_mm = data[1]

    def press_teach(self) -> None:
        """Press the teach button: the arm leaves CAN control and goes limp to be dragged."""
        self.mode = codec.MODE_TEACH

    def bus_off(self) -> None:
        """Make the host's controller report bus-off at the next step."""
        self.error_frame(ERR_BUS_OFF)

    def error_frame(self, classes: int) -> None:
        """Make the host's controller report an error frame of ``classes`` at the next step."""
        self._errors.append((classes | CAN_ERR_FLAG, bytes(8)))

    # --- time -----------------------------------------------------------------------------

    def step(self, now_ns: int) -> list[tuple[int, bytes, int]]:
        """Advance to ``now_ns``; return the frames that the arm sent since, with their times."""
        out: list[tuple[int, bytes, int]] = []
        if self._t_next_ns is None or now_ns - self._t_next_ns > 50 * self._fast_period_ns:
            self._t_next_ns = now_ns  # the host slept: no flood of old frames
        while self._t_next_ns <= now_ns:
            self._move(self._fast_period_ns / _NS_PER_S)
            out += [(can_id, data, self._t_next_ns) for can_id, data in self._speak()]
            self._n_steps += 1
            self._t_next_ns += self._fast_period_ns
        errors, self._errors = self._errors, []
        out += [(can_id, data, now_ns) for can_id, data in errors]
        if not self.faults.silent and not self.faults.leader:
            out += [(can_id, data, now_ns) for can_id, data in self._replies]
        self._replies.clear()
        return out

    def _move(self, dt_s: float) -> None:
        follows = self._follows()
        top = 171_887.0 * self.speed_percent / 100  # 3 rad/s
        most = 286_479.0  # 5 rad/s^2
        stopped = self.arm_status == 1
        for j in range(N):
            here = self.joint_mdeg[j]
            if not self.enabled[j]:
                goal, fastest = float(REST_MDEG[j]), 60_000.0  # limp: it falls to rest
            elif stopped:
                goal, fastest = float(REST_MDEG[j]), 10_000.0  # damped descent
            else:
                goal = self._within_limits(j, self.target_mdeg[j]) if follows else here
                fastest = top
            if j + 1 in self.faults.stuck:
                self.speed_mdeg_s[j] = 0.0
                continue
            gap = goal - here
            # Lag of 50 ms, slower when it would have to brake harder than it can.
            wish = min(abs(gap) / 0.05, 0.9 * math.sqrt(2 * most * abs(gap)), fastest)
            change = math.copysign(wish, gap) - self.speed_mdeg_s[j]
            self.speed_mdeg_s[j] += max(-most * dt_s, min(most * dt_s, change))
            self.joint_mdeg[j] = self._stopped_at_limit(j, here + self.speed_mdeg_s[j] * dt_s)
        if self.gripper_enabled and follows:
            most_um = 250_000.0 * dt_s
            gap = self.gripper_target_um - self.gripper_um
            self.gripper_um += max(-most_um, min(most_um, gap))

    def _pushes(self, j: int) -> bool:
        """Whether joint j + 1 is kept from its target and tries."""
        gap_mdeg = abs(self.target_mdeg[j] - self.joint_mdeg[j])
        return j + 1 in self.faults.stuck and self.enabled[j] and gap_mdeg > 1000

    def _stopped_at_limit(self, j: int, there_mdeg: float) -> float:
        """Return where joint j + 1 gets to: one that is out of its limits already goes inwards."""
        low_mdeg, high_mdeg = self._limits_mdeg(j)
        here_mdeg = self.joint_mdeg[j]
        stop_mdeg = min(max(there_mdeg, min(low_mdeg, here_mdeg)), max(high_mdeg, here_mdeg))
        if stop_mdeg != there_mdeg:
            self.speed_mdeg_s[j] = 0.0
        return stop_mdeg

    def _speak(self) -> list[codec.Frame]:
        faults = self.faults
        if faults.silent:
            return []
        if faults.leader:
            return list(codec.encode_joints([round(q) for q in self.joint_mdeg]))
        frames = [self._status(), *self._joints(), self._gripper()]
        if self.reports_end_pose:
            frames[1:1] = self._pose()
        for j in range(N):
            fast = struct.pack(
                ">hhi",
                round(self.speed_mdeg_s[j] * codec.RAD_PER_MDEG * 1000),
                2500 if self._pushes(j) else 250,  # mA
                round(self.joint_mdeg[j] * codec.RAD_PER_MDEG * 1000),
            )
            frames.append((codec.ID_MOTOR_FAST[j], fast))
        if self._n_steps % self._slow_every == 0:
            frames += [self._slow(j) for j in range(N)]
        return [frame for frame in frames if frame[0] not in faults.mute_ids]

    def _status(self) -> codec.Frame:
        faults = self.faults
        moving = any(abs(v) > 100 for v in self.speed_mdeg_s)
        over_limit = self.over_limit
        status = self.arm_status or (_STATUS_OVER_LIMIT if over_limit else 0)
        return codec.ID_STATUS, bytes(
            (
                self.mode if faults.mode is None else faults.mode,
                status if faults.arm_status is None else faults.arm_status,
                self.move_mode,
                0,
                int(moving),
                0,
                faults.over_limit | over_limit,
                faults.joint_silent,
            )
        )

    def _pose(self) -> list[codec.Frame]:
        """Return the end pose, of the true angles; a resting arm's is not computed again."""
        q = [round(angle) for angle in self.joint_mdeg]
        if q != self._end_pose_mdeg:
            x, y, z, *turns = end_pose(np.array(q) * codec.RAD_PER_MDEG)
            values = [*(codec.m_to_um(v) for v in (x, y, z)), *codec.rad_to_mdeg(*turns)]
            self._end_pose = [
                (can_id, struct.pack(">ii", *values[2 * k : 2 * k + 2]))
                for k, can_id in enumerate(codec.ID_POSE_FEEDBACK)
            ]
            self._end_pose_mdeg = q
        return self._end_pose

    def _joints(self) -> list[codec.Frame]:
        q = [
            round(angle) + self.faults.drift_mdeg.get(j + 1, 0)
            for j, angle in enumerate(self.joint_mdeg)
        ]
        frames = []
        for k, can_id in enumerate(codec.ID_JOINT_FEEDBACK):
            self._n_joint_frames += 1
            if self.faults.drop_every and self._n_joint_frames % self.faults.drop_every == 0:
                continue
            frames.append((can_id, struct.pack(">ii", q[2 * k], q[2 * k + 1])))
        return frames

    def _gripper(self) -> codec.Frame:
        stroke_um = 0 if self.faults.gripper_unset else round(self.gripper_um)
        status = (0x40 if self.gripper_enabled else 0) | 0x80 | self.faults.gripper_bits
        return codec.ID_GRIPPER_FEEDBACK, struct.pack(">ihBB", stroke_um, 0, status, 0)

    def _slow(self, j: int) -> codec.Frame:
        status = (0x40 if self.enabled[j] else 0) | self.faults.driver_bits.get(j + 1, 0)
        return codec.ID_MOTOR_SLOW[j], struct.pack(">HhbBH", 240, 35, 33, status, 300)
