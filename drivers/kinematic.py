"""A robot without physics: joints that lag behind their targets, pictures of bars.

It needs numpy alone and is exact in time: the state is a closed formula of the last command, so
any process can read it at any moment. For tests and for a first look; the ``sim`` robot has
physics and real pictures. Faults can be planned, at a time after the first command.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from typing import BinaryIO

import msgspec
import numpy as np

from gwp_edge.drivers.kinematic_state import (
    SEGMENT_KEY,
    WORD_FIRST_SEND_NS,
    WORD_T0_NS,
    KinematicOptions,
    KinematicState,
    channel_limits,
    parse_options,
    segment_bytes,
    segment_name,
)
from gwp_edge.errors import DeviceError, DeviceTimeoutError, SafetyFault, SpecError
from gwp_edge.shared_memory import SharedSegment, unique_name
from gwp_edge.spec import Channel, PolicySpec
from gwp_edge.types import ArmState, FloatArray, Frame, ImageArray, JointLimits

logger = logging.getLogger(__name__)


def create_world(options: Mapping[str, object], spec: PolicySpec) -> KinematicWorld:
    """Make the memory that arm and cameras share.

    Raises:
        SpecError: an option is unknown, of another type, or out of range.
    """
    return KinematicWorld(parse_options(options), spec)


def create_arm(options: Mapping[str, object], spec: PolicySpec) -> KinematicArm:
    """Make the arm's end of a started world.

    Raises:
        SpecError: an option does not fit, or there is no world.
    """
    return KinematicArm(segment_name(options), parse_options(options), spec)


def create_camera(role: str, options: Mapping[str, object], spec: PolicySpec) -> KinematicCamera:
    """Make one camera of a started world.

    Raises:
        SpecError: an option does not fit, or there is no world.
    """
    return KinematicCamera(role, segment_name(options), parse_options(options), spec)


class KinematicWorld:
    """Owner of the shared state. Threads: one owner."""

    def __init__(self, options: KinematicOptions, spec: PolicySpec) -> None:
        self._spec = spec
        self._options = options
        self._segment: SharedSegment | None = None
        limits = channel_limits(spec)
        if options.start_position is None:
            middle = np.add(spec.statistics.state_q01, spec.statistics.state_q99) / 2.0
            self._start = np.clip(middle, limits.position_min, limits.position_max)
        else:
            self._start = np.array(options.start_position)
        if self._start.shape != (spec.n_channels,) or not np.isfinite(self._start).all():
            raise SpecError(
                f"start_position: expected {spec.n_channels} finite values, got {self._start}"
            )

    def start(self) -> Mapping[str, object]:
        """Make the shared memory; return its name and the world's options."""
        D = self._spec.n_channels
        self._segment = SharedSegment.create(unique_name("kinematic"), segment_bytes(D))
        state = KinematicState(self._segment, D, self._options, channel_limits(self._spec))
        state.words[WORD_T0_NS] = time.monotonic_ns()
        state.write("motor", self._start, self._start, time.monotonic_ns())
        state.release()
        extra: dict[str, object] = msgspec.to_builtins(self._options)
        return {**extra, SEGMENT_KEY: self._segment.name}

    def check(self) -> None:
        """Return: there is no process that could die."""

    def close(self) -> None:
        """Give the memory back; safe to call twice."""
        if self._segment is not None:
            self._segment.close()
            self._segment.unlink()
            self._segment = None


