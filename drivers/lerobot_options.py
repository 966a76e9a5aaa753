"""What may be chosen about a LeRobot robot, and how its numbers become radians and metres."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import msgspec
import numpy as np

from gwp_edge.errors import SpecError
from gwp_edge.safety import with_margin
from gwp_edge.spec import Channel, PolicySpec
from gwp_edge.types import FloatArray, JointLimits

SOCKET_KEY: Final = "lerobot_socket"
# Feature units by name: what one of them is in rad or m, for channels of that unit.
_SCALES: Final[dict[str, tuple[str, float]]] = {
    "deg": ("rad", math.pi / 180.0),
    "rad": ("rad", 1.0),
    "m": ("m", 1.0),
    "mm": ("m", 1e-3),
}
_NORMALISED: Final[dict[str, tuple[float, float]]] = {
    "-100..100": (-100.0, 100.0),
    "0..100": (0.0, 100.0),
    "0..1": (0.0, 1.0),
    "-1..1": (-1.0, 1.0),
}
UNITS: Final = (*_SCALES, *_NORMALISED)


class LerobotOptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What may be chosen.

    Attributes:
        type: LeRobot's name of the robot, such as so101_follower.
        units: unit of every feature, one for all or by channel name; one of ``UNITS``.
        ranges: ends of normalised features by channel name, rad or m: (lowest, highest).
        features: feature of each channel by channel name, where they differ from the channel's
            name and from that name with ``.pos``.
        cameras: camera feature by role, for the roles that this robot's own cameras play.
        config: fields of the robot's LeRobot configuration, such as port and id.
        python: interpreter that has lerobot; by default the one that runs this.
        plugins: modules to import first, so that they register their robots.
        rate_hz: observations and actions per second.
        camera_delay_ms: age of a picture when LeRobot hands it out, which it does not say.
        connect_timeout_s: time for importing lerobot and connecting.
        patience_s: the robot may fail to answer for so long.
        velocity_max_rad_s: speed limit of every joint.
        velocity_max_m_s: of every channel in metres.
        acceleration_max_rad_s2: acceleration limit of every joint.
        acceleration_max_m_s2: of every channel in metres.
    """

    type: str
    units: str | dict[str, str]
    ranges: dict[str, tuple[float, float]] = msgspec.field(default_factory=dict)
    features: dict[str, str] = msgspec.field(default_factory=dict)
    cameras: dict[str, str] = msgspec.field(default_factory=dict)
    config: dict[str, Any] = msgspec.field(default_factory=dict)
    python: str = sys.executable
    plugins: tuple[str, ...] = ()
    rate_hz: float = 50.0
    camera_delay_ms: float = 33.0
    connect_timeout_s: float = 120.0
    patience_s: float = 1.0
    velocity_max_rad_s: float = 1.5
    velocity_max_m_s: float = 0.1
    acceleration_max_rad_s2: float = 5.0
    acceleration_max_m_s2: float = 1.0

    def __post_init__(self) -> None:
        for name in self.__struct_fields__:
            value = getattr(self, name)
            if isinstance(value, float) and not (math.isfinite(value) and value >= 0.0):
                raise ValueError(f"{name}: expected a number from 0, got {value}")
        if not 1.0 <= self.rate_hz <= 500.0:
            raise ValueError(f"rate_hz: expected 1 to 500, got {self.rate_hz}")
        units = [self.units] if isinstance(self.units, str) else list(self.units.values())
        for unit in units:
            if unit not in UNITS:
                raise ValueError(f"unit {unit!r}: expected one of {', '.join(UNITS)}")


@dataclass(frozen=True, slots=True, kw_only=True)
class FeatureMap:
    """Robot features in the order of the policy's channels, value = offset + scale x feature.

    Attributes:
        features: names, D of them.
        offset: rad and m, (D,).
        scale: rad and m per unit of the feature, (D,).
        limits: of the channels.
    """

    features: tuple[str, ...]
    offset: FloatArray
    scale: FloatArray
    limits: JointLimits

    def to_channels(self, values: FloatArray) -> FloatArray:
        """Return feature values as rad and m, (D,)."""
        result: FloatArray = self.offset + self.scale * values
        return result

    def to_features(self, position: FloatArray) -> FloatArray:
        """Return rad and m as feature values, (D,)."""
        result: FloatArray = (position - self.offset) / self.scale
        return result


