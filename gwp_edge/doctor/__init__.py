"""Is this machine, bus and camera set ready? Checks that read and never change anything.

Every check reads through a ``System``, so each is tested on recorded files of real kinds of
machines. What could only be tested on such files is not yet run on a Jetson.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain

from gwp_edge.doctor import devices, engines, machine, power
from gwp_edge.doctor.system import CheckResult, LocalSystem, Output, Status, System

__all__ = ["CheckResult", "LocalSystem", "Output", "Status", "System", "run_checks", "worst"]

Check = Callable[[System], list[CheckResult]]

# In the order in which a person would fix things.
CHECKS: tuple[tuple[str, Check], ...] = (
    ("operating system", machine.check_operating_system),
    ("jetpack", machine.check_jetpack),
    ("python", machine.check_python),
    ("onnxruntime", engines.check_onnxruntime),
    ("tensorrt", engines.check_tensorrt),
    ("pycuda", engines.check_pycuda),
    ("power mode", power.check_power_mode),
    ("gpu clocks", power.check_gpu_clocks),
    ("memory clock", power.check_memory_clock),
    ("cpu clocks", power.check_cpu_clocks),
    ("temperature", power.check_temperature),
    ("throttling", power.check_throttling),
    ("telemetry", power.check_telemetry),
    ("memory", machine.check_memory),
    ("shared memory", machine.check_shared_memory),
    ("disk", machine.check_disk),
    ("real-time priority", machine.check_realtime),
    ("locked memory", machine.check_locked_memory),
    ("piper driver", devices.check_piper_driver),
    ("can", devices.check_can),
    ("cameras", devices.check_cameras),
)

_RANK: dict[Status, int] = {"skip": 0, "pass": 0, "warn": 1, "fail": 2}


def run_checks(system: System) -> list[CheckResult]:
    """Run every check on ``system``; never raises on odd systems.

    Args:
        system: where files and commands come from; ``LocalSystem()`` for this machine.

    Returns:
        One or more results per check, in the order of ``CHECKS``. A fact that this machine does
        not give is a "skip" whose detail says why.
    """
    return list(chain.from_iterable(judge(name, check, system) for name, check in CHECKS))


def worst(results: list[CheckResult]) -> Status:
    """Return "fail", "warn" or "pass", whichever is the worst that occurs."""
    ranks = [_RANK[result.status] for result in results]
    return ("pass", "warn", "fail")[max(ranks, default=0)]


def judge(name: str, check: Check, system: System) -> list[CheckResult]:
    """Return what ``check`` finds; one that fails itself is skipped, and says so."""
    # Files of unknown machines hold what nobody foresaw; that must not hide the other checks.
    try:
        return check(system)
    except (ValueError, LookupError, TypeError, OSError) as error:
        why = f"could not be judged: {type(error).__name__}: {error}"
        return [CheckResult(name=name, status="skip", detail=why)]
