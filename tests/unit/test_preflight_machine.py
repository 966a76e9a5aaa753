"""What the preflight says of buses, camera pictures and clocks, on recorded machines."""

import json
import os
from pathlib import Path

import pytest
from test_doctor import CAN_COMMAND, Output, RecordedSystem, can_link

from gwp_edge.doctor.system import LocalSystem
from gwp_edge.preflight_machine import (
    PICTURE_AGE_MAX_S,
    can_interfaces,
    check_buses,
    check_clocks,
    check_machine,
    check_pictures,
)
from gwp_edge.robots import built_in_robot, read_robot_file
from gwp_edge.testing import make_spec

NOW_S = 1_800_000_000.0


def machine(*links):
    output = Output(exit_code=0, stdout=json.dumps(links))
    return RecordedSystem("orin-nx-jetpack6-maxn", commands={CAN_COMMAND: output})


def robot(tmp_path, *, cameras="", arm='can = "can0"'):
    path = tmp_path / "robot.toml"
    path.write_text(f'name = "r"\n[arm]\nkind = "piper"\n[arm.options]\n{arm}\n{cameras}')
    return read_robot_file(path)


def camera(role, picture):
    return f'[[cameras]]\nrole = "{role}"\nkind = "realsense"\npicture = "{picture}"\n'


def test_simulated_robot_has_no_such_lines():
    assert check_machine(built_in_robot("sim", make_spec()), system=machine()) == ()


def test_interfaces_are_those_of_the_arms():
    assert can_interfaces(built_in_robot("piper", make_spec())) == ("can0",)
    assert can_interfaces(built_in_robot("piper-dual", make_spec(2))) == ("can_left", "can_right")
    assert can_interfaces(built_in_robot("kinematic", make_spec())) == ()


def test_answer_that_nobody_foresaw_is_said_and_ends_nothing(tmp_path):
    broken = RecordedSystem(
        "orin-nx-jetpack6-maxn", commands={CAN_COMMAND: Output(exit_code=0, stdout="[{]")}
    )
    (line,) = check_buses(robot(tmp_path), broken)
    assert line.status == "fail"  # the kernel's list of interfaces has none either
    assert "could not be judged" in line.detail


def test_channel_that_is_no_interface_has_no_line(tmp_path):
    fake = robot(tmp_path, arm='can = "unix:/tmp/arm"')
    assert can_interfaces(fake) == ()
    assert check_buses(fake, machine()) == ()


@pytest.mark.parametrize(
    ("changes", "status", "words"),
    [
        ({}, "pass", "up, 1000000 bit/s"),
        ({"state": "BUS-OFF"}, "fail", "BUS-OFF"),
        ({"berr_counter": {"tx": 0, "rx": 135}}, "warn", "since start: rx errors 135"),
    ],
)
def test_bus_of_the_robot_is_judged_with_its_counters(tmp_path, changes, status, words):
    links = (can_link(ifname="can_a", **changes), can_link(ifname="other", state="BUS-OFF"))
    (line,) = check_buses(robot(tmp_path, arm='can = "can_a"'), machine(*links))
    assert (line.name, line.status) == ("can can_a", status)
    assert words in line.detail


SEEN = "   can0      000    00000000  00000000cb627637  0000000000000a01      4711  raw"
NOBODY = "receive list 'rx_all':\n  (any: no entry)\n  (can0: no entry)"


def listed(text):
    system = machine(can_link(ifname="can0"))
    system._files = {} if text is None else {"/proc/net/can/rcvlist_all": text}
    return system


def test_other_receivers_of_the_robots_bus_are_a_warning(tmp_path):
    """A program that sends without loopback was invisible: nothing said that it was there."""
    finding = check_buses(robot(tmp_path), listed(f"receive list 'rx_all':\n{SEEN}"))[1]
    assert (finding.name, finding.status) == ("can can0 receivers", "warn")
    assert finding.detail == "1 other receiver on this interface"
    assert finding.fix.startswith("stop other programs that drive the arm")
    finding = check_buses(robot(tmp_path), listed(NOBODY))[1]
    assert (finding.name, finding.status) == ("can can0 receivers", "pass")


def test_receivers_are_not_told_where_the_kernel_does_not_or_the_vendors_library_is_one(tmp_path):
    names = [f.name for f in check_buses(robot(tmp_path), listed(None))]
    assert names == ["can can0"]
    vendors = robot(tmp_path, arm='can = "can0"\ndriver = "piper-sdk"')
    names = [f.name for f in check_buses(vendors, listed(f"receive list 'rx_all':\n{SEEN}"))]
    assert names == ["can can0"]


def test_socket_of_ours_that_is_being_opened_is_no_other_program(tmp_path):
    """Its filters appear one by one, while the six lists are read one after the other."""
    system, half = listed(f"receive list 'rx_all':\n{SEEN}"), iter((True, False))
    read = system.read

    def read_meanwhile(path):
        text = read(path)
        return NOBODY if text is not None and "rcvlist" in path and not next(half) else text

    system.read = read_meanwhile
    assert check_buses(robot(tmp_path), system)[1].status == "pass"