class KinematicArm:
    """The arm. Threads: one owner per object; one object enables, any number only read and hold."""

    def __init__(self, segment_name: str, options: KinematicOptions, spec: PolicySpec) -> None:
        self._segment_name = segment_name
        self._options = options
        self._spec = spec
        self._limits = channel_limits(spec)
        self._segment: SharedSegment | None = None
        self._state: KinematicState | None = None
        self._enabled = False
        self._held: FloatArray | None = None
        self._log: BinaryIO | None = None

    @property
    def channels(self) -> tuple[Channel, ...]:
        """The D channels in the order of every array."""
        return self._spec.channels

    @property
    def limits(self) -> JointLimits:
        """Limits to stay within."""
        return self._limits

    def open(self, *, enable: bool) -> None:
        """Attach to the world; with ``enable`` hold the pose.

        Raises:
            DeviceError: the world is gone, or the arm is open already.
        """
        if self._segment is not None:
            raise DeviceError("the kinematic arm is open already; close it first")
        self._segment = SharedSegment.attach(self._segment_name)
        self._state = KinematicState(
            self._segment, self._spec.n_channels, self._options, self._limits
        )
        if enable:
            time.sleep(self._options.enable_s)
            now_ns = time.monotonic_ns()
            q, _ = self._state.at(now_ns)
            self._state.write("motor", q, q, now_ns)
            self._enabled = True

    def state(self) -> ArmState:
        """Return the state of this moment.

        Raises:
            DeviceError: not open, or a planned fault.
        """
        state, now_ns = self._opened(), time.monotonic_ns()
        if state.fault_since_ns("feedback-error", now_ns) is not None:
            raise DeviceError("kinematic arm: connection lost (planned fault)")
        if self._enabled and state.fault_since_ns("driver-bug", now_ns) is not None:
            raise RuntimeError("kinematic arm: planned bug of a driver")
        silent_ns = state.fault_since_ns("feedback-silence", now_ns)
        t_ns = now_ns if silent_ns is None else silent_ns
        q, velocity = state.at(t_ns)
        if state.fault_since_ns("nan-state", now_ns) is not None:
            q = np.full_like(q, np.nan)
        is_faulty = state.fault_since_ns("arm-fault", now_ns) is not None
        return ArmState(
            position=q,
            velocity=velocity,
            t_received_ns=t_ns,
            enabled=self._enabled,
            fault="kinematic arm: joint driver error (planned fault)" if is_faulty else None,
        )

    def send(self, position: FloatArray) -> None:
        """Set the targets, shape (D,), rad and m.

        Raises:
            DeviceError: not open, not enabled, or a planned fault.
            DeviceTimeoutError: a planned dropped command.
            SafetyFault: not finite or of another shape; nothing was sent.
        """
        state, now_ns = self._opened(), time.monotonic_ns()
        if not self._enabled:
            raise DeviceError("the kinematic arm is open for reading only: open it with enable")
        target = np.asarray(position, np.float64)
        if target.shape != (self._spec.n_channels,) or not np.isfinite(target).all():
            raise SafetyFault(
                f"command: expected {self._spec.n_channels} finite values, got {position}; "
                "nothing was sent"
            )
        if state.words[WORD_FIRST_SEND_NS] == 0:
            state.words[WORD_FIRST_SEND_NS] = now_ns
        if state.fault_since_ns("send-failure", now_ns) is not None:
            raise DeviceError("kinematic arm: cannot send (planned fault)")
        if state.fault_since_ns("send-dropped", now_ns) is not None:
            raise DeviceTimeoutError("kinematic arm: queue full, command dropped (planned fault)")
        self._command("motor", target, now_ns)

    def hold(self) -> None:
        """Command the pose of the first call.

        Raises:
            DeviceError: not open.
        """
        now_ns = time.monotonic_ns()
        if self._held is None:
            self._held, _ = self._opened().at(now_ns)
        self._command("motor" if self._enabled else "guardian", self._held, now_ns)

    def close(self) -> None:
        """Detach; the arm holds its last target. Safe to call twice."""
        self._enabled, self._held = False, None
        if self._log is not None:
            self._log.close()
            self._log = None
        if self._state is not None and self._segment is not None:
            self._state.release()
            self._segment.close()
            self._state = self._segment = None

    def _opened(self) -> KinematicState:
        if self._state is None:
            raise DeviceError("the kinematic arm is not open; call open first")
        return self._state

    def _command(self, writer: str, target: FloatArray, now_ns: int) -> None:
        state = self._opened()
        q, _ = state.at(now_ns)
        is_stuck = state.fault_since_ns("stuck", now_ns) is not None
        state.write(writer, q, q if is_stuck else target, now_ns)
        if self._options.command_log is not None:
            if self._log is None:
                path = f"{self._options.command_log}.{writer}"
                self._log = open(path, "ab", buffering=0)  # noqa: SIM115 - close() closes it
            self._log.write(np.int64(now_ns).tobytes() + target.tobytes())


class KinematicCamera:
    """A camera that draws one bar per channel. Threads: one owner."""

    def __init__(
        self, role: str, segment_name: str, options: KinematicOptions, spec: PolicySpec
    ) -> None:
        self._role = role
        self._segment_name = segment_name
        self._options = options
        self._spec = spec
        self._limits = channel_limits(spec)
        self._segment: SharedSegment | None = None
        self._state: KinematicState | None = None
        self._frame: Frame | None = None

    @property
    def name(self) -> str:
        """Role name as in the spec."""
        return self._role

    def open(self) -> None:
        """Attach to the world.

        Raises:
            DeviceError: the world is gone.
        """
        if self._segment is None:
            self._segment = SharedSegment.attach(self._segment_name)
            self._state = KinematicState(
                self._segment, self._spec.n_channels, self._options, self._limits
            )

    def latest(self) -> Frame | None:
        """Return the newest picture; drawn on demand.

        Raises:
            DeviceError: not open, or a planned fault.
        """
        if self._state is None:
            raise DeviceError(f"camera {self._role} is not open; call open first")
        now_ns = time.monotonic_ns()
        if self._state.fault_since_ns("camera-failure", now_ns) is not None:
            raise DeviceError(f"camera {self._role}: unplugged (planned fault)")
        frozen_ns = self._state.fault_since_ns("camera-freeze", now_ns)
        t0_ns, period_ns = self._state.words[WORD_T0_NS], 1e9 / self._options.fps
        idx = int(((now_ns if frozen_ns is None else frozen_ns) - t0_ns) / period_ns)
        if self._frame is None or self._frame.frame_idx < idx:
            t_captured_ns = t0_ns + round(idx * period_ns)
            q, _ = self._state.at(t_captured_ns)
            self._frame = Frame(
                camera=self._role,
                image=self._draw(q),
                t_captured_ns=t_captured_ns,
                t_received_ns=now_ns,
                frame_idx=idx,
                domain="sim",
            )
        return self._frame

    def close(self) -> None:
        """Detach; safe to call twice."""
        if self._state is not None and self._segment is not None:
            self._state.release()
            self._segment.close()
            self._state = self._segment = None

    def _draw(self, q: FloatArray) -> ImageArray:
        width, height = self._options.width_px, self._options.height_px
        # The role tints the background, so that a person tells the views apart.
        tint = sum(self._role.encode()) % 64
        image = np.full((height, width, 3), (tint, 48, 96 - tint), np.uint8)
        span = self._limits.position_max - self._limits.position_min
        share = np.clip((q - self._limits.position_min) / span, 0.0, 1.0)
        edges = np.linspace(0, width, len(q) + 1).astype(int)
        for i, part in enumerate(share):
            top = height - 1 - int(part * (height - 1))
            image[top:, edges[i] : max(edges[i + 1] - 1, edges[i] + 1)] = (64 + 12 * i, 200, 120)
        return image
