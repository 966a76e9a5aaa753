"""A bundle that was altered in any way is refused, and the message names the file."""

from __future__ import annotations

import json
import shutil

import pytest

from gwp_edge.bundle import Bundle
from gwp_edge.errors import BuildError, SpecError

pytestmark = pytest.mark.export


@pytest.fixture
def bundle(exported, tmp_path):
    copy = tmp_path / "policy.gwp"
    shutil.copytree(exported("gwp05"), copy)
    return copy


def edit(bundle, change):
    manifest = json.loads((bundle / "manifest.json").read_text())
    change(manifest)
    (bundle / "manifest.json").write_text(json.dumps(manifest))


def test_open_of_untouched_bundle_reads_spec(bundle):
    spec = Bundle.open(bundle).spec
    assert spec.network.family == "gwp-0.5"
    assert spec.cameras == ("cam_high", "cam_left_wrist", "cam_right_wrist")
    assert spec.delta_mask.tolist() == [1, 1, 1, 1, 1, 1, 0] * 2


@pytest.mark.parametrize("name", ["weights.safetensors", "denoise.onnx", "golden.safetensors"])
def test_open_of_altered_file_names_it(bundle, name):
    data = bytearray((bundle / name).read_bytes())
    data[-1] ^= 1
    (bundle / name).write_bytes(data)
    with pytest.raises(SpecError, match=f"{name} was altered"):
        Bundle.open(bundle)


def test_open_of_truncated_file_names_it(bundle):
    data = (bundle / "weights.safetensors").read_bytes()
    (bundle / "weights.safetensors").write_bytes(data[:-10])
    with pytest.raises(SpecError, match=r"weights\.safetensors has \d+ bytes, expected"):
        Bundle.open(bundle)


def test_open_without_a_file_names_it(bundle):
    (bundle / "prompts" / "0000.safetensors").unlink()
    with pytest.raises(SpecError, match=r"prompts/0000\.safetensors is missing"):
        Bundle.open(bundle)


def test_open_with_link_out_of_the_bundle_is_refused(bundle, tmp_path):
    outside = tmp_path / "outside.onnx"
    shutil.move(bundle / "denoise.onnx", outside)
    (bundle / "denoise.onnx").symlink_to(outside)
    with pytest.raises(SpecError, match=r"denoise\.onnx is a link"):
        Bundle.open(bundle)


@pytest.mark.parametrize("name", ["../outside.onnx", "/etc/passwd", "prompts/../../x"])
def test_open_with_path_out_of_the_bundle_is_refused(bundle, name):
    def change(manifest):
        manifest["files"][name] = manifest["files"].pop("denoise.onnx")
        manifest["graphs"]["native"]["denoise"] = name

    edit(bundle, change)
    with pytest.raises(SpecError, match="outside the bundle"):
        Bundle.open(bundle)


def test_open_with_edited_spec_is_refused(bundle):
    def change(manifest):
        manifest["spec"]["statistics"]["action_q99"][0] += 0.5

    edit(bundle, change)
    with pytest.raises(SpecError, match=r"manifest\.json was altered"):
        Bundle.open(bundle)


def test_open_of_newer_layout_says_what_to_do(bundle):
    edit(bundle, lambda m: m.update(schema_version=99))
    with pytest.raises(SpecError, match="layout version 99, this gwp-edge reads 1"):
        Bundle.open(bundle)


def test_open_with_missing_field_gives_its_path(bundle):
    edit(bundle, lambda m: m["spec"]["canvas"]["views"][1].pop("x_px"))
    with pytest.raises(SpecError, match=r"x_px.*views"):
        Bundle.open(bundle)


@pytest.mark.parametrize("content", [b"", b"[1]", b"\xff\xfe", b'{"schema": "other"}'])
def test_open_of_something_else_is_one_clear_error(bundle, content):
    (bundle / "manifest.json").write_bytes(content)
    with pytest.raises(SpecError, match=r"manifest|schema"):
        Bundle.open(bundle)


def test_open_of_no_bundle_says_how_to_make_one(tmp_path):
    with pytest.raises(SpecError, match="gwp-edge export"):
        Bundle.open(tmp_path / "nothing.gwp")
    with pytest.raises(SpecError, match="not a bundle"):
        Bundle.open(tmp_path)


def test_load_with_another_golden_output_is_refused(bundle):
    """An engine that computes something else must never reach a robot."""
    import msgspec
    import numpy as np
    from safetensors.numpy import load_file, save_file

    import gwp_edge
    from gwp_edge.bundle import hash_file
    from gwp_edge.manifest import Manifest, bundle_id

    path = bundle / "golden.safetensors"
    arrays = load_file(path)
    arrays["actions"] = np.ascontiguousarray(arrays["actions"] + 1e-2)
    save_file(arrays, path)
    manifest = msgspec.json.decode((bundle / "manifest.json").read_bytes(), type=Manifest)
    entry = msgspec.structs.replace(
        manifest.files["golden.safetensors"],
        sha256=hash_file(path),
        n_bytes=path.stat().st_size,
    )
    files = {**manifest.files, "golden.safetensors": entry}
    manifest = msgspec.structs.replace(
        manifest, files=files, bundle_id=bundle_id(manifest.spec, files)
    )
    (bundle / "manifest.json").write_bytes(msgspec.json.encode(manifest))
    with pytest.raises(BuildError, match="does not reproduce the golden output"):
        gwp_edge.load(bundle)
    gwp_edge.load(bundle, check_golden=False).close()
