"""The wheel that users get: whole, of real files, without what only the checkout needs."""

from __future__ import annotations

import configparser
import email
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
BUILDER = ROOT / "scripts" / "build_wheel.py"
LINKED = ("export", "calibration", "drivers")

pytestmark = pytest.mark.skipif(
    not BUILDER.is_file(), reason="needs the checkout; this is a copy of the tests alone"
)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    out_dir = tmp_path_factory.mktemp("dist")
    done = subprocess.run(
        [sys.executable, str(BUILDER), str(out_dir)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = out_dir.glob("*.whl")
    with zipfile.ZipFile(path) as archive:
        yield archive


def test_source_tree_links_are_relative_and_lead_to_the_top_level():
    for name in (*LINKED, "cli.py"):
        link = ROOT / "gwp_edge" / name
        assert link.is_symlink()
        assert os.readlink(link) == f"../{name}"


def test_wheel_holds_every_source_file_as_a_real_file(wheel):
    sources = set()
    for folder, _, files in os.walk(ROOT / "gwp_edge", followlinks=True):
        base = Path(folder).relative_to(ROOT)
        sources |= {str(base / f) for f in files if f.endswith(".py")}
    assert len(sources) > 10
    infos = {info.filename: info for info in wheel.infolist()}
    assert {f"gwp_edge/{name}/__init__.py" for name in LINKED} | {"gwp_edge/cli.py"} <= set(infos)
    missing = sources - set(infos)
    assert not missing
    for name in sources:
        kind = infos[name].external_attr >> 28
        assert kind in (0, 8), f"{name} is no regular file (kind {kind})"
    for name in ("gwp_edge/cli.py", "gwp_edge/export/__init__.py"):
        assert wheel.read(name) == (ROOT / name).read_bytes()


def test_wheel_holds_the_data_of_its_packages(wheel):
    names = set(wheel.namelist())
    assert "gwp_edge/py.typed" in names
    wanted = set()
    for folder, _, files in os.walk(ROOT / "gwp_edge", followlinks=True):
        if "__pycache__" in folder:
            continue
        base = Path(folder).relative_to(ROOT)
        wanted |= {str(base / f) for f in files if not f.endswith((".py", ".pyc", ".c", ".h"))}
    assert wanted <= names, f"not packaged: {sorted(wanted - names)}"


def test_wheel_holds_nothing_but_the_package_and_its_metadata(wheel):
    tops = {name.split("/")[0] for name in wheel.namelist()}
    assert {t for t in tops if not t.endswith(".dist-info")} == {"gwp_edge"}
    assert not [n for n in wheel.namelist() if "__pycache__" in n or n.endswith(".pyc")]


def test_wheel_metadata_names_licence_command_and_extras(wheel):
    (info,) = {n.split("/")[0] for n in wheel.namelist() if ".dist-info/" in n}
    metadata = email.message_from_bytes(wheel.read(f"{info}/METADATA"))
    assert metadata["Name"] == "gwp-edge"
    assert metadata["License-Expression"] == "Apache-2.0"
    assert b"Apache License" in wheel.read(f"{info}/licenses/LICENSE")
    extras = {"export", "sim", "realsense", "piper", "jetson", "rerun", "examples", "dev"}
    assert extras <= set(metadata.get_all("Provides-Extra"))
    entry_points = configparser.ConfigParser()
    entry_points.read_string(wheel.read(f"{info}/entry_points.txt").decode())
    assert entry_points["console_scripts"]["gwp-edge"] == "gwp_edge.cli:main"


def test_wheel_installed_alone_needs_nothing_of_torch(wheel):
    (info,) = {n.split("/")[0] for n in wheel.namelist() if ".dist-info/" in n}
    metadata = email.message_from_bytes(wheel.read(f"{info}/METADATA"))
    plain = [r for r in metadata.get_all("Requires-Dist") if "extra ==" not in r]
    names = {re.split(r"[ <>=!;\[]", r)[0].lower() for r in plain}
    assert "numpy" in names
    assert not names & {"torch", "onnx", "onnx-ir", "onnxscript", "diffusers", "transformers"}


def test_constraints_pin_every_direct_dependency_exactly():
    text = (ROOT / "constraints.txt").read_text()
    rows = [line for line in text.splitlines() if line and not line.startswith("#")]
    for row in rows:
        assert re.fullmatch(r"[a-z0-9-]+==[0-9][^+/ ]*(; python_version (>=|<) '3\.11')?", row), row
    pinned = {row.split("==")[0] for row in rows}
    project = (ROOT / "pyproject.toml").read_text()
    lists = re.findall(r"^(\w+) = \[\n?(.*?)\]$", project, re.MULTILINE | re.DOTALL)
    wanted = set()
    for key, body in lists:
        if key in ("dependencies", "export", "sim", "realsense", "piper", "dev"):
            names = re.findall(r'"([A-Za-z0-9_.-]+)[ <>=;]', body)
            wanted |= {re.sub(r"[-_.]+", "-", name).lower() for name in names}
    assert {"numpy", "torch", "mujoco", "ruff"} <= wanted
    assert not wanted - pinned


def test_make_lists_its_targets_and_needs_no_set_up_for_that():
    done = subprocess.run(
        ["make", "-s"], cwd=ROOT, capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 0, done.stderr
    for target in ("test", "demo", "test-all-pythons", "check-wheels", "test-aarch64", "clean"):
        assert f"make {target} " in done.stdout


@pytest.mark.parametrize("script", sorted((ROOT / "scripts").glob("*.sh")), ids=lambda p: p.name)
def test_shell_script_parses_stops_at_errors_and_is_executable(script):
    assert subprocess.run(["bash", "-n", str(script)], check=False).returncode == 0
    assert "set -euo pipefail" in script.read_text()
    assert os.access(script, os.X_OK)


def test_wheel_brings_the_compiled_part_for_every_later_python(wheel):
    (name,) = (n for n in wheel.namelist() if n.endswith(".so"))
    assert name == "gwp_edge/drivers/piper_native.abi3.so"
    (info,) = (n for n in wheel.namelist() if n.endswith(".dist-info/WHEEL"))
    fields = email.message_from_bytes(wheel.read(info))
    assert fields["Tag"].startswith("cp310-abi3-linux_")
    assert fields["Root-Is-Purelib"] == "false"


def test_wheel_for_another_processor_without_its_compiler_says_what_to_install(tmp_path):
    out_dir = tmp_path / "dist"
    done = subprocess.run(
        [sys.executable, str(BUILDER), str(out_dir), "riscv64"],
        env={**os.environ, "PATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr == (
        "build_wheel: riscv64-linux-gnu-gcc is missing: apt-get install gcc-riscv64-linux-gnu\n"
    )
    assert not list(out_dir.glob("*"))
