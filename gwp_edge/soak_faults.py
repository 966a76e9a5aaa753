"""What goes wrong in a soak: every fault with its injection, its repair and what must follow."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final, Literal

import numpy as np

from gwp_edge.drivers.disturbed import (
    CAMERA_BYTE,
    CAMERA_FROZEN,
    CAMERA_GONE,
    CAMERA_GOOD,
    Switch,
)
from gwp_edge.drivers.piper_fake_bus import FakeProcess
from gwp_edge.drivers.piper_feedback import ERR_NO_ACK, ERR_PROTOCOL
from gwp_edge.operator_input import Key
from gwp_edge.status import HoldReason
from gwp_edge.testing import ScriptedPolicy, make_spec
from gwp_edge.types import Chunk, FloatArray, Observation

N_ARMS: Final = 2
_POLICY_BYTE: Final = 1
_GOOD, _NAN, _HANG, _RAISE, _EXIT, _FAR, _NAN_ONCE = range(7)
_AMPLITUDE: Final = 0.35
_SWING_S: Final = 4.0
_NEAR_RAD, _LOST_RAD = 0.03, 0.25


class SoakPolicy(ScriptedPolicy):
    """Swings every joint about one pose, and misbehaves as its switch says.

    Where the arm is elsewhere it asks for that pose first, as a policy plans from what it sees.
    Threads: one owner.
    """

    def __init__(self, switch: str) -> None:
        super().__init__(make_spec(N_ARMS), latency_s=0.02)
        self._switch = Switch(switch)
        low, high = self.spec.statistics.state_q01, self.spec.statistics.state_q99
        self._middle = (np.array(low) + np.array(high)) / 2.0
        is_rad = np.array([c.unit == "rad" for c in self.spec.channels])
        self._swing = np.where(is_rad, _AMPLITUDE, 0.0)
        self._t_begin_ns: int | None = None

    def predict(self, observation: Observation, **_: object) -> Chunk:
        """Return the next plan, if the switch allows."""
        while self._switch[_POLICY_BYTE] == _HANG:
            time.sleep(0.01)
        chunk = super().predict(observation)
        how = self._switch[_POLICY_BYTE]
        if how == _RAISE:
            raise RuntimeError("the soak's policy was told to fail")
        if how == _EXIT:
            os._exit(3)
        if how == _NAN_ONCE:
            self._switch[_POLICY_BYTE] = _GOOD
        actions = self._plan(observation, chunk)
        if how in (_NAN, _NAN_ONCE):
            actions[-1, 3] = np.nan
        elif how == _FAR:
            actions = actions + 100.0
        return Chunk(
            actions=actions,
            t_observed_ns=chunk.t_observed_ns,
            period_ns=chunk.period_ns,
            chunk_idx=chunk.chunk_idx,
        )

    def _plan(self, observation: Observation, chunk: Chunk) -> FloatArray:
        rows_ns = chunk.t_observed_ns + chunk.period_ns * np.arange(len(chunk.actions))
        pose = self._middle
        if self._t_begin_ns is not None:
            since_s = (rows_ns - self._t_begin_ns) / 1e9
            swing = np.minimum(since_s / _SWING_S, 1.0) * np.sin(2 * np.pi * since_s / _SWING_S)
            pose = self._middle + swing[:, None] * self._swing
        away = np.abs(observation.state - np.atleast_2d(pose)[0])[self._swing > 0.0].max()
        if self._t_begin_ns is None and away < _NEAR_RAD:
            self._t_begin_ns = chunk.t_observed_ns
        elif away > _LOST_RAD:
            self._t_begin_ns = None
        plan: FloatArray = np.array(np.broadcast_to(pose, chunk.actions.shape))
        return plan


def create_policy(*, switch: str) -> SoakPolicy:
    """Make the policy by the name ``gwp_edge.soak_faults:create_policy``."""
    return SoakPolicy(switch)


@dataclass(slots=True, kw_only=True)
class Rig:
    """What faults act on. Threads: one owner.

    Attributes:
        arms: the fake arms, left first.
        switch: of camera and policy.
        random: chooses the arm and the joint.
        pids: processes of the present run by name.
        key: an operator's key that waits to be pressed.
        arm: the arm that the present fault chose.
    """

    arms: tuple[FakeProcess, ...]
    switch: Switch
    random: random.Random
    pids: dict[str, int] = field(default_factory=dict)
    key: Key | None = None
    arm: FakeProcess | None = None

    def choose(self) -> FakeProcess:
        """Choose an arm for this fault."""
        self.arm = self.random.choice(self.arms)
        return self.arm

    def mend(self) -> None:
        """Make everything whole again, as a person would between two runs."""
        self.key = None
        self.switch[CAMERA_BYTE], self.switch[_POLICY_BYTE] = CAMERA_GOOD, _GOOD
        for arm in self.arms:
            arm.set_deaf(deaf=False)
            arm.call("mend")


After = Literal["goes on", "resumes", "operator", "end"]
Action = Callable[[Rig], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class SoakFault:
    """One kind of fault.

    Attributes:
        name: in reports.
        inject: makes it happen.
        undo: takes it away again; nothing to do where the run ends.
        after: ``goes on`` without a hold, ``resumes`` by itself once it is undone, waits for the
            ``operator``, or is the ``end`` of the run.
        deadline_s: from the injection until no command moves any more.
        reason: of the hold.
        outcomes: of the run that it ends.
    """

    name: str
    inject: Action
    undo: Action = lambda rig: None
    after: After
    deadline_s: float
    reason: HoldReason = HoldReason.NONE
    outcomes: tuple[str, ...] = ()


def _policy(value: int) -> Action:
    return lambda rig: rig.switch.__setitem__(_POLICY_BYTE, value)


def _camera(value: int) -> Action:
    return lambda rig: rig.switch.__setitem__(CAMERA_BYTE, value)


def _send_signal(process: str, number: int) -> Action:
    return lambda rig: os.kill(rig.pids[process], number)


def _faults(**settings: object) -> Action:
    return lambda rig: rig.choose().set_faults(**settings)


def _mend_arm(rig: Rig) -> None:
    if rig.arm is not None:
        rig.arm.call("mend")


def _stick(rig: Rig) -> None:
    rig.choose().set_faults(stuck=frozenset({rig.random.choice((1, 4, 6))}))


def _driver_bit(rig: Rig) -> None:
    bit = 1 << rig.random.choice((0, 1, 2, 3, 4, 5, 7))
    rig.choose().set_faults(driver_bits={rig.random.randint(1, 6): bit})


def _arm_status(rig: Rig) -> None:
    rig.choose().set_faults(arm_status=rig.random.choice((1, 5, 6, 7, 9, 10, 14, 15)))


def _press_hold(rig: Rig) -> None:
    rig.key = Key.HOLD


_STOP_S = 1.5  # brakes from full speed at full acceleration, with room for a busy machine
_PLAN_S = 1.6

FAULTS: Final[tuple[SoakFault, ...]] = (
    SoakFault(
        name="joint frames lost",
        inject=_faults(drop_every=7),
        undo=_mend_arm,
        after="goes on",
        deadline_s=0.0,
    ),
    SoakFault(
        name="error frame",
        inject=lambda rig: rig.choose().call("error_frame", ERR_NO_ACK | ERR_PROTOCOL),
        after="goes on",
        deadline_s=0.0,
    ),
    SoakFault(name="one NaN plan", inject=_policy(_NAN_ONCE), after="goes on", deadline_s=0.0),
    SoakFault(
        name="camera freezes",
        inject=_camera(CAMERA_FROZEN),
        undo=_camera(CAMERA_GOOD),
        after="resumes",
        deadline_s=1.5 + _STOP_S,
        reason=HoldReason.CAMERA_STALL,
    ),
    SoakFault(
        name="policy hangs",
        inject=_policy(_HANG),
        undo=_policy(_GOOD),
        after="resumes",
        deadline_s=_PLAN_S + _STOP_S,
        reason=HoldReason.STALE_CHUNK,
    ),
    SoakFault(
        name="policy process stopped",
        inject=_send_signal("policy", signal.SIGSTOP),
        undo=_send_signal("policy", signal.SIGCONT),
        after="resumes",
        deadline_s=_PLAN_S + _STOP_S,
        reason=HoldReason.STALE_CHUNK,
    ),
    SoakFault(
        name="NaN plans",
        inject=_policy(_NAN),
        undo=_policy(_GOOD),
        after="operator",
        deadline_s=_PLAN_S + _STOP_S,
        reason=HoldReason.NOT_FINITE,
    ),
    SoakFault(
        name="absurd plans",
        inject=_policy(_FAR),
        undo=_policy(_GOOD),
        after="operator",
        deadline_s=_PLAN_S + _STOP_S,
        reason=HoldReason.REJECTED,
    ),
    SoakFault(
        name="stuck joint",
        inject=_stick,
        undo=_mend_arm,
        after="operator",
        deadline_s=_SWING_S + _STOP_S,
        reason=HoldReason.TRACKING,
    ),
    SoakFault(
        name="arm refuses target",
        inject=_faults(arm_status=4),
        undo=_mend_arm,
        after="operator",
        deadline_s=_STOP_S,
        reason=HoldReason.ARM,
    ),
    SoakFault(
        name="operator holds",
        inject=_press_hold,
        after="operator",
        deadline_s=_STOP_S,
        reason=HoldReason.OPERATOR,
    ),
    SoakFault(
        name="bus silent",
        inject=_faults(silent=True),
        after="end",
        deadline_s=0.1 + _STOP_S,
        outcomes=("fault",),
    ),
    SoakFault(
        name="bus-off",
        inject=lambda rig: rig.choose().call("bus_off"),
        after="end",
        deadline_s=_STOP_S,
        outcomes=("fault",),
    ),
    SoakFault(
        name="transmit queue full",
        inject=lambda rig: rig.choose().set_deaf(deaf=True),
        after="end",
        deadline_s=2.0 + _STOP_S,  # the socket takes some hundred frames first
        outcomes=("fault",),
    ),
    SoakFault(
        name="driver bit",
        inject=_driver_bit,
        after="end",
        deadline_s=_STOP_S,
        outcomes=("fault",),
    ),
    SoakFault(
        name="arm status",
        inject=_arm_status,
        after="end",
        deadline_s=_STOP_S,
        outcomes=("fault",),
    ),
    SoakFault(
        name="teach button",
        inject=lambda rig: rig.choose().call("press_teach"),
        after="end",
        deadline_s=_STOP_S,
        outcomes=("fault",),
    ),
    SoakFault(
        name="motor process killed",
        inject=_send_signal("motor", signal.SIGKILL),
        after="end",
        deadline_s=_STOP_S,
        outcomes=("crashed",),
    ),
    SoakFault(
        name="motor process stopped",
        inject=_send_signal("motor", signal.SIGSTOP),
        after="end",
        deadline_s=_STOP_S,
        outcomes=("fault", "crashed"),
    ),
    SoakFault(
        name="guardian killed",
        inject=_send_signal("guardian", signal.SIGKILL),
        after="end",
        deadline_s=_STOP_S,
        outcomes=("crashed",),
    ),
    SoakFault(
        name="policy process killed",
        inject=_send_signal("policy", signal.SIGKILL),
        after="end",
        deadline_s=_STOP_S,
        outcomes=("crashed",),
    ),
    SoakFault(
        name="policy raises",
        inject=_policy(_RAISE),
        after="end",
        deadline_s=_STOP_S,
        outcomes=("fault", "crashed"),
    ),
    SoakFault(
        name="policy exits",
        inject=_policy(_EXIT),
        after="end",
        deadline_s=_STOP_S,
        outcomes=("fault", "crashed"),
    ),
    SoakFault(
        name="camera gone",
        inject=_camera(CAMERA_GONE),
        after="end",
        deadline_s=_STOP_S,
        outcomes=("fault", "crashed"),
    ),
    SoakFault(
        name="Ctrl-C",
        inject=lambda rig: signal.raise_signal(signal.SIGINT),
        after="end",
        deadline_s=_STOP_S,
        outcomes=("interrupted",),
    ),
    SoakFault(
        name="external e-stop",
        inject=lambda rig: signal.raise_signal(signal.SIGUSR1),
        after="end",
        deadline_s=_STOP_S,
        outcomes=("estop",),
    ),
)
