"""Checks before the first motion, each one line with pass or fail.

Plain functions on plain values, so that ``gwp-edge doctor`` and tests can call them one by one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import numpy as np

from gwp_edge.errors import GwpError
from gwp_edge.manifest import read_manifest
from gwp_edge.observe import ObservationLimits
from gwp_edge.protocols import Policy
from gwp_edge.spec import PolicySpec
from gwp_edge.telemetry import CheckResult
from gwp_edge.types import ArmState, Chunk, FloatArray, Observation

FIRST_ACTION_RAD: Final = 0.5
FIRST_ACTION_M: Final = 0.1
FREE_MEMORY_BYTES: Final = 256 * 1024 * 1024
_SHOWN: Final = 4


def check_loaded(loaded_with: Mapping[str, object]) -> tuple[CheckResult, ...]:
    """Return every line that a policy's loading alone decides: files, engine, calibration.

    ``gwp-edge doctor`` says the same ones, so that what it passes no run refuses for them.

    Args:
        loaded_with: arguments of ``policy.load``; of any other factory no line is made.
    """
    return (*note_bundle(loaded_with), *check_calibration(loaded_with))


def note_bundle(loaded_with: Mapping[str, object]) -> tuple[CheckResult, ...]:
    """Return the lines of a policy that was loaded from a bundle: its files and its engine.

    Loading compares every file with its hash and refuses an engine or provider that is not there,
    so a policy that is here has passed both.

    Args:
        loaded_with: arguments of ``policy.load``; of any other factory no line is made.
    """
    if "path" not in loaded_with or "engine" not in loaded_with:
        return ()
    engine, provider = loaded_with["engine"], loaded_with.get("provider")
    device = f"{engine} on {provider}" if engine == "ort" and provider else f"{engine}"
    return (
        CheckResult(
            name="bundle", passed=True, detail=f"every file of {loaded_with['path']} has its hash"
        ),
        CheckResult(name="engine", passed=True, detail=device),
    )


def check_calibration(loaded_with: Mapping[str, object]) -> tuple[CheckResult, ...]:
    """Refuse ranges that were not observed on a robot: nobody knows what such a bundle does.

    Args:
        loaded_with: arguments of ``policy.load``; of any other factory no line is made.
    """
    if "path" not in loaded_with or "engine" not in loaded_with:
        return ()
    name, calibration = "calibration", read_manifest(str(loaded_with["path"])).calibration
    if calibration is None:
        return (CheckResult(name=name, passed=True, detail="none needed"),)
    if calibration.is_synthetic:
        detail = "made on SYNTHETIC data; export again with --calibration on recorded episodes"
        return (CheckResult(name=name, passed=False, detail=detail),)
    detail = f"{calibration.n_samples} recorded samples of {calibration.dataset}"
    return (CheckResult(name=name, passed=True, detail=detail),)


def check_golden(policy: Policy) -> CheckResult:
    """Run the policy's golden input."""
    try:
        policy.check_golden()
    except GwpError as e:
        return CheckResult(name="golden", passed=False, detail=str(e))
    return CheckResult(name="golden", passed=True, detail="the golden run reproduces its output")


def check_cameras(observation: Observation, now_ns: int, limits: ObservationLimits) -> CheckResult:
    """Check that every camera delivers, recently, and a picture with something on it."""
    parts, problems = [], []
    for frame in observation.frames:
        age_ms = (now_ns - frame.t_captured_ns) / 1e6
        height, width, _ = frame.image.shape
        parts.append(f"{frame.camera} {width}x{height} {age_ms:.0f} ms ({frame.domain})")
        if age_ms * 1e6 > limits.frame_age_ns:
            problems.append(f"{frame.camera} is {age_ms:.0f} ms old")
        if int(frame.image.max()) == int(frame.image.min()):
            problems.append(f"{frame.camera} shows one colour only: is the lens covered?")
    detail = "; ".join(problems) if problems else ", ".join(parts)
    return CheckResult(name="cameras", passed=not problems, detail=detail)


