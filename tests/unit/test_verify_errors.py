"""Errors in the robot's units, the limits on them, and the choice of frames and prompts."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from gwp_edge.calibration.verify_checks import PARITY, Limits, error_checks, verdict
from gwp_edge.calibration.verify_errors import Ruler, compare, make_ruler
from gwp_edge.calibration.verify_schema import Check
from gwp_edge.errors import SpecError
from gwp_edge.manifest import ChannelError, MeasuredError
from gwp_edge.spec import Channel

CHANNELS = (
    Channel(name="joint1", unit="rad", kind="delta"),
    Channel(name="joint2", unit="rad", kind="delta"),
    Channel(name="gripper", unit="m", kind="absolute"),
)
RULER = Ruler(channels=CHANNELS, n_first_rows=2, thresholds_m={"gripper": 0.03})


def chunks(n=3, n_rows=6):
    return [np.zeros((n_rows, 3)) for _ in range(n)]


def spec(period_ns=33_333_333, n_rows=48):
    statistics = SimpleNamespace(action_q01=(-1.0, -1.0, 0.0), action_q99=(1.0, 1.0, 0.07))
    return SimpleNamespace(
        period_ns=period_ns, n_rows=n_rows, channels=CHANNELS, statistics=statistics
    )


def test_compare_puts_each_error_in_its_channel_row_and_unit():
    given = chunks()
    given[1][4, 1] = -0.5
    given[2][0, 2] = 0.01
    result = compare(given, chunks(), RULER, of="a", against="b")
    assert result.all_rows.joints_rad.max == 0.5
    assert result.all_rows.grippers_m.max == 0.01
    assert [c.all_rows.max for c in result.channels] == [0.0, 0.5, 0.01]
    assert result.rows[4].joints_rad.max == 0.5
    assert result.rows[3].joints_rad.max == 0.0
    assert result.worst[4] == (0.0, 0.5, 0.0)
    assert result.worst[0] == (0.0, 0.0, 0.01)


def test_compare_reports_first_rows_apart():
    given = chunks()
    given[0][2, 0] = 1.0
    result = compare(given, chunks(), RULER, of="a", against="b")
    assert result.all_rows.joints_rad.max == 1.0
    assert result.first_rows.joints_rad.max == 0.0
    assert result.channels[0].all_rows.max == 1.0
    assert result.channels[0].first_rows.max == 0.0
    given[2][1, 0] = 0.25
    result = compare(given, chunks(), RULER, of="a", against="b")
    assert result.first_rows.joints_rad.max == result.channels[0].first_rows.max == 0.25
    assert result.first_rows.n_chunks == 3


def test_compare_quantiles_are_those_of_all_samples_together():
    rng = np.random.default_rng(0)
    given = [rng.normal(size=(6, 3)) for _ in range(5)]
    values = np.abs(np.stack(given)[:, :, :2])
    found = compare(given, chunks(5), RULER, of="a", against="b").all_rows.joints_rad
    assert found.mean == pytest.approx(values.mean())
    assert found.p50 == pytest.approx(np.percentile(values, 50))
    assert found.p99 == pytest.approx(np.percentile(values, 99))


def test_compare_counts_flips_on_either_side_of_the_threshold():
    given, expected = chunks(2), chunks(2)
    given[0][0, 2], expected[0][0, 2] = 0.04, 0.02  # flip, first rows
    given[0][1, 2], expected[0][1, 2] = 0.04, 0.05  # both open
    given[1][5, 2], expected[1][5, 2] = 0.02, 0.04  # flip, later
    (flips,) = compare(given, expected, RULER, of="a", against="b").flips
    assert (flips.all_rows, flips.n_all_rows) == (2, 12)
    assert (flips.first_rows, flips.n_first_rows) == (1, 4)


def test_compare_without_grippers_has_none():
    ruler = Ruler(channels=CHANNELS[:2], n_first_rows=1, thresholds_m={})
    given = [np.ones((4, 2))]
    result = compare(given, given, ruler, of="a", against="b")
    assert result.all_rows.grippers_m is None
    assert result.rows[0].grippers_m is None
    assert result.flips == ()


@pytest.mark.parametrize("given", [[], chunks(2)])
def test_compare_of_other_number_of_chunks_is_refused(given):
    with pytest.raises(SpecError, match="cannot compare"):
        compare(given, chunks(3), RULER, of="a", against="b")


def test_ruler_takes_rows_of_a_replan_and_middle_of_statistics():
    ruler = make_ruler(spec())
    assert ruler.n_first_rows == 12
    assert ruler.thresholds_m == {"gripper": 0.035}
    assert make_ruler(spec(n_rows=8)).n_first_rows == 8
    assert make_ruler(spec(period_ns=10**9)).n_first_rows == 1
    assert make_ruler(spec(), threshold_m=0.01).thresholds_m == {"gripper": 0.01}


@pytest.mark.parametrize(
    "options", [{"n_first_rows": 0}, {"n_first_rows": 49}, {"threshold_m": float("nan")}]
)
def test_ruler_with_bad_option_is_refused(options):
    with pytest.raises(SpecError, match="--"):
        make_ruler(spec(), **options)


def error(value):
    return ChannelError(mean=value, p50=value, p99=value, max=value)


def measured(joints, grippers):
    given = chunks()
    for chunk in given:
        chunk[:, :2], chunk[:, 2] = joints, grippers
    return compare(given, chunks(), RULER, of="bundle", against="reference")


def recorded(joints, grippers):
    return MeasuredError(
        inputs="golden", n_chunks=1, joints_rad=error(joints), grippers_m=error(grippers)
    )


@pytest.mark.parametrize(
    ("found", "allowed"), [(0.0039, True), (0.0041, False), (PARITY * 0.9, True)]
)
def test_error_is_held_against_the_manifest_times_a_factor(found, allowed):
    checks = error_checks(measured(found, 0.0), recorded(0.001, 0.001), Limits(factor=4.0))
    assert [c.passed for c in checks] == [allowed, True]
    passed, line = verdict(checks, measured(found, 0.0))
    assert passed is allowed
    assert line.startswith("passed" if allowed else "FAILED: joints as recorded")
    assert "\n" not in line


def test_rounding_of_engines_passes_where_the_manifest_records_none():
    checks = error_checks(measured(PARITY * 0.9, PARITY * 1.1), recorded(0.0, 0.0), Limits())
    assert [c.passed for c in checks] == [True, False]


def test_given_bounds_are_checked_too():
    limits = Limits(joints_p99_rad=0.002, grippers_p99_m=0.0002)
    checks = error_checks(measured(0.003, 0.0001), recorded(0.1, 0.1), limits)
    assert {c.name: c.passed for c in checks} == {
        "joints as recorded": True,
        "grippers as recorded": True,
        "joints as asked": False,
        "grippers as asked": True,
    }


@pytest.mark.parametrize(
    "limits", [{"factor": 0.5}, {"joints_p99_rad": 0.0}, {"grippers_p99_m": -1.0}]
)
def test_limits_out_of_range_are_refused(limits):
    with pytest.raises(SpecError, match="--"):
        Limits(**limits)


def test_verdict_without_reference_says_so():
    passed, line = verdict([Check(name="golden output", passed=True, text="")], None)
    assert passed
    assert "not judged" in line


def test_verdict_ignores_what_could_not_be_checked_and_counts_what_failed():
    checks = [
        Check(name="prompts", passed=None, text="unknown"),
        Check(name="golden output", passed=False, text="off by 1"),
        Check(name="specification", passed=False, text="cameras"),
    ]
    passed, line = verdict(checks, None)
    assert not passed
    assert line == "FAILED: golden output: off by 1 (and 1 more)"
    assert verdict(checks[:1], measured(0, 0))[0]
