"""The lag of an arm that is known to trail, and every reason not to measure it."""

import math

import numpy as np
import pytest

from gwp_edge.commands import lag as lag_command
from gwp_edge.console import Interrupted
from gwp_edge.drivers import kinematic
from gwp_edge.drivers.piper import PiperArm
from gwp_edge.drivers.piper_fake_bus import FakeProcess
from gwp_edge.drivers.piper_options import parse_options
from gwp_edge.errors import DeviceError, SpecError
from gwp_edge.lag import LagOptions, _evaluate, measure_lag
from gwp_edge.robots import built_in_robot, create_arm, create_world
from gwp_edge.testing import make_spec

SPEC = make_spec(1)
QUICK = LagOptions(frequency_hz=2.0, n_swings=2)


@pytest.fixture
def open_arm():
    opened = []

    def make(**options):
        world = kinematic.create_world(options, SPEC)
        arm = kinematic.create_arm(world.start(), SPEC)
        arm.open(enable=True)
        opened.extend((arm, world))
        return arm

    yield make
    for thing in opened:
        thing.close()


def test_lag_of_a_first_order_joint_is_its_time_constant(open_arm):
    """Its phase is atan(omega tau): 100 ms at 2 Hz show as 71 ms."""
    arm = open_arm(lag_s=0.1)
    start = arm.state().position.copy()
    result = measure_lag(arm, 1, arm.limits, QUICK)
    omega = 2 * math.pi * 2.0
    assert result.lag_ms == pytest.approx(1e3 * math.atan(omega * 0.1) / omega, abs=15.0)
    assert result.gain == pytest.approx(1 / math.hypot(1.0, omega * 0.1), abs=0.1)
    np.testing.assert_allclose(arm.state().position, start, atol=0.02)


def test_evaluation_of_a_delayed_sine_is_exact():
    t_s = np.arange(0.0, 2.0, 0.005)
    wave = np.sin(4 * math.pi * t_s)
    rows = np.stack([t_s, wave, t_s + 0.06, 0.8 * wave], axis=1)
    result = _evaluate("joint", rows, QUICK)
    assert result.lag_ms == pytest.approx(60.0)
    assert result.gain == pytest.approx(0.8)


def test_joint_that_is_stuck_is_no_lag(open_arm):
    with pytest.raises(DeviceError, match="does not follow"):
        measure_lag(open_arm(faults=[{"kind": "stuck", "at_s": 0.0}]), 1, _limits(), QUICK)


def test_arm_that_faults_ends_the_measurement(open_arm):
    arm = open_arm(faults=[{"kind": "arm-fault", "at_s": 0.2}])
    with pytest.raises(DeviceError):
        measure_lag(arm, 1, arm.limits, QUICK)


class Interrupting:
    """An arm that somebody interrupts in the midst of the measurement, and what it is sent."""

    def __init__(self, arm, error):
        self._arm, self._error, self.sent = arm, error, []

    def __getattr__(self, name):
        return getattr(self._arm, name)

    def state(self):
        if len(self.sent) == 60:
            raise self._error
        return self._arm.state()

    def send(self, position):
        self.sent.append(np.array(position))
        self._arm.send(position)


@pytest.mark.parametrize("error", [Interrupted(), DeviceError("bus gone")])
def test_interrupted_measurement_brakes_and_stays(open_arm, error):
    """It once drove back to the start, after a fault too."""
    arm = Interrupting(open_arm(), error)
    with pytest.raises(type(error)):
        measure_lag(arm, 1, arm.limits, QUICK)
    at = np.array(arm.sent)[:, 1]
    assert len(at) < 60 + 40, "braking takes less than 0.2 s"
    assert abs(at[-1] - at[0]) > 0.5 * abs(at[59] - at[0])
    speed = np.diff(at) / 0.005
    assert speed[-1] == 0.0
    assert np.abs(np.diff(speed)).max() <= arm.limits.acceleration_max[1] * 0.005 + 1e-9


def test_joint_at_its_limit_is_not_moved(open_arm):
    arm = open_arm(start_position=[0.0, 0.01, -1.0, 0.0, 0.3, 0.0, 0.03])
    before = arm.state().position
    with pytest.raises(SpecError, match="from its limit"):
        measure_lag(arm, 1, arm.limits, QUICK)
    np.testing.assert_array_equal(arm.state().position, before)


@pytest.mark.parametrize("bad", [{"amplitude": 0.5}, {"frequency_hz": math.nan}, {"n_swings": 0}])
def test_sine_out_of_range_is_refused(bad):
    with pytest.raises(SpecError, match="lag"):
        LagOptions(**bad)


def test_real_arm_is_not_moved_without_yes(monkeypatch, tmp_path):
    monkeypatch.setattr("gwp_edge.manifest.read_spec", lambda _: SPEC)
    with pytest.raises(SpecError, match="add --yes"):
        lag_command.lag(tmp_path, robot="piper")


def _limits():
    return kinematic.channel_limits(SPEC)


def test_lag_of_the_fake_piper_is_measured_over_its_bus(tmp_path):
    """Its joints follow with a lag of 50 ms; without the vendor's SDK."""
    with FakeProcess(str(tmp_path / "arm")) as fake:
        arm = PiperArm(SPEC.channels, parse_options({"can": fake.channel}))
        try:
            arm.open(enable=True)
            start = arm.state().position.copy()
            result = measure_lag(arm, 0, arm.limits, LagOptions(frequency_hz=1.0, n_swings=2))
            # The phase of a first-order lag of 50 ms at 1 Hz is 48 ms; feedback adds up to 5.
            assert result.lag_ms == pytest.approx(50.0, abs=25.0)
            assert 0.8 < result.gain < 1.1
            np.testing.assert_allclose(arm.state().position[:6], start[:6], atol=0.02)
        finally:
            arm.close()


@pytest.mark.sim
def test_lag_of_the_simulated_arm_is_measured():
    pytest.importorskip("mujoco")
    robot = built_in_robot("sim", SPEC)
    world = create_world(robot, SPEC)
    try:
        arm = create_arm(robot, SPEC, world.start())
        try:
            arm.open(enable=True)
            result = measure_lag(arm, 0, arm.limits, LagOptions(frequency_hz=1.0, n_swings=2))
            assert -10.0 < result.lag_ms < 300.0
            assert result.fit > 0.9
        finally:
            arm.close()
    finally:
        world.close()
