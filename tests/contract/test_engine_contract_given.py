"""The engine contract on bundles made elsewhere: on machines that have no torch to export with.

GWP_TEST_BUNDLES names a folder of them (scripts/make-test-bundles.sh), int8 among them, because
another processor rounds integer products' results with other kernels.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from engine_suite import EngineSuite

from gwp_edge.bundle import Bundle

FOLDER = os.environ.get("GWP_TEST_BUNDLES")
BUNDLES = sorted(Path(FOLDER).glob("*.gwp")) if FOLDER else []

pytestmark = pytest.mark.skipif(FOLDER is None, reason="GWP_TEST_BUNDLES names no folder")


@pytest.fixture(params=BUNDLES, ids=lambda p: p.stem)
def bundle(request) -> Bundle:
    return Bundle.open(request.param)


@pytest.fixture
def engine():
    from gwp_edge.engines.ort import OrtEngine

    return OrtEngine


class TestGivenBundleContract(EngineSuite):
    # ONNX Runtime is that reference; the golden outputs compare with the machine that exported.
    test_engine_agrees_with_the_reference_engine = None
