"""Building TensorRT engines on stand-ins of the libraries; see trt_fakes.

Not a test of TensorRT: of our gates, proofs, reports and cleaning up.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import sys
import threading
from pathlib import Path

import msgspec
import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("onnx")

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "contract"))
from engine_suite import TOLERANCE, inputs, run_steps
from trt_fakes import FakeGpu, installed

from gwp_edge.bundle import Bundle
from gwp_edge.engines.ort import OrtEngine
from gwp_edge.engines.trt import TrtEngine
from gwp_edge.engines.trt_build import build_engines, check_buildable
from gwp_edge.engines.trt_cache import engines_root, list_engines
from gwp_edge.engines.trt_device import DeviceFacts, last_error, shared_logger
from gwp_edge.engines.trt_options import BuildOptions
from gwp_edge.errors import (
    BuildError,
)
from gwp_edge.planning import memory

pytestmark = pytest.mark.export

DATASET = Path(__file__).resolve().parents[1] / "data" / "dataset"
# A tiny network of random weights: its quantization error is no matter here.
UNBUDGETED = {"max_error_rad": None, "max_error_m": None}


@pytest.fixture
def gpu(monkeypatch):
    with installed(monkeypatch, FakeGpu()) as made:
        yield made


@pytest.fixture
def bundle(exported, tmp_path, gpu) -> Bundle:
    """A bundle in a folder of its own, as engines are written beside it."""
    source = exported("gwp05", precision="fp32", n_steps=4)
    shutil.copytree(source, tmp_path / "policy.gwp")
    return Bundle.open(tmp_path / "policy.gwp")


@pytest.fixture
def built(bundle, gpu) -> Bundle:
    build_engines(bundle, BuildOptions())
    return bundle


def test_build_writes_engines_and_record_beside_the_bundle(bundle, gpu):
    seen: dict[str, list[int]] = {}
    result = build_engines(bundle, BuildOptions(), lambda s, d, t: seen.setdefault(s, []).append(d))
    assert result.folder.parent == engines_root(bundle.root)
    assert {p.name for p in result.folder.iterdir()} == {
        "vision.engine",
        "prefill.engine",
        "denoise.engine",
        "build.json",
    }
    assert result.record.golden_error <= bundle.manifest.golden.tolerance
    assert all("as asked" in line for line in result.record.proof)
    # The stand-in's clock gives 1.5 ms for every stage, and its memory is this machine's.
    assert {timing.measured_ms for timing in result.record.timing} == {1.5}
    assert [timing.n for timing in result.record.timing] == [7, 7, 7 * 4]
    for stage in ("build vision", "build prefill", "build denoise"):
        assert seen[stage] == sorted(seen[stage])
        assert seen[stage][-1] == 1000
    assert "build tf32=off" in gpu.calls
    assert gpu.contexts == 0
    assert gpu.live == {}


def test_build_again_uses_the_timing_cache_and_replaces_the_set(built, gpu):
    cache = next(engines_root(built.root).glob("timing-*.cache"))
    before = cache.read_bytes()
    build_engines(built, BuildOptions())
    assert cache.read_bytes().startswith(before)
    assert len(list_engines(built.root)) == 1
    cache.write_bytes(b"other driver")
    build_engines(built, BuildOptions())
    assert b"other driver" not in cache.read_bytes()


def test_build_damaged_timing_cache_counts_as_empty(built, gpu):
    """TensorRT answers a damaged cache with None, which it does not take back."""
    cache = next(engines_root(built.root).glob("timing-*.cache"))
    cache.write_bytes(gpu.damaged_cache + b"...")
    build_engines(built, BuildOptions())
    assert gpu.damaged_cache not in cache.read_bytes()
    assert cache.read_bytes()


def test_build_without_any_timing_cache_builds_all_the_same(bundle, gpu):
    gpu.damaged_cache = b""
    build_engines(bundle, BuildOptions())
    assert not list(engines_root(bundle.root).glob("timing-*"))


def test_logger_is_one_for_all_and_tells_an_error_once(gpu):
    """TensorRT tells the first logger what concerns no object; a second one missed it."""
    first = shared_logger()
    assert shared_logger() is first
    first.log(sys.modules["tensorrt"].Logger.Severity.ERROR, "out of\nmemory")
    assert last_error(shared_logger()) == "out of memory"
    assert last_error(shared_logger()) == "TensorRT gave no reason"


def test_logger_of_another_library_is_another_one(gpu, monkeypatch):
    first = shared_logger()
    with installed(monkeypatch, FakeGpu()):
        assert shared_logger() is not first


def test_build_records_by_how_much_free_memory_fell(built):
    (_, record), *_ = list_engines(built.root)
    assert list(record.memory) == ["build vision", "build prefill", "build denoise", "load and run"]
    assert all(0 <= n_bytes < 10**11 for n_bytes in record.memory.values())


def test_build_records_the_memory_of_each_engine(built, gpu):
    (_, record), *_ = list_engines(built.root)
    assert {s: f.scratch_bytes for s, f in record.files.items()} == gpu.scratch_bytes


@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_build_reduced_precisions_pass_proof_and_golden_gate(exported, tmp_path, gpu, precision):
    """The stand-ins compute the native graphs, explicit Q/DQ included."""
    quantized = {"calibration": DATASET, "samples": 4, "observer": "minmax", "rest": "fp16"}
    options = quantized | {"smoothing": False} if precision == "int8" else {}
    source = exported("gwp05", precision=precision, n_steps=4, **options, **UNBUDGETED)
    shutil.copytree(source, tmp_path / "policy.gwp")
    bundle = Bundle.open(tmp_path / "policy.gwp")
    result = build_engines(bundle, BuildOptions())
    assert result.record.not_as_asked == ()
    if precision == "int8":
        counts = [line for line in result.record.proof if " int8: " in line]
        assert len(counts) == 2
        assert all("as asked" in line for line in counts)
    engine = TrtEngine(bundle)
    engine.set_prompt(bundle.spec.tasks[0])
    canvas, state, x, prefix, gain = inputs(bundle.spec)
    gains = np.zeros((bundle.spec.sampler.n_steps, *gain.shape), np.float32)
    at_once = engine.chunk(canvas, state, x, prefix, gains)[0]
    reference = OrtEngine(bundle)
    reference.set_prompt(bundle.spec.tasks[0])
    wanted = run_steps(reference, bundle.spec)
    np.testing.assert_array_equal(at_once, run_steps(engine, bundle.spec))
    np.testing.assert_allclose(at_once, wanted, atol=TOLERANCE["trt", precision])
    engine.close()


def left_behind(bundle) -> list[str]:
    """Return what stands beside the bundle, timings and reports of failures apart."""
    found = engines_root(bundle.root).rglob("*")
    return sorted(p.name for p in found if not p.name.startswith(("timing-", "failed-")))


def failure(bundle) -> dict:
    (path,) = engines_root(bundle.root).glob("failed-*.json")
    return json.loads(path.read_text())


@pytest.mark.parametrize(
    ("fault", "message"),
    [("parse", r"cannot parse \S+: no such thing"), ("build", "cannot build it: out of workspace")],
)
def test_build_failure_of_tensorrt_is_told_and_leaves_nothing(bundle, gpu, fault, message):
    gpu.fail_on = fault
    with pytest.raises(BuildError, match=message):
        build_engines(bundle, BuildOptions())
    assert left_behind(bundle) == []
    assert gpu.contexts == 0


def spoil(*names, by=10.0):
    """Return a fault in tensors by name, of an output or of one that is shown."""
    return lambda stage, name, value: value + np.float32(by) if name in names else value


def test_build_wrong_latent_is_deleted_and_vision_named(bundle, gpu):
    gpu.corrupt = spoil("latent", "encoder.conv_out:out")
    with pytest.raises(BuildError, match="vision engine's latent is off by") as caught:
        build_engines(bundle, BuildOptions())
    assert "the first wrong layer is encoder.conv_out (" in str(caught.value)
    assert "were deleted" in str(caught.value)
    assert left_behind(bundle) == []
    assert "latent is off" in failure(bundle)["problem"]
    gpu.corrupt = lambda stage, name, value: value * np.float32("nan")
    with pytest.raises(BuildError, match="latent is not finite"):
        build_engines(bundle, BuildOptions())
    assert left_behind(bundle) == []
    assert gpu.live == {}
    assert gpu.contexts == 0


def test_build_wrong_prefix_names_the_block_and_the_layer(bundle, gpu):
    layer = "blocks.1.visual_expert.attn1.to_k"
    gpu.corrupt = spoil("prefix_k.1", f"{layer}.add:out")
    with pytest.raises(BuildError, match=r"prefix_k\.1 is the first K/V that is off by") as caught:
        build_engines(bundle, BuildOptions())
    assert f"the first wrong layer is {layer} (" in str(caught.value)
    assert left_behind(bundle) == []


def test_build_wrong_step_names_the_first_and_the_worst_layer(bundle, gpu):
    first, worst = "blocks.0.action_expert.attn1.to_q", "action_decoder.out_proj"
    fault, far = spoil("x_next", f"{first}.add:out"), spoil(f"{worst}.add:out", by=1e5)
    gpu.corrupt = lambda stage, name, value: far(stage, name, fault(stage, name, value))
    with pytest.raises(BuildError, match="so denoise is at fault") as caught:
        build_engines(bundle, BuildOptions())
    assert f"the first wrong layer is {first} (" in str(caught.value)
    assert f"the worst {worst} (" in str(caught.value)
    assert left_behind(bundle) == []
    assert gpu.live == {}


def test_build_fault_that_debug_tensors_hide_is_said_to_be_in_a_fusion(bundle, gpu):
    gpu.corrupt = spoil("x_next")
    with pytest.raises(BuildError, match="layers it computes them rightly, so a fusion"):
        build_engines(bundle, BuildOptions())


def test_build_fault_that_cannot_be_looked_for_is_told_all_the_same(bundle, gpu, monkeypatch):
    gpu.corrupt = spoil("x_next")
    monkeypatch.setattr("gwp_edge.engines.trt_reference.available_bytes", lambda: 0)
    with pytest.raises(BuildError, match=r"prefill or denoise is at fault \(comparing layers"):
        build_engines(bundle, BuildOptions())


def test_build_graph_that_replays_old_input_is_deleted(bundle, gpu):
    """A capture that froze its input would answer the first picture for ever."""
    original = gpu.library._cuGraphLaunch
    gpu.library._cuGraphLaunch = lambda executable, stream: (
        original(executable, stream) or (gpu.replays.append(1))
    )
    gpu.replays = []
    frozen: dict[str, np.ndarray] = {}

    def first_answer_again(stage, name, value):
        if name == "x_next" and gpu.library.times_ms:
            return frozen.setdefault(name, value)
        return value

    gpu.corrupt = first_answer_again
    with pytest.raises(BuildError, match="replayed as a CUDA graph differs"):
        build_engines(bundle, BuildOptions())
    assert gpu.replays
    assert left_behind(bundle) == []


def test_build_silent_fallback_fails(bundle, gpu):
    """A quantized layer that the inspector shows as float fails the build."""
    layers = bundle.manifest.precision.layers
    chosen = next(x.name for x in layers if x.stage == "denoise" and x.weight_bytes)
    faked = tuple(
        msgspec.structs.replace(x, format="int8") if x.name == chosen else x for x in layers
    )
    precision = msgspec.structs.replace(bundle.manifest.precision, layers=faked)
    bundle.manifest = msgspec.structs.replace(bundle.manifest, precision=precision)
    with pytest.raises(BuildError, match=r"quantized layers fell back.*fp32 instead of int8") as e:
        build_engines(bundle, BuildOptions(allow_unproven=True))
    assert left_behind(bundle) == []
    (entry,) = failure(bundle)["not_as_asked"]
    assert (entry["name"], entry["got"], entry["outcome"]) == (chosen, "fp32", "fell back")
    assert str(engines_root(bundle.root)) in str(e.value)


def test_build_hidden_layer_fails_unless_allowed_and_is_recorded(bundle, gpu):
    """One quantized layer that the inspector leaves out used to pass among others."""
    layers = bundle.manifest.precision.layers
    chosen = next(x.name for x in layers if x.stage == "denoise" and x.weight_bytes)
    faked = tuple(
        msgspec.structs.replace(x, format="int8") if x.name == chosen else x for x in layers
    )
    precision = msgspec.structs.replace(bundle.manifest.precision, layers=faked)
    bundle.manifest = msgspec.structs.replace(bundle.manifest, precision=precision)
    mark = f"[ONNX Layer: {chosen}]"
    gpu.inspector = lambda found: [x for x in found if mark not in x["Metadata"]]
    with pytest.raises(BuildError, match=r"1 of 1 quantized layers are not shown.*--allow-unprov"):
        build_engines(bundle, BuildOptions())
    assert failure(bundle)["not_as_asked"][0]["name"] == chosen
    result = build_engines(bundle, BuildOptions(allow_unproven=True))
    assert chosen in {x.name for x in result.record.not_as_asked}
    assert not list(engines_root(bundle.root).glob("failed-*"))


def test_build_graph_that_cannot_be_captured_fails_with_nothing_left(bundle, gpu):
    gpu.fail_on = "capture"
    with pytest.raises(BuildError, match="the engines cannot run here: TensorRT failed in vision"):
        build_engines(bundle, BuildOptions())
    assert left_behind(bundle) == []
    assert gpu.live == {}
    assert gpu.contexts == 0


def test_build_interrupted_cancels_and_leaves_nothing(bundle, gpu):
    """Ctrl-C while the library is busy in its own thread."""
    started = threading.Event()

    def interrupt():
        if not started.is_set():
            started.set()
            os.kill(os.getpid(), signal.SIGINT)
        threading.Event().wait(0.05)

    gpu.during_build = interrupt
    # A job in the background of a shell ignores the signal until it is told otherwise.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            build_engines(bundle, BuildOptions())
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)
    assert left_behind(bundle) == []
    assert gpu.contexts == 0
    assert all(t.name != "tensorrt build" for t in threading.enumerate())


def test_build_too_little_memory_is_refused_before_anything_is_built(bundle, gpu, monkeypatch):
    monkeypatch.setattr("gwp_edge.engines.trt_device.available_bytes", lambda: 10**6)
    with pytest.raises(BuildError, match=r"building needs about .* GB \(modelled\), 0\.0 GB"):
        build_engines(bundle, BuildOptions())
    assert not any(call.startswith("build") for call in gpu.calls)
    assert memory.available_bytes() > 10**6


def orin(*, integrated: bool) -> DeviceFacts:
    return DeviceFacts(
        name="Orin",
        capability=(8, 7),
        n_multiprocessors=16,
        board="",
        integrated=integrated,
        tensorrt="10.3.0",
        memory_bytes=10**10,
    )


@pytest.mark.parametrize(("integrated", "fits"), [(True, True), (False, False)])
def test_build_swap_takes_the_copies_of_the_host(bundle, monkeypatch, integrated, fits):
    """The refusal's advice, swap on NVMe, used to change nothing."""
    plan = memory.memory_plan(bundle.manifest)
    facts = orin(integrated=integrated)
    monkeypatch.setattr("gwp_edge.engines.trt_build.disk_swap_bytes", lambda: 10**12)
    short = plan.build_bytes - plan.swappable_bytes
    with pytest.raises(BuildError, match="building needs"):
        check_buildable(bundle, facts, BuildOptions(), short - 1)
    if fits:
        check_buildable(bundle, facts, BuildOptions(), short)
    else:
        with pytest.raises(BuildError, match="building needs"):
            check_buildable(bundle, facts, BuildOptions(), short)


