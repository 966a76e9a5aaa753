"""What ``gwp-edge infer --json`` says of memory, beside the bytes of the weights."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from gwp_edge.commands.inference import memory_report
from gwp_edge.resident import Resident, read_resident

REFERENCE = Path(__file__).parents[1] / "data" / "reference" / "gwp05"
MIB = 1 << 20


def test_resident_memory_is_read_from_the_status(tmp_path):
    status = tmp_path / "status"
    status.write_text("Name:\tpython\nVmPeak:\t 999 kB\nVmHWM:\t    2048 kB\nVmRSS:\t    1024 kB\n")
    assert read_resident(status) == Resident(now_bytes=MIB, peak_bytes=2 * MIB)
    status.write_text("Name:\tkthread\n")
    assert read_resident(status) is None
    assert read_resident(tmp_path / "none") is None


def test_resident_memory_of_this_process_follows_what_it_holds():
    before = read_resident()
    if before is None:
        pytest.skip("this system has no /proc/self/status")
    # The kernel counts in batches of pages, so all figures are off by a little.
    held = bytearray(b"x") * (64 * MIB)
    after = read_resident()
    assert after.now_bytes - before.now_bytes > 60 * MIB
    del held
    released = read_resident()
    assert released.peak_bytes - released.now_bytes > 50 * MIB  # it remembers


def test_memory_report_relates_resident_memory_to_the_weights():
    before, loaded, after = (Resident(now_bytes=n, peak_bytes=9 * n) for n in (10, 100, 125))
    report = memory_report(100, before, loaded, after)
    assert report["resident_over_weights"] == 1.25
    assert (report["loaded_bytes"], report["after_chunk_bytes"]) == (100, 125)
    assert report["peak_bytes"] == 9 * 125
    unknown = memory_report(100, None, None, None)
    assert unknown.pop("weights_bytes") == 100
    assert set(unknown.values()) == {None}


@pytest.mark.export
def test_infer_says_what_memory_it_took(exported, tmp_path):
    """In a process of its own, as a user runs it: the peak is that of this command alone."""
    bundle = exported("gwp05")
    words = ["infer", bundle, "--observation", REFERENCE / "observation.npz", "--json"]
    words += ["--out", tmp_path / "actions.npy", "--threads", "1"]
    command = [sys.executable, "-m", "gwp_edge.cli", *map(str, words)]
    run = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
    memory = json.loads(run.stdout)["memory"]
    assert memory["weights_bytes"] == (bundle / "weights.safetensors").stat().st_size
    if memory["after_chunk_bytes"] is None:
        pytest.skip("this system has no /proc/self/status")
    assert memory["before_bytes"] + memory["weights_bytes"] / 2 < memory["loaded_bytes"]
    assert memory["loaded_bytes"] <= memory["peak_bytes"] + MIB
    assert memory["after_chunk_bytes"] <= memory["peak_bytes"] + MIB
    ratio = memory["after_chunk_bytes"] / memory["weights_bytes"]
    assert memory["resident_over_weights"] == pytest.approx(ratio)
