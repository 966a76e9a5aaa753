"""The loop benchmark measures what it says; how fast this machine is, is not tested."""

import json
import shutil
import subprocess
import sys

import pytest

from gwp_edge.bench_loop import _bare_loop, kill_to_hold_ns, measure_loop
from gwp_edge.errors import SpecError


def late_of(command, *, n, period_ns):
    arguments = [*command, str(n), str(period_ns), "0"]
    told = json.loads(subprocess.run(arguments, capture_output=True, check=True).stdout)
    assert told["fifo"] is False
    return told["late_ns"]


@pytest.mark.skipif(shutil.which("gcc") is None, reason="no C compiler")
def test_bare_loop_in_c_reports_every_wake_up(tmp_path):
    late_ns = late_of(_bare_loop(tmp_path), n=50, period_ns=2_000_000)
    assert len(late_ns) == 50
    assert min(late_ns) >= 0


def test_bare_loop_without_a_compiler_is_python(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda _: None)
    command = _bare_loop(tmp_path)
    assert command[0] == sys.executable
    late_ns = late_of(command, n=50, period_ns=2_000_000)
    assert len(late_ns) == 50
    assert min(late_ns) >= 0


def test_guardian_answers_a_kill():
    assert 0 < kill_to_hold_ns(realtime=False) < 30_000_000_000


def test_numbers_out_of_range_are_refused():
    with pytest.raises(SpecError, match="expected 1 to 3600 s"):
        measure_loop(duration_s=0.1)