def test_build_what_could_not_be_loaded_is_refused_before_it_is_built(bundle, monkeypatch):
    """Swap helps a build and no loading: such engines were built and then deleted."""

    def heavy(manifest, *, workspace_bytes=memory.WORKSPACE_BYTES):
        plan = memory.memory_plan(manifest, workspace_bytes=workspace_bytes)
        return dataclasses.replace(plan, weights=dict.fromkeys(plan.weights, 10**10))

    monkeypatch.setattr("gwp_edge.engines.trt_build.memory_plan", heavy)
    facts = orin(integrated=True)
    monkeypatch.setattr("gwp_edge.engines.trt_build.disk_swap_bytes", lambda: 10**12)
    needed = heavy(bundle.manifest, workspace_bytes=0).load_bytes
    with pytest.raises(BuildError, match="loading what would be built needs"):
        check_buildable(bundle, facts, BuildOptions(), needed - 1)
    check_buildable(bundle, facts, BuildOptions(), needed)


def test_golden_gate_counts_what_the_new_engines_need(bundle, monkeypatch):
    """The model's figures could refuse engines that fit."""
    seen = []
    monkeypatch.setattr("gwp_edge.engines.trt.check_free", lambda *given: seen.append(given[1]))
    record = build_engines(bundle, BuildOptions()).record
    plan = memory.memory_plan(bundle.manifest)
    sizes = [entry.n_bytes for entry in record.files.values()]
    assert seen == [sum(sizes) + max(sizes) + plan.caches + 5000 + plan.runtime]


def test_build_refuses_tensorrt_11_and_old_gpus(bundle, monkeypatch):
    with (
        installed(monkeypatch, FakeGpu(version="11.0.0")),
        pytest.raises(BuildError, match=r"10\.x"),
    ):
        build_engines(bundle, BuildOptions())
    with (
        installed(monkeypatch, FakeGpu(capability=(7, 2), name="Xavier")),
        pytest.raises(BuildError, match="Xavier"),
    ):
        build_engines(bundle, BuildOptions())
