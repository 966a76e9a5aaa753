"""The TensorRT engine and its build on stand-ins of the libraries; see trt_fakes.

Not a test of TensorRT: of our addresses, tables, order of calls, gates and cleaning up.
"""

from __future__ import annotations

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
from engine_suite import ChunkSuite, EngineSuite, inputs, run_steps
from trt_fakes import FakeGpu, installed

from gwp_edge.bundle import Bundle
from gwp_edge.engines import create_engine
from gwp_edge.engines.trt import TrtEngine
from gwp_edge.engines.trt_build import BuildOptions, build_engines
from gwp_edge.engines.trt_cache import engine_file, engines_root, list_engines
from gwp_edge.errors import (
    BuildError,
    DeviceError,
    PerformanceIssue,
    SpecError,
)
from gwp_edge.planning import memory

pytestmark = pytest.mark.export


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


class TestTrtOnStandIns(EngineSuite, ChunkSuite):
    """The contract, on a GPU with memory of its own."""

    @pytest.fixture(params=[True, False], ids=["integrated", "discrete"])
    def gpu(self, request, monkeypatch):
        with installed(monkeypatch, FakeGpu(integrated=request.param)) as made:
            yield made

    @pytest.fixture
    def bundle(self, built):
        return built

    @pytest.fixture
    def built(self, exported, tmp_path, gpu):
        root = tmp_path / "policy.gwp"
        shutil.copytree(exported("gwp05", precision="fp32", n_steps=4), root)
        found = Bundle.open(root)
        build_engines(found, BuildOptions())
        return found

    @pytest.fixture
    def engine_name(self):
        return "trt"

    @pytest.fixture
    def engine(self):
        return TrtEngine


# -- the build -------------------------------------------------------------------------------------


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


def left_behind(bundle) -> list[str]:
    root = engines_root(bundle.root)
    return sorted(p.name for p in root.rglob("*") if p.suffix != ".cache") if root.exists() else []


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


def test_build_wrong_answer_is_deleted_and_the_stage_named(bundle, gpu):
    gpu.corrupt = lambda stage, name, value: value * 1.5 if stage == "vision" else value
    with pytest.raises(BuildError, match="vision engine's latent is off by"):
        build_engines(bundle, BuildOptions())
    assert left_behind(bundle) == []
    gpu.corrupt = lambda stage, name, value: value + 1 if name == "x_next" else value
    with pytest.raises(BuildError, match="so prefill or denoise is at fault"):
        build_engines(bundle, BuildOptions())
    gpu.corrupt = lambda stage, name, value: value * np.float32("nan")
    with pytest.raises(BuildError, match="not finite"):
        build_engines(bundle, BuildOptions())
    assert left_behind(bundle) == []


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
    with pytest.raises(BuildError, match=r"quantized layers fell back.*fp32 instead of int8"):
        build_engines(bundle, BuildOptions())
    assert left_behind(bundle) == []


def test_build_interrupted_cancels_and_leaves_nothing(bundle, gpu):
    """Ctrl-C while the library is busy in its own thread."""
    started = threading.Event()

    def interrupt():
        if not started.is_set():
            started.set()
            os.kill(os.getpid(), signal.SIGINT)
        threading.Event().wait(0.05)

    gpu.during_build = interrupt
    with pytest.raises(KeyboardInterrupt):
        build_engines(bundle, BuildOptions())
    assert left_behind(bundle) == []
    assert gpu.contexts == 0
    assert all(t.name != "tensorrt build" for t in threading.enumerate())
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_build_too_little_memory_is_refused_before_anything_is_built(bundle, gpu, monkeypatch):
    monkeypatch.setattr("gwp_edge.engines.trt_device.available_bytes", lambda: 10**6)
    with pytest.raises(BuildError, match=r"building needs about .* GB \(modelled\), 0\.0 GB"):
        build_engines(bundle, BuildOptions())
    assert not any(call.startswith("build") for call in gpu.calls)
    assert memory.available_bytes() > 10**6


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


# -- opening ---------------------------------------------------------------------------------------


def test_engine_without_build_says_what_to_run(bundle):
    with pytest.raises(PerformanceIssue, match="run: gwp-edge build"):
        TrtEngine(bundle)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": "10.13.3"}, r"TensorRT '10\.3\.0' instead of '10\.13\.3'"),
        ({"capability": (8, 9), "name": "RTX"}, "GPU 'Orin' instead of 'RTX'"),
    ],
)
def test_engine_of_another_machine_is_refused_with_what_differs(
    built, monkeypatch, change, message
):
    with installed(monkeypatch, FakeGpu(**change)), pytest.raises(BuildError, match=message):
        TrtEngine(built)


