"""What the values of the runtime promise about their arrays."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import numpy as np
import pytest

from gwp_edge.types import ArmState


def _state(position: object, velocity: object) -> ArmState:
    return ArmState(
        position=position,  # type: ignore[arg-type]  # what a careless driver gives
        velocity=velocity,  # type: ignore[arg-type]
        t_received_ns=1,
        enabled=True,
    )


def _frozen_of(array: np.ndarray) -> np.ndarray:
    array.flags.writeable = False
    return array


def _frozen(values: list[float]) -> np.ndarray:
    return _frozen_of(np.array(values))


@pytest.mark.parametrize(
    "given",
    [
        pytest.param([0.1, 0.2], id="list"),
        pytest.param(np.array([0.1, 0.2]), id="writable"),
        pytest.param(np.array([0.1, 0.2], np.float32), id="float32"),
        pytest.param(_frozen_of(np.array([0.1, 0.2], np.float32)), id="float32 read-only"),
        pytest.param(np.array([[0.1, 0.2], [0.3, 0.4]])[0], id="view"),
    ],
)
def test_arm_state_of_careless_arrays_is_read_only_float64(given: object) -> None:
    good = _frozen([0.0, 0.0])
    for position, velocity in ((given, good), (good, given), (given, given)):
        state = _state(position, velocity)
        for array in (state.position, state.velocity):
            assert array.dtype == np.float64
            assert not array.flags.writeable


def test_arm_state_does_not_follow_the_drivers_buffer() -> None:
    buffer = np.array([0.1, 0.2])
    state = _state(buffer, np.zeros(2))
    buffer[0] = 9.0
    assert state.position[0] == 0.1


def test_arm_state_takes_read_only_arrays_as_they_are() -> None:
    position, velocity = _frozen([0.1, 0.2]), _frozen([0.0, 0.0])
    state = _state(position, velocity)
    assert state.position is position
    assert state.velocity is velocity


@pytest.mark.parametrize(
    "copier", [copy.copy, copy.deepcopy, lambda s: pickle.loads(pickle.dumps(s))]
)
def test_arm_state_copied_or_pickled_stays_read_only(
    copier: Callable[[ArmState], ArmState],
) -> None:
    state = _state([1.0, 2.0], [0.0, np.nan])
    twin = copier(state)
    np.testing.assert_array_equal(twin.position, state.position)
    np.testing.assert_array_equal(twin.velocity, state.velocity)
    assert twin[2:] == state[2:]
    assert not twin.position.flags.writeable
    assert not twin.velocity.flags.writeable
