"""Bench arithmetic: costs, floors, percentiles and budgets, with a fake engine and clock."""

from __future__ import annotations

import json
import os
from pathlib import Path

import msgspec
import numpy as np
import onnxruntime as ort
import pytest

from gwp_edge import machine_limits
from gwp_edge.bench import (
    SCHEMA,
    SCHEMA_VERSION,
    BenchReport,
    Cost,
    EagerReport,
    EngineTimes,
    Times,
    chunk_phases,
    chunk_roofline,
    joined,
    judge,
    judge_engine,
    random_input,
    run_chunk,
    stage_costs,
    time_engine,
)
from gwp_edge.budgets import check_budgets, read_budgets
from gwp_edge.commands import benching
from gwp_edge.errors import SpecError
from gwp_edge.machine_limits import GemmRate, Limits, describe_machine, measure_limits
from gwp_edge.manifest import (
    FileEntry,
    Golden,
    GraphSet,
    Layer,
    Manifest,
    MeasuredError,
    Precision,
    Provenance,
)
from gwp_edge.product_models import float_product, integer_product
from gwp_edge.profiling.columns import Chunks
from gwp_edge.profiling.compare import (
    compare,
    main_quantity,
    parse_gate,
)
from gwp_edge.profiling.context import make_context
from gwp_edge.profiling.reports import differs_in, read_report
from gwp_edge.sampler import make_schedule
from gwp_edge.spec import CameraView, CanvasSpec, Channel, NetworkSpec, PolicySpec, Statistics

BUDGETS = Path(__file__).parents[1] / "budgets.toml"
LIMITS = Limits(threads=2, gemm=(GemmRate(shape=(8, 8, 8), gflop_s=100.0),), stream_gb_s=10.0)


def _spec(n_steps=3):
    return PolicySpec(
        network=NetworkSpec(
            family="gwp-0.5",
            n_layers=2,
            n_heads=3,
            head_dim=8,
            visual_dim=24,
            action_dim=16,
            visual_ffn_dim=32,
            action_ffn_dim=32,
            n_action_channels=5,
            n_text_rows=12,
            latent_channels=4,
            freq_dim=8,
            text_dim=8,
            eps=1e-6,
        ),
        sampler=make_schedule(n_steps),
        canvas=CanvasSpec(
            width_px=64,
            height_px=32,
            views=(CameraView(camera="c", x_px=0, y_px=0, width_px=64, height_px=32),),
        ),
        channels=tuple(Channel(name=f"j{i}", unit="rad", kind="delta") for i in range(3)),
        statistics=Statistics(
            state_q01=(-1.0,) * 3,
            state_q99=(1.0,) * 3,
            action_q01=(-1.0,) * 3,
            action_q99=(1.0,) * 3,
        ),
        n_rows=6,
        period_ns=33_333_333,
        tasks=("task",),
        embodiment=0,
    )


def _layer(stage, name, flops, weight_bytes):
    return Layer(
        stage=stage, name=name, format="fp32", reason="test", flops=flops, weight_bytes=weight_bytes
    )


def _manifest(cache="fp32"):
    layers = (
        _layer("vision", "a", 1000, 40),
        _layer("vision", "b", 500, 60),
        _layer("prefill", "c", 300, 70),
        _layer("denoise", "d", 200, 80),
        _layer("denoise", "d.qk", 50, 0),
    )
    return Manifest(
        schema="gwp-edge.bundle",
        schema_version=1,
        bundle_id="x",
        spec=_spec(),
        precision=Precision(name="fp32", cache=cache, layers=layers),
        graphs={"native": GraphSet(vision="v", prefill="p", denoise="d")},
        prompts={"task": "p"},
        tables="t",
        weights="w",
        golden=Golden(file="g", task="task", tolerance=1e-4, checked_with=()),
        error=MeasuredError(inputs="none", n_chunks=0, joints_rad=None, grippers_m=None),
        files={"w": FileEntry(sha256="0", n_bytes=1)},
        provenance=Provenance(
            gwp_edge="0", created_at="now", checkpoint={}, libraries={}, unused={}, notes=()
        ),
    )


class FakeClock:
    """Moves on by what the fake engine says that it took."""

    def __init__(self):
        self.t_ns = 0

    def __call__(self):
        return self.t_ns


