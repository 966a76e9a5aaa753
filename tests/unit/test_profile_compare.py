"""Reports side by side: verdicts only where the data allows one."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest
from profile_story import Story, report_of

from gwp_edge.errors import SpecError
from gwp_edge.profiling.compare import (
    compare,
    failed_gates,
    main_quantity,
    parse_gate,
)
from gwp_edge.profiling.reports import differs_in


def noisy_run(rng, slower, n, offset_ms):
    """Chunks that vary by themselves, in a run that is a little faster or slower as a whole."""
    story = Story(n=n)
    story.stages["vision"] += rng.gamma(2.0, 0.5, n) + offset_ms * rng.random()
    story.stages["prefill"] += slower
    return story.raw()


def noisy(seed, slower=0.0, n=300, runs=3, offset_ms=0.0):
    rng = np.random.default_rng(seed)
    return report_of([noisy_run(rng, slower, n, offset_ms) for _ in range(runs)])


def of(found, quantity, statistic):
    return next(d for d in found if (d.quantity, d.statistic) == (quantity, statistic))


def test_compare_equal_profiles_passes_a_gate():
    before, after = noisy(1), noisy(2)
    gates = [parse_gate("p99=5%"), parse_gate("vision:p50=1%")]
    found = compare(before, after, gates=gates)
    assert failed_gates(gates, found, main_quantity(after)) == []
    vision = of(found, "vision", "p50")
    assert vision.verdict == "no difference shown"
    assert vision.low_percent <= 0 <= vision.high_percent


def test_compare_slower_prefill_fails_its_gate():
    before, after = noisy(1), noisy(2, slower=2.0)
    gates = [parse_gate("prefill:p50=3%")]
    found = compare(before, after, gates=gates)
    prefill = of(found, "prefill", "p50")
    assert prefill.verdict == "slower"
    assert prefill.change_percent == pytest.approx(50.0)
    lines = failed_gates(gates, found, "frame to command")
    assert len(lines) == 1
    assert "prefill p50" in lines[0]
    assert failed_gates([parse_gate("prefill:p50=60%")], found, "frame to command") == []


def test_compare_two_runs_of_one_thing_get_no_verdict():
    """The same bundle, commit and command, back to back, was "slower" or "faster" 23 times of 96.

    The interval knew how the chunks of a run differ and nothing of how runs do.
    """
    gates = [parse_gate("vision:p50=1%")]
    before, after = (noisy(seed, runs=1, offset_ms=1.5) for seed in (3, 4))
    found = compare(before, after, gates=gates)
    vision = of(found, "vision", "p50")
    assert not vision.low_percent <= 0 <= vision.high_percent, "they differ beyond their chunks"
    assert vision.verdict == "differs within these runs; repeat to know"
    assert {d.verdict for d in found} <= {
        "not judged", "no difference shown", "differs within these runs; repeat to know",
    }  # fmt: skip
    with pytest.raises(SpecError, match="--repeat 3"):
        failed_gates(gates, found, "frame to command")


def test_compare_runs_that_differ_by_chance_are_mostly_shown_as_that():
    """Of twenty pairs of the same thing about one in twenty may get a verdict.

    Three runs on either side, each with an offset of its own; with intervals from the chunks alone
    nearly all of these are "slower" or "faster".
    """
    n_verdicts = 0
    for seed in range(20):
        before, after = (noisy(2 * seed + k, n=60, offset_ms=1.5) for k in (0, 1))
        found = compare(before, after, gates=[parse_gate("vision:p50=1%")])
        n_verdicts += any(d.verdict in ("slower", "faster") for d in found)
    assert n_verdicts <= 2


def test_compare_wild_runs_have_an_interval_that_a_time_can_have():
    """Three runs of which one was disturbed gave "-219 to +220 %"; no time falls below nothing."""
    rng = np.random.default_rng(0)
    raws = [noisy_run(rng, slower, 60, 0.0) for slower in (0.0, 0.0, 90.0)]
    before, after = report_of(raws), noisy(1, n=60)
    for found in compare(before, after, gates=[parse_gate("prefill:mean=5%")]):
        assert found.low_percent > -100.0
        assert found.low_percent <= found.change_percent <= found.high_percent
    wild = of(compare(before, after), "prefill", "mean")
    assert wild.high_percent - wild.low_percent > 100.0


def test_compare_change_beyond_what_runs_differ_by_is_found():
    before, after = noisy(5, offset_ms=0.5), noisy(6, slower=3.0, offset_ms=0.5)
    found = of(compare(before, after), "frame to command", "p50")
    assert found.verdict == "slower"


def test_compare_judges_what_was_asked_for_and_says_so_of_the_rest():
    before, after = noisy(1), noisy(2, slower=2.0)
    found = compare(before, after)
    judged = {(d.quantity, d.statistic) for d in found if d.verdict != "not judged"}
    assert judged == {("frame to command", "p50"), ("frame to command", "p99")}
    assert of(found, "prefill", "p50").low_percent > 0
    # Two are judged, so each has to hold with 97.5 %.
    assert of(found, "frame to command", "p50").level_percent == 97.5
    assert of(found, "prefill", "p50").level_percent == 95.0


def test_compare_gate_without_enough_chunks_is_an_error_not_a_pass():
    gates = [parse_gate("p99=5%")]
    found = compare(noisy(1, n=20), noisy(2, n=20), gates=gates)
    with pytest.raises(SpecError, match="100 chunks"):
        failed_gates(gates, found, "frame to command")
    with pytest.raises(SpecError, match="no steady chunks"):
        failed_gates(gates, [], "frame to command")
    with pytest.raises(SpecError, match="no p50 of"):
        failed_gates([parse_gate("nonsense:p50=5%")], found, "frame to command")


@pytest.mark.parametrize("text", ["p99", "p99=5", "p98=5%", "p99=-5%", "=5%", "", "max=5%"])
def test_parse_gate_of_bad_text_is_refused(text):
    """``max`` was a gate once, and failed on any change: a run's largest value is chance."""
    with pytest.raises(SpecError, match="--fail-on"):
        parse_gate(text)


def test_differs_in_tells_load_clock_and_how_it_was_measured():
    """The docs promised clocks, and neither they nor the load were compared."""
    before = Story().report()
    machine = before.context.machine

    def other(machine_changes, **changes):
        changed = msgspec.structs.replace(machine, **machine_changes)
        context = msgspec.structs.replace(before.context, machine=changed, **changes)
        return msgspec.structs.replace(before, context=context)

    quiet = other({"load_average": (0.1, 0.1, 0.1), "clock_mhz": 2000.0})
    assert differs_in(quiet, quiet) == []
    busy = other(
        {"load_average": (3.1, 0.1, 0.1), "clock_mhz": 1500.0}, duration_s=9.0, warmup_s=2.0,
        repeat=7,
    )  # fmt: skip
    found = differs_in(quiet, busy)
    assert [line.split(":")[0] for line in found] == [
        "duration_s", "warmup_s", "repeat", "load before", "core clock, MHz",
    ]  # fmt: skip
    assert "load before: 0.1 and 3.1" in found
