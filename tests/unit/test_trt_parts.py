"""The parts of the TensorRT engine that are pure: keys, folders, progress, proof, gates."""

from __future__ import annotations

import ctypes
import json
import re
from pathlib import Path

import msgspec
import numpy as np
import pytest

from gwp_edge.engines import trt_graph
from gwp_edge.engines.trt_blame import relative_error
from gwp_edge.engines.trt_buffers import padded_bytes, stacked
from gwp_edge.engines.trt_cache import building, clean, engines_root, list_engines
from gwp_edge.engines.trt_device import board_name
from gwp_edge.engines.trt_gates import (
    TENSORRT_MAJOR,
    TENSORRT_OLDEST,
    check_tensorrt,
    judge_golden,
    judge_replay,
    parse_capability,
)
from gwp_edge.engines.trt_graph import CudaDriver
from gwp_edge.engines.trt_options import BuildOptions
from gwp_edge.engines.trt_progress import BuildProgress, run_interruptible
from gwp_edge.engines.trt_record import (
    RECORD,
    SCHEMA_VERSION,
    EngineKey,
    EngineRecord,
    read_record,
    write_record,
)
from gwp_edge.errors import BuildError, DeviceError, PerformanceIssue, SpecError

ENGINES = Path(trt_graph.__file__).parent


def key(**changes) -> EngineKey:
    values = {
        "graphs": {"vision": "a", "prefill": "b", "denoise": "c"},
        "weights": "w",
        "precision": "int8",
        "tensorrt": "10.3.0",
        "compute_capability": "8.7",
        "device": "Orin (nvgpu)",
        "n_multiprocessors": 16,
        "board": "NVIDIA Jetson AGX Orin Developer Kit",
        "flags": {"level": "3"},
    }
    return EngineKey(**{**values, **changes})


def record(**changes) -> EngineRecord:
    values = {
        "schema": "gwp-edge.engines",
        "schema_version": SCHEMA_VERSION,
        "key": key(),
        "bundle_id": "x",
        "created_at": "2026-01-01T00:00:00Z",
        "files": {},
        "proof": (),
        "golden_error": None,
    }
    return EngineRecord(**{**values, **changes})


# -- keys and folders ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"tensorrt": "10.13.3"}, "TensorRT '10.13.3' instead of '10.3.0'"),
        ({"device": "NX"}, "GPU 'NX'"),
        ({"n_multiprocessors": 8}, "multiprocessors 8 instead of 16"),
        ({"board": "Orin NX"}, "board 'Orin NX' instead of 'NVIDIA Jetson AGX Orin"),
        ({"compute_capability": "11.0"}, "compute capability '11.0'"),
        ({"precision": "fp16"}, "precision 'fp16'"),
        ({"weights": "v"}, "other weights"),
        ({"graphs": {"vision": "a", "prefill": "z", "denoise": "c"}}, "another prefill graph"),
        ({"flags": {"level": "5"}}, "flag level 5 instead of 3"),
        ({"flags": {"level": "3", "tf32": "on"}}, "flag tf32 on instead of unset"),
    ],
)
def test_key_every_part_changes_the_digest_and_is_named(changes, word):
    other = key(**changes)
    assert other.digest() != key().digest()
    assert other.folder() != key().folder()
    assert key().differences(other) == (word,) or word in key().differences(other)[0]
    assert key().differences(key()) == ()


def test_key_folder_name_is_plain():
    assert re.fullmatch(r"orin-nvgpu-sm87-[0-9a-f]{12}", key().folder())
    assert "/" not in key(device="../../etc").folder()


def test_building_appears_whole_or_not_at_all(tmp_path):
    bundle = tmp_path / "policy.gwp"
    with building(bundle, key()) as work:
        (work / "vision.engine").write_bytes(b"1")
        write_record(work, record())
        assert list_engines(bundle) == ((work, record()),)
    final = engines_root(bundle) / key().folder()
    assert (final / "vision.engine").read_bytes() == b"1"
    assert not any(x.name.startswith(".") for x in final.parent.iterdir())


@pytest.mark.parametrize("end", [KeyboardInterrupt, BuildError, SystemExit])
def test_building_ended_early_leaves_the_old_set_and_nothing_else(tmp_path, end):
    bundle = tmp_path / "policy.gwp"
    with building(bundle, key()) as work:
        write_record(work, record(bundle_id="old"))

    def fail() -> None:
        with building(bundle, key()) as work:
            (work / "vision.engine").write_bytes(b"half")
            raise end

    with pytest.raises(end):
        fail()
    (only,) = list_engines(bundle)
    assert only[1] == record(bundle_id="old")
    with pytest.raises(end), building(tmp_path / "new.gwp", key()):
        raise end
    assert not engines_root(tmp_path / "new.gwp").exists()