def parse_options(options: Mapping[str, object]) -> LerobotOptions:
    """Check ``options``; what the world added is left aside.

    Raises:
        SpecError: an option is missing, unknown, of another type, or out of range.
    """
    given = {k: v for k, v in options.items() if k != SOCKET_KEY}
    try:
        return msgspec.convert(given, LerobotOptions, strict=False)
    except msgspec.ValidationError as e:
        known = ", ".join(LerobotOptions.__struct_fields__)
        raise SpecError(f"option of the LeRobot robot: {e}; options are {known}") from e


def parse_name(name: str) -> dict[str, object]:
    """Return the options in ``lerobot:TYPE[,key=value...]``; ``config.key`` reaches the config.

    Raises:
        SpecError: it is not of this form.
    """
    kind, *pairs = name.removeprefix("lerobot:").split(",")
    if not kind:
        raise SpecError(
            "--robot lerobot: expected a type, such as lerobot:so101_follower,units=deg"
        )
    options: dict[str, object] = {"type": kind}
    config: dict[str, object] = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        if not (key and equals):
            raise SpecError(f"--robot {name}: expected key=value after the type, got {pair!r}")
        if key.startswith("config."):
            try:
                config[key.removeprefix("config.")] = json.loads(text)
            except ValueError:
                config[key.removeprefix("config.")] = text
        else:
            options[key] = text
    return {**options, "config": config} if config else options


def map_features(options: LerobotOptions, spec: PolicySpec) -> FeatureMap:
    """Return which feature is which channel, in which unit.

    Raises:
        SpecError: a channel has no unit, a unit of another kind or no range, or a name is unknown.
    """
    names = [c.name for c in spec.channels]
    for what, keys in (
        ("ranges", options.ranges),
        ("features", options.features),
        ("units", {} if isinstance(options.units, str) else options.units),
    ):
        if strangers := sorted(set(keys) - set(names)):
            raise SpecError(
                f"{what} of {', '.join(strangers)}: the policy's channels are {', '.join(names)}"
            )
    features = tuple(options.features.get(name, f"{name}.pos") for name in names)
    if len(set(features)) != len(features):
        raise SpecError(f"two channels are one feature: {', '.join(features)}")
    offset, scale = np.array([_convert(options, c) for c in spec.channels]).T
    return FeatureMap(
        features=features,
        offset=offset,
        scale=scale,
        limits=_limits(options, spec.channels),
    )


def _convert(options: LerobotOptions, channel: Channel) -> tuple[float, float]:
    """Return offset and scale of one channel."""
    units = options.units
    unit = units if isinstance(units, str) else units.get(channel.name)
    if unit is None:
        raise SpecError(f"channel {channel.name}: say its unit; one of {', '.join(UNITS)}")
    if unit in _SCALES:
        of, scale = _SCALES[unit]
        if of != channel.unit:
            raise SpecError(
                f"channel {channel.name} is in {channel.unit}, its feature in {unit}; a normalised "
                "feature needs units (such as 0..100) and ranges for this channel"
            )
        return 0.0, scale
    low, high = _NORMALISED[unit]
    least, most = _range(options, channel)
    scale = (most - least) / (high - low)
    return least - scale * low, scale


def _range(options: LerobotOptions, channel: Channel) -> tuple[float, float]:
    given = options.ranges.get(channel.name)
    if given is None:
        raise SpecError(
            f"channel {channel.name}: say in ranges which {channel.unit} the ends of its "
            "normalised feature are"
        )
    if not (all(map(math.isfinite, given)) and given[0] != given[1]):
        raise SpecError(f"channel {channel.name}: expected a range of two ends, got {given}")
    return given


def _limits(options: LerobotOptions, channels: Sequence[Channel]) -> JointLimits:
    """Return the given ranges less a margin; without one a full turn, or 0 to 0.1 m.

    LeRobot tells none. A gripper has no margin: it must be able to close.
    """
    is_rad = np.array([c.unit == "rad" for c in channels])
    ends = [
        sorted(options.ranges.get(c.name, (-math.pi, math.pi) if c.unit == "rad" else (0.0, 0.1)))
        for c in channels
    ]
    limits = JointLimits(
        position_min=np.array([low for low, _ in ends]),
        position_max=np.array([high for _, high in ends]),
        velocity_max=np.where(is_rad, options.velocity_max_rad_s, options.velocity_max_m_s),
        acceleration_max=np.where(
            is_rad, options.acceleration_max_rad_s2, options.acceleration_max_m_s2
        ),
    )
    return with_margin(limits, channels, margin_m=0.0)
