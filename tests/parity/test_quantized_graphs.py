"""Quantized graphs answer as the emulated arithmetic does, in both forms, on any CPU."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

torch = pytest.importorskip("torch")
ir = pytest.importorskip("onnx_ir")
onnx = pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")

from integer_kernels import (  # noqa: E402
    saturates,
    skip_where_native_int8_saturates,
    u8_s8_product,
    u8_u8_product,
)
from safetensors.numpy import load_file  # noqa: E402
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
    skip_where_native_int8_saturates(form, fmt)
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
    skip_where_native_int8_saturates(form, "int8")
    x = np.full((5, 4096), 127.0, np.float32)
    weight = np.full((64, 4096), sign * 0.5, np.float32)
    recipe = layer_recipe("int8", 127.0)
    got, want = run_layer(tmp_path, x, weight, np.zeros(64, np.float32), recipe, form)
    assert np.allclose(want, sign * 0.5 * 127 * 4096, rtol=1e-6)
    assert np.allclose(got, want, rtol=1e-6)


INTEGER_PRODUCTS = ("MatMulInteger", "QLinearMatMul", "MatMulIntegerToFloat", "QGemm")


def integer_operands(model):
    """Return (node, element types of its operands and zero points, zero points) of each product."""
    types = {t.name: t.data_type for t in model.graph.initializer}
    constants = {
        t.name: onnx.numpy_helper.to_array(t)
        for t in model.graph.initializer
        if t.data_location != onnx.TensorProto.EXTERNAL
    }
    inferred = onnx.shape_inference.infer_shapes(model, data_prop=True).graph
    for value in (*inferred.value_info, *inferred.input, *inferred.output):
        types[value.name] = value.type.tensor_type.elem_type
    for node in model.graph.node:
        if node.op_type in INTEGER_PRODUCTS:
            known = {name: types[name] for name in node.input if types.get(name)}
            points = [constants[name] for name in node.input if "zero_point" in name]
            yield node, known, points


@pytest.mark.parametrize("name", ["mot_odd", "dense"])
def test_portable_int8_graphs_have_unsigned_operands_with_zero_point_128(tmp_path, name):
    """A signed operand would select the saturating kernels on x86 without VNNI.

    No processor with VNNI can show that by its answers, so the graphs are looked at: all of a
    network's, as written, and a layer as ONNX Runtime rewrites it for itself.
    """
    calibrated = Calibrated(name, "int8")
    bank = WeightBank()
    args = (calibrated.weights, calibrated.spec, calibrated.recipe, bank, "portable")
    n_products = 0
    for graph in (prefill_graph(*args), denoise_graph(*args)):
        n_layers = sum(cost.format == "int8" for cost in graph.costs)
        ir.save(graph.model(bank), tmp_path / "graph.onnx")
        model = onnx.load(tmp_path / "graph.onnx", load_external_data=False)
        found = list(integer_operands(model))
        assert len(found) == n_layers > 0
        for node, types, points in found:
            operands = [types[operand] for operand in node.input]
            assert operands == [onnx.TensorProto.UINT8] * 4, node.name
            assert [int(point) for point in points] == [128, 128], node.name
        n_products += len(found)
    assert n_products > 16


def test_onnx_runtime_keeps_the_unsigned_operands(tmp_path):
    rng = np.random.default_rng(3)
    x = rng.standard_normal((5, 64), dtype=np.float32)
    weight = rng.standard_normal((16, 64), dtype=np.float32)
    run_layer(tmp_path, x, weight, np.zeros(16, np.float32), layer_recipe("int8", 3.0), "portable")
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.log_severity_level = 3
    ort.InferenceSession(str(tmp_path / "layer.onnx"), options, ["CPUExecutionProvider"])
    model = onnx.load(tmp_path / "optimized.onnx")
    products = [node for node in model.graph.node if node.op_type in INTEGER_PRODUCTS]
    assert len(products) == 1
    constants = {t.name: onnx.numpy_helper.to_array(t) for t in model.graph.initializer}
    # The codes of the input are made by a node; everything else is folded into constants.
    weights, *points = (constants[name] for name in products[0].input[1:] if name in constants)
    assert weights.dtype == np.uint8
    unsigned = [point for point in points if point.dtype == np.uint8]
    assert [int(point) for point in unsigned if point.size == 1] == [128, 128]
    assert not [t for t in constants.values() if t.dtype == np.int8]


@pytest.mark.parametrize("size", ["large", "small"])
def test_signed_form_would_saturate_and_the_unsigned_form_is_right(tmp_path, size):
    """The same codes through a model of both kernels: why the portable form exists."""
    rng = np.random.default_rng(4)
    spread = {"large": 127.0, "small": 30.0}[size]
    x = rng.choice(np.float32([-spread, spread * 0.9, spread]), (7, 256))
    weight = rng.choice(np.float32([-1, 0.9, 1]), (24, 256)) * np.float32(spread / 127)
    weight[:, 0] = 1  # so that a weight's code is 127 times its value
    recipe = layer_recipe("int8", 127.0)
    got, want = run_layer(tmp_path, x, weight, np.zeros(24, np.float32), recipe, "portable")
    w_codes = load_file(tmp_path / WEIGHTS_FILE)[f"{LAYER}.weight.int8"]
    x_codes = np.clip(np.rint(x), -128, 127).astype(np.int8)
    exact = x_codes.astype(np.int64) @ w_codes.astype(np.int64)
    x_unsigned, w_unsigned = x_codes.view(np.uint8) ^ 0x80, w_codes.view(np.uint8) ^ 0x80
    row, column = x_unsigned.sum(1, dtype=np.int64), w_unsigned.sum(0, dtype=np.int64)
    unsigned = u8_u8_product(x_unsigned, w_unsigned)
    unsigned = unsigned - 128 * row[:, None] - 128 * column + 256 * 128 * 128
    assert np.array_equal(unsigned, exact)
    signed = u8_s8_product(x_unsigned, w_codes) - 128 * w_codes.sum(0, dtype=np.int64)
    off = np.abs(signed - exact).max() / np.abs(exact).max()
    assert off > 0.2 if size == "large" else off == 0
    scale = np.float32(1 / 127)
    assert np.allclose(want, exact * scale, rtol=1e-5, atol=1e-3)
    assert np.allclose(got, exact * scale, rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize(
    ("machine", "flags", "wrong"),
    [
        ("x86_64", "fpu avx2 fma", True),
        ("x86_64", "avx2 avx512f avx512bw", True),
        ("x86_64", "avx2 avx512bw avx512_vnni", False),
        ("x86_64", "avx2 avx_vnni", False),
        ("aarch64", "", False),
    ],
)
def test_processors_that_saturate_are_known(machine, flags, wrong):
    assert saturates(machine, set(flags.split())) is wrong


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
    skip_where_native_int8_saturates(form, fmt)
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
