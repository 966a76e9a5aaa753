"""How much memory this process holds, as the kernel counts it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

_STATUS = Path("/proc/self/status")


@dataclass(frozen=True, slots=True, kw_only=True)
class Resident:
    """Resident memory of this process, bytes: pages of mapped files count while they are in.

    Attributes:
        now_bytes: VmRSS.
        peak_bytes: VmHWM: the most since the process began.
    """

    now_bytes: int
    peak_bytes: int


def read_resident(status: Path = _STATUS) -> Resident | None:
    """Return what the kernel says; None where it says nothing, as on other systems than Linux."""
    try:
        lines = status.read_text("ascii").splitlines()
    except OSError:
        return None
    kib = {
        name: int(value.split()[0])
        for name, _, value in (line.partition(":") for line in lines)
        if name in ("VmRSS", "VmHWM")
    }
    if len(kib) < 2:
        return None
    return Resident(now_bytes=kib["VmRSS"] << 10, peak_bytes=kib["VmHWM"] << 10)
