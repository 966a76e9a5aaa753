"""Does a dataset fit a policy? Names, counts, units, rate and lengths."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from gwp_edge.errors import SpecError
from gwp_edge.spec import PolicySpec

if TYPE_CHECKING:
    from gwp_edge.lerobot.dataset import LeRobotDataset

_PERIOD_TOLERANCE = 1e-3
# No arm turns a joint by two full turns either way, and no gripper opens a metre: beyond these
# the numbers are degrees, encoder ticks, per cent or millimetres.
_PLAUSIBLE = {"rad": 4.0 * np.pi, "m": 1.0}


def channel_name(name: str) -> str:
    """Return a feature's entry as a channel name: ``left_joint1.pos`` is ``left_joint1``."""
    return name.removesuffix(".pos")


def check_against(
    dataset: LeRobotDataset, spec: PolicySpec, *, episodes: Sequence[int] | None = None
) -> None:
    """Check that ``dataset`` is of the kind that the policy was trained on.

    LeRobot datasets do not record units, so units are judged by magnitude: a dataset in degrees,
    per cent or millimetres is found as soon as one value is out of any arm's reach.

    Args:
        dataset: the dataset; the rows of ``episodes`` are read, its videos are not.
        spec: the policy.
        episodes: episodes that will be used; all by default.

    Raises:
        SpecError: the first of these that does not fit: camera missing, rate, number, names or
            order of channels, an episode shorter than a chunk, values that cannot be in the
            channel's unit.
    """
    missing = [c for c in spec.cameras if c not in dataset.cameras]
    if missing:
        raise SpecError(
            f"{dataset.name}: the policy needs camera {missing[0]}; the dataset has "
            f"{', '.join(dataset.cameras) or 'none'}"
        )
    period_ns = 1e9 / dataset.fps
    if abs(period_ns - spec.period_ns) > _PERIOD_TOLERANCE * spec.period_ns:
        raise SpecError(
            f"{dataset.name}: expected {1e9 / spec.period_ns:.4g} fps as the policy runs, "
            f"got {dataset.fps:g}"
        )
    _check_names(dataset, spec)
    for idx in range(dataset.n_episodes) if episodes is None else episodes:
        n_frames = dataset.episode(idx).n_frames
        if n_frames < spec.n_rows:
            raise SpecError(
                f"{dataset.name}: episode {idx} has {n_frames} frames, a chunk has "
                f"{spec.n_rows}; leave this episode out"
            )
        _check_units(dataset, spec, idx)


def _check_names(dataset: LeRobotDataset, spec: PolicySpec) -> None:
    expected = [channel_name(c.name) for c in spec.channels]
    for what, key, names in (
        ("state", "observation.state", dataset.state_names),
        ("action", "action", dataset.action_names),
    ):
        (n,) = dataset.info.features[key].shape
        if n != spec.n_channels:
            raise SpecError(f"{dataset.name}: expected {spec.n_channels} {what} channels, got {n}")
        if not names:
            raise SpecError(
                f"{dataset.name}: meta/info.json does not name the entries of {key}; add names so "
                "that their order can be checked"
            )
        got = [channel_name(name) for name in names]
        for i, (a, b) in enumerate(zip(expected, got, strict=True)):
            if a != b:
                hint = "in another order" if sorted(got) == sorted(expected) else "not the policy's"
                raise SpecError(
                    f"{dataset.name}: {what} channel {i} should be {a}, got {b}; "
                    f"the dataset's channels are {hint}"
                )


def _check_units(dataset: LeRobotDataset, spec: PolicySpec, idx: int) -> None:
    data = dataset.data(idx)
    for what, rows in (("state", data.state), ("action", data.action)):
        reach = np.abs(rows).max(axis=0)
        for channel, value in zip(spec.channels, reach.tolist(), strict=True):
            if value > _PLAUSIBLE[channel.unit]:
                raise SpecError(
                    f"{dataset.name}: episode {idx}, {what} of {channel.name} reaches "
                    f"{value:.4g} {channel.unit}; is the dataset in degrees, per cent or mm?"
                )
