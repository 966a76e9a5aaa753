"""The engine contract on TensorRT; needs a GPU: pytest -m gpu. Not yet run on hardware.

Engines are built here, so this takes minutes.
"""

from __future__ import annotations

import pytest

pytest.importorskip("pycuda", reason="needs PyCUDA and a GPU")

from engine_suite import ChunkSuite, EngineSuite

from gwp_edge.bundle import Bundle
from gwp_edge.errors import GwpError

pytestmark = [pytest.mark.gpu, pytest.mark.export]


def _why_not() -> str | None:
    from gwp_edge.engines.trt_device import PrimaryContext

    try:
        PrimaryContext().close()
    except GwpError as e:
        return str(e)
    return None


@pytest.fixture(scope="session")
def gpu() -> None:
    reason = _why_not()
    if reason is not None:
        pytest.skip(reason)


@pytest.fixture(params=[("gwp05", "fp32"), ("gwp0", "fp32"), ("gwp05", "fp16")], ids="-".join)
def bundle(request, gpu, exported) -> Bundle:
    from gwp_edge.engines.trt_build import build_engines
    from gwp_edge.engines.trt_cache import list_engines

    family, precision = request.param
    found = Bundle.open(exported(family, precision=precision))
    if not list_engines(found.root):
        build_engines(found, BuildOptions(level=1))
    return found


@pytest.fixture
def engine_name() -> str:
    return "trt"


@pytest.fixture
def engine():
    from gwp_edge.engines.trt import TrtEngine
    from gwp_edge.engines.trt_options import BuildOptions

    return lambda bundle: TrtEngine(bundle, options=BuildOptions(level=1))


class TestTrtContract(EngineSuite, ChunkSuite):
    pass
