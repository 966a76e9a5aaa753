"""``gwp-edge build``, ``plan`` and ``inspect`` as a user calls them."""

from __future__ import annotations

import json
import os
import signal
import threading
from types import SimpleNamespace

import pytest
import typer
from typer.testing import CliRunner

from gwp_edge.bundle import Bundle
from gwp_edge.commands import building, exporting, planning
from gwp_edge.console import EXIT_INTERRUPTED, one_line_errors
from gwp_edge.engines.trt_build import BuildResult
from gwp_edge.engines.trt_cache import building as building_folder
from gwp_edge.engines.trt_progress import run_interruptible
from gwp_edge.engines.trt_proof import Proof
from gwp_edge.engines.trt_record import SCHEMA_VERSION, EngineKey, EngineRecord, write_record
from gwp_edge.engines.trt_timing import StageTiming
from gwp_edge.errors import GwpError, PerformanceIssue, SpecError
from gwp_edge.machine_limits import GemmRate, Limits
from gwp_edge.planning import device_names, estimate, self_check, workload
from gwp_edge.planning.devices import this_processor

app = typer.Typer()
app.command()(building.build)
app.command()(planning.plan)
app.command()(exporting.inspect)


def run(*arguments: str) -> str:
    """Return what a command printed; its error is raised as in the program."""
    done = CliRunner().invoke(app, arguments)
    if isinstance(done.exception, GwpError):
        raise done.exception
    assert done.exit_code == 0, done.output
    return done.stdout


SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

KEY = EngineKey(
    graphs={},
    weights="w",
    precision="int8",
    tensorrt="10.3.0",
    compute_capability="8.7",
    device="Orin",
    n_multiprocessors=16,
    board="NVIDIA Jetson AGX Orin Developer Kit",
    flags={"level": "3"},
)


@pytest.fixture
def built(tmp_path):
    bundle = tmp_path / "policy.gwp"
    record = EngineRecord(
        schema="gwp-edge.engines",
        schema_version=SCHEMA_VERSION,
        key=KEY,
        bundle_id="x",
        created_at="2026-01-01T00:00:00Z",
        files={},
        proof=(),
        golden_error=0.001,
    )
    bundle.mkdir()
    with building_folder(bundle, KEY) as work:
        write_record(work, record)
    return bundle


def test_build_list_and_clean_need_no_gpu(built):
    (only,) = json.loads(run("build", str(built), "--list", "--json"))
    assert only["record"]["key"]["device"] == "Orin"
    assert "10.3.0" in run("build", str(built), "--list")
    assert len(json.loads(run("build", str(built), "--clean", "--json"))["removed"]) == 1
    assert json.loads(run("build", str(built), "--list", "--json")) == []
    assert "there was nothing" in run("build", str(built), "--clean")


@pytest.mark.parametrize("flag", ["--list", "--clean"])
def test_build_of_a_mistyped_bundle_is_an_error(tmp_path, flag):
    with pytest.raises(SpecError, match=r"nope\.gwp: no such bundle"):
        run("build", str(tmp_path / "nope.gwp"), flag)


@pytest.mark.parametrize(
    ("verdict", "told"), [("plausible", 0), ("below the floor", 1), ("far above the floor", 1)]
)
def test_build_tells_times_that_the_model_cannot_explain(tmp_path, monkeypatch, verdict, told):
    timing = StageTiming(
        stage="vision", n=7, measured_ms=3.0, floor_ms=4.0, expected_ms=5.0, verdict=verdict
    )
    record = EngineRecord(
        schema="gwp-edge.engines",
        schema_version=SCHEMA_VERSION,
        key=KEY,
        bundle_id="x",
        created_at="2026-01-01T00:00:00Z",
        files={},
        proof=("vision fp16: 12 as asked",),
        golden_error=0.001,
        timing=(timing,),
    )
    result = BuildResult(folder=tmp_path, record=record, proofs=(), seconds=1.0)
    monkeypatch.setattr("gwp_edge.bundle.Bundle.open", lambda path, progress=None: None)
    monkeypatch.setattr("gwp_edge.engines.trt_build.build_engines", lambda *_: result)
    done = CliRunner().invoke(app, ["build", str(tmp_path)])
    assert done.exit_code == 0, done.output
    assert "vision 3.00 ms (median of 7)" in done.output
    assert done.output.count("suspect: vision is") == told


def test_build_names_layers_that_are_not_as_asked(tmp_path, monkeypatch):
    layers = tuple(
        Proof(stage="prefill", name=f"l{i}", asked="fp32", got="fp16", outcome="fell back")
        for i in range(12)
    )
    record = EngineRecord(
        schema="gwp-edge.engines",
        schema_version=SCHEMA_VERSION,
        key=KEY,
        bundle_id="x",
        created_at="2026-01-01T00:00:00Z",
        files={},
        proof=(),
        not_as_asked=layers,
        golden_error=0.001,
    )
    given = []

    def fake_build(bundle, options, progress):
        given.append(options)
        return BuildResult(folder=tmp_path, record=record, proofs=(), seconds=1.0)

    monkeypatch.setattr("gwp_edge.bundle.Bundle.open", lambda path, progress=None: None)
    monkeypatch.setattr("gwp_edge.engines.trt_build.build_engines", fake_build)
    text = run("build", str(tmp_path), "--allow-unproven")
    assert "prefill l0: fp16, asked fp32" in text
    assert "and 2 more" in text
    assert given[0].allow_unproven


