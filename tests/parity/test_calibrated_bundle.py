"""From a checkpoint and a dataset to a quantized bundle, end to end on small data."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
onnx = pytest.importorskip("onnx")
pytest.importorskip("onnx_ir")
pytest.importorskip("av")
pytest.importorskip("onnxruntime")

from gwp_edge.bundle import Bundle  # noqa: E402
from gwp_edge.calibration.record import load_record, save_record  # noqa: E402
from gwp_edge.errors import BuildError, SpecError  # noqa: E402
from gwp_edge.export import onnx_recorder  # noqa: E402
from gwp_edge.export.pipeline import ExportOptions, export_bundle  # noqa: E402
from gwp_edge.export.targets import find_target  # noqa: E402
from gwp_edge.export.trt_lint import RELEASES, lint_bundle  # noqa: E402
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


def test_float_matrices_of_both_graphs_are_held_once(calibrated, tmp_path, monkeypatch):
    _, record = calibrated
    monkeypatch.setattr(onnx_recorder, "LARGE_BYTES", 1)
    shared = export_bundle(options(tmp_path / "a.gwp", calibration_record=record)).bundle
    graphs = shared.manifest.graphs
    given = {
        (form, stage): {v.name for v in model.graph.input}
        & {v.name for v in model.graph.initializer}
        for form in graphs
        for stage in ("vision", "prefill", "denoise")
        for model in [
            onnx.load(shared.file(getattr(graphs[form], stage)), load_external_data=False)
        ]
    }
    matrices = given.pop(("portable", "denoise"))
    assert "blocks.0.action_expert.attn2.to_out.0.weight" in matrices
    assert given.pop(("portable", "prefill")) == matrices
    assert not any(given.values())

    read, asked = Bundle.weight, []
    monkeypatch.setattr(Bundle, "weight", lambda self, name: asked.append(name) or read(self, name))
    load(shared.root, threads=1, weights="mapped").close()
    assert not asked
    load(shared.root, threads=1).close()
    assert sorted(asked) == sorted(matrices)
    # It computes with what it was given: with other values it does not reproduce its golden answer.
    monkeypatch.setattr(Bundle, "weight", lambda self, name: 2.0 * read(self, name))
    with pytest.raises(BuildError, match="golden"):
        load(shared.root, threads=1)


def test_block_scales_of_int4_stay_constants(tmp_path, monkeypatch):
    """What fuses them with their codes asks for constants."""
    monkeypatch.setattr(onnx_recorder, "LARGE_BYTES", 1)
    given = dataclasses.replace(options(tmp_path / "a.gwp", "w4", "gwp0"), calibration=None)
    bundle = export_bundle(given).bundle
    model = onnx.load(
        bundle.file(bundle.manifest.graphs["portable"].denoise), load_external_data=False
    )
    held = {v.name for v in model.graph.input} & {v.name for v in model.graph.initializer}
    assert held
    assert not any("scale" in name for name in held)
    assert bundle.manifest.golden.checked_with == ("ort cpu",)


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
    with pytest.raises(SpecError, match="other weights"):
        export_bundle(options(tmp_path / "a.gwp", family="gwp0", calibration_record=record))
    with pytest.raises(SpecError, match="denoising steps"):
        export_bundle(options(tmp_path / "b.gwp", n_steps=4, calibration_record=record))
    assert not list(tmp_path.iterdir())


def test_record_of_other_weights_with_equal_biases_is_refused(calibrated, tmp_path):
    """A merged adapter leaves biases and shapes alone; its old ranges once were accepted."""
    from safetensors.torch import load_file, save_file

    _, record = calibrated
    source = DATA / "reference" / "gwp05"
    for name in ("base_model", "t5_embedding", "norm_stats.json", "checkpoint"):
        copy = shutil.copytree if (source / name).is_dir() else shutil.copy
        copy(source / name, tmp_path / name)
    (path,) = (tmp_path / "checkpoint").glob("*.safetensors")
    tensors = load_file(path)
    tensors["blocks.1.visual_expert.ffn.net.0.proj.weight"] *= 5.0
    save_file(tensors, path)
    given = options(tmp_path / "a.gwp", calibration_record=record)
    given = dataclasses.replace(given, checkpoint=tmp_path / "checkpoint")
    with pytest.raises(SpecError, match="other weights"):
        export_bundle(given)


def test_record_serves_a_bundle_of_more_prompts(calibrated, tmp_path):
    _, record = calibrated
    embedding = torch.load(
        next((DATA / "reference" / "gwp05" / "t5_embedding").glob("*.pt")), weights_only=True
    )["t5_embedding"]
    torch.save({"t5_embedding": torch.cat([embedding, embedding])}, tmp_path / "long.pt")
    given = options(
        tmp_path / "a.gwp",
        calibration_record=record,
        prompt_embeddings=(tmp_path / "long.pt",),
    )
    assert export_bundle(given).bundle.manifest.calibration.n_samples == 4


def test_held_out_samples_are_the_records_whatever_the_seed(calibrated, tmp_path):
    """With another seed the split was another, and calibration's own samples were judged on."""
    bundle, record = calibrated
    given = options(tmp_path / "a.gwp", calibration_record=record, seed=1)
    manifest = export_bundle(given).bundle.manifest
    assert manifest.error.inputs == bundle.manifest.error.inputs


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"seed": 1, "fixed": frozenset({"seed"})}, "--seed 0, not 1"),
        ({"samples": 5, "fixed": frozenset({"samples"})}, "--samples 4, not 5"),
        ({"smoothing": True, "fixed": frozenset({"smoothing"})}, "--smoothing False, not True"),
    ],
)
def test_record_that_was_made_otherwise_is_refused(calibrated, tmp_path, changes, words):
    _, record = calibrated
    with pytest.raises(SpecError, match=words):
        export_bundle(options(tmp_path / "a.gwp", calibration_record=record, **changes))


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