class FakeEngine:
    """Takes 10 ms for vision, 5 for prefill, 2 for a step, ten times as long in its first chunk."""

    def __init__(self, clock, answer=1.0):
        self.clock, self.answer, self.calls = clock, answer, []
        self.n_chunks = 0

    def _take(self, name, ms):
        self.calls.append(name)
        self.clock.t_ns += int(ms * 1e6 * (10 if self.n_chunks == 1 else 1))

    def set_prompt(self, task):
        raise NotImplementedError

    def vision(self, canvas):
        assert canvas.shape == (32, 64, 3)
        assert canvas.dtype == np.uint8
        self.n_chunks += 1
        self._take("vision", 10)
        return np.zeros((1, 4, 2, 4), np.float32)

    def prefill(self, latent, state_norm):
        assert state_norm.shape == (1, 5)
        assert not state_norm[0, 3:].any()
        self._take("prefill", 5)

    def denoise(self, x, step_idx, prefix_norm, prefix_gain):
        assert prefix_norm.shape == x.shape == (6, 5)
        assert prefix_gain.shape == (6, 1)
        self._take(f"denoise{step_idx}", 2)
        return np.full_like(x, self.answer)

    def close(self):
        raise NotImplementedError


def test_time_engine_counts_every_pass_and_drops_the_warm_up():
    clock = FakeClock()
    engine = FakeEngine(clock)
    times = time_engine(engine, _spec(), repeats=4, warmup=1, now_ns=clock)
    assert engine.calls[:5] == ["vision", "prefill", "denoise0", "denoise1", "denoise2"]
    assert engine.n_chunks == 5
    assert times.stages["vision"] == [10_000_000] * 4
    assert times.stages["prefill"] == [5_000_000] * 4
    assert times.stages["denoise"] == [2_000_000] * 12
    assert times.chunks == [21_000_000] * 4
    columns = times.columns
    assert columns.phase == ["cold", *["steady"] * 4]
    assert columns.segments_ms["denoise"] == [60.0, *[6.0] * 4]
    assert columns.steps_ms[1:] == [[2.0] * 3] * 4
    assert columns.t_s == pytest.approx([0.0, 0.21, 0.231, 0.252, 0.273])


def test_time_engine_answer_not_finite_is_refused():
    clock = FakeClock()
    with pytest.raises(SpecError, match="not finite"):
        time_engine(FakeEngine(clock, np.nan), _spec(), repeats=1, warmup=0, now_ns=clock)


@pytest.mark.parametrize(("repeats", "warmup"), [(0, 1), (1, -1)])
def test_time_engine_bad_counts_are_refused(repeats, warmup):
    clock = FakeClock()
    with pytest.raises(SpecError, match="repeats >= 1"):
        time_engine(FakeEngine(clock), _spec(), repeats=repeats, warmup=warmup, now_ns=clock)


def test_run_chunk_returns_the_last_answer():
    clock = FakeClock()
    spec = _spec()
    x, laps = run_chunk(FakeEngine(clock, 3.0), spec, random_input(spec, np.random.default_rng(0)))
    assert (x == 3.0).all()
    assert len(laps["denoise"]) == 3


@pytest.mark.parametrize(("cache", "element_bytes"), [("fp32", 4), ("fp16", 2), ("bf16", 2)])
def test_stage_costs_add_layers_and_the_caches_of_a_step(cache, element_bytes):
    costs = stage_costs(_manifest(cache))
    assert costs["vision"] == Cost(flops=1500, n_bytes=100)
    assert costs["prefill"] == Cost(flops=300, n_bytes=70)
    # K and V, 2 layers, 3 heads of 8, 1 state + 2 visual + 12 text tokens.
    assert costs["denoise"] == Cost(flops=250, n_bytes=80 + 2 * 2 * 24 * 15 * element_bytes)


def test_stage_costs_unknown_cache_format_is_refused():
    with pytest.raises(SpecError, match="fp3"):
        stage_costs(_manifest("fp3"))


def test_judge_compute_bound_stage_is_held_to_the_gemm_rate():
    # 1 GFLOP at 100 GFLOP/s is 10 ms; 10 MB at 10 GB/s is 1 ms.
    report = judge([20_000_000] * 3, Cost(flops=10**9, n_bytes=10**7), LIMITS)
    assert report.gemm_floor_ms == pytest.approx(10)
    assert report.memory_floor_ms == pytest.approx(1)
    assert report.ratio_to_gemm_floor == pytest.approx(2)
    assert report.percent_of_limit == pytest.approx(50)
    assert report.gflop_s == pytest.approx(50)
    assert report.gbyte_s == pytest.approx(0.5)


