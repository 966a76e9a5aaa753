"""The CAN transports: what can be checked of SocketCAN without a CAN kernel, and with one."""

import errno
import socket
import struct
import subprocess
import time
import uuid

import pytest

from gwp_edge.drivers import piper_can, piper_codec
from gwp_edge.drivers.piper_can import (
    AF_CAN,
    CAN_FRAME,
    CAN_RAW,
    CAN_RAW_ERR_FILTER,
    CAN_RAW_FILTER,
    SO_TIMESTAMPNS,
    SOL_CAN_RAW,
    UNIX_FRAME,
    CanBusyError,
    RealtimeOffset,
    SocketCan,
    UnixCan,
    check_interface,
    open_transport,
    pack_filters,
)
from gwp_edge.drivers.piper_feedback import CAN_ERR_FLAG, ERR_BUS_OFF, PiperFeedback
from gwp_edge.drivers.piper_link import RECEIVED_IDS
from gwp_edge.errors import DeviceError, SpecError


def test_can_frame_layout_is_that_of_the_kernel():
    # struct can_frame of linux/can.h: id, length, padding, two reserved bytes, eight data bytes.
    assert CAN_FRAME.size == 16
    packed = CAN_FRAME.pack(0x155, 8, bytes(range(8)))
    assert packed == struct.pack("=I", 0x155) + b"\x08\0\0\0" + bytes(range(8))


def test_pack_filters_matches_only_plain_11_bit_frames_of_the_ids():
    packed = pack_filters([0x2A1, 0x261])
    filters = [struct.unpack_from("=II", packed, 8 * i) for i in range(2)]

    def passes(can_id):
        return any(can_id & mask == wanted & mask for wanted, mask in filters)

    assert passes(0x2A1)
    assert passes(0x261)
    assert not passes(0x2A2)
    assert not passes(0x2A1 | 0x80000000)  # extended
    assert not passes(0x2A1 | 0x40000000)  # remote request


class FakeSocket:
    """Stands in for a raw CAN socket, which this kernel may not have; records and replays."""

    def __init__(self, packets=(), error=None, n_before_error=10**9):
        self.options = []
        self.timeout = "unset"
        self.sent = []
        self.bound = None
        self.closed = False
        self._packets = list(packets)
        self._error = error
        self._left = n_before_error

    def setsockopt(self, *option):
        self.options.append(option)

    def settimeout(self, seconds):
        self.timeout = seconds

    def bind(self, address):
        self.bound = address

    def send(self, packet):
        if self._left == 0:
            raise OSError(self._error, "injected")
        self._left -= 1
        self.sent.append(packet)

    def recvmsg(self, size, control_size):
        assert size == 16
        assert control_size >= socket.CMSG_SPACE(16)
        if self._packets:
            return self._packets.pop(0)
        if self._error is not None:
            raise OSError(self._error, "injected")
        raise BlockingIOError(errno.EAGAIN, "nothing")

    def close(self):
        self.closed = True


@pytest.fixture
def open_fake(monkeypatch, tmp_path):
    def opener(fake):
        asked = []

        def make(*arguments):
            asked.append(arguments)
            return fake

        monkeypatch.setattr(piper_can, "check_interface", lambda _name: None)
        monkeypatch.setattr(piper_can.socket, "socket", make)
        transport = SocketCan("can_left", RECEIVED_IDS)
        assert asked == [(AF_CAN, socket.SOCK_RAW, CAN_RAW)]
        return transport

    return opener


@pytest.mark.parametrize("name", ["AF_CAN", "CAN_RAW", "SOL_CAN_RAW", "CAN_RAW_FILTER"])
def test_socket_constants_are_those_of_python_where_it_names_them(name):
    if not hasattr(socket, name):
        pytest.skip(f"this Python does not name {name}")
    assert getattr(socket, name) == globals()[name]


def test_socketcan_open_sets_filters_errors_and_stamps_before_binding(open_fake):
    fake = FakeSocket()
    open_fake(fake)
    options = {(level, name): value for level, name, value in fake.options}
    assert options[SOL_CAN_RAW, CAN_RAW_FILTER] == pack_filters(RECEIVED_IDS)
    errors = options[SOL_CAN_RAW, CAN_RAW_ERR_FILTER]
    for bit in (0x001, 0x020, 0x040, 0x100):  # tx timeout, no ack, bus-off, restarted
        assert errors & bit
    assert not errors & 0x080  # "bus error (may flood!)" in linux/can/error.h
    assert options[socket.SOL_SOCKET, SO_TIMESTAMPNS] == 1
    assert fake.timeout == 0
    assert fake.bound == ("can_left",)


