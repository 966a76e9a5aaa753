"""Ways to carry CAN frames: a SocketCAN raw socket, python-can's virtual bus, a Unix socket.

A channel is named ``can_left`` (a network interface), ``virtual:NAME`` (frames inside this
process) or ``unix:PATH`` (a fake arm in another process). The SocketCAN transport is written to
the kernel's documented interface (Documentation/networking/can.rst) and not yet run on hardware.
"""

from __future__ import annotations

import errno
import logging
import socket
import time
from collections.abc import Sequence
from struct import Struct
from typing import TYPE_CHECKING, Protocol

from gwp_edge.drivers.can_interface import bring_up_commands, check_interface
from gwp_edge.drivers.piper_codec import Frame
from gwp_edge.drivers.piper_core import SocketPort
from gwp_edge.drivers.piper_feedback import (
    CAN_ERR_FLAG,
    ERR_BUS_OFF,
    ERR_CONTROLLER,
    ERR_NO_ACK,
    ERR_PROTOCOL,
    ERR_RESTARTED,
    ERR_TX_TIMEOUT,
    PiperFeedback,
    StampedFrame,
)
from gwp_edge.errors import DeviceError, SpecError

if TYPE_CHECKING:
    import can

logger = logging.getLogger(__name__)

# struct can_frame: identifier with flags, length, 3 bytes of padding, 8 bytes of data.
CAN_FRAME = Struct("=IB3x8s")
CAN_FILTER = Struct("=II")
# A frame on the Unix socket: struct can_frame and the monotonic time at which it was sent.
UNIX_FRAME = Struct("=IB3x8sq")

CAN_SFF_MASK = 0x7FF
CAN_EFF_FLAG = 0x80000000
CAN_RTR_FLAG = 0x40000000
_DATA_MASK = CAN_SFF_MASK | CAN_EFF_FLAG | CAN_RTR_FLAG
# linux/can.h and linux/can/raw.h; not every Python names all of them.
AF_CAN, CAN_RAW = 29, 1
SOL_CAN_RAW, CAN_RAW_FILTER, CAN_RAW_ERR_FILTER = 101, 1, 2
_ERROR_MASK = (
    ERR_BUS_OFF | ERR_RESTARTED | ERR_NO_ACK | ERR_TX_TIMEOUT | ERR_CONTROLLER | ERR_PROTOCOL
)
SO_TIMESTAMPNS = 35  # asm-generic/socket.h
# A drain ends after so many frames even if they never stop; so does that of a SocketPort.
_MAX_DRAIN = 512


class CanBusyError(DeviceError):
    """The transmit queue is full; this frame was not sent, the next one may be."""


class CanTransport(Protocol):
    """A bus end. Threads: one owner."""

    name: str

    def send(self, frames: Sequence[Frame]) -> None:
        """Send ``frames`` back to back without blocking.

        Raises:
            CanBusyError: the queue is full; the rest of ``frames`` was not sent.
            DeviceError: the bus is gone.
        """
        ...

    def receive(self, into: PiperFeedback | None = None) -> list[StampedFrame] | None:
        """Return all waiting frames: (identifier with flags, data, receive time in ns).

        Args:
            into: takes and judges them as its ``ingest`` does; what is returned then means nothing.

        Raises:
            DeviceError: the bus is gone.
        """
        ...

    def close(self) -> None:
        """Close; safe to call twice."""
        ...


class RealtimeOffset:
    """Maps CLOCK_REALTIME stamps, as the kernel makes them, to the monotonic clock.

    The offset is measured again before every drain. Frames that were stamped before a step of the
    wall clock would then be off by the step, so that a healthy arm looked silent: whatever a stamp
    says, a frame came after the queue was last found empty, and not in the future. Threads: one
    owner.
    """

    _QUICK_NS = 50_000

    def __init__(self) -> None:
        self.offset_ns = time.monotonic_ns() - time.time_ns()
        self._t_emptied_ns = self._t_drain_ns = time.monotonic_ns()
        self.measure()

    def begin_drain(self) -> tuple[int, int, int]:
        """Prepare for the stamps of what waits now.

        Returns:
            (offset, first and last possible monotonic time), ns, as ``SocketPort.drain`` takes it.
        """
        self._t_drain_ns = time.monotonic_ns()
        self.measure()
        return self.offset_ns, self._t_emptied_ns, self._t_drain_ns

    def end_drain(self) -> None:
        """Note that nothing older than the begin of this drain waits any more."""
        self._t_emptied_ns = self._t_drain_ns

    def measure(self) -> bool:
        """Measure the offset; keep the last one, and return False, when interrupted meanwhile."""
        before_ns = time.monotonic_ns()
        real_ns = time.time_ns()
        after_ns = time.monotonic_ns()
        if after_ns - before_ns > self._QUICK_NS:
            return False
        self.offset_ns = (before_ns + after_ns) // 2 - real_ns
        return True

    def monotonic_ns(self, realtime_ns: int) -> int:
        """Return the monotonic time of the CLOCK_REALTIME stamp of a frame of this drain."""
        # What arrives while the queue is drained is taken to have come at its begin.
        t_ns = realtime_ns + self.offset_ns
        return max(self._t_emptied_ns, min(t_ns, self._t_drain_ns))


