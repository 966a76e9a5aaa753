"""What action-only inference leaves out changes nothing: each saving against the whole network."""

from __future__ import annotations

import math

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")

from small_networks import (  # noqa: E402
    NETWORKS,
    ReducedPath,
    make_inputs,
    make_spec,
    network_weights,
    relative,
    scrambled,
    unreduced,
    vae_config,
    vae_weights,
)

from gwp_edge.errors import SpecError  # noqa: E402
from gwp_edge.export import tables  # noqa: E402
from gwp_edge.export.accounting import unused_tensors  # noqa: E402
from gwp_edge.export.network import (  # noqa: E402
    ActionPath,
    KeyValue,
    action_angles,
    action_stream,
    split_half_order,
    streams,
    visual_angles,
)
from gwp_edge.export.torch_ops import TorchOps  # noqa: E402
from gwp_edge.export.unreduced_blocks import attend, line_angles, rotary_angles, rotate  # noqa: E402
from gwp_edge.export.unreduced_serving import WanVae, make_vae, sample  # noqa: E402
from gwp_edge.export.vision_encoder import VaeConfig, VisionEncoder  # noqa: E402
from gwp_edge.sampler import make_schedule  # noqa: E402

pytestmark = pytest.mark.export

# Float32 with sums in another order: a few units in the sixth digit of the largest value.
TOLERANCE = 1e-5


# -- vision: 2-D convolutions with the last temporal tap, temporal down-sampling skipped ---------

VAES = {
    "wan22": {},
    "wider": {"base_dim": 24},
    "temporal_all": {"temperal_downsample": [True, True, True]},
    "temporal_none": {"temperal_downsample": [False, False, False], "dim_mult": [1, 1, 1, 1]},
    "temporal_first": {"temperal_downsample": [True, False, False], "dim_mult": [2, 2, 2, 1]},
    "one_block": {"num_res_blocks": 1},
    "other_latent": {"base_dim": 6, "z_dim": 16, "num_res_blocks": 3},
    "patch_4": {
        "patch_size": 4,
        "in_channels": 48,
        "out_channels": 48,
        "dim_mult": [1, 2, 2],
        "temperal_downsample": [True, True],
    },
}


def _vae_pair(changes, seed=0):
    z_dim = int(changes.get("z_dim", 48))
    config = vae_config(**{"z_dim": z_dim, **changes})
    weights = vae_weights(config, seed)
    model = make_vae(config)
    model.load_state_dict(weights.state_dict(), strict=True)
    return config, weights, model.requires_grad_(False)


def _canvas(height=64, width=96, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (height, width, 3), dtype=torch.uint8, generator=generator)


@pytest.mark.parametrize("name", VAES)
def test_vision_2d_encoder_equals_3d_vae(name):
    config, weights, model = _vae_pair(VAES[name])
    canvas = _canvas()
    want = WanVae(model).encode(canvas[None, None])
    got = VisionEncoder(TorchOps(weights), VaeConfig.from_json(config)).encode(canvas, 64, 96)
    assert relative(got, want[:, :, 0]) < TOLERANCE
    assert not any("time_conv" in n or "decoder" in n or "post_" in n for n in weights.read)


def test_vae_single_frame_reads_only_last_taps():
    """Scramble what the 2-D encoder drops: taps, temporal convolutions, the log-variance half."""
    _, weights, model = _vae_pair({})
    canvas = _canvas()[None, None]
    want = WanVae(model).encode(canvas)
    tensors = weights.state_dict()
    for name, tensor in tensors.items():
        if "time_conv" in name or name.startswith(("decoder", "post_quant")):
            tensor.normal_()
        elif tensor.ndim == 5 and tensor.shape[2] > 1:
            tensor[:, :, :-1].normal_()
    tensors["quant_conv.weight"][48:].normal_()
    tensors["quant_conv.bias"][48:].normal_()
    model.load_state_dict(tensors, strict=True)
    assert relative(WanVae(model).encode(canvas), want) < 1e-6
    # And the last taps do matter, or the test above would prove nothing.
    tensors["encoder.down_blocks.0.resnets.0.conv1.weight"][:, :, -1].normal_()
    model.load_state_dict(tensors, strict=True)
    assert relative(WanVae(model).encode(canvas), want) > 1e-3


