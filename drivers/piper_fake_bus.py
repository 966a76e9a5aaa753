"""Buses for the fake PiPER: inside a test's clock, on python-can's virtual bus, in a process."""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any

from gwp_edge.drivers.piper_can import UNIX_FRAME, CanBusyError
from gwp_edge.drivers.piper_codec import Frame
from gwp_edge.drivers.piper_fake import FakePiper
from gwp_edge.drivers.piper_feedback import CAN_ERR_FLAG, PiperFeedback, StampedFrame
from gwp_edge.drivers.piper_link import RECEIVED_IDS
from gwp_edge.errors import DeviceError, DeviceTimeoutError
from gwp_edge.protocols import Clock

logger = logging.getLogger(__name__)

_TICK_S = 0.001
_WANTED = frozenset(RECEIVED_IDS)


def _passes_filter(can_id: int) -> bool:
    """Whether the kernel would hand this frame to a driver's CAN socket; see ``pack_filters``."""
    return can_id in _WANTED or bool(can_id & CAN_ERR_FLAG)


class MemoryWire:
    """A wire with a fake arm on it that lives in the time of ``clock``; ``ends`` may join it.

    With a fake clock nothing waits and nothing depends on the machine. Threads: one owner.
    """

    def __init__(self, fake: FakePiper, clock: Clock) -> None:
        self.fake = fake
        self.clock = clock
        self._ends: list[MemoryCan] = []

    def end(self, name: str) -> MemoryCan:
        """Return a new end of the wire, which hears everything from now on."""
        end = MemoryCan(self, name)
        self._ends.append(end)
        return end

    def run(self) -> None:
        """Let the fake arm live up to now; every end hears what it says."""
        frames = self.fake.step(self.clock.now_ns())
        for end in self._ends:
            end.queue_up(frames)

    def say(self, sender: MemoryCan, can_id: int, data: bytes) -> None:
        """Carry a frame of ``sender`` to the arm and to every other end."""
        self.fake.hear(can_id, data)
        for end in self._ends:
            if end is not sender:
                end.queue_up([(can_id, data, self.clock.now_ns())])


class MemoryCan:
    """A CAN end on a ``MemoryWire``. Threads: one owner.

    Attributes:
        busy: the next so many sends find the transmit queue full.
        down: the interface is gone.
        sent: every frame that was sent.
        queue: frames that wait to be received.
        most: so many at most; more are lost, the newest ones, as by a socket that nobody reads.
    """

    def __init__(self, wire: MemoryWire, name: str) -> None:
        self.name = name
        self.busy = 0
        self.down = False
        self.sent: list[Frame] = []
        self.queue: list[StampedFrame] = []
        # About what 212992 bytes of receive buffer, Linux's default, hold.
        self.most = 277
        self._wire = wire

    def queue_up(self, frames: Sequence[StampedFrame]) -> None:
        """Let those of ``frames`` arrive that the driver asked for, as far as there is room."""
        passed = [frame for frame in frames if _passes_filter(frame[0])]
        self.queue += passed[: max(0, self.most - len(self.queue))]

    def send(self, frames: Sequence[Frame]) -> None:
        """Send ``frames``; see ``CanTransport.send``."""
        if self.down:
            raise DeviceError(f"CAN interface {self.name} went down")
        for can_id, data in frames:
            if self.busy > 0:
                self.busy -= 1
                raise CanBusyError(f"CAN interface {self.name}: transmit queue is full")
            self.sent.append((can_id, data))
            self._wire.say(self, can_id, data)

    def receive(self, into: PiperFeedback | None = None) -> list[StampedFrame]:
        """Return the waiting frames; see ``CanTransport.receive``."""
        if self.down:
            raise DeviceError(f"CAN interface {self.name} went down")
        frames = self.waiting()
        if into is not None:
            into.ingest(frames)
        return frames

    def waiting(self) -> list[StampedFrame]:
        """Return what has come over the wire since the last call."""
        self._wire.run()
        frames, self.queue = self.queue, []
        return frames

    def close(self) -> None:
        """Nothing to close."""