def check_arm(state: ArmState) -> CheckResult:
    """Check that the arm reports usable joints and no fault."""
    if state.fault is not None:
        return CheckResult(name="arm", passed=False, detail=state.fault)
    if not np.isfinite(state.position).all():
        return CheckResult(name="arm", passed=False, detail="measured joints are not finite")
    joints = " ".join(f"{q:.3f}" for q in state.position)
    return CheckResult(name="arm", passed=True, detail=f"at {joints}")


def check_statistics(spec: PolicySpec, state: FloatArray) -> CheckResult:
    """Check that the pose lies where the policy was trained, q01..q99 widened by half its range.

    A pose far outside means other units, another zero or another robot, rather than a rare pose.
    """
    low, high = np.array(spec.statistics.state_q01), np.array(spec.statistics.state_q99)
    # A channel that never moved in training still has sensor noise.
    room = np.maximum(0.5 * (high - low), 0.02)
    outside = np.flatnonzero((state < low - room) | (state > high + room))
    if outside.size == 0:
        return CheckResult(name="statistics", passed=True, detail="the pose is as in training")
    parts = [
        f"{spec.channels[i].name} is {state[i]:.3f} {spec.channels[i].unit}, "
        f"trained {low[i]:.3f} to {high[i]:.3f}"
        for i in outside
    ]
    detail = _joined(parts) + ": move the arm there, or check units, zero and bundle"
    return CheckResult(name="statistics", passed=False, detail=detail)


def check_first_action(
    spec: PolicySpec,
    chunk: Chunk,
    state: FloatArray,
    *,
    limit_rad: float = FIRST_ACTION_RAD,
    limit_m: float = FIRST_ACTION_M,
) -> CheckResult:
    """Check that the first planned row is finite and near the present pose."""
    name = "first action"
    if not np.isfinite(chunk.actions).all():
        return CheckResult(name=name, passed=False, detail="the plan is not finite")
    distance = np.abs(chunk.actions[0] - state)
    allowed = np.array([limit_rad if c.unit == "rad" else limit_m for c in spec.channels])
    far = np.flatnonzero(distance > allowed)
    if far.size:
        parts = [
            f"{spec.channels[i].name} {distance[i]:.3f} {spec.channels[i].unit} away "
            f"(allowed {allowed[i]:g})"
            for i in far
        ]
        detail = _joined(parts) + ": move the arm near to a start pose of the training"
        return CheckResult(name=name, passed=False, detail=detail)
    return CheckResult(name=name, passed=True, detail=f"at most {distance.max():.3f} away")


def _joined(parts: list[str]) -> str:
    """Return the first few; a line between processes has room for so many words."""
    more = len(parts) - _SHOWN
    return "; ".join(parts[:_SHOWN]) + (f"; and {more} more" if more > 0 else "")


def check_latency(latency_ns: int, spec: PolicySpec, *, synchronous: bool) -> CheckResult:
    """Check that a plan arrives before it is over; asynchronous execution needs that."""
    plan_ns = (spec.n_rows - 1) * spec.period_ns
    text = f"one chunk takes {latency_ns / 1e6:.0f} ms, a plan covers {plan_ns / 1e6:.0f} ms"
    if synchronous or latency_ns < plan_ns // 2:
        return CheckResult(name="latency", passed=True, detail=text)
    detail = f"{text}: more than half is over on arrival; run synchronously or with fewer steps"
    return CheckResult(name="latency", passed=False, detail=detail)


def check_memory(needed_bytes: int = FREE_MEMORY_BYTES) -> CheckResult:
    """Check free memory and shared memory of this machine."""
    available_bytes = _available_bytes()
    if math.isnan(available_bytes):
        return CheckResult(name="memory", passed=True, detail="not known on this system")
    text = f"{available_bytes / 2**20:.0f} MiB available"
    if available_bytes < needed_bytes:
        detail = f"{text}, expected {needed_bytes / 2**20:.0f} MiB: close other programs"
        return CheckResult(name="memory", passed=False, detail=detail)
    return CheckResult(name="memory", passed=True, detail=text)


def _available_bytes() -> float:
    try:
        lines = Path("/proc/meminfo").read_text("ascii").splitlines()
    except OSError:
        return math.nan
    for line in lines:
        if line.startswith("MemAvailable:"):
            return float(line.split()[1]) * 1024
    return math.nan
