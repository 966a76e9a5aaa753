"""The planner: devices, latency model, memory; published figures that it must come near."""

from __future__ import annotations

import math

import msgspec
import pytest

from gwp_edge.errors import BuildError, DeviceError, PerformanceIssue, SpecError
from gwp_edge.machine_limits import GemmRate, Limits
from gwp_edge.manifest import STAGES
from gwp_edge.planning import Device, device_names, estimate, find_device, memory_plan, workload
from gwp_edge.planning.devices import this_processor
from gwp_edge.planning.latency import (
    Comparison,
    best_precision,
    compare,
    estimate_stage,
    judge_measured,
)
from gwp_edge.planning.memory import (
    GIB,
    available_bytes,
    check_free,
    disk_swap_bytes,
    fits,
)
from gwp_edge.planning.self_check import require_agreement
from gwp_edge.planning.workload import LayerWork, StageWork, cache_bytes

GB = 1_000_000_000


def layer(flops: int, weight_bytes: int, unit: str = "fp16", n_rows: float | None = 121):
    return LayerWork(
        name="x",
        unit=unit,
        flops=flops,
        weight_bytes=weight_bytes,
        n_rows=n_rows,
        activation_bytes=0,
    )


def stage(*layers: LayerWork, name: str = "prefill", cache: int = 0, n_passes: int = 1):
    return StageWork(stage=name, n_passes=n_passes, layers=layers, cache_bytes=cache)


# -- devices ---------------------------------------------------------------------------------------


def test_devices_every_entry_is_sane_and_says_where_it_comes_from():
    assert {"orin-nano-8", "orin-nx-16", "orin-agx-32", "orin-agx-64", "thor", "rtx-4090"} <= set(
        device_names()
    )
    for name in device_names():
        device = find_device(name)
        assert device.id == name
        assert len(device.source) > 20
        assert device.peak_tops["fp16"] < device.peak_tops["int8"]
        assert 0 < device.usable_bytes < device.memory_gb * GB
        assert device.stream_bytes_s < device.peak_bytes_s


def test_devices_measured_figures_agree_with_the_efficiencies():
    for name in device_names():
        device = find_device(name)
        if device.measured_bandwidth_gb_s is not None:
            expected = device.stream_bytes_s / GB
            assert expected == pytest.approx(device.measured_bandwidth_gb_s, rel=0.02)
        for unit, measured in device.measured_tops.items():
            assert device.expected_ops_s(unit) / 1e12 == pytest.approx(measured, rel=0.02)


def test_devices_only_those_with_units_for_it_compute_fp8():
    for name in device_names():
        device = find_device(name)
        capability = tuple(int(x) for x in device.compute_capability.split("."))
        assert ("fp8" in device.peak_tops) == (capability >= (8, 9))


def test_find_device_unknown_name_lists_the_known():
    with pytest.raises(SpecError, match=r"jetson-tx2 is not known.*orin-agx-64"):
        find_device("jetson-tx2")


@pytest.mark.parametrize(
    "change",
    [
        {"memory_gb": 0.0},
        {"efficiency_bandwidth": 1.2},
        {"kernel_us": -1.0},
        {"peak_tops": {"fp16": 1.0}},
    ],
)
def test_device_with_impossible_figures_is_refused(change):
    entry = {**msgspec.to_builtins(find_device("thor")), **change}
    with pytest.raises(msgspec.ValidationError):
        msgspec.convert(entry, Device)


# -- latency ---------------------------------------------------------------------------------------


def test_estimate_memory_bound_layer_takes_its_bytes_over_bandwidth():
    device = find_device("orin-agx-64")
    found = estimate_stage(stage(layer(1, 10 * GB)), device)
    assert found.floor_ms == pytest.approx(1e3 * 10 / 204.8, rel=1e-6)
    assert found.expected_ms - found.overhead_ms == pytest.approx(1e3 * 10 / 173, rel=0.01)
    assert found.compute_share == 0


