"""Each preflight check passes on what is well and fails on what is not."""

from types import SimpleNamespace

import numpy as np
import pytest

from gwp_edge import preflight
from gwp_edge.errors import BuildError
from gwp_edge.observe import ObservationLimits
from gwp_edge.testing import ScriptedPolicy, make_spec
from gwp_edge.types import ArmState, Chunk, Frame, Observation

SPEC = make_spec()
MIDDLE = np.add(SPEC.statistics.state_q01, SPEC.statistics.state_q99) / 2
MS = 1_000_000


def _observation(image, age_ms=10):
    frame = Frame(
        camera="cam_high",
        image=image,
        t_captured_ns=(1000 - age_ms) * MS,
        t_received_ns=1000 * MS,
        frame_idx=0,
    )
    return Observation(frames=(frame,), state=MIDDLE, t_state_ns=1000 * MS)


def test_cameras():
    picture = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)
    limits = ObservationLimits()
    assert preflight.check_cameras(_observation(picture), 1000 * MS, limits).passed
    old = preflight.check_cameras(_observation(picture, age_ms=200), 1000 * MS, limits)
    assert not old.passed
    assert "200 ms old" in old.detail
    dark = preflight.check_cameras(_observation(np.zeros((4, 4, 3), np.uint8)), 1000 * MS, limits)
    assert not dark.passed
    assert "covered" in dark.detail


def test_statistics_name_the_channel_outside():
    assert preflight.check_statistics(SPEC, MIDDLE).passed
    edge = np.array(SPEC.statistics.state_q99)
    assert preflight.check_statistics(SPEC, edge + 0.49 * (edge - SPEC.statistics.state_q01)).passed
    degrees = MIDDLE.copy()
    degrees[1] = 57.3
    result = preflight.check_statistics(SPEC, degrees)
    assert not result.passed
    assert "left_joint_2" in result.detail


def test_first_action():
    def chunk(offset):
        return Chunk(actions=MIDDLE + np.full((4, 7), offset), t_observed_ns=0, period_ns=1)

    assert preflight.check_first_action(SPEC, chunk(0.05), MIDDLE).passed
    far = preflight.check_first_action(SPEC, chunk(0.7), MIDDLE)
    assert not far.passed
    assert "left_joint_1 0.700 rad away" in far.detail
    # A line between processes has room for 480 bytes, and its end says what to do.
    assert "and 3 more: move the arm" in far.detail
    assert not preflight.check_first_action(SPEC, chunk(np.nan), MIDDLE).passed


def test_arm():
    def state(**kwargs):
        values = {"position": MIDDLE, "velocity": MIDDLE, "t_received_ns": 0, "enabled": False}
        return ArmState(**{**values, **kwargs})

    assert preflight.check_arm(state()).passed
    assert preflight.check_arm(state(fault="teach mode")).detail == "teach mode"
    assert not preflight.check_arm(state(position=MIDDLE * np.nan)).passed


def test_latency_longer_than_half_a_plan_fails_unless_synchronous():
    plan_ns = (SPEC.n_rows - 1) * SPEC.period_ns
    assert preflight.check_latency(plan_ns // 4, SPEC, synchronous=False).passed
    assert not preflight.check_latency(plan_ns, SPEC, synchronous=False).passed
    assert preflight.check_latency(plan_ns, SPEC, synchronous=True).passed


def test_memory():
    assert preflight.check_memory(1).passed
    assert not preflight.check_memory(1 << 60).passed


def test_golden(monkeypatch):
    policy = ScriptedPolicy(SPEC)
    assert preflight.check_golden(policy).passed

    def differs(self):
        raise BuildError("off by 0.5 rad")

    monkeypatch.setattr(ScriptedPolicy, "check_golden", differs)
    result = preflight.check_golden(policy)
    assert (result.passed, result.detail) == (False, "off by 0.5 rad")


@pytest.mark.parametrize(
    ("calibration", "passed", "words"),
    [
        (None, True, "none needed"),
        (SimpleNamespace(is_synthetic=False, n_samples=64, dataset="towel"), True, "64 recorded"),
        (SimpleNamespace(is_synthetic=True, n_samples=64, dataset="noise"), False, "SYNTHETIC"),
    ],
)
def test_synthetic_calibration_keeps_a_bundle_from_a_robot(monkeypatch, calibration, passed, words):
    monkeypatch.setattr(
        preflight, "read_manifest", lambda path: SimpleNamespace(calibration=calibration)
    )
    (line,) = preflight.check_calibration({"path": "policy.gwp", "engine": "ort"})
    assert (line.name, line.passed) == ("calibration", passed)
    assert words in line.detail
    assert preflight.check_calibration({"script": "sine"}) == ()


def test_bundle_and_engine_are_named_where_there_are_any():
    lines = preflight.note_bundle({"path": "policy.gwp", "engine": "ort", "provider": "cuda"})
    assert [(line.name, line.passed) for line in lines] == [("bundle", True), ("engine", True)]
    assert "policy.gwp" in lines[0].detail
    assert lines[1].detail == "ort on cuda"
    assert preflight.note_bundle({"path": "p", "engine": "trt", "provider": "cpu"})[1].detail == (
        "trt"
    )
    assert preflight.note_bundle({"script": "sine"}) == ()
