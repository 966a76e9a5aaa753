"""From a checkpoint and a dataset to a quantized bundle, end to end on small data."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("onnx_ir")
pytest.importorskip("av")
pytest.importorskip("onnxruntime")

from gwp_edge.bundle import Bundle  # noqa: E402
from gwp_edge.calibration.record import load_record, save_record  # noqa: E402
from gwp_edge.errors import BuildError, SpecError  # noqa: E402
from gwp_edge.export.pipeline import ExportOptions, export_bundle  # noqa: E402
from gwp_edge.policy import load  # noqa: E402

pytestmark = pytest.mark.export

DATA = Path(__file__).parents[1] / "data"
DATASET = DATA / "dataset"


def options(out, precision="int8", family="gwp05", **changes):
    return ExportOptions(
        checkpoint=DATA / "reference" / family / "checkpoint",
        out=out,
        precision=precision,
        **{
            "calibration": DATASET,
            "samples": 4,
            "held_out_samples": 2,
            "observer": "minmax",
            "smoothing": False,
            "max_error_rad": None,
            "max_error_m": None,
            "n_steps": 3,
            **changes,
        },
    )


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory):
    """A bundle, and the record that it was made from."""
    folder = tmp_path_factory.mktemp("calibrated")
    record = folder / "calibration.safetensors"
    result = export_bundle(options(folder / "policy.gwp", calibration_record=record))
    return result.bundle, record


def test_int8_bundle_is_calibrated_measured_and_runs(calibrated):
    bundle, _ = calibrated
    manifest = Bundle.open(bundle.root).manifest
    formats = {(la.stage, la.name): la.format for la in manifest.precision.layers}
    assert formats["denoise", "blocks.0.action_expert.ffn.net.2"] == "int8"
    assert formats["denoise", "action_decoder.out_proj"] == "fp32"
    assert all(la.reason for la in manifest.precision.layers)
    assert "held-out samples of dataset" in manifest.error.inputs
    assert manifest.error.n_chunks == 2
    assert 1e-4 < manifest.error.joints_rad.p99 < 0.02
    assert manifest.calibration.n_samples == 4
    assert not manifest.calibration.is_synthetic
    assert manifest.golden.checked_with == ("ort cpu",)
    policy = load(bundle.root, threads=1)  # runs the golden input
    policy.close()


def test_native_and_portable_graphs_share_one_weight_file(calibrated):
    bundle, _ = calibrated
    graphs = bundle.manifest.graphs
    assert set(graphs) == {"native", "portable"}
    assert graphs["native"].denoise != graphs["portable"].denoise


def test_record_gives_the_same_bundle_again(calibrated, tmp_path):
    """The same seed gives the same bundle, with the dataset or from its record alone."""
    bundle, record = calibrated
    again = export_bundle(options(tmp_path / "a.gwp", calibration_record=record))
    assert again.bundle.manifest.bundle_id == bundle.manifest.bundle_id
    alone = dataclasses.replace(
        options(tmp_path / "b.gwp", calibration_record=record), calibration=None
    )
    without = export_bundle(dataclasses.replace(alone, observer="minmax"))
    assert without.bundle.manifest.bundle_id == bundle.manifest.bundle_id
    assert "golden" in without.bundle.manifest.error.inputs


def test_calibration_repeats_to_the_bit(calibrated, tmp_path):
    bundle, record = calibrated
    second = tmp_path / "second.safetensors"
    result = export_bundle(options(tmp_path / "policy.gwp", calibration_record=second))
    assert second.read_bytes() == record.read_bytes()
    assert result.bundle.manifest.bundle_id == bundle.manifest.bundle_id


def test_other_seed_gives_another_bundle(calibrated, tmp_path):
    bundle, _ = calibrated
    other = export_bundle(options(tmp_path / "policy.gwp", seed=1))
    assert other.bundle.manifest.bundle_id != bundle.manifest.bundle_id


def test_record_of_another_checkpoint_is_refused(calibrated, tmp_path):
    _, record = calibrated
    with pytest.raises(SpecError, match="another checkpoint"):
        export_bundle(options(tmp_path / "a.gwp", family="gwp0", calibration_record=record))
    with pytest.raises(SpecError, match="denoising steps"):
        export_bundle(options(tmp_path / "b.gwp", n_steps=4, calibration_record=record))
    assert not list(tmp_path.iterdir())


def test_record_of_synthetic_data_is_refused_and_marks_the_bundle(calibrated, tmp_path):
    _, record = calibrated
    fake = tmp_path / "fake.safetensors"
    save_record(fake, dataclasses.replace(load_record(record), is_synthetic=True))
    with pytest.raises(SpecError, match="--allow-synthetic"):
        export_bundle(options(tmp_path / "a.gwp", calibration_record=fake))
    given = options(tmp_path / "b.gwp", calibration_record=fake, allow_synthetic=True)
    manifest = export_bundle(given).bundle.manifest
    assert manifest.calibration.is_synthetic
    assert any("SYNTHETIC" in note for note in manifest.provenance.notes)


def test_int8_without_ranges_says_what_to_pass(tmp_path):
    given = dataclasses.replace(options(tmp_path / "a.gwp"), calibration=None)
    with pytest.raises(SpecError, match="--calibration DATASET"):
        export_bundle(given)


def test_int8_weights_need_no_dataset(tmp_path):
    given = dataclasses.replace(options(tmp_path / "a.gwp", precision="w8"), calibration=None)
    manifest = export_bundle(given).bundle.manifest
    assert manifest.calibration is None
    assert manifest.golden.checked_with == ("ort cpu",)


@pytest.mark.parametrize("precision", ["fp8", "w4"])
@pytest.mark.parametrize("family", ["gwp05", "gwp0"])
def test_other_formats_run_on_the_engine(calibrated, tmp_path, precision, family):
    given = options(tmp_path / "a.gwp", precision=precision, family=family)
    manifest = export_bundle(given).bundle.manifest
    assert manifest.golden.checked_with == ("ort cpu",)
    assert manifest.error.joints_rad.p99 > 1e-3


def test_budget_keeps_layers_high_and_is_met(calibrated, tmp_path):
    bundle, record = calibrated
    whole = bundle.manifest.error.joints_rad.p99
    given = options(tmp_path / "a.gwp", calibration_record=record, max_error_rad=whole / 3)
    manifest = export_bundle(given).bundle.manifest
    assert manifest.error.joints_rad.p99 <= whole / 3
    formats = {la.format for la in manifest.precision.layers if la.stage == "denoise"}
    assert formats == {"fp32", "int8"}
    reasons = [la.reason for la in manifest.precision.layers if "kept high" in la.reason]
    assert reasons
    assert manifest.calibration.curve[0].quantized_share == 1.0
    assert any("to keep within" in note for note in manifest.provenance.notes)


def test_budget_that_nothing_meets_fails_unless_told_to_go_on(calibrated, tmp_path):
    _, record = calibrated
    given = options(tmp_path / "a.gwp", calibration_record=record, max_error_rad=1e-9)
    with pytest.raises(BuildError, match="no recipe with int8 keeps within"):
        export_bundle(given)
    assert not (tmp_path / "a.gwp").exists()
    manifest = export_bundle(dataclasses.replace(given, go_on=True)).bundle.manifest
    assert any("exported all the same" in note for note in manifest.provenance.notes)


def test_recipe_file_decides_over_the_budget(calibrated, tmp_path):
    _, record = calibrated
    path = tmp_path / "mine.json"
    path.write_text(json.dumps({"layers": {"blocks.*": "w8", "blocks.1.*": "fp32"}}))
    given = options(
        tmp_path / "a.gwp", calibration_record=record, recipe_file=path, max_error_rad=1e-9
    )
    manifest = export_bundle(given).bundle.manifest
    formats = {la.name: la.format for la in manifest.precision.layers}
    assert formats["blocks.0.visual_expert.ffn.net.2"] == "w8"
    assert formats["blocks.1.action_expert.ffn.net.2"] == "fp32"
    assert manifest.error.n_chunks == 2


def test_rest_in_float16_runs(calibrated, tmp_path):
    _, record = calibrated
    given = options(tmp_path / "a.gwp", calibration_record=record, rest="fp16")
    manifest = export_bundle(given).bundle.manifest
    assert manifest.precision.cache == "fp16"
    assert manifest.golden.checked_with == ("ort cpu",)


def test_orin_refuses_fp8_before_any_work(tmp_path):
    with pytest.raises(SpecError, match="int8"):
        export_bundle(options(tmp_path / "a.gwp", precision="fp8", target="orin"))