def test_judge_memory_bound_stage_is_held_to_the_streaming_rate():
    report = judge([20_000_000], Cost(flops=10**8, n_bytes=10**8), LIMITS)
    assert report.memory_floor_ms == pytest.approx(10)
    assert report.percent_of_limit == pytest.approx(50)


def test_judge_engine_chunk_costs_all_its_steps():
    times = EngineTimes(
        stages={"vision": [10], "prefill": [10], "denoise": [10, 10, 10]},
        chunks=[50],
        columns=_columns(1),
    )
    stages, chunk = judge_engine(times, _manifest(), LIMITS)
    assert chunk.gflop * 1e9 == pytest.approx(1500 + 300 + 3 * 250)
    assert chunk.gemm_floor_ms == pytest.approx(
        stages["vision"].gemm_floor_ms
        + stages["prefill"].gemm_floor_ms
        + 3 * stages["denoise"].gemm_floor_ms
    )


def test_times_of_values_gives_percentiles_in_ms():
    times = Times.of([i * 1_000_000 for i in range(1, 102)])
    assert (times.n, times.min_ms, times.p50_ms, times.max_ms) == (101, 1, 51, 101)
    assert times.p95_ms == pytest.approx(96)
    assert times.p99_ms == pytest.approx(100)


def test_limits_merged_takes_the_better_rate_of_each():
    other = Limits(threads=2, gemm=(GemmRate(shape=(8, 8, 8), gflop_s=120.0),), stream_gb_s=9.0)
    merged = LIMITS.merged(other)
    assert merged.best_gflop_s == 120.0
    assert merged.stream_gb_s == 10.0


