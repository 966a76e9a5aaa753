"""The checks of `gwp-edge doctor` on recorded machines; see tests/data/doctor/README.md."""

from __future__ import annotations

import dataclasses
import glob
import json
import re
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gwp_edge import doctor
from gwp_edge.doctor import devices, engines, machine, power
from gwp_edge.doctor.system import PROBES, CheckResult, LocalSystem, Output
from gwp_edge.drivers.can_interface import bring_up_commands

DATA = Path(__file__).resolve().parents[1] / "data" / "doctor"
MACHINES = sorted(p.name for p in DATA.iterdir() if p.is_dir())
CAN_COMMAND = ("ip", "-details", "-statistics", "-json", "link", "show", "type", "can")


def slug(*argv: str) -> str:
    return re.sub(r"[^A-Za-z0-9.=-]+", "_", " ".join(argv)).strip("_")


class RecordedSystem:
    """One folder of tests/data/doctor, with facts replaced where a test wants others."""

    def __init__(self, name: str, *, files=None, commands=None, probes=None):
        self._folder = DATA / name
        self._files = files or {}
        self._commands = {slug(*argv): output for argv, output in (commands or {}).items()}
        self._probes = probes or {}
        self.asked: list[tuple[str, ...]] = []

    @property
    def python_version(self) -> tuple[int, int]:
        major, minor = (self._folder / "python_version").read_text().split(".")
        return int(major), int(minor)

    def read(self, path: str) -> str | None:
        if path in self._files:
            return self._files[path]
        file = self._folder / "root" / path.lstrip("/")
        return file.read_text().rstrip("\0\n\t ") if file.is_file() else None

    def glob(self, pattern: str) -> list[str]:
        root = str(self._folder / "root")
        return sorted(p.removeprefix(root) for p in glob.glob(root + pattern))

    def run(self, *argv: str) -> Output | None:
        self.asked.append(argv)
        name = slug(*argv)
        if name in self._commands:
            return self._commands[name]
        file = self._folder / "commands" / name
        if not file.is_file():
            return None
        code = file.with_name(name + ".exit")
        exit_code = int(code.read_text()) if code.is_file() else 0
        return Output(exit_code=exit_code, stdout=file.read_text().rstrip())

    def probe(self, name: str) -> Output | None:
        assert name in PROBES
        if name in self._probes:
            facts = self._probes[name]
            return None if facts is None else Output(exit_code=0, stdout=json.dumps(facts))
        file = self._folder / "probes" / f"{name}.json"
        return Output(exit_code=0, stdout=file.read_text().rstrip()) if file.is_file() else None


def results_of(name: str) -> dict[str, CheckResult]:
    results = doctor.run_checks(RecordedSystem(name))
    named = {result.name: result for result in results}
    assert len(named) == len(results), "two results have the same name"
    return named


def statuses_of(name: str) -> dict[str, str]:
    return {key: result.status for key, result in results_of(name).items()}


def can_link(**changes) -> dict:
    """One healthy interface as ip prints it, with changes to its parts."""
    system = RecordedSystem("orin-nx-jetpack6-maxn")
    link = json.loads(system.run(*CAN_COMMAND).stdout)[0]
    info = link["linkinfo"]
    for key, value in changes.items():
        target = next(d for d in (link, info["info_data"], info["info_xstats"]) if key in d)
        target[key] = value
    return link


def judge_can(*links: dict, **options) -> list[CheckResult]:
    output = Output(exit_code=0, stdout=json.dumps(links))
    system = RecordedSystem("orin-nx-jetpack6-maxn", commands={CAN_COMMAND: output}, **options)
    return devices.check_can(system)


# Whole machines -------------------------------------------------------------------------------


