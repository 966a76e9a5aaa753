"""Verify on quantized bundles: their samples, the cost of each layer, and bad calibrations.

Two denoising steps and few samples: every fault here is found at once.
"""

from __future__ import annotations

import dataclasses
import hashlib
import shutil
from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("av")

from gwp_edge.bundle import Bundle
from gwp_edge.calibration import quantize
from gwp_edge.calibration.applied_ranges import load_ranges
from gwp_edge.calibration.choice import Choice
from gwp_edge.calibration.record import load_record, record_bytes, save_record
from gwp_edge.calibration.report import to_html
from gwp_edge.calibration.verify import VerifyOptions, verify_bundle
from gwp_edge.calibration.verify_engine import EngineChoice
from gwp_edge.calibration.verify_reference import ReferenceOptions
from gwp_edge.errors import SpecError
from gwp_edge.export.pipeline import ExportOptions, export_bundle

pytestmark = pytest.mark.export

DATA = Path(__file__).resolve().parents[1] / "data"
DATASET = DATA / "dataset"
PROMPTS = tuple(sorted((DATASET / "t5_embedding").glob("*.pt")))
CHECKPOINT = DATA / "reference" / "gwp05" / "checkpoint"


def export(out: Path, **changes) -> Bundle:
    given = {
        "precision": "int8",
        "calibration": DATASET,
        "samples": 8,
        "held_out_samples": 2,
        "observer": "minmax",
        "smoothing": False,
        "max_error_rad": None,
        "max_error_m": None,
        "n_steps": 2,
        "prompt_embeddings": PROMPTS,
        **changes,
    }
    return export_bundle(ExportOptions(checkpoint=CHECKPOINT, out=out, **given)).bundle


def verify(bundle: Bundle, **options):
    return verify_bundle(
        VerifyOptions(
            bundle=bundle.root,
            engine=EngineChoice(threads=1),
            **{
                "dataset": DATASET,
                "reference": ReferenceOptions(checkpoint=CHECKPOINT),
                "n_samples": 1,
                **options,
            },
        )
    )


def checks(report):
    return {check.name: check for check in report.checks}


@pytest.fixture(scope="module")
def searched(tmp_path_factory):
    """A bundle that the budget search made, and its record."""
    folder = tmp_path_factory.mktemp("searched")
    record = folder / "calibration.safetensors"
    bundle = export(folder / "policy.gwp", calibration_record=record, max_error_rad=2e-3, seed=1)
    return bundle, record


def test_manifest_names_samples_record_and_the_cost_of_every_part(searched):
    bundle, record = searched
    found = Bundle.open(bundle.root).manifest.calibration
    refs = load_record(record).samples
    assert [(s.episode, s.frame, s.sha256) for s in found.samples] == [
        (r.episode, r.frame, r.sha256) for r in refs
    ]
    assert found.record_sha256 == hashlib.sha256(record.read_bytes()).hexdigest()
    assert record_bytes(load_record(record)) == record.read_bytes()
    costs = {cost.name: cost for cost in found.sensitivity}
    formats = {la.name: la.format for la in bundle.manifest.precision.layers}
    quantizable = [name for name, fmt in formats.items() if name in costs]
    assert len(costs) == len(quantizable) > 16
    for name, cost in costs.items():
        assert cost.is_quantized == (formats[name] == "int8")
        assert cost.saved_bytes > 0
        assert cost.joints_rad_p99 > 0
    assert {cost.is_quantized for cost in costs.values()} == {True, False}


def test_verify_shuns_episodes_that_the_manifest_names(searched):
    """The bundle was split with seed 1; verify's own seed 0 must not lead it into those frames."""
    bundle, _ = searched
    calibrated = {s.episode for s in bundle.manifest.calibration.samples}
    report = verify(bundle, seed=0)
    assert calibrated.isdisjoint(report.context.episodes)
    assert calibrated <= set(report.context.excluded_episodes)
    assert checks(report)["calibration"].passed
    assert checks(report)["calibration samples"].passed


def test_layers_of_a_quantized_bundle_are_judged(searched):
    bundle, _ = searched
    report = verify(bundle, layers=True)
    assert report.passed, report.verdict
    layers = {(x.stage, x.name): x for x in report.layers}
    for layer in bundle.manifest.precision.layers:
        if layer.stage != "denoise":
            continue
        judged = layers[layer.stage, layer.name]
        assert judged.format == layer.format
        assert (judged.own_sqnr_db is None) == (layer.format == "fp32")
        if layer.format == "int8":
            assert 20 < judged.own_sqnr_db < 70
    engine, emulated = report.reference.all_rows, report.emulation.all_rows
    assert engine.joints_rad.mean / 2 < emulated.joints_rad.mean < engine.joints_rad.mean * 2