@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.parametrize("inside", ["the golden gate", "TensorRT"])
def test_build_killed_leaves_nothing_and_one_line(tmp_path, monkeypatch, number, inside):
    """SIGTERM outside of TensorRT ended the program on the spot, with gigabytes left behind."""
    bundle, cancelled, ended = tmp_path / "policy.gwp", threading.Event(), []

    def work():
        os.kill(os.getpid(), number)
        ended.append(cancelled.wait(5))

    def killed(*_):
        with building_folder(bundle, KEY):
            if inside == "TensorRT":
                run_interruptible(work, cancelled.set)
            else:
                os.kill(os.getpid(), number)
            pytest.fail("the signal did nothing")

    monkeypatch.setattr("gwp_edge.bundle.Bundle.open", lambda path, progress=None: None)
    monkeypatch.setattr("gwp_edge.engines.trt_build.build_engines", killed)
    with pytest.raises(SystemExit) as stopped, one_line_errors():
        building.build(bundle)
    assert stopped.value.code == EXIT_INTERRUPTED
    # The thread is waited for: it may hold files that are removed next.
    assert ended == ([True] if inside == "TensorRT" else [])
    assert not bundle.with_name("policy.gwp.engines").exists()


def test_build_refuses_contradictions_and_bad_numbers(built):
    with pytest.raises(SpecError, match="exclude each other"):
        run("build", str(built), "--list", "--clean")
    with pytest.raises(SpecError, match="--level must be 0 to 5"):
        run("build", str(built), "--level", "9")
    with pytest.raises(SpecError, match="--workspace must be at least"):
        run("build", str(built), "--workspace", "1")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "give a bundle, or --size"),
        (("x.gwp", "--size", "gwp05-full"), "give a bundle, or --size"),
        (("--size", "gwp05-full"), "--size needs --precision"),
        (("x.gwp", "--precision", "int8"), "belong to --size"),
        (("--size", "gwp05-full", "--device", "tx2"), "tx2 is not known"),
    ],
)
def test_plan_refuses_what_does_not_fit_together(arguments, message):
    with pytest.raises(SpecError, match=message):
        run("plan", *arguments)


@pytest.mark.export
def test_plan_of_a_bundle_says_modelled_for_every_device(exported):
    pytest.importorskip("torch")
    bundle = str(exported("gwp05", precision="bf16"))
    found = json.loads(run("plan", bundle, "--json"))
    assert found["label"] == "modelled"
    for row in found["devices"]:
        assert row["floor_ms"] < row["expected_ms"]
        assert row["fits"]["run"]
    text = run("plan", bundle, "--device", "thor")
    assert "modelled" in text
    assert "thor" in text


@pytest.mark.export
def test_plan_of_a_size_refuses_fp8_on_orin_and_goes_on(exported):
    pytest.importorskip("torch")
    found = json.loads(
        run(
            *("plan", "--size", "gwp05-tiny", "--precision", "fp8", "--rest", "fp16", "--json"),
            *("--device", "orin-agx-64", "--device", "thor"),
        )
    )
    orin, thor = found["devices"]
    assert "no fp8 units" in orin["refused"]
    assert "--precision int8" in orin["refused"]
    assert thor["refused"] is None
    with pytest.raises(SpecError, match="--rest fp7"):
        run("plan", "--size", "gwp05-tiny", "--precision", "fp8", "--rest", "fp7")


@pytest.mark.export
def test_build_without_a_gpu_says_what_is_missing(exported):
    pytest.importorskip("torch")
    try:
        import pycuda  # noqa: F401
    except ImportError:
        with pytest.raises(PerformanceIssue, match="pycuda cannot be imported"):
            run("build", str(exported("gwp05", precision="bf16")))


@pytest.mark.export
def test_inspect_shows_the_modelled_times_of_every_device(exported):
    pytest.importorskip("torch")
    text = run("inspect", str(exported("gwp05", precision="bf16")))
    for name in device_names():
        assert name in text
    assert "One chunk, modelled" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--size", "gwp05-wide4", "--precision", "int8"), "float32 rates alone"),
        (("x.gwp", "--device", "thor"), "about this processor"),
        ((), "give a bundle, or --size"),
    ],
)
def test_plan_check_refuses_what_it_cannot_compare(arguments, message):
    with pytest.raises(SpecError, match=message):
        run("plan", "--check", *arguments)


@pytest.mark.export
@pytest.mark.parametrize(("factor", "agrees"), [(1.1, True), (0.9, True), (1.4, False)])
def test_plan_check_holds_the_model_to_measured_stages(exported, monkeypatch, factor, agrees):
    """Limits and stage times are given, so that the machine's load decides nothing."""
    pytest.importorskip("torch")
    bundle = Bundle.open(exported("gwp05", precision="fp32"))
    limits = Limits(
        threads=2,
        gemm=tuple(GemmRate(shape=(n, 64, 64), gflop_s=50.0) for n in (1, 64, 512)),
        stream_gb_s=10.0,
    )
    modelled = estimate(workload(bundle.manifest), this_processor(limits, 10**10))
    stages = {s.stage: [round(s.expected_ms * 1e6 / factor)] * 3 for s in modelled.stages}
    times = SimpleNamespace(stages=stages)
    monkeypatch.setattr(self_check, "measure_limits", lambda threads: limits)
    monkeypatch.setattr(self_check, "time_engine", lambda *_, **__: times)
    if agrees:
        assert "agrees within 25 %" in run("plan", str(bundle.root), "--check")
    else:
        with pytest.raises(PerformanceIssue, match=r"vision: modelled .* off by \+40 %"):
            run("plan", str(bundle.root), "--check")


@pytest.mark.export
def test_plan_check_refuses_a_bundle_that_is_not_float32(exported):
    pytest.importorskip("torch")
    with pytest.raises(SpecError, match=r"is bf16; float32 rates alone"):
        run("plan", str(exported("gwp05", precision="bf16")), "--check")
