"""Whole profiles of a small exported bundle: what is injected is what the verdict blames."""

from __future__ import annotations

import dataclasses
import json
import sys

import numpy as np
import pytest
import typer
from trace_rules import broken_rules

pytest.importorskip("torch")
pytestmark = pytest.mark.export

from gwp_edge.chunking import Guidance  # noqa: E402
from gwp_edge.commands import profiling  # noqa: E402
from gwp_edge.console import one_line_errors  # noqa: E402
from gwp_edge.drivers.disturbed import is_lost  # noqa: E402
from gwp_edge.errors import SpecError  # noqa: E402
from gwp_edge.machine_limits import GemmRate, Limits  # noqa: E402
from gwp_edge.policy import load  # noqa: E402
from gwp_edge.profiling.cameras import _absent_frames, _steady  # noqa: E402
from gwp_edge.profiling.collect import Listener, random_observation  # noqa: E402
from gwp_edge.profiling.reports import read_report  # noqa: E402
from gwp_edge.shared_memory import SHM_DIR, unique_name  # noqa: E402

LIMITS = Limits(threads=1, gemm=(GemmRate(shape=(64, 64, 64), gflop_s=100.0),), stream_gb_s=10.0)


@pytest.fixture
def profile(monkeypatch, capsys):
    """Run ``gwp-edge profile`` in this process; gives (exit code, stdout, stderr)."""
    app = typer.Typer()
    app.add_typer(profiling.app, name="profile")

    # A second command, so that typer keeps the first one's name.
    @app.command()
    def nothing() -> None: ...

    # Whole numbers instead of ten seconds of measuring this machine.
    monkeypatch.setattr("gwp_edge.profiling.run.cached_limits", lambda *_args, **_kwargs: LIMITS)

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["gwp-edge", "profile", *map(str, words)])
        code = 0
        try:
            with one_line_errors():
                app()
        except SystemExit as e:
            code = e.code or 0
        out, err = capsys.readouterr()
        return code, out, err

    return run


def absent_of(raw, camera_idx, camera, drop):
    """Return frames that were lost on purpose, that were used, and that the report found absent."""
    stamps = _steady(raw, 0.2)
    idx = stamps["frame_idx"][:, camera_idx].tolist()
    took_ns = stamps["t_received_ns"][:, camera_idx] - stamps["t_captured_ns"][:, camera_idx]
    found = _absent_frames(stamps, camera_idx, camera.period_ms * 1e6, float(took_ns.min()))
    lost = {i for i in range(idx[0], idx[-1] + 50) if is_lost(camera.name, i, drop)}
    return lost, set(idx), found


def verdict(report, topic):
    return next(v for v in report.verdicts if v.topic == topic)


def test_profile_engine_alone_blames_the_slowed_stage(profile, exported, tmp_path):
    bundle = exported("gwp05")
    words = (bundle, "--duration", "1", "--warmup", "0", "--threads", "1", "--repeat", "2")
    code, out, err = profile(
        *words, "--json", tmp_path / "p.json", "--disturb", "prefill=40ms", "--html",
        tmp_path / "p.html",
    )  # fmt: skip
    assert code == 0, err
    report = read_report(tmp_path / "p.json")
    steady = report.phases["steady"]
    assert steady["prefill"].p50 >= 40.0
    assert steady["predict"].p50 >= steady["prefill"].p50
    blamed = verdict(report, "stage").blames
    # Other programs may make another stage as slow as this one was made.
    assert blamed == "prefill" or steady[blamed].p50 >= 40.0
    assert report.phases["cold"]["predict"].n == 2
    assert "frame age" not in steady
    assert report.motor is None
    assert set(report.roofline.stages) == {"vision", "prefill", "denoise"}
    assert report.context.bundle_id
    assert report.context.disturbances == ("prefill=40ms",)
    assert f"{blamed} is worth work first" in " ".join(out.split())