def test_doctor_agx_orin_in_30w_names_what_costs_speed():
    assert statuses_of("agx-orin-jetpack6-30w") == {
        "operating system": "pass",
        "jetpack": "pass",
        "python": "pass",
        "onnxruntime": "pass",
        "tensorrt": "pass",
        "pycuda": "pass",
        "power mode": "warn",
        "gpu clocks": "warn",
        "memory clock": "warn",
        "cpu clocks": "warn",
        "temperature": "pass",
        "throttling": "pass",
        "telemetry": "pass",
        "memory": "pass",
        "shared memory": "pass",
        "disk": "pass",
        "real-time priority": "warn",
        "locked memory": "warn",
        "piper driver": "pass",
        "can can0": "warn",
        "can can1": "fail",
        "camera 829212070001": "pass",
        "camera 829212070002": "pass",
        "camera 829212070003": "fail",
    }


def test_doctor_orin_nx_in_maxn_passes_every_check():
    statuses = statuses_of("orin-nx-jetpack6-maxn")
    assert set(statuses.values()) == {"pass"}
    assert {"can can_left", "can can_right", "camera 829212070003"} < set(statuses)


def test_doctor_thor_in_120w_has_jetpack_7_and_slow_gpu_clocks():
    results = results_of("agx-thor-jetpack7-120w")
    expected = {
        "jetpack": "pass",
        "python": "pass",
        "tensorrt": "pass",
        "pycuda": "pass",
        "power mode": "warn",
        "gpu clocks": "warn",
        "memory clock": "pass",
        "cpu clocks": "warn",
        "can": "skip",
        "cameras": "warn",
    }
    assert {name: results[name].status for name in expected} == expected
    assert "JetPack 7" in results["jetpack"].detail
    assert "gpu-gpc-0 315 MHz to 1575 MHz" in results["gpu clocks"].detail


def test_doctor_plain_x86_skips_what_only_a_jetson_has():
    statuses = statuses_of("x86-debian12")
    skipped = {name for name, status in statuses.items() if status == "skip"}
    assert skipped == {
        "jetpack",
        "tensorrt",
        "pycuda",
        "power mode",
        "gpu clocks",
        "memory clock",
        "telemetry",
        "can",
        "cameras",
    }
    assert "fail" not in statuses.values()


def test_doctor_broken_jetson_fails_with_a_fix_for_each():
    results = results_of("broken-orin-nano")
    failed = {name for name, result in results.items() if result.status == "fail"}
    assert failed == {
        "python",
        "onnxruntime",
        "tensorrt",
        "pycuda",
        "temperature",
        "memory",
        "shared memory",
        "disk",
        "can",
        "cameras",
    }
    assert "gs_usb" in results["can"].fix
    assert results["cameras"].fix == "sudo apt-get install libusb-1.0-0"
    assert "oc3 37 events" in results["throttling"].detail
    assert "devfreq-17000000.gpu at step 2" in results["throttling"].detail
    assert "pwm-fan" not in results["throttling"].detail


@pytest.mark.parametrize("name", MACHINES)
def test_doctor_every_machine_every_problem_has_a_fix_in_one_line(name):
    for result in doctor.run_checks(RecordedSystem(name)):
        assert "\n" not in result.detail + result.fix
        assert result.detail
        assert bool(result.fix) == (result.status in ("warn", "fail")), result


@pytest.mark.parametrize("name", MACHINES)
def test_doctor_results_survive_json(name):
    results = doctor.run_checks(RecordedSystem(name))
    decoded = msgspec.json.decode(msgspec.json.encode(results), type=list[CheckResult])
    assert decoded == results
    assert json.loads(json.dumps([dataclasses.asdict(r) for r in results]))


def test_doctor_only_asks_commands_that_change_nothing():
    allowed = {"dpkg-query", "nvpmodel", "jetson_clocks", "df", "chrt", "ip", "modinfo"}
    for name in MACHINES:
        system = RecordedSystem(name)
        doctor.run_checks(system)
        assert {argv[0] for argv in system.asked} <= allowed
        for argv in system.asked:
            if argv[0] in ("nvpmodel", "jetson_clocks"):
                assert argv[1:] in (("-q",), ("--show",))


