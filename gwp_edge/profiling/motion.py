"""How long the measured joints follow the commands, window by window."""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt

from gwp_edge.profiling.chunks import steady_window_ns
from gwp_edge.profiling.raw import Raw, Records
from gwp_edge.profiling.schema import Summary
from gwp_edge.types import FloatArray

_WINDOW_MS: Final = 1000.0
_MAX_WINDOWS: Final = 120
_MAX_LAG_MS: Final = 400
_MIN_MOTION: Final = 0.02
_MIN_STATES: Final = 20
_MAX_STATES: Final = 200
# A lag whose fit is not clearly better than that of a joint that never moved says nothing.
_MAX_ERROR: Final = 0.25


def command_to_motion(raws: list[Raw], warmup_s: float) -> Summary | None:
    """Return the lags of all windows of a second in which a joint moved, ms; None without any.

    In each window the channel that moved most is shifted against its commands, millisecond by
    millisecond, and the shift that fits best is its lag.
    """
    lags = [lag for raw in raws for lag in _lags(raw, warmup_s)]
    return Summary.of(lags)


def _lags(raw: Raw, warmup_s: float) -> list[float]:
    begin_ns, end_ns = steady_window_ns(raw, warmup_s)
    commands, states = (_within(r, begin_ns, end_ns) for r in (raw.commands, raw.states))
    if len(commands) < _MIN_STATES or len(states) < _MIN_STATES:
        return []
    command_ms, state_ms = commands["t_ns"] / 1e6, states["t_ns"] / 1e6
    edges = np.arange(command_ms[0] + _MAX_LAG_MS, state_ms[-1], _WINDOW_MS)
    if len(edges) > _MAX_WINDOWS:
        edges = edges[np.linspace(0, len(edges) - 1, _MAX_WINDOWS).astype(int)]
    found = []
    for edge in edges:
        seen = states[(state_ms >= edge) & (state_ms < edge + _WINDOW_MS)]
        told = (command_ms >= edge - _MAX_LAG_MS) & (command_ms < edge + _WINDOW_MS)
        lag = _lag(commands[told], seen[:: max(1, len(seen) // _MAX_STATES)])
        if lag is not None:
            found.append(lag)
    return found


def _within(records: Records, begin_ns: int, end_ns: int) -> Records:
    chosen: Records = records[(records["t_ns"] >= begin_ns) & (records["t_ns"] <= end_ns)]
    return chosen


def _lag(commands: Records, states: Records) -> float | None:
    """Return the lag of one window, ms; None where nothing moved or no shift fits."""
    if len(commands) < _MIN_STATES or len(states) < _MIN_STATES:
        return None
    moved = np.ptp(states["position"], axis=0)
    channel = int(moved.argmax())
    if moved[channel] < _MIN_MOTION:
        return None
    t_ms, q = states["t_ns"] / 1e6, states["position"][:, channel]
    command_ms, wanted = commands["t_ns"] / 1e6, commands["position"][:, channel]
    lags: npt.NDArray[np.int64] = np.arange(_MAX_LAG_MS)
    errors: FloatArray = np.array(
        [np.square(q - np.interp(t_ms - lag, command_ms, wanted)).mean() for lag in lags]
    )
    best = int(errors.argmin())
    if not 0 < best < _MAX_LAG_MS - 1 or errors[best] > _MAX_ERROR * float(q.var()):
        return None
    return float(best)
