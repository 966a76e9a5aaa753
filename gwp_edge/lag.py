"""How far an arm's joints trail their commands: a small sine on one joint, and the phase between.

Safe by construction: every command goes through the limiter, starts and ends at the measured pose
at rest, and whatever goes wrong ends with the arm told to stay where the last command was.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np

from gwp_edge.errors import DeviceError, DeviceTimeoutError, SafetyFault, SpecError
from gwp_edge.protocols import Arm
from gwp_edge.safety import Limiter
from gwp_edge.types import FloatArray, JointLimits
from gwp_edge.workspace import ArmInBox

_PERIOD_S = 0.005
_STALE_NS = 200_000_000
_SETTLE_S = 1.0
_FOLLOWED_SHARE = 0.2
_MIN_FIT = 0.9


@dataclass(frozen=True, slots=True, kw_only=True)
class LagOptions:
    """The sine.

    Attributes:
        amplitude: rad or m; the joint swings this far to either side.
        frequency_hz: low enough that the arm follows.
        n_swings: measured after one swing that is faded in.
    """

    amplitude: float = 0.03
    frequency_hz: float = 0.5
    n_swings: int = 4

    def __post_init__(self) -> None:
        for name, low, high in (
            ("amplitude", 1e-3, 0.1),
            ("frequency_hz", 0.1, 3.0),
            ("n_swings", 1, 20),
        ):
            value = getattr(self, name)
            if not low <= value <= high:
                raise SpecError(f"lag: {name} must be {low} to {high}, got {value}")


@dataclass(frozen=True, slots=True, kw_only=True)
class LagResult:
    """What was found.

    Attributes:
        channel: its name.
        lag_ms: feedback behind command; what ``run --lead-ms`` takes.
        gain: feedback's amplitude over the command's.
        fit: share of the feedback's motion that is the sine, 0 to 1.
        n_samples: feedback values used.
    """

    channel: str
    lag_ms: float
    gain: float
    fit: float
    n_samples: int

    def to_dict(self) -> dict[str, object]:
        """Return it for JSON."""
        return asdict(self)


def measure_lag(
    arm: Arm,
    channel: int,
    limits: JointLimits,
    options: LagOptions,
    *,
    workspace: Sequence[ArmInBox] = (),
) -> LagResult:
    """Swing one joint of an enabled arm and return its lag; the arm ends where it began.

    When anything fails, or the caller is interrupted, it brakes and stays where it is.

    Args:
        arm: open with ``enable``.
        channel: which joint.
        limits: the robot's, (D,).
        options: the sine.
        workspace: boxes that the arms stay in.

    Raises:
        SpecError: there is no such channel, or no room for the sine.
        DeviceError: the arm failed, its feedback stopped, or it did not follow.
        SafetyFault: a command was refused.
    """
    if not 0 <= channel < len(arm.channels):
        raise SpecError(f"channel {channel}: the arm has channels 0 to {len(arm.channels) - 1}")
    start = np.array(arm.state().position)
    name = arm.channels[channel].name
    room = min(
        start[channel] - limits.position_min[channel], limits.position_max[channel] - start[channel]
    )
    if not room > 1.5 * options.amplitude:
        raise SpecError(
            f"{name} is {room:.3f} from its limit, a sine of {options.amplitude:g} needs half as "
            "much again; move the arm, or take another channel or a smaller amplitude"
        )
    limiter = Limiter(limits, period_s=_PERIOD_S, channels=arm.channels, workspace=workspace)
    limiter.seed(start)
    try:
        samples = _swing(arm, limiter, start, channel, options)
    except BaseException:
        # Whatever it was, going back to the start is one motion too many.
        _brake(arm, limiter)
        raise
    _come_to_rest(arm, limiter, start)
    return _evaluate(name, samples, options)


def _swing(
    arm: Arm, limiter: Limiter, start: FloatArray, channel: int, options: LagOptions
) -> FloatArray:
    """Return rows (command time, command, feedback time, feedback), s, relative to the start."""
    omega = 2.0 * math.pi * options.frequency_hz
    fade_s = 1.0 / options.frequency_hz
    n_ticks = round((options.n_swings + 1) * fade_s / _PERIOD_S)
    rows: list[tuple[float, float, float, float]] = []
    t0_ns = time.monotonic_ns()
    target = start.copy()
    for i in range(n_ticks):
        t_s = i * _PERIOD_S
        time.sleep(max(0.0, t_s - (time.monotonic_ns() - t0_ns) / 1e9))
        now_ns = time.monotonic_ns()
        state = arm.state()
        if state.fault is not None or state.caution is not None:
            raise DeviceError(state.fault or state.caution)
        if now_ns - state.t_received_ns > _STALE_NS:
            raise DeviceError("the arm's feedback stopped; the measurement was broken off")
        t_s = (now_ns - t0_ns) / 1e9
        target[channel] = start[channel] + options.amplitude * min(1.0, t_s / fade_s) * math.sin(
            omega * t_s
        )
        command = limiter.step(target)
        if limiter.rejected is not None:
            raise SafetyFault(f"lag: {limiter.rejected}")
        arm.send(command)
        rows.append(
            (
                t_s,
                float(command[channel] - start[channel]),
                (state.t_received_ns - t0_ns) / 1e9,
                float(state.position[channel] - start[channel]),
            )
        )
    return np.array(rows)


def _brake(arm: Arm, limiter: Limiter) -> None:
    """Decelerate within the limits and stay there, as far as the arm still takes commands."""
    with contextlib.suppress(DeviceError):
        while not limiter.standing:
            command = limiter.brake()
            with contextlib.suppress(DeviceTimeoutError):  # the next one may get through
                arm.send(command)
            time.sleep(_PERIOD_S)


def _come_to_rest(arm: Arm, limiter: Limiter, start: FloatArray) -> None:
    """Go back to the start at the limiter's pace and stay."""
    limiter.set_speed_limit(0.1, 0.02)
    deadline_s = time.monotonic() + _SETTLE_S
    while time.monotonic() < deadline_s:
        command = limiter.step(start)
        arm.send(command)
        if limiter.standing and np.array_equal(command, start):
            return
        time.sleep(_PERIOD_S)


