"""Make this process keep its deadlines: scheduler, memory lock, affinity, no garbage collection."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import resource
from collections.abc import Iterator
from typing import Final

# How long before a deadline a real-time loop stops sleeping. Longer than the kernel takes to wake
# a process, short beside a period of 5 ms: at most 2 % of one core.
SPIN_NS: Final = 100_000
_MCL_CURRENT: Final = 1
_MCL_FUTURE: Final = 2


def make_realtime(*, priority: int, cpu: int | None, scheduler: bool = True) -> list[str]:
    """Do what this machine allows; return one line with the exact fix for each thing it does not.

    Never fails: a loop that is less punctual is measured and reported, not refused.

    Args:
        priority: of SCHED_FIFO, 1 to 99.
        cpu: core to stay on, None for any.
        scheduler: ask for SCHED_FIFO and locked memory at all.
    """
    warnings: list[str] = []
    # A collection of a large heap takes tens of ms; what is alive now stays, and the loop makes
    # no cycles.
    gc.collect()
    gc.freeze()
    gc.disable()
    if cpu is not None:
        try:
            os.sched_setaffinity(0, {cpu})
        except OSError as e:
            warnings.append(f"cannot stay on core {cpu} ({e.strerror}); see nproc for the cores")
    if not scheduler:
        return warnings
    try:
        # Threads that a vendor's library starts later are none of the loop.
        policy = os.SCHED_FIFO | os.SCHED_RESET_ON_FORK
        os.sched_setscheduler(0, policy, os.sched_param(priority))
    except OSError as e:
        warnings.append(
            f"no real-time scheduling ({e.strerror}); fix: add '@robot - rtprio 99' to "
            "/etc/security/limits.d/robot.conf for your group, log in again"
        )
    unlimited = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0] == resource.RLIM_INFINITY
    # With a finite limit a later allocation would fail outright, which is worse than a page fault.
    if not (unlimited or os.geteuid() == 0):
        warnings.append(
            "memory is not locked; fix: add '@robot - memlock unlimited' to "
            "/etc/security/limits.d/robot.conf for your group, log in again"
        )
        return warnings
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mlockall(_MCL_CURRENT | _MCL_FUTURE) != 0:
        warnings.append(f"memory is not locked ({os.strerror(ctypes.get_errno())})")
    return warnings


@contextlib.contextmanager
def ordinary_threads() -> Iterator[None]:
    """Take back real-time scheduling that a library gives itself meanwhile.

    SVT-AV1 makes the thread that opens an encoder, and all its own, SCHED_FIFO when it runs as
    root; children would inherit that, and a motor loop beside them would come second.
    """
    own = os.sched_getscheduler(0), os.sched_getparam(0)
    before = set(os.listdir("/proc/self/task"))
    try:
        yield
    finally:
        os.sched_setscheduler(0, *own)
        for thread in set(os.listdir("/proc/self/task")) - before:
            with contextlib.suppress(ProcessLookupError):
                os.sched_setscheduler(int(thread), os.SCHED_OTHER, os.sched_param(0))