# Odd systems ----------------------------------------------------------------------------------


class EmptySystem:
    """A machine that answers nothing."""

    python_version = (3, 11)

    def read(self, path):
        return None

    def glob(self, pattern):
        return []

    def run(self, *argv):
        return None

    def probe(self, name):
        return None


def test_doctor_machine_without_answers_skips_and_says_why():
    results = doctor.run_checks(EmptySystem())
    by_name = {r.name: r.status for r in results}
    assert by_name.pop("python") == "pass"
    assert by_name.pop("onnxruntime") == "fail"  # the one library that every machine needs
    assert by_name.pop("cameras") == "fail"  # the probe crashed; an absent library answers
    assert by_name.pop("piper driver") == "pass"  # of this installation, not of the machine
    assert set(by_name.values()) == {"skip"}
    assert len(results) == len(doctor.CHECKS)


NOISE = st.one_of(
    st.none(),
    st.text(max_size=30),
    st.sampled_from(
        ["[]", "{}", "null", "[{}]", "-1", "9" * 40, "[1]", '{"cameras": [{}]}', "3.x"]
    ),
)


class NoisySystem:
    """A machine whose every file and command holds something else than expected."""

    python_version = (3, 12)

    def __init__(self, draw):
        self._draw = draw

    def read(self, path):
        return self._draw(NOISE)

    def glob(self, pattern):
        return [pattern.replace("*", "0").replace("[0-9]", "0")]

    def run(self, *argv):
        text = self._draw(NOISE)
        return (
            None if text is None else Output(exit_code=self._draw(st.integers(0, 2)), stdout=text)
        )

    def probe(self, name):
        return self.run()


@given(st.data())
def test_doctor_any_noise_never_raises_and_keeps_every_check(data):
    results = doctor.run_checks(NoisySystem(data.draw))
    assert len(results) >= len(doctor.CHECKS)
    assert all(result.status in ("pass", "warn", "fail", "skip") for result in results)


def test_doctor_own_machine_gives_one_answer_per_check_at_least():
    results = doctor.run_checks(LocalSystem())
    assert len(results) >= len(doctor.CHECKS)
    by_name = {result.name: result.status for result in results}
    assert by_name["python"] == "pass"
    assert by_name["onnxruntime"] == "pass"


def test_local_system_odd_questions_answer_none(tmp_path):
    system = LocalSystem()
    (tmp_path / "bytes").write_bytes(b"Orin \xff\0\n")
    assert system.read(str(tmp_path / "bytes")) == "Orin �"
    assert system.read(str(tmp_path)) is None
    assert system.read(str(tmp_path / "absent")) is None
    assert system.run("no-such-command-here") is None
    assert system.run("false") == Output(exit_code=1, stdout="")


def test_worst_orders_fail_over_warn_over_pass():
    def result(status):
        return CheckResult(name="x", status=status, detail="d")

    assert doctor.worst([]) == "pass"
    assert doctor.worst([result("skip"), result("pass")]) == "pass"
    assert doctor.worst([result("warn"), result("pass")]) == "warn"
    assert doctor.worst([result("warn"), result("fail"), result("skip")]) == "fail"


# Single checks --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "status", "words"),
    [
        ("# R39 (release), REVISION: 2.0, GCID: 1", "pass", "JetPack 7"),
        ("# R35 (release), REVISION: 4.1, GCID: 1", "fail", "older than JetPack 6"),
        ("# R41 (release), REVISION: 1.0, GCID: 1", "warn", "newer than"),
        ("nonsense", "warn", "unreadable"),
    ],
)
def test_jetpack_of_other_releases_is_judged(text, status, words):
    files = {"/etc/nv_tegra_release": text}
    (result,) = machine.check_jetpack(RecordedSystem("agx-thor-jetpack7-120w", files=files))
    assert result.status == status
    assert words in result.detail


