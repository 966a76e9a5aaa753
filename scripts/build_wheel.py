"""Build the wheel from a clean copy of the sources.

setuptools leaves ``build/`` and ``*.egg-info`` beside what it builds, and a stale ``build/lib``
ends up in the next wheel; a copy has neither. Uses this environment's setuptools: no download.

Run: python scripts/build_wheel.py OUT_DIR
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("gwp_edge", "export", "calibration", "drivers")
FILES = ("cli.py", "pyproject.toml", "README.md", "LICENSE")


def build_wheel(out_dir: Path) -> Path:
    """Build the wheel into ``out_dir``, which loses older wheels, and return its path."""
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
                ignore=shutil.ignore_patterns("__pycache__"),
            )
        for name in FILES:
            shutil.copy2(ROOT / name, source / name)
        command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "wheel", "-q"]
        command += ["--no-deps", "--no-build-isolation", "-w", str(out_dir), str(source)]
        subprocess.run(command, check=True)
    (wheel,) = out_dir.glob("gwp_edge-*.whl")
    return wheel


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python scripts/build_wheel.py OUT_DIR")
    sys.stdout.write(f"wheel: {build_wheel(Path(sys.argv[1]))}\n")
