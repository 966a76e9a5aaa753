"""The shared arm and camera contracts on the simulated robot."""

import pytest
from arm_suite import ArmContract
from camera_suite import CameraContract

from gwp_edge.drivers import sim
from gwp_edge.testing import make_spec

pytest.importorskip("mujoco")
pytestmark = pytest.mark.sim

SPEC = make_spec(1)
OPTIONS = {"width_px": 96, "height_px": 64, "seed": 3}


@pytest.fixture(scope="module")
def extra():
    world = sim.create_world(OPTIONS, SPEC)
    yield {**OPTIONS, **world.start()}
    world.close()


class TestSimArm(ArmContract):
    PATIENCE_S = 60.0

    @pytest.fixture
    def new_arm(self, extra):
        return lambda: sim.create_arm(extra, SPEC)


class TestSimCamera(CameraContract):
    PATIENCE_S = 60.0

    @pytest.fixture
    def camera(self, extra):
        camera = sim.create_camera("cam_high", extra, SPEC)
        yield camera
        camera.close()
