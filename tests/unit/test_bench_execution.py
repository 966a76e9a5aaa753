"""The comparison of chunk execution: the toy answers right, and the figures tell methods apart."""

import math

import numpy as np
import pytest

from gwp_edge.bench_execution import (
    CLEAR_OF_OBSTACLE,
    FIRST_OBSTACLE_S,
    METHODS,
    OBSTACLE_EVERY_S,
    ToyPolicy,
    goal_at,
    measure,
    obstacle_times_s,
    way_round,
)
from gwp_edge.chunking import Guidance
from gwp_edge.errors import SpecError
from gwp_edge.schedule import Schedule

BY_NAME = {method.name: method for method in METHODS}
SHORT_S = 12.0


def run(name, latency_ms):
    return measure(BY_NAME[name], latency_ms, duration_s=SHORT_S)


def test_toy_plan_takes_one_side_and_never_the_middle():
    policy = ToyPolicy(0)
    sides = set()
    for _ in range(30):
        rows = policy.predict(0.5, np.array([0.0, goal_at(0.5)]), None, Guidance(method="none"))
        at_obstacle = rows[round((FIRST_OBSTACLE_S - 0.5) * 30), 0]
        assert abs(at_obstacle) > 2 * CLEAR_OF_OBSTACLE * 0.9
        sides.add(math.copysign(1.0, at_obstacle))
    assert sides == {-1.0, 1.0}


def test_toy_arm_that_is_clearly_on_one_side_stays_there():
    policy = ToyPolicy(1)
    for side in (-1.0, 1.0):
        state = np.array([side * 0.4, goal_at(FIRST_OBSTACLE_S)])
        rows = policy.predict(FIRST_OBSTACLE_S, state, None, Guidance(method="none"))
        assert side * rows[3, 0] > CLEAR_OF_OBSTACLE


def test_obstacle_is_where_the_way_round_is_longest():
    times = obstacle_times_s(SHORT_S)
    assert way_round(times) == pytest.approx(0.4)
    assert way_round(times + OBSTACLE_EVERY_S / 2) == pytest.approx(0.0, abs=1e-4)


def test_guided_plans_meet_at_the_seam_and_free_ones_do_not():
    assert run("soft", 200.0).seam_p95_mrad < 0.3 * run("naive", 200.0).seam_p95_mrad


def test_seam_takes_the_jerk_out_of_naive_execution():
    assert run("naive", 200.0).jerk_rms_rad_s3 < 0.5 * run("naive, no seam", 200.0).jerk_rms_rad_s3


def test_latency_makes_commands_older():
    fast, slow = run("identity", 0.0), run("identity", 400.0)
    assert slow.age_mean_ms > fast.age_mean_ms + 300.0
    assert slow.reaction_p50_ms > fast.reaction_p50_ms + 100.0


def test_same_seed_gives_the_same_figures():
    assert run("soft", 100.0) == run("soft", 100.0)


@pytest.mark.parametrize("name", sorted(BY_NAME))
def test_target_of_every_method_stays_near_the_robot(name):
    assert run(name, 0.0).seam_p95_mrad < 2000.0


def test_fades_that_replace_each_other_do_not_let_the_target_run_away(monkeypatch):
    """A fade begun anew with every chunk, without its acceleration, took the target 20 km away.

    Chunks came every 100 ms, and fades took longer the faster the target was. The motor loop's own
    correction, from where the arm is, is switched off here.
    """
    monkeypatch.setattr(Schedule, "reseam", lambda *_: None)
    assert measure(BY_NAME["naive"], 0.0, duration_s=30.0).seam_p95_mrad < 2000.0


@pytest.mark.parametrize("latency_ms", [-1.0, 2000.0, math.nan])
def test_latency_out_of_range_is_refused(latency_ms):
    with pytest.raises(SpecError, match="latency"):
        measure(METHODS[0], latency_ms)


def test_duration_too_short_to_judge_is_refused():
    with pytest.raises(SpecError, match="duration"):
        measure(METHODS[0], 0.0, duration_s=1.0)
