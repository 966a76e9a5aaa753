"""The camera contract on the real SDK with a software device, behind the process host."""

import pytest
from camera_suite import CameraContract

from gwp_edge.drivers.camera_host import HostedCamera, HostOptions, SourceConfig

pytest.importorskip("pyrealsense2")

SOFTWARE = "gwp_edge.drivers.realsense_software:create_source"


class TestSoftwareRealSense(CameraContract):
    @pytest.fixture
    def camera(self):
        source = SourceConfig(
            factory=SOFTWARE, kwargs={"serial": "A1", "width_px": 64, "height_px": 48}
        )
        # A loaded machine may be slow; nothing here is about time.
        options = HostOptions(open_timeout_s=60, hang_timeout_s=30, stall_timeout_s=30)
        camera = HostedCamera(self.ROLE, source, options)
        yield camera
        camera.close()
