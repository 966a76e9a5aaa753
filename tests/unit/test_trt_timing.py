"""Measured stage times of a build, judged by the planner's model of the device."""

from __future__ import annotations

import pytest

pytest.importorskip("torch")
pytest.importorskip("onnx")

from gwp_edge.engines.trt_device import DeviceFacts
from gwp_edge.engines.trt_timing import by_stage, judge_build
from gwp_edge.export.blueprint import blueprint
from gwp_edge.planning import estimate, find_device, workload
from gwp_edge.planning.devices import matching_devices

pytestmark = pytest.mark.export
GB = 1_000_000_000
ORIN_64 = DeviceFacts(
    name="Orin",
    capability=(8, 7),
    n_multiprocessors=16,
    board="NVIDIA Jetson AGX Orin Developer Kit",
    integrated=True,
    tensorrt="10.3.0",
    memory_bytes=round(65.8 * GB),
)


@pytest.fixture(scope="module")
def manifest():
    return blueprint("gwp05-tiny", "int8", rest="fp16")


@pytest.mark.parametrize(
    ("gpu", "capability", "integrated", "memory_gb", "expected"),
    [
        ("Orin", "8.7", True, 7.99, ("orin-nano-8", "orin-nano-super")),
        ("Orin", "8.7", True, 16.4, ("orin-nx-16",)),
        ("Orin", "8.7", True, 32.2, ("orin-agx-32",)),
        ("Orin", "8.7", True, 65.8, ("orin-agx-64",)),
        ("NVIDIA Thor", "11.0", True, 131.8, ("thor",)),
        ("NVIDIA GeForce RTX 4090", "8.9", False, 25.4, ("rtx-4090",)),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", "8.9", False, 17.1, ()),
        ("NVIDIA GeForce RTX 4070", "8.9", False, 12.6, ()),
    ],
)
def test_matching_devices_names_what_a_gpu_may_be(gpu, capability, integrated, memory_gb, expected):
    found = matching_devices(
        gpu, capability, integrated=integrated, memory_bytes=round(memory_gb * GB)
    )
    assert tuple(device.id for device in found) == expected


def _times(manifest, device: str, factor: float) -> dict[str, list[int]]:
    stages = estimate(workload(manifest), find_device(device)).stages
    return {s.stage: [round(factor * s.floor_ms * 1e6)] * 3 for s in stages}


@pytest.mark.parametrize(
    ("factor", "verdict"),
    [(0.8, "below the floor"), (1.2, "plausible"), (1000.0, "far above the floor")],
)
def test_judge_build_flags_what_the_model_cannot_explain(manifest, factor, verdict):
    found = judge_build(manifest, ORIN_64, _times(manifest, "orin-agx-64", factor), tf32=False)
    assert [x.stage for x in found] == ["vision", "prefill", "denoise"]
    assert {x.verdict for x in found} == {verdict}
    assert {x.is_suspect for x in found} == {verdict != "plausible"}
    assert "floor" in str(found[0])


def test_judge_build_of_one_of_two_devices_flags_only_what_suits_neither(manifest):
    """Orin Nano with and without Super mode cannot be told apart: 0.8 of one floor is above the
    floor of the faster one."""
    nano = DeviceFacts(
        name="Orin",
        capability=(8, 7),
        n_multiprocessors=8,
        board="NVIDIA Jetson Orin Nano Developer Kit",
        integrated=True,
        tensorrt="10.3.0",
        memory_bytes=8 * GB,
    )
    times = _times(manifest, "orin-nano-8", 0.8)
    assert not any(x.is_suspect for x in judge_build(manifest, nano, times, tf32=False))
    times = _times(manifest, "orin-nano-8", 0.3)
    assert all(x.is_suspect for x in judge_build(manifest, nano, times, tf32=False))


def test_judge_build_on_an_unknown_device_says_that_nothing_judges(manifest):
    other = DeviceFacts(
        name="NVIDIA GeForce RTX 3060",
        capability=(8, 6),
        n_multiprocessors=28,
        board="",
        integrated=False,
        tensorrt="10.13.3",
        memory_bytes=12 * GB,
    )
    found = judge_build(manifest, other, _times(manifest, "rtx-4090", 1.0), tf32=False)
    assert {x.verdict for x in found} == {None}
    assert not any(x.is_suspect for x in found)
    assert "not in the planner's table" in str(found[0])


def test_by_stage_sorts_the_laps_of_chunks():
    assert by_stage([(1, 2, 3, 4), (5, 6, 7, 8)]) == {
        "vision": [1, 5],
        "prefill": [2, 6],
        "denoise": [3, 4, 7, 8],
    }
