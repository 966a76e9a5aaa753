"""A loop that does nothing but sleep until its deadlines: how late this machine wakes a sleeper."""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Final

from gwp_edge.errors import BuildError

_BARE_LOOP: Final = r"""
#define _GNU_SOURCE
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <time.h>
int main(int argc, char **argv) {
    long n = atol(argv[1]), period_ns = atol(argv[2]);
    struct sched_param p = {.sched_priority = atoi(argv[3])};
    int fifo = p.sched_priority > 0 && sched_setscheduler(0, SCHED_FIFO, &p) == 0;
    if (fifo) mlockall(MCL_CURRENT | MCL_FUTURE);
    long *late = calloc(n, sizeof(long));
    struct timespec due, now;
    clock_gettime(CLOCK_MONOTONIC, &due);
    for (long i = 0; i < n; i++) {
        due.tv_nsec += period_ns;
        while (due.tv_nsec >= 1000000000L) { due.tv_nsec -= 1000000000L; due.tv_sec++; }
        clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &due, NULL);
        clock_gettime(CLOCK_MONOTONIC, &now);
        late[i] = (now.tv_sec - due.tv_sec) * 1000000000L + now.tv_nsec - due.tv_nsec;
    }
    printf("{\"fifo\": %s, \"late_ns\": [", fifo ? "true" : "false");
    for (long i = 0; i < n; i++) printf("%s%ld", i ? "," : "", late[i]);
    printf("]}\n");
    return 0;
}
"""


def make_bare_loop(folder: Path) -> list[str]:
    """Return the command of the loop, compiled into ``folder``, or in Python without a compiler.

    Its arguments are the number of wake-ups, the period in ns and the priority of SCHED_FIFO, 0 for
    ordinary scheduling. It prints JSON: ``fifo``, whether that was granted, and ``late_ns``.

    Raises:
        BuildError: the compiler fails.
    """
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        code = "import sys; from gwp_edge.bench_bare_loop import bare_loop_in_python as f; "
        return [sys.executable, "-c", code + "f(*map(int, sys.argv[1:]))"]
    (folder / "bare.c").write_text(_BARE_LOOP, "ascii")
    program = folder / "bare"
    done = subprocess.run(
        [compiler, "-O2", "-o", str(program), str(folder / "bare.c")],
        capture_output=True,
        check=False,
    )
    if done.returncode:
        raise BuildError(f"{compiler} cannot compile the bare loop: {done.stderr.decode()[:300]}")
    return [str(program)]


def bare_loop_in_python(n: int, period_ns: int, priority: int) -> None:
    """Print what the C loop prints, by the same system call through ctypes."""

    class Timespec(ctypes.Structure):
        _fields_ = (("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long))

    fifo = False
    if priority > 0:
        try:
            os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(priority))
            fifo = True
        except OSError:
            fifo = False
    libc = ctypes.CDLL(None)
    due_ns, late = time.monotonic_ns(), []
    for _ in range(n):
        due_ns += period_ns
        due = Timespec(*divmod(due_ns, 1_000_000_000))
        libc.clock_nanosleep(time.CLOCK_MONOTONIC, 1, ctypes.byref(due), None)
        late.append(time.monotonic_ns() - due_ns)
    sys.stdout.write(json.dumps({"fifo": fifo, "late_ns": late}))
