"""The compiled part of the PiPER driver: against a plain model, at its borders, and missing."""

import gc
import json
import math
import socket
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("can", reason="the PiPER driver's extra is not installed")

from gwp_edge.drivers import piper_codec as codec
from gwp_edge.drivers import piper_native
from gwp_edge.drivers.piper_can import CAN_FRAME, SO_TIMESTAMPNS, UNIX_FRAME
from gwp_edge.drivers.piper_core import FrameStore, SocketPort, encode_arms, read_arms
from gwp_edge.drivers.piper_feedback import CAN_ERR_FLAG
from gwp_edge.drivers.piper_link import RECEIVED_IDS, make_command

MS = 1_000_000
JOINTS, FAST, SLOW = codec.ID_JOINT_FEEDBACK, codec.ID_MOTOR_FAST, codec.ID_MOTOR_SLOW
PERIODIC = (*JOINTS, codec.ID_STATUS, codec.ID_GRIPPER_FEEDBACK, *SLOW, *FAST)


class Model:
    """What a ``FrameStore`` is to do, written for reading."""

    def __init__(self):
        self.newest, self.t_ns, self.judged, self.parts = {}, {}, {}, set()
        self.joint_mdeg, self.gripper_um = [0] * 6, None
        self.t_pose_ns = self.n_poses = self.n_bad = self.n_frames = 0

    def take(self, can_id, data, t_ns):
        """Return whether the frame is news."""
        self.n_frames += 1
        if len(data) != 8:
            self.n_bad += 1
            return False
        if can_id not in PERIODIC:
            return True
        if can_id == codec.ID_GRIPPER_FEEDBACK:
            (opening_um,) = struct.unpack(">i", data[:4])
            if abs(opening_um) > 150_000:
                self.n_bad += 1
                return False
            self.gripper_um = opening_um
        self.newest[can_id], self.t_ns[can_id] = data, t_ns
        if can_id in JOINTS:
            self.parts.add(can_id)
            self._pose()
            return False
        if can_id in FAST:
            return False
        what = {codec.ID_STATUS: data, codec.ID_GRIPPER_FEEDBACK: data[6]}.get(can_id, data[5])
        is_news = self.judged.get(can_id) != what
        self.judged[can_id] = what
        return is_news

    def _pose(self):
        if len(self.parts) < 3:
            return
        stamps = [self.t_ns[i] for i in JOINTS]
        if max(stamps) - min(stamps) > 3 * MS:
            return
        self.parts.clear()
        angles = [q for i in JOINTS for q in struct.unpack(">ii", self.newest[i])]
        if any(abs(q) > 360_000 for q in angles):
            self.n_bad += 1
            return
        self.joint_mdeg, self.t_pose_ns = angles, min(stamps)
        self.n_poses += 1


def assert_equal(store, model):
    assert store.joint_mdeg == model.joint_mdeg
    assert store.gripper_um == model.gripper_um
    for name in ("t_pose_ns", "n_poses", "n_bad", "n_frames"):
        assert getattr(store, name) == getattr(model, name), name
    for can_id in PERIODIC:
        assert store.data_of(can_id) == model.newest.get(can_id)
        assert store.t_ns_of(can_id) == model.t_ns.get(can_id, 0)
    slow = [model.t_ns.get(i, 0) for i in PERIODIC if i not in (*JOINTS, *FAST)]
    assert store.t_oldest_ns == min(model.t_pose_ns, *slow)


# Few values, so that frames often repeat, with the odd wild or broken one among them.
ANGLES = st.sampled_from([0, 1, -1, 90_000, -360_000, 360_000, 360_001, -360_001, 2**31 - 1])
DATA = (
    st.builds(struct.Struct(">ii").pack, ANGLES, ANGLES)
    | st.builds(
        struct.Struct(">iHBB").pack,
        st.sampled_from([0, 35_000, 150_000, -150_000, 150_001, -(2**31)]),
        st.integers(0, 2),
        st.sampled_from([0x40, 0x00, 0x44]),
        st.integers(0, 1),
    )
    | st.binary(min_size=8, max_size=8)
    | st.binary(max_size=7)
)
IDS = st.sampled_from([*PERIODIC, 0x473, 0x155, 0x2B1, 0x2A2, CAN_ERR_FLAG | 0x40])
FRAMES = st.lists(st.tuples(IDS, DATA, st.integers(1, 12).map(lambda t: t * MS)), max_size=60)


