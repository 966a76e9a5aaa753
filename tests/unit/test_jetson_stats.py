"""What a Jetson tells, from answers in the form that its programs document."""

from __future__ import annotations

import sys
import types

import pytest

from gwp_edge.profiling.jetson_stats import Jtop, Tegrastats, open_jetson_source, parse_jtop

GPU = {"gpu": {"type": "integrated", "status": {"load": 98.2}, "freq": {"cur": 1300500, "max": 1}}}
MEMORY = {"RAM": {"tot": 31458848}, "EMC": {"cur": 3199000, "max": 3199000, "val": 47}}
TEMPERATURE = {"cpu": {"temp": 51.2, "online": True}, "cv0": {"temp": -256, "online": False}}
POWER = {"rail": {"VDD_GPU_SOC": {"power": 8400, "avg": 8000}}, "tot": {"power": 24100}}
FAN = {"pwmfan": {"speed": [41.2], "rpm": [1805], "profile": "quiet"}}


def test_parse_jtop_reads_documented_fields():
    assert parse_jtop(GPU, MEMORY, TEMPERATURE, POWER, FAN) == pytest.approx(
        {
            "gpu_percent": 98.2, "gpu_mhz": 1300.5, "emc_percent": 47.0, "emc_mhz": 3199.0,
            "cpu_c": 51.2, "VDD_GPU_SOC_w": 8.4, "total_w": 24.1, "pwmfan0_percent": 41.2,
            "pwmfan0_rpm": 1805.0,
        }
    )  # fmt: skip


def test_parse_jtop_of_a_bare_board_is_empty():
    assert parse_jtop({}, {}, {}, {}, None) == {}
    assert parse_jtop({"gpu": {"type": "integrated"}}, {}, {"x": {}}, {}, {}) == {}


class FakeClient:
    nvpmodel = types.SimpleNamespace(name="MAXN")
    gpu, memory, temperature, power, fan = GPU, MEMORY, TEMPERATURE, POWER, FAN
    fails = False

    def __init__(self, interval):
        self.interval, self.closed = interval, False

    def start(self):
        if self.fails:
            raise JtopException("the service is not active")

    def close(self):
        self.closed = True


class JtopException(Exception):
    pass


@pytest.fixture
def library(monkeypatch):
    module = types.SimpleNamespace(jtop=FakeClient, JtopException=JtopException)
    monkeypatch.setitem(sys.modules, "jtop", module)
    monkeypatch.setattr(FakeClient, "fails", False)


@pytest.mark.usefixtures("library")
def test_open_jetson_source_prefers_jtop(monkeypatch):
    monkeypatch.setattr(Tegrastats, "start", classmethod(lambda _cls: pytest.fail("not needed")))
    source = open_jetson_source()
    assert isinstance(source, Jtop)
    assert source.power_mode == "MAXN"
    assert source.read()["gpu_percent"] == 98.2
    source.close()
    assert source._client.closed


@pytest.mark.usefixtures("library")
def test_open_jetson_source_without_the_service_falls_to_tegrastats(monkeypatch, caplog):
    monkeypatch.setattr(FakeClient, "fails", True)
    monkeypatch.setattr(Tegrastats, "start", classmethod(lambda _cls: "tegrastats"))
    assert open_jetson_source() == "tegrastats"
    assert "does not answer" in caplog.text


def test_tegrastats_reads_lines_of_a_program(tmp_path, monkeypatch):
    program = tmp_path / "tegrastats"
    program.write_text("#!/bin/sh\necho 'RAM 1/2MB GR3D_FREQ 45%@[1300] tj@48C'\nexec sleep 60\n")
    program.chmod(0o755)
    monkeypatch.setattr("gwp_edge.profiling.jetson_stats.shutil.which", lambda _name: str(program))
    source = Tegrastats.start()
    try:
        for _ in range(2000):
            if source.line:
                break
            source._thread.join(0.01)
        assert source.read() == {"gpu_percent": 45.0, "gpu_mhz": 1300.0, "tj_c": 48.0}
    finally:
        source.close()
        source.close()
    assert source.process.poll() is not None
