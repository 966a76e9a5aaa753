"""Verify tells a sound bundle from one with a fault in cameras, statistics, prompts or precision.

The statistics of the reference checkpoints do not belong to the dataset, so errors against its
recorded actions mean nothing here; errors against the float32 reference do.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import msgspec
import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("av")

from safetensors.torch import load_file, save_file

from gwp_edge.calibration.verify import VerifyOptions, verify_bundle
from gwp_edge.calibration.verify_checks import PARITY, Limits
from gwp_edge.calibration.verify_engine import EngineChoice
from gwp_edge.calibration.verify_reference import ReferenceOptions
from gwp_edge.errors import BuildError, SpecError
from gwp_edge.export.layout import LAYOUTS
from gwp_edge.manifest import MANIFEST, ChannelError

pytestmark = pytest.mark.export

DATA = Path(__file__).resolve().parents[1] / "data"
DATASET = DATA / "dataset"
PROMPTS = tuple(sorted((DATASET / "t5_embedding").glob("*.pt")))
# Two steps and one sample: every fault here is found at once.
EXPORT = {"n_steps": 2, "prompt_embeddings": PROMPTS}


def checkpoint(family: str) -> Path:
    return DATA / "reference" / family / "checkpoint"


def verify(bundle, *, against="gwp05", reference=None, **options):
    source = None
    if against is not None:
        source = ReferenceOptions(checkpoint=checkpoint(against), **(reference or {}))
    return verify_bundle(
        VerifyOptions(
            bundle=bundle,
            dataset=DATASET,
            reference=source,
            engine=EngineChoice(threads=1),
            **{"n_samples": 1, **options},
        )
    )


def failed(report) -> set[str]:
    return {check.name for check in report.checks if check.passed is False}


def edited(bundle: Path, folder: Path, change) -> Path:
    """Return a copy of a bundle whose manifest went through ``change``."""
    copy = folder / "edited.gwp"
    shutil.copytree(bundle, copy)
    manifest = json.loads((copy / MANIFEST).read_text())
    change(manifest)
    (copy / MANIFEST).write_text(json.dumps(manifest))
    return copy


def test_float_bundle_agrees_with_the_reference_to_parity(exported):
    report = verify(exported("gwp05", **EXPORT), n_samples=2)
    assert report.passed, report.verdict
    assert report.reference.all_rows.joints_rad.max < PARITY
    assert report.reference.all_rows.grippers_m.max < PARITY
    assert report.context.episodes == (3,)
    assert [s.task for s in report.context.samples] == ["episode_000003"] * 2
    assert {c.name for c in report.checks if c.passed} >= {"specification", "prompts"}
    loops = report.bundle_open_loop.all_rows, report.reference_open_loop.all_rows
    assert loops[0].joints_rad.max == pytest.approx(loops[1].joints_rad.max, abs=2 * PARITY)


def test_reduced_bundle_is_judged_by_engine_emulation_and_layer(exported):
    report = verify(exported("gwp05", precision="bf16", **EXPORT), layers=True)
    assert report.passed, report.verdict
    found = report.reference.all_rows.joints_rad
    assert 1e-4 < found.mean < found.p99 < found.max < 2e-2
    emulated = report.emulation.all_rows.joints_rad
    assert found.mean / 2 < emulated.mean < found.mean * 2
    layers = {(x.stage, x.name): x for x in report.layers}
    exact = layers["denoise", "action_decoder.out_proj"]
    assert exact.format == "fp32"
    assert exact.own_sqnr_db is None
    assert exact.sqnr_db < 70  # what went wrong before it
    rounded = layers["denoise", "blocks.0.action_expert.ffn.net.0.proj"]
    assert 40 < rounded.sqnr_db <= rounded.own_sqnr_db + 1 < 65
    assert 0.999 < rounded.cosine < 1
    assert len(rounded.steps_sqnr_db) == len(rounded.steps_input_max) == 2
    assert {layer.stage for layer in report.layers} == {"vision", "prefill", "denoise"}


def test_layers_of_a_float_bundle_are_equal(exported):
    report = verify(exported("gwp0", **EXPORT), against="gwp0", layers=True)
    assert report.passed, report.verdict
    assert report.reference.all_rows.joints_rad.max < PARITY
    assert len(report.layers) > 50
    assert all(x.sqnr_db is None and x.own_sqnr_db is None for x in report.layers)
    assert report.emulation.all_rows.joints_rad.max == 0


def test_wrong_camera_order_is_caught(exported, tmp_path):
    layout = msgspec.to_builtins(LAYOUTS["piper-dual"])
    views = layout["canvas"]["views"]
    views[1]["camera"], views[2]["camera"] = views[2]["camera"], views[1]["camera"]
    swapped = tmp_path / "layout.json"
    swapped.write_text(json.dumps(layout))
    bundle = exported("gwp05", layout=str(swapped), **EXPORT)
    report = verify(bundle)
    assert not report.passed
    assert {"specification", "joints as recorded"} <= failed(report)
    assert "cam_right_wrist at (0, 192)" in report.verdict
    assert report.reference.all_rows.joints_rad.max > 10 * PARITY
    # The user who trained with that layout says so, and the same bundle is sound.
    assert verify(bundle, reference={"layout": str(swapped)}).passed


def test_wrong_statistics_are_caught(exported):
    bundle = exported("gwp05", norm_stats=DATASET / "norm_stats.json", **EXPORT)
    report = verify(bundle)
    assert {"specification", "joints as recorded", "grippers as recorded"} <= failed(report)
    assert "statistics differ: state_q01 of left_joint1.pos" in report.verdict
    assert report.reference.all_rows.joints_rad.p99 > 0.1
    assert verify(bundle, reference={"norm_stats": DATASET / "norm_stats.json"}).passed


def test_prompts_swapped_before_export_are_caught(exported, tmp_path):
    """The golden output agrees with the fault then; only the embeddings tell."""
    for i, path in enumerate(PROMPTS):
        shutil.copy(PROMPTS[(i + 1) % len(PROMPTS)], tmp_path / path.name)
    files = tuple(sorted(tmp_path.glob("*.pt")))
    report = verify(exported("gwp05", **{**EXPORT, "prompt_embeddings": files}))
    assert {"prompts", "joints as recorded"} <= failed(report)
    assert "golden output" not in failed(report)
    assert "episode_000003" in report.verdict


def test_prompts_swapped_in_the_bundle_are_caught(exported, tmp_path):
    def swap(manifest):
        prompts = manifest["prompts"]
        names = list(prompts)
        files = list(prompts.values())
        manifest["prompts"] = dict(zip(names, files[1:] + files[:1], strict=True))

    report = verify(edited(exported("gwp05", **EXPORT), tmp_path, swap))
    assert {"prompts", "golden output", "joints as recorded"} <= failed(report)


def test_bundle_of_another_training_is_caught(exported, tmp_path):
    folder = tmp_path / "run" / "checkpoint"
    shutil.copytree(checkpoint("gwp05"), folder)
    file = folder / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    weights["action_decoder.in_proj.weight"] *= 1.05
    save_file(weights, file)
    for name in ("base_model", "norm_stats.json"):
        (tmp_path / "run" / name).symlink_to(checkpoint("gwp05").parent / name)
    report = verify(exported("gwp05", **EXPORT), against=None)
    assert report.passed
    source = ReferenceOptions(checkpoint=folder)
    report = verify_bundle(
        VerifyOptions(
            bundle=exported("gwp05", **EXPORT),
            dataset=DATASET,
            reference=source,
            n_samples=1,
            engine=EngineChoice(threads=1),
        )
    )
    assert "joints as recorded" in failed(report)
    assert any("not exported from these checkpoint files" in note for note in report.notes)


def test_error_above_what_the_manifest_records_fails(exported, tmp_path):
    """What a calibration on too few samples looks like: fine on its own input, worse on others."""

    def shrink(manifest):
        for part in ("joints_rad", "grippers_m"):
            error = manifest["error"][part]
            manifest["error"][part] = {name: value / 100 for name, value in error.items()}

    bundle = edited(exported("gwp05", precision="bf16", **EXPORT), tmp_path, shrink)
    report = verify(bundle)
    assert {"joints as recorded", "grippers as recorded"} == failed(report)
    assert verify(bundle, limits=Limits(factor=1000.0)).passed


def test_given_bound_fails_what_the_manifest_admits(exported):
    bundle = exported("gwp05", precision="bf16", **EXPORT)
    report = verify(bundle, limits=Limits(joints_p99_rad=1e-4))
    assert failed(report) == {"joints as asked"}
    assert isinstance(report.reference.all_rows.joints_rad, ChannelError)


def test_task_without_embedding_is_not_called_checked(exported, tmp_path):
    """A prompt whose embedding is nowhere: the number stands, the prompt itself is unknown."""
    name = tmp_path / "wave.pt"
    shutil.copy(PROMPTS[0], name)
    bundle = exported("gwp05", **{**EXPORT, "prompt_embeddings": (name,)})
    report = verify(bundle, task="wave")
    assert report.passed
    (check,) = [c for c in report.checks if c.name == "prompts"]
    assert check.passed is None
    report = verify(bundle, task="wave", reference={"prompt_embeddings": (name,)})
    assert {c.name: c.passed for c in report.checks}["prompts"] is True


def test_without_reference_only_the_recording_is_compared(exported):
    report = verify(exported("gwp05", **EXPORT), against=None)
    assert report.reference is None
    assert report.passed
    assert "not judged" in report.verdict
    assert any("float32 itself" in note for note in report.notes)
    assert report.bundle_open_loop.all_rows.joints_rad.max > 0


@pytest.mark.parametrize("options", [{"layers": True}, {"limits": Limits(joints_p99_rad=1.0)}])
def test_options_that_need_a_reference_are_refused_without(exported, options):
    with pytest.raises(SpecError, match="--against"):
        verify(exported("gwp05", **EXPORT), against=None, **options)


def test_answer_that_is_not_finite_is_an_error(exported, monkeypatch):
    from gwp_edge.engines.ort import OrtEngine

    bundle = exported("gwp05", **EXPORT)  # before the engine breaks: export runs it too
    monkeypatch.setattr(OrtEngine, "denoise", lambda self, x, *rest: np.full_like(x, np.nan))
    with pytest.raises(BuildError, match="not finite"):
        verify(bundle, against=None)


def test_checkpoint_of_the_other_family_is_caught(exported):
    report = verify(exported("gwp05", **EXPORT), against="gwp0")
    assert "specification" in failed(report)
    assert "network.family is gwp-0.5, not gwp-0" in report.verdict