def test_estimate_compute_bound_layer_takes_its_operations_over_the_rate():
    device = find_device("orin-agx-64")
    found = estimate_stage(stage(layer(10**12, 1)), device)
    assert found.floor_ms == pytest.approx(1e3 / 42.5, rel=1e-6)
    assert found.expected_ms - found.overhead_ms == pytest.approx(1e3 / 29.9, rel=0.01)
    assert found.compute_share > 0.9


def test_estimate_expected_is_never_below_the_floor():
    for name in device_names():
        for flops, n_bytes in ((1, GB), (10**12, 1), (10**11, 10**8)):
            found = estimate_stage(stage(layer(flops, n_bytes)), find_device(name))
            assert found.expected_ms >= found.floor_ms


def test_estimate_layers_that_differ_in_bound_do_not_overlap():
    """A stage of one memory-bound and one compute-bound layer takes both times."""
    device = find_device("thor")
    memory, compute = layer(1, GB), layer(10**12, 1)
    both = estimate_stage(stage(memory, compute), device).expected_ms
    apart = sum(estimate_stage(stage(x), device).expected_ms for x in (memory, compute))
    assert both == pytest.approx(apart)


def test_estimate_fp8_on_orin_is_refused_and_names_int8():
    with pytest.raises(PerformanceIssue, match=r"no fp8 units.*--precision int8"):
        estimate_stage(stage(layer(1, 1, unit="fp8")), find_device("orin-agx-64"))


def test_estimate_tf32_is_faster_than_float32_only_when_asked_for():
    device, work = find_device("orin-agx-64"), stage(layer(10**12, 1, unit="fp32"))
    exact, rounded = (estimate_stage(work, device, tf32=on).expected_ms for on in (False, True))
    assert rounded < exact / 2


def test_best_precision_follows_the_hardware():
    assert best_precision(find_device("orin-nx-16")) == "int8"
    assert best_precision(find_device("thor")) == "fp8"
    assert best_precision(_processor()) == "fp32"


def test_judge_measured_flags_both_ends():
    found = estimate_stage(stage(layer(1, 10 * GB)), find_device("orin-agx-64"))
    assert judge_measured(found, found.expected_ms) == "plausible"
    assert judge_measured(found, 0.8 * found.floor_ms) == "below the floor"
    assert judge_measured(found, 3.6 * found.floor_ms) == "far above the floor"
    with pytest.raises(SpecError, match="positive"):
        judge_measured(found, float("nan"))


# What PEERS publishes for the same architecture in TensorRT FP16: bytes of the engine are given,
# tokens are not, so this network's operations stand in (they do not limit any of the four).
PUBLISHED = {
    ("orin-agx-64", "prefill"): (9.71 * GB, 74.65),
    ("orin-agx-64", "denoise"): (2.05 * GB, 19.39),
    ("dgx-spark", "prefill"): (9.71 * GB, 57.7),
    ("dgx-spark", "denoise"): (2.05 * GB, 13.3),
}
# Products of one pass of 30 blocks, as this project's graphs have them.
PRODUCTS = {"prefill": (646, 1.02e12, 56e6), "denoise": (426, 0.082e12, 50e6)}


@pytest.mark.parametrize(("device", "name"), PUBLISHED)
def test_estimate_reproduces_published_engines_within_35_percent(device, name):
    n_bytes, published_ms = PUBLISHED[device, name]
    n, flops, cache = PRODUCTS[name]
    layers = [layer(int(flops / n), int(n_bytes / n))] * n
    found = estimate_stage(stage(*layers, name=name, cache=int(cache)), find_device(device))
    assert found.floor_ms < published_ms
    assert found.expected_ms == pytest.approx(published_ms, rel=0.35)


def _processor(best: float = 60.0) -> Device:
    limits = Limits(
        threads=2,
        gemm=(
            GemmRate(shape=(2048, 2048, 2048), gflop_s=best),
            GemmRate(shape=(121, 3072, 3072), gflop_s=48.0),
            GemmRate(shape=(121, 3072, 14336), gflop_s=52.0),
            GemmRate(shape=(48, 1024, 4096), gflop_s=40.0),
        ),
        stream_gb_s=12.0,
    )
    return this_processor(limits, 16 * GB)


