"""Errors, sorted by who must act on them."""

from __future__ import annotations


class GwpError(Exception):
    """Root of every error that gwp-edge raises on purpose.

    The message is one line that names what is wrong, what was expected, what was found and what
    to do; the command line prints it as it stands.
    """


class SpecError(GwpError):
    """The user's input does not fit: a checkpoint, a bundle, a robot file, a flag."""


class BuildError(GwpError):
    """An export or an engine build failed or missed its numerical gate."""


class DeviceError(GwpError):
    """A camera, an arm or a bus needs the operator."""


class DeviceTimeoutError(DeviceError, TimeoutError):
    """A device did not answer in time."""


class StaleError(GwpError):
    """Data is too old, or its parts are too far apart in time, to act on."""


class SafetyFault(GwpError):  # noqa: N818 - the field's word for a latched stop condition
    """A condition that must stop the motion now."""


class PerformanceIssue(GwpError):  # noqa: N818 - names a missing fast path, not a failure
    """A fast path that was asked for is missing; running on would hide it."""
