"""A fake PiPER that judges whoever commands it: the arm's own view of what is safe.

The program under test cannot flatter itself here. Every frame is measured at the far end of the
bus, by the time at which it was sent, with limits that come from the arm's geometry and not from
the limiter.
"""

from __future__ import annotations

import struct
from collections import deque
from dataclasses import dataclass

from gwp_edge.drivers import piper_codec as codec
from gwp_edge.drivers import piper_model
from gwp_edge.drivers.piper_fake import FakePiper, Faults

# Targets are rounded to 0.001 degree: a difference is off by at most one, a second one by two.
_ROUNDING_MDEG = 1.01
_MEASURED_FOR_NS = 400_000_000
_REST_TICKS, _MAX_TICKS = 6, 10
_TEACH_GRACE_NS = 300_000_000
_MAX_VIOLATIONS = 20
_STILL_MDEG_S = 100.0
_LATE_NS = 50_000_000
# Judged by their content, or questions.
_HARMLESS = frozenset(
    (
        codec.ID_MODE,
        codec.ID_ENABLE,
        codec.ID_QUERY_LIMIT,
        codec.ID_QUERY_PARAMETER,
        codec.ID_FIRMWARE,
    )
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Testimony:
    """What the arm has seen.

    Attributes:
        n_commands: frames of joint targets.
        violations: the first unsafe ones, in words.
        n_violations: of all.
        worst_speed: fastest command over the speed limit, 1 at the limit.
        worst_acceleration: likewise; rounding alone reaches a few tenths.
        t_moved_ns: when the last command was sent that changed a target.
        t_command_ns: when the last command was sent.
        t_late_ns: when this arm itself last took up to speak after a pause: its process was kept
            from running, and what followed is not the commander's fault.
        is_still: no joint moves.
    """

    n_commands: int
    violations: tuple[str, ...]
    n_violations: int
    worst_speed: float
    worst_acceleration: float
    t_moved_ns: int
    t_command_ns: int
    t_late_ns: int
    is_still: bool


@dataclass(slots=True)
class _Stream:
    """A joint's stream of targets, 0.001 degree; speeds per tick."""

    q: float | None = None
    speed: float = 0.0
    n_ticks: int = 1
    pace: float = 0.0  # of what was accused last: the stream may go on at it, or from rest
    t_ns: int = 0


class WitnessPiper(FakePiper):
    """A fake PiPER that judges every command. Threads: one owner.

    A target is safe when it continues the stream of targets within position, speed and
    acceleration limits, or when it is a pose that the arm itself reported a moment ago: that is
    how bring-up and the guardian hold it.
    """

    def __init__(self, *, period_s: float = 0.005) -> None:
        super().__init__()
        limits = piper_model.joint_limits(1)
        scale = 1.0 / codec.RAD_PER_MDEG
        self._period_ns = period_s * 1e9
        self._low = [float(v) * scale - _ROUNDING_MDEG for v in limits.position_min]
        self._high = [float(v) * scale + _ROUNDING_MDEG for v in limits.position_max]
        self._speed = [float(v) * scale * period_s for v in limits.velocity_max]
        self._step = [float(v) * scale * period_s**2 for v in limits.acceleration_max]
        self._streams = [_Stream() for _ in range(codec.N_JOINTS)]
        self._reported: deque[tuple[int, list[int]]] = deque(maxlen=256)
        self._t_teach_ns: int | None = None
        self._violations: list[str] = []
        self._n_violations = self._n_commands = 0
        self._worst_speed = self._worst_acceleration = 0.0
        self._t_moved_ns = self._t_command_ns = 0
        self._t_step_ns = self._t_late_ns = 0
        self._command_times: deque[int] = deque(maxlen=600)

    def hear(self, can_id: int, data: bytes, t_sent_ns: int = 0) -> None:
        """Judge one frame, then take it."""
        if len(data) == 8 and not self.faults.silent:
            self._judge(can_id, data, t_sent_ns)
        super().hear(can_id, data, t_sent_ns)

    def _judge(self, can_id: int, data: bytes, t_ns: int) -> None:
        if codec.ID_JOINTS_12 <= can_id <= codec.ID_JOINTS_56:
            self._n_commands += 1
            self._t_command_ns = t_ns
            self._command_times.append(t_ns)
            if self._t_teach_ns is not None and t_ns - self._t_teach_ns > _TEACH_GRACE_NS:
                self._accuse("joint targets go on in teach mode")
            first = 2 * (can_id - codec.ID_JOINTS_12)
            for j, q in enumerate(struct.unpack(">ii", data), first):
                self._judge_joint(j, q, t_ns)
        elif can_id == codec.ID_MOTION:
            self._accuse(f"0x150 with {data[0]}: the arm is stopped or dropped")
        elif can_id == codec.ID_ENABLE and data[1] != 2:
            self._accuse(f"motor {data[0]} is switched off")
        elif can_id == codec.ID_MODE and data[:4] != bytes((1, 1, data[2], 0)):
            self._accuse(f"mode {data[:4].hex()} is not the one of position control")
        elif can_id == codec.ID_GRIPPER:
            stroke_um, effort_mnm, code, zero = struct.unpack(">iHBB", data)
            if not (0 <= stroke_um <= 70_000 and effort_mnm <= 2000 and code == 1 and zero == 0):
                self._accuse(f"gripper command {data.hex()} is outside of its range")
        elif can_id not in _HARMLESS:
            self._accuse(f"frame 0x{can_id:03X} changes the arm")

    def _judge_joint(self, j: int, q: int, t_ns: int) -> None:
        joint = self._streams[j]
        before, after_ns = joint.q, t_ns - joint.t_ns
        joint.q, joint.t_ns = float(q), t_ns
        if before is not None and q != before:
            self._t_moved_ns = t_ns
        n_late = max(1, round(after_ns / self._period_ns))
        if before is not None and self._goes_on(j, q - before, n_late, joint):
            if not self._low[j] <= q <= self._high[j] and not self._was_reported(j, q, t_ns):
                self._accuse(f"joint {j + 1} to {q / 1e3:.1f} deg, beyond its limit")
            return
        joint.speed, joint.n_ticks = 0.0, 1
        if not self._was_reported(j, q, t_ns):
            pace = 0.0 if before is None else (q - before) / n_late
            joint.pace = pace if abs(pace) <= self._speed[j] else 0.0  # a fault is one accusation
            came = "nothing" if before is None else f"{before / 1e3:.3f} deg"
            self._accuse(
                f"joint {j + 1} to {q / 1e3:.3f} deg from {came} after {after_ns / 1e6:.1f} ms: "
                "too far, too fast or too sudden"
            )

    def _goes_on(self, j: int, way: float, n_late: int, joint: _Stream) -> bool:
        """Whether a target ``way`` on continues the stream, or begins anew after a pause."""
        pace, joint.pace = joint.pace, 0.0
        if n_late <= _MAX_TICKS:
            if self._continues(j, way, n_late, joint):
                return True
            if pace:
                joint.speed, joint.n_ticks = pace, 1
                if self._continues(j, way, n_late, joint):
                    return True
        if n_late < _REST_TICKS:
            return False
        # The arm has stopped at the last target meanwhile.
        joint.speed, joint.n_ticks = 0.0, 1
        return self._continues(j, way, 1, joint)

    def _continues(self, j: int, way: float, n_late: int, joint: _Stream) -> bool:
        """Whether a target ``way`` on keeps speed and acceleration, in 1 to ``n_late`` ticks.

        Ticks whose frames were lost count; a late tick alone is still one tick of motion.
        """
        for n in range(1, n_late + 1):
            speed = way / n
            # Mean speeds of two stretches belong to their middles.
            allowed = self._step[j] * (n + joint.n_ticks) / 2.0
            change = abs(speed - joint.speed) - 2 * _ROUNDING_MDEG
            if abs(way) <= self._speed[j] * n + _ROUNDING_MDEG and change <= allowed:
                joint.speed, joint.n_ticks = speed, n
                self._worst_speed = max(self._worst_speed, abs(speed) / self._speed[j])
                self._worst_acceleration = max(self._worst_acceleration, change / allowed)
                return True
        return False

    def _was_reported(self, j: int, q: int, t_ns: int) -> bool:
        return any(q == pose[j] and t_ns - t < _MEASURED_FOR_NS for t, pose in self._reported)

    def _accuse(self, text: str) -> None:
        self._n_violations += 1
        if len(self._violations) < _MAX_VIOLATIONS:
            self._violations.append(text)

    def step(self, now_ns: int) -> list[tuple[int, bytes, int]]:
        """Live up to ``now_ns`` and remember what was reported."""
        if self._t_step_ns and now_ns - self._t_step_ns > _LATE_NS:
            self._t_late_ns = now_ns
        self._t_step_ns = now_ns
        frames = super().step(now_ns)
        parts: dict[int, tuple[int, int]] = {}
        for can_id, data, t_ns in frames:
            if can_id in codec.ID_JOINT_FEEDBACK:
                parts[can_id] = struct.unpack(">ii", data)
                if len(parts) == len(codec.ID_JOINT_FEEDBACK):
                    pose = [q for part in codec.ID_JOINT_FEEDBACK for q in parts[part]]
                    self._reported.append((t_ns, pose))
                    parts.clear()
        if self.mode != codec.MODE_TEACH:
            self._t_teach_ns = None
        elif self._t_teach_ns is None:
            self._t_teach_ns = now_ns
        return frames

    def first_command_since(self, t_ns: int) -> int:
        """Return when the first joint frame after ``t_ns`` was sent, of the last 600; 0 if none."""
        return next((t for t in self._command_times if t > t_ns), 0)

    def testify(self) -> Testimony:
        """Return what was seen up to now."""
        return Testimony(
            n_commands=self._n_commands,
            violations=tuple(self._violations),
            n_violations=self._n_violations,
            worst_speed=self._worst_speed,
            worst_acceleration=self._worst_acceleration,
            t_moved_ns=self._t_moved_ns,
            t_command_ns=self._t_command_ns,
            t_late_ns=self._t_late_ns,
            is_still=all(abs(v) < _STILL_MDEG_S for v in self.speed_mdeg_s),
        )

    def mend(self) -> None:
        """Do what a person would: clear what is wrong, leave teach mode; the arm stays powered."""
        self.faults = Faults()
        self.arm_status = 0
        if self.mode == codec.MODE_TEACH:
            self.mode = codec.MODE_STANDBY
