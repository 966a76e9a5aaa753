"""One tick of the motor loop and its state machine.

No process, no sleeping and no real clock here: ``motor_process`` calls ``tick`` at every deadline.
Nothing but ``_send`` commands the arm, and what it sends has always gone through the limiter.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from gwp_edge.agreement import Agreement
from gwp_edge.arm_watch import ArmWatch, Need
from gwp_edge.errors import DeviceError, SafetyFault
from gwp_edge.mailbox import Board
from gwp_edge.motor_options import MotorOptions
from gwp_edge.plan_check import PlanCheck
from gwp_edge.pressure import Pressure
from gwp_edge.protocols import Arm, Clock
from gwp_edge.safety import Limiter
from gwp_edge.schedule import Acceptance, Schedule
from gwp_edge.sender import Sender
from gwp_edge.shared_memory import fence
from gwp_edge.status import EventKind, HoldReason, Mode, Request, Word
from gwp_edge.tick_log import TickLog
from gwp_edge.tracking import TrackingMonitor
from gwp_edge.types import ArmState, Chunk, FloatArray, JointLimits
from gwp_edge.workspace import ArmInBox

__all__ = ["MotorLoop", "MotorOptions"]

_REJECTED_IN_ROW = 20
_STANDING_TICKS = 3
_APPROACHED_RAD = np.deg2rad(2.0)
_APPROACHED_M = 0.005
_WARN_EVERY_NS = 1_000_000_000


class MotorLoop:
    """State machine, schedule and limiter of one enabled arm. Threads: one owner.

    Attributes:
        mode: where the state machine is.
        hold_reason: why, in HOLD.
    """

    def __init__(
        self,
        arm: Arm,
        board: Board,
        clock: Clock,
        options: MotorOptions,
        *,
        limits: JointLimits,
        park: FloatArray | None = None,
        workspace: Sequence[ArmInBox] = (),
    ) -> None:
        self._board = board
        self._words = board.words
        self._clock = clock
        self._options = options
        self._feedback = ArmWatch(arm, board, options)
        self._park = park
        channels = arm.channels
        self._limiter = Limiter(
            limits,
            period_s=options.period_ns / 1e9,
            channels=channels,
            refuse_far=options.refuse_far,
            workspace=workspace,
        )
        self._schedule = Schedule(
            limits, lead_ns=options.lead_ns, blend=options.blend, rebase=options.synchronous
        )
        self._tracking = TrackingMonitor(arm)
        self._pressure = Pressure(channels, period_ns=options.period_ns)
        self._is_rad = np.array([c.unit == "rad" for c in channels])
        self._approached = np.where(self._is_rad, _APPROACHED_RAD, _APPROACHED_M)
        self._ticks = TickLog(board, clock, self._limiter, self._schedule)
        self._say = board.events["motor"].say
        self.mode = Mode.ENABLED
        self.hold_reason = HoldReason.NONE
        self._pending: Chunk | None = None
        self._t_standing_ns = 0
        self._n_standing = 0
        self._plans = PlanCheck(board, self._limiter)
        self._n_rejected = 0
        self._agreement = Agreement(board, options)
        self._t_mode_ns = 0
        self._hold_text = ""
        self._braking = False
        self._stop_now_seen = False
        self._stop_wanted = self._parking_begun = False
        self._t_pause_said_ns = 0
        self._t_tick_ns = 0
        self._sender = Sender(
            arm, board, clock, period_ns=options.period_ns, dry_run=options.dry_run
        )

    def begin(self, state: ArmState) -> None:
        """Hold the measured pose from now on.

        Raises:
            SpecError: the measured pose is not usable.
        """
        self._limiter.seed(state.position)
        self._sender.begin(self._limiter.position)
        self._schedule.hold(self._limiter.position)
        # Before the mode: whoever sees that the arm is enabled finds a state of it.
        self._feedback.take(state)
        self._t_mode_ns = self._clock.now_ns()
        self._set_mode(Mode.ENABLED)

    def stop(self) -> None:
        """End the run as soon as the arm stands; for signals and a vanished supervisor."""
        self._stop_wanted = True

    def tick(self, t_planned_ns: int) -> bool:
        """Do one tick; return False when the loop is over and the arm stands.

        Args:
            t_planned_ns: the deadline that this tick belongs to.
        """
        now_ns = self._clock.now_ns()
        words = self._words
        words[Word.MOTOR_HEARTBEAT_NS] = now_ns
        if words[Word.GUARDIAN_TRIPPED_NS]:
            # Two hands on one arm are worse than one late one: the guardian keeps it.
            self._fault("the guardian holds the arm: the motor loop had stopped for too long")
            return False
        self._begin_tick(now_ns)
        self._read_state(now_ns)
        self._take_chunk(now_ns)
        self._follow_request(now_ns)
        command = self._next_command(now_ns)
        self._watch(command, now_ns)
        sent = self._send(command)
        self._ticks.write(
            t_planned_ns=t_planned_ns,
            t_woke_ns=now_ns,
            t_feedback_ns=self._feedback.t_received_ns,
            sent=sent,
            send_ns=self._sender.send_ns if sent else 0,
            mode=self.mode,
        )
        return not self._is_over()

    def emergency(self) -> bool:
        """Brake one tick without schedule or state machine; return False when standing."""
        now_ns = self._clock.now_ns()
        self._words[Word.MOTOR_HEARTBEAT_NS] = now_ns
        self._begin_tick(now_ns)
        moving = not self._limiter.standing
        self._send(self._limiter.brake())
        return moving

    def _begin_tick(self, now_ns: int) -> None:
        self._t_tick_ns = now_ns
        paused_ns = self._sender.paused_ns(now_ns)
        if paused_ns:
            # Going on at speed, or from a command that never left, would jerk the arm.
            self._limiter.rest(self._sender.last)
            self._see_pause(paused_ns, now_ns)

    def _see_pause(self, paused_ns: int, now_ns: int) -> None:
        is_moving = self.mode in (Mode.APPROACH, Mode.RUN, Mode.PARK)
        if (
            self._options.dry_run
            or not is_moving
            or now_ns - self._t_pause_said_ns <= _WARN_EVERY_NS
        ):
            return
        self._t_pause_said_ns = now_ns
        send_ns = self._sender.send_ns
        if send_ns > paused_ns // 2:
            why = f"the arm's driver took {send_ns / 1e6:.0f} ms to send one"
        else:
            why = "something held the motor loop up, the arm's driver or other programs"
        self._say(
            EventKind.WARNING,
            f"no command for {paused_ns / 1e6:.0f} ms, the arm goes on from rest: {why}",
        )

    # Inputs

    def _read_state(self, now_ns: int) -> None:
        for finding in self._feedback.read(now_ns):
            need, text = finding.need, finding.text
            if need is Need.HOLD_IF_MOVING:
                is_moving = self.mode in (Mode.APPROACH, Mode.RUN)
                need = Need.HOLD if is_moving else Need.WARNING
            if need is Need.FAULT:
                self._fault(text)
            elif need is Need.HOLD:
                self._hold(finding.reason, text, now_ns)
            else:
                self._say(EventKind.WARNING, text)

    def _take_chunk(self, now_ns: int) -> None:
        chunk = self._board.new_chunk()
        if chunk is None:
            return
        if self.mode in (Mode.PARK, Mode.FAULT):
            return
        is_moving = self.mode in (Mode.APPROACH, Mode.RUN)
        is_usable, hold = self._plans.judge(chunk, now_ns, moving=is_moving)
        if hold is not None:
            self._hold(*hold, now_ns)
        if not is_usable:
            return
        if not is_moving:
            self._pending = chunk
            return
        result = self._schedule.accept(chunk, now_ns, seam=self.mode is Mode.RUN)
        if result is not Acceptance.ACCEPTED:
            self._reject(chunk, result)
        elif self.mode is Mode.RUN and self._options.blend != "none" and any(self._limiter.flags):
            # The arm is not where the old plan had it: fade from where it is, or the target could
            # run away from the commands, fade by fade.
            self._schedule.reseam(now_ns, self._limiter.position, self._limiter.velocity)

    def _reject(self, chunk: Chunk, result: Acceptance) -> None:
        self._words[Word.MOTOR_N_REJECTED_CHUNKS] += 1
        if self._words[Word.MOTOR_N_REJECTED_CHUNKS] <= 10:
            self._say(EventKind.WARNING, f"chunk {chunk.chunk_idx} rejected: it is {result.value}")

    # State machine

    def _follow_request(self, now_ns: int) -> None:
        request = max(self._board.request, Request.STOP if self._stop_wanted else Request.CONNECT)
        if self.mode is Mode.FAULT:
            return
        if request < Request.PARK:
            is_awaited = self.mode is Mode.HOLD and not self.hold_reason.ends_by_itself
            in_vain = self._agreement.see(now_ns, awaited=is_awaited)
            if in_vain is not None:
                self._say(EventKind.WARNING, in_vain)
        if request is Request.STOP_NOW:
            if not self._stop_now_seen:
                self._stop_now_seen = self._braking = True
                self._pressure.reset()
            self._hold(HoldReason.STOP, "immediate hold", now_ns)
        elif request is Request.STOP or (request is Request.PARK and self._park is None):
            self._hold(HoldReason.STOP, "stopping", now_ns)
        elif request is Request.HOLD:
            self._hold(HoldReason.OPERATOR, "held by the operator", now_ns)
        elif self._is_unwatched(now_ns):
            text = "nobody watches keys, signals and time any more: the main process hangs"
            self._hold(HoldReason.UNWATCHED, text, now_ns)
        elif request is Request.PARK:
            self._follow_parking(now_ns)
        elif self._agreement.is_missing(now_ns, self.mode, self.hold_reason, self._t_mode_ns):
            why = "no usable plan came" if self.mode is Mode.ENABLED else self._hold_text
            self._hold(HoldReason.WAITED, f"{why}; enter goes on once that is over", now_ns)
        elif self._words[Word.POLICY_CAMERA_STALL]:
            if self.mode in (Mode.APPROACH, Mode.RUN):
                self._hold(HoldReason.CAMERA_STALL, "no usable camera frames", now_ns)
        elif request is Request.RUN:
            self._try_to_start(now_ns)
        self._advance_mode(now_ns)

    def _is_unwatched(self, now_ns: int) -> bool:
        t_alive_ns = self._words[Word.SUPERVISOR_HEARTBEAT_NS]
        return (
            self.mode in (Mode.APPROACH, Mode.RUN, Mode.PARK)
            and t_alive_ns > 0
            and now_ns - t_alive_ns > self._options.unwatched_ns
        )

    def _try_to_start(self, now_ns: int) -> None:
        """Begin an approach from ENABLED or a hold that may end, with a plan made since then."""
        if self.mode not in (Mode.ENABLED, Mode.HOLD) or self._n_standing < _STANDING_TICKS:
            return
        goes_on = self.hold_reason.ends_by_itself or self._agreement.is_given
        if self.mode is Mode.HOLD and not goes_on:
            return
        chunk = self._pending
        if chunk is None or chunk.t_observed_ns < self._t_standing_ns:
            return
        self._pending = None
        result = self._schedule.accept(chunk, now_ns, seam=False)
        if result is not Acceptance.ACCEPTED:
            self._reject(chunk, result)
            return
        self._agreement.use_up()
        self._limiter.set_speed_limit(self._options.approach_rad_s, self._options.approach_m_s)
        self._tracking.reset()
        self._set_mode(Mode.APPROACH)

    def _advance_mode(self, now_ns: int) -> None:
        if self.mode not in (Mode.APPROACH, Mode.RUN):
            return
        if self._schedule.ended(now_ns) and not self._options.synchronous:
            self._hold(HoldReason.STALE_CHUNK, "the plan is used up, no newer one came", now_ns)
        elif self.mode is Mode.APPROACH:
            target = self._limiter.clip(self._schedule.sample(now_ns))
            follows = self._limiter.position if self._options.dry_run else self._feedback.position
            # A gripper on an object never reaches its target, so its command counts.
            pose = np.where(self._is_rad, follows, self._limiter.position)
            if (np.abs(target - pose) < self._approached).all():
                self._schedule.reseam(now_ns, self._limiter.position, self._limiter.velocity)
                self._limiter.retarget()
                self._limiter.set_speed_limit(None)
                self._set_mode(Mode.RUN)

    def _follow_parking(self, now_ns: int) -> None:
        if self._park is not None and not self._parking_begun:
            self._parking_begun = True
            self._schedule.hold(self._park)
            self._limiter.retarget()
            self._limiter.set_speed_limit(self._options.approach_rad_s, self._options.approach_m_s)
            self._set_mode(Mode.PARK)
        elif self.mode is Mode.HOLD:
            # Something stopped the parking; trying again would fight it.
            self._hold(HoldReason.STOP, "not parked", now_ns)

    def _hold(self, reason: HoldReason, text: str, now_ns: int) -> None:
        if self.mode is Mode.FAULT:
            return
        if self.mode is Mode.HOLD:
            # A hold that ends by itself becomes one that does not, never the other way round.
            if not self.hold_reason.ends_by_itself and reason is not HoldReason.STOP:
                return
            if reason.ends_by_itself or reason is self.hold_reason:
                return
        else:
            self._schedule.stop(now_ns, self._limiter.position, self._limiter.velocity)
            self._limiter.retarget()
            self._pending = None
            self._hold_text = text
            if reason is not HoldReason.STOP:
                self._words[Word.MOTOR_N_HOLDS] += 1
        self.hold_reason = reason
        self._agreement.use_up()
        self._words[Word.MOTOR_HOLD_REASON] = int(reason)
        is_wanted = reason in (HoldReason.STOP, HoldReason.OPERATOR)
        self._say(EventKind.INFO if is_wanted else EventKind.WARNING, f"hold: {text}")
        self._set_mode(Mode.HOLD)

    def _fault(self, text: str) -> None:
        if self.mode is Mode.FAULT:
            return
        self._braking = True
        self._say(EventKind.ERROR, text)
        self._set_mode(Mode.FAULT)

    def _set_mode(self, mode: Mode) -> None:
        if mode is not self.mode:
            self._pressure.reset()
            self._t_mode_ns = self._clock.now_ns()
        self.mode = mode
        self._n_standing = 0
        if mode is not Mode.HOLD:
            self.hold_reason = HoldReason.NONE
            self._words[Word.MOTOR_HOLD_REASON] = 0
        fence()  # what was said about the change is there before it
        self._words[Word.MOTOR_MODE] = int(mode)

    def _is_over(self) -> bool:
        if self._n_standing < _STANDING_TICKS:
            return False
        if self.mode is Mode.PARK:
            return (
                self._park is not None
                and bool(np.abs(self._limiter.position - self._park).max() < 1e-6)
                and self._is_relieved()
            )
        # A fault is over when somebody asks for the end, so that it stays on view until then.
        wanted = self._stop_wanted or self._board.request >= Request.PARK
        stopped = self.mode is Mode.HOLD and self.hold_reason is HoldReason.STOP
        if not (stopped or (self.mode is Mode.FAULT and wanted)):
            return False
        # Before the process goes, whatever the arm presses on is let go.
        return self._is_relieved()

    # Outputs

    def _next_command(self, now_ns: int) -> FloatArray:
        limiter = self._limiter
        command = limiter.brake() if self._braking else limiter.step(self._schedule.sample(now_ns))
        if limiter.standing and (self._braking or not self._schedule.braking(now_ns)):
            self._n_standing += 1
            if self._n_standing == 1:
                self._t_standing_ns = now_ns
        else:
            self._n_standing = 0
        self._words[Word.MOTOR_STANDING] = int(self._n_standing > 0)
        self._words[Word.MOTOR_PLAN_ENDED] = int(self._schedule.ended(now_ns))
        return command

    def _watch(self, command: FloatArray, now_ns: int) -> None:
        limiter = self._limiter
        if limiter.rejected is not None:
            self._words[Word.MOTOR_N_REJECTED_TICKS] += 1
            self._n_rejected += 1
            if self._n_rejected >= _REJECTED_IN_ROW:
                self._hold(HoldReason.REJECTED, limiter.rejected, now_ns)
        else:
            self._n_rejected = 0
        if self._options.dry_run:
            return
        lost = self._tracking.check(command, self._feedback.position, now_ns)
        if lost is not None:
            self._hold(HoldReason.TRACKING, lost, now_ns)
        if self.mode in (Mode.HOLD, Mode.PARK, Mode.FAULT):
            self._relieve(command, now_ns)

    def _relieve(self, command: FloatArray, now_ns: int) -> None:
        """Once the command stands, take it back to where the arm is on joints that press."""
        pressure, measured = self._pressure, self._feedback.position
        if pressure.going and not self._feedback.trusted:
            pressure.going, self._braking = False, True  # it may be the wrong way
        back = pressure.check(
            command, measured, n_standing=self._n_standing, trusted=self._feedback.trusted
        )
        if back is None:
            return
        if self.mode is Mode.PARK:
            text = "the arm does not come to its park pose; something is in the way"
            self._hold(HoldReason.TRACKING, text, now_ns)
            return
        self._braking, self._n_standing = False, 0
        self._limiter.set_speed_limit(self._options.approach_rad_s, self._options.approach_m_s)
        self._schedule.hold(self._limiter.clip(back))
        degrees = np.rad2deg(np.abs(command - back).max())
        text = f"something keeps the arm {degrees:.0f} deg from its command, which goes back to it"
        self._say(EventKind.INFO, text)

    def _is_relieved(self) -> bool:
        """Whether the arm, standing, presses on nothing, or nothing more can be done about it."""
        return (
            self._options.dry_run
            or not self._feedback.trusted
            or self._pressure.is_relieved(self._limiter.position, self._feedback.position)
        )

    def _send(self, command: FloatArray) -> bool:
        # In a fault the brake goes out as long as it moves; then the line is left alone.
        is_at_rest = self._n_standing > _STANDING_TICKS and self._is_relieved()
        if self.mode is Mode.FAULT and is_at_rest:
            return False
        try:
            return self._sender.send(command, self._t_tick_ns)
        except (DeviceError, SafetyFault) as e:
            self._fault(str(e))
            return False
