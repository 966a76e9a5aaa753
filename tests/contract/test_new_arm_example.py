"""The example of docs/new-arm.md keeps the contract, is short, and is found by its entry point."""

import importlib.metadata
import re
import sys
from pathlib import Path

import pytest
from arm_suite import ArmContract

from gwp_edge.errors import SpecError
from gwp_edge.robot_config import ArmConfig, RobotConfig
from gwp_edge.robots import create_arm, read_robot_file
from gwp_edge.testing import make_spec

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "new_arm" / "serial_arm.py"
SPEC = make_spec(1)


@pytest.fixture(autouse=True)
def _example_is_installed(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLE.parent))
    entry = importlib.metadata.EntryPoint("serial-arm", "serial_arm:create_arm", "gwp_edge.arms")
    monkeypatch.setattr(
        importlib.metadata, "entry_points", lambda group: [entry] if group == entry.group else []
    )
    yield
    sys.modules.pop("serial_arm", None)


def robot(**options):
    return RobotConfig(name="mine", arm=ArmConfig(kind="serial-arm", options=options))


class TestSerialArm(ArmContract):
    @pytest.fixture
    def new_arm(self):
        return lambda: create_arm(robot(port="/dev/ttyUSB0"), SPEC, {})


def test_example_is_under_100_lines():
    assert len(EXAMPLE.read_text("utf-8").splitlines()) < 100


def test_unknown_option_is_refused():
    with pytest.raises(SpecError, match="port alone"):
        create_arm(robot(prt="x"), SPEC, {})


def test_robot_files_of_the_page_are_read(tmp_path):
    page = EXAMPLE.parents[2] / "docs" / "new-arm.md"
    blocks = re.findall(r"```toml\n(.*?)```", page.read_text("utf-8"), re.DOTALL)
    files = [block for block in blocks if re.search("^ *name =", block)]
    assert len(files) == 2
    for text in files:
        path = tmp_path / "robot.toml"
        path.write_text(text, "utf-8")
        assert read_robot_file(path).cameras
