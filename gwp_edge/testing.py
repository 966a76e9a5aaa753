"""Stand-ins for tests and examples: a clock to wind by hand, an arm in memory, scripted policies.

They keep the protocols' promises and are tested by the same contract suites as the real ones.
"""

from __future__ import annotations

import math
import os
import time
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt

from gwp_edge.chunking import Guidance
from gwp_edge.errors import DeviceError, SafetyFault, SpecError
from gwp_edge.spec import (
    CameraView,
    CanvasSpec,
    Channel,
    NetworkSpec,
    PolicySpec,
    SamplerSpec,
    Statistics,
)
from gwp_edge.telemetry import StageTimes
from gwp_edge.types import (
    ArmState,
    Chunk,
    Float32Array,
    FloatArray,
    JointLimits,
    Observation,
)

Script = Literal["sine", "still", "jump", "far", "nan", "crash", "exit", "wait"]
_MS_NS = 1_000_000


class FakeClock:
    """A clock that moves only when told to. Threads: one owner."""

    def __init__(self, now_ns: int = 1_000_000_000) -> None:
        self._now_ns = now_ns

    def now_ns(self) -> int:
        """Return the time, ns."""
        return self._now_ns

    def sleep_until_ns(self, t_ns: int) -> None:
        """Be at ``t_ns``, or stay where it is past."""
        self._now_ns = max(self._now_ns, t_ns)

    def advance(self, duration_ns: int) -> None:
        """Move on by ``duration_ns``."""
        self._now_ns += duration_ns


class FakeArm:
    """An arm in memory that reaches every target at once. Threads: one owner.

    Attributes:
        sent: every command, in order.
        failure: raised by ``state`` and ``send`` while set.
        send_failure: raised by ``send`` alone while set.
        fault: reported in the state while set.
        caution, drifted: likewise.
        follows: whether commands move the arm.
        feedback_age_ns: how old the state claims to be.
    """

    def __init__(
        self, channels: tuple[Channel, ...], limits: JointLimits, clock: FakeClock
    ) -> None:
        self._channels = channels
        self._limits = limits
        self._clock = clock
        self._is_open = self._enabled = False
        self._pose = [(limits.position_min + limits.position_max) / 2.0]
        self.sent: list[FloatArray] = []
        self.failure: Exception | None = None
        self.send_failure: Exception | None = None
        self.fault: str | None = None
        self.caution: str | None = None
        self.drifted = False
        self.follows = True
        self.feedback_age_ns = 0

    @property
    def position(self) -> FloatArray:
        """Where the arm is, (D,), rad and m."""
        return self._pose[0]

    @position.setter
    def position(self, value: FloatArray) -> None:
        self._pose[0] = value

    def follow(self, other: FakeArm) -> None:
        """Be another connection to the same robot."""
        self._pose = other._pose

    @property
    def channels(self) -> tuple[Channel, ...]:
        """The D channels."""
        return self._channels

    @property
    def limits(self) -> JointLimits:
        """As given."""
        return self._limits

    def open(self, *, enable: bool) -> None:
        """Open it.

        Raises:
            DeviceError: it is open already.
        """
        if self._is_open:
            raise DeviceError("the fake arm is open already; close it first")
        self._is_open, self._enabled = True, enable

    def state(self) -> ArmState:
        """Return the state of this moment."""
        self._check_open()
        if self.failure is not None:
            raise self.failure
        return ArmState(
            position=self.position,
            velocity=np.full(len(self._channels), np.nan),
            t_received_ns=self._clock.now_ns() - self.feedback_age_ns,
            enabled=self._enabled,
            fault=self.fault,
            caution=self.caution,
            drifted=self.drifted,
        )

    def send(self, position: FloatArray) -> None:
        """Go there at once.

        Raises:
            DeviceError: not open or not enabled.
            SafetyFault: not finite or of another shape; nothing was sent.
        """
        self._check_open()
        if not self._enabled:
            raise DeviceError("the fake arm is open for reading only: open it with enable")
        for failure in (self.failure, self.send_failure):
            if failure is not None:
                raise failure
        target = np.array(position, np.float64)
        if target.shape != (len(self._channels),) or not np.isfinite(target).all():
            raise SafetyFault(f"command {position} does not fit; nothing was sent")
        self.sent.append(target)
        if self.follows:
            self.position = target

    def hold(self) -> None:
        """Command the measured pose."""
        self._check_open()
        self.sent.append(self.position)

    def close(self) -> None:
        """Close it; safe to call twice."""
        self._is_open = self._enabled = False

    def _check_open(self) -> None:
        if not self._is_open:
            raise DeviceError("the fake arm is not open; call open first")


