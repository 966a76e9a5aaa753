"""The engine contract on ONNX Runtime."""

from __future__ import annotations

import pytest
from engine_suite import EngineSuite

from gwp_edge.bundle import Bundle

pytestmark = pytest.mark.export


@pytest.fixture(params=[("gwp05", "fp32"), ("gwp0", "fp32"), ("gwp05", "bf16")], ids="-".join)
def bundle(request, exported) -> Bundle:
    family, precision = request.param
    return Bundle.open(exported(family, precision=precision))


@pytest.fixture
def engine_name() -> str:
    return "ort"


@pytest.fixture
def engine():
    from gwp_edge.engines.ort import OrtEngine

    return OrtEngine


class TestOrtContract(EngineSuite):
    pass
