"""The PiPER driver over real transports, and the vendor's own SDK against the fake arm."""

import socket
import threading
import time
import uuid

import numpy as np
import pytest
from arm_suite import ArmContract

can = pytest.importorskip("can")
pytest.importorskip("piper_sdk")

from gwp_edge.clock import MonotonicClock  # noqa: E402
from gwp_edge.drivers import piper_codec as codec  # noqa: E402
from gwp_edge.drivers.piper import PiperArm  # noqa: E402
from gwp_edge.drivers.piper_can import UNIX_FRAME  # noqa: E402
from gwp_edge.drivers.piper_fake import FakePiper  # noqa: E402
from gwp_edge.drivers.piper_fake_bus import FakeProcess, MemoryWire, VirtualFake  # noqa: E402
from gwp_edge.drivers.piper_feedback import CAN_ERR_FLAG, ERR_NO_ACK  # noqa: E402
from gwp_edge.drivers.piper_link import RECEIVED_IDS, CodecLink  # noqa: E402
from gwp_edge.drivers.piper_options import parse_options  # noqa: E402
from gwp_edge.errors import DeviceError, DeviceTimeoutError  # noqa: E402
from gwp_edge.spec import Channel  # noqa: E402

# Generous: these say "it hangs", not "it is slow".
PATIENCE_S = 20.0


class PatientArm(PiperArm):
    """Opens again where a busy machine starved the fake arm's thread or process."""

    def open(self, *, enable):
        deadline_s = time.monotonic() + PATIENCE_S
        while True:
            try:
                super().open(enable=enable)
            except DeviceTimeoutError:
                if time.monotonic() > deadline_s:
                    raise
            else:
                return


def make_arm(n_arms=1, *, clock=None, open_link=None, **options):
    names = [f"{side}_{i}" for side in ("left", "right")[:n_arms] for i in range(7)]
    channels = [
        Channel(name=name, unit="m" if name.endswith("6") else "rad", kind="absolute")
        for name in names
    ]
    return PatientArm(channels, parse_options(options), clock=clock, open_link=open_link)


def slow_fake(**settings):
    """Return a fake arm that talks less: python-can's virtual bus copies deeply per receiver."""
    return FakePiper(fast_hz=50, slow_hz=25, **settings)


def drive_to(arm, target, tolerance=1e-3):
    """Send ``target`` until the arm is there; return the state."""
    deadline_s = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline_s:
        arm.send(target)
        state = arm.state()
        if np.abs(state.position - target).max() < tolerance:
            return state
        time.sleep(0.005)
    raise AssertionError(f"not at {target} but at {state.position}, fault {state.fault}")


def wait_for(condition):
    deadline_s = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline_s, "waited in vain"
        time.sleep(0.005)


@pytest.fixture
def channel():
    return f"piper-{uuid.uuid4().hex[:8]}"


@pytest.mark.parametrize("driver", ["native", "piper-sdk"])
def test_virtual_bus_driver_enables_moves_and_leaves_it_holding(channel, driver):
    threads = threading.active_count()
    with VirtualFake(channel, slow_fake()) as bus:
        arm = make_arm(can=f"virtual:{channel}", driver=driver)
        arm.open(enable=True)
        state = arm.state()
        assert state.enabled
        target = state.position.copy()
        target[:7] += [0.2, 0.1, -0.1, 0.2, -0.1, 0.3, 0.01]
        drive_to(arm, target)
        wait_for(lambda: arm.state().fault is None)
        assert arm.units[0].firmware == "S-V1.8-8"
        assert arm.limits.position_max[6] == 0.07
        arm.close()
        assert bus.fake.enabled == [True] * 6
        assert not bus.fake.forbidden
    assert threading.active_count() == threads