def test_profile_robot_blames_camera_and_motor_loop(profile, exported, tmp_path, monkeypatch):
    names = []

    def record(label):
        names.append(unique_name(label))
        return names[-1]

    for module in ("gwp_edge.mailbox", "gwp_edge.drivers.kinematic"):
        monkeypatch.setattr(f"{module}.unique_name", record)
    words = (
        exported("gwp05"), "--robot", "kinematic", "--duration", "4", "--warmup", "0.2",
        "--threads", "1", "--no-realtime", "--json", tmp_path / "p.json", "--trace",
        tmp_path / "t.json", "--disturb", "drop=10%", "--disturb", "stall=20ms/0.3s",
        "--execution", "hard", "--lead-ms", "5", "--warm-start", "0.9",
    )  # fmt: skip
    raws = []
    listened = Listener.raw
    monkeypatch.setattr(Listener, "raw", lambda self: raws.append(listened(self)) or raws[-1])
    # On a busy machine a stall may last until the guardian takes over, which is no fault of ours.
    code, err = 1, "guardian"
    for _ in range(4):
        if code and "guardian" in err:
            code, _, err = profile(*words)
    assert code == 0, err
    report = read_report(tmp_path / "p.json")
    assert report.outcome == "duration"
    camera = report.cameras[0]
    # A machine with no time to spare meets fewer of the lost ones with nothing else to do; but what
    # is said to be missing was lost, and by this camera.
    assert camera.n_missing >= 1
    for camera_idx, of_camera in enumerate(report.cameras):
        lost, used, found = absent_of(raws[-1], camera_idx, of_camera, 0.1)
        missing = found - used
        assert len(missing) == of_camera.n_missing
        # A frame that came between two looks is hidden by the lost one after it: the camera under
        # the disturbance makes its frames when it is looked at.
        assert {k for k in missing if k + 1 not in missing} <= lost
    assert camera.clock == "sim"
    assert any(v.topic == "camera" and v.blames == camera.name for v in report.verdicts)
    assert report.motor.tail == "loop"
    assert report.motor.longest_miss >= 2
    assert verdict(report, "motor").blames == "loop"
    assert report.phases["steady"]["frame to command"].n > 10
    # The golden run is the first call of the engine, and the only cold one.
    assert report.phases["cold"]["predict"].n == 1
    assert report.phases["warm"]["predict"].n >= 3
    # The kinematic robot draws a picture when it is asked for one.
    assert report.cameras[0].transport_ms is None
    assert "transport" not in report.phases["steady"]
    assert report.phases["steady"]["processor time of predict"].n > 10
    assert "frame to command" in report.phases["steady"]
    assert report.system.worst["motor_rss_mb"] > 1
    assert report.context.execution == "hard"
    assert report.cost.stamp_percent > 0
    trace = json.loads((tmp_path / "t.json").read_text())
    assert broken_rules(trace) == []
    events = trace["traceEvents"]
    assert {e["ph"] for e in events} == {"M", "X", "C", "s", "t", "f"}
    assert len(names) >= 2
    assert [n for n in names if (SHM_DIR / n).exists()] == []


def test_profile_robot_blames_bus_and_late_frames(profile, exported, tmp_path):
    words = (
        exported("gwp05"), "--robot", "kinematic", "--duration", "2", "--warmup", "0.2",
        "--threads", "1", "--no-realtime", "--json", tmp_path / "p.json", "--disturb",
        "bus=9+-1ms@10%", "--disturb", "observe=6ms", "--disturb", "postprocess=7ms",
    )  # fmt: skip
    code, err = 1, "guardian"
    for _ in range(4):
        if code and "guardian" in err:
            code, _, err = profile(*words)
    assert code == 0, err
    report = read_report(tmp_path / "p.json")
    steady = report.phases["steady"]
    assert report.motor.send_ms.p99 >= 8.0
    assert report.motor.tail_shares["bus"] > 0
    assert steady["observe"].p50 >= 6.0
    assert steady["postprocess"].p50 >= 7.0
    # Waiting takes no processor time, and nothing of it is time that nobody accounts for.
    assert steady["predict"].p50 >= steady["postprocess"].p50
    assert steady["unaccounted"].p50 < 7.0