def test_receiver_list_of_an_unknown_format_is_not_taken_for_an_empty_one(tmp_path):
    assert len(check_buses(robot(tmp_path), listed("\0\0 of can0 what?"))) == 1


@pytest.mark.parametrize(
    ("arm", "interfaces", "warned"),
    [
        ('can = "can0"', ("can0",), False),
        ('can = "can0"', ("can0", "can1"), True),
        ('can = "can_left"', ("can_left", "can0"), False),
        ('left = "can0"\nright = "can1"', ("can0", "can1"), True),
    ],
)
def test_name_by_the_kernel_is_a_warning_where_it_may_be_another_adapter(
    tmp_path, arm, interfaces, warned
):
    """A Jetson's own controller is a CAN interface too: can0 may be that one, or the other arm."""
    system = machine(*(can_link(ifname=name) for name in interfaces))
    named = [f for f in check_buses(robot(tmp_path, arm=arm), system) if f.name == "can names"]
    assert [f.status for f in named] == ["warn"] * warned
    for finding in named:
        assert "can0" in finding.detail
        assert "2 CAN interfaces" in finding.detail
        assert "robot file" in finding.fix


def test_bus_that_is_not_there_fails_and_lists_what_is(tmp_path):
    (line,) = check_buses(robot(tmp_path), machine(can_link(ifname="can7")))
    assert line.status == "fail"
    assert "can7" in line.detail


def test_machine_without_the_tool_to_look_says_so(tmp_path):
    system = RecordedSystem("x86-debian12", commands={CAN_COMMAND: None})
    (line,) = check_buses(robot(tmp_path), system)
    assert line.status == "skip"
    assert "iproute2" in line.detail


@pytest.mark.skipif(not Path("/sys/class/net").exists(), reason="this machine has no /sys")
def test_bus_of_a_machine_without_any_can_fails(tmp_path):
    """It passed as something that this machine does not tell, and the run failed later."""
    (line,) = check_buses(robot(tmp_path, arm='can = "can_nowhere"'), LocalSystem())
    assert line.status == "fail"
    assert "no network interface can_nowhere" in line.detail


def test_pictures_are_told_by_age(tmp_path):
    config = robot(tmp_path, cameras=camera("cam_high", "pictures/1.png"))
    (tmp_path / "pictures").mkdir()
    picture = tmp_path / "pictures" / "1.png"
    (line,) = check_pictures(config, NOW_S)
    assert line.status == "fail"
    assert "No such file" in line.detail
    picture.write_bytes(b"")
    os.utime(picture, (NOW_S - 86400.0, NOW_S - 86400.0))
    (line,) = check_pictures(config, NOW_S)
    assert (line.status, line.detail) == ("pass", "cam_high 1.0 days old")
    os.utime(picture, (NOW_S, NOW_S - PICTURE_AGE_MAX_S - 1.0))
    (line,) = check_pictures(config, NOW_S)
    assert line.status == "fail"
    assert "gwp-edge cameras" in line.fix


def test_cameras_without_pictures_are_a_warning_and_others_are_not(tmp_path):
    """It was a pass, so a run whose cameras nobody had looked at began without a word."""
    bare = built_in_robot("piper", make_spec())
    (finding,) = check_pictures(bare, NOW_S)
    assert (finding.name, finding.status) == ("camera pictures", "warn")
    assert "gwp-edge cameras --write" in finding.fix
    assert check_pictures(robot(tmp_path), NOW_S) == ()
    lines = {line.name: line for line in check_machine(bare, system=machine(), now_s=NOW_S)}
    said = lines["camera pictures"]
    assert said.passed
    assert said.detail.startswith("warning: ")
    assert "gwp-edge cameras --write" in said.detail


def test_one_camera_of_several_without_a_picture_is_a_warning_that_names_it(tmp_path):
    (tmp_path / "1.png").write_bytes(b"")
    os.utime(tmp_path / "1.png", (NOW_S, NOW_S))
    other = '[[cameras]]\nrole = "cam_left_wrist"\nkind = "realsense"\n'
    (finding,) = check_pictures(robot(tmp_path, cameras=camera("cam_high", "1.png") + other), NOW_S)
    assert finding.status == "warn"
    assert "cam_left_wrist" in finding.detail
    assert "cam_high" not in finding.detail


def test_clocks_are_told_where_they_are_known():
    slow = {line.name: line for line in check_clocks(RecordedSystem("agx-orin-jetpack6-30w"))}
    assert slow["power mode"].passed
    assert slow["power mode"].detail.startswith("warning: ")
    assert all("warning" in line.detail or line.passed for line in slow.values())
    assert "power mode" not in {line.name for line in check_clocks(RecordedSystem("x86-debian12"))}


def test_lines_of_a_real_robot_come_together(tmp_path):
    lines = check_machine(
        robot(tmp_path, cameras=camera("cam_high", "none.png")),
        system=machine(can_link(ifname="can0")),
        now_s=NOW_S,
    )
    names = [line.name for line in lines]
    assert names[:2] == ["can can0", "camera pictures"]
    assert "power mode" in names