def test_building_sweeps_what_a_kill_left_but_not_a_build_that_runs(tmp_path):
    """SIGKILL and power loss leave a folder, which nothing used to remove."""
    bundle = tmp_path / "policy.gwp"
    root = engines_root(bundle)
    left = root / ".building-left"
    with building(bundle, key()) as running:
        left.mkdir()
        (left / "vision.engine").write_bytes(b"half")
        with building(bundle, key(tensorrt="10.4.0")) as work:
            write_record(work, record())
            assert not left.exists()
            assert running.is_dir()
            assert running not in clean(bundle)
            assert running.is_dir()
    assert not any(x.name.startswith(".") for x in root.iterdir())


def test_clean_keeps_the_set_that_fits_and_its_timings(tmp_path):
    bundle = tmp_path / "policy.gwp"
    for wanted in (key(), key(tensorrt="10.4.0")):
        with building(bundle, wanted) as work:
            write_record(work, record(key=wanted))
    root = engines_root(bundle)
    (root / "timing-trt10.3.0-sm87.cache").write_bytes(b"t")
    (root / ".building-left").mkdir()
    removed = clean(bundle, keep=key())
    assert {p.name for p in removed} == {key(tensorrt="10.4.0").folder(), ".building-left"}
    assert (root / "timing-trt10.3.0-sm87.cache").exists()
    clean(bundle)
    assert not root.exists()
    assert clean(bundle) == ()


def test_read_record_strange_or_missing_is_refused(tmp_path):
    with pytest.raises(BuildError, match="No such file"):
        read_record(tmp_path)
    (tmp_path / RECORD).write_text("{")
    with pytest.raises(BuildError, match="--clean"):
        read_record(tmp_path)
    write_record(tmp_path, record(schema_version=1))
    with pytest.raises(BuildError, match=r"layout gwp-edge\.engines 1"):
        read_record(tmp_path)
    # An older layout lacks fields; that it is older is what helps.
    old = {"schema": "gwp-edge.engines", "schema_version": 1, "key": {}}
    (tmp_path / RECORD).write_text(json.dumps(old))
    with pytest.raises(BuildError, match="build again"):
        read_record(tmp_path)


@pytest.mark.parametrize("bad", [{"level": 6}, {"level": -1}, {"workspace_bytes": 1}])
def test_build_options_out_of_range_are_refused(bad):
    with pytest.raises(SpecError, match="must be"):
        BuildOptions(**bad)


# -- progress --------------------------------------------------------------------------------------


def test_progress_nested_phases_rise_to_one():
    seen: list[float] = []
    build = BuildProgress(report=seen.append)
    build.phase_start("all", None, 2)
    for _ in range(2):
        build.phase_start("part", "all", 4)
        for _ in range(4):
            assert build.step_complete("part")
        build.phase_finish("part")
        build.step_complete("all")
    build.phase_finish("all")
    assert seen == sorted(seen)
    assert seen[0] == pytest.approx(0.125)
    assert seen[-1] == 1.0
    assert len(seen) == len(set(seen))


def test_progress_survives_phases_that_end_early_or_are_not_known():
    seen: list[float] = []
    build = BuildProgress(report=seen.append)
    build.phase_finish("never started")
    assert build.step_complete("never started")
    build.phase_start("all", None, 0)
    build.phase_finish("all")
    assert seen == [1.0]


def test_progress_cancel_stops_the_builder_and_never_says_done():
    seen: list[float] = []
    build = BuildProgress(report=seen.append)
    build.phase_start("all", None, 10)
    build.cancel()
    assert build.step_complete("all") is False
    build.phase_finish("all")
    assert build.is_cancelled
    assert max(seen) < 1


def test_run_interruptible_returns_and_raises_what_the_work_did():
    assert run_interruptible(lambda: 3, lambda: None) == 3
    with pytest.raises(BuildError, match="no"):
        run_interruptible(lambda: (_ for _ in ()).throw(BuildError("no")), lambda: None)


# -- gates -----------------------------------------------------------------------------------------


def golden(**changes):
    wanted = np.zeros((4, 2))
    values = {
        "answer": wanted + 1e-5,
        "wanted": wanted,
        "other_seed": wanted + 1.0,
        "tolerance": 1e-3,
        "blame": lambda: "the moon",
    }
    return judge_golden(**{**values, **changes})


def test_golden_gate_passes_what_is_near_and_blames_nothing():
    def never():
        raise AssertionError("it takes minutes")

    assert golden(blame=never) == pytest.approx(1e-5)


def test_relative_error_counts_nan_as_infinite_and_zeros_as_they_are():
    ones = np.ones(3, np.float32)
    assert relative_error(1.5 * ones, ones) == pytest.approx(0.5)
    assert relative_error(ones * np.float32("nan"), ones) == float("inf")
    assert relative_error(ones, 0 * ones) == pytest.approx(1)
    assert relative_error(ones.astype(np.float16), ones) == 0