def test_vision_encoder_shape_that_cannot_be_2d_is_refused():
    config, weights, _ = _vae_pair({"temperal_downsample": [False, False, False]})
    with pytest.raises(SpecError, match="part of a square"):
        VisionEncoder(TorchOps(weights), VaeConfig.from_json(config)).encode(_canvas(), 64, 96)


# -- weights that actions never see ---------------------------------------------------------------


def _given(spec, seed=0):
    inputs = make_inputs(spec, seed)
    return inputs, {
        "state": inputs.state[None],
        "reference": inputs.latent[:, :, None],
        "prompt": inputs.prompt[None],
        "noise": inputs.noise[None],
        "timesteps": spec.sampler.timesteps,
        "sigmas": spec.sampler.sigmas,
        "embodiment": spec.embodiment,
    }


@pytest.mark.parametrize("name", NETWORKS)
def test_unused_tensors_scrambled_leave_actions_as_they_are(name):
    """The video head, and in the last block all of the prefix stream after its K/V."""
    sizes = NETWORKS[name]
    network, (_, given) = unreduced(sizes, network_weights(sizes)), _given(make_spec(sizes))
    unused = unused_tensors(sizes)
    want, *_ = sample(network, **given)
    got, *_ = sample(scrambled(network, list(unused)), **given)
    assert torch.equal(got, want)


@pytest.mark.parametrize("name", NETWORKS)
def test_gradient_of_actions_reaches_exactly_the_used_tensors(name):
    """So that the list of unused tensors is neither too long nor too short."""
    sizes = NETWORKS[name]
    network = unreduced(sizes, network_weights(sizes)).requires_grad_(True)
    _, given = _given(make_spec(sizes))
    given |= {"timesteps": given["timesteps"][:1], "sigmas": given["sigmas"][:2]}
    sample(network, **given)[0].square().sum().backward()
    moved = {n for n, p in network.named_parameters() if p.grad is not None and p.grad.any()}
    assert moved == set(network.state_dict()) - set(unused_tensors(sizes))


@pytest.mark.parametrize("name", NETWORKS)
def test_reduced_path_reads_exactly_the_used_tensors(name):
    sizes = NETWORKS[name]
    weights, spec = network_weights(sizes), make_spec(sizes)
    ReducedPath(weights, spec, make_inputs(spec)).velocity(make_inputs(spec).noise, 0)
    # A network of one block has no use for most of the visual stream's modulation table, but the
    # tables are cut from whole tensors.
    assert weights.read == set(weights.shapes) - set(unused_tensors(sizes))


@pytest.mark.parametrize("name", [n for n in NETWORKS if NETWORKS[n].n_embodiments > 1])
def test_other_embodiments_scrambled_leave_actions_as_they_are(name):
    sizes = NETWORKS[name]
    weights, spec = network_weights(sizes), make_spec(sizes, embodiment=1)
    inputs, given = _given(spec)
    network = unreduced(sizes, weights)
    want, *_ = sample(network, **given)
    tensors = {n: t.clone() for n, t in network.state_dict().items()}
    for tensor in ("action_encoder.in_proj", "action_decoder.out_proj"):
        for part in ("weight", "bias"):
            tensors[f"{tensor}.{part}"][0].normal_()
    network.load_state_dict(tensors)
    assert torch.equal(sample(network, **given)[0], want)
    assert relative(ReducedPath(weights, spec, inputs).sample()[1][-1], want[0]) < TOLERANCE
    other = ReducedPath(weights, make_spec(sizes, embodiment=0), inputs)
    assert relative(other.sample()[1][-1], want[0]) > 1e-2


# -- tables in place of time embedders ------------------------------------------------------------


