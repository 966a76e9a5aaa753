"""Fixtures of the unit tests."""

import pytest
from run_rig import Run

from gwp_edge.shared_memory import SHM_DIR, unique_name


@pytest.fixture
def a_run(tmp_path, monkeypatch):
    """A run, after which nothing that it made is left in shared memory."""
    names = []

    def record(label):
        names.append(unique_name(label))
        return names[-1]

    monkeypatch.setattr("gwp_edge.mailbox.unique_name", record)
    monkeypatch.setattr("gwp_edge.drivers.kinematic.unique_name", record)
    yield Run(tmp_path)
    assert len(names) >= 2
    assert [n for n in names if (SHM_DIR / n).exists()] == []