@pytest.mark.parametrize(
    ("version", "status"),
    [((3, 9), "fail"), ((3, 10), "pass"), ((3, 13), "pass"), ((3, 14), "fail")],
)
def test_python_outside_of_the_supported_range_fails(version, status):
    system = EmptySystem()
    system.python_version = version
    assert machine.check_python(system)[0].status == status


def test_power_mode_fix_names_the_boards_own_number_of_maxn():
    table = "\n".join(f"< POWER_MODEL ID={i} NAME={n} >" for i, n in enumerate(["15W", "25W"]))
    files = {"/etc/nvpmodel.conf": table + "\n< POWER_MODEL ID=2 NAME=MAXN_SUPER >"}
    (result,) = power.check_power_mode(RecordedSystem("broken-orin-nano", files=files))
    assert result.status == "warn"
    assert "nvpmodel -m 2" in result.fix
    (result,) = power.check_power_mode(RecordedSystem("broken-orin-nano"))
    assert not re.search(r"nvpmodel -m \d", result.fix)
    assert "4x" in result.detail


def test_memory_clock_at_its_maximum_by_chance_is_not_held():
    text = "EMC MinFreq=204000000 MaxFreq=3199000000 CurrentFreq=3199000000 FreqOverride=0"
    commands = {("jetson_clocks", "--show"): Output(exit_code=0, stdout=text)}
    system = RecordedSystem("agx-orin-jetpack6-30w", commands=commands)
    assert power.check_memory_clock(system)[0].status == "warn"


def test_memory_clock_without_root_is_skipped_with_the_command():
    (result,) = power.check_memory_clock(RecordedSystem("broken-orin-nano"))
    assert result.status == "skip"
    assert "sudo jetson_clocks --show" in result.detail


@pytest.mark.parametrize(
    ("temperature_mc", "status"), [("88000", "pass"), ("89000", "warn"), ("99000", "fail")]
)
def test_temperature_near_the_passive_trip_point_is_reported(temperature_mc, status):
    files = {"/sys/class/thermal/thermal_zone0/temp": temperature_mc}
    (result,) = power.check_temperature(RecordedSystem("orin-nx-jetpack6-maxn", files=files))
    assert result.status == status


@pytest.mark.parametrize(
    ("changes", "status", "words"),
    [
        ({}, "pass", "up, 1000000 bit/s"),
        ({"flags": ["NOARP", "ECHO"]}, "fail", "down"),
        ({"state": "BUS-OFF"}, "fail", "BUS-OFF"),
        ({"state": "ERROR-PASSIVE"}, "warn", "ERROR-PASSIVE"),
        ({"bittiming": {"bitrate": 500000}}, "fail", "bitrate 500000"),
        ({"restart_ms": 0}, "warn", "restart-ms 0"),
        ({"txqlen": 10}, "warn", "txqueuelen 10"),
        ({"berr_counter": {"tx": 0, "rx": 135}}, "warn", "rx errors 135"),
        ({"bus_off": 2}, "warn", "bus-off 2"),
    ],
)
def test_can_each_fault_is_named_with_the_bring_up_command(changes, status, words):
    (result,) = judge_can(can_link(**changes))
    assert result.status == status
    assert words in result.detail
    assert ("bitrate 1000000 restart-ms 100" in result.fix) == (status != "pass")
    if status != "pass":
        assert "can_left" in result.fix


def test_can_of_the_jetson_itself_is_a_warning():
    files = {"/sys/class/net/can_left/device/uevent": "DRIVER=mttcan\nOF_NAME=mttcan"}
    (result,) = judge_can(can_link(), files=files)
    assert result.status == "warn"
    assert "mttcan" in result.detail


def test_can_other_receivers_are_a_warning_and_an_absent_list_says_nothing():
    row = "   can_left  123  00000123  00000000cb627637  0000000000000a01  9  raw"
    files = {"/proc/net/can/rcvlist_fil": f"receive list 'rx_fil':\n{row}"}
    _, result = judge_can(can_link(), files=files)
    assert (result.name, result.status) == ("can can_left receivers", "warn")
    assert "1 other receiver" in result.detail
    assert len(judge_can(can_link())) == 1