def test_this_processor_rate_follows_the_rows_of_the_product():
    device = _processor()
    assert device.expected_ops_s("fp32", 48) == pytest.approx(40e9)
    assert device.expected_ops_s("fp32", 121) == pytest.approx(50e9)
    assert 40e9 < device.expected_ops_s("fp32", 80) < 50e9
    assert device.expected_ops_s("fp32", 1) == pytest.approx(40e9)
    assert device.expected_ops_s("fp32", 10**6) == pytest.approx(60e9)


def test_compare_takes_the_median_of_measured_passes():
    found = estimate({"prefill": stage(layer(10**9, 1, unit="fp32"))}, _processor())
    (row,) = compare(found, {"prefill": [9, 20_000_000, 10**12]})
    assert row.measured_ms == pytest.approx(20)
    assert row.error == pytest.approx(row.expected_ms / 20 - 1)
    with pytest.raises(SpecError, match="no measured pass"):
        compare(found, {"prefill": []})


def test_require_agreement_names_the_stage_that_is_off():
    require_agreement((Comparison(stage="prefill", expected_ms=80, measured_ms=100),))
    with pytest.raises(PerformanceIssue, match=r"denoise.*\+30 %.*quiet"):
        require_agreement((Comparison(stage="denoise", expected_ms=130, measured_ms=100),))


# -- memory ----------------------------------------------------------------------------------------


def test_check_free_refuses_before_the_system_kills():
    check_free("building", 3 * GB, 4 * GB, "close programs")
    with pytest.raises(BuildError, match=r"building needs about 5\.0 GB.*4\.0 GB are free; close"):
        check_free("building", 5 * GB, 4 * GB, "close programs")


def test_disk_swap_bytes_counts_disks_and_no_compressed_memory():
    """A Jetson's zram is the same memory once more: counting it would let a build be killed."""
    header = "Filename\t\t\tType\t\tSize\tUsed\tPriority\n"
    zram = "/dev/zram0 partition 4000000 0 5\n"
    disk = "/mnt/nvme/swapfile file 32000000 1000000 -2\n"
    assert disk_swap_bytes(header) == 0
    assert disk_swap_bytes(header + zram) == 0
    assert disk_swap_bytes(header + zram + disk) == 31_000_000 * 1024
    assert disk_swap_bytes() >= 0


def test_available_bytes_reads_meminfo_and_refuses_another_format():
    text = "MemTotal:       64335516 kB\nMemFree: 1 kB\nMemAvailable:   60000000 kB\n"
    assert available_bytes(text) == 60_000_000 * 1024
    with pytest.raises(DeviceError, match="MemAvailable"):
        available_bytes("MemTotal: 1 kB\n")
    assert available_bytes() > 0


# -- whole manifests -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def full():
    """Return manifests of the full-size network, made from shapes alone."""
    pytest.importorskip("torch")
    from gwp_edge.export.blueprint import blueprint

    made = {}

    def make(precision: str):
        if precision not in made:
            made[precision] = blueprint("gwp05-full", precision, rest="fp16")
        return made[precision]

    return make


@pytest.mark.export
def test_workload_full_network_has_the_known_sizes(full):
    """Bytes and operations of the 5 B network are those of the paper's network, less text K/V."""
    work = workload(full("fp16"))
    assert tuple(work) == STAGES
    assert work["prefill"].weight_bytes == pytest.approx(10.0 * GB, rel=0.03)
    assert work["denoise"].weight_bytes == pytest.approx(1.64 * GB, rel=0.03)
    assert work["prefill"].flops == pytest.approx(1.02e12, rel=0.05)
    assert work["denoise"].n_passes == 10
    n, flops, cache = PRODUCTS["prefill"]
    assert (len(work["prefill"].layers), work["prefill"].cache_bytes) == (n, round(cache, -5)) or (
        len(work["prefill"].layers) == n
        and work["prefill"].cache_bytes == pytest.approx(cache, rel=0.02)
    )
    assert flops == pytest.approx(work["prefill"].flops, rel=0.02)
    assert len(work["denoise"].layers) == PRODUCTS["denoise"][0]