@pytest.mark.parametrize("driver", ["native", "piper-sdk"])
def test_virtual_bus_driver_reads_the_same_state(channel, driver):
    pose = (12_345, 45_678, -56_789, -1_234, 2_345, -98_765)
    fake = slow_fake(joint_mdeg=pose)
    fake.gripper_um = 33_333.0
    fake.enabled = [True] * 6
    with VirtualFake(channel, fake):
        arm = make_arm(can=f"virtual:{channel}", driver=driver)
        arm.open(enable=False)
        state = arm.state()
        arm.close()
    assert state.position == pytest.approx([*np.radians(np.array(pose) / 1000), 0.033333])
    assert state.velocity[:6] == pytest.approx([0.0] * 6)
    assert state.enabled
    assert 0 <= time.monotonic_ns() - state.t_received_ns < PATIENCE_S * 1e9


def test_virtual_bus_teach_button_latches_with_the_sdk_driver_too(channel):
    with VirtualFake(channel, slow_fake()) as bus:
        arm = make_arm(can=f"virtual:{channel}", driver="piper-sdk")
        arm.open(enable=True)
        pose = arm.state().position
        bus.fake.press_teach()
        wait_for(lambda: arm.state().fault is not None)
        assert "someone pressed the teach button" in arm.state().fault
        with pytest.raises(DeviceError, match="teach"):
            arm.send(pose)
        arm.close()


def test_virtual_bus_error_frame_reaches_both_drivers(channel):
    with VirtualFake(channel, slow_fake()) as bus:
        for driver in ("native", "piper-sdk"):
            arm = make_arm(can=f"virtual:{channel}", driver=driver)
            arm.open(enable=False)
            bus.fake.bus_off()

            def bus_is_off(arm=arm):
                try:
                    arm.state()
                except DeviceError as e:
                    return "bus-off" in str(e)
                return False

            wait_for(bus_is_off)
            arm.close()


def test_sdk_driver_frame_that_is_not_sent_is_an_error(channel):
    with VirtualFake(channel, slow_fake()):
        arm = make_arm(can=f"virtual:{channel}", driver="piper-sdk")
        arm.open(enable=True)
        pose = arm.state().position
        link = arm.units[0]._link
        link._port.send_bus.shutdown()
        for _ in range(4):
            with pytest.raises(DeviceTimeoutError, match="dropped"):
                arm.send(pose)
        with pytest.raises(DeviceError, match="5 times in a row"):
            arm.send(pose)
        arm.close()


# --- the common contract ---


class TestPiperInMemory(ArmContract):
    @pytest.fixture
    def new_arm(self):
        clock = MonotonicClock()
        wires = {name: MemoryWire(FakePiper(), clock) for name in ("a", "b")}
        return lambda: make_arm(
            2,
            clock=clock,
            open_link=lambda name: CodecLink(wires[name].end(name)),
            left="a",
            right="b",
        )


class TestPiperInOtherProcesses(ArmContract):
    @pytest.fixture
    def new_arm(self, processes):
        left, right = processes
        return lambda: make_arm(2, left=left.channel, right=right.channel)


class TestPiperOnVirtualBus(ArmContract):
    @pytest.fixture(params=["native", "piper-sdk"])
    def new_arm(self, channel, request):
        # Two SDK interfaces cannot share a channel in one process: it keeps one per name. The
        # reading connection is then ours, as the guardian's is.
        drivers = iter([request.param])
        with VirtualFake(channel, slow_fake()):
            yield lambda: make_arm(can=f"virtual:{channel}", driver=next(drivers, "native"))


# --- the vendor's SDK, with its threads, as a program of its own ---


