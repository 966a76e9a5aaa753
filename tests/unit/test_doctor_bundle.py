"""What the doctor says of a bundle and a robot file: the run's own checks, without an arm."""

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from gwp_edge import preflight
from gwp_edge.doctor.bundle import check_bundle, check_robot
from gwp_edge.doctor.system import CheckResult, LocalSystem
from gwp_edge.testing import make_spec

FILE = """
name = "mine"
[arm]
kind = "piper"
[arm.options]
can = "can_nowhere"
[[cameras]]
role = "cam_high"
kind = "realsense"
picture = "1.png"
[cameras.options]
serial = "123"
"""
ATTACHED = [CheckResult(name="camera 123", status="pass", detail="D435")]
NOW_S = 2_000_000_000.0


def robot_file(tmp_path, text=FILE):
    path = tmp_path / "robot.toml"
    path.write_text(text)
    return str(path)


def of(results):
    assert len({r.name for r in results}) == len(results)
    return {r.name: r for r in results}


@pytest.mark.export
def test_bundle_passes_and_a_damaged_one_fails_with_its_file(exported, tmp_path):
    whole = of(check_bundle(exported("gwp05")))
    assert {name: r.status for name, r in whole.items()} == {
        "bundle": "pass", "engine": "pass", "calibration": "pass", "golden": "pass",
    }  # fmt: skip
    damaged = tmp_path / "damaged.gwp"
    shutil.copytree(exported("gwp05"), damaged)
    weights = damaged / "weights.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    (result,) = check_bundle(damaged)
    assert (result.name, result.status) == ("bundle", "fail")
    assert "weights.safetensors" in result.detail
    assert result.fix


@pytest.mark.export
def test_bundle_on_an_engine_that_is_not_there_fails(exported):
    results = of(check_bundle(exported("gwp05"), engine="quantum"))
    assert results["bundle"].status == "pass"
    assert results["engine"].status == "fail"
    assert "golden" not in results


@pytest.mark.export
def test_bundle_that_a_run_refuses_for_its_calibration_fails_here_too(exported, monkeypatch):
    """Doctor passed it, and the run's preflight then refused it."""
    invented = SimpleNamespace(is_synthetic=True, n_samples=64, dataset="noise")
    monkeypatch.setattr(
        preflight, "read_manifest", lambda path: SimpleNamespace(calibration=invented)
    )
    path = exported("gwp05")
    results = of(check_bundle(path))
    assert results["calibration"].status == "fail"
    assert "SYNTHETIC" in results["calibration"].detail
    lines = preflight.check_loaded({"path": path, "engine": "ort", "provider": "cpu"})
    assert [(r.name, r.detail) for r in list(results.values())[:-1]] == [
        (line.name, line.detail) for line in lines
    ]


def test_missing_bundle_fails(tmp_path):
    (result,) = check_bundle(tmp_path / "none.gwp")
    assert result.status == "fail"


@pytest.mark.skipif(not Path("/sys/class/net").exists(), reason="this machine has no /sys")
def test_robot_file_is_held_to_buses_cameras_and_pictures(tmp_path):
    results = of(check_robot(robot_file(tmp_path), None, LocalSystem(), ATTACHED, NOW_S))
    assert results["robot"].status == "pass"
    assert results["robot: cam_high"].status == "pass"
    assert results["robot: can can_nowhere"].status == "fail"
    assert results["robot: camera pictures"].status == "fail"  # there is no 1.png


def test_robot_file_without_pictures_is_a_warning_with_its_fix(tmp_path):
    path = robot_file(tmp_path, FILE.replace('picture = "1.png"\n', ""))
    result = of(check_robot(path, None, LocalSystem(), ATTACHED, NOW_S))["robot: camera pictures"]
    assert result.status == "warn"
    assert "gwp-edge cameras --write" in result.fix


def test_camera_that_is_not_attached_or_not_named_fails(tmp_path):
    path = robot_file(tmp_path)
    missing = of(check_robot(path, None, LocalSystem(), [], NOW_S))["robot: cam_high"]
    assert missing.status == "fail"
    assert "there are: none" in missing.detail
    alone = FILE.replace('serial = "123"', "")
    assert "robot: cam_high" not in of(
        check_robot(robot_file(tmp_path, alone), None, LocalSystem(), ATTACHED, NOW_S)
    )
    another = '[[cameras]]\nrole = "cam_left_wrist"\nkind = "realsense"\n'
    path = robot_file(tmp_path, alone + another)
    unnamed = of(check_robot(path, None, LocalSystem(), ATTACHED, NOW_S))["robot: cam_high"]
    assert "names no serial" in unnamed.detail


def test_robot_that_does_not_fit_the_policy_fails_in_words(tmp_path):
    spec = make_spec(2, cameras=("cam_high", "cam_left_wrist"))
    path = robot_file(tmp_path)
    (result,) = check_robot(path, spec, LocalSystem(), ATTACHED, NOW_S)
    assert result.status == "fail"
    assert "cam_left_wrist" in result.detail
    (result,) = check_robot("piper", None, LocalSystem(), ATTACHED, NOW_S)
    assert "without a bundle" in result.detail
