"""Is an error too much? The limits, and the one line that says so."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from gwp_edge.calibration.verify_schema import Check, Comparison
from gwp_edge.errors import SpecError
from gwp_edge.manifest import ChannelError, MeasuredError

DEFAULT_FACTOR = 4.0
# Engines add up in other orders than torch does; the project promises parity to this, rad and m.
PARITY = 2e-4


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What is too much.

    Attributes:
        factor: times what the manifest records, for p99 and for max; one input was measured at
            export, many are now.
        joints_p99_rad: bound on the joints' 99th percentile, or None.
        grippers_p99_m: bound on the grippers' 99th percentile, or None.
    """

    factor: float = DEFAULT_FACTOR
    joints_p99_rad: float | None = None
    grippers_p99_m: float | None = None

    def __post_init__(self) -> None:
        if not self.factor >= 1:
            raise SpecError(f"--factor: expected at least 1, got {self.factor}")
        for flag, value in (
            ("--max-error", self.joints_p99_rad),
            ("--max-gripper-error", self.grippers_p99_m),
        ):
            if value is not None and not value > 0:
                raise SpecError(f"{flag}: expected a positive number, got {value}")

    @property
    def is_absolute(self) -> bool:
        """A bound was given that only a reference can be judged by."""
        return self.joints_p99_rad is not None or self.grippers_p99_m is not None


def error_checks(
    measured: Comparison, recorded: MeasuredError, limits: Limits
) -> tuple[Check, ...]:
    """Judge the error against the reference, joints and grippers apart.

    Args:
        measured: the bundle against the reference.
        recorded: what the manifest says.
        limits: what is too much.
    """
    all_rows = measured.all_rows
    checks = [
        _check("joints", "mrad", all_rows.joints_rad, recorded.joints_rad, limits.factor),
        _check("grippers", "mm", all_rows.grippers_m, recorded.grippers_m, limits.factor),
        _bound("joints", "mrad", all_rows.joints_rad, limits.joints_p99_rad),
        _bound("grippers", "mm", all_rows.grippers_m, limits.grippers_p99_m),
    ]
    return tuple(check for check in checks if check is not None)


def _check(
    name: str,
    unit: str,
    found: ChannelError | None,
    recorded: ChannelError | None,
    factor: float,
) -> Check | None:
    if found is None:
        return None
    if recorded is None:
        return Check(
            name=f"{name} as recorded", passed=False, text="the manifest records no error for them"
        )
    parts, passed = [], True
    for what in ("p99", "max"):
        value = getattr(found, what)
        allowed = max(factor * getattr(recorded, what), PARITY)
        passed = passed and value <= allowed
        sign = "within" if value <= allowed else "above"
        parts.append(f"{what} {value * 1e3:.3g} {sign} {allowed * 1e3:.3g} {unit}")
    text = f"{', '.join(parts)} ({factor:g} x the manifest's, at least {PARITY * 1e3:g})"
    return Check(name=f"{name} as recorded", passed=passed, text=text)


def _bound(name: str, unit: str, found: ChannelError | None, bound: float | None) -> Check | None:
    if found is None or bound is None:
        return None
    passed = found.p99 <= bound
    sign = "within" if passed else "above"
    return Check(
        name=f"{name} as asked",
        passed=passed,
        text=f"p99 {found.p99 * 1e3:.3g} {sign} {bound * 1e3:.3g} {unit}",
    )


def verdict(checks: Sequence[Check], measured: Comparison | None) -> tuple[bool, str]:
    """Return whether nothing failed, and the line that says so."""
    failed = [check for check in checks if check.passed is False]
    if failed:
        more = f" (and {len(failed) - 1} more)" if len(failed) > 1 else ""
        return False, f"FAILED: {failed[0].name}: {failed[0].text}{more}"
    if measured is None:
        return True, "no fault found, but not judged against a float32 reference"
    parts = [
        f"{name} p99 {part.p99 * 1e3:.3g} {unit}"
        for name, part, unit in (
            ("joints", measured.all_rows.joints_rad, "mrad"),
            ("grippers", measured.all_rows.grippers_m, "mm"),
        )
        if part is not None
    ]
    return True, f"passed: {', '.join(parts)} against {measured.against}"
