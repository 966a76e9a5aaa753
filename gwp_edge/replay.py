"""Run a session's chunks again off the robot and find the first stage that answers otherwise.

Every chunk is computed from what was recorded: its pictures, state, noise, and the recorded chunk
that guided it. So errors do not add up from chunk to chunk, and each difference has its own cause.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from hashlib import sha256
from typing import Any, Final, Literal, Protocol

import numpy as np
import numpy.typing as npt

from gwp_edge.chunking import Guidance
from gwp_edge.errors import SpecError
from gwp_edge.policy import PredictTrace
from gwp_edge.protocols import Policy
from gwp_edge.session_format import METHODS, Session
from gwp_edge.spec import PolicySpec
from gwp_edge.types import Chunk, FloatArray, Observation

Stage = Literal["canvas", "latent", "actions"]
# Latents are of order one; engines of one precision differ far less than this.
LATENT_TOLERANCE: Final = 1e-2


class ReplayPolicy(Policy, Protocol):
    """A policy that keeps a trace, as ``policy.BundlePolicy`` does."""

    @property
    def trace(self) -> PredictTrace | None:
        """Of the last ``predict``."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class ChunkReplay:
    """One chunk, recorded against replayed.

    Attributes:
        chunk_idx: which.
        canvas_equal: whether the canvas is equal to the bit; None where it cannot be compared.
        latent_error: largest difference; None where it cannot be compared.
        actions_rad: largest difference over joints.
        actions_m: largest difference over grippers.
        diverged: the first stage that differs by more than is allowed, or None.
    """

    chunk_idx: int
    canvas_equal: bool | None
    latent_error: float | None
    actions_rad: float
    actions_m: float
    diverged: Stage | None


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplayReport:
    """What a replay found. ``to_dict`` is JSON-able.

    Attributes:
        n_chunks: in the session.
        n_lost: of the run, but not in the session, because the recorder was too slow; None where
            the recording was cut off, so that nobody counted.
        n_replayed: computed again.
        skipped: number of chunks that could not be, by reason.
        tolerance: allowed difference of an action, rad and m.
        channel_errors: largest difference by channel, rad or m.
        chunks: one line for each chunk that was replayed.
    """

    n_chunks: int
    n_lost: int | None
    n_replayed: int
    skipped: dict[str, int]
    tolerance: float
    channel_errors: dict[str, float]
    chunks: tuple[ChunkReplay, ...]

    @property
    def first_divergence(self) -> ChunkReplay | None:
        """The first chunk that differs, or None."""
        return next((c for c in self.chunks if c.diverged is not None), None)

    @property
    def n_diverged(self) -> int:
        """Chunks whose actions, or what led to them, differ."""
        return sum(c.diverged is not None for c in self.chunks)

    def to_dict(self) -> dict[str, object]:
        """Return plain dicts, lists, numbers and strings."""
        first = self.first_divergence
        return {
            **asdict(self),
            "n_diverged": self.n_diverged,
            "first_divergence": None if first is None else asdict(first),
        }


def check_comparable(recorded: PolicySpec, other: PolicySpec) -> None:
    """Check that a policy can answer what was recorded.

    Raises:
        SpecError: it needs other cameras, channels or chunk sizes.
    """
    missing = sorted(set(other.cameras) - set(recorded.cameras))
    if missing:
        raise SpecError(
            f"the bundle needs camera {', '.join(missing)}, the session has "
            f"{', '.join(recorded.cameras)}"
        )
    mine = [(c.name, c.unit) for c in recorded.channels]
    theirs = [(c.name, c.unit) for c in other.channels]
    if mine != theirs:
        raise SpecError(
            "the bundle drives other channels than the session has: "
            f"{', '.join(name for name, _ in theirs)} against {', '.join(n for n, _ in mine)}"
        )
    shape = (recorded.n_rows, recorded.network.n_action_channels)
    other_shape = (other.n_rows, other.network.n_action_channels)
    if shape != other_shape:
        raise SpecError(
            f"the session's noise is of shape {shape}, the bundle expects {other_shape}"
        )


