"""Collect what a run notes anyway: a thread in the supervisor's process that drains the rings.

It attaches to the board by itself, so it takes nothing from the run's own readers, and it only
reads: no loop of the robot waits for it.
"""

from __future__ import annotations

import contextlib
import os
import re
import threading
import time
from collections.abc import Sequence
from typing import Final

import numpy as np

from gwp_edge.errors import GwpError
from gwp_edge.mailbox import TICK_DTYPE, Board, command_dtype, state_dtype
from gwp_edge.profiling.live import LiveCallback, LiveFeed
from gwp_edge.profiling.raw import Raw, Records
from gwp_edge.profiling.stamps import STAMP_DTYPE, stamp_record
from gwp_edge.profiling.system_sampler import SystemSampler
from gwp_edge.protocols import Policy
from gwp_edge.run_options import RunStatus
from gwp_edge.runtime import Watcher
from gwp_edge.spec import PolicySpec
from gwp_edge.types import Frame, Observation

# The smallest ring holds the states of seconds.
_DRAIN_EVERY_S: Final = 0.25
_SAMPLE_EVERY_S: Final = 0.5
_SHOW_EVERY_S: Final = 0.5


class Listener:
    """Listens to one run; a ``runtime.Watcher``.

    Threads: one owner; reading happens in a thread that ``begin`` starts and ``end`` joins.

    Attributes:
        view_s: processor time that the owner spent on showing it; the owner counts.

    Args:
        spec: of the policy.
        sampler: of the system, or None for none.
        foreign: children of this process that are to count as other programs.
        feed: sums up for a live view.
        on_live: called from the listening thread, twice a second, with the figures so far.
    """

    def __init__(
        self,
        spec: PolicySpec,
        sampler: SystemSampler | None,
        *,
        foreign: Sequence[int] = (),
        feed: LiveFeed | None = None,
        on_live: LiveCallback | None = None,
    ) -> None:
        self._spec = spec
        self._sampler = sampler
        if sampler is not None:
            sampler.foreign = frozenset(foreign)
        self._feed = feed or LiveFeed()
        self._on_live = on_live
        self.view_s = 0.0
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
        self._health: dict[str, str] = {}
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
                "supervisor": os.getpid(),
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
            health=self._health,
            n_lost=self._n_lost,
            listener_s=self._listener_s,
            sampler_s=self._sampler_s,
            helper_s=self._sampler.helper_s if self._sampler is not None else 0.0,
            wall_s=self._wall_s,
            view_s=self.view_s,
            failure=self._failure,
        )

    def _listen(self) -> None:
        t_begin_s = time.monotonic()
        t_sample_s = t_show_s = t_begin_s
        board = self._board
        try:
            while board is not None and not self._over.wait(_DRAIN_EVERY_S):
                self._drain(board)
                if self._sampler is not None and time.monotonic() >= t_sample_s:
                    t_sample_s = time.monotonic() + _SAMPLE_EVERY_S
                    cpu_s = time.thread_time()
                    self._sampler.sample()
                    self._sampler_s += time.thread_time() - cpu_s
                if self._on_live is not None and time.monotonic() >= t_show_s:
                    t_show_s = time.monotonic() + _SHOW_EVERY_S
                    self._on_live(self._feed.figures(newest_sample(self._sampler)))
        except (GwpError, OSError, ValueError) as e:  # told in the report: a profile is not the run
            self._failure = f"profiling ended early: {type(e).__name__}: {e}"
        finally:
            if self._sampler is not None:
                self._sampler.close()
            self._listener_s = time.thread_time()
            self._wall_s = time.monotonic() - t_begin_s

    def _drain(self, board: Board) -> None:
        for event in board.events["policy"].drain():
            # As ``policy_process.report_health`` says it when the cameras are closed.
            found = re.fullmatch(r"camera (\S+): (.*)", event.text)
            if found is not None:
                self._health[found[1]] = found[2]
        for name, records in (
            ("stamps", board.stamps.drain()),
            ("ticks", board.ticks.drain()),
            ("states", board.new_states()),
            ("commands", board.new_commands()),
        ):
            if len(records):
                self._parts[name].append(records)
                if self._on_live is not None and name == "ticks":
                    self._feed.take_ticks(records)
                elif self._on_live is not None and name == "stamps":
                    self._feed.take_stamps(records)


class Together:
    """Several watchers as one. Threads: as each of them."""

    def __init__(self, watchers: Sequence[Watcher]) -> None:
        self._watchers = tuple(watchers)

    def begin(self, board_name: str) -> None:
        """Begin, one after the other."""
        for watcher in self._watchers:
            watcher.begin(board_name)

    def end(self) -> None:
        """End all, also when one of them fails; safe to call twice."""
        with contextlib.ExitStack() as stack:
            for watcher in self._watchers:
                stack.callback(watcher.end)


def newest_sample(sampler: SystemSampler | None) -> dict[str, float]:
    """Return the newest sample, empty where there is none."""
    return sampler.newest if sampler is not None else {}


def collect_engine(
    policy: Policy,
    *,
    duration_s: float,
    n_max: int | None,
    sampler: SystemSampler | None,
    on_live: LiveCallback | None = None,
) -> Raw:
    """Run a policy on random observations and stamp every chunk as the policy process would.

    The first call is the cold one. There is no camera, no motor loop and no guidance.

    Args:
        policy: loaded, nothing predicted yet.
        duration_s: how long; at least two chunks are made.
        n_max: chunks at most.
        sampler: of the system, or None; asked between chunks.
        on_live: called between chunks, about twice a second, with the figures so far.
    """
    rng = np.random.default_rng(0)
    rows: list[tuple[object, ...]] = []
    n_shown = 0
    t_begin_s, cpu_sampler_s, view_s = time.monotonic(), 0.0, 0.0
    feed, t_show_s = LiveFeed(), t_begin_s
    while len(rows) < 2 or time.monotonic() - t_begin_s < duration_s:
        if n_max is not None and len(rows) >= max(n_max, 2):
            break
        t_started_ns = time.monotonic_ns()
        observation = random_observation(policy.spec, rng, len(rows))
        t_built_ns, cpu_ns = time.monotonic_ns(), time.process_time_ns()
        policy.predict(observation)
        t_predicted_ns = time.monotonic_ns()
        cpu_ns = time.process_time_ns() - cpu_ns
        rows.append(
            stamp_record(
                len(rows) - 1,
                observation,
                policy.timing,
                t_started_ns=t_started_ns,
                t_built_ns=t_built_ns,
                t_predicted_ns=t_predicted_ns,
                t_published_ns=t_predicted_ns,
                cpu_ns=cpu_ns,
            )
        )
        if sampler is not None:
            cpu_s = time.thread_time()
            sampler.sample_every(_SAMPLE_EVERY_S)
            cpu_sampler_s += time.thread_time() - cpu_s
        if on_live is not None and time.monotonic() >= t_show_s:
            t_show_s, cpu_s = time.monotonic() + _SHOW_EVERY_S, time.thread_time()
            feed.take_stamps(np.array(rows[n_shown:], STAMP_DTYPE))
            n_shown = len(rows)
            on_live(feed.figures(newest_sample(sampler)))
            view_s += time.thread_time() - cpu_s
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
        helper_s=sampler.helper_s if sampler is not None else 0.0,
        wall_s=wall_s,
        view_s=view_s,
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
