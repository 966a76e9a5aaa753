"""What ``gwp-edge profile`` reports; the JSON file has these names.

Percentiles are exact over all values of their window. Times in the report are milliseconds, moments
are seconds since the first stamp. A field that could not be had is None, never zero.
"""

from __future__ import annotations

from typing import Literal

from gwp_edge.profiling.blocks import Roofline, RooflineStage, Summary
from gwp_edge.profiling.blocks import Struct as _Struct
from gwp_edge.profiling.columns import Chunks, Phase
from gwp_edge.profiling.context import Context

SCHEMA = "gwp-edge.profile"
SCHEMA_VERSION = 4

Level = Literal["good", "warn", "bad"]

__all__ = ["Roofline", "RooflineStage", "Summary"]


class MotorReport(_Struct, frozen=True, kw_only=True):
    """The motor loop, steady phase.

    Attributes:
        n_ticks: ticks.
        lateness_ms: wake-up after its deadline.
        period_ms: from wake-up to wake-up.
        jitter_ms: distance of that from the asked period.
        busy_ms: wake-up to sent.
        send_ms: the driver's share of that.
        lateness_histogram: [lower edge in us, count], of bins in powers of 2^(1/2).
        jitter_histogram: likewise, of ``jitter_ms``.
        n_late: woke more than 1 ms late.
        n_missed: whole periods skipped: deadlines that the loop gave up, being behind by more.
        longest_miss: most periods skipped in one go.
        n_long_gaps: wake-ups more than 1.5 periods apart; most of them skip no deadline.
        tail: where long gaps between commands come from: "loop", "bus", "compute", or None.
        tail_shares: time lost to each, ms.
        n_not_sent: ticks without a command.
        chunk_age_ms: age of the plan's observation at the tick.
        feedback_age_ms: age of the measured state at the tick.
        used_up_ms: time spent on a plan that was at its end.
        limited_ticks: ticks in which a limit acted, by kind.
        command_to_motion_ms: lag of the measured joints behind the commands in every second in
            which a joint moved, of all runs; None where nothing moved enough.
        start_to_motion_ms: from the first command that leaves a pose at rest to the first feedback
            that shows the motion, of every start; None where none was seen.
        series: [second, worst lateness, worst jitter], ms, over time.
    """

    n_ticks: int
    lateness_ms: Summary
    period_ms: Summary
    jitter_ms: Summary
    busy_ms: Summary
    send_ms: Summary | None
    lateness_histogram: list[tuple[float, int]]
    jitter_histogram: list[tuple[float, int]]
    n_late: int
    n_missed: int
    longest_miss: int
    n_long_gaps: int
    tail: str | None
    tail_shares: dict[str, float]
    n_not_sent: int
    chunk_age_ms: Summary | None
    feedback_age_ms: Summary | None
    used_up_ms: float
    limited_ticks: dict[str, int]
    command_to_motion_ms: Summary | None
    start_to_motion_ms: Summary | None
    series: list[tuple[float, float, float]]


class CameraReport(_Struct, frozen=True, kw_only=True):
    """One camera by its own frame numbers, steady phase.

    Attributes:
        name: role.
        clock: whose clock told the time of capture, as ``types.ClockDomain``.
        n_made: frames that it numbered from the first one used to the last one used.
        n_used: those that a plan began from.
        health: the driver's own account at the end of the run, None where it keeps none.
        period_ms: between frames.
        n_expected: frames that a plan began from or should have begun from.
        n_missing: those that were not there when the loop looked, and never came to be used.
        n_late: those that were not there when the loop looked, and came later.
        transport_ms: capture to received; None for a camera that is asked, which has no time of
            arrival.
    """

    name: str
    clock: str | None
    n_made: int
    n_used: int
    health: str | None = None
    period_ms: float | None
    n_expected: int
    n_missing: int
    n_late: int
    transport_ms: Summary | None