def test_can_adapter_with_driver_but_no_interface_fails():
    files = {
        "/sys/bus/usb/devices/1-2.1/idVendor": "1d50",
        "/sys/bus/usb/devices/1-2.1/idProduct": "606f",
    }
    loaded = {("modinfo", "-F", "filename", "gs_usb"): Output(exit_code=0, stdout="/lib/gs_usb.ko")}
    system = RecordedSystem("broken-orin-nano", files=files, commands=loaded)
    (result,) = devices.check_can(system)
    assert result.status == "fail"
    assert "modprobe gs_usb" in result.fix


def test_can_is_brought_up_alike_by_doctor_driver_and_service():
    """gs_usb refuses berr-reporting before Linux 6.2, and then nothing of the command is done."""
    service = Path(__file__).resolve().parents[2] / "scripts" / "gwp-can@.service"
    if not service.is_file():
        pytest.skip("needs the checkout's scripts")
    command = devices.bring_up_command("can_left")
    assert command.replace("sudo ", "") == bring_up_commands("can_left")
    assert "berr" not in command
    lines = re.findall(r"^ExecStart=/usr/sbin/(.*)$", service.read_text(), re.MULTILINE)
    timing, up = (line.replace("%I", "can_left") for line in lines)
    assert timing in command
    queue = up.removesuffix(" up")
    assert queue in command


def test_tensorrt_bindings_that_differ_from_the_library_fail():
    probes = {"tensorrt": {"version": "10.9.0.34"}}
    (result,) = engines.check_tensorrt(RecordedSystem("orin-nx-jetpack6-maxn", probes=probes))
    assert result.status == "fail"
    assert "10.9.0.34" in result.detail
    assert "10.3.0.30" in result.detail


def test_tensorrt_of_another_major_version_fails():
    probes = {"tensorrt": {"version": "8.6.1"}}
    (result,) = engines.check_tensorrt(RecordedSystem("orin-nx-jetpack6-maxn", probes=probes))
    assert result.status == "fail"
    assert "expected 10.x" in result.detail


def test_tensorrt_older_than_what_the_engine_calls_fails():
    """10.0 to 10.2 passed, whose contexts take no memory with a size."""
    probes = {"tensorrt": {"version": "10.2.0.19", "own_library": True}}
    system = RecordedSystem("x86-debian12", files=NVIDIA, probes=probes)
    (result,) = engines.check_tensorrt(system)
    assert result.status == "fail"
    assert "10.2.0.19; expected 10.x from 10.3 on" in result.detail
    assert "tensorrt>=10.3,<11" in result.fix


NVIDIA = {"/proc/driver/nvidia/version": "NVRM version: NVIDIA UNIX x86_64 Kernel Module"}
LIBNVINFER = {
    ("dpkg-query", "-W", "-f=${Version}", "libnvinfer10"): Output(
        exit_code=0, stdout="10.3.0.30-1+cuda12.5"
    )
}


@pytest.mark.parametrize(("own", "status"), [(True, "pass"), (False, "fail")])
def test_tensorrt_is_compared_with_the_systems_library_only_where_it_loads_that(own, status):
    """pip's TensorRT beside another one from apt works, and was called a mismatch."""
    tensorrt = {"version": "10.9.0.34", "own_library": own}
    cuda = {"version": "2025.1", "cuda": [13, 0, 0], "driver": 13000, "capability": [8, 9]}
    system = RecordedSystem(
        "x86-debian12",
        files=NVIDIA,
        commands=LIBNVINFER,
        probes={"tensorrt": tensorrt, "pycuda": cuda},
    )
    assert engines.check_tensorrt(system)[0].status == status
    assert engines.check_pycuda(system)[0].status == status


