"""What every camera promises. A driver's test file subclasses ``CameraContract``."""

import time

import numpy as np
import pytest

from gwp_edge.errors import DeviceError


class CameraContract:
    """Tests of ``gwp_edge.protocols.Camera``."""

    PATIENCE_S = 20.0
    ROLE = "cam_high"

    @pytest.fixture
    def camera(self):
        """Return a closed camera of role ``ROLE``."""
        raise NotImplementedError

    def first_frame(self, camera):
        deadline_s = time.monotonic() + self.PATIENCE_S
        while (frame := camera.latest()) is None:
            assert time.monotonic() < deadline_s, "no frame came"
            time.sleep(0.005)
        return frame

    def test_name_is_the_role(self, camera):
        assert camera.name == self.ROLE

    def test_latest_gives_rgb_frames_with_times_in_order(self, camera):
        camera.open()
        frame = self.first_frame(camera)
        assert frame.camera == self.ROLE
        assert frame.image.dtype == np.uint8
        assert frame.image.shape[2] == 3
        assert not frame.image.flags.writeable
        assert frame.t_captured_ns <= frame.t_received_ns <= time.monotonic_ns()

    def test_latest_goes_on_and_never_back(self, camera):
        camera.open()
        frames = [self.first_frame(camera)]
        deadline_s = time.monotonic() + self.PATIENCE_S
        while frames[-1].frame_idx < frames[0].frame_idx + 3:
            assert time.monotonic() < deadline_s, "frames stopped"
            frames.append(camera.latest())
            time.sleep(0.005)
        idx = [f.frame_idx for f in frames]
        times = [f.t_captured_ns for f in frames]
        assert idx == sorted(idx)
        assert times == sorted(times)

    def test_a_kept_frame_does_not_change(self, camera):
        camera.open()
        kept = self.first_frame(camera)
        image = kept.image.copy()
        deadline_s = time.monotonic() + self.PATIENCE_S
        while camera.latest().frame_idx < kept.frame_idx + 3:
            assert time.monotonic() < deadline_s, "frames stopped"
            time.sleep(0.005)
        np.testing.assert_array_equal(kept.image, image)

    def test_close_twice_and_use_after_close(self, camera):
        camera.open()
        camera.close()
        camera.close()
        with pytest.raises(DeviceError):
            camera.latest()

    def test_latest_before_open_is_refused(self, camera):
        with pytest.raises(DeviceError):
            camera.latest()