@given(FRAMES, st.integers(0, 60))
def test_store_does_what_the_model_does(frames, forget_at):
    store, model = FrameStore(), Model()
    for i, frame in enumerate(frames):
        if i == forget_at:
            store.forget_judged()
            model.judged.clear()
        news = store.take_frames([frame])
        assert (news == [frame]) is model.take(*frame)
        assert_equal(store, model)
    store.clear()
    assert_equal(store, Model())


@given(FRAMES)
def test_port_gives_a_store_what_the_frames_themselves_do(frames):
    """Through a socket, in batches: the same store, the same news."""
    near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with near, far:
        near.setblocking(False)
        for can_id, data, t_ns in frames:
            far.send(UNIX_FRAME.pack(can_id, len(data), data, t_ns))
        wanted = [f for f in frames if f[0] in RECEIVED_IDS or f[0] & CAN_ERR_FLAG]
        store, twin = FrameStore(), FrameStore()
        port = SocketPort(near.fileno(), RECEIVED_IDS)
        assert port.drain(store) == twin.take_frames(wanted)
        assert port.emptied
        for name in ("joint_mdeg", "gripper_um", "t_pose_ns", "n_bad", "n_frames"):
            assert getattr(store, name) == getattr(twin, name)


def whole_store(joint_mdeg, gripper_um, speeds=None):
    store = FrameStore()
    pairs = zip(JOINTS, codec.encode_joints(joint_mdeg), strict=True)
    frames = [(can_id, data, 5 * MS) for can_id, (_, data) in pairs]
    frames.append((codec.ID_GRIPPER_FEEDBACK, struct.pack(">ihBB", gripper_um, 0, 0x40, 0), 4 * MS))
    for can_id, speed in zip(FAST, speeds or [], strict=False):
        frames.append((can_id, struct.pack(">hhi", speed, 0, 0), 6 * MS))
    store.take_frames(frames)
    return store


@given(
    st.lists(st.integers(-360_000, 360_000), min_size=6, max_size=6),
    st.integers(-150_000, 150_000),
    st.lists(st.integers(-(2**15), 2**15 - 1), max_size=6),
)
def test_read_arms_scales_as_the_codec_does(joint_mdeg, gripper_um, speeds):
    left, right = whole_store(joint_mdeg, gripper_um, speeds), whole_store([0] * 6, 0, [0] * 6)
    position, velocity, t_position_ns, t_oldest_ns = read_arms((left, right))
    expected = [codec.mdeg_to_rad(q) for q in joint_mdeg]
    assert np.frombuffer(position)[:6].tolist() == expected
    assert np.frombuffer(position)[6] == pytest.approx(codec.um_to_m(gripper_um), abs=1e-15)
    assert not np.frombuffer(position)[7:].any()
    rad_s = [speed * 1e-3 for speed in speeds] + [math.nan] * (7 - len(speeds)) + [0.0] * 6
    np.testing.assert_array_equal(np.frombuffer(velocity), [*rad_s, math.nan])
    assert t_position_ns == 4 * MS
    assert t_oldest_ns == 0  # no status was heard


def test_read_arms_tells_whose_silence_is_longest():
    store = whole_store([0] * 6, 0, [0] * 6)
    store.take_frames([(i, bytes(8), 7 * MS) for i in (codec.ID_STATUS, *SLOW)])
    assert read_arms((store,))[2:] == (4 * MS, 4 * MS)
    store.take_frames([(codec.ID_GRIPPER_FEEDBACK, bytes(8), 9 * MS)])
    assert read_arms((store,))[2:] == (5 * MS, 5 * MS)  # the pose
    store.take_frames([(i, bytes(8), 9 * MS) for i in JOINTS])
    assert read_arms((store,))[2:] == (9 * MS, 6 * MS)  # the fast frames
    assert store.t_oldest_ns == 7 * MS  # which have no part in this


@pytest.mark.parametrize("missing", [*JOINTS, codec.ID_GRIPPER_FEEDBACK])
def test_read_arms_is_none_until_every_arm_is_whole(missing):
    store = FrameStore()
    whole = (*JOINTS, codec.ID_GRIPPER_FEEDBACK)
    store.take_frames([(i, bytes(8), MS) for i in whole if i != missing])
    assert read_arms((whole_store([0] * 6, 0), store)) is None
    store.take_frames([(missing, bytes(8), MS)])
    assert read_arms((whole_store([0] * 6, 0), store)) is not None


