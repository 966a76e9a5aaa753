"""Deploy GigaWorld-Policy checkpoints on robots.

::

    policy = gwp_edge.load("policy.gwp")
    chunk = policy.predict(observation)
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gwp_edge.bundle import Bundle
    from gwp_edge.errors import GwpError
    from gwp_edge.policy import BundlePolicy, load
    from gwp_edge.spec import PolicySpec
    from gwp_edge.types import Chunk, Frame, Observation

__version__ = "0.1.0"
__all__ = [
    "Bundle",
    "BundlePolicy",
    "Chunk",
    "Frame",
    "GwpError",
    "Observation",
    "PolicySpec",
    "load",
]

# Resolved on first use, so that importing the package costs nothing.
_HOMES = {
    "Bundle": "gwp_edge.bundle",
    "BundlePolicy": "gwp_edge.policy",
    "Chunk": "gwp_edge.types",
    "Frame": "gwp_edge.types",
    "GwpError": "gwp_edge.errors",
    "Observation": "gwp_edge.types",
    "PolicySpec": "gwp_edge.spec",
    "load": "gwp_edge.policy",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
