"""What every arm promises. A driver's test file subclasses ``ArmContract`` and gives ``open_arm``.

class TestMyArm(ArmContract):
    @pytest.fixture
    def new_arm(self):
        ...
        yield lambda: MyArm(...)   # arms of one and the same robot, closed and at rest
"""

import time

import numpy as np
import pytest

from gwp_edge.errors import DeviceError, SafetyFault


class ArmContract:
    """Tests of ``gwp_edge.protocols.Arm``."""

    PATIENCE_S = 20.0
    #: How near the arm comes to a command, rad and m.
    TOLERANCE = 0.01

    @pytest.fixture
    def new_arm(self):
        raise NotImplementedError

    @pytest.fixture
    def arm(self, new_arm):
        arm = new_arm()
        yield arm
        arm.close()

    def wait_for(self, condition):
        deadline_s = time.monotonic() + self.PATIENCE_S
        while not condition():
            assert time.monotonic() < deadline_s, "waited in vain"
            time.sleep(0.005)

    def stream(self, arm, target, *, until):
        """Send ``target`` at 200 Hz until the condition holds, reading as the motor loop does."""

        def step():
            arm.state()
            arm.send(target)
            return until()

        self.wait_for(step)

    def inside(self, arm, position):
        limits = arm.limits
        return np.clip(position, limits.position_min, limits.position_max)

    def test_open_for_reading_gives_state_and_refuses_commands(self, arm):
        arm.open(enable=False)
        state = arm.state()
        D = len(arm.channels)
        assert state.position.shape == state.velocity.shape == (D,)
        assert np.isfinite(state.position).all()
        assert not state.position.flags.writeable
        assert state.fault is None
        with pytest.raises(DeviceError):
            arm.send(state.position)

    def test_limits_after_open_fit_the_channels(self, arm):
        arm.open(enable=False)
        assert arm.limits.position_min.shape == (len(arm.channels),)
        assert all(c.unit in ("rad", "m") for c in arm.channels)

    def test_enable_does_not_move(self, arm):
        arm.open(enable=False)
        before = arm.state().position
        arm.close()
        arm.open(enable=True)
        self.wait_for(lambda: arm.state().enabled)
        np.testing.assert_allclose(arm.state().position, before, atol=self.TOLERANCE)

    def test_state_time_is_the_monotonic_clock_and_goes_on(self, arm):
        arm.open(enable=True)
        first = arm.state().t_received_ns
        assert abs(time.monotonic_ns() - first) < self.PATIENCE_S * 1e9
        self.wait_for(lambda: arm.state().t_received_ns > first)

    def test_send_moves_there_and_stays(self, arm):
        arm.open(enable=True)
        start = self.inside(arm, arm.state().position)
        target = self.inside(arm, start + 0.02)
        self.stream(
            arm,
            target,
            until=lambda: np.abs(arm.state().position - target).max() < self.TOLERANCE,
        )

    @pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
    def test_send_not_finite_is_refused_and_nothing_moves(self, arm, bad):
        arm.open(enable=True)
        before = arm.state().position
        for i in range(len(arm.channels)):
            command = before.copy()
            command[i] = bad
            with pytest.raises(SafetyFault):
                arm.send(command)
        np.testing.assert_allclose(arm.state().position, before, atol=self.TOLERANCE)

    def test_send_wrong_shape_is_refused(self, arm):
        arm.open(enable=True)
        with pytest.raises(SafetyFault):
            arm.send(np.zeros(len(arm.channels) + 1))

    def test_send_does_not_change_or_keep_the_callers_array(self, arm):
        arm.open(enable=True)
        command = self.inside(arm, arm.state().position)
        before = command.copy()
        arm.send(command)
        np.testing.assert_array_equal(command, before)
        command[:] = np.nan  # the motor loop reuses its array
        assert np.isfinite(arm.state().position).all()

    def test_hold_works_on_a_reading_connection_and_keeps_the_pose(self, new_arm):
        """The guardian's case: another connection did the enabling and is gone."""
        motor, guardian = new_arm(), new_arm()
        try:
            motor.open(enable=True)
            guardian.open(enable=False)
            start = self.inside(motor, motor.state().position)
            target = self.inside(motor, start + 0.02)
            self.stream(
                motor,
                target,
                until=lambda: np.abs(motor.state().position - target).max() < self.TOLERANCE,
            )
            motor.close()
            self.wait_for(lambda: np.abs(guardian.state().position - target).max() < self.TOLERANCE)
            for _ in range(5):
                guardian.hold()
                guardian.state()
            np.testing.assert_allclose(guardian.state().position, target, atol=2 * self.TOLERANCE)
        finally:
            motor.close()
            guardian.close()

    def test_close_twice_and_open_again(self, arm):
        arm.open(enable=True)
        arm.close()
        arm.close()
        with pytest.raises(DeviceError):
            arm.state()
        arm.open(enable=True)
        assert arm.state().fault is None

    def test_use_before_open_is_refused(self, arm):
        with pytest.raises(DeviceError):
            arm.state()
        with pytest.raises(DeviceError):
            arm.send(np.zeros(len(arm.channels)))
        arm.close()
