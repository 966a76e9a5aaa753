"""What noting a chunk and a tick takes on this machine, measured."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final

import numpy as np

from gwp_edge.clock import MonotonicClock
from gwp_edge.mailbox import Board
from gwp_edge.profiling.collect import random_observation
from gwp_edge.profiling.stamps import stamp_record
from gwp_edge.safety import Limiter
from gwp_edge.schedule import Schedule
from gwp_edge.spec import PolicySpec
from gwp_edge.status import Mode
from gwp_edge.telemetry import StageTimes
from gwp_edge.tick_log import TickLog
from gwp_edge.types import Chunk, JointLimits

_BATCHES: Final = 21
_REPEATS: Final = 100
_TICK_NS: Final = 5_000_000


def measure_cost(spec: PolicySpec) -> tuple[float, float]:
    """Return what noting one chunk costs and what noting one tick costs, us, measured here.

    A chunk is one record, and the process's time read before and after it. A tick is all that the
    motor loop does only to leave a trace: its record, both histograms, the counters, those of a
    limit on every channel, which is the dearest tick, and the clock read around the driver. Caches
    are warm here, which they are not after a sleep.
    """
    board = Board.create(spec.n_channels, spec.n_rows)
    try:
        observation = random_observation(spec, np.random.default_rng(0), 0)
        timing = StageTimes(
            preprocess_ns=1,
            vision_ns=1,
            prefill_ns=1,
            denoise_ns=(1,) * spec.sampler.n_steps,
            postprocess_ns=1,
        )

        def stamp() -> None:
            cpu_ns = time.process_time_ns()
            cpu_ns = time.process_time_ns() - cpu_ns
            board.stamps.append(
                stamp_record(
                    0,
                    observation,
                    timing,
                    t_started_ns=0,
                    t_built_ns=0,
                    t_predicted_ns=0,
                    t_published_ns=0,
                    cpu_ns=cpu_ns,
                    t_looked_ns=1,
                    looked_idx=tuple(f.frame_idx for f in observation.frames),
                )
            )

        stamp_us = _each_us(stamp)
        tick_us = _each_us(_tick(board, spec))
    finally:
        board.close()
        board.unlink()
    return stamp_us, tick_us


def _tick(board: Board, spec: PolicySpec) -> Callable[[], None]:
    """Return what a tick does to be noted, with a plan in force and a limit on every channel."""
    D = spec.n_channels
    limits = JointLimits(
        position_min=np.full(D, -1.0),
        position_max=np.full(D, 1.0),
        velocity_max=np.full(D, 1.0),
        acceleration_max=np.full(D, 1.0),
    )
    clock = MonotonicClock()
    now_ns = clock.now_ns()
    schedule, limiter = Schedule(limits), Limiter(limits, period_s=_TICK_NS / 1e9)
    schedule.hold(np.zeros(D))
    plan = Chunk(
        actions=np.zeros((spec.n_rows, D)),
        t_observed_ns=now_ns,
        period_ns=spec.period_ns,
        chunk_idx=0,
    )
    schedule.accept(plan, now_ns)
    limiter.seed(np.zeros(D))
    # Farther than any limit allows, so that one of them acts on every channel.
    limiter.step(np.full(D, 0.9))
    log = TickLog(board, clock, limiter, schedule)

    def note() -> None:
        send_ns = clock.now_ns() - now_ns
        log.write(
            t_planned_ns=now_ns,
            t_woke_ns=now_ns,
            t_feedback_ns=now_ns,
            sent=True,
            send_ns=send_ns,
            mode=Mode.RUN,
        )

    return note


def _each_us(action: Callable[[], None]) -> float:
    """Return the median over batches, which another program's turn does not move."""
    batches = []
    for _ in range(_BATCHES):
        begin_ns = time.perf_counter_ns()
        for _ in range(_REPEATS):
            action()
        batches.append((time.perf_counter_ns() - begin_ns) / _REPEATS / 1e3)
    return float(np.median(batches))
