"""The seams of the runtime: what a camera, an arm, an engine and a clock must do.

Each has a contract suite under tests/contract that every implementation passes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from gwp_edge.spec import Channel, PolicySpec
from gwp_edge.types import (
    ArmState,
    Chunk,
    Float32Array,
    FloatArray,
    Frame,
    ImageArray,
    JointLimits,
    Observation,
)

if TYPE_CHECKING:
    from gwp_edge.chunking import Guidance
    from gwp_edge.telemetry import StageTimes


class Clock(Protocol):
    """A monotonic clock. Threads: any."""

    def now_ns(self) -> int:
        """Return the time, ns."""
        ...

    def sleep_until_ns(self, t_ns: int) -> None:
        """Sleep until the absolute time ``t_ns``; return at once when it is past."""
        ...


class Camera(Protocol):
    """One camera. Threads: one owner, except that ``latest`` never blocks."""

    @property
    def name(self) -> str:
        """Role name as in the spec, such as ``cam_high``."""
        ...

    def open(self) -> None:
        """Start delivering frames.

        Raises:
            DeviceError: the camera is absent or refuses; says what to do.
        """
        ...

    def latest(self) -> Frame | None:
        """Return the newest frame without blocking, or None before the first one.

        Returning the same frame again is allowed; the caller judges its age.

        Raises:
            DeviceError: the camera has failed for good.
        """
        ...

    def close(self) -> None:
        """Stop; safe to call twice and after a failed ``open``."""
        ...


class Health(Protocol):
    """How a device has fared; ``str`` of it is one line."""

    @property
    def is_good(self) -> bool:
        """Whether nothing went wrong."""
        ...


@runtime_checkable
class HealthReporter(Protocol):
    """A camera that counts its own trouble; the run's summary then tells it."""

    @property
    def health(self) -> Health:
        """Up to now.

        Raises:
            DeviceError: not open.
        """
        ...


@runtime_checkable
class SlowArm(Protocol):
    """An arm that is read less often than every few ms; its feedback's age is judged by that."""

    @property
    def feedback_period_ns(self) -> int:
        """Time between two states at the arm's usual rate."""
        ...


@runtime_checkable
class CurrentArm(Protocol):
    """An arm that measures motor currents: an operator is told them where a joint lags."""

    @property
    def current_a(self) -> FloatArray:
        """Newest current of every channel's motor, shape (D,), A; NaN where there is none."""
        ...


class Arm(Protocol):
    """One robot as the motor loop sees it: D channels, one clock. Threads: one owner.

    The guardian process opens a second one of its own with ``enable`` false, reads ``state`` all
    the time, and calls ``hold`` when the motor process has died, and nothing else ever.
    """

    @property
    def channels(self) -> tuple[Channel, ...]:
        """The D channels in the order of every array."""
        ...

    @property
    def limits(self) -> JointLimits:
        """Limits that commands may use up; known after ``open``.

        Positions lie inside of the arm's own stops by a margin (``safety.with_margin``), so that
        a controller that stops at its own limit is never reached.
        """
        ...

    def open(self, *, enable: bool) -> None:
        """Connect, check, and with ``enable`` power the motors so that they hold the pose.

        Never moves: an enabled arm holds the pose that it measured. Without ``enable`` nothing is
        sent that changes the arm. The motor process opens it so for the checks, closes it, and
        opens it again with ``enable`` once every check has passed.

        Raises:
            DeviceError: not there, not ready, or in a state that needs a person; says which.
        """
        ...

    def state(self) -> ArmState:
        """Return the newest measured state without blocking.

        Raises:
            DeviceError: the connection has failed for good.
        """
        ...

    def send(self, position: FloatArray) -> None:
        """Send one command: absolute targets, shape (D,), rad and m.

        The caller has limited it; the driver still refuses what its protocol cannot carry.

        Raises:
            DeviceTimeoutError: this one command could not be sent (queue full) and was dropped;
                the caller goes on and gives up after five in a row.
            DeviceError: the command could not be sent, or the arm is in a state (somebody pressed
                teach) in which nothing must be sent; the caller stops.
            SafetyFault: the command is not finite or does not fit the protocol; nothing was sent.
        """
        ...

    def hold(self) -> None:
        """Command the measured pose: the guardian's only command.

        Works on a connection that was opened without ``enable``, changes no mode, and may be
        called again and again; the pose of the first call is kept, so that an arm that sags does
        not creep.

        Raises:
            DeviceError: there is no fresh feedback to hold, or it could not be sent.
        """
        ...

    def close(self) -> None:
        """Disconnect and leave the arm holding; safe to call twice. Never cuts power."""
        ...