@pytest.mark.parametrize("rounding", ["bfloat16", "exact"])
@pytest.mark.parametrize("name", ["mot", "mot_odd", "dense"])
def test_denoise_tables_equal_time_embedders_per_token(name, rounding):
    sizes = NETWORKS[name]
    spec = make_spec(sizes, sampler=make_schedule(10, rounding=rounding))
    weights = network_weights(sizes)
    network = unreduced(sizes, weights)
    rows = tables.denoise_rows(weights, spec)
    two = sizes.family == "gwp-0.5"
    embedder = network.action_condition_embedder if two else network.condition_embedder
    head = network.action_scale_shift_table if two else network.scale_shift_table
    one = torch.tensor([0, 1, 0, 0, 1, 0])[:, None]
    for step, t in enumerate(spec.sampler.timesteps):
        temb, projected = embedder(torch.full((1, spec.n_rows), t))
        for token in (0, spec.n_rows - 1):
            for i in range(sizes.n_layers):
                table = network._expert(i, "action" if two else "all").scale_shift_table
                want = table[0] + projected[0, token] + one
                assert relative(rows[step, 6 * i : 6 * i + 6], want) < TOLERANCE
            want = head[0] + temb[0, token] + torch.tensor([[0.0], [1.0]])
            assert relative(rows[step, -2:], want) < TOLERANCE


@pytest.mark.parametrize("name", ["mot", "dense"])
def test_prefix_tables_equal_time_embedders_at_zero(name):
    sizes = NETWORKS[name]
    weights, spec = network_weights(sizes), make_spec(sizes)
    network = unreduced(sizes, weights)
    one = torch.tensor([0, 1, 0, 0, 1, 0])[:, None]
    for stream in streams(spec.network):
        action = stream.name == "action"
        embedder = network.action_condition_embedder if action else network.condition_embedder
        _, projected = embedder(torch.zeros(1, spec.n_prefix))
        rows = tables.prefix_rows(weights, spec, stream)
        for i in range(sizes.n_layers):
            want = network._expert(i, stream.name).scale_shift_table[0] + projected[0, -1] + one
            assert relative(rows[i], want) < TOLERANCE


def test_denoise_tables_rounded_time_is_another_table():
    # Rounding t to bfloat16 is not a detail: it moves the modulation by far more than the noise
    # of the arithmetic.
    sizes = NETWORKS["mot"]
    weights = network_weights(sizes)
    a, b = (
        tables.denoise_rows(weights, make_spec(sizes, sampler=make_schedule(10, rounding=r)))
        for r in ("bfloat16", "exact")
    )
    assert relative(a[0], b[0]) == 0.0  # t = 1000 is exact in bfloat16
    assert relative(a[1], b[1]) > 1e-2


# -- rotary pairs as halves, logits joined in place of keys and values ----------------------------


@pytest.mark.parametrize("name", ["mot", "mot_odd", "dense_one_layer"])
def test_rotation_in_halves_keeps_every_dot_product(name):
    sizes = NETWORKS[name]
    spec = make_spec(sizes)
    path = ActionPath(TorchOps(network_weights(sizes)), spec)
    h, w = spec.canvas.height_px // 32, spec.canvas.width_px // 32
    n, heads, d = h * w, sizes.n_heads, sizes.head_dim
    order = split_half_order(spec.network)
    q, k = torch.randn(2, spec.n_rows, heads * d), torch.randn(2, n, heads * d)
    grid = torch.cartesian_prod(torch.arange(1), torch.arange(h), torch.arange(w))
    lines = line_angles(torch.arange(1, spec.n_rows + 1), d)
    whole_q = rotate(q.reshape(2, -1, heads, d), lines)
    whole_k = rotate(k.reshape(2, n, heads, d), rotary_angles(grid, d))
    want = torch.einsum("bqhd,bkhd->bhqk", whole_q, whole_k)
    half_q = path._rotate(
        q[0][:, order], spec.n_rows, action_angles(spec.network, spec.n_rows), "a"
    )
    half_k = path._rotate(k[0][:, order], n, visual_angles(spec.network, h, w), "v")
    got = path._heads(half_q, spec.n_rows) @ path._keys(half_k, n)
    assert relative(got, want[0]) < TOLERANCE


