"""Build the wheel from a clean copy of the sources.

setuptools leaves ``build/`` and ``*.egg-info`` beside what it builds, and a stale ``build/lib``
ends up in the next wheel; a copy has neither. Uses this environment's setuptools: no download.

The PiPER driver has a part in C, so a wheel is for one kind of processor, and for every Python.

Run: python scripts/build_wheel.py OUT_DIR             for this machine
     python scripts/build_wheel.py OUT_DIR aarch64     for another, with its cross compiler
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("gwp_edge", "export", "calibration", "drivers")
FILES = ("cli.py", "pyproject.toml", "README.md", "LICENSE")


def build_wheel(out_dir: Path, machine: str | None = None) -> Path:
    """Build the wheel into ``out_dir``, which loses older wheels, and return its path.

    Args:
        out_dir: made if it is missing.
        machine: the processor, as ``uname -m`` names it; this machine's where None.
    """
    out_dir.mkdir(parents=True, exist_ok=True)
    for old in out_dir.glob("gwp_edge-*.whl"):
        old.unlink()
    with tempfile.TemporaryDirectory(prefix="gwp-wheel-") as scratch:
        source = Path(scratch) / "source"
        source.mkdir()
        for name in FOLDERS:
            # The links inside gwp_edge/ stay links, as in a clone.
            shutil.copytree(
                ROOT / name,
                source / name,
                symlinks=True,
                ignore=shutil.ignore_patterns("__pycache__", "*.so"),
            )
        for name in FILES:
            shutil.copy2(ROOT / name, source / name)
        environment = dict(os.environ)
        if machine is not None:
            environment |= _for_another(machine, Path(scratch) / "include")
        command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "wheel", "-q"]
        command += ["--no-deps", "--no-build-isolation", "-w", str(out_dir), str(source)]
        subprocess.run(command, check=True, env=environment)
    (wheel,) = out_dir.glob("gwp_edge-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        if not any(name.endswith(".so") for name in archive.namelist()):
            sys.exit("build_wheel: no compiled part in the wheel: see the compiler's errors")
    return wheel


def _for_another(machine: str, include: Path) -> dict[str, str]:
    """Return the environment in which setuptools compiles for ``machine``."""
    compiler = f"{machine}-linux-gnu-gcc"
    if shutil.which(compiler) is None:
        sys.exit(f"build_wheel: {compiler} is missing: apt-get install gcc-{machine}-linux-gnu")
    # Debian's headers include a pyconfig.h of the processor; of 64 bits that of this one will do.
    version = f"python{sys.version_info[0]}.{sys.version_info[1]}"
    folder = Path(sysconfig.get_path("platinclude")).parent
    ours = folder / str(sysconfig.get_config_var("MULTIARCH")) / version / "pyconfig.h"
    if ours.is_file():
        theirs = include / f"{machine}-linux-gnu" / version / "pyconfig.h"
        theirs.parent.mkdir(parents=True)
        shutil.copy2(ours, theirs)
    return {
        "CC": compiler,
        "CFLAGS": f"-I{include}",
        "LDSHARED": f"{compiler} -shared",
        "_PYTHON_HOST_PLATFORM": f"linux-{machine}",
    }


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3):
        sys.exit("usage: python scripts/build_wheel.py OUT_DIR [MACHINE]")
    sys.stdout.write(f"wheel: {build_wheel(Path(sys.argv[1]), *sys.argv[2:])}\n")