@pytest.fixture
def sdk(channel):
    import warnings

    from piper_sdk import C_PiperInterface_V2

    sdk = C_PiperInterface_V2(can_name=channel, judge_flag=False, can_auto_init=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # it passes bustype=
        sdk.CreateCanBus(channel, bustype="virtual", judge_flag=False)
    yield sdk
    sdk.DisconnectPort()
    # It joins none of its threads and has no call that ends the monitor.
    sdk._C_PiperInterface_V2__can_monitor_stop_event.set()
    sdk._C_PiperInterface_V2__fps_counter.stop()
    for name in ("can_deal_th", "can_monitor_th"):
        thread = getattr(sdk, f"_C_PiperInterface_V2__{name}")
        if thread is not None:
            thread.join(PATIENCE_S)
    type(sdk)._instances.pop(channel, None)


def test_vendor_sdk_enables_reads_and_moves_the_fake(channel, sdk):
    with VirtualFake(channel, slow_fake()) as bus:
        sdk.ConnectPort()

        def enabled():
            sdk.GetCanBus().send_bus.queue.queue.clear()
            return sdk.EnablePiper()

        wait_for(enabled)
        target = (10_000, 20_000, -30_000, 5_000, 10_000, -20_000)

        def there():
            sdk.MotionCtrl_2(1, 1, 100, 0)
            sdk.JointCtrl(*target)
            sdk.GripperCtrl(50_000, 1000, 1, 0)
            sdk.GetCanBus().send_bus.queue.queue.clear()
            j = sdk.GetArmJointMsgs().joint_state
            here = (j.joint_1, j.joint_2, j.joint_3, j.joint_4, j.joint_5, j.joint_6)
            opening = sdk.GetArmGripperMsgs().gripper_state.grippers_angle
            return max(abs(a - b) for a, b in zip(here, target, strict=True)) < 20 and (
                abs(opening - 50_000) < 20
            )

        wait_for(there)
        assert bus.fake.joint_mdeg == pytest.approx(target, abs=20)
        wait_for(lambda: sdk.GetPiperFirmwareVersion() == "S-V1.8-8")
        limits = sdk.GetAllMotorAngleLimitMaxSpd().all_motor_angle_limit_max_spd
        # The SDK files every joint's answer as one live object, so only the last is certain.
        assert limits.motor[6].max_angle_limit == 1200
        assert limits.motor[6].min_angle_limit == -1200
        assert sdk.GetArmStatus().arm_status.ctrl_mode == 1
        assert sdk.isOk()


def test_vendor_sdk_sees_our_driver_move_the_arm(channel, sdk):
    with VirtualFake(channel, slow_fake()):
        sdk.ConnectPort(piper_init=False)
        arm = make_arm(can=f"virtual:{channel}")
        arm.open(enable=True)
        target = arm.state().position.copy()
        target[0], target[6] = 0.25, 0.04
        drive_to(arm, target)
        expected = codec.rad_to_mdeg(0.25)[0]
        wait_for(
            lambda: (
                abs(sdk.GetArmJointMsgs().joint_state.joint_1 - expected) < 100
                and abs(sdk.GetArmGripperMsgs().gripper_state.grippers_angle - 40_000) < 1000
            )
        )
        # What it heard us command is what we meant.
        heard = sdk.GetArmJointCtrl().joint_ctrl
        assert heard.joint_1 == expected
        assert all(sdk.GetArmEnableStatus())
        arm.close()


def test_vendor_sdk_reads_the_end_pose_that_its_own_kinematics_gives(channel, sdk):
    from piper_sdk.kinematics.piper_fk import C_PiperForwardKinematics

    pose_mdeg = (12_345, 45_678, -56_789, -12_340, 23_450, -98_765)
    with VirtualFake(channel, slow_fake(joint_mdeg=pose_mdeg)) as bus:
        bus.fake.enabled = [True] * 6
        sdk.ConnectPort(piper_init=False)
        joints_rad = [codec.mdeg_to_rad(q) for q in pose_mdeg]
        *_, theirs = C_PiperForwardKinematics(dh_is_offset=0x01).CalFK(joints_rad)

        def read():
            p = sdk.GetArmEndPoseMsgs().end_pose
            return [p.X_axis, p.Y_axis, p.Z_axis, p.RX_axis, p.RY_axis, p.RZ_axis]

        wait_for(lambda: read() == pytest.approx([1000 * v for v in theirs], abs=1.0))


# --- other processes ---


@pytest.fixture(scope="module")
def processes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("can")
    with FakeProcess(str(folder / "l")) as left, FakeProcess(str(folder / "r")) as right:
        yield left, right


def test_two_arms_in_other_processes_move_and_are_held_by_a_second_program(processes):
    left, right = processes
    reach = {"left": left.channel, "right": right.channel}
    arm, guardian = make_arm(2, **reach), make_arm(2, **reach)
    arm.open(enable=True)
    target = arm.state().position.copy()
    target[0] += 0.2
    target[7] -= 0.2
    drive_to(arm, target)
    wait_for(lambda: arm.state().fault is None)
    guardian.open(enable=False)
    target[0] += 1.0
    for _ in range(60):
        arm.send(target)
        arm.state()
        time.sleep(0.005)
    guardian.state()
    guardian.hold()
    wait_for(lambda: arm.state().fault is not None)
    assert "another program" in arm.state().fault
    arm.close()
    wait_for(lambda: abs(guardian.state().velocity[0]) < 1e-3)
    held = left.look()[1][0]
    assert left.look()[0][0] == pytest.approx(held, abs=20)
    assert held < np.degrees(target[0]) * 1000 - 1_000
    guardian.close()


def test_arm_in_another_process_that_stops_reading_fills_the_queue(processes):
    left, _ = processes
    arm = make_arm(can=left.channel)
    arm.open(enable=True)
    pose = arm.state().position
    left.set_deaf(deaf=True)
    try:
        errors = []
        while len(errors) < 5:
            try:
                arm.send(pose)
            except DeviceError as e:
                errors.append(e)
        assert [type(e) for e in errors] == [DeviceTimeoutError] * 4 + [DeviceError]
        assert "transmit queue is full" in str(errors[0])
        assert "5 times in a row" in str(errors[4])
    finally:
        left.set_deaf(deaf=False)
        arm.close()


def test_bus_in_another_process_delivers_only_what_a_kernel_filter_would(processes):
    """It sent everything, so that drivers paid for frames which a real socket never hands over."""
    left, _ = processes
    other = make_arm(can=left.channel)
    other.open(enable=False)
    heard = set()
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as raw:
        raw.settimeout(PATIENCE_S)
        raw.connect(left.channel.removeprefix("unix:"))
        left.call("error_frame", ERR_NO_ACK)
        while not {CAN_ERR_FLAG | ERR_NO_ACK, codec.ID_FIRMWARE, 0x2A1, 0x266} <= heard:
            if codec.ID_FIRMWARE not in heard:
                other.units[0]._link.ask(0)
            other.units[0]._link.mode(100)  # for the arm alone
            heard.add(UNIX_FRAME.unpack(raw.recv(UNIX_FRAME.size))[0])
    other.close()
    assert {can_id for can_id in heard if not can_id & CAN_ERR_FLAG} <= set(RECEIVED_IDS)
    assert codec.ID_MODE in left.look()[2]


def test_arm_in_another_process_that_falls_silent_and_returns(processes):
    left, _ = processes
    arm = make_arm(can=left.channel)
    arm.open(enable=False)
    left.set_faults(silent=True)
    try:
        wait_for(lambda: arm.state().fault is not None)
        assert "no joint angles feedback for" in arm.state().fault
    finally:
        left.set_faults(silent=False)
    wait_for(lambda: arm.state().fault is None)
    arm.close()


def test_process_that_ends_closes_the_bus(tmp_path):
    with FakeProcess(str(tmp_path / "bus")) as fake:
        arm = make_arm(can=fake.channel)
        arm.open(enable=True)
        pose = arm.state().position
    with pytest.raises(DeviceError, match=r"closed by the other side|failed"):
        wait_for(lambda: arm.state() is None)  # what is still on the way is read first
    with pytest.raises(DeviceError):
        arm.send(pose)
    arm.close()


def test_nobody_listens_says_so(tmp_path):
    with pytest.raises(DeviceError, match="nothing listens there"):
        make_arm(can=f"unix:{tmp_path}/none").open(enable=False)


def test_driver_benchmark_measures_every_tick():
    from gwp_edge.drivers.piper_bench import measure_driver_cost

    cost = measure_driver_cost(n_ticks=20, n_warm_up=5, n_holds=3)
    assert cost.n_ticks == 20
    assert cost.n_frames > 0
    for values in (cost.tick_us, cost.cpu_us, cost.state_us, cost.again_us, cost.hold_us):
        assert 0 < values[0] <= values[1] <= values[2] <= values[3]
