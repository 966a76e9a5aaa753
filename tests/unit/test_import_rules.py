"""What importing the runtime may do: load light libraries, and nothing else.

Each test imports in a clean interpreter, from whatever gwp_edge this environment has: the checkout
or an installed wheel.
"""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

import gwp_edge

PACKAGE = Path(gwp_edge.__file__).parent
BUILD_TIME = ("gwp_edge.export", "gwp_edge.calibration")
# Build-time libraries, and libraries of devices and engines that only the opener may load.
FORBIDDEN = (
    "torch",
    "onnx",
    "onnxscript",
    "onnx_ir",
    "transformers",
    "diffusers",
    "mujoco",
    "pyrealsense2",
    "can",
    "piper_sdk",
    "tensorrt",
    "pycuda",
    *BUILD_TIME,
)

# Imports every module named on stdin and prints what each loaded or left behind.
WATCHER = """
import gc, importlib, json, logging, os, signal, sys, threading

def sockets():
    links = []
    for name in os.listdir("/proc/self/fd"):
        try:
            links.append(os.readlink("/proc/self/fd/" + name))
        except OSError:
            pass
    return sorted(link for link in links if link.startswith("socket:"))

def handlers():
    loggers = [logging.getLogger(), *logging.Logger.manager.loggerDict.values()]
    return [
        f"{l.name}: {h}" for l in loggers if isinstance(l, logging.Logger)
        for h in l.handlers
        if (l.name == "root" or l.name.startswith("gwp_edge"))
    ]

def traces():
    return {
        "threads": sorted(t.name for t in threading.enumerate()),
        "children": open(f"/proc/self/task/{os.getpid()}/children").read(),
        "sockets": sockets(),
        "log handlers": handlers(),
        "root log level": logging.getLogger().level,
        "signals": [repr(signal.getsignal(s)) for s in (signal.SIGINT, signal.SIGTERM)],
        "garbage collection": gc.isenabled(),
        "shared memory": sorted(n for n in os.listdir("/dev/shm") if str(os.getpid()) in n),
        "folder": os.getcwd(),
        "environment": dict(os.environ),
    }

request = json.load(sys.stdin)
report = {"loaded": {}, "traces": {}}
before = traces()
for module in request["modules"]:
    importlib.import_module(module)
    report["loaded"][module] = sorted(n for n in request["watch"] if n in sys.modules)
    after = traces()
    report["traces"][module] = {k: [before[k], after[k]] for k in after if after[k] != before[k]}
print(json.dumps(report))
"""


def module_names() -> list[str]:
    """Every module of the installed package, found on disk; links are followed."""
    names = []
    stack = [(PACKAGE, "gwp_edge")]
    while stack:
        folder, prefix = stack.pop()
        names.append(prefix)
        for entry in sorted(folder.iterdir()):
            if entry.is_dir() and (entry / "__init__.py").is_file():
                stack.append((entry, f"{prefix}.{entry.name}"))
            elif entry.suffix == ".py" and entry.stem not in ("__init__", "__main__"):
                names.append(f"{prefix}.{entry.stem}")
    return sorted(names)


def runtime_modules() -> list[str]:
    absent = () if all(map(find_spec, ("pyarrow", "av"))) else ("gwp_edge.lerobot",)
    return [n for n in module_names() if not n.startswith((*BUILD_TIME, *absent))]