class World(Protocol):
    """What a simulated robot's arm and cameras share. Threads: one owner, the supervisor."""

    def start(self) -> Mapping[str, object]:
        """Start it; return options to merge into those of the arm and of every camera.

        Raises:
            DeviceError: it cannot start; says what to do.
        """
        ...

    def check(self) -> None:
        """Return while it lives.

        Raises:
            DeviceError: it died.
        """
        ...

    def close(self) -> None:
        """Stop it; safe to call twice and after a failed ``start``."""
        ...


class Policy(Protocol):
    """Observation in, chunk out. Threads: one owner."""

    @property
    def spec(self) -> PolicySpec:
        """What the policy expects and gives."""
        ...

    @property
    def timing(self) -> StageTimes:
        """Stage times of the last ``predict``."""
        ...

    def predict(
        self,
        observation: Observation,
        *,
        noise: Float32Array | None = None,
        previous: Chunk | None = None,
        guidance: Guidance | None = None,
    ) -> Chunk:
        """Return a plan of absolute actions, stamped with ``observation.t_observed_ns``.

        Args:
            observation: frames of every camera of the spec and the state.
            noise: normalised starting noise, (H, A); drawn where None.
            previous: the plan that is being executed, for real-time chunking.
            guidance: how to stay near ``previous``; None for a free plan.
        """
        ...

    def check_golden(self) -> None:
        """Run the bundle's golden input on this machine.

        Raises:
            GwpError: the answer differs from the golden output.
        """
        ...

    def close(self) -> None:
        """Free the engine; safe to call twice."""
        ...


class Engine(Protocol):
    """The three graphs of a bundle on one device. Threads: one owner.

    Stages of one chunk: ``vision`` then ``prefill`` then N times ``denoise``. Prefix K/V and
    prompt K/V stay with the engine between calls.
    """

    def set_prompt(self, task: str) -> None:
        """Make the prompt K/V of ``task`` resident.

        Raises:
            SpecError: the bundle has no such task.
        """
        ...

    def vision(self, canvas: ImageArray) -> Float32Array:
        """Encode a canvas, uint8 RGB (h, w, 3), into a normalised latent (1, 48, h/16, w/16)."""
        ...

    def prefill(self, latent: Float32Array, state_norm: Float32Array) -> None:
        """Compute the prefix K/V from a latent and a normalised, padded state (1, A)."""
        ...

    def denoise(
        self,
        x: Float32Array,
        step_idx: int,
        prefix_norm: Float32Array,
        prefix_gain: Float32Array,
    ) -> Float32Array:
        """Take one Euler step from ``x`` (H, A) at step ``step_idx``; return the next x.

        Args:
            x: noisy actions at sigma[step_idx], (H, A).
            step_idx: 0 to N-1.
            prefix_norm: actions of the running chunk, normalised, (H, A).
            prefix_gain: pull towards ``prefix_norm`` per row, (H, 1); zeros for none.
        """
        ...

    def close(self) -> None:
        """Free the device; safe to call twice."""
        ...


@runtime_checkable
class ChunkEngine(Protocol):
    """An engine that can also run a whole chunk in one call, faster than its stages.

    The answer is that of the stages. Threads: the engine's owner.
    """

    @property
    def chunk_laps_ns(self) -> tuple[int, ...]:
        """Times of vision, prefill and each step of the last ``chunk``; empty before it."""
        ...

    def chunk(
        self,
        canvas: ImageArray,
        state_norm: Float32Array,
        x: Float32Array,
        prefix_norm: Float32Array,
        prefix_gain: Float32Array,
        *,
        first_step: int = 0,
    ) -> tuple[Float32Array, Float32Array]:
        """Run vision, prefill and the steps from ``first_step`` on.

        The first call with a ``first_step`` may take many times as long as those after it.

        Args:
            canvas: uint8 RGB (h, w, 3).
            state_norm: normalised, padded state (1, A).
            x: noisy actions at sigma[first_step], (H, A).
            prefix_norm: actions of the running chunk, normalised, (H, A).
            prefix_gain: pull towards it for each step, (N, H, 1).
            first_step: 0 to N-1; above 0 for a warm start.

        Returns:
            the last x (H, A), and the latent (1, C, h/16, w/16).
        """
        ...
