"""From numbers to sentences: budget, tail, and what is worth work."""

from __future__ import annotations

from typing import Final

import numpy as np

from gwp_edge.profiling.chunks import ChunkTable
from gwp_edge.profiling.columns import GROUPS, SEGMENTS
from gwp_edge.profiling.schema import (
    Budget,
    CameraReport,
    Level,
    MotorReport,
    Roofline,
    Summary,
    SystemReport,
    TailReport,
    Verdict,
)
from gwp_edge.spec import PolicySpec

_MIN_FOR_TAIL: Final = 30
# A tail this much over the median is not worth a sentence.
_TAIL_MATTERS: Final = 0.15
_CLEAR_SHARE: Final = 0.5
_MISSED_SHARE: Final = 1e-3
_MENTIONED_SHARE: Final = 0.25
_GAP_WORDS: Final = {
    "loop": "the process was not run in time: give it real-time priority and a core",
    "bus": "the driver took too long to send: look at the bus",
    "compute": "the tick itself took too long, or was interrupted in it",
}
_ENGINE_STAGES: Final = ("preprocess", "vision", "prefill", "denoise", "postprocess")


def budget(steady: ChunkTable, spec: PolicySpec) -> Budget | None:
    """Return what the plan's length leaves, or None where no chunk was made.

    Without a motor loop a plan's age and the time to the next one are both the prediction's time.
    """
    age = steady.age[~np.isnan(steady.age)]
    interval = steady.interval[~np.isnan(steady.interval)]
    if not len(age) or not len(interval):
        age = interval = steady.predict
    if not len(age):
        return None
    period_ms = spec.period_ns / 1e6
    plan_ms = (spec.n_rows - 1) * period_ms
    age_p99, interval_p99 = float(np.percentile(age, 99)), float(np.percentile(interval, 99))
    return Budget(
        rate_hz=1e3 / period_ms,
        plan_ms=plan_ms,
        age_p99_ms=age_p99,
        interval_p99_ms=interval_p99,
        left_ms=plan_ms - age_p99 - interval_p99,
        rows_lost_p50=float(np.median(age)) / period_ms,
        rows_used_p50=float(np.median(interval)) / period_ms,
    )


def tail(steady: ChunkTable) -> TailReport | None:
    """Return where the slowest 1 % of the chunks lose their time against the median chunk.

    At least three chunks are looked at, and at least 30 must be there.
    """
    total, name = steady.frame_to_command, "frame to command"
    if np.isnan(total).all():
        total, name = steady.predict, "predict"
    known = np.flatnonzero(~np.isnan(total))
    if len(known) < _MIN_FOR_TAIL:
        return None
    used = [s for s in SEGMENTS if name != "predict" or GROUPS[s] == "engine"]
    columns = [SEGMENTS.index(s) for s in used]
    slowest = known[np.argsort(total[known])[-max(3, round(0.01 * len(known))) :]]
    middle = np.median(steady.segments[known][:, columns], axis=0)
    excess = np.maximum(steady.segments[slowest][:, columns] - middle, 0.0).mean(axis=0)
    whole = float(excess.sum()) or 1.0
    by_segment = {s: float(e) / whole for s, e in zip(used, excess, strict=True)}
    by_group = {
        g: sum(share for s, share in by_segment.items() if GROUPS[s] == g)
        for g in ("camera", "engine", "loop", "bus")
    }
    over = float(total[slowest].mean() - np.median(total[known]))
    group = max(by_group, key=lambda g: by_group[g])
    if over < _TAIL_MATTERS * float(np.median(total[known])):
        return _tail(name, len(slowest), over, by_segment, by_group, None, None)
    mine = [s for s in used if GROUPS[s] == group]
    segment = max(mine, key=lambda s: by_segment[s])
    return _tail(name, len(slowest), over, by_segment, by_group, group, segment)


def _tail(
    name: str,
    n: int,
    over_ms: float,
    by_segment: dict[str, float],
    by_group: dict[str, float],
    group: str | None,
    segment: str | None,
) -> TailReport:
    return TailReport(
        of=name,
        n=n,
        excess_ms=over_ms,
        by_segment=by_segment,
        by_group=by_group,
        group=group,
        segment=segment,
    )


def verdicts(
    *,
    plan: Budget | None,
    tail_report: TailReport | None,
    motor: MotorReport | None,
    cameras: tuple[CameraReport, ...],
    steady: dict[str, Summary],
    cold: dict[str, Summary],
    roofline: Roofline,
    system: SystemReport | None,
    n_holds: int,
) -> tuple[Verdict, ...]:
    """Return the sentences, the most important first."""
    found = [
        _rate(plan, motor, steady, n_holds),
        _stage(steady, roofline),
        _tail_verdict(tail_report),
    ]
    found.append(_motor(motor))
    found += [_camera(camera) for camera in cameras]
    found += [_first_call(cold, steady), _throttling(system)]
    return tuple(v for v in found if v is not None)


