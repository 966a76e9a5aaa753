"""Check that everything the robot installs has an aarch64 wheel.

For each Python of JetPack 6 (3.10) and 7 (3.12) and each group of dependencies, ``pip download``
with ``--only-binary :all:`` for the platform tags that such a Jetson accepts, into a temporary
folder. pip judges environment markers by the Python that runs it, so the matching interpreter
runs it where there is one. TensorRT is not here: on a Jetson it is a package of the system
(JetPack brings the bindings for its own Python); pycuda comes as source and is built there.

Run: python scripts/check_wheels.py [VERSION...]
"""

from __future__ import annotations

import importlib
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
# glibc 2.35 of Ubuntu 22.04 accepts every older tag, but pip does not expand them by itself.
PLATFORMS = (
    *(f"manylinux_2_{minor}_aarch64" for minor in range(35, 16, -1)),
    "manylinux2014_aarch64",
    "linux_aarch64",
)
GROUPS = ("runtime", "sim", "realsense", "piper")


def read_project() -> dict[str, Any]:
    """Return the [project] table of pyproject.toml."""
    toml = importlib.import_module("tomllib" if sys.version_info >= (3, 11) else "tomli")
    table: dict[str, Any] = toml.loads((ROOT / "pyproject.toml").read_text())["project"]
    return table


def find_interpreter(version: str) -> str | None:
    """Return a Python of ``version`` that has pip, or None."""
    pyenv = sorted((Path.home() / ".pyenv" / "versions").glob(f"{version}.*/bin/python"))
    for candidate in (*map(str, pyenv), shutil.which(f"python{version}")):
        if candidate is None:
            continue
        probe = subprocess.run([candidate, "-m", "pip", "-V"], capture_output=True, check=False)
        if probe.returncode == 0:
            return candidate
    return None


def download(version: str, requirements: list[str], target: Path) -> tuple[bool, str]:
    """Download wheels for one group; return success and pip's last words."""
    interpreter = find_interpreter(version)
    command = [interpreter or sys.executable, "-m", "pip", "--disable-pip-version-check"]
    command += ["download", "-q", "--only-binary", ":all:", "--implementation", "cp"]
    command += ["--python-version", version, "-d", str(target)]
    for tag in (f"cp{version.replace('.', '')}", "abi3", "none"):
        command += ["--abi", tag]
    for tag in PLATFORMS:
        command += ["--platform", tag]
    if interpreter is not None:  # the constraints' markers fit only then
        command += ["-c", str(ROOT / "constraints.txt")]
    # A pip.conf that names local wheel folders must not answer for the public index.
    environment = {k: v for k, v in os.environ.items() if k != "PIP_FIND_LINKS"}
    run = subprocess.run(
        [*command, *requirements], capture_output=True, text=True, check=False, env=environment
    )
    lines = [line for line in run.stderr.splitlines() if not line.startswith("WARNING")]
    return run.returncode == 0, lines[0] if lines else ""


def main(versions: list[str]) -> int:
    """Check every group for every version; return the exit code."""
    project = read_project()
    failures = 0
    for version in versions:
        note = "" if find_interpreter(version) else f" (no Python {version} here: newest versions)"
        sys.stdout.write(f"\naarch64, Python {version}{note}\n")
        for group in GROUPS:
            requirements = list(project["dependencies"])
            if group != "runtime":
                requirements += project["optional-dependencies"][group]
            with tempfile.TemporaryDirectory(prefix="gwp-wheels-") as scratch:
                target = Path(scratch)
                ok, message = download(version, requirements, target)
                wheels = list(target.glob("*.whl"))
                size_mb = sum(w.stat().st_size for w in wheels) / 1e6
                native = sum("aarch64" in w.name for w in wheels)
            if ok:
                found = f"{len(wheels)} wheels, {native} native, {size_mb:.0f} MB"
                sys.stdout.write(f"  {group:<10} resolves: {found}\n")
            else:
                failures += 1
                sys.stdout.write(f"  {group:<10} FAILS: {message}\n")
            sys.stdout.flush()
    sys.stdout.write(
        "\nnot checked: tensorrt (a system package of JetPack, for its own Python only) and\n"
        "pycuda (a source package, built on the device against its CUDA)\n"
    )
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:] or ["3.10", "3.12"]))
