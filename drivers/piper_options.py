"""The PiPER part of a robot file, checked."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal

import msgspec

from gwp_edge.drivers.piper_codec import GRIPPER_EFFORT_CAP_MNM
from gwp_edge.errors import SpecError


class PiperOptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How to reach one or two arms and how to drive them.

    Attributes:
        can: channel of a single arm, such as ``can_left``; see ``piper_can.open_transport``.
        left: channel of the left arm of two; with ``right``, instead of ``can``.
        right: channel of the right arm of two.
        driver: ``native`` for our codec, ``piper-sdk`` for the vendor's library.
        speed_percent: cap on the arm's own speed; 100 for streaming, as our limits come first.
        gripper_effort_nm: gripper torque, N.m, 0 to 2.
        gripper_max_m: widest opening, m, at most 0.1.
        drift: what a difference between joint angles and motor positions does: ``fault``,
            ``warn``, ``off``, or ``auto`` (a fault on firmware that is known for it).
    """

    can: str | None = None
    left: str | None = None
    right: str | None = None
    driver: Literal["native", "piper-sdk"] = "native"
    speed_percent: int = 100
    gripper_effort_nm: float = 1.0
    gripper_max_m: float = 0.07
    drift: Literal["auto", "fault", "warn", "off"] = "auto"

    def __post_init__(self) -> None:
        single = self.can is not None
        dual = self.left is not None and self.right is not None
        if single == dual or (single and (self.left or self.right)):
            raise ValueError(
                'expected either can = "can0" for one arm, or left = "can_left" and '
                'right = "can_right" for two'
            )
        if "" in (self.can, self.left, self.right):
            raise ValueError("a CAN channel has an empty name")
        if self.left is not None and self.left == self.right:
            raise ValueError(
                f"left and right are both {self.left}: one CAN bus cannot carry two arms, give "
                "each its own adapter"
            )
        if not 1 <= self.speed_percent <= 100:
            raise ValueError(f"speed_percent: expected 1 to 100, got {self.speed_percent}")
        cap_nm = GRIPPER_EFFORT_CAP_MNM / 1000
        if not 0.0 < self.gripper_effort_nm <= cap_nm or not math.isfinite(self.gripper_effort_nm):
            raise ValueError(
                f"gripper_effort_nm: expected above 0 up to {cap_nm}, got {self.gripper_effort_nm}"
            )
        if not 0.0 < self.gripper_max_m <= 0.1:
            raise ValueError(f"gripper_max_m: expected above 0 up to 0.1, got {self.gripper_max_m}")

    @property
    def arms(self) -> tuple[tuple[str, str], ...]:
        """(name for messages, channel) of each arm, left first."""
        if self.can is not None:
            return ((f"arm ({self.can})", self.can),)
        # __post_init__ has made sure that both are there.
        return (
            (f"left arm ({self.left})", self.left or ""),
            (f"right arm ({self.right})", self.right or ""),
        )


def parse_options(options: Mapping[str, object]) -> PiperOptions:
    """Return the checked options.

    Raises:
        SpecError: unknown, missing or impossible; names the field.
    """
    try:
        return msgspec.convert(dict(options), PiperOptions)
    except msgspec.ValidationError as e:
        known = ", ".join(PiperOptions.__struct_fields__)
        raise SpecError(f"robot file, piper: {e} (fields: {known})") from e


def with_driver(options: Mapping[str, object], driver: str | None) -> dict[str, object]:
    """Return ``options`` with another ``driver`` unless that is None; all of them are checked.

    Raises:
        SpecError: as ``parse_options``.
    """
    chosen = dict(options) if driver is None else {**options, "driver": driver}
    parse_options(chosen)
    return chosen