def _rate(
    plan: Budget | None, motor: MotorReport | None, steady: dict[str, Summary], n_holds: int
) -> Verdict:
    if plan is None:
        text = "no chunk of the steady phase: run longer, or with a shorter warm-up"
        return Verdict(topic="rate", level="bad", text=text)
    hz = f"{plan.rate_hz:.0f} Hz"
    numbers = (
        f"a plan of {plan.plan_ms:.0f} ms is {plan.age_p99_ms:.0f} ms old when it takes over and "
        f"followed after {plan.interval_p99_ms:.0f} ms (p99)"
    )
    n = steady["predict"].n if "predict" in steady else 0
    few = f"; {n} chunks are few for a p99" if n < 100 else ""
    if plan.left_ms < 0:
        text = f"no, not at {hz}: {numbers}: {-plan.left_ms:.0f} ms too long"
        return Verdict(topic="rate", level="bad", text=text + few, blames="engine")
    if n_holds:
        text = f"not reliably at {hz}: the arm went to hold {n_holds} times although {numbers}"
        return Verdict(topic="rate", level="bad", text=text + few)
    level: Level = "good"
    answer = f"yes, at {hz}"
    if plan.left_ms < 0.2 * plan.plan_ms:
        level, answer = "warn", f"barely at {hz}"
    if motor is None:
        answer += " for the engine alone (no camera, bus or motor loop was measured)"
    text = f"{answer}: {numbers}, which leaves {plan.left_ms:.0f} ms"
    return Verdict(topic="rate", level=level, text=text + few)


def _stage(steady: dict[str, Summary], roofline: Roofline) -> Verdict | None:
    """Name the stage in which most time could be saved: over its floor where that is known."""
    times = {s: steady[s].p50 for s in _ENGINE_STAGES if s in steady}
    whole = sum(times.values())
    if whole <= 0:
        return None
    saving = dict(times)
    for name, judged in roofline.stages.items():
        if name in saving:
            saving[name] = judged.left_ms
    best = max(saving, key=lambda s: saving[s])
    share = 100 * times[best] / whole
    text = f"{best} is worth work first: {times[best]:.1f} ms, {share:.0f} % of the prediction"
    judged_best = roofline.stages.get(best)
    if judged_best is not None:
        text += (
            f"; this machine's {judged_best.bound} limit is {judged_best.ceiling_ms:.1f} ms, so up "
            f"to {judged_best.left_ms:.1f} ms could be saved"
        )
    return Verdict(topic="stage", level="good", text=text, blames=best)


def _tail_verdict(report: TailReport | None) -> Verdict | None:
    if report is None:
        text = f"too few chunks for a word about the tail: {_MIN_FOR_TAIL} are needed"
        return Verdict(topic="tail", level="warn", text=text)
    head = f"the {report.n} slowest chunks take {report.excess_ms:.1f} ms more than the median"
    if report.group is None or report.segment is None:
        return Verdict(topic="tail", level="good", text=f"no tail to speak of: {head}")
    share = report.by_group[report.group]
    where = f"{100 * share:.0f} % of that is the {report.group}, mostly {report.segment}"
    if share < _CLEAR_SHARE:
        parts = ", ".join(f"{g} {100 * s:.0f} %" for g, s in report.by_group.items())
        where = f"no single part is to blame ({parts})"
    return Verdict(
        topic="tail",
        level="warn",
        text=f"{head}; {where}",
        blames=report.group if share >= _CLEAR_SHARE else None,
    )


def _motor(motor: MotorReport | None) -> Verdict | None:
    if motor is None:
        return None
    late = (
        f"wakes {motor.lateness_ms.p99:.2f} ms late at p99, {motor.lateness_ms.max:.1f} ms at worst"
    )
    if not motor.n_missed:
        gaps = ""
        if motor.n_long_gaps:
            gaps = (
                f"; {motor.n_long_gaps} gaps of more than 1.5 periods, up to "
                f"{motor.period_ms.max:.1f} ms, which skipped no deadline"
            )
        text = f"the motor loop keeps its deadlines: it {late}{gaps}"
        return Verdict(topic="motor", level="good", text=text)
    level: Level = "bad" if motor.n_missed > _MISSED_SHARE * motor.n_ticks else "warn"
    text = (
        f"the motor loop {late} and missed {motor.n_missed} of {motor.n_ticks} periods, up to "
        f"{motor.longest_miss} in a row; {_where_gaps_come_from(motor)}"
    )
    return Verdict(topic="motor", level=level, text=text, blames=motor.tail)


def _where_gaps_come_from(motor: MotorReport) -> str:
    """Name every part that made a clear share of the long gaps, the largest first."""
    whole = sum(motor.tail_shares.values())
    shares = sorted(((lost, name) for name, lost in motor.tail_shares.items()), reverse=True)
    named = [(lost, name) for lost, name in shares if lost > _MENTIONED_SHARE * whole]
    if not named:
        return "they came one by one, no gap was long"
    return "; ".join(f"{_GAP_WORDS[name]} ({lost:.0f} ms in all)" for lost, name in named)


def _camera(camera: CameraReport) -> Verdict | None:
    if camera.period_ms is None or not camera.n_missing:
        return None
    share = 100 * camera.n_missing / camera.n_expected
    text = (
        f"camera {camera.name}: {camera.n_missing} of {camera.n_expected} frames were not there "
        f"when they were due ({share:.1f} %): check cable, USB bus and processor load"
    )
    level: Level = "warn" if share > 1 else "good"
    return Verdict(topic="camera", level=level, text=text, blames=camera.name)


def _first_call(cold: dict[str, Summary], steady: dict[str, Summary]) -> Verdict | None:
    if "predict" not in cold or "predict" not in steady:
        return None
    first, usual = cold["predict"].max, steady["predict"].p50
    if first < 2 * usual:
        return None
    text = f"the first prediction took {first:.0f} ms, {first / usual:.1f} times the usual: warm up"
    return Verdict(topic="first call", level="good", text=text)


def _throttling(system: SystemReport | None) -> Verdict | None:
    if system is None or not system.throttled:
        return None
    text = f"slowed down while it ran: {', '.join(system.throttled)}; see gwp-edge doctor"
    return Verdict(topic="system", level="bad", text=text, blames="system")
