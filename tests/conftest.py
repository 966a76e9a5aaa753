"""Settings and fixtures for every test."""

from __future__ import annotations

import os
import signal
from pathlib import Path

# Small networks on few cores: threads that spin while they wait only steal time from each other.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import pytest
from hypothesis import HealthCheck, settings

REFERENCE = Path(__file__).resolve().parent / "data" / "reference"

# A busy or emulated machine may take any time for an example, so time never decides.
settings.register_profile("gwp", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("gwp")


@pytest.fixture(autouse=True)
def _ordinary_scheduling():
    """No test makes the test process itself real-time: that would time all tests after it.

    Compared, not fixed: whoever starts the tests may have a policy of their own.
    """
    before = os.sched_getscheduler(0), os.sched_getaffinity(0)
    parameters = os.sched_getparam(0)
    yield
    after = os.sched_getscheduler(0), os.sched_getaffinity(0)
    if after != before:
        # The tests that follow are none the worse: a real-time burner would stop the machine.
        os.sched_setscheduler(0, before[0], parameters)
        os.sched_setaffinity(0, before[1])
    assert after == before


@pytest.fixture(autouse=True)
def _signals_as_before():
    """A command is a program's main function: it decides what signals do."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.getsignal(number) for number in numbers}
    yield
    for number, handler in before.items():
        if signal.getsignal(number) is not handler:
            signal.signal(number, handler)


@pytest.fixture(params=["gwp05", "gwp0"])
def family(request) -> str:
    """Name of a folder under tests/data/reference."""
    return request.param


@pytest.fixture
def reference(family) -> dict[str, np.ndarray]:
    """What the original answers (expected.npz), and its input as ``observation.NAME``."""
    folder = REFERENCE / family
    arrays = dict(np.load(folder / "expected.npz"))
    observation = np.load(folder / "observation.npz")
    return arrays | {f"observation.{name}": observation[name] for name in observation.files}


@pytest.fixture(scope="session")
def exported(tmp_path_factory):
    """Return a function that exports a reference checkpoint, once per set of options."""
    pytest.importorskip("torch")
    from gwp_edge.export.pipeline import ExportOptions, export_bundle

    folder = tmp_path_factory.mktemp("exported")
    done: dict[tuple, Path] = {}

    def export(family: str, **options) -> Path:
        key = (family, *sorted(options.items()))
        if key not in done:
            out = folder / f"{len(done)}-{family}.gwp"
            checkpoint = REFERENCE / family / "checkpoint"
            export_bundle(ExportOptions(checkpoint=checkpoint, out=out, **options))
            done[key] = out
        return done[key]

    return export