def test_board_name_ends_before_the_nul_and_a_pc_has_none(tmp_path):
    path = tmp_path / "model"
    path.write_bytes(b"NVIDIA Jetson AGX Orin Developer Kit\0")
    assert board_name(path) == "NVIDIA Jetson AGX Orin Developer Kit"
    assert board_name(tmp_path / "none") == ""


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"answer": np.full((4, 2), 0.1)}, "off by 0.1, allowed 0.001; the moon; they"),
        ({"answer": np.full((4, 2), np.nan)}, "off by nan"),
        ({"other_seed": np.full((4, 2), 1e-4)}, "noise may not reach"),
        ({"other_seed": np.full((4, 2), np.nan)}, "noise may not reach"),
    ],
)
def test_golden_gate_refuses(changes, message):
    with pytest.raises(BuildError, match=message):
        golden(**changes)


def test_replay_gate_refuses_a_graph_that_differs_or_is_not_finite():
    stages = np.zeros((4, 2))
    judge_replay(stages + 1e-4, stages, 1e-3)
    for off in (0.01, np.nan):
        with pytest.raises(BuildError, match="replayed as a CUDA graph differs"):
            judge_replay(stages + off, stages, 1e-3)


def test_parse_capability_refuses_words():
    assert parse_capability("11.0") == (11, 0)
    with pytest.raises(SpecError, match="expected two numbers"):
        parse_capability("orin")


@pytest.mark.parametrize("version", ["10.2.0.19", "10.0.1", "8.6.2", "11.0.0", "9", "dev"])
def test_tensorrt_gate_refuses_what_the_code_cannot_call(version):
    """Only the major version was looked at: 10.0 failed later, at an attribute of an engine."""
    with pytest.raises(BuildError, match=r"needs 10\.x from 10\.3 on; install JetPack 6\.1") as e:
        check_tensorrt(version)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("version", ["10.3.0", "10.3.0.30", "10.13.3", "10.16.0"])
def test_tensorrt_gate_takes_every_supported_release(version):
    check_tensorrt(version)


def test_tensorrt_gate_and_the_extra_ask_for_the_same():
    project = Path(__file__).resolve().parents[2] / "pyproject.toml"
    if not project.is_file():
        pytest.skip("needs the checkout's pyproject.toml")
    text = project.read_text()
    oldest = ".".join(map(str, TENSORRT_OLDEST))
    assert f'"tensorrt>={oldest},<{TENSORRT_MAJOR + 1};' in text


# -- memory and graphs -----------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "wanted"), [(0, 0), (1, 256), (256, 256), (257, 512)])
def test_padded_bytes_aligns_up(n, wanted):
    assert padded_bytes(n) == wanted


def test_stacked_rows_are_aligned_and_complete():
    rows = np.arange(15, dtype=np.float32).reshape(3, 5)
    table, stride = stacked(rows)
    assert stride == 256
    np.testing.assert_array_equal(table[:, :20].copy().view(np.float32), rows)


def test_driver_without_libcuda_or_without_graphs_says_so(monkeypatch):
    def missing():
        raise OSError("libcuda.so.1: cannot open shared object file")

    monkeypatch.setattr(trt_graph, "load_libcuda", missing)
    with pytest.raises(PerformanceIssue, match=r"driver of CUDA 11\.4"):
        CudaDriver()
    with pytest.raises(PerformanceIssue, match="no CUDA graphs"):
        CudaDriver(object())


def test_driver_failure_names_function_and_error():
    class Library:
        def __getattr__(self, name):
            def call(*arguments):
                if name == "cuGetErrorName":
                    arguments[1]._obj.value = b"CUDA_ERROR_OUT_OF_MEMORY"
                    return 0
                return 2

            setattr(self, name, call)
            return call

    with pytest.raises(DeviceError, match=r"cuGraphLaunch failed with CUDA_ERROR_OUT_OF_MEMORY"):
        CudaDriver(Library()).call("cuGraphLaunch", ctypes.c_void_p(), 1)


# -- stubs -----------------------------------------------------------------------------------------

# Names that NVIDIA removed with TensorRT 11, from its migration guide; none may be used.
REMOVED_IN_11 = (
    "BuilderFlag.FP16",
    "BuilderFlag.INT8",
    "BuilderFlag.FP8",
    "BuilderFlag.BF16",
    "BuilderFlag.INT4",
    "OBEY_PRECISION_CONSTRAINTS",
    "PREFER_PRECISION_CONSTRAINTS",
    "int8_calibrator",
    "platform_has_fast",
    "create_execution_context_without_device_memory",
    "EXPLICIT_BATCH",
    "set_dynamic_range",
    "algorithm_selector",
)


def test_engine_sources_use_nothing_that_tensorrt_11_removed():
    paths = sorted(ENGINES.glob("trt*.py"))
    assert len(paths) > 8
    for path in paths:
        text = path.read_text()
        assert [name for name in REMOVED_IN_11 if name in text] == [], path.name


def test_record_is_forbidden_unknown_fields():
    entry = {**msgspec.to_builtins(record()), "more": 1}
    with pytest.raises(msgspec.ValidationError):
        msgspec.convert(entry, EngineRecord)
