"""The reference that engines are held to when a layer is looked for."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("onnx")

import onnx

from gwp_edge.bundle import Bundle
from gwp_edge.engines.ort import OrtEngine
from gwp_edge.engines.trt_reference import (
    Reference,
    layer_tensors,
    reference_bytes,
    stage_inputs,
    with_outputs,
)
from gwp_edge.errors import BuildError, DeviceError

pytestmark = pytest.mark.export


@pytest.fixture
def bundle(exported) -> Bundle:
    return Bundle.open(exported("gwp05", precision="fp16", n_steps=4))


@pytest.mark.parametrize("length", [1, 127, 128, 300])
def test_with_outputs_adds_what_onnx_reads_as_outputs(bundle, length):
    path = bundle.file(bundle.manifest.graphs["portable"].denoise)
    names = ["x" * length, "blocks.0:out"]
    before = onnx.load(path, load_external_data=False)
    after = onnx.ModelProto.FromString(with_outputs(path.read_bytes(), names))
    assert [x.name for x in after.graph.output] == ["x_next", *names]
    del after.graph.output[1:]
    assert after.SerializeToString() == before.SerializeToString()


def test_layer_tensors_are_in_both_forms_of_the_graph(bundle):
    for stage in ("vision", "prefill", "denoise"):
        found = layer_tensors(bundle, stage)
        layers = [
            x.name for x in bundle.manifest.precision.layers if x.stage == stage and x.weight_bytes
        ]
        assert list(found) == layers
        for form in ("native", "portable"):
            graph = onnx.load(
                bundle.file(getattr(bundle.manifest.graphs[form], stage)), load_external_data=False
            ).graph
            outputs = {name for node in graph.node for name in node.output}
            assert set(found.values()) <= outputs


def test_reference_of_the_first_step_is_what_the_engine_answers(bundle):
    feeds = stage_inputs(bundle, "denoise")
    shown = layer_tensors(bundle, "denoise")
    with Reference(bundle, "denoise", tuple(shown.values())) as reference:
        found = reference.run(feeds)
    assert set(shown.values()) < set(found)
    engine = OrtEngine(bundle)
    engine.set_prompt(bundle.manifest.golden.task)
    golden = bundle.arrays(bundle.manifest.golden.file)
    engine.prefill(golden["latent"], stage_inputs(bundle, "prefill")["state"])
    x = np.asarray(golden["noise"], np.float32).reshape(bundle.spec.n_rows, -1)
    wanted = engine.denoise(x, 0, np.zeros_like(x), np.zeros((len(x), 1), np.float32))
    # Unpacked weights are summed in another order, before products are rounded to 16 bits.
    np.testing.assert_allclose(found["x_next"], wanted, atol=5e-4)
    assert np.abs(wanted - x).max() > 0.05


def test_reference_bytes_are_the_file_and_a_float_copy(bundle):
    layers = [x for x in bundle.manifest.precision.layers if x.stage == "denoise"]
    half, full = (sum(x.weight_bytes for x in layers if x.format == f) for f in ("fp16", "fp32"))
    assert min(half, full) > 0
    assert reference_bytes(bundle, "denoise") == 3 * half + 2 * full


def test_reference_says_what_it_lacks(bundle, monkeypatch):
    with (
        Reference(bundle, "prefill") as reference,
        pytest.raises(DeviceError, match="nothing is known about input latent"),
    ):
        reference.run({})
    with pytest.raises(DeviceError, match="cannot load it"):
        Reference(bundle, "prefill", ("no such tensor",))
    monkeypatch.setattr("gwp_edge.engines.trt_reference.available_bytes", lambda: 0)
    with pytest.raises(BuildError, match="comparing layers on the processor needs"):
        Reference(bundle, "prefill")