def test_report_of_a_quantized_bundle_has_bars_and_ranges(searched):
    bundle, _ = searched
    report = verify(bundle)
    assert len(report.sensitivity) == len(bundle.manifest.calibration.sensitivity)
    ranges = {r.name: r.steps for r in report.ranges}
    assert len(ranges["denoise/blocks.0.action_expert.attn1.qkv"]) == 2
    assert len(ranges["prefill/blocks.0.visual_expert.attn1.qkv"]) == 1
    assert all(amax > 0 for steps in ranges.values() for amax in steps)
    page = to_html(report)
    assert "blocks.0.action_expert.attn2.to_out.0" in page


def test_folded_bundle_is_verified_layer_by_layer(tmp_path, monkeypatch):
    """Factors in weights, tables and prompt caches are no fault; they cancel in every layer."""
    chosen = Choice(method="minmax", is_smoothed=True)
    monkeypatch.setattr(quantize, "choose_ranges", lambda *_, **__: chosen)
    bundle = export(tmp_path / "policy.gwp", smoothing=True)
    assert bundle.manifest.calibration.is_smoothed
    report = verify(bundle, layers=True)
    assert checks(report)["prompts"].passed, checks(report)["prompts"].text
    assert report.passed, report.verdict
    int8 = [x for x in report.layers if x.format == "int8"]
    assert min(x.own_sqnr_db for x in int8) > 15
    assert report.emulation.all_rows.joints_rad.p99 < 0.1


def test_calibration_on_one_sample_is_caught(searched, tmp_path):
    good, _ = searched
    bundle = export(tmp_path / "policy.gwp", samples=1, seed=1)
    report = verify(bundle)
    assert not report.passed
    assert "1 samples, expected at least 8" in checks(report)["calibration"].text
    assert checks(verify(good))["calibration"].passed


def test_calibration_with_exchanged_cameras_is_caught(tmp_path):
    """Ranges barely differ, and so do errors; that the pictures were others is what shows.

    Samples were matched by the folder's name, so that a copy of another name was not checked.
    """
    swapped = tmp_path / "swapped"
    shutil.copytree(DATASET, swapped)
    videos = swapped / "videos"
    left, right = (videos / f"observation.images.cam_{side}_wrist" for side in ("left", "right"))
    left.rename(videos / "aside")
    right.rename(left)
    (videos / "aside").rename(right)
    bundle = export(tmp_path / "policy.gwp", calibration=swapped)
    report = verify(bundle)
    assert not report.passed
    assert checks(report)["calibration samples"].passed is False
    assert "cameras are exchanged" in report.verdict


def test_renamed_calibration_set_is_not_taken_for_unseen_episodes(searched, tmp_path):
    """Only the folder's name kept calibration's own episodes out of the verification."""
    bundle, _ = searched
    renamed = tmp_path / "renamed"
    shutil.copytree(DATASET, renamed)
    report = verify(bundle, dataset=renamed)
    calibrated = {s.episode for s in bundle.manifest.calibration.samples}
    assert calibrated.isdisjoint(report.context.episodes)
    assert calibrated <= set(report.context.excluded_episodes)
    assert checks(report)["calibration samples"].passed


def test_record_of_another_calibration_is_refused(searched, tmp_path):
    """Any record was taken, and its samples replaced those that the bundle names."""
    bundle, record = searched
    report = verify(bundle, calibration_record=record)
    assert report.passed, report.verdict
    assert {r.name for r in report.ranges} == set(load_record(record).tensors)
    assert {r.name for r in report.settling.ranges} <= set(load_record(record).tensors)
    other = tmp_path / "other.safetensors"
    given = load_record(record)
    save_record(other, dataclasses.replace(given, samples=given.samples[:-1]))
    with pytest.raises(SpecError, match="calibrated with another record"):
        verify(bundle, calibration_record=other)


def test_record_for_a_bundle_without_calibration_is_refused(searched, exported):
    _, record = searched
    plain = Bundle.open(exported("gwp05", n_steps=2, prompt_embeddings=PROMPTS))
    with pytest.raises(SpecError, match="was not calibrated"):
        verify(plain, calibration_record=record)


def test_convergence_of_ranges_is_in_bundle_report_and_page(searched):
    """It ended as a count in a line of text: which ranges grow, and how, was nowhere to be seen."""
    bundle, record = searched
    report = verify(bundle)
    seen = {r.name: r for r in report.settling.ranges}
    stored = load_ranges(bundle)
    assert set(seen) == set(stored.thresholds)
    assert report.settling.method == "minmax"
    observed = load_record(record).tensors
    for name, growth in seen.items():
        expected = observed[name].convergence("minmax")
        assert (growth.amax, growth.thresholds) == (expected.amax, expected.thresholds)
        assert growth.is_growing == expected.is_growing
    n_growing = sum(growth.is_growing for growth in seen.values())
    text = f"{n_growing} of {len(seen)} ranges (minmax) still grow"
    assert text in checks(report)["calibration"].text
    assert "Do the ranges settle?" in to_html(report)
