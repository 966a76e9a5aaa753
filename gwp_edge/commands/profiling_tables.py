"""What ``gwp-edge profile`` prints."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from gwp_edge.console import remark, say, say_table

if TYPE_CHECKING:
    from gwp_edge.profiling.schema import ProfileReport, Roofline, Summary

_MARKS = {"good": "ok", "warn": "look", "bad": "BAD"}
_HEADER = ("stage", "n", "p50", "p90", "p95", "p99", "p99.9", "max", "mean")


def say_report(report: ProfileReport) -> None:
    """Print tables, roofline, verdicts and the cost of it all."""
    stages = report.phases.get("steady", {})
    if stages:
        say_table("steady, ms", _HEADER, [(name, *_cells(s)) for name, s in stages.items()])
    for phase in ("cold", "warm"):
        first = report.phases.get(phase, {}).get("predict")
        if first is not None:
            say(f"{phase}: {first.n} predictions, {first.p50:.1f} ms, at most {first.max:.1f} ms")
    _say_motor(report)
    _say_devices(report)
    _say_roofline(report)
    say_table(
        "Verdict",
        ("", "about", "found"),
        [(_MARKS[v.level], v.topic, v.text) for v in report.verdicts],
    )
    cost = report.cost
    share = "" if cost.stamp_percent is None else f" ({cost.stamp_percent:.3f} % of it)"
    say(
        f"profiling took {cost.listener_percent:.2f} % of a core ({cost.sampler_percent:.2f} % for "
        f"the system's counters), {cost.helper_percent:.2f} % for what it started, its view "
        f"{cost.view_percent:.2f} %; noting a chunk takes {cost.stamp_us:.1f} us{share}, a motor "
        f"tick {cost.tick_us:.1f} us"
    )
    lost = ", ".join(f"{n} {kind}" for kind, n in cost.n_lost.items() if n)
    if lost:
        remark(f"lost while listening: {lost}; percentiles miss them")


def _say_motor(report: ProfileReport) -> None:
    """Print what the motor loop did, and what it left of each plan."""
    motor = report.motor
    if motor is None:
        return
    rows = [
        (name, *_cells(s))
        for name, s in (
            ("wake-up late", motor.lateness_ms),
            ("period", motor.period_ms),
            ("jitter", motor.jitter_ms),
            ("tick busy", motor.busy_ms),
            ("driver send", motor.send_ms),
            ("plan age", motor.chunk_age_ms),
            ("feedback age", motor.feedback_age_ms),
            ("motion after command", motor.command_to_motion_ms),
            ("start from rest to motion", motor.start_to_motion_ms),
        )
        if s is not None
    ]
    say_table("motor loop, ms", _HEADER, rows)
    limited = ", ".join(f"{kind} {n}" for kind, n in motor.limited_ticks.items() if n)
    lost = ", ".join(f"{part} {ms:.0f} ms" for part, ms in motor.tail_shares.items() if ms >= 1)
    say(
        f"{motor.n_ticks} ticks, {motor.n_missed} periods missed, {motor.n_long_gaps} gaps above "
        f"1.5 periods ({lost or 'nothing'} lost in them), {motor.n_late} woke more than 1 ms late"
    )
    say(
        f"{motor.n_not_sent} ticks without a command; ticks in which a limit acted: "
        f"{limited or 'none'}; {motor.used_up_ms:.0f} ms at the end of a plan that was used up"
    )
    if motor.command_to_motion_ms is None:
        say("no joint moved enough to tell after what time motion follows commands")
    plan = report.budget
    if plan is not None:
        say(
            f"of a plan's rows {plan.rows_lost_p50:.1f} are past before its first command and "
            f"{plan.rows_used_p50:.1f} are executed (median)"
        )


def _say_devices(report: ProfileReport) -> None:
    """Print what cameras and buses counted."""
    rows = [
        (
            camera.name,
            camera.clock or "-",
            "irregular" if camera.period_ms is None else f"{camera.period_ms:.2f}",
            f"{camera.n_used} of {camera.n_made}",
            f"{camera.n_missing} of {camera.n_expected}",
            camera.n_late,
            "asked" if camera.transport_ms is None else _short(camera.transport_ms.p99),
            camera.health or "-",
        )
        for camera in report.cameras
    ]
    if rows:
        head = (
            "camera",
            "clock",
            "period ms",
            "used",
            "never came",
            "late",
            "transport p99",
            "its driver says",
        )
        say_table("cameras, steady", head, rows)
    for bus in report.system.buses if report.system is not None else ():
        counts = ", ".join(f"{counter} {n}" for counter, n in bus.counts.items())
        say(f"{bus.name}, over the run: {counts}")


def _cells(s: Summary) -> tuple[Any, ...]:
    values = (s.p50, s.p90, s.p95, s.p99, s.p999, s.max, s.mean)
    return (s.n, *("-" if v is None else _short(v) for v in values))


def _short(ms: float) -> str:
    return f"{ms:.2f}" if abs(ms) < 100 else f"{ms:.0f}"


def _say_roofline(report: ProfileReport) -> None:
    line = report.roofline
    if line.limits is None:
        say(f"no roofline: {line.why_not}")
        return
    say_roofline(line)


def say_roofline(line: Roofline) -> None:
    """Print stages against the machine's limits, and when those were measured."""
    limits = line.limits
    if limits is None:
        return
    rows = [
        (
            name,
            f"{s.report.times.p50_ms:.2f}",
            f"{s.report.gflop:.2f}",
            f"{s.report.mbyte:.1f}",
            f"{s.report.gflop_s:.1f}",
            f"{s.report.gbyte_s:.2f}",
            s.bound,
            f"{s.ceiling_ms:.2f}",
            f"{s.left_ms:.2f}",
            f"{s.report.percent_of_limit:.0f}",
        )
        for name, s in line.stages.items()
    ]
    head = (
        "stage", "p50 ms", "GFLOP", "MB", "GFLOP/s", "GB/s", "bound", "limit ms", "left ms",
        "% limit",
    )  # fmt: skip
    integer = f", {limits.best_of('int8'):.0f} in int8" if limits.gemm_int8 else ""
    say_table(
        f"Roofline: {limits.best_gflop_s:.0f} GFLOP/s in float32{integer}, "
        f"{limits.stream_gb_s:.1f} GB/s",
        head,
        rows,
    )
    when = "" if limits.measured_at is None else f"; limits measured {limits.measured_at}"
    load = "" if limits.load_before is None else f" at a load of {limits.load_before:.1f}"
    say(
        "GFLOP and MB are counted from the manifest's layers (weights and K/V caches, no "
        f"activations), rates are those over measured times{when}{load}"
    )