class TailReport(_Struct, frozen=True, kw_only=True):
    """Why the slowest chunks are slow.

    Attributes:
        of: "frame to command" or "predict".
        n: slowest chunks looked at.
        excess_ms: their mean over the median.
        predict_excess_ms: likewise of their predictions.
        cpu_excess_ms: likewise of the processor time of those; None where it was not taken.
        by_segment: share of the excess, 0 to 1.
        by_group: likewise for ``columns.GROUPS``.
        group: largest of those; None while the tail is too small to matter.
        segment: largest segment of that group.
    """

    of: str
    n: int
    excess_ms: float
    predict_excess_ms: float
    cpu_excess_ms: float | None
    by_segment: dict[str, float]
    by_group: dict[str, float]
    group: str | None
    segment: str | None


class Budget(_Struct, frozen=True, kw_only=True):
    """What the chunk's length leaves.

    Attributes:
        rate_hz: rows per second.
        plan_ms: from the first row to the last.
        age_p99_ms: age of a plan when it takes over.
        interval_p99_ms: until the next one takes over.
        left_ms: plan less both; below zero the arm has to wait.
        rows_lost_p50: rows that are past before the first command.
        rows_used_p50: rows executed of a plan.
    """

    rate_hz: float
    plan_ms: float
    age_p99_ms: float
    interval_p99_ms: float
    left_ms: float
    rows_lost_p50: float
    rows_used_p50: float


class Verdict(_Struct, frozen=True, kw_only=True):
    """One sentence; ``blames`` names the part it speaks of, for programs."""

    topic: str
    level: Level
    text: str
    blames: str | None = None


class BusReport(_Struct, frozen=True, kw_only=True):
    """One CAN bus over the run: how much each of the kernel's counters grew."""

    name: str
    counts: dict[str, int]


class LoadReport(_Struct, frozen=True, kw_only=True):
    """Who kept the cores busy in the steady phase: means, per cent of one core.

    Attributes:
        n_cores: that were on.
        total_percent: of all cores together.
        own_percent: of the processes of this run: motor, policy, guardian, supervisor, and what
            they started; injected burners are not among them.
        others_percent: what is left: other programs, and the kernel's own work.
    """

    n_cores: int
    total_percent: float
    own_percent: float
    others_percent: float


class SystemReport(_Struct, frozen=True, kw_only=True):
    """What the system did meanwhile, one column each, on the same clock.

    Attributes:
        t_s: of each sample.
        columns: by name with unit, such as ``cpu0_percent`` or ``policy_rss_mb``.
        worst: the value to look at of each column: the smallest of what is left (free memory) or
            can be slowed down (clocks), the largest of everything else.
        load: who kept the cores busy; None where it is not known.
        throttled: parts that were slowed down.
        buses: CAN counters; empty where there is no CAN bus.
        source: where it comes from.
    """

    t_s: list[float]
    columns: dict[str, list[float | None]]
    worst: dict[str, float]
    load: LoadReport | None
    throttled: tuple[str, ...]
    buses: tuple[BusReport, ...]
    source: tuple[str, ...]


class Cost(_Struct, frozen=True, kw_only=True):
    """What profiling itself took.

    Attributes:
        listener_percent: processor time of the listening thread, of one core.
        sampler_percent: the part of it for the system's counters.
        stamp_us: to note one chunk, measured here.
        tick_us: to note one motor tick, measured here.
        view_percent: of the live view, of one core.
        helper_percent: of what was started for it, such as tegrastats, and its threads, of one
            core.
        stamp_percent: of the median chunk.
        n_lost: records that were overwritten before they were read, by kind.
    """

    listener_percent: float
    sampler_percent: float
    view_percent: float
    helper_percent: float
    stamp_us: float
    stamp_percent: float | None
    tick_us: float
    n_lost: dict[str, int]


class ProfileReport(_Struct, frozen=True, kw_only=True):
    """One profile."""

    schema: str
    schema_version: int
    context: Context
    outcome: str
    phases: dict[Phase, dict[str, Summary]]
    chunks: Chunks
    motor: MotorReport | None
    cameras: tuple[CameraReport, ...]
    budget: Budget | None
    tail: TailReport | None
    verdicts: tuple[Verdict, ...]
    roofline: Roofline
    system: SystemReport | None
    cost: Cost
    faults: tuple[str, ...] = ()
