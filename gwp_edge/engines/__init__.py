"""Engines that run the graphs of a bundle."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from gwp_edge.errors import SpecError

if TYPE_CHECKING:
    from gwp_edge.bundle import Bundle
    from gwp_edge.protocols import Engine

ENGINES = {
    "ort": "gwp_edge.engines.ort:OrtEngine",
    "trt": "gwp_edge.engines.trt:open_engine",
}


def create_engine(
    name: str,
    bundle: Bundle,
    *,
    provider: str = "cpu",
    threads: int | None = None,
    weights: str = "packed",
) -> Engine:
    """Return an engine for ``bundle``; its library is imported only now.

    Raises:
        SpecError: no engine has that name.
    """
    if name not in ENGINES:
        raise SpecError(f"--engine {name} is not known; choose from {', '.join(ENGINES)}")
    module, _, attribute = ENGINES[name].partition(":")
    factory = getattr(importlib.import_module(module), attribute)
    engine: Engine = factory(bundle, provider=provider, threads=threads, weights=weights)
    return engine
