"""Action error in the robot's own units."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from gwp_edge.manifest import ChannelError, MeasuredError
from gwp_edge.spec import Channel, Unit
from gwp_edge.types import FloatArray


def measure_error(
    actions: Sequence[FloatArray],
    reference: Sequence[FloatArray],
    channels: Sequence[Channel],
    inputs: str,
) -> MeasuredError:
    """Summarise the difference of chunks (H, D) from their references, by unit.

    Args:
        actions: what is judged, one chunk each.
        reference: what it should be.
        channels: names and units of the D columns.
        inputs: in words, what it was measured on.
    """
    difference = np.abs(np.stack(actions) - np.stack(reference))
    return MeasuredError(
        inputs=inputs,
        n_chunks=len(actions),
        joints_rad=_summary(difference, channels, "rad"),
        grippers_m=_summary(difference, channels, "m"),
    )


def _summary(
    difference: FloatArray, channels: Sequence[Channel], unit: Unit
) -> ChannelError | None:
    columns = [i for i, channel in enumerate(channels) if channel.unit == unit]
    if not columns:
        return None
    values = difference[..., columns].ravel()
    return ChannelError(
        mean=float(values.mean()),
        p50=float(np.percentile(values, 50)),
        p99=float(np.percentile(values, 99)),
        max=float(values.max()),
    )