def test_engine_of_other_flags_is_refused(built):
    with pytest.raises(BuildError, match="flag level 3 instead of 5"):
        TrtEngine(built, options=BuildOptions(level=5))


def test_engine_altered_file_is_refused(built, gpu):
    (folder, _) = list_engines(built.root)[0]
    path = engine_file(folder, "denoise")
    path.write_bytes(path.read_bytes()[:-1] + b" ")
    with pytest.raises(BuildError, match=r"denoise\.engine was altered"):
        TrtEngine(built)
    assert gpu.contexts == 0


def test_engine_that_tensorrt_cannot_load_is_told(built, tmp_path, gpu):
    folder = tmp_path / "broken"
    folder.mkdir()
    for stage in ("vision", "prefill", "denoise"):
        engine_file(folder, stage).write_bytes(b"nonsense")
    with pytest.raises(BuildError, match="magic tag does not match"):
        TrtEngine(built, folder=folder)
    assert gpu.contexts == 0
    assert gpu.live == {}


def test_create_engine_knows_trt_and_refuses_options_of_ort(built):
    engine = create_engine("trt", built)
    assert isinstance(engine, TrtEngine)
    engine.close()
    with pytest.raises(SpecError, match="for --engine ort"):
        create_engine("trt", built, threads=2)


def test_engine_without_libraries_says_how_to_get_them(bundle, monkeypatch):
    monkeypatch.setitem(sys.modules, "pycuda.driver", None)
    with pytest.raises(PerformanceIssue, match="pip install"):
        TrtEngine(bundle)


# -- failure ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", ["execute", "synchronize"])
def test_engine_cuda_failure_is_a_device_error_and_final(built, gpu, fault):
    """After a CUDA error the context answers nonsense, so nothing more is answered."""
    engine = TrtEngine(built)
    engine.set_prompt(built.spec.tasks[0])
    canvas, state, _, _, _ = inputs(built.spec)
    gpu.fail_on = fault
    with pytest.raises(DeviceError, match="vision"):
        engine.vision(canvas)
    gpu.fail_on = None
    with pytest.raises(DeviceError, match="failed before"):
        engine.vision(canvas)
    engine.close()
    assert gpu.contexts == 0
    del state


@pytest.mark.parametrize("fault", ["inside", "at the end"])
def test_engine_capture_failure_leaves_the_stream_out_of_capture(built, gpu, fault):
    engine = TrtEngine(built)
    engine.set_prompt(built.spec.tasks[0])
    canvas, state, x, prefix, gain = inputs(built.spec)
    gains = np.zeros((built.spec.sampler.n_steps, *gain.shape), np.float32)
    if fault == "inside":
        gpu.fail_on = "capture"
    else:
        gpu.library.fail["cuGraphInstantiateWithFlags"] = 700
    with pytest.raises(DeviceError, match=r"CUDA_ERROR_ILLEGAL_ADDRESS|TensorRT failed in vision"):
        engine.chunk(canvas, state, x, prefix, gains)
    assert gpu.captures == {}
    assert gpu.graphs == {}
    engine.close()


def test_engine_close_frees_graphs_before_contexts_and_memory(built, gpu):
    engine = TrtEngine(built)
    engine.set_prompt(built.spec.tasks[0])
    canvas, state, x, prefix, gain = inputs(built.spec)
    gains = np.zeros((built.spec.sampler.n_steps, *gain.shape), np.float32)
    engine.chunk(canvas, state, x, prefix, gains)
    assert len(engine.chunk_laps_ns) == 2 + built.spec.sampler.n_steps
    assert set(engine.chunk_laps_ns) == {1_500_000}
    gpu.calls.clear()
    engine.close()
    order = [c for c in gpu.calls if c in ("cuGraphExecDestroy", "free", "context pop")]
    assert order[0] == "cuGraphExecDestroy"
    assert order[-1] == "context pop"
    assert "free" in order


def test_engine_without_graphs_runs_a_chunk_all_the_same(built, gpu):
    gpu.calls.clear()
    engine = TrtEngine(built, graphs=False)
    engine.set_prompt(built.spec.tasks[0])
    canvas, state, x, prefix, gain = inputs(built.spec)
    gains = np.zeros((built.spec.sampler.n_steps, *gain.shape), np.float32)
    np.testing.assert_array_equal(
        engine.chunk(canvas, state, x, prefix, gains)[0], run_steps(engine, built.spec)
    )
    assert len(engine.chunk_laps_ns) == 2 + built.spec.sampler.n_steps
    assert not any(call.startswith("cuGraph") for call in gpu.calls)
    engine.close()
