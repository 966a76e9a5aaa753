"""Collect what a run notes anyway: a thread in the supervisor's process that drains the rings.

It attaches to the board by itself, so it takes nothing from the run's own readers, and it only
reads: no loop of the robot waits for it.
"""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from gwp_edge.errors import GwpError
from gwp_edge.mailbox import TICK_DTYPE, Board, command_dtype, state_dtype
from gwp_edge.profiling.stamps import STAMP_DTYPE, stamp_record
from gwp_edge.profiling.system_sampler import SystemSampler, SystemSamples
from gwp_edge.protocols import Policy
from gwp_edge.run_options import RunStatus
from gwp_edge.spec import PolicySpec
from gwp_edge.types import Frame, Observation

_DRAIN_EVERY_S: Final = 0.1
_SAMPLE_EVERY_S: Final = 0.5
_COST_BATCHES: Final = 21
_COST_REPEATS: Final = 100
Records = npt.NDArray[Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Raw:
    """Everything that was collected of one run, or of several, one after the other.

    Attributes:
        stamps: one record per chunk, ``STAMP_DTYPE``.
        ticks: one per motor tick, ``TICK_DTYPE``.
        states: measured states.
        commands: commands sent.
        system: samples of the system, or None.
        n_lost: records overwritten before they were read.
        listener_s: processor time of the listener.
        sampler_s: the sampler's part of it.
        wall_s: how long it listened.
        failure: why collecting ended early, or None.
    """

    stamps: Records
    ticks: Records
    states: Records
    commands: Records
    system: SystemSamples | None = None
    n_lost: dict[str, int] = field(default_factory=dict)
    listener_s: float = 0.0
    sampler_s: float = 0.0
    wall_s: float = 0.0
    failure: str | None = None


class Listener:
    """Listens to one run; a ``runtime.Watcher``.

    Threads: one owner; reading happens in a thread that ``begin`` starts and ``end`` joins.

    Args:
        spec: of the policy.
        sampler: of the system, or None for none.
    """

    def __init__(self, spec: PolicySpec, sampler: SystemSampler | None) -> None:
        self._spec = spec
        self._sampler = sampler
        self._board: Board | None = None
        self._over = threading.Event()
        self._thread: threading.Thread | None = None
        self._parts: dict[str, list[Records]] = {
            "stamps": [np.empty(0, STAMP_DTYPE)],
            "ticks": [np.empty(0, TICK_DTYPE)],
            "states": [np.empty(0, state_dtype(spec.n_channels))],
            "commands": [np.empty(0, command_dtype(spec.n_channels))],
        }
        self._n_lost: dict[str, int] = {}
        self._listener_s = self._sampler_s = self._wall_s = 0.0
        self._failure: str | None = None

    def begin(self, board_name: str) -> None:
        """Attach and start listening."""
        self._board = Board.attach(board_name, self._spec.n_channels, self._spec.n_rows)
        self._thread = threading.Thread(target=self._listen, name="gwp-profile", daemon=True)
        self._thread.start()

    def see(self, status: RunStatus) -> None:
        """Learn which processes there are; called with every status."""
        if self._sampler is not None:
            self._sampler.pids = {
                "motor": status.motor_pid,
                "policy": status.policy_pid,
                "guardian": status.guardian_pid,
            }

    def end(self) -> None:
        """Take the last records and detach; safe to call twice."""
        self._over.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._board is not None:
            self._drain(self._board)
            self._n_lost = self._board.n_lost
            self._board.close()
            self._board = None

    def raw(self) -> Raw:
        """Return what was collected; after ``end``."""
        joined = {name: np.concatenate(parts) for name, parts in self._parts.items()}
        return Raw(
            **joined,
            system=self._sampler.samples() if self._sampler is not None else None,
            n_lost=self._n_lost,
            listener_s=self._listener_s,
            sampler_s=self._sampler_s,
            wall_s=self._wall_s,
            failure=self._failure,
        )

    def _listen(self) -> None:
        t_begin_s = time.monotonic()
        t_sample_s = t_begin_s
        board = self._board
        try:
            while board is not None and not self._over.wait(_DRAIN_EVERY_S):
                self._drain(board)
                if self._sampler is not None and time.monotonic() >= t_sample_s:
                    t_sample_s = time.monotonic() + _SAMPLE_EVERY_S
                    cpu_s = time.thread_time()
                    self._sampler.sample()
                    self._sampler_s += time.thread_time() - cpu_s
        except (GwpError, OSError, ValueError) as e:  # told in the report: a profile is not the run
            self._failure = f"profiling ended early: {type(e).__name__}: {e}"
        finally:
            if self._sampler is not None:
                self._sampler.close()
            self._listener_s = time.thread_time()
            self._wall_s = time.monotonic() - t_begin_s

    def _drain(self, board: Board) -> None:
        for name, records in (
            ("stamps", board.stamps.drain()),
            ("ticks", board.ticks.drain()),
            ("states", board.new_states()),
            ("commands", board.new_commands()),
        ):
            if len(records):
                self._parts[name].append(records)


def collect_engine(
    policy: Policy, *, duration_s: float, n_max: int | None, sampler: SystemSampler | None
) -> Raw:
    """Run a policy on random observations and stamp every chunk as the policy process would.

    The first call is the cold one. There is no camera, no motor loop and no guidance.

    Args:
        policy: loaded, nothing predicted yet.
        duration_s: how long; at least two chunks are made.
        n_max: chunks at most.
        sampler: of the system, or None; asked between chunks.
    """
    rng = np.random.default_rng(0)
    rows: list[tuple[object, ...]] = []
    t_begin_s, cpu_sampler_s = time.monotonic(), 0.0
    while len(rows) < 2 or time.monotonic() - t_begin_s < duration_s:
        if n_max is not None and len(rows) >= max(n_max, 2):
            break
        t_started_ns = time.monotonic_ns()
        observation = random_observation(policy.spec, rng, len(rows))
        t_built_ns = time.monotonic_ns()
        policy.predict(observation)
        t_predicted_ns = time.monotonic_ns()
        rows.append(
            stamp_record(
                len(rows) - 1,
                observation,
                policy.timing,
                t_started_ns=t_started_ns,
                t_built_ns=t_built_ns,
                t_predicted_ns=t_predicted_ns,
                t_published_ns=t_predicted_ns,
            )
        )
        if sampler is not None:
            cpu_s = time.thread_time()
            sampler.sample_every(_SAMPLE_EVERY_S)
            cpu_sampler_s += time.thread_time() - cpu_s
    wall_s = time.monotonic() - t_begin_s
    D = policy.spec.n_channels
    return Raw(
        stamps=np.array(rows, STAMP_DTYPE),
        ticks=np.empty(0, TICK_DTYPE),
        states=np.empty(0, state_dtype(D)),
        commands=np.empty(0, command_dtype(D)),
        system=sampler.samples() if sampler is not None else None,
        listener_s=cpu_sampler_s,
        sampler_s=cpu_sampler_s,
        wall_s=wall_s,
    )


def random_observation(spec: PolicySpec, rng: np.random.Generator, idx: int) -> Observation:
    """Return noise pictures of the views' sizes and a state inside the statistics."""
    now_ns = time.monotonic_ns()
    frames = tuple(
        Frame(
            camera=view.camera,
            image=rng.integers(0, 256, (view.height_px, view.width_px, 3), dtype=np.uint8),
            t_captured_ns=now_ns,
            t_received_ns=now_ns,
            frame_idx=idx,
            domain="host",
        )
        for view in spec.canvas.views
    )
    low, high = np.array(spec.statistics.state_q01), np.array(spec.statistics.state_q99)
    return Observation(frames=frames, state=rng.uniform(low, high), t_state_ns=now_ns)


def measure_cost(spec: PolicySpec) -> tuple[float, float]:
    """Return what noting one chunk costs, and what profiling adds to a tick, us, measured here.

    A tick reads the clock once more around the driver and writes four bytes more.
    """
    board = Board.create(spec.n_channels, spec.n_rows)
    try:
        observation = random_observation(spec, np.random.default_rng(0), 0)
        timing = _timing(spec.sampler.n_steps)
        stamp_us = _each_us(
            lambda: board.stamps.append(
                stamp_record(
                    0,
                    observation,
                    timing,
                    t_started_ns=0,
                    t_built_ns=0,
                    t_predicted_ns=0,
                    t_published_ns=0,
                )
            )
        )
        tick_us = _each_us(lambda: min(time.monotonic_ns() - 0, 2**31 - 1))
    finally:
        board.close()
        board.unlink()
    return stamp_us, tick_us


def _timing(n_steps: int) -> Any:  # noqa: ANN401 - StageTimes; imported where it is needed alone
    from gwp_edge.telemetry import StageTimes

    return StageTimes(
        preprocess_ns=1, vision_ns=1, prefill_ns=1, denoise_ns=(1,) * n_steps, postprocess_ns=1
    )


def _each_us(action: Any) -> float:  # noqa: ANN401 - any function
    """Return the median over batches, which another program's turn does not move."""
    batches = []
    for _ in range(_COST_BATCHES):
        begin_ns = time.perf_counter_ns()
        for _ in range(_COST_REPEATS):
            action()
        batches.append((time.perf_counter_ns() - begin_ns) / _COST_REPEATS / 1e3)
    return float(np.median(batches))
