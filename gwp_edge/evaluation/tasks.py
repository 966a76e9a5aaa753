"""Tasks of the simulated table-top whose success can be told without a person looking.

A task decides what the scene of a seed looks like, what the policy is told, and when an episode has
succeeded or failed. Numpy only; the world is opened by whoever runs the episodes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, Literal

import numpy as np

from gwp_edge.drivers import sim_model
from gwp_edge.drivers.piper_model import N_JOINTS, command_range
from gwp_edge.drivers.sim_options import SimOptions
from gwp_edge.drivers.sim_world import SimWorld
from gwp_edge.errors import SpecError
from gwp_edge.types import FloatArray

Outcome = Literal["running", "success", "wrong object", "timeout"]

#: Seeds from here on are for demonstrations; evaluations use those below, so none was ever trained.
FIRST_DEMONSTRATION_SEED: Final = 1_000_000


class TouchTask:
    """Touch the cube that the instruction names, and not the other one.

    One PiPER arm stands before a red and a blue cube, at random places, under random light, and
    starts from a random pose near the drawn-back one. The episode succeeds when a finger touches
    the named cube, and fails when it touches the other one first or when the time is over.
    """

    name: Final = "touch"
    n_arms: Final = 1
    time_limit_s: Final = 6.0
    #: Named cube by instruction; the instructions are the bundle's task names.
    instructions: Final[dict[str, str]] = {
        "touch the red cube": "red_cube",
        "touch the blue cube": "blue_cube",
    }
    #: Where each camera role of the policy is mounted.
    mounts: Final[dict[str, str]] = {
        "cam_high": "high",
        "cam_left_wrist": "wrist",
        "cam_right_wrist": "front",
    }
    _START_SPREAD_RAD: Final = (0.35, 0.20, 0.20, 0.10, 0.20, 0.15)
    _START_OPENING_M: Final = (0.02, 0.06)

    def options(self) -> SimOptions:
        """Return the scene; places, light and start pose follow from the seed at each reset."""
        return SimOptions(width_px=240, height_px=160, mounts=dict(self.mounts), lighting=0.6)

    def open_world(self, cameras: Sequence[str]) -> SimWorld:
        """Open the world with the policy's cameras.

        Raises:
            SpecError: a camera role has no mount.
            DeviceError: MuJoCo is not installed.
        """
        return SimWorld(self.n_arms, cameras, self.options())

    def start_position(self, seed: int) -> FloatArray:
        """Return the pose in which the episode of ``seed`` starts, shape (7,), rad and m."""
        rng = np.random.default_rng((seed, 1))
        start = np.array(sim_model.READY)
        start[:N_JOINTS] += rng.uniform(-1.0, 1.0, N_JOINTS) * self._START_SPREAD_RAD
        start[N_JOINTS] = rng.uniform(*self._START_OPENING_M)
        low, high = command_range(self.n_arms)
        clipped: FloatArray = np.clip(start, low, high)
        return clipped

    def reset(self, world: SimWorld, seed: int) -> None:
        """Set up the episode of ``seed``."""
        world.reset(seed, start=self.start_position(seed))

    def cube_of(self, instruction: str) -> str:
        """Return the cube that ``instruction`` names.

        Raises:
            SpecError: the task does not know the instruction.
        """
        try:
            return self.instructions[instruction]
        except KeyError as e:
            raise SpecError(
                f"task {self.name} has no instruction {instruction!r}; it has "
                f"{', '.join(map(repr, self.instructions))}"
            ) from e

    def opposite_of(self, instruction: str) -> str:
        """Return the instruction that names the other cube.

        Raises:
            SpecError: the task does not know the instruction.
        """
        named = self.cube_of(instruction)
        return next(text for text, cube in self.instructions.items() if cube != named)

    def outcome(self, world: SimWorld, instruction: str) -> Outcome:
        """Judge the present moment; ask after every control step."""
        named = self.cube_of(instruction)
        if any(world.touching(cube) for cube in self.instructions.values() if cube != named):
            return "wrong object"
        if world.touching(named):
            return "success"
        return "timeout" if world.time_ns >= self.time_limit_s * 1e9 else "running"


TASKS: Final = {TouchTask.name: TouchTask}


def find_task(name: str) -> TouchTask:
    """Return the task called ``name``.

    Raises:
        SpecError: there is none.
    """
    try:
        return TASKS[name]()
    except KeyError as e:
        raise SpecError(f"--task {name}: not known; tasks are {', '.join(TASKS)}") from e