def replay(
    session: Session,
    policy: ReplayPolicy,
    *,
    tolerance: float,
    progress: Callable[[int, int], None] | None = None,
) -> ReplayReport:
    """Compute every recorded chunk again and compare.

    Args:
        session: recorded with this or another bundle.
        policy: answers now.
        tolerance: allowed difference of an action, rad and m.
        progress: called with chunks done and chunks in all.

    Raises:
        SpecError: the policy does not fit the session, or the session has nothing to replay.
    """
    check_comparable(session.spec, policy.spec)
    if not tolerance >= 0:
        raise SpecError(f"tolerance: expected 0 or more, got {tolerance}")
    by_idx = {int(c["chunk_idx"]): c for c in session.chunks}
    worst = np.zeros(session.spec.n_channels)
    skipped: dict[str, int] = {}
    done: list[ChunkReplay] = []
    for i, record in enumerate(session.chunks):
        reason = _reason_to_skip(record, by_idx, len(session.frames))
        if reason is None:
            result, errors = _replay_one(session, record, by_idx, policy, tolerance)
            done.append(result)
            worst = np.maximum(worst, errors)
        else:
            skipped[reason] = skipped.get(reason, 0) + 1
        if progress is not None:
            progress(i + 1, len(session.chunks))
    if not done:
        why = ", ".join(f"{n} without {reason}" for reason, n in skipped.items()) or "no chunks"
        raise SpecError(f"{session.folder}: nothing can be replayed: {why}")
    names = [c.name for c in session.spec.channels]
    return ReplayReport(
        n_chunks=len(session.chunks),
        n_lost=None if session.end is None else session.end.n_lost.get("chunks", 0),
        n_replayed=len(done),
        skipped=skipped,
        tolerance=tolerance,
        channel_errors={n: float(e) for n, e in zip(names, worst, strict=True)},
        chunks=tuple(done),
    )


def _reason_to_skip(
    record: npt.NDArray[Any], by_idx: Mapping[int, Any], n_frames: int
) -> str | None:
    if not record["has_trace"]:
        return "noise"
    rows = record["frame_rows"]
    # A kill may have kept the chunk and not the rows that it points at.
    if (rows < 0).any() or (rows >= n_frames).any():
        return "pictures"
    if record["previous_idx"] >= 0 and int(record["previous_idx"]) not in by_idx:
        return "the chunk that guided it"
    return None


def _replay_one(
    session: Session,
    record: npt.NDArray[Any],
    by_idx: Mapping[int, Any],
    policy: ReplayPolicy,
    tolerance: float,
) -> tuple[ChunkReplay, FloatArray]:
    observation = Observation(
        frames=tuple(session.frame(int(row)) for row in record["frame_rows"]),
        state=record["state"],
        t_state_ns=int(record["t_state_ns"]),
    )
    previous, guidance = None, None
    if record["previous_idx"] >= 0:
        previous = _chunk(by_idx[int(record["previous_idx"])])
        guidance = Guidance(
            method=METHODS[int(record["method"])],
            n_frozen_rows=int(record["n_frozen_rows"]),
            n_horizon_rows=int(record["n_horizon_rows"]),
            beta=float(record["beta"]),
            warm_start_sigma=float(record["warm_start_sigma"]),
        )
    chunk = policy.predict(observation, noise=record["noise"], previous=previous, guidance=guidance)
    trace = policy.trace
    canvas_equal = latent_error = None
    if trace is not None and policy.spec.canvas == session.spec.canvas:
        digest = sha256(np.ascontiguousarray(trace.canvas).tobytes()).digest()
        canvas_equal = digest == record["canvas_sha256"].tobytes()
    if trace is not None and trace.latent.shape == record["latent"].shape:
        latent_error = float(_difference(trace.latent, record["latent"]).max())
    errors = _difference(chunk.actions, record["actions"]).max(axis=0)
    is_rad = np.array([c.unit == "rad" for c in session.spec.channels])
    diverged: Stage | None = None
    if errors.max() > tolerance:
        diverged = "actions"
    if latent_error is not None and latent_error > LATENT_TOLERANCE:
        diverged = "latent"
    if canvas_equal is False:
        diverged = "canvas"
    result = ChunkReplay(
        chunk_idx=int(record["chunk_idx"]),
        canvas_equal=canvas_equal,
        latent_error=latent_error,
        actions_rad=float(errors[is_rad].max(initial=0.0)),
        actions_m=float(errors[~is_rad].max(initial=0.0)),
        diverged=diverged,
    )
    return result, errors


def _chunk(record: npt.NDArray[Any]) -> Chunk:
    return Chunk(
        actions=record["actions"],
        t_observed_ns=int(record["t_observed_ns"]),
        period_ns=int(record["period_ns"]),
        chunk_idx=int(record["chunk_idx"]),
    )


def _difference(now: npt.ArrayLike, then: npt.ArrayLike) -> FloatArray:
    """Return |now - then|; infinite where only one of them is finite."""
    a, b = np.asarray(now, np.float64), np.asarray(then, np.float64)
    with np.errstate(invalid="ignore"):
        difference: FloatArray = np.abs(a - b)
    same = np.isnan(a) & np.isnan(b) | (a == b)
    return np.where(same, 0.0, np.where(np.isnan(difference), np.inf, difference))