WIDE = np.array([(-4.0, 4.0)] * 6 + [(-0.2, 0.2)])


@given(
    st.lists(st.floats(-4.0, 4.0), min_size=6, max_size=6),
    st.floats(-0.2, 0.2),
    st.integers(0, codec.GRIPPER_EFFORT_CAP_MNM),
)
def test_encode_arms_gives_the_frames_of_the_codec(angles_rad, opening_m, effort_mnm):
    (command,) = encode_arms([*angles_rad, opening_m], WIDE.tobytes(), effort_mnm)
    gripper = (codec.m_to_um(opening_m), effort_mnm)
    assert command == make_command(codec.rad_to_mdeg(*angles_rad), gripper)


@pytest.mark.parametrize("value", [4.01, -4.01, math.nan, math.inf, -math.inf, 1e300])
@pytest.mark.parametrize("where", range(14))
def test_encode_arms_gives_nothing_when_one_target_is_not_accepted(value, where):
    targets = [0.0] * 14
    ranges = np.concatenate([WIDE, WIDE]).tobytes()
    assert len(encode_arms(targets, ranges, 0)) == 2
    targets[where] = value
    assert encode_arms(targets, ranges, 0) is None


def test_encode_arms_accepts_the_ends_of_a_range_and_nothing_that_does_not_fit():
    ends = [*WIDE[:, 1].tolist()]
    assert encode_arms(ends, WIDE.tobytes(), 0) is not None
    ends[0] = math.nextafter(4.0, 5.0)
    assert encode_arms(ends, WIDE.tobytes(), 0) is None
    endless = np.array([(-math.inf, math.inf)] * 7).tobytes()
    most_rad = codec.mdeg_to_rad(2**31 - 1)
    assert encode_arms([most_rad] * 6 + [0.0], endless, 0) is not None
    assert encode_arms([most_rad * 1.001] + [0.0] * 6, endless, 0) is None
    assert encode_arms([0.0] * 6 + [2200.0], endless, 0) is None


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (([0.0] * 6, WIDE.tobytes(), 0), ValueError),
        (([0.0] * 8, WIDE.tobytes(), 0), ValueError),
        (([0.0] * 7, WIDE.tobytes()[:-1], 0), ValueError),
        (([0.0] * 70, np.concatenate([WIDE] * 10).tobytes(), 0), ValueError),
        (([0.0] * 7, WIDE.tobytes(), -1), ValueError),
        (([0.0] * 7, WIDE.tobytes(), 2001), ValueError),
        ((["0"] * 7, WIDE.tobytes(), 0), TypeError),
        (([[0.0] * 7] * 7, WIDE.tobytes(), 0), TypeError),
        (((0.0,) * 7, WIDE.tobytes(), 0), TypeError),
        (([0.0] * 7, WIDE, 0), TypeError),
        (([0.0] * 7, WIDE.tobytes(), 0.5), TypeError),
        (([0.0] * 7, WIDE.tobytes()), TypeError),
    ],
)
def test_encode_arms_refuses_what_is_no_command(arguments, error):
    with pytest.raises(error):
        encode_arms(*arguments)


def test_wrong_types_are_errors_and_crash_nothing():
    near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with near, far:
        port, store = SocketPort(near.fileno(), RECEIVED_IDS), FrameStore()
        for arguments in ((), (1,), (store, 1), (store, 1, "2", 3), (store, 1, 2, 3, 4)):
            with pytest.raises(TypeError):
                port.drain(*arguments)
        for frames in ([b"x"], [(1,)], [(0x2A5, "text", 1)], [(0x2A5, bytes(8), None)], 5):
            with pytest.raises(TypeError):
                store.take_frames(frames)
        for frames in (5, [5], [(0x155, "text")], [(0x155,)]):
            with pytest.raises(TypeError):
                port.send(frames)
        for frames in ([(0x155, bytes(7))], [(0x800, bytes(8))], [(0x155, bytes(8))] * 17):
            with pytest.raises(ValueError, match="frame"):
                port.send(frames)
        for stores in ([store], (5,), (store,) * 9):
            with pytest.raises(TypeError):
                read_arms(stores)
        with pytest.raises(ValueError, match="below 0x800"):
            SocketPort(near.fileno(), [0x800])
        with pytest.raises(TypeError):
            SocketPort(near.fileno(), ["x"])
        with pytest.raises(OverflowError):
            store.data_of(-1)
        far.setblocking(False)
        with pytest.raises(BlockingIOError):
            far.recv(1)  # nothing of all this was sent


