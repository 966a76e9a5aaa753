"""The camera contract on the camera that needs no device and no library."""

import pytest
from camera_suite import CameraContract

from gwp_edge.drivers import kinematic
from gwp_edge.testing import make_spec


class TestKinematicCamera(CameraContract):
    @pytest.fixture
    def camera(self):
        spec = make_spec(1)
        world = kinematic.create_world({"fps": 100}, spec)
        camera = kinematic.create_camera("cam_high", world.start(), spec)
        yield camera
        camera.close()
        world.close()
