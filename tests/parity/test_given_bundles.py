"""Bundles made elsewhere, on this machine's runtime alone: no torch, another CPU, another Python.

GWP_TEST_BUNDLES names a folder of them (scripts/make-test-bundles.sh). Each bundle carries its own
golden output; those named ``FAMILY-exact`` are compared with the original implementation too.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

import gwp_edge
from gwp_edge.errors import BuildError
from gwp_edge.types import Frame, Observation

REFERENCE = Path(__file__).resolve().parents[1] / "data" / "reference"
FOLDER = os.environ.get("GWP_TEST_BUNDLES")
BUNDLES = sorted(Path(FOLDER).glob("*.gwp")) if FOLDER else []

pytestmark = pytest.mark.skipif(FOLDER is None, reason="GWP_TEST_BUNDLES names no folder")


def reference_of(bundle: Path):
    folder = REFERENCE / bundle.stem.split("-")[0]
    return np.load(folder / "observation.npz"), np.load(folder / "expected.npz")


def observation_of(arrays) -> Observation:
    frames = tuple(
        Frame(camera=name, image=arrays[name], t_captured_ns=1, t_received_ns=1, frame_idx=0)
        for name in ("cam_high", "cam_left_wrist", "cam_right_wrist")
    )
    return Observation(frames=frames, state=arrays["state"], t_state_ns=1)


def test_given_folder_holds_bundles():
    assert BUNDLES, f"GWP_TEST_BUNDLES={FOLDER} holds no *.gwp"


@pytest.mark.parametrize("bundle", BUNDLES, ids=lambda p: p.stem)
def test_bundle_on_this_machine_reproduces_its_golden_output(bundle):
    policy = gwp_edge.load(bundle, threads=2, check_golden=False)
    try:
        policy.check_golden()
    finally:
        policy.close()


@pytest.mark.parametrize("bundle", BUNDLES, ids=lambda p: p.stem)
def test_bundle_with_other_noise_does_not_reproduce_the_original(bundle):
    """The comparison below must be able to fail: another seed gives another plan."""
    arrays, expected = reference_of(bundle)
    noise = np.roll(expected["noise"], 1, axis=1)
    policy = gwp_edge.load(bundle, threads=2)
    try:
        chunk = policy.predict(observation_of(arrays), noise=noise)
    finally:
        policy.close()
    assert np.abs(chunk.actions - expected["action"]).max() > 1e-2


@pytest.mark.parametrize(
    "bundle", [b for b in BUNDLES if b.stem.endswith("-exact")], ids=lambda p: p.stem
)
def test_exact_bundle_answers_as_the_original_implementation(bundle):
    arrays, expected = reference_of(bundle)
    policy = gwp_edge.load(bundle, threads=2)
    try:
        chunk = policy.predict(observation_of(arrays), noise=expected["noise"])
    finally:
        policy.close()
    # float32 all the way: 2e-4 rad (m) is what the project promises for the final action.
    assert np.abs(chunk.actions - expected["action"]).max() <= 2e-4


@pytest.mark.parametrize("bundle", BUNDLES[:1], ids=lambda p: p.stem)
def test_bundle_whose_engine_answers_wrongly_is_refused(bundle, monkeypatch):
    from gwp_edge.engines import ort

    real = ort.OrtEngine.denoise
    monkeypatch.setattr(
        ort.OrtEngine, "denoise", lambda self, x, *rest: real(self, x, *rest) + np.float32(0.05)
    )
    with pytest.raises(BuildError, match="golden"):
        gwp_edge.load(bundle, threads=2)
