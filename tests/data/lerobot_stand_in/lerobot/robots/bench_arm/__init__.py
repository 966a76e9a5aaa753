"""An arm whose motors live in a file, so that they outlive the process that commands them.

Rows of the file: torque (1 on, 0 off), where each joint was, its target, and when that was said.
"""

import dataclasses
import os
import time

import numpy as np

from lerobot.robots import Robot, RobotConfig

JOINTS = tuple(f"left_joint_{i}" for i in range(1, 7))
LAG_S = 0.02


@RobotConfig.register_subclass("bench_arm")
@dataclasses.dataclass(kw_only=True)
class BenchArmConfig(RobotConfig):
    port: str
    disable_torque_on_disconnect: bool = True
    highest_deg: float = 170.0
    calibrated: bool = True


class BenchArm(Robot):
    config_class = BenchArmConfig
    name = "bench_arm"

    def __init__(self, config):
        super().__init__(config)
        self.config = config
        self.motors = None
        self.image = None

    @property
    def observation_features(self):
        return {**self.action_features, "front": (48, 64, 3)}

    @property
    def action_features(self):
        return {f"{name}.pos": float for name in (*JOINTS, "gripper")}

    @property
    def is_connected(self):
        return self.motors is not None

    @property
    def is_calibrated(self):
        return self.config.calibrated

    def calibrate(self):
        raise RuntimeError("calibration asks a person; nobody is there")

    def configure(self):
        pass

    def connect(self, calibrate=True):
        if not os.path.exists(self.config.port):
            raise ConnectionError(f"Could not connect on port '{self.config.port}'.")
        self.motors = np.memmap(self.config.port, np.float64, "r+", shape=(4, 7))
        self.motors[0] = 1.0

    def _now(self):
        _, was, target, t_s = self.motors
        return target + (was - target) * np.exp(-(time.monotonic() - t_s) / LAG_S)

    def get_observation(self):
        if not self.is_connected:
            raise ConnectionError("not connected")
        if os.path.exists(self.config.port + ".unplugged"):
            raise ConnectionError("Failed to sync read 'Present_Position'")
        values = dict(zip(self.action_features, map(float, self._now()), strict=True))
        self.image = np.full((48, 64, 3), (200, 10, int(time.monotonic() * 50) % 256), np.uint8)
        return {**values, "front": self.image}

    def send_action(self, action):
        if set(action) != set(self.action_features):
            raise KeyError(sorted(action))
        asked = np.array([action[name] for name in self.action_features])
        if not np.isfinite(asked).all():
            raise ValueError("a motor cannot take this")
        sent = np.clip(asked, -self.config.highest_deg, self.config.highest_deg)
        self.motors[1] = self._now()
        self.motors[2] = sent
        self.motors[3] = time.monotonic()
        return dict(zip(self.action_features, map(float, sent), strict=True))

    def disconnect(self):
        if self.config.disable_torque_on_disconnect:
            self.motors[0] = 0.0
        self.motors = None
