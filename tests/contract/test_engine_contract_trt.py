"""The engine contract on TensorRT; needs a GPU: pytest -m gpu. Not yet run on hardware.

Engines are built here, so this takes minutes. Without torch to export with, GWP_TEST_BUNDLES names
a folder of bundles made elsewhere (scripts/make-test-bundles.sh).
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

pytest.importorskip("pycuda", reason="needs PyCUDA and a GPU")

from engine_suite import TOLERANCE, ChunkSuite, EngineSuite

from gwp_edge.bundle import Bundle
from gwp_edge.errors import GwpError

pytestmark = [pytest.mark.gpu]

DATASET = Path(__file__).resolve().parents[1] / "data" / "dataset"
# Random weights: their quantization error is no matter here, agreement with the reference is.
QUANTIZED = {
    "calibration": DATASET,
    "samples": 8,
    "observer": "minmax",
    "smoothing": False,
    "rest": "fp16",
    "max_error_rad": None,
    "max_error_m": None,
}
EXPORTED = [
    ("gwp05", "fp32", {}),
    ("gwp0", "fp32", {}),
    ("gwp05", "fp16", {}),
    ("gwp05", "int8", QUANTIZED),
    ("gwp0", "int8", QUANTIZED),
    ("gwp05", "fp8", QUANTIZED),
    # TensorRT takes whole int4 blocks only, so the target decides which layers have them.
    ("gwp05", "w4", {**QUANTIZED, "target": "orin"}),
]
FOLDER = os.environ.get("GWP_TEST_BUNDLES")
CASES = sorted(Path(FOLDER).glob("*.gwp")) if FOLDER else EXPORTED
_FP8_SINCE = (8, 9)


def _name(case) -> str:
    return case.stem if isinstance(case, Path) else "-".join(case[:2])


@pytest.fixture(scope="session")
def capability() -> tuple[int, int]:
    from gwp_edge.engines.trt_device import PrimaryContext

    try:
        context = PrimaryContext()
    except GwpError as e:
        pytest.skip(str(e))
    try:
        return context.facts().capability
    finally:
        context.close()


@pytest.fixture(scope="session")
def built() -> set[Path]:
    """Return bundles whose engines were built in this session, by these sources."""
    return set()


@pytest.fixture(params=CASES, ids=_name)
def bundle(request, capability, built) -> Bundle:
    from gwp_edge.engines.trt_build import build_engines
    from gwp_edge.engines.trt_options import BuildOptions

    if isinstance(request.param, Path):
        found = Bundle.open(request.param)
    else:
        family, precision, options = request.param
        export = request.getfixturevalue("exported")
        found = Bundle.open(export(family, precision=precision, **options))
    precision = found.manifest.precision.name
    if ("trt", precision) not in TOLERANCE:
        pytest.skip(f"{precision} is not for TensorRT")
    if precision == "fp8" and capability < _FP8_SINCE:
        pytest.skip("this GPU has no fp8 units")
    if found.root not in built:
        build_engines(found, BuildOptions(level=1))
        built.add(found.root)
    return found


@pytest.fixture
def engine_name() -> str:
    return "trt"


@pytest.fixture
def engine():
    from gwp_edge.engines.trt import TrtEngine

    return TrtEngine


class TestTrtContract(EngineSuite, ChunkSuite):
    pass
