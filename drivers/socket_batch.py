"""Many small packets per system call: recvmmsg(2) and sendmmsg(2) on a socket of equal packets.

A tick of two arms reads two dozen CAN frames; one call for each costs more than decoding them.
"""

from __future__ import annotations

import ctypes
import errno
import os
import socket
from collections.abc import Sequence
from struct import Struct

from gwp_edge.errors import DeviceError

_MSG_DONTWAIT = 0x40
SO_TIMESTAMPNS = 35  # asm-generic/socket.h
# struct cmsghdr with a struct timespec: length, level, type, seconds, nanoseconds.
_STAMP = Struct("@Nii2l")


class _IoVec(ctypes.Structure):
    _fields_ = (("base", ctypes.c_void_p), ("length", ctypes.c_size_t))


class _MessageHeader(ctypes.Structure):
    _fields_ = (
        ("name", ctypes.c_void_p),
        ("name_length", ctypes.c_uint),
        ("vectors", ctypes.POINTER(_IoVec)),
        ("n_vectors", ctypes.c_size_t),
        ("control", ctypes.c_void_p),
        ("control_length", ctypes.c_size_t),
        ("flags", ctypes.c_int),
    )


class _BatchHeader(ctypes.Structure):
    _fields_ = (("header", _MessageHeader), ("length", ctypes.c_uint))


# struct mmsghdr in 32-bit words, and the place of its length.
_HEADER_WORDS = ctypes.sizeof(_BatchHeader) // 4
_LENGTH_WORD = _BatchHeader.length.offset // 4


class _Batch:
    """Headers for ``n`` packets that lie one after another in one buffer."""

    def __init__(self, n: int, packet_bytes: int, control_bytes: int) -> None:
        self.data = bytearray(n * packet_bytes)
        self.control = bytearray(n * control_bytes)
        self.headers = (_BatchHeader * n)()
        self._vectors = (_IoVec * n)()
        data = ctypes.addressof(ctypes.c_char.from_buffer(self.data))
        control = ctypes.addressof(ctypes.c_char.from_buffer(self.control)) if control_bytes else 0
        for i in range(n):
            self._vectors[i].base = data + i * packet_bytes
            self._vectors[i].length = packet_bytes
            header = self.headers[i].header
            header.vectors = ctypes.pointer(self._vectors[i])
            header.n_vectors = 1
            if control_bytes:
                header.control = control + i * control_bytes
                header.control_length = control_bytes
        # The kernel writes into the headers; this is what they must be before each call.
        self._template = bytes(self.headers)
        self._control_bytes = control_bytes
        # Made once: of anything else ctypes makes such a reference at every call.
        self.address = ctypes.byref(self.headers)
        # Bytes of each packet.
        self.lengths = memoryview(self.headers).cast("B").cast("I")[_LENGTH_WORD::_HEADER_WORDS]

    def renew(self, n: int) -> None:
        """Undo what the kernel wrote for ``n`` packets: no old stamp may pass for a new one."""
        if n:
            ctypes.memmove(self.address, self._template, n * ctypes.sizeof(_BatchHeader))
            self.control[: n * self._control_bytes] = bytes(n * self._control_bytes)


class SocketBatch:
    """Equal packets through a socket, many per call, without blocking. Threads: one owner.

    Args:
        endpoint: the socket; stays the caller's.
        packet_bytes: size of every packet.
        n_receive: packets per receiving call.
        n_send: most packets per sending call.
        stamps: the socket has SO_TIMESTAMPNS set.

    Raises:
        DeviceError: libc lacks the calls, which glibc and musl have.
    """

    def __init__(
        self,
        endpoint: socket.socket,
        packet_bytes: int,
        *,
        n_receive: int = 64,
        n_send: int = 16,
        stamps: bool,
    ) -> None:
        try:
            # No argtypes, which are called one by one: ints go as C ints, addresses as references.
            # PyDLL keeps the interpreter's lock: these calls never block.
            libc = ctypes.PyDLL(None, use_errno=True)
            self._recvmmsg, self._sendmmsg = libc.recvmmsg, libc.sendmmsg
        except (OSError, AttributeError) as e:
            raise DeviceError(f"libc has no recvmmsg and sendmmsg: {e}") from e
        self._fd = endpoint.fileno()
        self._packet_bytes = packet_bytes
        self._n_receive = n_receive
        self._n_send = n_send
        self._stamps = stamps
        self._in = _Batch(n_receive, packet_bytes, _STAMP.size if stamps else 0)
        self._out = _Batch(n_send, packet_bytes, 0)
        self._view = memoryview(self._in.data)
        self._control_view = memoryview(self._in.control)
        self._n_last = 0

    def receive(self) -> tuple[memoryview, int]:
        """Return the waiting packets, at most ``n_receive``, and how many.

        The view is overwritten by the next call. The socket must carry packets of exactly
        ``packet_bytes``.

        Raises:
            OSError: the call failed otherwise than by finding nothing.
            EOFError: the other side has closed.
        """
        if self._stamps:
            self._in.renew(self._n_last)
            self._n_last = self._n_receive  # what a failing call wrote is unknown
        n: int = self._recvmmsg(self._fd, self._in.address, self._n_receive, _MSG_DONTWAIT, None)
        if n < 0:
            number = ctypes.get_errno()
            if number not in (errno.EAGAIN, errno.EINTR):
                raise OSError(number, os.strerror(number))
            n = 0
        self._n_last = n
        lengths = self._in.lengths
        if n and lengths[n - 1] == 0:
            while n and lengths[n - 1] == 0:
                n -= 1
            if n == 0:
                raise EOFError
        return self._view[: n * self._packet_bytes], n

    def stamps_ns(self, n: int) -> list[int]:
        """Return the CLOCK_REALTIME receive times of the last ``n`` packets; 0 where unknown."""
        return [
            seconds * 1_000_000_000 + nanoseconds if kind == SO_TIMESTAMPNS else 0
            for _, _, kind, seconds, nanoseconds in _STAMP.iter_unpack(
                self._control_view[: n * _STAMP.size]
            )
        ]

    def send(self, packets: Sequence[bytes]) -> int:
        """Send ``packets``, at most ``n_send``; return how many the kernel took.

        Raises:
            OSError: the first packet was refused.
        """
        count = len(packets)
        if count > self._n_send:
            raise ValueError(f"at most {self._n_send} packets per call, got {count}")
        self._out.data[: count * self._packet_bytes] = b"".join(packets)
        sent: int = self._sendmmsg(self._fd, self._out.address, count, _MSG_DONTWAIT)
        if sent < 0:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number))
        return sent
