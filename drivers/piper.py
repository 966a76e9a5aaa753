"""One or two AgileX PiPER arms behind the ``Arm`` protocol.

The channels are, per arm, six joints and a gripper; of two arms the left one comes first. Each arm
has its own CAN adapter. Tested here against a fake arm and the vendor's SDK; not yet run on
hardware.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from struct import Struct
from typing import Any

import numpy as np

from gwp_edge.clock import MonotonicClock
from gwp_edge.drivers.piper_feedback import ALL_ENABLED
from gwp_edge.drivers.piper_link import CodecLink, PiperLink
from gwp_edge.drivers.piper_options import PiperOptions, parse_options
from gwp_edge.drivers.piper_unit import N_CHANNELS, PiperUnit
from gwp_edge.errors import DeviceError, DeviceTimeoutError, SafetyFault, SpecError
from gwp_edge.protocols import Arm, Clock
from gwp_edge.spec import Channel, PolicySpec
from gwp_edge.types import ArmState, FloatArray, JointLimits, frozen_array

logger = logging.getLogger(__name__)

LinkOpener = Callable[[str], PiperLink]


class PiperArm:
    """One or more PiPER arms as one robot. Threads: one owner."""

    def __init__(
        self,
        channels: Sequence[Channel],
        options: PiperOptions,
        *,
        clock: Clock | None = None,
        open_link: LinkOpener | None = None,
    ) -> None:
        """Describe the robot; nothing is opened.

        Args:
            channels: seven per arm: six in rad, one in m.
            options: how to reach the arms.
            clock: to wait by; the machine's by default.
            open_link: opens a channel; by default what ``options.driver`` says.

        Raises:
            SpecError: the channels are not those of so many arms.
        """
        _check_channels(channels, len(options.arms))
        self._channels = tuple(channels)
        self._pack = Struct(f"{2 * len(channels)}d").pack
        self._clock: Clock = MonotonicClock() if clock is None else clock
        opener = _default_opener(options) if open_link is None else open_link
        self._units = tuple(
            PiperUnit(
                name,
                options=options,
                clock=self._clock,
                open_link=lambda can=can: opener(can),  # type: ignore[misc]
            )
            for name, can in options.arms
        )

    @property
    def channels(self) -> tuple[Channel, ...]:
        """The channels, left arm first."""
        return self._channels

    @property
    def units(self) -> tuple[PiperUnit, ...]:
        """The arms, left first: firmware, counters and raw feedback for reports."""
        return self._units

    @property
    def limits(self) -> JointLimits:
        """Limits with their margin.

        Raises:
            DeviceError: not open yet.
        """
        parts = []
        for unit in self._units:
            if unit.limits is None:
                raise DeviceError(f"{unit.name}: limits are known after open")
            parts.append(unit.limits)
        return JointLimits(
            position_min=np.concatenate([p.position_min for p in parts]),
            position_max=np.concatenate([p.position_max for p in parts]),
            velocity_max=np.concatenate([p.velocity_max for p in parts]),
            acceleration_max=np.concatenate([p.acceleration_max for p in parts]),
        )

    @property
    def current_a(self) -> FloatArray:
        """Newest motor currents, shape (D,), A; NaN for grippers and before the first frame."""
        values = [a for u in self._units for a in (*u.feedback.current_a, math.nan)]
        return frozen_array(values, np.float64)

    def open(self, *, enable: bool) -> None:
        """Connect and check every arm; with ``enable`` power them only when all are well.

        Raises:
            DeviceError: not there, not ready, or in a state that needs a person; says which.
        """
        self.close()
        try:
            for unit in self._units:
                unit.connect()
            if enable:
                for unit in self._units:
                    unit.check_ready()
                for unit in self._units:
                    unit.enable()
            for unit in self._units:
                unit.settle()
        except BaseException:
            self.close()
            raise

    def state(self) -> ArmState:
        """Return the newest measured state without blocking.

        Raises:
            DeviceError: a bus is off or gone.
        """
        now_ns = self._clock.now_ns()
        _each([(unit.poll, now_ns) for unit in self._units])
        position: list[float] = []
        velocity: list[float] = []
        faults: list[str] = []
        cautions: list[str] = []
        t_received_ns, enabled, drifted = now_ns, True, False
        for unit in self._units:
            feedback = unit.feedback
            if feedback.joint_rad is None or feedback.gripper_um is None:
                raise DeviceError(f"{unit.name} is not open: call open first")
            position += feedback.joint_rad
            position.append(feedback.gripper_um * 1e-6)
            velocity += feedback.velocity_rad_s
            velocity.append(math.nan)
            if feedback.t_received_ns < t_received_ns:
                t_received_ns = feedback.t_received_ns
            enabled = enabled and feedback.enabled_mask == ALL_ENABLED
            drifted = drifted or unit.drifted or unit.doubtful
            if (fault := feedback.fault(now_ns)) is not None:
                faults.append(fault)
            if (caution := feedback.caution) is not None:
                cautions.append(caution)
        # Of bytes, an array is read-only from the start, and it takes half as long as of a list.
        arrays = np.frombuffer(self._pack(*position, *velocity))
        n = len(self._channels)
        return ArmState(
            position=arrays[:n],
            velocity=arrays[n:],
            t_received_ns=t_received_ns,
            enabled=enabled,
            fault="; ".join(faults) or None,
            caution="; ".join(cautions) or None,
            drifted=drifted,
        )

    def send(self, position: FloatArray) -> None:
        """Send one command to every arm; all are checked before the first frame goes out.

        An arm that fails does not keep the others from their command.

        Raises:
            DeviceTimeoutError: an arm's transmit queue is full; this tick was dropped.
            DeviceError: an arm must not be commanded any more, or cannot.
            SafetyFault: not finite, or it does not fit; nothing was sent.
        """
        if position.shape != (len(self._channels),):
            raise SafetyFault(
                f"PiPER command: expected shape ({len(self._channels)},), got {position.shape}; "
                "nothing was sent"
            )
        targets: list[float] = position.tolist()
        commands = [
            unit.prepare(targets[i * N_CHANNELS : (i + 1) * N_CHANNELS])
            for i, unit in enumerate(self._units)
        ]
        _each([(u.send, command) for u, command in zip(self._units, commands, strict=True)])

    def hold(self) -> None:
        """Command every arm the pose that it had at the first call; works without ``enable``.

        An arm that is not under CAN control is left alone, and so is every gripper, so that
        nothing is dropped.

        Raises:
            DeviceError: an arm could not be held; the others were.
        """
        _each([(unit.hold,) for unit in self._units])

    def close(self) -> None:
        """Disconnect; the arms hold their last target. Safe to call twice. Never cuts power."""
        for unit in self._units:
            unit.close()


def _each(calls: Iterable[tuple[Any, ...]]) -> None:
    """Make every call, so that one arm's failure does not cost the other; then raise the worst.

    Args:
        calls: a function and its arguments each.

    Raises:
        DeviceError: from an action; one that ends the run before one that does not.
    """
    failure: DeviceError | None = None
    for action, *arguments in calls:
        try:
            action(*arguments)
        except DeviceError as e:  # noqa: PERF203 - the next arm's turn comes all the same
            if failure is None or isinstance(failure, DeviceTimeoutError):
                failure = e
    if failure is not None:
        raise failure


def _check_channels(channels: Sequence[Channel], n_arms: int) -> None:
    expected = ("rad",) * 6 + ("m",)
    units = tuple(c.unit for c in channels)
    if units != expected * n_arms:
        raise SpecError(
            f"{n_arms} PiPER arm(s) have {N_CHANNELS * n_arms} channels, each arm six in rad and "
            f"one in m; the policy has {len(channels)}: {', '.join(units)}"
        )


def _default_opener(options: PiperOptions) -> LinkOpener:
    if options.driver == "piper-sdk":
        from gwp_edge.drivers.piper_sdk_backend import SdkLink

        return SdkLink.open
    return CodecLink.open


def create_arm(options: Mapping[str, object], spec: PolicySpec) -> Arm:
    """Return the arms that ``options`` describe, with the channels of ``spec``; opens nothing.

    Raises:
        SpecError: the options or the channels do not fit.
    """
    return PiperArm(spec.channels, parse_options(options))