class ScriptedPolicy:
    """A policy that follows a script instead of a network. Threads: one owner.

    Scripts: ``sine`` swings every channel about the first pose; ``still`` stays there; ``jump``
    is a sine whose centre jumps with every chunk; ``far`` plans a pose beyond all limits;
    ``nan``, ``crash`` (an exception), ``exit`` (the process vanishes) and ``wait`` (never
    answers) are a sine until ``after_n`` chunks were made.
    """

    def __init__(
        self,
        spec: PolicySpec,
        *,
        script: Script = "sine",
        amplitude: float = 0.1,
        swing_s: float = 2.0,
        latency_s: float = 0.02,
        after_n: int = 0,
    ) -> None:
        self._spec = spec
        self._script = script
        self._amplitude = amplitude
        self._swing_s = swing_s
        self._latency_s = latency_s
        self._after_n = after_n
        self._n = 0
        self._centre: FloatArray | None = None
        self._t0_ns = 0

    @property
    def spec(self) -> PolicySpec:
        """As given."""
        return self._spec

    @property
    def timing(self) -> StageTimes:
        """The whole latency as one denoising step."""
        return StageTimes(
            preprocess_ns=0,
            vision_ns=0,
            prefill_ns=0,
            denoise_ns=(round(self._latency_s * 1e9),),
            postprocess_ns=0,
        )

    def predict(
        self,
        observation: Observation,
        *,
        noise: Float32Array | None = None,
        previous: Chunk | None = None,
        guidance: Guidance | None = None,
    ) -> Chunk:
        """Return the next chunk of the script."""
        spec = self._spec
        time.sleep(self._latency_s)
        if self._centre is None:
            self._centre, self._t0_ns = observation.state, observation.t_observed_ns
        t_s = (
            observation.t_observed_ns
            - self._t0_ns
            + spec.period_ns * np.arange(spec.n_rows, dtype=np.int64)
        ) / 1e9
        # Begins and ends its swing at rest, so that following it needs no jump.
        swing = 0.5 * self._amplitude * (1.0 - np.cos(2 * math.pi * t_s / self._swing_s))
        scale = np.array([1.0 if c.unit == "rad" else 0.1 for c in spec.channels])
        actions = self._centre + swing[:, None] * scale
        self._n += 1
        if self._script == "still":
            actions = np.broadcast_to(self._centre, actions.shape)
        elif self._script == "jump":
            actions = actions + 0.2 * (self._n % 2) * scale
        elif self._n > self._after_n:
            actions = self._misbehave(actions)
        return Chunk(
            actions=actions,
            t_observed_ns=observation.t_observed_ns,
            period_ns=spec.period_ns,
            chunk_idx=self._n - 1,
        )

    def _misbehave(self, actions: FloatArray) -> FloatArray:
        if self._script == "nan":
            return np.full_like(actions, np.nan)
        if self._script == "far":
            return actions + 100.0
        if self._script == "crash":
            raise RuntimeError("scripted crash")
        if self._script == "exit":
            os._exit(3)
        if self._script == "wait":
            time.sleep(3600.0)
        return actions

    def check_golden(self) -> None:
        """There is no golden output; a script cannot be wrong about itself."""

    def close(self) -> None:
        """Nothing to free."""


def create_scripted_policy(**kwargs: object) -> ScriptedPolicy:
    """Make a ``ScriptedPolicy``, by the name ``gwp_edge.testing:create_scripted_policy``."""
    return ScriptedPolicy(**kwargs)  # type: ignore[arg-type]


def make_spec(
    n_arms: int = 1, *, n_rows: int = 48, cameras: tuple[str, ...] = ("cam_high",)
) -> PolicySpec:
    """Return the spec of a policy for one or two PiPER arms, about the pose of a ready arm."""
    if n_arms not in (1, 2):
        raise SpecError(f"expected 1 or 2 arms, got {n_arms}")
    sides = ("left",) if n_arms == 1 else ("left", "right")
    names = [f"{side}_joint_{j + 1}" for side in sides for j in range(6)]
    channels = tuple(Channel(name=name, unit="rad", kind="delta") for name in names)
    per_side = [
        (*channels[6 * i : 6 * i + 6], Channel(name=f"{side}_gripper", unit="m", kind="absolute"))
        for i, side in enumerate(sides)
    ]
    middle = (0.0, 1.0, -1.0, 0.0, 0.3, 0.0, 0.03) * n_arms
    low = tuple(m - (0.5 if i % 7 < 6 else 0.03) for i, m in enumerate(middle))
    high = tuple(m + (0.5 if i % 7 < 6 else 0.03) for i, m in enumerate(middle))
    side_px = 32
    return PolicySpec(
        network=NetworkSpec(
            family="gwp-0.5",
            n_layers=1,
            n_heads=1,
            head_dim=8,
            visual_dim=8,
            action_dim=8,
            visual_ffn_dim=8,
            action_ffn_dim=8,
            n_action_channels=14,
            n_text_rows=1,
            latent_channels=48,
            freq_dim=8,
            text_dim=8,
            eps=1e-6,
        ),
        sampler=SamplerSpec(
            shift=1.0, sigmas=(1.0, 0.5, 0.0), timesteps=(1000.0, 500.0), rounding="exact"
        ),
        canvas=CanvasSpec(
            width_px=side_px * len(cameras),
            height_px=side_px,
            views=tuple(
                CameraView(camera=c, x_px=side_px * i, y_px=0, width_px=side_px, height_px=side_px)
                for i, c in enumerate(cameras)
            ),
        ),
        channels=tuple(c for side in per_side for c in side),
        statistics=Statistics(state_q01=low, state_q99=high, action_q01=low, action_q99=high),
        n_rows=n_rows,
        period_ns=33_333_333,
        tasks=("test",),
        embodiment=0,
    )


def read_commands(path: Path | str, n_channels: int) -> tuple[npt.NDArray[np.int64], FloatArray]:
    """Return times (n,) and commands (n, D) from a command log of the kinematic robot.

    A row that was cut by a kill in the middle of its write is left out.
    """
    dtype = np.dtype([("t_ns", np.int64), ("position", np.float64, (n_channels,))])
    data = Path(path).read_bytes() if Path(path).exists() else b""
    rows = np.frombuffer(data[: len(data) // dtype.itemsize * dtype.itemsize], dtype)
    return rows["t_ns"].copy(), rows["position"].copy()
