"""The vendor's piper-sdk behind the same driver: ``driver = "piper-sdk"``.

The SDK packs every command and unpacks every frame; bring-up, fault handling and limits stay
ours. Its threads are not started: they would share this process with the motor loop and cost it
tens of milliseconds. Frames are read here without blocking and handed to its ``ParseCANFrame``.
Not yet run on hardware.
"""

from __future__ import annotations

import logging
import warnings
from typing import TYPE_CHECKING, Any

from gwp_edge.drivers import piper_codec as codec
from gwp_edge.drivers.can_interface import check_interface
from gwp_edge.drivers.piper_can import CanBusyError, RealtimeOffset
from gwp_edge.drivers.piper_feedback import CAN_ERR_FLAG, PiperFeedback
from gwp_edge.drivers.piper_link import RECEIVED_IDS, Command, gripper_of, joints_of
from gwp_edge.errors import DeviceError

if TYPE_CHECKING:
    import can

logger = logging.getLogger(__name__)

_MAX_DRAIN = 512
_COMMAND_IDS = (codec.ID_JOINTS_12, codec.ID_JOINTS_34, codec.ID_JOINTS_56)


class SdkLink:
    """A ``PiperLink`` that is the vendor's ``C_PiperInterface_V2``. Threads: one owner."""

    def __init__(self, name: str, sdk: Any, *, hears_itself: bool) -> None:  # noqa: ANN401 - untyped SDK
        """Take over a connected SDK interface.

        Args:
            name: the channel, for messages.
            sdk: a ``C_PiperInterface_V2`` after ``CreateCanBus``.
            hears_itself: its receiving bus gets what its sending bus sends.
        """
        self._name = name
        self._sdk = sdk
        self._port = sdk.GetCanBus()
        self._receive_bus: can.BusABC = self._port.recv_bus
        self._send_bus: can.BusABC = self._port.send_bus
        self._ignored = _COMMAND_IDS if hears_itself else ()
        self._offset = RealtimeOffset()
        self._failure: object = None
        self._plain_send = self._port.SendCanMessage
        # The SDK's commands return None and only log a frame that was not sent.
        self._port.SendCanMessage = self._checked_send

    @classmethod
    def open(cls, channel: str) -> SdkLink:
        """Open ``channel`` through the SDK: an interface name, or ``virtual:NAME``.

        Raises:
            DeviceError: the SDK is missing, or the channel does not open.
        """
        try:
            from piper_sdk import C_PiperInterface_V2
        except ImportError as e:
            raise DeviceError(
                'piper-sdk is missing, which driver = "piper-sdk" needs: pip install '
                "'gwp-edge[piper]'"
            ) from e
        kind, colon, rest = channel.partition(":")
        virtual = bool(colon) and kind == "virtual"
        if colon and not virtual:
            raise DeviceError(
                f"CAN channel {channel}: piper-sdk takes an interface name or virtual:NAME"
            )
        name = rest if virtual else channel
        if not virtual:
            check_interface(name)
        sdk = C_PiperInterface_V2(can_name=name, judge_flag=False, can_auto_init=False)
        try:
            with warnings.catch_warnings():
                # The SDK passes bustype=, which python-can 4 deprecates and 5 removes; the extra
                # pins python-can below 5.
                warnings.simplefilter("ignore", DeprecationWarning)
                sdk.CreateCanBus(
                    name, bustype="virtual" if virtual else "socketcan", judge_flag=False
                )
        except ConnectionError as e:
            raise DeviceError(f"CAN channel {channel}: piper-sdk cannot open it: {e}") from e
        if sdk.GetCanBus().recv_bus is None or sdk.GetCanBus().send_bus is None:
            raise DeviceError(f"CAN channel {channel}: piper-sdk could not open it")
        if not virtual:
            filters = [{"can_id": i, "can_mask": 0x7FF, "extended": False} for i in RECEIVED_IDS]
            sdk.GetCanBus().recv_bus.set_filters(filters)
        return cls(channel, sdk, hears_itself=virtual)

    def _checked_send(self, *arguments: object, **keywords: object) -> object:
        status = self._plain_send(*arguments, **keywords)
        if status != self._port.CAN_STATUS.SEND_MESSAGE_SUCCESS:
            self._failure = status
        return status

    def _finish(self) -> None:
        """Raise what the SDK swallowed since the last call."""
        failure, self._failure = self._failure, None
        if failure is not None:
            # It drops the reason, so a full queue cannot be told from a dead bus: count it as
            # busy; five in a row end the run.
            raise CanBusyError(f"CAN channel {self._name}: piper-sdk did not send ({failure})")

    def poll(self, feedback: PiperFeedback) -> None:
        """Let the SDK decode everything that waits, and take the values that it read."""
        import can

        if self._port.recv_bus is None:
            raise DeviceError(f"CAN channel {self._name} is closed")
        self._offset.begin_drain()
        try:
            for _ in range(_MAX_DRAIN):
                message = self._receive_bus.recv(timeout=0)
                if message is None:
                    self._offset.end_drain()
                    break
                self._take(message, feedback)
            # Its sending bus also receives; nobody else would empty it.
            while self._send_bus.recv(timeout=0) is not None:
                pass
        except can.CanError as e:
            raise DeviceError(f"CAN channel {self._name} failed: {e}") from e

    def _take(self, message: can.Message, feedback: PiperFeedback) -> None:
        can_id, data = message.arbitration_id, bytes(message.data)
        t_ns = self._offset.monotonic_ns(int(message.timestamp * 1e9))
        if message.is_error_frame:
            feedback.ingest(((can_id | CAN_ERR_FLAG, data, t_ns),))
            return
        if can_id in self._ignored or len(data) != 8:
            return
        self._sdk.ParseCANFrame(message)
        fields = self._decoded(can_id)
        if fields is not None:  # else firmware, and what it does not know
            data = codec.LAYOUTS[can_id].pack(*fields)
        feedback.ingest(((can_id, data, t_ns),))

    def _decoded(self, can_id: int) -> tuple[int, ...] | None:
        """Return the SDK's reading of the frame that it parsed last, as our decoder orders it."""
        m = self._sdk.rx_msg
        if can_id in codec.ID_JOINT_FEEDBACK:
            k = 2 * (can_id - codec.ID_JOINT_FEEDBACK[0]) + 1
            joints = m.arm_joint_feedback
            return getattr(joints, f"joint_{k}"), getattr(joints, f"joint_{k + 1}")
        if can_id == codec.ID_STATUS:
            s = self._sdk.GetArmStatus().arm_status
            return (
                int(m.arm_status_msgs.ctrl_mode),
                int(m.arm_status_msgs.arm_status),
                int(m.arm_status_msgs.mode_feed),
                int(m.arm_status_msgs.teach_status),
                int(m.arm_status_msgs.motion_status),
                int(m.arm_status_msgs.trajectory_num),
                int(s.err_code) >> 8,
                int(s.err_code) & 0xFF,
            )
        if can_id in codec.ID_MOTOR_FAST:
            f = getattr(m, f"arm_high_spd_feedback_{can_id - 0x250}")
            return f.motor_speed, f.current, f.pos
        if can_id in codec.ID_MOTOR_SLOW:
            d = getattr(m, f"arm_low_spd_feedback_{can_id - 0x260}")
            return d.vol, d.foc_temp, d.motor_temp, d.foc_status_code, d.bus_current
        if can_id == codec.ID_GRIPPER_FEEDBACK:
            g = m.gripper_feedback
            return g.grippers_angle, g.grippers_effort, g.status_code, 0
        if can_id == codec.ID_LIMIT:
            n = m.arm_feedback_current_motor_angle_limit_max_spd
            return n.motor_num, n.max_angle_limit, n.min_angle_limit, n.max_joint_spd
        if can_id == codec.ID_ACCELERATION:
            a = m.arm_feedback_current_motor_max_acc_limit
            return a.joint_motor_num, a.max_joint_acc
        if can_id == codec.ID_GRIPPER_PARAMETER:
            p = m.arm_gripper_teaching_param_feedback
            return p.teaching_range_per, p.max_range_config, p.teaching_friction
        return None

    def command(self, command: Command) -> None:
        """Send one tick's targets; they have been checked by our codec."""
        self._sdk.JointCtrl(*joints_of(command))
        gripper = gripper_of(command)
        if gripper is not None:
            stroke_um, effort_mnm = gripper
            self._sdk.GripperCtrl(stroke_um, effort_mnm, codec.GRIPPER_ENABLE, 0)
        self._finish()

    def mode(self, speed_percent: int) -> None:
        """Send the mode command."""
        self._sdk.MotionCtrl_2(codec.MODE_CAN, codec.MOVE_J, speed_percent, 0)
        self._finish()

    def enable(self, joint: int) -> None:
        """Power one motor."""
        self._sdk.EnableArm(joint)
        self._finish()

    def ask(self, joint: int) -> None:
        """Send the questions about ``joint``, or with 0 those about the arm."""
        if joint == 0:
            self._sdk.SearchPiperFirmwareVersion()
            self._sdk.ArmParamEnquiryAndConfig(param_enquiry=codec.PARAMETER_GRIPPER)
        else:
            self._sdk.SearchMotorMaxAngleSpdAccLimit(joint, codec.QUERY_LIMIT)
            self._sdk.SearchMotorMaxAngleSpdAccLimit(joint, codec.QUERY_ACCELERATION)
        self._finish()

    def close(self) -> None:
        """Close both of the SDK's buses; safe to call twice."""
        self._port.SendCanMessage = self._plain_send
        self._port.Close()
