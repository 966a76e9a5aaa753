"""The limiter for any input: every limit holds, and what is within them passes unchanged."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gwp_edge.safety import ACCELERATION as ACCELERATION_ACTED
from gwp_edge.safety import Limiter
from gwp_edge.types import JointLimits

PERIOD_S = 0.005
LOW, HIGH, SPEED, ACCELERATION = -1.0, 1.0, 1.5, 5.0
EPS = 1e-9


def _limits(n: int = 1) -> JointLimits:
    return JointLimits(
        position_min=np.full(n, LOW),
        position_max=np.full(n, HIGH),
        velocity_max=np.full(n, SPEED),
        acceleration_max=np.full(n, ACCELERATION),
    )


def _run(start: float, targets: list[float], caps: dict[int, float] | None = None) -> np.ndarray:
    limiter = Limiter(_limits(), period_s=PERIOD_S)
    limiter.seed(np.array([start]))
    out = [start]
    for i, target in enumerate(targets):
        if caps and i in caps:
            limiter.set_speed_limit(caps[i])
        out.append(float(limiter.step(np.array([target]))[0]))
    return np.array(out)


def _stopping_way(speed):
    """Way of a brake that sheds ACCELERATION * PERIOD_S per tick: the sum over its ticks."""
    step = ACCELERATION * PERIOD_S
    n = np.floor(speed / step)
    return PERIOD_S * (n * speed - step * n * (n + 1) / 2)


def test_stopping_way_is_the_sum_over_ticks():
    for speed in (0.0, 0.01, 0.025, 1.234, 3.0):
        way, v = 0.0, speed
        while v > 0:
            v -= ACCELERATION * PERIOD_S
            way += max(v, 0.0) * PERIOD_S
        assert abs(way - _stopping_way(speed)) < 1e-12


def _check_limits(out: np.ndarray) -> None:
    assert np.isfinite(out).all()
    v = np.concatenate([[0.0], np.diff(out) / PERIOD_S])
    a = np.diff(v) / PERIOD_S
    low, high = min(LOW, out[0]), max(HIGH, out[0])
    assert (out >= low - EPS).all()
    assert (out <= high + EPS).all()
    assert np.abs(v).max() <= SPEED + 1e-6
    assert np.abs(a).max() <= ACCELERATION + 1e-6
    room = np.where(v > 0, high - out, out - low)
    assert (_stopping_way(np.abs(v)) <= room + 1e-6).all()


anything = st.one_of(
    st.floats(-1.3, 1.3),
    st.floats(allow_nan=True, allow_infinity=True),
    st.sampled_from([LOW, HIGH, math.nan, math.inf, -math.inf, 1e300]),
)
# Long stretches reach full speed and the limits, ramps run into them; single values do neither.
stretches = st.lists(
    st.tuples(anything, st.integers(1, 200), st.one_of(st.just(0.0), st.floats(-2.0, 2.0))),
    min_size=1,
    max_size=8,
)


def _spell_out(stretches):
    """Return the targets of stretches (first value, ticks, speed)."""
    return [x + speed * PERIOD_S * i for x, n, speed in stretches for i in range(n)]


@settings(max_examples=80, deadline=None)
@given(start=st.floats(LOW, HIGH), stretches=stretches)
def test_limiter_any_input_respects_every_limit(start, stretches):
    _check_limits(_run(start, _spell_out(stretches)))


@settings(max_examples=30, deadline=None)
@given(
    start=st.floats(LOW, HIGH),
    stretches=stretches,
    caps=st.dictionaries(st.integers(0, 400), st.floats(0.05, 2.0), max_size=3),
)
def test_limiter_changing_speed_cap_respects_every_limit(start, stretches, caps):
    _check_limits(_run(start, _spell_out(stretches), caps))


@settings(max_examples=30, deadline=None)
@given(start=st.sampled_from([LOW - 0.3, HIGH + 0.2, LOW - 0.01]), stretches=stretches)
def test_limiter_start_outside_never_goes_farther_out(start, stretches):
    """PiPER rests on its stops, outside the margin."""
    out = _run(start, _spell_out(stretches))
    _check_limits(out)
    outside = np.maximum(np.maximum(LOW - out, out - HIGH), 0.0)
    assert (np.diff(outside) <= EPS).all()


@pytest.mark.parametrize("speed", [0.2, 0.9, 1.49])
@pytest.mark.parametrize("side", [-1.0, 1.0])
def test_limiter_ramp_into_the_limit_brakes_before_it(speed, side):
    """Followed exactly until the last moment at which stopping in time is possible."""
    targets = _spell_out([(0.0, 100, 0.0)]) + [
        side * min(t, 1.2) for t in _spell_out([(0.0, 1600, speed)])
    ]
    # Get up to speed first: a ramp from rest is a jump in velocity.
    out = _run(0.0, targets)
    _check_limits(out)
    assert out[-1] == side * HIGH


def test_limiter_speed_limit_is_reached_and_kept():
    out = _run(-0.9, [0.9] * 600)
    _check_limits(out)
    assert np.diff(out).max() / PERIOD_S == pytest.approx(SPEED)


@pytest.mark.parametrize("side", [-1.0, 1.0])
def test_limiter_once_inside_the_old_way_out_is_closed(side):
    out = side * _run(side * (HIGH + 0.2), [side * 0.5] * 400 + [side * (HIGH + 0.2)] * 400)
    assert out[400] < 0.6
    assert out[401:].max() <= HIGH
    partly = side * _run(side * (HIGH + 0.2), [side * (HIGH + 0.1)] * 400 + [side * 1.2] * 400)
    assert partly[401:].max() <= partly[400] + EPS


@pytest.mark.parametrize("side", [-1.0, 1.0])
def test_limiter_rest_at_a_pose_outside_goes_on_from_there(side):
    """Commands that never left have drawn the limit in; the arm is still where it was."""
    limiter = Limiter(_limits(), period_s=PERIOD_S)
    limiter.seed(np.array([side * (HIGH + 0.2)]))
    ways_in = [float(limiter.step(np.array([side * 0.5]))[0]) for _ in range(60)]
    limiter.rest(np.array([ways_in[20]]))
    assert limiter.standing
    assert limiter.flags == [ACCELERATION_ACTED]  # a plan that comes now fades from here
    assert limiter.position[0] == ways_in[20]
    _check_limits(
        np.array(
            [ways_in[20]] + [float(limiter.step(np.array([side * 0.5]))[0]) for _ in range(400)]
        )
    )


@settings(max_examples=80, deadline=None)
@given(
    start=st.floats(LOW, HIGH),
    pushes=st.lists(st.tuples(st.floats(-1, 1), st.integers(1, 60)), min_size=1, max_size=12),
)
def test_limiter_input_within_limits_passes_unchanged(start, pushes):
    """Inputs built to respect everything: any push, tempered by what the limits allow."""
    p, v, targets = start, 0.0, []
    for push, n in pushes:
        for _ in range(n):
            wanted = v + push * 0.999 * ACCELERATION * PERIOD_S
            room_up, room_down = (HIGH - p) * 0.999, (p - LOW) * 0.999
            fits = abs(wanted) <= SPEED * 0.999 and (
                wanted * PERIOD_S + _stopping_way(wanted) * 1.001 <= room_up
                if wanted > 0
                else -wanted * PERIOD_S + _stopping_way(-wanted) * 1.001 <= room_down
            )
            if not fits:
                # Braking is always allowed.
                wanted = math.copysign(max(abs(v) - 0.999 * ACCELERATION * PERIOD_S, 0.0), v)
                if _stopping_way(abs(v)) > (room_up if v > 0 else room_down):
                    wanted = math.copysign(max(abs(v) - ACCELERATION * PERIOD_S, 0.0), v)
            v = wanted
            p += v * PERIOD_S
            targets.append(p)
    out = _run(start, targets)[1:]
    np.testing.assert_allclose(out, targets, rtol=0, atol=1e-9)


@pytest.mark.parametrize("jump", [0.001, 0.05, 0.9, -0.7])
def test_limiter_step_settles_without_overshoot(jump):
    """Chasing a jump at full speed and only then braking would swing around the target."""
    out = _run(0.0, [jump] * 600)
    assert np.abs(out).max() <= abs(jump) + EPS
    assert abs(out[-1] - jump) < 1e-9


def test_limiter_moving_target_is_caught_and_then_followed_exactly():
    t = np.arange(1200) * PERIOD_S
    targets = (0.3 + 0.3 * np.sin(1.5 * t)).tolist()
    out = _run(0.0, targets)[1:]
    _check_limits(np.concatenate([[0.0], out]))
    np.testing.assert_allclose(out[-400:], targets[-400:], atol=1e-9)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_limiter_not_finite_is_rejected_and_brakes(bad):
    limiter = Limiter(_limits(2), period_s=PERIOD_S)
    limiter.seed(np.zeros(2))
    for i in range(100):
        limiter.step(np.full(2, 0.00005 * i * i))
    v = limiter.velocity
    assert (v > 0.5).all()
    limiter.step(np.array([0.6, bad]))
    assert limiter.rejected is not None
    assert "not finite" in limiter.rejected
    # Both channels brake: half a command is no command.
    np.testing.assert_allclose(limiter.velocity, v - ACCELERATION * PERIOD_S)


def test_limiter_far_outside_is_rejected_and_near_outside_is_clamped():
    limiter = Limiter(_limits(), period_s=PERIOD_S)
    limiter.seed(np.array([0.95]))
    limiter.step(np.array([HIGH + 1.0]))
    assert limiter.rejected is not None
    assert "far outside" in limiter.rejected
    for _ in range(400):
        limiter.step(np.array([HIGH + 0.1]))
        assert limiter.rejected is None
    assert limiter.position[0] == HIGH


@given(st.lists(anything, min_size=1, max_size=40))
def test_limiter_that_clips_far_targets_still_keeps_every_limit(targets):
    limiter = Limiter(_limits(), period_s=PERIOD_S, refuse_far=False)
    limiter.seed(np.array([0.0]))
    out = [0.0]
    for target in targets:
        out.append(float(limiter.step(np.array([target]))[0]))
        assert (limiter.rejected is None) == math.isfinite(target)
    _check_limits(np.array(out))