def pack_filters(can_ids: Sequence[int]) -> bytes:
    """Return the value of CAN_RAW_FILTER that passes exactly these 11-bit data frames."""
    return b"".join(CAN_FILTER.pack(can_id, _DATA_MASK) for can_id in can_ids)


def filter_rows(can_ids: Sequence[int]) -> frozenset[tuple[int, int]]:
    """Return (identifier, mask) of every filter of a ``SocketCan``, as the kernel lists them."""
    return frozenset({(0, _ERROR_MASK), *((can_id, _DATA_MASK) for can_id in can_ids)})


def _gone(name: str, e: OSError | EOFError) -> DeviceError:
    if isinstance(e, EOFError):
        return DeviceError(f"CAN channel {name} was closed by the other side")
    reason = errno.errorcode.get(e.errno or 0, str(e.errno))
    if e.errno in (errno.ENETDOWN, errno.ENODEV, errno.ENXIO):
        return DeviceError(
            f"CAN interface {name} went down ({reason}): check the adapter's plug, then "
            f"{bring_up_commands(name)}"
        )
    return DeviceError(f"CAN channel {name} failed: {e.strerror or e} ({reason})")


class _SocketEnd:
    """A socket's frames with this module's errors; see ``SocketPort``. Threads: one owner."""

    def __init__(
        self,
        name: str,
        endpoint: socket.socket,
        wanted: Sequence[int] | None,
        offset: RealtimeOffset | None,
    ) -> None:
        self.name = name
        self._socket = endpoint
        self._port: SocketPort | None = SocketPort(endpoint.fileno(), wanted)
        self._offset = offset  # None: packets bring monotonic stamps

    def _opened(self) -> SocketPort:
        if self._port is None:
            raise DeviceError(f"CAN channel {self.name} is closed")
        return self._port

    def send(self, frames: Sequence[Frame]) -> None:
        """Send ``frames``; see ``CanTransport.send``."""
        port = self._port or self._opened()
        try:
            n_sent = port.send(frames)
        except OSError as e:
            if e.errno not in (errno.ENOBUFS, errno.EAGAIN):
                raise _gone(self.name, e) from e
            n_sent = 0
        if n_sent < len(frames):
            raise CanBusyError(
                f"CAN channel {self.name}: transmit queue is full, {n_sent} of {len(frames)} "
                "frames were sent"
            )

    def receive(self, into: PiperFeedback | None = None) -> list[StampedFrame] | None:
        """Return or move the waiting frames; see ``CanTransport.receive``."""
        port, offset = self._port or self._opened(), self._offset
        try:
            # Unpacking an empty tuple instead would cost a tick 4 us.
            frames = port.drain(into) if offset is None else port.drain(into, *offset.begin_drain())
        except (OSError, EOFError) as e:
            raise _gone(self.name, e) from e
        if offset is not None and port.emptied:
            offset.end_drain()
        if into is None:
            return frames or []
        if frames is not None:
            into.judge(frames)
        return None

    def close(self) -> None:
        """Close; safe to call twice."""
        self._port = None
        self._socket.close()


class SocketCan(_SocketEnd):
    """One raw CAN socket with kernel filters, error frames and receive stamps.

    Written to the kernel's documented interface; not yet run on hardware. Threads: one owner.
    """

    def __init__(self, name: str, can_ids: Sequence[int]) -> None:
        check_interface(name)
        offset = RealtimeOffset()
        try:
            raw = socket.socket(AF_CAN, socket.SOCK_RAW, CAN_RAW)
        except OSError as e:
            raise DeviceError(
                f"CAN interface {name}: this kernel has no CAN sockets ({e.strerror}): load the "
                "modules can and can_raw"
            ) from e
        try:
            configure_socket(raw, can_ids)
            raw.bind((name,))
        except OSError as e:
            raw.close()
            raise _gone(name, e) from e
        super().__init__(name, raw, None, offset)


