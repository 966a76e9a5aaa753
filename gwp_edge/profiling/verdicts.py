"""From numbers to sentences: budget, tail, and what is worth work."""

from __future__ import annotations

from typing import Final

import numpy as np

from gwp_edge.profiling.chunks import ChunkTable
from gwp_edge.profiling.schema import (
    Budget,
    CameraReport,
    Cost,
    Level,
    LoadReport,
    MotorReport,
    Roofline,
    Summary,
    SystemReport,
    TailReport,
    Verdict,
)
from gwp_edge.profiling.tail import tail_verdict
from gwp_edge.spec import PolicySpec

_MISSED_SHARE: Final = 1e-3
_LOST_PERCENT: Final = 1.0
# From this share of all cores on there is no core left for who needs one now.
_FULL: Final = 0.85
_OTHERS_MATTER: Final = 0.15
_ASIDE: Final = "; other programs took part, so this is not the robot's alone (see machine)"
_MAX_STAMP_PERCENT: Final = 1.0
_MAX_TICK_US: Final = 5.0
_MAX_CORE_PERCENT: Final = 1.0
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
    cost: Cost,
    n_holds: int,
    execution: str | None,
    standing: Summary | None,
) -> tuple[Verdict, ...]:
    """Return the sentences, the most important first.

    Args:
        plan: see ``budget``.
        tail_report: see ``tail.tail``.
        motor: of the motor loop, None without one.
        cameras: one report each.
        steady: summaries of the steady phase.
        cold: of the first call.
        roofline: of the engine's stages.
        system: what the system did.
        cost: of profiling.
        n_holds: how often a running arm went to hold.
        execution: how chunks follow each other.
        standing: time that the arm stood at the end of a plan.
    """
    load = system.load if system is not None else None
    aside = _ASIDE if _is_crowded(load) else ""
    on_time = _motor(motor, aside)
    found = [
        _sync_rate(plan, standing, on_time, n_holds)
        if execution == "sync"
        else _rate(plan, on_time, steady, n_holds),
        _machine(load),
        _stage(steady, roofline, aside),
        tail_verdict(tail_report),
        on_time,
    ]
    found += [_camera(camera, aside) for camera in cameras]
    found += [_first_call(cold, steady), _throttling(system), _overhead(cost)]
    return tuple(v for v in found if v is not None)


def _rate(
    plan: Budget | None, motor: Verdict | None, steady: dict[str, Summary], n_holds: int
) -> Verdict:
    """Say whether plans come in time; a yes needs a motor loop that executes them in time, too."""
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
    elif motor.level == "bad":
        level = "warn"
        answer = f"plans come in time for {hz}, but the motor loop is not on time (see motor)"
    text = f"{answer}: {numbers}, which leaves {plan.left_ms:.0f} ms"
    return Verdict(topic="rate", level=level, text=text + few)


def _sync_rate(
    plan: Budget | None, standing: Summary | None, motor: Verdict | None, n_holds: int
) -> Verdict:
    """Say how long the arm stands: here a plan is meant to run out before the next is made."""
    if plan is None or standing is None:
        return _rate(None, motor, {}, n_holds)
    share = 100 * plan.plan_ms / (plan.plan_ms + standing.p50)
    text = (
        f"with --execution sync the arm stands {standing.p50:.0f} ms (p99 {standing.p99:.0f}) "
        f"after each plan of {plan.plan_ms:.0f} ms: it moves {share:.0f} % of the time, at "
        f"{plan.rate_hz:.0f} Hz"
    )
    if n_holds:
        text = f"not reliably: the arm went to hold {n_holds} times; {text}"
        return Verdict(topic="rate", level="bad", text=text)
    if motor is not None and motor.level == "bad":
        text += "; the motor loop does not keep its time (see motor)"
        return Verdict(topic="rate", level="warn", text=text)
    return Verdict(topic="rate", level="good", text=text)


def _is_crowded(load: LoadReport | None) -> bool:
    if load is None:
        return False
    whole = 100 * load.n_cores
    return load.total_percent >= _FULL * whole and load.others_percent >= _OTHERS_MATTER * whole


def _machine(load: LoadReport | None) -> Verdict | None:
    """Say whether the run had the machine for itself."""
    if load is None or load.others_percent < 100 * _OTHERS_MATTER:
        return None
    cores = f"{load.others_percent / 100:.1f} of {load.n_cores} cores"
    if _is_crowded(load):
        text = (
            f"other programs kept {cores} busy and none was free ({load.own_percent / 100:.1f} for "
            "this run): its times are what they left; end them and measure again"
        )
        return Verdict(topic="machine", level="warn", text=text, blames="others")
    text = (
        f"other programs kept {cores} busy; cores were free, but what they took of the memory's "
        "rate cannot be told from a slow engine"
    )
    return Verdict(topic="machine", level="good", text=text, blames="others")


def _overhead(cost: Cost) -> Verdict | None:
    """Complain of profiling itself where it took more than it may."""
    over = []
    if cost.stamp_percent is not None and cost.stamp_percent > _MAX_STAMP_PERCENT:
        over.append(f"{cost.stamp_percent:.2f} % of a chunk ({_MAX_STAMP_PERCENT:g} allowed)")
    if cost.tick_us > _MAX_TICK_US:
        over.append(f"{cost.tick_us:.1f} us of a motor tick ({_MAX_TICK_US:g} allowed)")
    sampling = cost.sampler_percent + cost.helper_percent
    if sampling > _MAX_CORE_PERCENT:
        over.append(f"{sampling:.2f} % of a core for sampling ({_MAX_CORE_PERCENT:g} allowed)")
    if not over:
        return None
    text = f"profiling took {', '.join(over)}: the times hold it"
    return Verdict(topic="overhead", level="warn", text=text, blames="profiling")


def _stage(steady: dict[str, Summary], roofline: Roofline, aside: str) -> Verdict | None:
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
    return Verdict(topic="stage", level="good", text=text + aside, blames=best)


def _motor(motor: MotorReport | None, aside: str) -> Verdict | None:
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
        f"{motor.longest_miss} in a row; {_where_gaps_come_from(motor)}{aside}"
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


def _camera(camera: CameraReport, aside: str = "") -> Verdict | None:
    if camera.period_ms is None or not camera.n_missing:
        return None
    low, high = (100 * share for share in _wilson(camera.n_missing, camera.n_expected))
    text = (
        f"camera {camera.name}: {camera.n_missing} of {camera.n_expected} frames never came "
        f"({100 * camera.n_missing / camera.n_expected:.1f} %, 95 %: {low:.1f} to {high:.1f})"
    )
    if camera.n_late:
        text += f", {camera.n_late} came late"
    if low <= _LOST_PERCENT:
        text += "; too few to warn of"
        return Verdict(topic="camera", level="good", text=text, blames=camera.name)
    text += f": check cable, USB bus and processor load{aside}"
    level: Level = "warn"
    return Verdict(topic="camera", level=level, text=text, blames=camera.name)


def _wilson(n_hits: int, n: int) -> tuple[float, float]:
    """Return the 95 % interval of a share (Wilson's score interval)."""
    z, share = 1.96, n_hits / n
    middle = (share + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * float(np.sqrt(share * (1 - share) / n + z**2 / (4 * n**2)))
    return middle - half, middle + half


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
