"""One or two AgileX PiPER arms behind the ``Arm`` protocol.

The channels are, per arm, six joints and a gripper; of two arms the left one comes first. Each arm
has its own CAN adapter. Tested here against a fake arm and the vendor's SDK; not yet run on
hardware.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from gwp_edge.clock import MonotonicClock
from gwp_edge.drivers.piper_core import encode_arms, read_arms
from gwp_edge.drivers.piper_feedback import ALL_ENABLED, SILENCE_NS
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
        self._effort_mnm = round(options.gripper_effort_nm * 1000)
        self._ranges = b""
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
        self._stores = tuple(unit.feedback for unit in self._units)
        self._polls = tuple(unit.poll for unit in self._units)

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
            self._ranges = np.array([u.accepted for u in self._units], np.float64).tobytes()
        except BaseException:
            self.close()
            raise

    def state(self) -> ArmState:
        """Return the newest measured state without blocking.

        Raises:
            DeviceError: a bus is off or gone.
        """
        now_ns = self._clock.now_ns()
        _each(self._polls, now_ns)
        whole = read_arms(self._stores)
        if whole is None:
            name = next(u.name for u in self._units if read_arms((u.feedback,)) is None)
            raise DeviceError(f"{name} is not open: call open first")
        position, velocity, t_received_ns, t_oldest_ns = whole
        is_silent = now_ns - t_oldest_ns > SILENCE_NS  # something is; which matters to its arm
        enabled, drifted = True, False
        fault: str | None = None
        caution: str | None = None
        for unit in self._units:
            feedback = unit.feedback
            enabled = enabled and feedback.enabled_mask == ALL_ENABLED
            drifted = drifted or unit.drifted or unit.doubtful
            if is_silent or feedback.latched is not None:
                fault = _joined(fault, feedback.fault(now_ns))
            if feedback.passing is not None:
                caution = _joined(caution, feedback.caution)
        return ArmState._make(
            (
                np.frombuffer(position),  # read-only, as bytes are
                np.frombuffer(velocity),
                t_received_ns if t_received_ns < now_ns else now_ns,
                enabled,
                fault,
                caution,
                drifted,
            )
        )

    def send(self, position: FloatArray) -> None:
        """Send one command to every arm; all are checked before the first frame goes out.

        An arm that fails does not keep the others from their command.

        Raises:
            DeviceTimeoutError: an arm's transmit queue is full; this tick was dropped.
            DeviceError: an arm must not be commanded any more, or cannot.
            SafetyFault: not finite, or it does not fit; nothing was sent.
        """
        if not self._ranges:
            name = next((u.name for u in self._units if not u.accepted), self._units[0].name)
            raise DeviceError(f"{name} is not open: call open first")
        targets: list[float] = position.tolist()
        try:
            commands = encode_arms(targets, self._ranges, self._effort_mnm)
        except (TypeError, ValueError):
            raise SafetyFault(
                f"PiPER command: expected shape ({len(self._channels)},), got {position.shape}; "
                "nothing was sent"
            ) from None
        if commands is None:
            raise self._refusal(targets)
        now_ns = self._clock.now_ns()
        failures: list[DeviceError] = []
        for unit, command in zip(self._units, commands):  # noqa: B905 - encode_arms has counted
            try:
                unit.send(command, now_ns)
            except DeviceError as e:  # noqa: PERF203 - the next arm's turn comes all the same
                failures.append(e)
        if failures:
            raise _worst(failures)

    def _refusal(self, targets: Sequence[float]) -> SafetyFault:
        """Return what is wrong with targets of which one is not accepted."""
        try:
            for i, unit in enumerate(self._units):
                unit.check(targets[i * N_CHANNELS : (i + 1) * N_CHANNELS])
        except SafetyFault as e:
            return e
        return SafetyFault(f"PiPER command: {targets} does not fit its frames; nothing was sent")

    def hold(self) -> None:
        """Command every arm the pose that it had at the first call; works without ``enable``.

        An arm that is not under CAN control is left alone, and so is every gripper, so that
        nothing is dropped.

        Raises:
            DeviceError: an arm could not be held; the others were.
        """
        now_ns = self._clock.now_ns()
        _each([unit.hold for unit in self._units], now_ns)

    def close(self) -> None:
        """Disconnect; the arms hold their last target. Safe to call twice. Never cuts power."""
        for unit in self._units:
            unit.close()


def _joined(text: str | None, more: str | None) -> str | None:
    return more if text is None else text if more is None else f"{text}; {more}"


def _each(actions: Sequence[Callable[[int], None]], now_ns: int) -> None:
    """Do every arm's action, so that one arm's failure does not cost the other; then raise."""
    failures: list[DeviceError] = []
    for action in actions:
        try:
            action(now_ns)
        except DeviceError as e:  # noqa: PERF203 - the next arm's turn comes all the same
            failures.append(e)
    if failures:
        raise _worst(failures)


def _worst(failures: list[DeviceError]) -> DeviceError:
    """Take out the failure to raise: one that ends the run before one that does not.

    None stays in the list: the caller's frame, which the traceback keeps, would then keep the
    failure, and a motor loop does not collect such cycles.
    """
    worst = next((e for e in failures if not isinstance(e, DeviceTimeoutError)), failures[0])
    failures.clear()
    return worst


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
