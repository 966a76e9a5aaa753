"""The soak in small: some seconds with the faults that matter most, and what it judges by."""

import os
import signal

import pytest

from gwp_edge.bench_soak import SoakReport, soak
from gwp_edge.commands.benchmarks import _say_soak
from gwp_edge.errors import SpecError
from gwp_edge.soak_faults import FAULTS
from gwp_edge.soak_memory import MemoryGrowth, MemoryWatch, private_kb

SHORT = ("NaN plans", "motor process killed")


def test_soak_holds_and_resumes_after_every_fault_and_commands_nothing_unsafe():
    report = soak(
        duration_s=12.0,
        seed=1,
        gap_s=(0.2, 0.4),
        kinds=tuple(kind for kind in FAULTS if kind.name in SHORT),
        realtime=False,
        patience_s=60.0,
    )
    assert report.n_unsafe == 0, report.unsafe
    assert report.problems == ()
    assert report.n_commands > 100
    told = report.to_dict()
    assert told["passed"]
    assert [kind["name"] for kind in told["faults"]] == list(SHORT)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_ends_the_soak_and_not_one_of_its_runs(number):
    with pytest.raises(KeyboardInterrupt):
        soak(
            duration_s=600.0,
            seed=1,
            gap_s=(0.2, 0.4),
            kinds=tuple(kind for kind in FAULTS if kind.name == "NaN plans"),
            realtime=False,
            patience_s=60.0,
            progress=lambda _: os.kill(os.getpid(), number),
        )


@pytest.mark.parametrize(
    "bad", [{"duration_s": 1.0}, {"duration_s": float("nan")}, {"gap_s": (2.0, 1.0)}]
)
def test_numbers_out_of_range_are_refused(bad):
    with pytest.raises(SpecError, match="soak: expected"):
        soak(**bad)


def test_fault_kinds_are_told_apart_and_say_what_they_expect():
    assert len({kind.name for kind in FAULTS}) == len(FAULTS)
    for kind in FAULTS:
        assert bool(kind.outcomes) == (kind.after == "end"), kind.name
        assert bool(kind.reason) == (kind.after in ("resumes", "operator")), kind.name
        if kind.reason:
            assert kind.reason.ends_by_itself == (kind.after == "resumes"), kind.name


def grow(watch, role, life, *, begin_s, n, kb_per_s, level_kb=1000.0):
    for i in range(n):
        t_s = begin_s + 2.0 * i
        warming = 5000.0 * min(1.0, (t_s - begin_s) / 10.0)
        watch.add(role, life, t_s, level_kb + warming + kb_per_s * (t_s - begin_s))


def test_memory_slope_is_common_to_lives_of_different_levels():
    watch = MemoryWatch(warm_up_s=20.0)
    for life in range(3):
        level_kb = 1e4 * (life + 1)
        grow(watch, "motor", life, begin_s=500.0 * life, n=60, kb_per_s=2.0, level_kb=level_kb)
    (growth,) = watch.growth()
    assert growth.slope_mb_per_10min == pytest.approx(2.0 * 600 / 1024, rel=1e-6)
    assert growth.n_lives == 3
    assert growth.grown_mb == pytest.approx(2.0 * 98.0 / 1024)
    assert growth.peak_mb == pytest.approx((3e4 + 5000.0 + 2.0 * 118.0) / 1024.0)


def test_memory_of_short_lives_is_not_judged():
    watch = MemoryWatch()
    grow(watch, "policy", 1, begin_s=0.0, n=20, kb_per_s=100.0)
    (growth,) = watch.growth()
    assert growth.slope_mb_per_10min is None
    assert growth.grown_mb is None


def memory_report(**growth):
    values = {
        "role": "supervisor", "slope_mb_per_10min": 1.0, "grown_mb": 1.5, "observed_s": 900.0,
        "n_lives": 1, "peak_mb": 40.0,
    }  # fmt: skip
    return SoakReport(
        seed=0, duration_s=1.0, n_runs=1, n_faults=1, n_commands=1, n_unsafe=0, unsafe=(),
        worst_speed=0.1, worst_acceleration=0.1, problems=(), unprovoked=(), faults=(),
        memory=(MemoryGrowth(**{**values, **growth}),),
    )  # fmt: skip


def test_growth_is_a_leak_when_it_was_watched_for_long_or_is_no_single_step():
    for leak in ({}, {"observed_s": 500.0, "grown_mb": 4.0}):
        report = memory_report(**leak)
        assert len(report.leaks) == 1, leak
        assert not report.undecided
        assert not report.passed
    for harmless in ({"slope_mb_per_10min": 0.99}, {"slope_mb_per_10min": None, "grown_mb": None}):
        report = memory_report(**harmless)
        assert not report.leaks, harmless
        assert not report.undecided
        assert report.passed
    report = memory_report(observed_s=899.0, grown_mb=3.9)
    assert report.passed
    assert len(report.undecided) == 1


def test_growth_that_is_not_decided_is_said(capsys):
    _say_soak(memory_report(observed_s=500.0, grown_mb=1.5))
    assert (
        "memory: supervisor grew by 1.5 MB, which may be a single step" in capsys.readouterr().err
    )
    _say_soak(memory_report(slope_mb_per_10min=0.5))
    assert not capsys.readouterr().err


def test_single_step_of_a_heap_is_no_leak_when_it_was_watched_for_long():
    watch = MemoryWatch()
    for i in range(900):
        watch.add("supervisor", 1, 2.0 * i, 35_000.0 + (1328.0 if 2.0 * i > 350.0 else 0.0))
    (growth,) = watch.growth()
    assert growth.slope_mb_per_10min < 1.0
    assert growth.grown_mb == pytest.approx(1328.0 / 1024)


def test_memory_of_this_process_is_seen_and_of_a_dead_one_is_none():
    assert private_kb(os.getpid()) > 1000.0
    assert private_kb(2**22 + 1) is None


def test_memory_is_sampled_at_intervals():
    watch = MemoryWatch(warm_up_s=0.0, life_s=1.0)
    for t_s in (0.0, 0.5, 2.0, 4.5, 7.0):
        watch.sample(t_s, {"me": os.getpid(), "not started": 0})
    (growth,) = watch.growth()
    assert growth.role == "me"
    assert growth.observed_s == pytest.approx(7.0)