def configure_socket(raw: socket.socket, can_ids: Sequence[int]) -> None:
    """Set the filters, error classes and stamps of a raw CAN socket, and make it non-blocking."""
    raw.setsockopt(SOL_CAN_RAW, CAN_RAW_FILTER, pack_filters(can_ids))
    raw.setsockopt(SOL_CAN_RAW, CAN_RAW_ERR_FILTER, _ERROR_MASK)
    raw.setsockopt(socket.SOL_SOCKET, SO_TIMESTAMPNS, 1)
    raw.settimeout(0)


class UnixCan(_SocketEnd):
    """Frames over a Unix SEQPACKET socket to a fake arm in another process.

    Stamps are the monotonic time at which the arm sent the frame, so that a late reader cannot
    take old frames for new ones. Threads: one owner.
    """

    def __init__(self, name: str, can_ids: Sequence[int], endpoint: socket.socket) -> None:
        super().__init__(name, endpoint, can_ids, None)

    @classmethod
    def connect(cls, path: str, can_ids: Sequence[int]) -> UnixCan:
        """Connect to a fake arm that listens at ``path``.

        Raises:
            DeviceError: nothing listens there.
        """
        endpoint = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            endpoint.connect(path)
        except OSError as e:
            endpoint.close()
            raise DeviceError(
                f"CAN channel unix:{path}: nothing listens there ({e.strerror or e}): start the "
                "fake arm first"
            ) from e
        return cls(f"unix:{path}", can_ids, endpoint)


class VirtualCan:
    """python-can's ``virtual`` bus, which joins threads of one process. Threads: one owner."""

    def __init__(self, channel: str, can_ids: Sequence[int]) -> None:
        try:
            import can
        except ImportError as e:
            raise DeviceError(
                "python-can is missing, which virtual buses need: pip install 'gwp-edge[piper]'"
            ) from e
        self.name = f"virtual:{channel}"
        self._can = can
        self._wanted = frozenset(can_ids)
        self._offset = RealtimeOffset()
        self._bus: can.BusABC | None = can.Bus(interface="virtual", channel=channel)

    def _open_bus(self) -> can.BusABC:
        if self._bus is None:
            raise DeviceError(f"CAN channel {self.name} is closed")
        return self._bus

    def send(self, frames: Sequence[Frame]) -> None:
        """Send ``frames``; see ``CanTransport.send``."""
        bus = self._open_bus()
        try:
            for can_id, data in frames:
                bus.send(self._can.Message(arbitration_id=can_id, data=data, is_extended_id=False))
        except self._can.CanError as e:
            raise DeviceError(f"CAN channel {self.name} failed: {e}") from e

    def receive(self, into: PiperFeedback | None = None) -> list[StampedFrame]:
        """Return the waiting frames; see ``CanTransport.receive``."""
        bus = self._open_bus()
        self._offset.begin_drain()
        frames: list[StampedFrame] = []
        for _ in range(_MAX_DRAIN):
            message = bus.recv(timeout=0)
            if message is None:
                self._offset.end_drain()
                break
            can_id = message.arbitration_id
            t_ns = self._offset.monotonic_ns(int(message.timestamp * 1e9))
            if message.is_error_frame:
                frames.append((can_id | CAN_ERR_FLAG, bytes(message.data), t_ns))
            elif can_id in self._wanted:
                frames.append((can_id, bytes(message.data), t_ns))
        if into is not None:
            into.ingest(frames)
        return frames

    def close(self) -> None:
        """Close; safe to call twice."""
        bus, self._bus = self._bus, None
        if bus is not None:
            bus.shutdown()


def open_transport(channel: str, can_ids: Sequence[int]) -> CanTransport:
    """Open ``channel``, delivering the frames of ``can_ids`` and error frames.

    Raises:
        DeviceError: it is not there or not ready.
        SpecError: the name is empty.
    """
    if not channel:
        raise SpecError("CAN channel: expected an interface such as can_left, got an empty name")
    kind, colon, rest = channel.partition(":")
    if colon and kind == "unix":
        return UnixCan.connect(rest, can_ids)
    if colon and kind == "virtual":
        return VirtualCan(rest, can_ids)
    return SocketCan(channel, can_ids)
