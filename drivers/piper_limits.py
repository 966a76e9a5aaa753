"""Limits of a PiPER: what the sources agree on, cut down by what the arm itself answers."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass

from gwp_edge.drivers import piper_codec as codec
from gwp_edge.drivers.piper_feedback import PiperFeedback
from gwp_edge.errors import DeviceError

logger = logging.getLogger(__name__)

# rad, as the two published sources have them: piper_sdk 0.6.2 piper_param_manager.py and
# piper_control 1.5.0. They disagree on joint 6 and elsewhere, so both must be kept.
_SDK = (
    (-2.6179, 2.6179),
    (0.0, 3.14),
    (-2.967, 0.0),
    (-1.745, 1.745),
    (-1.22, 1.22),
    (-2.09439, 2.09439),
)
_CONTROL = (
    (-2.687, 2.687),
    (0.0, 3.403),
    (-3.054, 0.0),
    (-1.745, 1.954),
    (-1.309, 1.309),
    (-1.745, 1.745),
)
MARGIN_RAD = math.radians(2.0)
MAX_SPEED_RAD_S = 3.0
MAX_ACCELERATION_RAD_S2 = 5.0
# The vendor names no limits for the gripper; these close it in a third of a second.
GRIPPER_SPEED_M_S = 0.25
GRIPPER_ACCELERATION_M_S2 = 2.0
_LEAST_SPAN_DDEG = 100
_MOST_DDEG = 3600


@dataclass(frozen=True, slots=True, kw_only=True)
class PiperLimits:
    """Limits of one arm, joints 1 to 6 then the gripper; rad and m, per s, per s^2.

    Attributes:
        position_min: with the margin; what a caller may ask for.
        position_max: with the margin.
        velocity_max: largest speeds.
        acceleration_max: largest accelerations.
    """

    position_min: tuple[float, ...]
    position_max: tuple[float, ...]
    velocity_max: tuple[float, ...]
    acceleration_max: tuple[float, ...]


def _speed_rad_s(raw: int) -> float:
    # The unit is 0.01 rad/s by the vendor's answers and 0.001 rad/s by its SDK's text. 3 rad/s is
    # the motors' most, so a value that would be over it as hundredths is in thousandths.
    hundredths = raw * 0.01
    return hundredths if hundredths <= MAX_SPEED_RAD_S * 1.2 else raw * 0.001


def check_answers(feedback: PiperFeedback) -> None:
    """Check that the arm's own limits make sense.

    Raises:
        DeviceError: one is absurd or was not answered; names the joint and what to do.
    """
    for j, answer in enumerate(feedback.limits, start=1):
        if answer is None:
            raise DeviceError(
                f"{feedback.name}: joint {j} did not answer its limits (0x472): switch the arm "
                "off and on; if it stays, its driver needs the vendor"
            )
        maximum, minimum, speed = answer
        if maximum - minimum < _LEAST_SPAN_DDEG or max(abs(maximum), abs(minimum)) > _MOST_DDEG:
            raise DeviceError(
                f"{feedback.name}: joint {j} stores absurd limits (max {maximum / 10} deg, min "
                f"{minimum / 10} deg): restore its defaults with the vendor's tool"
            )
        if speed == 0:
            raise DeviceError(
                f"{feedback.name}: joint {j} stores a speed limit of 0: restore its defaults with "
                "the vendor's tool"
            )


def limits_from(feedback: PiperFeedback, *, gripper_max_m: float) -> PiperLimits:
    """Return the intersection of both sources and the arm's answers, less the margin.

    Args:
        feedback: with the answers of all joints, checked by ``check_answers``.
        gripper_max_m: the configured opening, m.

    Raises:
        DeviceError: nothing is left of a joint's range.
    """
    low, high, speeds, accelerations = [], [], [], []
    for j, answer in enumerate(feedback.limits):
        maximum, minimum, speed = answer or (_MOST_DDEG, -_MOST_DDEG, 300)
        a = max(_SDK[j][0], _CONTROL[j][0], math.radians(minimum / 10)) + MARGIN_RAD
        b = min(_SDK[j][1], _CONTROL[j][1], math.radians(maximum / 10)) - MARGIN_RAD
        if a >= b:
            raise DeviceError(
                f"{feedback.name}: joint {j + 1} has no range left between its stored limits "
                f"({minimum / 10} to {maximum / 10} deg) and the published ones: restore its "
                "defaults with the vendor's tool"
            )
        low.append(a)
        high.append(b)
        speeds.append(min(MAX_SPEED_RAD_S, _speed_rad_s(speed)))
        raw = feedback.acceleration_crad_s2[j]
        accelerations.append(min(MAX_ACCELERATION_RAD_S2, raw * 0.01) if raw else 5.0)
    stroke_m = gripper_stroke_m(feedback)
    return PiperLimits(
        position_min=(*low, 0.0),
        position_max=(*high, gripper_max_m if stroke_m is None else min(gripper_max_m, stroke_m)),
        velocity_max=(*speeds, GRIPPER_SPEED_M_S),
        acceleration_max=(*accelerations, GRIPPER_ACCELERATION_M_S2),
    )


def gripper_stroke_m(feedback: PiperFeedback) -> float | None:
    """Return the gripper's stored stroke, m, or None where the firmware does not answer.

    Raises:
        DeviceError: the stroke was never set; says how to set it.
    """
    parameter = feedback.gripper_parameter
    if parameter is None:
        return None
    stroke_mm = parameter[1]
    if stroke_mm not in (70, 100):
        raise DeviceError(
            f"{feedback.name}: the gripper's stroke is not set (it says {stroke_mm} mm, expected "
            "70 or 100): with the vendor's tool disable the gripper, set its stroke, close it by "
            "hand and set its zero"
        )
    return stroke_mm / 1000.0


KNOWN_DRIFT_FIRMWARE = (1, 8, 6)


def check_firmware(feedback: PiperFeedback) -> tuple[str, bool]:
    """Return the firmware's name and whether its feedback is known to drift; logs a warning."""
    parsed = codec.parse_firmware(feedback.firmware_text)
    if parsed is None:
        logger.warning("%s: the firmware did not say its version", feedback.name)
        return "unknown", False
    text, version = parsed
    drifts = version == KNOWN_DRIFT_FIRMWARE
    if drifts:
        logger.warning(
            "%s: firmware %s is known to report wrong joint angles after a hard push; motor "
            "positions are compared with them, and a difference stops the run; update the firmware",
            feedback.name,
            text,
        )
    return text, drifts
