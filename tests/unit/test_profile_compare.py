"""Reports side by side: verdicts only where the data allows one."""

from __future__ import annotations

import numpy as np
import pytest
from profile_story import Story

from gwp_edge.errors import SpecError
from gwp_edge.profiling.compare import (
    compare,
    failed_gates,
    main_quantity,
    parse_gate,
)


def noisy(seed, slower=0.0, n=300):
    rng = np.random.default_rng(seed)
    story = Story(n=n)
    story.stages["vision"] += rng.gamma(2.0, 0.5, n)
    story.stages["prefill"] += slower
    return story.report()


def test_compare_equal_profiles_passes_a_gate():
    before, after = noisy(1), noisy(2)
    found = compare(before, after)
    assert failed_gates([parse_gate("p99=5%")], found, main_quantity(after)) == []
    vision = next(d for d in found if (d.quantity, d.statistic) == ("vision", "p50"))
    assert vision.verdict == "no difference shown"
    assert vision.low_percent <= 0 <= vision.high_percent


def test_compare_slower_prefill_fails_its_gate():
    before, after = noisy(1), noisy(2, slower=2.0)
    found = compare(before, after)
    prefill = next(d for d in found if (d.quantity, d.statistic) == ("prefill", "p50"))
    assert prefill.verdict == "slower"
    assert prefill.change_percent == pytest.approx(50.0)
    lines = failed_gates([parse_gate("prefill:p50=3%")], found, "frame to command")
    assert len(lines) == 1
    assert "prefill p50" in lines[0]
    assert failed_gates([parse_gate("prefill:p50=60%")], found, "frame to command") == []


def test_compare_gate_without_enough_chunks_is_an_error_not_a_pass():
    found = compare(noisy(1, n=50), noisy(2, n=50))
    with pytest.raises(SpecError, match="100 chunks"):
        failed_gates([parse_gate("p99=5%")], found, "frame to command")
    with pytest.raises(SpecError, match="no steady chunks"):
        failed_gates([parse_gate("p99=5%")], [], "frame to command")
    with pytest.raises(SpecError, match="no p50 of"):
        failed_gates([parse_gate("nonsense:p50=5%")], found, "frame to command")


@pytest.mark.parametrize("text", ["p99", "p99=5", "p98=5%", "p99=-5%", "=5%", ""])
def test_parse_gate_of_bad_text_is_refused(text):
    with pytest.raises(SpecError, match="--fail-on"):
        parse_gate(text)
