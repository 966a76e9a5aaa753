"""The compiled part of the PiPER driver, or what to do where it is missing.

There is no second implementation in Python: one would be tested less than the one that runs, and
costs more than twice as much of every tick.
"""

from gwp_edge.errors import DeviceError

# That of piper_c/core.h: a build of other sources must not meet this code.
_API = 1

_ADVICE = (
    "install a C compiler and this Python's headers (apt-get install gcc libc6-dev python3-dev), "
    "then gwp-edge again"
)
try:
    from gwp_edge.drivers.piper_native import API, FrameStore, SocketPort, encode_arms, read_arms
except ImportError as e:
    raise DeviceError(f"the compiled part of the PiPER driver is missing: {_ADVICE} ({e})") from e
if API != _API:
    raise DeviceError(
        "the compiled part of the PiPER driver is of another version "
        f"({API}, not {_API}): {_ADVICE}"
    )

__all__ = ["FrameStore", "SocketPort", "encode_arms", "read_arms"]