def test_socketcan_receive_gives_frames_with_monotonic_stamps(open_fake):
    before_ns = time.time_ns()
    seconds, nanoseconds = divmod(before_ns, 10**9)
    stamp = [(socket.SOL_SOCKET, SO_TIMESTAMPNS, struct.pack("@ll", seconds, nanoseconds))]
    packet = CAN_FRAME.pack(0x2A5, 8, bytes(range(8)))
    short = CAN_FRAME.pack(0x2A6, 3, b"abc")
    transport = open_fake(FakeSocket([(packet, stamp, 0, ("can_left",)), (short, [], 0, ())]))
    expected_ns = time.monotonic_ns() - (time.time_ns() - before_ns)
    (first, second) = transport.receive()
    assert first[:2] == (0x2A5, bytes(range(8)))
    assert abs(first[2] - expected_ns) < 1_000_000_000
    assert second[:2] == (0x2A6, b"abc")
    assert transport.receive() == []


def test_socketcan_error_frame_is_decoded_as_bus_off(open_fake):
    packet = CAN_FRAME.pack(CAN_ERR_FLAG | ERR_BUS_OFF, 8, bytes(8))
    transport = open_fake(FakeSocket([(packet, [], 0, ())]))
    feedback = PiperFeedback("arm")
    feedback.ingest(transport.receive())
    assert feedback.bus_off
    assert feedback.n_error_frames == 1


def test_socketcan_send_writes_whole_frames(open_fake):
    fake = FakeSocket()
    frames = piper_codec.encode_joints([1, 2, 3, 4, 5, 6])
    open_fake(fake).send(frames)
    assert fake.sent == [CAN_FRAME.pack(can_id, 8, data) for can_id, data in frames]


@pytest.mark.parametrize("number", [errno.ENOBUFS, errno.EAGAIN])
def test_socketcan_full_queue_is_busy_and_drops_the_rest(open_fake, number):
    fake = FakeSocket(error=number, n_before_error=1)
    with pytest.raises(CanBusyError, match="can_left: transmit queue is full"):
        open_fake(fake).send(piper_codec.encode_joints([0] * 6))
    assert len(fake.sent) == 1


@pytest.mark.parametrize("number", [errno.ENETDOWN, errno.ENODEV, errno.ENXIO])
def test_socketcan_interface_that_goes_down_names_the_command(open_fake, number):
    fake = FakeSocket(error=number, n_before_error=0)
    transport = open_fake(fake)
    for action in (lambda: transport.send([(0, bytes(8))]), transport.receive):
        with pytest.raises(DeviceError, match="can_left went down") as caught:
            action()
        assert not isinstance(caught.value, CanBusyError)
        assert "ip link set can_left up" in str(caught.value)
        assert "bitrate 1000000" in str(caught.value)


def test_socketcan_drain_ends_when_frames_never_stop(open_fake):
    class Flood(FakeSocket):
        def recvmsg(self, size, control_size):
            return CAN_FRAME.pack(0x2A5, 8, bytes(8)), [], 0, ()

    assert len(open_fake(Flood()).receive()) == 512


# --- the interface ---


def sysfs(tmp_path, kind="280", flags="0x40041"):
    folder = tmp_path / "can_left"
    folder.mkdir()
    (folder / "type").write_text(kind + "\n")
    (folder / "flags").write_text(flags + "\n")
    return tmp_path


def test_check_interface_up_passes(tmp_path):
    check_interface("can_left", sysfs=sysfs(tmp_path))


def test_check_interface_down_names_the_commands(tmp_path):
    with pytest.raises(DeviceError, match="can_left is down: ip link set can_left down; ip link"):
        check_interface("can_left", sysfs=sysfs(tmp_path, flags="0x40080"))


def test_check_interface_missing_lists_what_is_there(tmp_path):
    sysfs(tmp_path)
    with pytest.raises(DeviceError, match=r"can_right is missing \(there: can_left\)"):
        check_interface("can_right", sysfs=tmp_path)


def test_check_interface_that_is_not_can_is_refused(tmp_path):
    with pytest.raises(DeviceError, match=r"not CAN \(type 1, expected 280\)"):
        check_interface("can_left", sysfs=sysfs(tmp_path, kind="1"))


def test_check_interface_unreadable_is_a_device_error(tmp_path):
    with pytest.raises(DeviceError, match="cannot read"):
        check_interface("can_left", sysfs=sysfs(tmp_path, flags="what"))


def test_open_transport_empty_name_is_refused():
    with pytest.raises(SpecError, match="empty name"):
        open_transport("", RECEIVED_IDS)


# --- stamps ---


