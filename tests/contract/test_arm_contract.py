"""The arm contract on the arms that need no device and no library."""

import pytest
from arm_suite import ArmContract

from gwp_edge.drivers import kinematic
from gwp_edge.drivers.kinematic_state import channel_limits
from gwp_edge.testing import FakeArm, FakeClock, make_spec


class TestKinematicArm(ArmContract):
    @pytest.fixture
    def new_arm(self):
        spec = make_spec(2)
        world = kinematic.create_world({}, spec)
        extra = world.start()
        yield lambda: kinematic.create_arm(extra, spec)
        world.close()


class _TickingClock(FakeClock):
    """Real time for the contract's waiting, through the fake's interface."""

    def now_ns(self):
        import time

        return time.monotonic_ns()


class TestFakeArm(ArmContract):
    @pytest.fixture
    def new_arm(self):
        spec = make_spec(1)
        limits = channel_limits(spec)
        arms = []

        def make():
            arms.append(FakeArm(spec.channels, limits, _TickingClock()))
            # One robot: what one connection commands, the other one measures.
            if len(arms) > 1:
                arms[-1].follow(arms[0])
            return arms[-1]

        return make
