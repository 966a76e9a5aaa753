"""The eager baseline runs the whole network on the very input that the engine answered."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")

import small_networks  # noqa: E402, F401 - one thread for small tensors

from gwp_edge.bench import random_input, run_chunk  # noqa: E402
from gwp_edge.engines import create_engine  # noqa: E402
from gwp_edge.errors import SpecError  # noqa: E402
from gwp_edge.export import baseline  # noqa: E402
from gwp_edge.export.unreduced_blocks import TimeEmbedder  # noqa: E402

pytestmark = pytest.mark.export


@pytest.fixture(scope="module", params=["gwp05-tiny", "gwp0-tiny"])
def answered(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("bench")
    bundle = baseline.make_random_bundle(folder, request.param, precision="fp32", n_steps=3)
    given = random_input(bundle.spec, np.random.default_rng(0))
    engine = create_engine("ort", bundle, threads=1)
    engine.set_prompt(bundle.spec.tasks[0])
    actions, _ = run_chunk(engine, bundle.spec, given)
    engine.close()
    policy = baseline.EagerPolicy.load(folder / request.param)
    return request.param, folder, bundle, given, actions, policy


def test_time_eager_answers_as_the_engine_and_counts_its_stages(answered):
    size, _, bundle, given, actions, policy = answered
    report = baseline.time_eager(
        policy,
        bundle.spec,
        given,
        threads=1,
        repeats=2,
        engine_p50_ms=1.0,
        engine_actions=actions,
    )
    assert report.largest_difference < 1e-5
    assert report.chunk.n == 2
    assert report.ratio == pytest.approx(1.0 / report.chunk.p50_ms)
    counts = {stage: times.n for stage, times in report.stages.items()}
    want = {"vision": 2, "denoise": 6}
    assert counts == (want if size == "gwp0-tiny" else {**want, "prefix": 2})


def test_time_eager_other_answer_is_told(answered):
    _, _, bundle, given, actions, policy = answered
    report = baseline.time_eager(
        policy,
        bundle.spec,
        given,
        threads=1,
        repeats=1,
        engine_p50_ms=1.0,
        engine_actions=actions + 0.1,
    )
    assert report.largest_difference > 1e-2


def test_eager_policy_saves_nothing_away(answered, monkeypatch):
    """Time embedders run for every token of every call, the dense family for all tokens."""
    size, _, bundle, given, _, policy = answered
    tokens = []
    forward = TimeEmbedder.forward

    def counted(self, timestep):
        tokens.append(timestep.numel())
        return forward(self, timestep)

    monkeypatch.setattr(TimeEmbedder, "forward", counted)
    policy.run(bundle.spec, given)
    H, n_visual = bundle.spec.n_rows, bundle.spec.n_prefix - 1
    if size == "gwp0-tiny":
        assert tokens == [1 + n_visual + H] * 3
    else:
        assert tokens == [1, n_visual, H, H, H]


def test_make_random_bundle_uses_again_what_is_there(answered):
    size, folder, bundle, *_ = answered
    before = (folder / f"{size}-fp32-3.gwp" / "manifest.json").stat().st_mtime_ns
    again = baseline.make_random_bundle(folder, size, precision="fp32", n_steps=3)
    assert again.manifest == bundle.manifest
    assert (folder / f"{size}-fp32-3.gwp" / "manifest.json").stat().st_mtime_ns == before


def test_make_checkpoint_unknown_size_is_refused(tmp_path):
    with pytest.raises(SpecError, match="--size gwp9 is not known"):
        baseline.make_checkpoint(tmp_path / "x", "gwp9")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"size": "gwp9"}, "--size gwp9 is not known"),
        ({"precision": "x"}, "--precision x is not known"),
        ({"precision": "int8"}, "--precision int8: random weights have no episodes"),
        ({"n_steps": 0}, "--steps must be 1 to 1000, got 0"),
    ],
)
def test_make_random_bundle_of_what_cannot_be_makes_no_checkpoint(tmp_path, changes, message):
    """Gigabytes of random weights were written before the export said so."""
    options = {"size": "gwp05-tiny", "precision": "fp32", "n_steps": 3, **changes}
    with pytest.raises(SpecError, match=message):
        baseline.make_random_bundle(tmp_path, **options)
    assert list(tmp_path.iterdir()) == []


def test_time_eager_without_repeats_is_refused(answered):
    _, _, bundle, given, actions, policy = answered
    with pytest.raises(SpecError, match="at least 1"):
        baseline.time_eager(
            policy,
            bundle.spec,
            given,
            threads=1,
            repeats=0,
            engine_p50_ms=1.0,
            engine_actions=actions,
        )
