"""When motion begins after a command, and how far the joints follow behind while they move."""

from __future__ import annotations

from typing import Final, NamedTuple

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
# So long before a start an arm must have stood; what then moves by more than twice as much as it
# trembled, and by more than encoders count, moves. An answer may take a second, and the command
# before must have had its own, so commands must have rested for the sum of both.
_STILL_NS: Final = 300_000_000
_AWAIT_NS: Final = 1_000_000_000
_REST_NS: Final = _AWAIT_NS + _STILL_NS
_STIRS: Final = 0.002
_SETTLED: Final = 0.005
_MIN_STILL_STATES: Final = 5


class Start(NamedTuple):
    """A motion that began from rest.

    Attributes:
        t_commanded_ns: the first command that left the old pose by more than the joints tremble.
        t_moved_ns: the first feedback in which the joints had done so.
    """

    t_commanded_ns: int
    t_moved_ns: int


def starts_of(raw: Raw) -> list[Start]:
    """Return every motion that began from rest, with the first feedback that shows it.

    Both sides cross the same threshold, so a slow start is not taken for a late one. A start that
    no feedback shows within a second is left out.
    """
    t_ns, wanted = raw.commands["t_ns"].astype(np.int64), raw.commands["position"]
    changed = np.flatnonzero((np.diff(wanted, axis=0) != 0).any(axis=1)) + 1
    if not changed.size:
        return []
    rests_ns = np.diff(t_ns[changed], prepend=t_ns[0])
    rested = rests_ns >= _REST_NS
    rested[0] = True  # nothing was commanded before the first; whether the arm stood, states say
    found = [_start(raw, int(t_ns[i]), wanted[i - 1]) for i in changed[rested]]
    return [start for start in found if start is not None]


def start_to_motion(raws: list[Raw]) -> Summary | None:
    """Return the time from command to motion of all starts from rest, ms; None without any."""
    starts = [start for raw in raws for start in starts_of(raw)]
    return Summary.of([(s.t_moved_ns - s.t_commanded_ns) / 1e6 for s in starts])


def _start(raw: Raw, t_ns: int, rest: FloatArray) -> Start | None:
    still = _within(raw.states, t_ns - _STILL_NS, t_ns)["position"]
    if len(still) < _MIN_STILL_STATES:
        return None
    pose = still.mean(axis=0)
    trembles = np.abs(still - pose).max(axis=0)
    if (trembles > _SETTLED).any():
        return None
    stirs = np.maximum(_STIRS, 2 * trembles)
    commands = _within(raw.commands, t_ns, t_ns + _AWAIT_NS)
    told = np.abs(commands["position"] - rest) > stirs
    if not told.any():
        return None
    # The channel that is told to move first, and its own answer: others may sag meanwhile.
    channel = int(told[told.any(axis=1).argmax()].argmax())
    t_commanded_ns = int(commands["t_ns"][told[:, channel].argmax()])
    states = _within(raw.states, t_commanded_ns, t_commanded_ns + _AWAIT_NS)
    moved = np.abs(states["position"][:, channel] - pose[channel]) > stirs[channel]
    if not moved.any():
        return None
    return Start(t_commanded_ns, int(states["t_ns"][moved.argmax()]))


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