def test_attention_with_joined_logits_equals_joined_keys_and_values():
    sizes = NETWORKS["mot"]
    path = ActionPath(TorchOps(network_weights(sizes)), make_spec(sizes))
    heads, d, n_q, counts = sizes.n_heads, sizes.head_dim, 5, [7, 1, 4]
    q = torch.randn(1, n_q, heads, d)
    k, v = torch.randn(1, sum(counts), heads, d), torch.randn(1, sum(counts), heads, d)
    parts = [
        KeyValue(k=ki[0].permute(1, 2, 0), v=vi[0].transpose(0, 1))
        for ki, vi in zip(k.split(counts, 1), v.split(counts, 1), strict=True)
    ]
    got = path._attend(q[0].transpose(0, 1) / math.sqrt(d), parts, counts, "test")
    assert relative(got, attend(q, k, v)[0].transpose(0, 1)) < TOLERANCE


# -- the whole path -------------------------------------------------------------------------------


@pytest.mark.parametrize("rounding", ["bfloat16", "exact"])
@pytest.mark.parametrize("name", NETWORKS)
def test_reduced_path_equals_unreduced_network(name, rounding):
    sizes = NETWORKS[name]
    weights = network_weights(sizes)
    spec = make_spec(sizes, sampler=make_schedule(4, rounding=rounding))
    inputs, given = _given(spec)
    with torch.no_grad():
        _, want_v, want_x = sample(unreduced(sizes, weights), **given)
        got_v, got_x = ReducedPath(weights, spec, inputs).sample()
    for got, want in zip([*got_v, *got_x], [*want_v, *want_x], strict=True):
        assert relative(got, want[0]) < TOLERANCE


@pytest.mark.parametrize(
    ("n_rows", "width_px", "height_px"), [(1, 32, 32), (48, 320, 384), (7, 160, 32)]
)
@pytest.mark.parametrize("name", ["mot", "dense"])
def test_reduced_path_other_canvases_and_rows_equal_unreduced(name, n_rows, width_px, height_px):
    sizes = NETWORKS[name]
    weights = network_weights(sizes, seed=3)
    spec = make_spec(sizes, n_rows=n_rows, width_px=width_px, height_px=height_px)
    inputs, given = _given(spec, seed=3)
    with torch.no_grad():
        want, *_ = sample(unreduced(sizes, weights), **given)
        _, got = ReducedPath(weights, spec, inputs).sample()
    assert relative(got[-1], want[0]) < TOLERANCE


@pytest.mark.parametrize("name", ["mot", "dense"])
def test_prompt_k_v_hoisted_equal_those_of_every_call(name):
    sizes = NETWORKS[name]
    weights, spec = network_weights(sizes), make_spec(sizes, n_text_rows=12)
    inputs = make_inputs(spec)
    network, reduced = unreduced(sizes, weights), ReducedPath(weights, spec, inputs)
    for stream in streams(spec.network):
        action = stream.name == "action"
        embedder = network.action_condition_embedder if action else network.condition_embedder
        text = embedder.text_embedder(inputs.prompt[None])
        everywhere = stream == action_stream(spec.network)
        assert len(reduced.prompt[stream.name]) == sizes.n_layers - (not everywhere)
        for i, kv in enumerate(reduced.prompt[stream.name]):
            attention = network._expert(i, stream.name).attn2
            k, v = attention.keys(text)[0, :12], attention.values(text)[0, :12]
            assert relative(kv.k.permute(2, 0, 1), k) < TOLERANCE
            assert relative(kv.v.transpose(0, 1), v) < TOLERANCE
    assert np.array_equal(reduced.bias, [0.0] * 11 + [np.float32(math.log(53))])