def test_tensorrt_from_pip_on_a_jetson_is_a_warning():
    probes = {"tensorrt": {"version": "10.3.0", "own_library": True}}
    (result,) = engines.check_tensorrt(RecordedSystem("orin-nx-jetpack6-maxn", probes=probes))
    assert result.status == "warn"
    assert "library from pip" in result.detail


@pytest.mark.parametrize("has_library", [True, False])
def test_tensorrt_probe_tells_whose_library_is_loaded(tmp_path, monkeypatch, has_library):
    """As the bindings do: they import the package of the library where pip brought one."""
    text = "__version__ = '10.9'\ntry:\n    import tensorrt_libs\nexcept ImportError:\n    pass\n"
    (tmp_path / "tensorrt.py").write_text(text)
    if has_library:
        (tmp_path / "tensorrt_libs.py").touch()
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    answer = LocalSystem().probe("tensorrt")
    assert json.loads(answer.stdout) == {"version": "10.9", "own_library": has_library}


@pytest.mark.parametrize(
    ("facts", "tegrastats", "status", "detail"),
    [
        ({}, False, "pass", "jtop"),
        ({}, True, "pass", "jtop and tegrastats"),
        ({"error": "JtopException: no service"}, True, "pass", "tegrastats"),
        ({"error": "JtopException: no service"}, False, "warn", "neither jtop nor"),
        (None, False, "warn", "neither jtop nor"),
    ],
)
def test_telemetry_takes_jetson_stats_where_a_profile_would(
    monkeypatch, facts, tegrastats, status, detail
):
    """With jtop alone doctor promised profiles without power, which they would have had."""
    system = RecordedSystem("orin-nx-jetpack6-maxn", probes={"jtop": facts})
    monkeypatch.setattr(system, "glob", lambda pattern: [pattern] if tegrastats else [])
    (result,) = power.check_telemetry(system)
    assert result.status == status
    assert result.detail.startswith(detail)


def test_telemetry_probe_fails_where_the_service_does_not_answer(tmp_path, monkeypatch):
    text = "class jtop:\n    def start(self): raise OSError('no service')\n"
    (tmp_path / "jtop.py").write_text(text)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert "no service" in json.loads(LocalSystem().probe("jtop").stdout)["error"]


@pytest.mark.parametrize(
    ("driver", "status"), [(12060, "pass"), (12080, "pass"), (12020, "warn"), (11040, "fail")]
)
def test_pycuda_built_for_newer_cuda_than_the_driver_is_reported(driver, status):
    facts = {"version": "2025.1", "cuda": [12, 6, 0], "driver": driver, "capability": [8, 7]}
    system = RecordedSystem("orin-nx-jetpack6-maxn", probes={"pycuda": facts})
    assert engines.check_pycuda(system)[0].status == status


def test_pycuda_of_another_cuda_than_tensorrt_fails():
    facts = {"version": "2025.1", "cuda": [11, 8, 0], "driver": 12060, "capability": [8, 7]}
    system = RecordedSystem("orin-nx-jetpack6-maxn", probes={"pycuda": facts})
    (result,) = engines.check_pycuda(system)
    assert result.status == "fail"
    assert "CUDA 11.8, TensorRT CUDA 12." in result.detail


def test_realtime_refusal_gives_the_line_for_limits():
    (result,) = machine.check_realtime(RecordedSystem("agx-orin-jetpack6-30w"))
    assert result.status == "warn"
    assert "- rtprio 80" in result.fix
    (result,) = machine.check_locked_memory(RecordedSystem("agx-orin-jetpack6-30w"))
    assert "- memlock unlimited" in result.fix


def test_locked_memory_capability_counts_more_than_the_limit():
    files = {"/proc/self/status": "CapEff:\t0000000000004000"}
    (result,) = machine.check_locked_memory(RecordedSystem("agx-orin-jetpack6-30w", files=files))
    assert result.status == "pass"


def test_camera_probe_that_crashed_fails():
    system = RecordedSystem("x86-debian12", probes={"realsense": None})
    assert devices.check_cameras(system)[0].status == "fail"