def _evaluate(name: str, samples: FloatArray, options: LagOptions) -> LagResult:
    omega = 2.0 * math.pi * options.frequency_hz
    steady = samples[samples[:, 0] >= 1.0 / options.frequency_hz]
    # The same state is read again until there is a new one; it counts once.
    fresh = steady[np.flatnonzero(np.diff(steady[:, 2], prepend=-1.0) > 0.0)]
    if len(fresh) < 20:
        raise DeviceError(f"{name}: {len(fresh)} new states in the whole measurement; too few")
    command, _ = _fit(steady[:, 0], steady[:, 1], omega)
    feedback, fit = _fit(fresh[:, 2], fresh[:, 3], omega)
    gain = abs(feedback) / abs(command)
    if gain < _FOLLOWED_SHARE or fit < _MIN_FIT:
        raise DeviceError(
            f"{name} does not follow the sine (gain {gain:.2f}, fit {fit:.2f}); is it blocked? "
            "A larger amplitude helps against friction"
        )
    # Phases wrap at half a swing; a joint that trails by more follows nothing.
    lag_rad = (float(np.angle(command) - np.angle(feedback)) + math.pi) % (2 * math.pi) - math.pi
    return LagResult(
        channel=name, lag_ms=1e3 * lag_rad / omega, gain=gain, fit=fit, n_samples=len(fresh)
    )


def _fit(t_s: FloatArray, values: FloatArray, omega: float) -> tuple[complex, float]:
    """Return the sine in ``values`` as a complex amplitude, and its share of the variance."""
    basis = np.stack([np.cos(omega * t_s), np.sin(omega * t_s), np.ones_like(t_s)], axis=1)
    (a, b, c), *_ = np.linalg.lstsq(basis, values, rcond=None)
    rest = values - basis @ np.array([a, b, c])
    variance = float(values.var())
    fit = 1.0 - float(rest.var()) / variance if variance > 0.0 else 0.0
    return complex(a, -b), fit
