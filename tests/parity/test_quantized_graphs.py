"""Quantized graphs answer as the emulated arithmetic does, in both forms, on any CPU."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

torch = pytest.importorskip("torch")
ir = pytest.importorskip("onnx_ir")
onnx = pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")

from small_networks import NETWORKS, ReducedPath, make_inputs, make_spec, network_weights  # noqa: E402

from gwp_edge.engines.ort import SESSION_CONFIG  # noqa: E402
from gwp_edge.export import tables  # noqa: E402
from gwp_edge.export.graphs import WEIGHTS_FILE, denoise_graph, prefill_graph  # noqa: E402
from gwp_edge.export.network import streams  # noqa: E402
from gwp_edge.export.onnx_ops import OnnxOps  # noqa: E402
from gwp_edge.export.precision import (  # noqa: E402
    QUANTIZED_FORMATS,
    is_quantizable,
    make_recipe,
    scale_key,
)
from gwp_edge.export.torch_ops import TorchOps  # noqa: E402
from gwp_edge.export.weight_bank import WeightBank  # noqa: E402

pytestmark = pytest.mark.export

FORMS = ("native", "portable")
LAYER = "blocks.0.ffn.net.0.proj"


class OneLayer:
    """A weight source with a single linear layer."""

    def __init__(self, weight, bias):
        self.tensors = {f"{LAYER}.weight": weight, f"{LAYER}.bias": bias}

    def shape(self, name):
        return tuple(self.tensors[name].shape)

    def load(self, name):
        return self.tensors[name]


def session(path):
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    for key, value in SESSION_CONFIG.items():
        options.add_session_config_entry(key, value)
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def run_layer(folder, x, weight, bias, recipe, form, order=None):
    """Return what ONNX Runtime and the emulation answer for one layer."""
    source = OneLayer(torch.from_numpy(weight), torch.from_numpy(bias))
    bank = WeightBank()
    ops = OnnxOps(source, recipe, bank, form=form, stage="denoise")
    ops.output(ops.linear(ops.input("x", x.shape), LAYER, order=order), "y")
    places, _, _ = bank.layout()
    ops.attach(places, WEIGHTS_FILE)
    ir.save(ops.build("layer"), folder / "layer.onnx")
    bank.write(folder / WEIGHTS_FILE)
    onnx.checker.check_model(str(folder / "layer.onnx"), full_check=True)
    emulation = TorchOps(source, recipe)
    emulation.stage = "denoise"
    want = emulation.linear(torch.from_numpy(x), LAYER, order=order).numpy()
    return session(folder / "layer.onnx").run(None, {"x": x})[0], want


def layer_recipe(fmt, threshold, block=32, means=None):
    return dataclasses.replace(
        make_recipe(fmt),
        thresholds={scale_key("denoise", LAYER): threshold},
        means={} if means is None else {scale_key("denoise", LAYER): means},
        block=block,
    )


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("fmt", QUANTIZED_FORMATS)
@pytest.mark.parametrize(("n", "d_in", "d_out"), [(1, 32, 16), (48, 1024, 96), (121, 100, 70)])
def test_layer_equals_its_emulation(tmp_path, fmt, form, n, d_in, d_out):
    rng = np.random.default_rng(d_in)
    x = rng.standard_normal((n, d_in), dtype=np.float32) * 3
    weight = rng.standard_normal((d_out, d_in), dtype=np.float32) * 0.05
    bias = rng.standard_normal(d_out, dtype=np.float32)
    mean = x[: n // 2 + 1].mean(axis=0) + 0.5
    order = rng.permutation(d_out)
    recipe = layer_recipe(fmt, 12.0, means=mean)
    got, want = run_layer(tmp_path, x, weight, bias, recipe, form, order)
    # The products are exact or in float32; only the order of sums differs.
    assert np.abs(got - want).max() < 2e-6 * d_in**0.5 * np.abs(want).max()
    exact = x @ weight[order].T + bias[order]
    noise = np.abs(got - exact).max() / np.abs(exact).max()
    assert 1e-4 < noise < {"int8": 0.08, "fp8": 0.15, "w8": 0.03, "w4": 0.3}[fmt]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("sign", [1, -1])
def test_int8_layer_of_largest_values_does_not_saturate(tmp_path, form, sign):
    """All codes at 127: kernels that add pairs in saturating 16 bits lose half of such a sum."""
    x = np.full((5, 4096), 127.0, np.float32)
    weight = np.full((64, 4096), sign * 0.5, np.float32)
    recipe = layer_recipe("int8", 127.0)
    got, want = run_layer(tmp_path, x, weight, np.zeros(64, np.float32), recipe, form)
    assert np.allclose(want, sign * 0.5 * 127 * 4096, rtol=1e-6)
    # The native form is for accelerators; where this CPU has the saturating kernels it may fail.
    if form == "portable":
        assert np.allclose(got, want, rtol=1e-6)


def test_int8_layer_at_the_ends_of_the_codes_is_exact(tmp_path):
    rng = np.random.default_rng(0)
    x = rng.choice(np.float32([-1000, -128, -127.5, -0.5, 0.5, 1.5, 127, 1000]), (33, 512))
    weight = rng.choice(np.float32([-127, -126, 0, 1, 127]), (40, 512))
    weight[:, 0] = 127
    recipe = layer_recipe("int8", 127.0)
    got, want = run_layer(tmp_path, x, weight, np.zeros(40, np.float32), recipe, "portable")
    codes = np.clip(np.rint(x), -128, 127)
    assert np.array_equal(want, codes @ weight.T)
    assert np.array_equal(got, want)


@pytest.mark.parametrize("block", [32, 128])
@pytest.mark.parametrize("form", FORMS)
def test_int4_blocks_equal_their_emulation(tmp_path, block, form):
    rng = np.random.default_rng(1)
    x = rng.standard_normal((48, 256), dtype=np.float32)
    weight = rng.standard_normal((64, 256), dtype=np.float32)
    recipe = layer_recipe("w4", 1.0, block=block)
    got, want = run_layer(tmp_path, x, weight, np.zeros(64, np.float32), recipe, form)
    assert np.abs(got - want).max() < 1e-5 * np.abs(want).max()


def test_both_forms_read_the_same_bytes(tmp_path):
    rng = np.random.default_rng(2)
    weight = torch.from_numpy(rng.standard_normal((16, 64), dtype=np.float32))
    for fmt in QUANTIZED_FORMATS:
        bank = WeightBank()
        for form in FORMS:
            ops = OnnxOps(
                OneLayer(weight, torch.zeros(16)),
                layer_recipe(fmt, 3.0),
                bank,
                form=form,
                stage="denoise",
            )
            ops.output(ops.linear(ops.input("x", (4, 64)), LAYER), "y")
        expected = 64 * 16 * (0.5 if fmt == "w4" else 1) + 4 * 16 * (2 if fmt == "w4" else 1) + 64
        assert bank.n_bytes == expected


class Calibrated:
    """A small network with ranges seen on one input."""

    def __init__(self, name, fmt, seed=0):
        sizes = NETWORKS[name]
        self.spec = make_spec(sizes)
        self.weights = network_weights(sizes, seed)
        self.inputs = make_inputs(self.spec, seed)
        thresholds = {}

        class Watching(TorchOps):
            def linear(self, x, name, *, order=None):
                if is_quantizable(name):
                    key = scale_key(self.stage, name)
                    thresholds[key] = max(thresholds.get(key, 0.0), float(x.abs().max()))
                return super().linear(x, name, order=order)

        exact = ReducedPath(self.weights, self.spec, self.inputs)
        exact.path.ops = Watching(self.weights, eps=self.spec.network.eps)
        self.run(exact)
        self.recipe = dataclasses.replace(make_recipe(fmt), thresholds=thresholds)
        self.exact = exact

    def run(self, path):
        """Return x at the start and after every step; the prefix is computed anew."""
        path.path.ops.stage = "prefill"
        rows = {
            s.name: [list(block) for block in tables.prefix_rows(self.weights, self.spec, s)]
            for s in streams(self.spec.network)
        }
        given = (self.inputs.latent, self.inputs.state, rows, path.prompt, path.bias)
        path.prefix = path.path.prefill(*given)
        path.path.ops.stage = "denoise"
        xs = [self.inputs.noise]
        for step in range(self.spec.sampler.n_steps):
            xs.append(path.denoise(xs[-1], step))
        return np.stack([x.numpy() for x in xs])

    def emulated(self):
        """Return the emulated path after its prefill, and x before and after every step."""
        path = ReducedPath(self.weights, self.spec, self.inputs)
        path.path.ops = TorchOps(self.weights, self.recipe, eps=self.spec.network.eps)
        return path, self.run(path)

    def engine(self, folder, form, emulated, xs):
        """Return the engine's prefix V of block 0, and each step's x from the emulated one."""
        bank = WeightBank()
        args = (self.weights, self.spec, self.recipe, bank, form)
        graphs = {"prefill": prefill_graph(*args), "denoise": denoise_graph(*args)}
        for stage, graph in graphs.items():
            ir.save(graph.model(bank), folder / f"{stage}.onnx")
        bank.write(folder / WEIGHTS_FILE)
        prompt = {k: v.numpy() for k, v in self.exact.cache.items()}
        state = {"latent": self.inputs.latent.numpy(), "state": self.inputs.state.numpy()}
        first = run_graph(folder / "prefill.onnx", {**prompt, **state})["prefix_v.0"]
        prefix = {}
        for i, kv in enumerate(emulated.prefix):
            prefix |= {f"prefix_k.{i}": kv.k.numpy(), f"prefix_v.{i}": kv.v.numpy()}
        sigmas = np.array(self.spec.sampler.sigmas, np.float32)
        answers = []
        for step, x in enumerate(xs[:-1]):
            given = {
                **prompt,
                **prefix,
                "x": x,
                "sigma": sigmas[step : step + 1],
                "sigma_step": sigmas[step + 1 : step + 2] - sigmas[step : step + 1],
                "prefix_norm": np.zeros_like(x),
                "prefix_gain": np.zeros((len(x), 1), np.float32),
                "modulation": self.exact.modulation[step].numpy(),
            }
            answers.append(run_graph(folder / "denoise.onnx", given)["x_next"])
        return first, np.stack(answers)


def run_graph(path, given):
    """Run a graph on those of ``given`` that it takes."""
    opened = session(path)
    names = [node.name for node in opened.get_outputs()]
    feeds = {node.name: given[node.name] for node in opened.get_inputs()}
    return dict(zip(names, opened.run(names, feeds), strict=True))


def rms(x):
    return float(np.sqrt(np.square(x).mean()))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("fmt", QUANTIZED_FORMATS)
@pytest.mark.parametrize("name", ["mot", "mot_odd", "dense_deep", "dense_one_layer"])
def test_graphs_equal_the_emulation_until_a_rounding_flips(tmp_path, name, fmt, form):
    """An engine's answer can be told from a quantization error.

    Sums in another order put an input on the other side of a rounding boundary now and then. That
    is a change as large as any rounding, and all later roundings see it: such a step is off by as
    much as quantization costs, never by more. Most steps meet no such boundary and agree.
    """
    calibrated = Calibrated(name, fmt)
    emulated, xs = calibrated.emulated()
    exact = calibrated.run(calibrated.exact)
    first, answers = calibrated.engine(tmp_path, form, emulated, xs)
    assert rms(first - emulated.prefix[0].v.numpy()) < 1e-6
    off = [rms(a - x) for a, x in zip(answers, xs[1:], strict=True)]
    cost = rms(xs[-1] - exact[-1])
    assert cost > 1e-3
    assert np.median(off) < 1e-5
    assert max(off) < 1.5 * cost