def test_realtime_offset_follows_a_step_of_the_wall_clock(monkeypatch):
    offset = RealtimeOffset()
    step_ns = 3600 * 10**9
    real = time.time_ns
    monkeypatch.setattr(piper_can.time, "time_ns", lambda: real() + step_ns)
    while not offset.measure():
        pass
    now_ns = offset.monotonic_ns(real() + step_ns)
    assert abs(now_ns - time.monotonic_ns()) < 10**9


def test_realtime_offset_interrupted_measurement_keeps_the_last(monkeypatch):
    offset = RealtimeOffset()
    known_ns = offset.offset_ns
    times = iter([0, 10**9])
    monkeypatch.setattr(piper_can.time, "monotonic_ns", lambda: next(times))
    assert not offset.measure()
    assert offset.offset_ns == known_ns


# --- a Unix socket ---


@pytest.fixture
def pair():
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    transport = UnixCan("unix:test", RECEIVED_IDS, ours)
    yield transport, theirs
    transport.close()
    theirs.close()


def test_unix_frames_pass_both_ways_with_their_stamp(pair):
    transport, theirs = pair
    transport.send(piper_codec.encode_joints([7] * 6))
    can_id, length, data, _ = UNIX_FRAME.unpack(theirs.recv(64))
    assert (can_id, length, data) == (0x155, 8, struct.pack(">ii", 7, 7))
    theirs.send(UNIX_FRAME.pack(0x2A5, 8, data, 123))
    theirs.send(UNIX_FRAME.pack(0x2A2, 8, data, 124))  # not wanted
    theirs.send(UNIX_FRAME.pack(CAN_ERR_FLAG | 0x40, 8, bytes(8), 125))
    theirs.send(UNIX_FRAME.pack(0x2A6, 2, b"ab", 126))
    assert transport.receive() == [
        (0x2A5, data, 123),
        (CAN_ERR_FLAG | 0x40, bytes(8), 125),
        (0x2A6, b"ab", 126),
    ]
    assert transport.receive() == []


def test_unix_peer_that_does_not_read_fills_the_queue(pair):
    transport, _ = pair
    with pytest.raises(CanBusyError, match="transmit queue is full"):
        transport.send([(0x155, bytes(8))] * 100_000)


def test_unix_peer_that_closes_is_a_device_error(pair):
    transport, theirs = pair
    theirs.close()
    with pytest.raises(DeviceError, match="closed by the other side"):
        transport.receive()
    with pytest.raises(DeviceError, match="EPIPE"):
        transport.send([(0x155, bytes(8))])


# --- a kernel with CAN ---


def _kernel_has_can():
    try:
        socket.socket(AF_CAN, socket.SOCK_RAW, CAN_RAW).close()
    except OSError:
        return False
    return True


@pytest.fixture
def vxcan():
    """A pair of CAN interfaces joined in the kernel; needs CAP_NET_ADMIN."""
    if not _kernel_has_can():
        pytest.skip("this kernel has no CAN sockets")
    tag = uuid.uuid4().hex[:6]
    a, b = f"vxa{tag}", f"vxb{tag}"
    add = ["ip", "link", "add", a, "type", "vxcan", "peer", "name", b]
    if subprocess.run(add, capture_output=True, check=False).returncode:
        pytest.skip("cannot make a vxcan pair here (module vxcan, CAP_NET_ADMIN)")
    for name in (a, b):
        subprocess.run(["ip", "link", "set", name, "up"], check=True)
    yield a, b
    subprocess.run(["ip", "link", "del", a], check=True)


def test_vxcan_frames_pass_the_kernel_with_filters_and_stamps(vxcan):
    a, b = vxcan
    arm = socket.socket(AF_CAN, socket.SOCK_RAW, CAN_RAW)
    host = SocketCan(a, RECEIVED_IDS)
    try:
        arm.bind((b,))
        for can_id in (0x2A5, 0x2A2, 0x261):
            arm.send(CAN_FRAME.pack(can_id, 8, bytes(8)))
        frames = host.receive()
        assert [can_id for can_id, _, _ in frames] == [0x2A5, 0x261]
        assert all(abs(time.monotonic_ns() - t_ns) < 10**9 for _, _, t_ns in frames)
        host.send(piper_codec.encode_joints([1] * 6))
        assert arm.recv(16) == CAN_FRAME.pack(0x155, 8, struct.pack(">ii", 1, 1))
    finally:
        arm.close()
        host.close()


@pytest.mark.skipif(_kernel_has_can(), reason="this kernel has CAN sockets")
def test_socketcan_kernel_without_can_says_so(monkeypatch):
    monkeypatch.setattr(piper_can, "check_interface", lambda _name: None)
    with pytest.raises(DeviceError, match="this kernel has no CAN sockets"):
        SocketCan("can0", RECEIVED_IDS)
