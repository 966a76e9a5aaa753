"""The CAN transports: what can be checked of SocketCAN without a CAN kernel, and with one."""

import errno
import json
import socket
import struct
import subprocess
import time
import uuid
from types import SimpleNamespace

import pytest

from gwp_edge.drivers import piper_can, piper_codec
from gwp_edge.drivers.can_interface import (
    ask_ip,
    check_interface,
    count_others,
    parse_link,
    parse_receivers,
)
from gwp_edge.drivers.piper_can import (
    AF_CAN,
    CAN_FILTER,
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
    VirtualCan,
    filter_rows,
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


class StandIn:
    """A UDP socket where a raw CAN socket would be, as this kernel may have no CAN.

    CAN's own options are recorded; the rest, batches and kernel stamps among it, is real.
    """

    def __init__(self):
        self.near = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.far = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        for end in (self.near, self.far):
            end.bind(("127.0.0.1", 0))
            end.settimeout(5.0)
        self.near.connect(self.far.getsockname())
        self.far.connect(self.near.getsockname())
        self.options = {}
        self.bound = None

    def setsockopt(self, level, name, value):
        self.options[level, name] = value
        if level != SOL_CAN_RAW:
            self.near.setsockopt(level, name, value)

    def settimeout(self, seconds):
        self.near.settimeout(seconds)

    def fileno(self):
        return self.near.fileno()

    def bind(self, address):
        self.bound = address

    def close(self):
        self.near.close()
        self.far.close()


@pytest.fixture
def can_socket(monkeypatch):
    """A ``SocketCan`` on a stand-in, and the stand-in."""
    stand_in = StandIn()

    def make(*arguments):
        assert arguments == (AF_CAN, socket.SOCK_RAW, CAN_RAW)
        return stand_in

    with monkeypatch.context() as patch:
        patch.setattr(piper_can, "check_interface", lambda _name: None)
        patch.setattr(piper_can.socket, "socket", make)
        transport = SocketCan("can_left", RECEIVED_IDS)
    yield transport, stand_in
    transport.close()
    transport.close()
    stand_in.close()


@pytest.mark.parametrize("name", ["AF_CAN", "CAN_RAW", "SOL_CAN_RAW", "CAN_RAW_FILTER"])
def test_socket_constants_are_those_of_python_where_it_names_them(name):
    if not hasattr(socket, name):
        pytest.skip(f"this Python does not name {name}")
    assert getattr(socket, name) == globals()[name]


def test_socketcan_open_sets_filters_errors_and_stamps(can_socket):
    _, stand_in = can_socket
    options = stand_in.options
    assert options[SOL_CAN_RAW, CAN_RAW_FILTER] == pack_filters(RECEIVED_IDS)
    errors = options[SOL_CAN_RAW, CAN_RAW_ERR_FILTER]
    for bit in (0x001, 0x020, 0x040, 0x100):  # tx timeout, no ack, bus-off, restarted
        assert errors & bit
    assert not errors & 0x080  # "bus error (may flood!)" in linux/can/error.h
    assert options[socket.SOL_SOCKET, SO_TIMESTAMPNS] == 1
    assert stand_in.near.gettimeout() == 0
    assert stand_in.bound == ("can_left",)


def test_socketcan_receive_gives_frames_with_the_kernels_stamps(can_socket):
    transport, stand_in = can_socket
    # The kernel begins to stamp a moment after it was asked to; until then frames have none.
    for _ in range(100):
        before_ns = time.monotonic_ns()
        stand_in.far.send(CAN_FRAME.pack(0x2A5, 8, bytes(range(8))))
        stand_in.far.send(CAN_FRAME.pack(0x2A6, 3, b"abc"))
        between_ns = time.monotonic_ns()
        time.sleep(0.01)  # a stamp made on reading would be later than that
        first, second = transport.receive()
        assert first[:2] == (0x2A5, bytes(range(8)))
        assert second[:2] == (0x2A6, b"abc")
        if before_ns - 100_000 <= first[2] <= second[2] <= between_ns + 100_000:
            break
    else:
        pytest.fail("no frame had the time at which it was sent")
    assert transport.receive() == []


def test_socketcan_receive_takes_more_than_one_batch_in_order(can_socket):
    transport, stand_in = can_socket
    for i in range(150):
        stand_in.far.send(CAN_FRAME.pack(0x2A5, 8, struct.pack(">q", i)))
    frames = transport.receive()
    assert [struct.unpack(">q", data)[0] for _, data, _ in frames] == list(range(150))
    assert transport.receive() == []


def test_socketcan_frames_without_stamp_mean_now_and_not_the_last_frames_time(can_socket):
    transport, stand_in = can_socket
    packet = CAN_FRAME.pack(0x2A5, 8, bytes(8))
    for _ in range(3):
        stand_in.far.send(packet)
    stamped_ns = [t_ns for _, _, t_ns in transport.receive()]
    stand_in.near.setsockopt(socket.SOL_SOCKET, SO_TIMESTAMPNS, 0)
    time.sleep(0.01)
    before_ns = time.monotonic_ns()
    for _ in range(3):
        stand_in.far.send(packet)
    bare_ns = [t_ns for _, _, t_ns in transport.receive()]
    assert len(stamped_ns) == len(bare_ns) == 3
    assert max(stamped_ns) < before_ns - 5_000_000
    assert min(bare_ns) >= before_ns - 100_000
    stand_in.near.setsockopt(socket.SOL_SOCKET, SO_TIMESTAMPNS, 1)
    for _ in range(3):
        stand_in.far.send(packet)
    sent_ns = time.monotonic_ns()
    time.sleep(0.01)
    assert max(t_ns for _, _, t_ns in transport.receive()) < sent_ns + 5_000_000


def test_socketcan_error_frame_is_decoded_as_bus_off(can_socket):
    transport, stand_in = can_socket
    stand_in.far.send(CAN_FRAME.pack(CAN_ERR_FLAG | ERR_BUS_OFF, 8, bytes(8)))
    feedback = PiperFeedback("arm")
    feedback.ingest(transport.receive())
    assert feedback.bus_off
    assert feedback.n_error_frames == 1


def test_socketcan_send_writes_whole_frames(can_socket):
    transport, stand_in = can_socket
    frames = piper_codec.encode_joints([1, 2, 3, 4, 5, 6])
    transport.send(frames)
    heard = [stand_in.far.recv(64) for _ in frames]
    assert heard == [CAN_FRAME.pack(can_id, 8, data) for can_id, data in frames]


class Port:
    """A ``SocketPort`` of which the kernel says what the test wants."""

    emptied = False

    def __init__(self, outcome):
        self.outcome = outcome

    def send(self, _frames):
        if isinstance(self.outcome, OSError):
            raise self.outcome
        return self.outcome

    def drain(self, _store, *_times):
        raise self.outcome


@pytest.mark.parametrize("number", [errno.ENOBUFS, errno.EAGAIN])
def test_socketcan_full_queue_is_busy(can_socket, monkeypatch, number):
    transport, _ = can_socket
    monkeypatch.setattr(transport, "_port", Port(OSError(number, "injected")))
    with pytest.raises(CanBusyError, match="can_left: transmit queue is full, 0 of 3"):
        transport.send(piper_codec.encode_joints([0] * 6))


def test_socketcan_queue_that_fills_half_way_is_busy(can_socket, monkeypatch):
    transport, _ = can_socket
    monkeypatch.setattr(transport, "_port", Port(1))
    with pytest.raises(CanBusyError, match="1 of 3 frames were sent"):
        transport.send(piper_codec.encode_joints([0] * 6))


@pytest.mark.parametrize("number", [errno.ENETDOWN, errno.ENODEV, errno.ENXIO])
@pytest.mark.parametrize("verb", ["send", "receive", "receive into"])
def test_socketcan_interface_that_goes_down_names_the_command(
    can_socket, monkeypatch, number, verb
):
    transport, _ = can_socket
    monkeypatch.setattr(transport, "_port", Port(OSError(number, "injected")))
    act = {
        "send": lambda: transport.send([(0, bytes(8))]),
        "receive": transport.receive,
        "receive into": lambda: transport.receive(PiperFeedback("arm")),
    }
    with pytest.raises(DeviceError, match="can_left went down") as caught:
        act[verb]()
    assert not isinstance(caught.value, CanBusyError)
    assert "ip link set can_left up" in str(caught.value)
    assert "bitrate 1000000" in str(caught.value)


@pytest.mark.parametrize("verb", ["send", "receive"])
def test_socket_that_fails_is_a_device_error_with_the_kernels_reason(verb):
    near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    transport = UnixCan("unix:test", RECEIVED_IDS, near)
    far.close()
    near.close()  # behind its back: the real calls now fail
    with pytest.raises(DeviceError, match="EBADF"):
        transport.send([(0, bytes(8))]) if verb == "send" else transport.receive()


def test_socketcan_drain_ends_when_frames_never_stop(can_socket):
    transport, stand_in = can_socket
    forced_receive_buffer = 33  # SO_RCVBUFFORCE: without it the kernel keeps fewer
    try:
        stand_in.near.setsockopt(socket.SOL_SOCKET, forced_receive_buffer, 8 << 20)
    except PermissionError:
        pytest.skip("more than 512 waiting frames need CAP_NET_ADMIN")
    for _ in range(600):
        stand_in.far.send(CAN_FRAME.pack(0x2A5, 8, bytes(8)))
    assert len(transport.receive()) == 512
    assert len(transport.receive()) == 88


def test_socketcan_drains_into_feedback_with_its_stamps(can_socket):
    transport, stand_in = can_socket
    feedback = PiperFeedback("arm")
    before_ns = time.monotonic_ns()
    transport.receive(feedback)
    for can_id in (0x2A5, 0x2A6, 0x2A7):
        stand_in.far.send(CAN_FRAME.pack(can_id, 8, struct.pack(">ii", 1, 2)))
    stand_in.far.send(CAN_FRAME.pack(CAN_ERR_FLAG | ERR_BUS_OFF, 8, bytes(8)))
    transport.receive(feedback)
    assert feedback.joint_mdeg == [1, 2] * 3
    assert before_ns <= feedback.t_pose_ns <= time.monotonic_ns()
    assert feedback.bus_off


def test_socketcan_closed_is_a_device_error_and_touches_no_other_file(can_socket):
    transport, _ = can_socket
    transport.close()
    for action in (lambda: transport.send([(0, bytes(8))]), transport.receive):
        with pytest.raises(DeviceError, match="can_left is closed"):
            action()


# --- the interface ---


def sysfs(tmp_path, kind="280", flags="0x40041"):
    folder = tmp_path / "can_left"
    folder.mkdir()
    (folder / "type").write_text(kind + "\n")
    (folder / "flags").write_text(flags + "\n")
    return tmp_path


def ip_says(bitrate=1_000_000, state="ERROR-ACTIVE"):
    """Return the shape of ``ip -json -details link show`` of iproute2 for a CAN device."""
    data = {"state": state, "restart_ms": 100, "bittiming": {"bitrate": bitrate, "tq": 62}}
    link = {"ifname": "can_left", "linkinfo": {"info_kind": "can", "info_data": data}}
    return lambda _name: json.dumps([link]).encode()


@pytest.mark.parametrize("answer", [ip_says()("x"), b"", b"[]", b"[{}]", b"not json"])
def test_check_interface_up_passes(tmp_path, answer):
    check_interface("can_left", sysfs=sysfs(tmp_path), ask=lambda _name: answer)


def test_check_interface_wrong_bitrate_names_both_and_the_commands(tmp_path):
    with pytest.raises(DeviceError, match="runs at 500000 bit/s, a PiPER at 1000000: ip link"):
        check_interface("can_left", sysfs=sysfs(tmp_path), ask=ip_says(500_000))


def test_check_interface_bus_off_is_refused(tmp_path):
    with pytest.raises(DeviceError, match="can_left is bus-off: check cable and termination"):
        check_interface("can_left", sysfs=sysfs(tmp_path), ask=ip_says(state="BUS-OFF"))


def test_parse_link_of_the_real_ip_finds_no_bitrate_on_a_device_without_one():
    assert parse_link(ask_ip("lo")) == (None, None)


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
    before_ns = offset.offset_ns
    step_ns = 3600 * 10**9
    real = time.time_ns
    monkeypatch.setattr(piper_can.time, "time_ns", lambda: real() + step_ns)
    while not offset.measure():
        pass
    assert abs(before_ns - step_ns - offset.offset_ns) < 10**9


@pytest.mark.parametrize("step_ns", [300 * 10**6, 3600 * 10**9, -3600 * 10**9])
def test_frames_stamped_before_a_step_of_the_wall_clock_stay_of_now(monkeypatch, step_ns):
    """They used to look as old as the step, and a healthy arm as silent for so long."""
    offset = RealtimeOffset()
    emptied_ns = time.monotonic_ns()
    offset.begin_drain()
    offset.end_drain()
    stamp_ns = time.time_ns()
    real = time.time_ns
    monkeypatch.setattr(piper_can.time, "time_ns", lambda: real() + step_ns)
    offset.begin_drain()
    assert emptied_ns <= offset.monotonic_ns(stamp_ns) <= time.monotonic_ns()


def test_frame_that_waited_keeps_its_age_as_far_as_it_is_known():
    offset = RealtimeOffset()
    stamp_ns, begin_ns = time.time_ns(), time.monotonic_ns()
    time.sleep(0.5)
    offset.begin_drain()
    assert abs(offset.monotonic_ns(stamp_ns) - begin_ns) < 400_000_000
    offset.begin_drain()  # the one before did not come to an end
    assert abs(offset.monotonic_ns(stamp_ns) - begin_ns) < 400_000_000
    offset.end_drain()
    assert offset.monotonic_ns(stamp_ns) >= begin_ns + 500_000_000


def test_virtual_bus_survives_a_step_of_the_wall_clock(monkeypatch):
    import can

    receiver = VirtualCan("step", RECEIVED_IDS)
    try:
        with can.Bus(interface="virtual", channel="step") as sender:
            emptied_ns = time.monotonic_ns()
            receiver.receive()
            sender.send(can.Message(arbitration_id=0x2A5, data=bytes(8), is_extended_id=False))
            real = time.time_ns
            monkeypatch.setattr(piper_can.time, "time_ns", lambda: real() + 3600 * 10**9)
            ((_, _, t_ns),) = receiver.receive()
        assert emptied_ns <= t_ns <= time.monotonic_ns()
    finally:
        receiver.close()


def test_realtime_offset_interrupted_measurement_keeps_the_last(monkeypatch):
    offset = RealtimeOffset()
    known_ns = offset.offset_ns
    times = iter([0, 10**9])
    # This module's clock alone: threads of other tests' cameras look at the real one.
    clock = SimpleNamespace(monotonic_ns=lambda: next(times), time_ns=time.time_ns)
    monkeypatch.setattr(piper_can, "time", clock)
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

    def fill():
        while True:
            transport.send([(0x155, bytes(8))] * 3)

    with pytest.raises(CanBusyError, match="transmit queue is full"):
        fill()


def test_unix_frames_of_full_length_are_filtered_too(pair):
    transport, theirs = pair
    for can_id in (0x2A5, 0x2A2, CAN_ERR_FLAG | 0x40, 0x2A8):
        theirs.send(UNIX_FRAME.pack(can_id, 8, bytes(8), 123))
    heard = [can_id for can_id, _, _ in transport.receive()]
    assert heard == [0x2A5, CAN_ERR_FLAG | 0x40, 0x2A8]


def test_unix_peer_that_closes_is_heard_to_its_end(pair):
    transport, theirs = pair
    for i in range(2):
        theirs.send(UNIX_FRAME.pack(0x2A5, 8, bytes(8), i))
    theirs.close()
    assert [t_ns for _, _, t_ns in transport.receive()] == [0, 1]
    with pytest.raises(DeviceError, match="closed by the other side"):
        transport.receive()


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


# --- who else receives ---

OWN = filter_rows(RECEIVED_IDS)
HIDDEN = "0" * 16


def receive_list(kind, rows, *, banner=None):
    """Return a list as the kernel prints it: rows of (device, id, mask, userdata, matches)."""
    head = (
        banner
        or "  device   can_id   can_mask      function          userdata       matches  ident"
    )
    lines = [f"receive list 'rx_{kind}':", "  (any: no entry)"]
    if rows:
        lines.append(head)
    for device, can_id, mask, owner, matches in rows:
        number = f"{can_id:08x}  " if can_id & 0x80000000 else f"   {can_id:03x}    "
        own = "   *  " if banner else ""
        lines.append(
            f"   {device:<5}  {number}{mask:08x}{own}  00000000cb627637  {owner}  {matches:8}  raw"
        )
    return "\n" + "\n".join([*lines, "  (can9: no entry)", "", ""])


def of_driver(device, owner):
    return [(device, can_id, mask, owner, 12) for can_id, mask in sorted(OWN)]


def of_program(device, owner):
    """Return what python-can registers: no filter, and all error frames."""
    return [(device, 0, 0, owner, 4711), (device, 0, 0x1FFFFFFF, owner, 0)]


def others(name, *rows, **layout):
    text = receive_list("all", [row for some in rows for row in some], **layout)
    return count_others(name, parse_receivers(text), OWN)


def test_parse_receivers_table_of_the_kernels_documentation():
    text = """
receive list 'rx_all':
  (vcan3: no entry)
  (vcan2: no entry)
  (vcan1: no entry)
  device   can_id   can_mask  function  userdata   matches  ident
   vcan0     000    00000000  f88e6370  f6c6f400         0  raw
  (any: no entry)
"""
    (receiver,) = parse_receivers(text)
    assert receiver == ("vcan0", (0, 0), "f6c6f400")


@pytest.mark.parametrize(
    "text", ["", "\n", "receive list 'rx_all':\n  (any: no entry)\n", "a b c d"]
)
def test_parse_receivers_of_nobody_is_empty(text):
    assert parse_receivers(text) == []


def test_others_of_an_interface_that_only_our_driver_has_are_none():
    ours = of_driver("can_left", "00000000afdf543a"), of_driver("can_left", "0000000020f218f6")
    assert others("can_left", *ours) == 0
    assert others("can_left") == 0


@pytest.mark.parametrize("banner", [None, "  device   can_id   can_mask  own      function  ..."])
def test_others_are_counted_by_socket_beside_ours(banner):
    """The vendor's library sends with loopback off: its commands reach no socket of the host."""
    rows = (
        of_driver("can_left", "00000000afdf543a"),
        of_program("can_left", "0000000000000a01"),  # it sends by one socket
        of_program("can_left", "0000000000000a02"),  # and receives by another
        of_program("can_right", "0000000000000a03"),
    )
    assert others("can_left", *rows, banner=banner) == 2
    assert others("can_right", *rows, banner=banner) == 1


def test_other_that_hears_every_interface_counts_on_each():
    assert others("can_left", of_program("any", "0000000000000a01")) == 1


def test_other_with_some_of_our_filters_is_no_driver_of_ours():
    some = of_driver("can_left", "0000000000000a01")[:3]
    assert others("can_left", some) == 1


def test_others_whose_sockets_the_kernel_hides_are_at_least_so_many():
    ours = of_driver("can_left", HIDDEN), of_driver("can_left", HIDDEN)
    assert others("can_left", *ours) == 0
    program = of_program("can_left", HIDDEN)
    assert others("can_left", *ours, program, program) == 2
    assert others("can_left", *ours, of_driver("can_left", HIDDEN)[:3]) == 1


def test_filter_rows_are_those_that_a_driver_sets():
    filters = {CAN_FILTER.unpack(pack_filters([i])) for i in RECEIVED_IDS}
    assert filters | {(0, 0x16D)} == OWN
