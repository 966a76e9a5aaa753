"""The unreduced network answers as the original does, and its attention is causal as claimed."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")

from small_networks import (  # noqa: E402
    FAMILIES,
    NETWORKS,
    REFERENCE,
    make_inputs,
    make_spec,
    network_weights,
    prompt_rows,
    reference_arrays,
    reference_statistics,
    relative,
    unreduced,
)

from gwp_edge.errors import SpecError  # noqa: E402
from gwp_edge.export.unreduced import causal_mask  # noqa: E402
from gwp_edge.export.unreduced_serving import (  # noqa: E402
    load_network,
    load_vae,
    pad_prompt,
    sample,
)

pytestmark = pytest.mark.export

# Measured: 1.5e-6 of the reference's scale; the rest is room for other BLAS libraries.
TOLERANCE = 1e-5


def _normalised_state(family, observation):
    stats = reference_statistics(family)
    low, high = stats["state_q01"], stats["state_q99"]
    state = np.zeros((1, 1, 32), np.float32)
    state[0, 0, :14] = 2 * (observation["state"] - low) / np.maximum(high - low, 1e-8) - 1
    return torch.from_numpy(state)


@pytest.mark.parametrize("family", FAMILIES)
def test_vae_reference_canvas_gives_reference_latent(family):
    _, expected = reference_arrays(family)
    vae = load_vae(REFERENCE / family / "base_model" / "vae")
    with torch.no_grad():
        latent = vae.encode(torch.from_numpy(expected["composite"])[None, None])
    assert np.abs(latent.numpy() - expected["latent"]).max() < TOLERANCE


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_sample_reference_inputs_give_reference_actions(family, cached):
    observation, expected = reference_arrays(family)
    network = load_network(REFERENCE / family / "checkpoint")
    with torch.no_grad():
        x, velocities, samples = sample(
            network,
            state=_normalised_state(family, observation),
            reference=torch.from_numpy(expected["latent"]),
            prompt=pad_prompt(torch.from_numpy(observation["prompt_embedding"])),
            noise=torch.from_numpy(expected["noise"]),
            timesteps=expected["timesteps"],
            sigmas=expected["sigmas"],
            cached=cached,
        )
    assert len(velocities) == 10
    for got, want in zip(velocities, expected["velocity"], strict=True):
        assert relative(got, want) < TOLERANCE
    for got, want in zip(samples, expected["sample"], strict=True):
        assert relative(got, want) < TOLERANCE
    stats = reference_statistics(family)
    low, span = stats["action_q01"], stats["action_q99"] - stats["action_q01"]
    action = (x[0, :, :14].double().numpy() + 1) / 2 * np.maximum(span, 1e-8) + low
    delta = np.array([i % 7 != 6 for i in range(14)])
    action += np.where(delta, observation["state"], 0.0)
    assert np.abs(action - expected["action"]).max() < TOLERANCE


def test_sample_prompt_not_padded_misses_reference():
    # The zero rows take part in attention: a network that trims them is another network.
    observation, expected = reference_arrays("gwp05")
    network = load_network(REFERENCE / "gwp05" / "checkpoint")
    with torch.no_grad():
        _, velocities, _ = sample(
            network,
            state=_normalised_state("gwp05", observation),
            reference=torch.from_numpy(expected["latent"]),
            prompt=torch.from_numpy(observation["prompt_embedding"])[None],
            noise=torch.from_numpy(expected["noise"]),
            timesteps=expected["timesteps"][:1],
            sigmas=expected["sigmas"][:2],
        )
    assert relative(velocities[0], expected["velocity"][0]) > 1e-3


def _joint(name, seed=0):
    sizes = NETWORKS[name]
    spec = make_spec(sizes)
    network = unreduced(sizes, network_weights(sizes))
    inputs = make_inputs(spec, seed)
    given = {
        "state": inputs.state[None],
        "reference": inputs.latent[:, :, None],
        "actions": inputs.noise[None],
        "action_timestep": torch.tensor([700.0]),
        "prompt": prompt_rows(sizes.text_dim)[None],
    }
    generator = torch.Generator().manual_seed(seed + 1)
    future = torch.randn(
        (1, *spec.latent_shape[1:2], 2, *spec.latent_shape[2:]), generator=generator
    )
    return network, spec, given, future


@pytest.mark.parametrize("name", NETWORKS)
def test_forward_with_future_gives_same_actions_as_without(name):
    network, _, given, future = _joint(name)
    alone, no_video = network(**given)
    joint, video = network(**given, future=future, future_timestep=torch.tensor([300.0]))
    other, _ = network(**given, future=future * 3 - 1, future_timestep=torch.tensor([900.0]))
    assert no_video is None
    assert video.shape == future.shape
    assert relative(joint, alone) < 1e-5
    assert relative(other, joint) < 1e-6


@pytest.mark.parametrize("name", ["mot", "dense"])
def test_forward_mask_open_to_future_changes_actions(name):
    network, spec, given, future = _joint(name)
    given |= {"future": future, "future_timestep": torch.tensor([300.0])}
    n_visual = spec.n_prefix - 1
    n = 1 + spec.n_rows + 3 * n_visual
    causal, _ = network(**given)
    opened, _ = network(**given, mask=torch.ones(n, n, dtype=torch.bool))
    assert relative(opened, causal) > 1e-2


@pytest.mark.parametrize("name", ["mot", "dense"])
def test_forward_video_depends_on_actions_and_on_its_own_time(name):
    network, _, given, future = _joint(name)
    t = torch.tensor([300.0])
    _, video = network(**given, future=future, future_timestep=t)
    _, later = network(**given, future=future, future_timestep=t + 400)
    _, acted = network(
        **{**given, "actions": given["actions"] + 1}, future=future, future_timestep=t
    )
    assert relative(later, video) > 1e-3
    assert relative(acted, video) > 1e-3


@pytest.mark.parametrize("name", ["mot", "dense"])
def test_forward_batch_equals_its_entries_one_by_one(name):
    first, second = _joint(name, seed=0), _joint(name, seed=5)
    network = first[0]
    t = torch.tensor([300.0])
    joined = {k: torch.cat([first[2][k], second[2][k]]) for k in first[2]}
    joined["action_timestep"] = torch.tensor([700.0, 100.0])
    futures = torch.cat([first[3], second[3]])
    actions, video = network(**joined, future=futures, future_timestep=torch.tensor([300.0, 300.0]))
    second[2]["action_timestep"] = torch.tensor([100.0])
    for i, (_, _, given, future) in enumerate((first, second)):
        one_actions, one_video = network(**given, future=future, future_timestep=t)
        assert relative(actions[i], one_actions[0]) < 1e-5
        assert relative(video[i], one_video[0]) < 1e-5


@pytest.mark.parametrize("name", ["mot", "dense"])
def test_forward_gradients_reach_every_tensor(name):
    network, _, given, future = _joint(name)
    network.requires_grad_(True)
    actions, video = network(**given, future=future, future_timestep=torch.tensor([300.0]))
    (actions.square().mean() + video.square().mean()).backward()
    dead = [n for n, p in network.named_parameters() if p.grad is None or not p.grad.any()]
    assert dead == []


def test_video_velocity_unpatches_as_patch_embedding_reads():
    """Each output of the head lands on the pixel that the same place of a patch came from."""
    sizes = NETWORKS["mot"]
    network = unreduced(sizes, network_weights(sizes))
    captured = {}
    network.proj_out.register_forward_hook(lambda _m, _a, out: captured.update(out=out))
    x, temb = torch.randn(1, 2 * 3 * 4, 96), torch.randn(1, 2 * 3 * 4, 96)
    video = network.video_velocity(x, temb, (1, 48, 2, 6, 8))
    token, (f, y, w) = captured["out"][0, 1 * 12 + 2 * 4 + 3], (1, 2 * 2, 3 * 2)
    # Within a token: row, column, then channel.
    assert torch.equal(video[0, :, f, y, w], token[:48])
    assert torch.equal(video[0, :, f, y, w + 1], token[48:96])
    assert torch.equal(video[0, :, f, y + 1, w], token[96:144])


def test_causal_mask_lets_each_group_see_itself_and_those_before():
    groups = torch.tensor([0, 1, 2])
    want = torch.tensor([[1, 0, 0], [1, 1, 0], [1, 1, 1]], dtype=torch.bool)
    assert torch.equal(causal_mask(groups, groups), want)


def test_vae_clip_first_latent_frame_is_the_first_frame_alone():
    vae = load_vae(REFERENCE / "gwp05" / "base_model" / "vae")
    clip = torch.randint(0, 256, (1, 5, 32, 64, 3), dtype=torch.uint8)
    with torch.no_grad():
        both, alone = vae.encode(clip), vae.encode(clip[:, :1])
    assert both.shape == (1, 48, 2, 2, 4)
    assert relative(both[:, :, :1], alone) < 1e-5


def test_forward_future_without_timestep_is_refused():
    network, _, given, future = _joint("mot")
    with pytest.raises(SpecError, match="future_timestep"):
        network(**given, future=future)


def test_forward_unknown_embodiment_is_refused():
    network, _, given, _ = _joint("mot")
    with pytest.raises(SpecError, match="embodiment 2"):
        network(**given, embodiment=2)


@pytest.mark.parametrize("shape", [(0, 64), (65, 64), (64,)])
def test_pad_prompt_wrong_shape_is_refused(shape):
    with pytest.raises(SpecError, match="1 to 64 rows"):
        pad_prompt(torch.zeros(shape))