# -- machine --------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(3, 4, 5), (1, 300, 2)])
def test_matmul_model_multiplies(shape):
    """The hand-written ONNX file is one, and is a product."""
    n, k, m = shape
    rng = np.random.default_rng(0)
    weight, x = rng.normal(size=(k, m)).astype(np.float32), rng.normal(size=(n, k))
    session = ort.InferenceSession(float_product(n, weight, 3), providers=["CPUExecutionProvider"])
    answers = session.run(None, {"x": x.astype(np.float32)})
    assert len(answers) == 3
    for i, y in enumerate(answers):
        weight[-1, -1] = i  # each turn has a weight of its own
        np.testing.assert_allclose(y, x @ weight, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", [(3, 4, 5), (1, 300, 2)])
def test_integer_product_multiplies_codes_around_their_middle(shape):
    n, k, m = shape
    rng = np.random.default_rng(0)
    weight, x = rng.integers(0, 256, (k, m), np.uint8), rng.integers(0, 256, (n, k), np.uint8)
    session = ort.InferenceSession(
        integer_product(n, weight, 3), providers=["CPUExecutionProvider"]
    )
    for i, y in enumerate(session.run(None, {"x": x})):
        weight[-1, -2:] = (i, 0)  # each turn has a weight of its own
        np.testing.assert_array_equal(y, (x.astype(int) - 128) @ (weight.astype(int) - 128))


def test_judge_int8_layers_are_held_to_the_int8_rate():
    """An int8 bundle's limit was that of float32 products, under the machine's name."""
    limits = msgspec.structs.replace(LIMITS, gemm_int8=(GemmRate(shape=(8, 8, 8), gflop_s=400.0),))
    cost = Cost(flops=10**9, n_bytes=10**3, int8_flops=8 * 10**8)
    # 0.2 GFLOP at 100 and 0.8 at 400 are 2 ms each.
    assert judge([10**7], cost, limits).gemm_floor_ms == pytest.approx(4)
    assert judge([10**7], cost, LIMITS).gemm_floor_ms == pytest.approx(10), "not measured"
    assert judge([10**7], cost, limits).int8_gflop == pytest.approx(0.8)


def test_stage_costs_tell_int8_layers_from_the_others():
    manifest = _manifest()
    layers = [
        msgspec.structs.replace(layer, format="int8") if layer.name == "a" else layer
        for layer in manifest.precision.layers
    ]
    precision = msgspec.structs.replace(manifest.precision, layers=tuple(layers))
    costs = stage_costs(msgspec.structs.replace(manifest, precision=precision))
    assert costs["vision"] == Cost(flops=1500, n_bytes=100, int8_flops=1000)
    assert costs["prefill"].int8_flops == 0


def test_bench_reports_the_phases_and_the_roofline_of_a_profile():
    """A bench had percentiles of its own kind: p95 and p99, no mean, no p90, no p99.9."""
    clock = FakeClock()
    runs = [time_engine(FakeEngine(clock), _spec(), repeats=4, warmup=1, now_ns=clock)
            for _ in range(3)]  # fmt: skip
    times = joined(runs)
    assert times.columns.run == [0] * 5 + [1] * 5 + [2] * 5
    assert len(times.chunks) == len(times.stages["vision"]) == 12
    phases = chunk_phases(times.columns)
    steady = phases["steady"]
    assert (steady["denoise"].n, steady["denoise"].mean) == (12, 6.0)
    assert (steady["denoise step"].n, steady["denoise step"].p90) == (36, 2.0)
    assert steady["chunk"].p50 == 21.0
    assert phases["cold"]["chunk"].n == 3
    line = chunk_roofline(times.columns, _manifest(), LIMITS)
    assert line.stages["denoise"].report.times.p50_ms == pytest.approx(6.0)
    assert line.stages["denoise"].report.gflop * 1e9 == pytest.approx(3 * 250)
    assert line.stages["vision"].left_ms == pytest.approx(10.0, abs=1e-3)


def test_measure_limits_small_problem_gives_positive_rates(monkeypatch):
    monkeypatch.setattr(machine_limits, "_MIN_SECONDS_PER_RATE", 0.0)
    monkeypatch.setattr(machine_limits, "_TURNS_BYTES", 1 << 12)
    seen = []
    limits = measure_limits(
        1, shapes=[(8, 8, 8), (4, 16, 8)], stream_bytes=1 << 16, progress=lambda *a: seen.append(a)
    )
    assert limits.threads == 1
    assert [rate.shape for rate in limits.gemm] == [(8, 8, 8), (4, 16, 8)]
    assert all(0 < rate.gflop_s < 1e6 for rate in limits.gemm)
    assert 0 < limits.stream_gb_s < 1e6
    assert seen[-1] == ("machine limits", 5, 5)
    assert [rate.shape for rate in limits.gemm_int8] == [(8, 8, 8), (4, 16, 8)]
    assert all(0 < rate.gflop_s < 1e6 for rate in limits.gemm_int8)
    assert limits.measured_at.startswith("20"), "old limits must be known as that"
    assert limits.load_before >= 0


def test_describe_machine_says_what_a_reader_needs():
    machine = describe_machine(("numpy", "no-such-package"))
    assert machine.n_cpus == os.cpu_count()
    assert machine.versions["numpy"] == np.__version__
    assert machine.versions["no-such-package"] == "not installed"
    assert machine.cpu


# -- reports and budgets --------------------------------------------------------------------------


def _columns(n, vision_ms=1.0, n_runs=1):
    none = [None] * n
    return Chunks(
        t_s=[float(i) for i in range(n)],
        phase=["steady"] * n,
        run=[i * n_runs // n for i in range(n)],
        segments_ms={"vision": [vision_ms] * n, "prefill": [1.0] * n, "denoise": [3.0] * n},
        steps_ms=[[1.0, 1.0, 1.0]] * n,
        cpu_ms=none,
        frame_to_chunk_ms=none,
        frame_to_command_ms=none,
        interval_ms=none,
        slack_ms=none,
    )


def _context(precision="fp32", provider="cpu"):
    made = make_context(
        _spec(), describe_machine(()), manifest=None, bundle="gwp05-wide4", robot=None,
        engine="ort", provider=provider, threads=2, motor_hz=None, duration_s=None, warmup_s=None,
    )  # fmt: skip
    return msgspec.structs.replace(made, precision=precision)


def _report(ratio=0.3, floor_ratio=1.2, difference=1e-6, eager=True, **changes):
    chunk = judge([int(10e6 * floor_ratio)], Cost(flops=10**9, n_bytes=1000), LIMITS)
    times = Times.of([1_000_000])
    fields = {
        "schema": SCHEMA,
        "schema_version": SCHEMA_VERSION,
        "size": "gwp05-wide4",
        "family": "gwp-0.5",
        "context": _context(
            **{k: changes.pop(k) for k in ("precision", "provider") & changes.keys()}
        ),
        "warmup": 1,
        "phases": chunk_phases(_columns(3)),
        "roofline": chunk_roofline(_columns(3), _manifest(), LIMITS),
        "chunks": _columns(3),
        "limits": LIMITS,
        "stages": {"vision": chunk},
        "chunk": chunk,
        "eager": EagerReport(
            stages={"vision": times}, chunk=times, ratio=ratio, largest_difference=difference
        )
        if eager
        else None,
    }
    return BenchReport(**{**fields, **changes})


def test_report_survives_json():
    report = _report()
    text = json.dumps(msgspec.to_builtins(report))
    assert msgspec.json.decode(text, type=BenchReport) == report


@pytest.mark.parametrize("as_json", [True, False])
def test_report_that_cannot_be_written_is_printed(tmp_path, capsys, as_json):
    """The file was written first, so a full disk took the figures with it."""
    with pytest.raises(SpecError, match="cannot be written"):
        benching._tell(_report(), tmp_path, as_json)
    assert "vision" in capsys.readouterr().out


def test_compare_reads_two_benches(tmp_path):
    reports = []
    for i, vision_ms in enumerate((10.0, 20.0)):
        path = tmp_path / f"{i}.json"
        made = _report(chunks=_columns(120, vision_ms, n_runs=3))
        path.write_bytes(msgspec.json.encode(made))
        reports.append(read_report(path))
        assert reports[-1] == made
    gates = [parse_gate(text) for text in ("vision:p50=1%", "prefill:p50=1%")]
    found = {(d.quantity, d.statistic): d for d in compare(*reports, gates=gates)}
    assert found["vision", "p50"].verdict == "slower"
    assert found["vision", "p50"].change_percent == pytest.approx(100.0)
    assert found["prefill", "p50"].verdict == "no difference shown"
    assert main_quantity(reports[1]) == "chunk"
    assert found["chunk", "p99"].change_percent == pytest.approx(100 * 10 / 14)
    assert differs_in(*reports) == []


def test_check_budgets_kept_says_nothing():
    assert check_budgets(_report(), read_budgets(BUDGETS)) == []


@pytest.mark.parametrize(
    ("changes", "missed"),
    [
        ({"ratio": 0.51}, "max_ratio_to_eager: 0.51, at most 0.5"),
        ({"floor_ratio": 1.4}, "max_ratio_to_gemm_floor: 1.4, at most 1.35"),
        ({"difference": 1e-3}, "max_difference_from_eager: 0.001"),
        ({"difference": float("nan")}, "max_difference_from_eager: nan"),
        ({"eager": False}, "max_ratio_to_eager: not measured"),
        (
            {"family": "gwp-0", "size": "gwp0-wide4", "ratio": 0.34},
            "max_ratio_to_eager: 0.34, at most 0.333",
        ),
    ],
)
def test_check_budgets_missed_is_named(changes, missed):
    assert missed in check_budgets(_report(**changes), read_budgets(BUDGETS))[0]


@pytest.mark.parametrize(
    "changes", [{"size": "gwp05-tiny"}, {"precision": "bf16"}, {"provider": "cuda"}]
)
def test_check_budgets_of_something_else_are_refused(changes):
    with pytest.raises(SpecError, match="run bench with that"):
        check_budgets(_report(**changes), read_budgets(BUDGETS))


def test_check_budgets_file_without_the_family_is_refused():
    with pytest.raises(SpecError, match=r'no table \[bench\."gwp-0\.5"\]'):
        check_budgets(_report(), {"bench": {}})


def test_check_budgets_unknown_entry_is_refused():
    budgets = read_budgets(BUDGETS)
    budgets["bench"]["gwp-0.5"]["max_ratio_to_egaer"] = 0.1
    with pytest.raises(SpecError, match="max_ratio_to_egaer"):
        check_budgets(_report(), budgets)


def test_read_budgets_missing_file_is_named(tmp_path):
    with pytest.raises(SpecError, match=r"none\.toml: cannot be read"):
        read_budgets(tmp_path / "none.toml")


def test_read_budgets_with_a_byte_order_mark_is_read(tmp_path):
    (tmp_path / "b.toml").write_text("[bench]\n", "utf-8-sig")
    assert read_budgets(tmp_path / "b.toml") == {"bench": {}}


def test_read_budgets_not_toml_is_refused(tmp_path):
    (tmp_path / "b.toml").write_text("[bench")
    with pytest.raises(SpecError, match="is not TOML"):
        read_budgets(tmp_path / "b.toml")
