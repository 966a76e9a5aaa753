"""Fixtures that several parity tests share."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

REACH = Path(__file__).resolve().parents[2] / "examples" / "reach"


@pytest.fixture(scope="session")
def reach_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The example's shipped policy, exported in float32."""
    pytest.importorskip("torch")
    pytest.importorskip("mujoco")
    from gwp_edge.export.pipeline import ExportOptions, export_bundle

    out = tmp_path_factory.mktemp("reach") / "policy.gwp"
    options = ExportOptions(
        checkpoint=REACH / "policy" / "checkpoint", out=out, layout=REACH / "layout.json"
    )
    return export_bundle(options).bundle.root


@pytest.fixture
def reach_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a test import the example's modules by name."""
    pytest.importorskip("diffusers")
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    monkeypatch.syspath_prepend(str(REACH))
