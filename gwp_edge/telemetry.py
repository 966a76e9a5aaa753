"""What a run measured: stage times, percentiles, histograms, and the summary at its end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True, slots=True, kw_only=True)
class StageTimes:
    """Time that each stage of one chunk took, ns; ``denoise_ns`` one entry per step.

    ``guide_ns`` is what it took to make the new chunk follow the old one; part of no other stage.
    ``device_timed`` says that a chunk was one call and its stages were timed on the device.
    """

    preprocess_ns: int
    vision_ns: int
    prefill_ns: int
    denoise_ns: tuple[int, ...]
    postprocess_ns: int
    guide_ns: int = 0
    device_timed: bool = False

    @property
    def total_ns(self) -> int:
        """Sum of all stages, ns."""
        return (
            self.preprocess_ns
            + self.guide_ns
            + self.vision_ns
            + self.prefill_ns
            + sum(self.denoise_ns)
            + self.postprocess_ns
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Distribution:
    """Percentiles of n values, all in one unit that the field's name tells."""

    n: int
    p50: float
    p95: float
    p99: float
    max: float

    @classmethod
    def of(cls, values: npt.ArrayLike, scale: float = 1.0) -> Distribution:
        """Compute it from values; all zero where there are none."""
        array = np.asarray(values, np.float64).ravel() * scale
        if array.size == 0:
            return cls(n=0, p50=0.0, p95=0.0, p99=0.0, max=0.0)
        p50, p95, p99 = (float(p) for p in np.percentile(array, (50, 95, 99)))
        return cls(n=array.size, p50=p50, p95=p95, p99=p99, max=float(array.max()))

    @classmethod
    def of_histogram(cls, counts: npt.NDArray[np.int64], bin_width: float = 1.0) -> Distribution:
        """Compute it from counts per bin; values are the upper edges of their bins.

        The last bin is open: a value from it is only a lower bound.
        """
        n = int(counts.sum())
        if n == 0:
            return cls.of([])
        total = np.cumsum(counts)
        at = [int(np.searchsorted(total, q * n)) + 1 for q in (0.50, 0.95, 0.99)]
        top = int(np.flatnonzero(counts)[-1]) + 1
        p50, p95, p99 = (k * bin_width for k in at)
        return cls(n=n, p50=p50, p95=p95, p99=p99, max=top * bin_width)


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckResult:
    """One line of the preflight."""

    name: str
    passed: bool
    detail: str


@dataclass(frozen=True, slots=True, kw_only=True)
class RunSummary:
    """How a run went. ``to_dict`` is JSON-able.

    Attributes:
        outcome: ``duration``, ``interrupted``, ``terminated``, ``parked``, ``operator``: ended
            well; ``refused``: a check failed, nothing moved; ``fault``, ``held``, ``crashed``,
            ``estop``: ended holding, for the reason in ``message``.
        exit_code: 0 where it ended well, else 1.
        message: the last line: what happened and how the arm is left.
        run_s: time from the first motion to the end.
        n_chunks: chunks published.
        n_ticks: motor ticks.
        latency_ms: per stage, and ``total`` from the capture of the oldest frame to the publishing
            of the chunk.
        frame_age_ms: age of the oldest frame when inference started.
        frame_skew_ms: capture times apart.
        feedback_age_ms: age of the arm's state at the tick.
        chunk_age_ms: age of the plan's observation at the tick.
        lateness_us: wake-up of the motor loop after its deadline.
        busy_us: wake-up to sent.
        n_missed_ticks: whole periods skipped.
        n_late_ticks: woke more than 1 ms late.
        interventions: per channel, ticks in which each kind of limit acted.
        n_stale_observations: stretches in which no observation was fit for inference.
        n_rejected_chunks: not finite, and for other reasons.
        n_rejected_ticks: targets that the limiter refused.
        n_dropped_sends: commands that the bus had no room for, or that came too late to be sent.
        n_holds: times that a running arm went to hold.
        guardian_hold_ms: from the guardian's alarm to its hold command, None if it never acted.
        cameras: what each camera's driver said about itself at the end, by name.
        checks: the preflight.
        faults: warnings and errors, in order.
    """

    outcome: str
    exit_code: int
    message: str
    run_s: float = 0.0
    n_chunks: int = 0
    n_ticks: int = 0
    latency_ms: dict[str, Distribution] = field(default_factory=dict)
    frame_age_ms: Distribution | None = None
    frame_skew_ms: Distribution | None = None
    feedback_age_ms: Distribution | None = None
    chunk_age_ms: Distribution | None = None
    lateness_us: Distribution | None = None
    busy_us: Distribution | None = None
    n_missed_ticks: int = 0
    n_late_ticks: int = 0
    interventions: dict[str, dict[str, int]] = field(default_factory=dict)
    n_stale_observations: int = 0
    n_rejected_chunks: dict[str, int] = field(default_factory=dict)
    n_rejected_ticks: int = 0
    n_dropped_sends: int = 0
    n_holds: int = 0
    guardian_hold_ms: float | None = None
    cameras: dict[str, str] = field(default_factory=dict)
    checks: tuple[CheckResult, ...] = ()
    faults: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, object]:
        """Return plain dicts, lists, numbers and strings."""
        return asdict(self)


def latencies_ms(timings: npt.NDArray[np.void]) -> dict[str, Distribution]:
    """Return the latency of every stage over the chunks of a run, ms."""
    result = {
        stage: Distribution.of(timings[f"{stage}_ns"], 1e-6)
        for stage in ("preprocess", "vision", "prefill", "denoise", "postprocess")
    }
    result["predict"] = Distribution.of(timings["t_published_ns"] - timings["t_started_ns"], 1e-6)
    result["total"] = Distribution.of(timings["t_published_ns"] - timings["t_observed_ns"], 1e-6)
    return result


def nonzero_interventions(
    counts: npt.NDArray[np.int64], names: Sequence[str]
) -> dict[str, dict[str, int]]:
    """Return ticks per channel and kind of limit, channels without any left out."""
    kinds = ("position", "velocity", "acceleration", "workspace")
    return {
        name: {kind: int(n) for kind, n in zip(kinds, row, strict=True)}
        for name, row in zip(names, counts, strict=True)
        if row.any()
    }
