import abc
import dataclasses

import draccus


@dataclasses.dataclass(kw_only=True)
class RobotConfig(draccus.ChoiceRegistry, abc.ABC):
    id: str | None = None
    calibration_dir: str | None = None

    @property
    def type(self):
        return RobotConfig.get_choice_name(type(self))


class Robot(abc.ABC):
    def __init__(self, config):
        self.id = config.id

    def __del__(self):
        if self.is_connected:
            self.disconnect()

    @property
    @abc.abstractmethod
    def observation_features(self): ...

    @property
    @abc.abstractmethod
    def action_features(self): ...

    @property
    @abc.abstractmethod
    def is_connected(self): ...

    @abc.abstractmethod
    def connect(self, calibrate=True): ...

    @property
    @abc.abstractmethod
    def is_calibrated(self): ...

    @abc.abstractmethod
    def calibrate(self): ...

    @abc.abstractmethod
    def configure(self): ...

    @abc.abstractmethod
    def get_observation(self): ...

    @abc.abstractmethod
    def send_action(self, action): ...

    @abc.abstractmethod
    def disconnect(self): ...


def make_robot_from_config(config):
    from lerobot.robots.bench_arm import BenchArm

    return BenchArm(config)