def test_take_frames_stops_at_an_iterator_that_fails():
    def frames():
        yield (0x2A5, bytes(8), 1)
        raise RuntimeError("the source broke")

    store = FrameStore()
    with pytest.raises(RuntimeError, match="the source broke"):
        store.take_frames(frames())
    assert store.n_frames == 1


def test_packets_of_another_size_are_bad_frames_and_not_read_beyond_their_end():
    near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with near, far:
        near.setblocking(False)
        whole = UNIX_FRAME.pack(0x2A5, 8, b"\x01" * 8, 7)
        for packet in (whole, whole[:10], whole + b"more", whole):
            far.send(packet)
        store = FrameStore()
        assert SocketPort(near.fileno(), RECEIVED_IDS).drain(store) is None
        assert (store.n_frames, store.n_bad) == (4, 2)


@pytest.fixture
def stamped():
    """Both ends of a socket whose near one the kernel stamps, as it does a CAN socket."""
    near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    with near, far:
        near.setblocking(False)
        near.setsockopt(socket.SOL_SOCKET, SO_TIMESTAMPNS, 1)
        yield near, far


def test_socketcan_stamps_stay_between_the_first_and_the_last_possible_time(stamped):
    near, far = stamped
    port = SocketPort(near.fileno(), None)
    for offset_ns, expected_ns in ((-(2**62), 1000), (2**61, 2000)):
        far.send(CAN_FRAME.pack(0x2A5, 8, bytes(8)))
        assert port.drain(None, offset_ns, 1000, 2000) == [(0x2A5, bytes(8), expected_ns)]


def test_nothing_is_lost_from_memory_over_many_ticks():
    near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    targets, ranges = [0.5, -0.5, 0.1, 0.0, 1.0, 2.0, 0.03], WIDE.tobytes()
    with near, far:
        near.setblocking(False)
        port, store = SocketPort(near.fileno(), RECEIVED_IDS), whole_store([1] * 6, 1)
        packets = [UNIX_FRAME.pack(i, 8, b"\x01" * 8, 7) for i in (0x2A5, 0x473, 0x2A1)]

        def tick():
            for packet in packets:
                far.send(packet)
            store.forget_judged()
            assert len(port.drain(store)) == 2
            read_arms((store,))
            (command,) = encode_arms(targets, ranges, 5)
            assert port.send(command) == 4
            assert encode_arms([9.0] * 7, ranges, 5) is None
            for _ in command:
                far.recv(64)
            with pytest.raises(ValueError, match="8 bytes"):
                port.send([(1, b"")])
            with pytest.raises(TypeError):
                store.take_frames([(0x473, bytes(8), 1), None])

        for _ in range(100):
            tick()
        gc.collect()
        before = sys.getallocatedblocks()
        for _ in range(2000):
            tick()
        gc.collect()
        assert sys.getallocatedblocks() - before < 200  # one lost per tick would be 2000


def test_what_a_failing_call_had_taken_is_news_again():
    store = FrameStore()
    powerless, fault = (0x261, bytes(8), 1), (0x2A1, b"\1\6\1\0\0\0\0\0", 1)
    with pytest.raises(TypeError):
        store.take_frames([powerless, fault, None])
    assert store.take_frames([powerless, fault]) == [powerless, fault]
    assert store.take_frames([powerless, fault]) is None


def test_drain_takes_several_calls_and_then_hears_that_the_other_side_closed():
    near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with near, far:
        near.setblocking(False)
        status = b"\1\6\1\0\0\0\0\0"
        far.send(UNIX_FRAME.pack(0x2A1, 8, status, 1))
        for i in range(127):  # with the one above, two whole calls
            far.send(UNIX_FRAME.pack(0x2A5, 8, bytes(8), i))
        port, store = SocketPort(near.fileno(), RECEIVED_IDS), FrameStore()
        assert port.drain(store) == [(0x2A1, status, 1)]
        assert port.emptied
        assert store.n_frames == 128
        for i in range(64):
            far.send(UNIX_FRAME.pack(0x2A1, 8, status, i))
        far.close()
        with pytest.raises(EOFError):
            port.drain(store)
        assert store.n_frames == 192
        # Its news went down with the call.
        assert store.take_frames([(0x2A1, status, 9)]) == [(0x2A1, status, 9)]