def watch_imports(modules: list[str], watch: tuple[str, ...]) -> dict:
    request = json.dumps({"modules": modules, "watch": watch})
    done = subprocess.run(
        [sys.executable, "-I", "-c", WATCHER],
        input=request,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_module_search_finds_the_known_parts():
    names = module_names()
    assert {"gwp_edge", "gwp_edge.types", "gwp_edge.drivers", "gwp_edge.engines"} <= set(names)
    assert {"gwp_edge.export", "gwp_edge.calibration", "gwp_edge.cli"} <= set(names)
    assert not any(n.startswith(BUILD_TIME) for n in runtime_modules())


# Both orders: a module that needs another one to be imported before it fails in one of them.
@pytest.mark.parametrize("reverse", [False, True])
def test_runtime_import_of_every_module_loads_no_forbidden_library(reverse):
    modules = sorted(runtime_modules(), reverse=reverse)
    report = watch_imports(modules, FORBIDDEN)
    guilty = {module: names for module, names in report["loaded"].items() if names}
    assert not guilty, f"first of these is the culprit: {guilty}"


def test_runtime_import_of_every_module_leaves_nothing_running():
    report = watch_imports(runtime_modules(), ())
    guilty = {module: found for module, found in report["traces"].items() if found}
    assert not guilty, f"first of these is the culprit: {guilty}"


def test_gwp_edge_import_alone_stays_light():
    heavy = ("onnxruntime", "PIL", "typer", "rich", "safetensors", "multiprocessing", "asyncio")
    report = watch_imports(["gwp_edge"], (*FORBIDDEN, *heavy))
    assert report["loaded"]["gwp_edge"] == []


def test_watcher_notices_what_it_watches_for(tmp_path):
    """The tests above would pass with a blind watcher, so it is shown a guilty module."""
    (tmp_path / "guilty.py").write_text(
        "import logging, threading, socket, signal, os\n"
        "import wave\n"
        "logging.basicConfig()\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "os.environ['GUILTY'] = '1'\n"
        "keep = socket.socket()\n"
        "threading.Thread(target=threading.Event().wait, name='left', daemon=True).start()\n"
    )
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n" + WATCHER
    request = json.dumps({"modules": ["guilty"], "watch": ["wave", "sndhdr"]})
    done = subprocess.run(
        [sys.executable, "-I", "-c", code],
        input=request,
        capture_output=True,
        text=True,
        check=True,
    )
    report = json.loads(done.stdout)
    assert report["loaded"] == {"guilty": ["wave"]}
    assert set(report["traces"]["guilty"]) == {
        "threads",
        "sockets",
        "log handlers",
        "signals",
        "environment",
    }


def test_runtime_sources_name_no_build_time_package():
    """Not even inside a function: the robot does not have those packages.

    The command line is the one bridge: its commands for the workstation import them when called.
    """
    guilty = []
    for module in runtime_modules():
        if module.split(".")[1:2] in (["cli"], ["commands"]):
            continue
        file = PACKAGE.joinpath(*module.split(".")[1:])
        file = file / "__init__.py" if file.is_dir() else file.with_suffix(".py")
        for node in ast.walk(ast.parse(file.read_text())):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [f"{node.module}.{alias.name}" for alias in node.names]
            build_time = ("torch", "onnx", "onnx_ir", "onnxscript", *BUILD_TIME)
            guilty += [
                f"{module}:{node.lineno} {name}"
                for name in names
                if any(name == b or name.startswith(f"{b}.") for b in build_time)
            ]
    assert not guilty


def test_public_names_of_each_module_exist_and_are_at_home():
    """`__all__` names what exists, and nothing public claims a private home."""
    code = """
import importlib, json, sys
problems = []
for module_name in json.load(sys.stdin):
    module = importlib.import_module(module_name)
    for name in getattr(module, "__all__", ()):
        if not hasattr(module, name):
            problems.append(f"{module_name}.__all__ names {name}, which does not exist")
            continue
        home = getattr(getattr(module, name), "__module__", None) or ""
        if any(part.startswith("_") for part in home.split(".")) and home.startswith("gwp_edge"):
            problems.append(f"{module_name}.{name} claims the private home {home}")
print(json.dumps(problems))
"""
    done = subprocess.run(
        [sys.executable, "-I", "-c", code],
        input=json.dumps(runtime_modules()),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == []


COLLECT = """
import sys
sys.modules.update(dict.fromkeys(("torch", "onnx", "onnx_ir")))
import pytest
sys.exit(pytest.main(
    ["--collect-only", "-q", "-m", "not export", "-p", "no:cacheprovider", sys.argv[1]]
))
"""


def test_tests_of_the_runtime_are_found_without_what_only_the_export_needs():
    """Where the runtime is tested there is no torch; one file that imports it stops them all."""
    run = subprocess.run(
        [sys.executable, "-c", COLLECT, Path(__file__).parents[1]],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stdout[-3000:]
