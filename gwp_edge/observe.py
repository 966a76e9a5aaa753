"""From cameras and arm state to an observation, or the reason why there is none."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from gwp_edge.errors import SpecError, StaleError
from gwp_edge.mailbox import Board
from gwp_edge.protocols import Camera
from gwp_edge.robot_config import ObservationConfig
from gwp_edge.types import FloatArray, Frame, Observation

_N_HISTORY: Final = 512


@dataclass(frozen=True, slots=True, kw_only=True)
class ObservationLimits:
    """When an observation is too old to act on; all in ns.

    Attributes:
        frame_age_ns: an older frame is no ground for a plan.
        frame_skew_ns: frames whose captures are farther apart do not show one moment.
        state_age_ns: likewise for the arm's state.
        stall_ns: frames missing for this long put the arm on hold.
    """

    frame_age_ns: int = 100_000_000
    frame_skew_ns: int = 50_000_000
    state_age_ns: int = 100_000_000
    stall_ns: int = 500_000_000

    def __post_init__(self) -> None:
        for name in ("frame_age_ns", "frame_skew_ns", "state_age_ns", "stall_ns"):
            if getattr(self, name) <= 0:
                raise SpecError(f"{name}: expected a positive time, got {getattr(self, name)}")

    @classmethod
    def of(cls, config: ObservationConfig) -> ObservationLimits:
        """Return the limits of a robot file."""
        return cls(
            frame_age_ns=round(config.frame_age_ms * 1e6),
            frame_skew_ns=round(config.frame_skew_ms * 1e6),
            state_age_ns=round(config.state_age_ms * 1e6),
            stall_ns=round(config.stall_ms * 1e6),
        )


class StateHistory:
    """The arm's last states, to find the one that belongs to a picture. Threads: one owner."""

    def __init__(self, board: Board) -> None:
        self._board = board
        D = board.n_channels
        self._t_ns = np.zeros(0, np.int64)
        self._positions = np.zeros((0, D))

    def refresh(self) -> None:
        """Take what the motor process has published since the last call."""
        new = self._board.new_states()
        if len(new):
            self._t_ns = np.concatenate([self._t_ns, new["t_ns"]])[-_N_HISTORY:]
            self._positions = np.concatenate([self._positions, new["position"]])[-_N_HISTORY:]

    @property
    def t_newest_ns(self) -> int:
        """Time of the newest state, ns; 0 before the first one."""
        return int(self._t_ns[-1]) if len(self._t_ns) else 0

    def at(self, t_ns: int) -> tuple[FloatArray, int]:
        """Return the pose at ``t_ns``, (D,), and its time; the nearest end outside the history.

        Raises:
            StaleError: there is no state yet.
        """
        if not len(self._t_ns):
            raise StaleError("the arm has sent no state yet")
        after = int(np.searchsorted(self._t_ns, t_ns))
        if after == 0 or after == len(self._t_ns):
            i = min(after, len(self._t_ns) - 1)
            return self._positions[i].copy(), int(self._t_ns[i])
        t0, t1 = int(self._t_ns[after - 1]), int(self._t_ns[after])
        a = (t_ns - t0) / (t1 - t0)
        position: FloatArray = (1 - a) * self._positions[after - 1] + a * self._positions[after]
        return position, t_ns


class Observer:
    """Makes observations. Threads: one owner.

    The oldest frame's capture time is the observation's time, and the state is the one of that
    time: what the policy sees is one moment, and the plan counts from it.

    Attributes:
        limits: when an observation is too old.
    """

    def __init__(
        self, cameras: Sequence[Camera], states: StateHistory, limits: ObservationLimits
    ) -> None:
        self._cameras = cameras
        self._states = states
        self.limits = limits
        self._t_seen_ns = 0
        self._t_unusable_ns: int | None = None

    def is_stalled(self, now_ns: int) -> bool:
        """Whether there has been no usable observation for the stall limit; call after a look.

        Counted from the capture of the oldest camera's newest frame, so that a look that comes
        late, after a long inference, finds a stall at once; where frames do come and cannot be
        used, from the first look that found it so.
        """
        if self._t_unusable_ns is None:
            return False
        frozen_ns = now_ns - self._t_seen_ns
        unusable_ns = now_ns - self._t_unusable_ns
        limit_ns = self.limits.stall_ns
        return frozen_ns > limit_ns or unusable_ns > limit_ns

    def observe(self, now_ns: int) -> Observation:
        """Return what is known at ``now_ns``.

        Raises:
            StaleError: a frame or the state is missing, too old, or apart from the others.
            DeviceError: a camera has failed for good.
        """
        try:
            observation = self._observe(now_ns)
        except StaleError:
            if self._t_unusable_ns is None:
                self._t_unusable_ns = now_ns
            raise
        self._t_unusable_ns = None
        return observation

    def _observe(self, now_ns: int) -> Observation:
        newest = [camera.latest() for camera in self._cameras]
        self._t_seen_ns = min((f.t_captured_ns if f else 0 for f in newest), default=now_ns)
        frames = [
            self._fresh(camera.name, frame, now_ns)
            for camera, frame in zip(self._cameras, newest, strict=True)
        ]
        times = [f.t_captured_ns for f in frames]
        if max(times) - min(times) > self.limits.frame_skew_ns:
            oldest = frames[times.index(min(times))].camera
            raise StaleError(
                f"frames are {(max(times) - min(times)) / 1e6:.0f} ms apart (oldest: {oldest}), "
                f"allowed {self.limits.frame_skew_ns / 1e6:.0f} ms"
            )
        self._states.refresh()
        age_ns = now_ns - self._states.t_newest_ns
        if age_ns > self.limits.state_age_ns:
            raise StaleError(
                f"the arm's state is {age_ns / 1e6:.0f} ms old, "
                f"allowed {self.limits.state_age_ns / 1e6:.0f} ms"
            )
        state, t_state_ns = self._states.at(min(times))
        if not np.isfinite(state).all():
            raise StaleError("the arm's state is not finite")
        return Observation(frames=tuple(frames), state=state, t_state_ns=t_state_ns)

    def _fresh(self, name: str, frame: Frame | None, now_ns: int) -> Frame:
        if frame is None:
            raise StaleError(f"camera {name} has delivered no frame yet")
        age_ns = now_ns - frame.t_captured_ns
        if age_ns > self.limits.frame_age_ns:
            raise StaleError(
                f"camera {name}: the newest frame is {age_ns / 1e6:.0f} ms old, "
                f"allowed {self.limits.frame_age_ns / 1e6:.0f} ms"
            )
        return frame