def test_socketcan_frame_without_a_stamp_does_not_take_the_one_before_it_in_its_place(stamped):
    near, far = stamped
    port, packet = SocketPort(near.fileno(), None), CAN_FRAME.pack(0x2A5, 8, bytes(8))
    last_ns = 2**62
    far.send(packet)
    ((_, _, stamped_ns),) = port.drain(None, 0, 0, last_ns)
    assert stamped_ns < last_ns
    near.setsockopt(socket.SOL_SOCKET, SO_TIMESTAMPNS, 0)
    far.send(packet)
    assert port.drain(None, 0, 0, last_ns) == [(0x2A5, bytes(8), last_ns)]


def test_send_tells_how_many_the_kernel_took():
    near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with near, far:
        near.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        port, command = SocketPort(near.fileno(), RECEIVED_IDS), make_command([0] * 6, (0, 0))
        taken = [port.send(command)]
        while taken[-1] == 4:
            taken.append(port.send(command))
        assert taken[-1] < 4
        with pytest.raises(BlockingIOError):
            port.send(command)
        heard = [far.recv(64)[:16] for _ in range(sum(taken))]
        packed = [CAN_FRAME.pack(can_id, 8, data) for can_id, data in command]
        assert heard == (packed * len(taken))[: len(heard)]


def test_stamps_and_identifiers_beyond_all_bounds():
    store = FrameStore()
    ends = (-(2**63), 2**63 - 1, 0)
    store.take_frames([(i, bytes(8), t_ns) for i, t_ns in zip(JOINTS, ends, strict=True)])
    assert store.n_poses == 0
    near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with near, far:
        port = SocketPort(near.fileno(), RECEIVED_IDS)
        for can_id in (2**32, 2**64, -1):
            with pytest.raises(OverflowError):
                store.take_frames([(can_id, bytes(8), 0)])
            with pytest.raises(OverflowError):
                port.send([(can_id, bytes(8))])
        with pytest.raises(OverflowError):
            store.take_frames([(0x2A5, bytes(8), 2**63)])


MISSING = """
import sys
sys.modules["gwp_edge.drivers.piper_native"] = None
sys.argv[0] = "gwp-edge"
from gwp_edge.cli import main
main()
"""


def without_core(*arguments):
    command = [sys.executable, "-c", MISSING, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)


def test_driver_without_its_compiled_part_says_what_to_install():
    done = without_core("bench", "loop", "--duration", "1")
    assert done.returncode == 1
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert "the compiled part of the PiPER driver is missing: install a C compiler" in line


def test_everything_but_the_piper_works_without_the_compiled_part():
    code = (
        "import sys; sys.modules['gwp_edge.drivers.piper_native'] = None; import importlib\n"
        "for name in sys.argv[1:]: importlib.import_module(f'gwp_edge.{name}')"
    )
    drivers = ("sim", "kinematic", "recorded", "realsense", "lerobot_bridge", "piper_options")
    names = ("cli", "robots", "runtime", *(f"drivers.{name}" for name in drivers))
    command = [sys.executable, "-c", code]
    subprocess.run([*command, *names], check=True, timeout=120)
    done = subprocess.run([*command, "drivers.piper"], capture_output=True, text=True, check=False)
    assert "the compiled part of the PiPER driver is missing" in done.stderr


def test_doctor_without_the_compiled_part_warns_and_goes_on():
    done = without_core("doctor", "--json")
    status = {check["name"]: check["status"] for check in json.loads(done.stdout)["checks"]}
    assert status["piper driver"] == "warn"
    assert {"can", "cameras"} <= set(status) or any(name.startswith("can ") for name in status)


def test_build_of_other_sources_is_refused():
    code = (
        "import gwp_edge.drivers.piper_native as core; core.API += 1; "
        "import gwp_edge.drivers.piper_core"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 1
    assert "of another version" in done.stderr


def test_build_is_as_new_as_its_sources():
    """A checkout's own build; ``make`` renews it."""
    sources = list((Path(__file__).resolve().parents[2] / "drivers" / "piper_c").glob("*"))
    if not sources:
        pytest.skip("needs the checkout")
    built = Path(piper_native.__file__)
    assert max(source.stat().st_mtime for source in sources) <= built.stat().st_mtime