def test_recipe_file_decides_and_is_held_to_the_budget(calibrated, tmp_path):
    _, record = calibrated
    path = tmp_path / "mine.json"
    path.write_text(json.dumps({"layers": {"blocks.*": "w8", "blocks.1.*": "fp32"}}))
    given = options(
        tmp_path / "a.gwp", calibration_record=record, recipe_file=path, max_error_rad=1e-9
    )
    with pytest.raises(BuildError, match=r"the recipe gives p99 .* allowed"):
        export_bundle(given)
    manifest = export_bundle(dataclasses.replace(given, go_on=True)).bundle.manifest
    assert any("the recipe gives" in note for note in manifest.provenance.notes)
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


@pytest.mark.parametrize("content", [{"layers": {"*": "fp8"}}, {"default": "fp8"}])
def test_recipe_cannot_bring_to_a_device_what_it_has_no_units_for(tmp_path, content):
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(content))
    with pytest.raises(SpecError, match="int8"):
        export_bundle(options(tmp_path / "a.gwp", target="orin", recipe_file=path))


def test_recipe_of_single_quantized_layers_runs_on_the_engine(calibrated, tmp_path):
    """Its golden output once was the float32 answer, which no engine reproduced."""
    _, record = calibrated
    path = tmp_path / "mine.json"
    path.write_text(json.dumps({"default": "fp32", "layers": {"blocks.0.*": "int8"}}))
    given = options(tmp_path / "a.gwp", calibration_record=record, recipe_file=path)
    manifest = export_bundle(given).bundle.manifest
    assert manifest.golden.checked_with == ("ort cpu",)
    assert {la.format for la in manifest.precision.layers} == {"fp32", "int8"}


def test_budget_without_anything_to_measure_on_is_refused(calibrated, tmp_path):
    _, record = calibrated
    for precision, given_record in (("w8", None), ("int8", record)):
        given = options(
            tmp_path / "a.gwp",
            precision=precision,
            calibration=None,
            calibration_record=given_record,
            max_error_rad=1e-3,
        )
        with pytest.raises(SpecError, match="or --no-budget"):
            export_bundle(given)


def test_auto_takes_what_was_measured_best(tmp_path):
    given = options(
        tmp_path / "a.gwp", observer="auto", smoothing=True, n_steps=2, max_error_rad=1.0
    )
    calibration = export_bundle(given).bundle.manifest.calibration
    assert calibration.observer in ("minmax", "percentile", "mse", "entropy")


def test_large_network_says_that_ranges_were_not_measured(monkeypatch, tmp_path):
    monkeypatch.setattr("gwp_edge.calibration.choice._MANY_WEIGHTS", 0)
    given = options(tmp_path / "a.gwp", observer="auto", smoothing=True, n_steps=2)
    manifest = export_bundle(given).bundle.manifest
    assert manifest.calibration.observer == "mse"
    assert any(
        "ranges are chosen by mse" in n and "too slow" in n for n in manifest.provenance.notes
    )


@pytest.mark.parametrize(
    ("target", "precision"), [("orin", "int8"), ("thor", "fp8"), ("orin", "w4"), ("thor", "w4")]
)
def test_export_for_a_jetson_is_clean_for_its_tensorrt(tmp_path, target, precision):
    """With the target's own defaults; only refusals of a target were tested."""
    result = export_bundle(options(tmp_path / "a.gwp", precision=precision, target=target))
    manifest = Bundle.open(result.bundle.root).manifest
    formats = {(la.stage, la.name): la.format for la in manifest.precision.layers}
    assert formats["prefill", "blocks.0.visual_expert.ffn.net.2"] == precision
    assert formats["vision", "encoder.conv_in"] == "fp16"
    assert manifest.precision.cache == "fp16"
    assert manifest.golden.checked_with == ("ort cpu",)
    release = {"orin": "10.3", "thor": "10.13"}[target]
    assert find_target(target).release == release
    found = lint_bundle(result.bundle, RELEASES[RELEASES.index(release) :])
    assert [str(x) for x in found if x.severity == "error"] == []


def test_export_for_a_jetson_keeps_layers_that_are_not_whole_int4_blocks_high(tmp_path):
    given = options(tmp_path / "a.gwp", precision="w4", target="orin")
    manifest = export_bundle(given).bundle.manifest
    formats = {la.name: la.format for la in manifest.precision.layers}
    assert formats["blocks.0.action_expert.ffn.net.2"] == "fp16"
    assert any("not whole int4 blocks of 64" in note for note in manifest.provenance.notes)


def test_export_of_int4_blocks_that_tensorrt_has_not_is_refused_for_gpus_alone(tmp_path):
    given = options(tmp_path / "a.gwp", precision="w4", block=32, target="orin")
    with pytest.raises(SpecError, match="--block 64 or 128"):
        export_bundle(given)
    assert not (tmp_path / "a.gwp").exists()
    manifest = export_bundle(dataclasses.replace(given, target="cpu")).bundle.manifest
    assert "w4" in {la.format for la in manifest.precision.layers}


def test_orin_refuses_fp8_before_any_work(tmp_path):
    with pytest.raises(SpecError, match="int8"):
        export_bundle(options(tmp_path / "a.gwp", precision="fp8", target="orin"))
