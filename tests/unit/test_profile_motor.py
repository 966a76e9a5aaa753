"""What a profile says of the motor loop, from made-up ticks, commands and states."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from profile_story import MS, SPEC, Story, arm_that_starts, moving_arm, report_of, verdict

from gwp_edge.status import Mode, TickFlag


def test_report_motor_stall_is_blamed_on_the_loop():
    story = Story()
    story.late = {100: 20.0, 300: 20.0}
    report = story.report()
    assert report.motor.tail == "loop"
    # Woken 20 ms late, 20.2 ms until sent: deadlines at 5, 10 and 15 ms were given up.
    assert report.motor.n_missed == 6
    assert report.motor.longest_miss == 3
    assert report.motor.n_long_gaps == 2
    assert verdict(report, "motor").blames == "loop"
    assert verdict(report, "motor").level == "bad"


def test_report_jitter_that_skips_no_deadline_is_no_missed_period():
    """Every third tick woke 2.7 ms late and every deadline was met, yet "333 of 1002 missed".

    The report took any gap above 1.5 periods for a missed period; the loop skips one only when it
    is behind by more than a period.
    """
    story = Story()
    story.late = dict.fromkeys(range(0, 2000, 3), 2.7)
    raw = story.raw()
    assert set(np.diff(raw.ticks["t_planned_ns"])) == {5 * MS}
    motor = story.report().motor
    assert (motor.n_missed, motor.longest_miss) == (0, 0)
    assert motor.n_long_gaps == pytest.approx(len(raw.ticks) / 3, abs=1)
    assert verdict(story.report(), "motor").level == "good"
    assert "skipped no deadline" in verdict(story.report(), "motor").text


def test_report_two_causes_of_long_gaps_are_both_named():
    story = Story()
    story.late = dict.fromkeys((100, 200, 300), 12.0)
    story.send = dict.fromkeys((150, 250, 350), 14.0)
    found = verdict(story.report(), "motor")
    assert "look at the bus" in found.text
    assert "real-time priority" in found.text
    assert found.text.index("real-time priority") < found.text.index("look at the bus")
    assert found.blames == "loop"


def test_report_slow_bus_is_blamed_on_the_bus():
    story = Story()
    story.send = dict.fromkeys(range(50, 500, 50), 12.0)
    report = story.report()
    assert report.motor.tail == "bus"
    assert verdict(report, "motor").blames == "bus"


def test_report_hold_in_between_is_no_missed_period():
    story = Story()
    raw = story.raw()
    raw.ticks["mode"][200:300] = int(Mode.HOLD)
    story.raw = lambda: raw
    assert story.report().motor.n_missed == 0


@pytest.mark.parametrize("lag_ms", [12, 80, 250])
def test_report_motion_follows_commands_after_a_known_shift(lag_ms):
    found = report_of([moving_arm(lag_ms)]).motor.command_to_motion_ms
    assert found.n >= 4
    assert found.p50 == pytest.approx(lag_ms, abs=1.0)
    assert found.max - found.p50 <= 1.0


def test_report_motion_of_every_run_and_second_is_in_the_spread():
    """It was one number, fitted over the whole of the last run: no spread, no count, no others."""
    found = report_of([moving_arm(40, late_lag_ms=90), moving_arm(150)]).motor.command_to_motion_ms
    assert found.n >= 8
    assert found.max == pytest.approx(150, abs=1.0)
    assert found.mean < 130


def test_report_arm_that_stands_has_no_lag():
    raw = moving_arm(80)
    for records in (raw.commands, raw.states):
        records["position"] *= 0.001
    assert report_of([raw]).motor.command_to_motion_ms is None


@pytest.mark.parametrize("lag_ms", [15, 60, 250])
def test_report_stamps_the_first_feedback_that_shows_a_start(lag_ms):
    found = report_of([arm_that_starts(lag_ms)]).motor.start_to_motion_ms
    assert found.n == 2
    # Trembling may bring the crossing forward or back by what the arm needs for twice of it.
    assert found.p50 == pytest.approx(lag_ms, abs=30.0)
    still = report_of([arm_that_starts(lag_ms, trembles=0.0)]).motor.start_to_motion_ms
    assert still.n == 2
    assert lag_ms <= still.p50 <= still.max <= lag_ms + 5.0  # a state every 5 ms


def test_report_start_that_no_feedback_shows_has_no_stamp():
    raw = arm_that_starts(40)
    raw.states["position"][:, 1] = 0.01
    assert report_of([raw]).motor.start_to_motion_ms is None
    raw.states["position"][:, 2] = (raw.states["t_ns"] - raw.states["t_ns"][0]) / 1e10  # sags
    assert report_of([raw]).motor.start_to_motion_ms is None


@pytest.mark.parametrize("lag_ms", [250, 500, 800])
def test_report_answer_to_the_command_before_is_not_taken_for_one_to_the_next(lag_ms):
    """Two commands half a second apart: the second began while the arm still answered the first."""
    found = report_of([arm_that_starts(lag_ms, rests_s=(0.5, 1.45), trembles=0.0)]).motor
    assert found.start_to_motion_ms.n == 1
    assert lag_ms <= found.start_to_motion_ms.p50 <= lag_ms + 5.0


def test_report_stir_before_a_motion_does_not_count_it_twice():
    raw = arm_that_starts(40, rests_s=(1.0,), trembles=0.0)
    raw.commands["position"][raw.commands["t_ns"] >= raw.commands["t_ns"][100], 2] += 0.001
    assert report_of([raw]).motor.start_to_motion_ms.n == 1


def test_report_first_command_of_a_run_is_a_start_and_the_first_one_kept_of_a_motion_is_none():
    raw = arm_that_starts(40, rests_s=(0.5,), trembles=0.0)
    begun = raw.commands["t_ns"] >= raw.commands["t_ns"][90]  # sends nothing until then
    first = dataclasses.replace(raw, commands=raw.commands[begun])
    assert report_of([first]).motor.start_to_motion_ms.n == 1
    late = raw.commands["t_ns"] >= raw.commands["t_ns"][180]  # what came before was lost
    lost = dataclasses.replace(raw, commands=raw.commands[late])
    assert report_of([lost]).motor.start_to_motion_ms is None


def test_report_arm_in_motion_all_the_time_has_no_start():
    assert report_of([moving_arm(80)]).motor.start_to_motion_ms is None


def test_report_counts_limits_missing_sends_and_used_up_plans():
    story = Story()
    raw = story.raw()
    running = np.flatnonzero(raw.ticks["chunk_idx"] >= 0)
    raw.ticks["flags"][running[:30]] |= int(TickFlag.VELOCITY)
    raw.ticks["flags"][running[:10]] |= int(TickFlag.ACCELERATION)
    raw.ticks["flags"][running[:4]] |= int(TickFlag.NOT_SENT)
    raw.ticks["row"][running[-20:]] = SPEC.n_rows - 1
    motor = report_of([raw]).motor
    assert motor.limited_ticks["velocity"] == 30
    assert motor.limited_ticks["acceleration"] == 10
    assert motor.limited_ticks["position"] == 0
    assert motor.n_not_sent == 4
    assert motor.used_up_ms == pytest.approx(20 * 5.0)


def test_report_histograms_hold_every_tick_where_it_belongs():
    story = Story()
    story.late = {100: 3.0}
    motor = story.report().motor
    assert sum(n for _, n in motor.lateness_histogram) == motor.n_ticks
    # Late by 3 ms makes one period 3 ms too long and the next 3 ms too short.
    assert sum(n for edge, n in motor.jitter_histogram if edge > 2000) == 2
    assert sum(n for _, n in motor.jitter_histogram) == motor.n_ticks - 1