class VirtualFake:
    """A fake arm on python-can's ``virtual`` bus, in a thread of this process.

    ``fake`` may be read and its faults changed by the test's thread: single attributes only.
    Threads: start and stop by one owner.
    """

    def __init__(self, channel: str, fake: FakePiper) -> None:
        self.channel = channel
        self.fake = fake
        self._stop = threading.Event()
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name=f"fake {channel}", daemon=True)

    def __enter__(self) -> VirtualFake:
        import can

        self._can = can
        self._bus: can.BusABC = can.Bus(interface="virtual", channel=self.channel)
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stop.set()
        self._thread.join()
        self._bus.shutdown()
        if self._failure is not None:
            raise self._failure

    def _run(self) -> None:
        try:
            while not self._stop.is_set():
                message = self._bus.recv(timeout=_TICK_S)
                while message is not None:
                    self.fake.hear(message.arbitration_id, bytes(message.data))
                    message = self._bus.recv(timeout=0)
                for can_id, data, _t_ns in self.fake.step(time.monotonic_ns()):
                    self._bus.send(
                        self._can.Message(
                            arbitration_id=can_id & 0x1FFFFFFF,
                            data=data,
                            is_extended_id=False,
                            is_error_frame=bool(can_id & CAN_ERR_FLAG),
                        )
                    )
        except BaseException as e:  # handed to the owner, who raises it
            self._failure = e


class FakeServer:
    """A fake arm that listens on a Unix SEQPACKET socket; several programs may join its bus.

    As on a wire, everyone hears what the others send. The socket stands for a kernel CAN socket
    with a driver's filters: of all frames on the wire it delivers those of ``RECEIVED_IDS`` and
    error frames, so that a driver pays for no others, here as there. Threads: one owner, who calls
    ``serve``.
    """

    def __init__(self, path: str, fake: FakePiper) -> None:
        self._fake = fake
        # No client would get these frames; computing them takes time that the arm's joints need.
        self._fake.reports_end_pose = False
        self._path = path
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._listener.bind(path)
        self._listener.listen(8)
        self._listener.settimeout(0)
        self._clients: list[socket.socket] = []
        self.deaf = False

    def serve(self, keep_going: Callable[[], bool]) -> None:
        """Run until ``keep_going`` says no.

        It looks for frames every millisecond instead of waiting for them: a real bus wakes no
        process of the sender's machine, and being woken would be charged to the sender.
        """
        while keep_going():
            time.sleep(_TICK_S)
            self._accept()
            if not self.deaf:
                self._listen()
            for can_id, data, t_ns in self._fake.step(time.monotonic_ns()):
                self._broadcast(can_id, data, t_ns, None)

    def _accept(self) -> None:
        with contextlib.suppress(BlockingIOError):
            client, _ = self._listener.accept()
            client.settimeout(0)
            client.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
            self._clients.append(client)

    def _listen(self) -> None:
        """Take what everyone has sent, in the order of time as on a wire."""
        heard: list[tuple[int, int, bytes, socket.socket]] = []
        for client in list(self._clients):
            try:
                while packet := client.recv(UNIX_FRAME.size):
                    can_id, length, data, t_sent_ns = UNIX_FRAME.unpack(packet)
                    heard.append((t_sent_ns, can_id, data[:length], client))
            except BlockingIOError:
                continue
            except OSError:
                logger.debug("a program left the bus %s in a hurry", self._path)
            self._drop(client)
        heard.sort(key=lambda frame: frame[0])
        for t_sent_ns, can_id, data, client in heard:
            self._fake.hear(can_id, data, t_sent_ns)
            self._broadcast(can_id, data, time.monotonic_ns(), client)

    def _broadcast(self, can_id: int, data: bytes, t_ns: int, sender: socket.socket | None) -> None:
        if not _passes_filter(can_id):
            return
        packet = UNIX_FRAME.pack(can_id, len(data), data, t_ns)
        for client in list(self._clients):
            if client is not sender:
                try:
                    client.send(packet)
                except BlockingIOError:  # it does not read: it misses frames, as on a real bus
                    continue
                except OSError:
                    self._drop(client)

    def _drop(self, client: socket.socket) -> None:
        if client in self._clients:
            self._clients.remove(client)
            client.close()

    def close(self) -> None:
        """Leave the bus; every program finds it closed."""
        for client in list(self._clients):
            self._drop(client)
        self._listener.close()
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._path)