@pytest.mark.export
def test_estimate_int8_halves_the_floor_of_the_stages_that_it_quantizes(full):
    device = find_device("orin-agx-64")
    half, quarter = (estimate(workload(full(p)), device) for p in ("fp16", "int8"))
    for a, b in zip(half.stages[1:], quarter.stages[1:], strict=True):
        assert b.floor_ms == pytest.approx(a.floor_ms / 2, rel=0.15)
    assert half.label == "modelled"
    assert quarter.expected_ms < half.expected_ms
    steps = half.stages[2]
    assert half.floor_ms == pytest.approx(
        half.stages[0].floor_ms + half.stages[1].floor_ms + 10 * steps.floor_ms
    )


@pytest.mark.export
def test_memory_full_network_fits_where_it_should(full):
    half, small = memory_plan(full("fp16")), memory_plan(full("int8"))
    assert fits(half, find_device("orin-agx-64")) == {"build": True, "load": True, "run": True}
    assert not fits(half, find_device("orin-nx-16"))["load"]
    # The plan of an engine is in the host's memory there.
    assert half.load_bytes > find_device("rtx-4090").usable_bytes
    assert fits(half, find_device("rtx-4090"))["load"]
    assert fits(small, find_device("orin-nx-16"))["run"]
    assert not fits(small, find_device("orin-nano-8"))["run"]
    assert half.build_bytes > half.load_bytes > half.run_bytes > sum(half.weights.values())
    assert dict(half.rows())["running"] == half.run_bytes
    assert memory_plan(full("fp16"), workspace_bytes=3 * GIB).build_bytes == (
        half.build_bytes + 2 * GIB
    )


@pytest.mark.export
def test_memory_of_engines_that_exist_replaces_what_was_modelled(full):
    plan = memory_plan(full("int8"))
    built = plan.built({"vision": 1 * GB, "prefill": 5 * GB, "denoise": 2 * GB}, 300_000_000)
    assert built.run_bytes == 8 * GB + plan.caches + 300_000_000 + plan.runtime
    assert built.load_bytes == built.run_bytes + 5 * GB
    # Kernels' scratch is asked for while running too, which the model counts until it is known.
    assert plan.run_bytes == (
        sum(plan.weights.values()) + plan.caches + plan.activations + GIB + plan.runtime
    )


@pytest.mark.export
def test_memory_int8_weights_without_int8_inputs_are_counted_as_float(full):
    """TensorRT expands them when it builds, so the bundle's size would mislead."""
    assert memory_plan(full("w8")).weights["prefill"] > 3.5 * full_bytes(full("w8"), "prefill")


def full_bytes(manifest, name: str) -> int:
    return sum(x.weight_bytes for x in manifest.precision.layers if x.stage == name)


@pytest.mark.export
def test_workload_unknown_formats_are_refused(full):
    manifest = full("fp16")
    layers = (msgspec.structs.replace(manifest.precision.layers[0], format="fp3"),)
    strange = msgspec.structs.replace(manifest.precision, layers=layers)
    with pytest.raises(SpecError, match="fp3"):
        workload(msgspec.structs.replace(manifest, precision=strange))
    with pytest.raises(SpecError, match="caches in 'int8'"):
        cache_bytes(manifest.spec, "int8")
    none = msgspec.structs.replace(manifest.precision, layers=())
    with pytest.raises(SpecError, match="no layers of vision"):
        workload(msgspec.structs.replace(manifest, precision=none))


@pytest.mark.export
def test_blueprint_has_no_weights_to_give():
    from gwp_edge.export.blueprint import _Shapes, record

    with pytest.raises(SpecError, match="gwp99 is not known"):
        record("gwp99", "fp16")
    with pytest.raises(BuildError, match="no values"):
        _Shapes(shapes={"a": (1,)}).load("a")
    assert math.prod(_Shapes(shapes={"a": (2, 3)}).shape("a")) == 6
