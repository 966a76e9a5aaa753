"""The command line: answers on stdout, one-line errors on stderr, nothing half-written."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from gwp_edge import cli

pytestmark = pytest.mark.export

REFERENCE = Path(__file__).parents[1] / "data" / "reference" / "gwp05"


@pytest.fixture
def gwp(monkeypatch, capsys):
    """Run a command in this process; gives (exit code, stdout, stderr)."""
    import logging

    def run(*words) -> tuple[int, str, str]:
        handlers, level = logging.root.handlers[:], logging.root.level
        monkeypatch.setattr(sys, "argv", ["gwp-edge", *map(str, words)])
        code = 0
        signals = {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)}
        try:
            cli.main()
        except SystemExit as e:
            code = e.code or 0
        finally:
            logging.root.handlers[:], logging.root.level = handlers, level
            for number, handler in signals.items():
                signal.signal(number, handler)
        out, err = capsys.readouterr()
        return code, out, err

    return run


def one_line(err: str) -> str:
    lines = [line for line in err.splitlines() if line.startswith("gwp-edge: ")]
    assert len(lines) == 1, err
    return lines[0]


@pytest.mark.parametrize("command", ["export", "inspect", "infer", "run", "doctor"])
def test_help_of_every_command_has_an_example(gwp, command):
    code, out, _ = gwp(command, "--help")
    assert code == 0
    assert "Example: gwp-edge" in re.sub(r"\s+", " ", out)


def test_infer_writes_the_reference_actions(gwp, exported, tmp_path):
    expected = np.load(REFERENCE / "expected.npz")
    np.save(tmp_path / "noise.npy", expected["noise"])
    code, out, err = gwp(
        "infer", exported("gwp05", timesteps="exact"), "--observation",
        REFERENCE / "observation.npz", "--noise", tmp_path / "noise.npy",
        "--out", tmp_path / "actions.npy", "--json",
    )  # fmt: skip
    assert code == 0, err
    actions = np.load(tmp_path / "actions.npy")
    assert actions.shape == (48, 14)
    assert np.abs(actions - expected["action"]).max() < 2e-4
    answer = json.loads(out)
    assert answer["shape"] == [48, 14]
    assert set(answer["stages_ms"]) == {
        "preprocess",
        "vision",
        "prefill",
        "denoise",
        "postprocess",
    }


def test_infer_with_seed_repeats_itself(gwp, exported, tmp_path):
    def answer(seed):
        out = tmp_path / f"{seed}.npy"
        words = ("--observation", REFERENCE / "observation.npz", "--seed", seed, "--out", out)
        assert gwp("infer", exported("gwp05"), *words)[0] == 0
        return np.load(out)

    first = answer(1)
    assert np.array_equal(first, answer(1))
    assert not np.array_equal(first, answer(2))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a.pop("cam_left_wrist"), "has no cam_left_wrist"),
        (lambda a: a.pop("state"), "has no state"),
        (lambda a: a.update(state=a["state"][:7]), "state must be 14"),
        (lambda a: a.update(cam_high=a["cam_high"].astype(np.float32)), "uint8 RGB"),
        (lambda a: a.update(cam_high=a["cam_high"][..., :2]), "uint8 RGB"),
        (lambda a: a.update(state=np.full(14, np.nan, np.float32)), "not finite"),
    ],
)
def test_infer_with_bad_observation_is_one_line(gwp, exported, tmp_path, change, message):
    arrays = dict(np.load(REFERENCE / "observation.npz"))
    change(arrays)
    np.savez(tmp_path / "obs.npz", **arrays)
    out = tmp_path / "actions.npy"
    words = ("--observation", tmp_path / "obs.npz", "--out", out)
    code, _, err = gwp("infer", exported("gwp05"), *words)
    assert code == 1
    assert message in one_line(err)
    assert not out.exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--noise", "missing.npy"), "no such file"),
        (("--task", "dance"), "is not in this bundle; it has 'episode_000000'"),
        (("--engine", "magic"), "--engine magic is not known"),
        (("--provider", "cuda"), "CUDAExecutionProvider"),
        (("--out", "/nowhere/at/all/a.npy"), "does not exist"),
    ],
)
def test_infer_with_bad_option_says_what_to_do(gwp, exported, words, message):
    code, _, err = gwp(
        "infer", exported("gwp05"), "--observation", REFERENCE / "observation.npz", *words
    )
    assert code == 1
    assert message in one_line(err)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--precision", "int3"), "--precision int3 is not known"),
        (("--steps", "1001"), "--steps must be 1 to"),
        (("--calibration", "nothing"), "--calibration has no effect with --precision fp32"),
        (("--recipe", "nothing"), "--recipe has no effect with --precision fp32"),
        (("--percentile", "nan"), "--percentile has no effect with --precision fp32"),
        (("--block", "7"), "--block has no effect with --precision fp32"),
        (("--device", "cuda"), "--device has no effect with --precision fp32"),
        (("--observer", "mse"), "--observer has no effect with --precision fp32"),
        (("--rest", "fp16"), "--rest has no effect with --precision fp32"),
        (
            ("--precision", "int8", "--no-budget", "--block", "32"),
            "--block has no effect with --precision int8; choose w4, or leave it out",
        ),
        (("--precision", "int8", "--max-error", "nan"), "--max-error: expected a positive"),
        (("--precision", "int8", "--max-error", "-1"), "--max-error: expected a positive"),
        (("--precision", "int8"), "pass --calibration DATASET, or --no-budget"),
        (("--precision", "w4", "--no-budget", "--block", "48"), "--block: expected one of 32"),
        (
            ("--precision", "w4", "--no-budget", "--target", "thor", "--block", "32"),
            "--target thor: TensorRT has no int4 blocks of 32; use --block 64 or 128",
        ),
        (("--precision", "int8", "--no-budget", "--device", "cuda:99"), "--device cuda:99"),
        (
            ("--precision", "int8", "--no-budget", "--calibration-record", "no/such/record"),
            "the folder does not exist",
        ),
        (("--embodiment", "7"), "the checkpoint has 0..1"),
        (("--timesteps", "rough"), "--timesteps rough is not known"),
        (("--layout", "octopus"), "not a built-in layout"),
        (("--norm-stats", "nothing.json"), "nothing.json"),
        (("--prompt", "fold the towel"), "base"),
    ],
)
def test_export_with_bad_option_leaves_nothing(gwp, tmp_path, words, message):
    out = tmp_path / "policy.gwp"
    code, _, err = gwp("export", REFERENCE / "checkpoint", "--out", out, *words)
    assert code == 1
    assert message in one_line(err)
    assert os.listdir(tmp_path) == []


def test_export_prints_error_and_memory(gwp, tmp_path):
    out = tmp_path / "policy.gwp"
    code, stdout, err = gwp("export", REFERENCE / "checkpoint", "--out", out, "--json")
    assert code == 0, err
    answer = json.loads(stdout)
    assert answer["checked_with"] == ["ort cpu"]
    assert answer["error"]["joints_rad"]["max"] < 2e-4
    assert answer["peak_resident_bytes"] > 50e6
    code, stdout, _ = gwp("inspect", out)
    assert code == 0
    assert "left_joint1.pos" in stdout
    assert json.loads(gwp("inspect", out, "--json")[1])["bundle_id"] == answer["bundle_id"]


@pytest.mark.parametrize("target", ["orin", "thor"])
def test_export_for_a_jetson_says_what_its_layers_are(gwp, tmp_path, target):
    out = tmp_path / "policy.gwp"
    words = ("--precision", "w4", "--no-budget", "--target", target)
    code, stdout, err = gwp("export", REFERENCE / "checkpoint", "--out", out, *words, "--json")
    assert code == 0, err
    assert json.loads(stdout)["checked_with"] == ["ort cpu"]
    manifest = json.loads((out / "manifest.json").read_text())
    assert {layer["format"] for layer in manifest["precision"]["layers"]} == {
        "w4",
        "fp16",
        "fp32",
    }


def test_export_of_one_arm_layout_makes_a_seven_channel_bundle(gwp, tmp_path):
    out = tmp_path / "one.gwp"
    words = ("--out", out, "--layout", "piper", "--json")
    assert gwp("export", REFERENCE / "checkpoint", *words)[0] == 0
    spec = json.loads(gwp("inspect", out, "--json")[1])["spec"]
    assert [c["name"] for c in spec["channels"]][-1] == "gripper.pos"
    assert len(spec["channels"]) == 7


def test_export_with_layout_file_takes_its_cameras_and_rate(gwp, tmp_path):
    layout = {
        "channels": [{"name": "lift", "unit": "m", "kind": "delta"}],
        "canvas": {
            "width_px": 320, "height_px": 384,
            "views": [
                {"camera": "eye", "x_px": 0, "y_px": 0, "width_px": 320, "height_px": 384}
            ],
        },
        "n_rows": 16,
        "rate_hz": 20,
    }  # fmt: skip
    (tmp_path / "lift.json").write_text(json.dumps(layout), "utf-8-sig")  # as some editors do
    out = tmp_path / "lift.gwp"
    words = ("--out", out, "--layout", tmp_path / "lift.json")
    code, _, err = gwp("export", REFERENCE / "checkpoint", *words)
    assert code == 0, err
    spec = json.loads(gwp("inspect", out, "--json")[1])["spec"]
    assert (spec["n_rows"], spec["period_ns"]) == (16, 50_000_000)
    layout["canvas"]["views"][0]["width_px"] = 400
    (tmp_path / "lift.json").write_text(json.dumps(layout))
    code, _, err = gwp("export", REFERENCE / "checkpoint", *words)
    assert code == 1
    assert "view eye leaves the canvas" in one_line(err)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_export_interrupted_leaves_nothing(tmp_path, number):
    """A kill in the middle of an export must not leave half a bundle or a work folder."""
    out = tmp_path / "out" / "policy.gwp"
    out.parent.mkdir()
    words = ["export", str(REFERENCE / "checkpoint"), "--out", str(out), "--steps", "500"]
    process = subprocess.Popen(
        [sys.executable, "-m", "gwp_edge.cli", *words],
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 120
    while not any(out.parent.iterdir()) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    assert process.poll() is None, process.stderr.read().decode()
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err.decode()
    assert b"interrupted" in err
    assert os.listdir(out.parent) == []