def test_profile_beside_burners_says_that_others_took_part(profile, exported, tmp_path):
    """Burners made "denoise worth work first" and no verdict spoke of them."""
    code, _, err = profile(
        exported("gwp05"), "--duration", "3", "--warmup", "2", "--threads", "1", "--json",
        tmp_path / "p.json", "--disturb", "cpu=2", "--disturb", "mem=1",
    )  # fmt: skip
    assert code == 0, err
    report = read_report(tmp_path / "p.json")
    load = report.system.load
    assert load.others_percent > 15.0
    assert load.total_percent >= load.others_percent
    assert verdict(report, "machine").blames == "others"
    assert report.cost.sampler_percent > 0


def test_profile_whose_file_cannot_be_written_still_prints_its_table(
    profile, exported, tmp_path, monkeypatch
):
    """Files were written first, so a full disk took the figures of the whole run with it."""

    def full(path, write):
        raise SpecError(f"{path}: cannot be written: No space left on device")

    monkeypatch.setattr(profiling, "write_file", full)
    code, out, err = profile(
        exported("gwp05"), "--duration", "0.2", "--warmup", "0", "--threads", "1", "--json",
        tmp_path / "p.json",
    )  # fmt: skip
    assert code == 1
    assert "No space left" in err
    assert "steady, ms" in out
    assert "Verdict" in out


def test_policy_times_guidance_apart_from_preprocess(exported):
    """Guidance was part of preprocess, and "guide" was whatever no stage accounts for."""
    policy = load(exported("gwp05"), threads=1, check_golden=False)
    try:
        with pytest.raises(SpecError, match="no chunk"):
            _ = policy.timing
        policy.check_golden()
        assert policy.timing.total_ns > 0, "the golden run is the cold one and must be timed"
        observation = random_observation(policy.spec, np.random.default_rng(0), 0)
        chunk = policy.predict(observation)
        assert policy.timing.guide_ns == 0
        policy.predict(observation, previous=chunk, guidance=Guidance(n_frozen_rows=2))
        assert policy.timing.guide_ns > 0
        parts = dataclasses.replace(policy.timing, guide_ns=0)
        assert policy.timing.total_ns == parts.total_ns + policy.timing.guide_ns
    finally:
        policy.close()


def test_profile_bad_words_are_refused_in_one_line(profile, exported, tmp_path):
    bundle = exported("gwp05")
    for words, said in (
        (("--disturb", "stall=20ms/1s"), "need a robot"),
        (("--robot", "piper-dual", "--disturb", "cpu=1"), "simulated"),
        (("--json", tmp_path / "no" / "p.json"), "does not exist"),
        (("--task", "juggle"), "not in this bundle"),
        (("--duration", "0"), "--duration"),
        (("--duration", "nan"), "--duration"),
        (("--duration", "inf"), "--duration"),
        (("--warmup", "inf"), "--warmup"),
        (("--json", tmp_path), "is a folder"),
        (("--html", tmp_path / "a", "--trace", tmp_path / "a"), "two files"),
        (("--execution", "soft"), "--execution concerns a robot: add --robot"),
        (("--motor-hz", "5"), "--motor-hz concerns a robot"),
        (("--dry-run",), "--dry-run concerns a robot"),
        (("--rerun", tmp_path / "a.rrd"), "add --robot"),
        (("--robot", "kinematic", "--execution", "later"), "--execution later"),
    ):
        code, _, err = profile(bundle, *words)
        assert code == 1
        assert said in err
    code, _, err = profile("compare", tmp_path / "a.json", tmp_path / "b.json")
    assert code == 1
    assert "cannot be read" in err
