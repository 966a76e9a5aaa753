"""The TensorRT engine on stand-ins of the libraries; see trt_fakes.

Not a test of TensorRT: of our addresses, tables, order of calls and cleaning up.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

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
from gwp_edge.engines.trt_build import build_engines
from gwp_edge.engines.trt_cache import engine_file, list_engines
from gwp_edge.engines.trt_options import BuildOptions
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


# -- opening ---------------------------------------------------------------------------------------


def test_engine_without_build_says_what_to_run(bundle):
    with pytest.raises(PerformanceIssue, match="run: gwp-edge build"):
        TrtEngine(bundle)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": "10.13.3"}, r"TensorRT '10\.3\.0' instead of '10\.13\.3'"),
        ({"capability": (8, 9), "name": "RTX"}, "GPU 'Orin' instead of 'RTX'"),
        # CUDA calls every Orin so, with one capability.
        ({"n_sms": 8}, "multiprocessors 16 instead of 8"),
    ],
)
def test_engine_of_another_machine_is_refused_with_what_differs(
    built, monkeypatch, change, message
):
    with installed(monkeypatch, FakeGpu(**change)), pytest.raises(BuildError, match=message):
        TrtEngine(built)


def test_engine_of_another_board_is_refused(built, monkeypatch):
    monkeypatch.setattr("gwp_edge.engines.trt_device.board_name", lambda: "Jetson Orin NX")
    with pytest.raises(BuildError, match="board '' instead of 'Jetson Orin NX'"):
        TrtEngine(built)


def test_engine_of_other_flags_is_refused_when_flags_are_asked_for(built):
    with pytest.raises(BuildError, match="flag level 3 instead of 5"):
        TrtEngine(built, options=BuildOptions(level=5))


@pytest.mark.parametrize("flags", [{"level": 5}, {"tf32": True}, {"workspace_bytes": 32 << 20}])
def test_engine_built_with_a_flag_runs_without_being_told(bundle, gpu, flags):
    """What ``build --level 5`` made was refused by ``run``, with advice to build again."""
    build_engines(bundle, BuildOptions(**flags))
    create_engine("trt", bundle).close()


def test_engine_newest_of_several_flags_is_taken(bundle, gpu, monkeypatch):
    for level, second in ((3, 2), (5, 4), (1, 3)):
        monkeypatch.setattr("time.gmtime", lambda s=second: (2026, 1, 1, 0, 0, s, 3, 1, 0))
        build_engines(bundle, BuildOptions(level=level))
    monkeypatch.undo()
    engine = TrtEngine(bundle)
    levels = {folder: record.key.flags["level"] for folder, record in list_engines(bundle.root)}
    assert levels[engine.folder] == "5"
    engine.close()


def test_engine_of_an_older_layout_is_told_apart_from_none(built):
    (folder, _), *_ = list_engines(built.root)
    text = (folder / "build.json").read_text()
    (folder / "build.json").write_text(text.replace('"schema_version": 2', '"schema_version": 1'))
    with pytest.raises(BuildError, match="built by another gwp-edge"):
        TrtEngine(built)


def test_engine_stages_share_one_scratch_of_the_largest(built, gpu):
    gpu.calls.clear()
    engine = TrtEngine(built)
    engine.set_prompt(built.spec.tasks[0])
    canvas, state, x, prefix, gain = inputs(built.spec)
    n_steps = built.spec.sampler.n_steps
    gains = np.zeros((n_steps, *gain.shape), np.float32)
    # Each step has a context of its own, as a graph keeps what its contexts were.
    for first_step, n_contexts in ((0, 2 + n_steps), (0, 2 + n_steps), (1, 3 + n_steps)):
        engine.chunk(canvas, state, x, prefix, gains, first_step=first_step)
        made = [call for call in gpu.calls if call.startswith("scratch ")]
        assert len(made) == n_contexts
        assert len(set(made)) == 1
    assert made[0].endswith(" 5000")
    # Any other strategy allocates for each context.
    assert {c for c in gpu.calls if c.startswith("context ")} == {"context USER_MANAGED"}
    engine.close()


def test_engine_load_check_counts_what_the_engines_need(built, monkeypatch):
    """The real sizes count: a model's would refuse or pass by its assumptions."""
    (_, record), *_ = list_engines(built.root)
    seen = []
    monkeypatch.setattr("gwp_edge.engines.trt.check_free", lambda *given: seen.append(given[1]))
    TrtEngine(built).close()
    plan = memory.memory_plan(built.manifest)
    sizes = [entry.n_bytes for entry in record.files.values()]
    assert seen == [sum(sizes) + max(sizes) + plan.caches + 5000 + plan.runtime]


def test_engine_that_reads_other_rows_than_the_tables_have_is_refused(built, monkeypatch):
    """They were read as float32 whatever the engine took."""
    original = Bundle.arrays

    def wider(self, name):
        arrays = dict(original(self, name))
        if "modulation" in arrays:
            arrays["modulation"] = np.concatenate([arrays["modulation"]] * 2, axis=-1)
        return arrays

    monkeypatch.setattr(Bundle, "arrays", wider)
    with pytest.raises(BuildError, match="engine tensor modulation is float32"):
        TrtEngine(built)


def test_prompt_that_does_not_fit_leaves_the_one_before(built, gpu, monkeypatch):
    """A refused prompt used to be half uploaded, and the next chunk ran on the mixture."""
    engine = TrtEngine(built)
    engine.set_prompt(built.spec.tasks[0])
    before = run_steps(engine, built.spec)
    original = Bundle.arrays

    def broken(self, name):
        arrays = original(self, name)
        last = [x for x in arrays if x.startswith("prompt_")][-1]
        return {**arrays, last: arrays[last][..., :1]} | {"prompt_bias": arrays["prompt_bias"] + 1}

    monkeypatch.setattr(Bundle, "arrays", broken)
    gpu.calls.clear()
    engine._task = None
    with pytest.raises(SpecError, match="export the policy again"):
        engine.set_prompt(built.spec.tasks[0])
    assert "upload" not in gpu.calls
    monkeypatch.undo()
    engine._task = built.spec.tasks[0]
    np.testing.assert_array_equal(run_steps(engine, built.spec), before)


def test_prompt_cuda_failure_is_final(built, gpu):
    engine = TrtEngine(built)
    gpu.fail_on = "upload"
    with pytest.raises(DeviceError, match="copying to the device"):
        engine.set_prompt(built.spec.tasks[0])
    gpu.fail_on = None
    with pytest.raises(DeviceError, match="failed before"):
        engine.set_prompt(built.spec.tasks[0])
    engine.close()


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
    (_, record), *_ = list_engines(built.root)
    with pytest.raises(BuildError, match="magic tag does not match"):
        TrtEngine(built, built=(folder, record.files))
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
