"""The seams of the runtime: what a camera, an arm, an engine and a clock must do.

Each has a contract suite under tests/contract that every implementation passes.
"""

from __future__ import annotations

from typing import Protocol

from gwp_edge.spec import Channel
from gwp_edge.types import (
    ArmState,
    Float32Array,
    FloatArray,
    Frame,
    ImageArray,
    JointLimits,
)


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


class Arm(Protocol):
    """One robot as the motor loop sees it: D channels, one clock. Threads: one owner."""

    @property
    def channels(self) -> tuple[Channel, ...]:
        """The D channels in the order of every array."""
        ...

    @property
    def limits(self) -> JointLimits:
        """Limits of the arm itself; known after ``open``."""
        ...

    def open(self, *, enable: bool) -> None:
        """Connect, check, and with ``enable`` power the motors so that they hold the pose.

        Never moves: an enabled arm holds the pose that it measured.

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
            DeviceError: the command could not be sent.
            SafetyFault: the command is not finite or does not fit the protocol; nothing was sent.
        """
        ...

    def close(self) -> None:
        """Disconnect and leave the arm holding; safe to call twice. Never cuts power."""
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
        """Compute the prefix K/V from a latent and a normalised, padded state (1, 1, A)."""
        ...

    def denoise(
        self,
        x: Float32Array,
        step_idx: int,
        prefix_norm: Float32Array,
        prefix_gain: Float32Array,
    ) -> Float32Array:
        """Take one Euler step from ``x`` (1, H, A) at step ``step_idx``; return the next x.

        Args:
            x: noisy actions at sigma[step_idx], (1, H, A).
            step_idx: 0 to N-1.
            prefix_norm: actions of the running chunk, normalised, (1, H, A).
            prefix_gain: pull towards ``prefix_norm`` per row, (1, H, 1); zeros for none.
        """
        ...

    def close(self) -> None:
        """Free the device; safe to call twice."""
        ...