def _serve(path: str, control: Connection, fake: FakePiper) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the program under test
    server = FakeServer(path, fake)
    control.send("ready")

    def keep_going() -> bool:
        while control.poll():
            try:
                verb, value = control.recv()
            except EOFError:
                return False
            if verb == "stop":
                return False
            if verb == "faults":
                for name, setting in value.items():
                    setattr(fake.faults, name, setting)
            elif verb == "deaf":
                server.deaf = value
            elif verb == "call":
                getattr(fake, value[0])(*value[1:])
            elif verb == "ask":
                control.send(getattr(fake, value[0])(*value[1:]))
                continue
            control.send(
                (list(fake.joint_mdeg), list(fake.target_mdeg), dict(fake.heard), fake.mode)
            )
        return True

    try:
        server.serve(keep_going)
    finally:
        server.close()


class FakeProcess:
    """A fake arm in a process of its own, reached as ``unix:PATH``. Threads: one owner."""

    def __init__(self, path: str, fake: FakePiper | None = None) -> None:
        self.channel = f"unix:{path}"
        context = multiprocessing.get_context("spawn")
        self._control, theirs = context.Pipe()
        self._process = context.Process(
            target=_serve, args=(path, theirs, fake or FakePiper()), daemon=True
        )
        self._process.start()
        theirs.close()
        if not self._is_ready():
            self._process.kill()
            self._process.join()
            raise DeviceTimeoutError(f"the fake arm at {path} did not start within 30 s")

    def _is_ready(self) -> bool:
        try:
            return self._control.poll(30.0) and self._control.recv() == "ready"
        except EOFError:  # it died; its own words are on stderr
            return False

    @property
    def pid(self) -> int:
        """Of its process."""
        return self._process.pid or 0

    def __enter__(self) -> FakeProcess:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    def _talk(
        self, verb: str, value: object
    ) -> tuple[list[float], list[float], dict[int, int], int]:
        self._control.send((verb, value))
        answer: tuple[list[float], list[float], dict[int, int], int] = self._control.recv()
        return answer

    def set_faults(self, **faults: object) -> None:
        """Change fields of its ``Faults``; in effect on return."""
        self._talk("faults", faults)

    def set_deaf(self, *, deaf: bool) -> None:
        """Stop or start reading commands, so that the sender's queue fills."""
        self._talk("deaf", deaf)

    def call(self, method: str, *arguments: object) -> None:
        """Call a method of its ``FakePiper``, such as ``press_teach``."""
        self._talk("call", (method, *arguments))

    def ask(self, method: str, *arguments: object) -> Any:  # noqa: ANN401 - whatever it returns
        """Return what a method of its ``FakePiper`` answers; it must be picklable."""
        self._control.send(("ask", (method, *arguments)))
        return self._control.recv()

    def look(self) -> tuple[list[float], list[float], dict[int, int], int]:
        """Return its true joints and targets (0.001 degree), counts of heard frames, and mode."""
        return self._talk("look", None)

    def stop(self) -> None:
        """End the process; safe to call twice."""
        with contextlib.suppress(OSError, ValueError):
            self._control.send(("stop", None))
        self._process.join(5.0)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()
        self._control.close()
