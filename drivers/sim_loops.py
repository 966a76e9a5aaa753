"""What the processes of the simulated table-top do: physics and rendering, in real time.

Physics keeps absolute deadlines, reads the newest command and publishes the measured state and the
configuration; rendering draws the newest configuration and publishes frames stamped with its time.
Both end when told to, and when the process that started them is gone, however it went; then they
also remove the shared memory.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Mapping
from multiprocessing.connection import Connection
from typing import Final, Protocol

import msgspec

from gwp_edge.child_process import leave_terminal
from gwp_edge.drivers.sim_options import SimOptions
from gwp_edge.drivers.sim_render import choose_backend
from gwp_edge.drivers.sim_segment import SimSegment, SimWord
from gwp_edge.drivers.sim_world import SimWorld
from gwp_edge.errors import GwpError
from gwp_edge.frame_ring import FrameRing

logger = logging.getLogger(__name__)

_NS_PER_S: Final = 1_000_000_000
# Behind by more than this, physics gives the time up instead of rushing after it.
_MAX_BEHIND_NS: Final = 100_000_000


class Life:
    """Says when to end: told to, SIGTERM, or the parent is gone. Threads: the main one."""

    def __init__(self, segment: SimSegment, parent_pid: int) -> None:
        self._words = segment.words
        self._parent_pid = parent_pid
        self._terminated = False
        # The run decides when the world ends, so that the arm can still be brought to rest.
        leave_terminal(self._on_terminate)

    def _on_terminate(self) -> None:
        self._terminated = True

    @property
    def orphaned(self) -> bool:
        """The process that started this one is gone."""
        return os.getppid() != self._parent_pid

    def goes_on(self) -> bool:
        """Say whether to work on."""
        return not (self._terminated or self._words[SimWord.STOP] or self.orphaned)


class Job(Protocol):
    """What one of the processes does until its life ends."""

    def __call__(
        self,
        connection: Connection,
        segment: SimSegment,
        rings: Mapping[str, FrameRing],
        n_arms: int,
        options: SimOptions,
        life: Life,
    ) -> None:
        """Report ``("ready", text)``, then work."""
        ...


def run_job(
    job: Job,
    connection: Connection,
    segment_name: str,
    ring_names: Mapping[str, str],
    n_arms: int,
    options: Mapping[str, object],
    parent_pid: int,
) -> None:
    """Be one of the world's processes: attach, do ``job``, report failure, tidy up if orphaned."""
    segment = SimSegment.attach(segment_name, n_arms)
    rings = {role: FrameRing.attach(name) for role, name in ring_names.items()}
    life = Life(segment, parent_pid)
    try:
        job(connection, segment, rings, n_arms, msgspec.convert(options, SimOptions), life)
    except Exception as e:  # process top: report, fail the cameras, end with an error
        logger.exception("sim process failed")
        text = str(e) if isinstance(e, GwpError) else f"the sim failed: {type(e).__name__}: {e}"
        for ring in rings.values():
            ring.mark_failed(text)
        if not life.orphaned:
            connection.send(("error", text))
        raise SystemExit(1) from e
    finally:
        if life.orphaned:
            segment.unlink()
            for ring in rings.values():
                ring.unlink()


def run_physics(
    connection: Connection,
    segment: SimSegment,
    rings: Mapping[str, FrameRing],
    n_arms: int,
    options: SimOptions,
    life: Life,
) -> None:
    """Step the world in real time."""
    world = SimWorld(n_arms, tuple(rings), options)
    words, commands = segment.words, segment.commands
    enabled = False
    n_seen = 0
    deadline_ns = time.monotonic_ns()
    words[SimWord.T_START_NS] = deadline_ns
    _publish(segment, world, enabled=enabled)
    connection.send(("ready", ""))
    while life.goes_on():
        if commands.count != n_seen and (newest := commands.latest()) is not None:
            record, n_seen = newest
            enabled = bool(record["enabled"])
            world.command(record["position"])
        world.step()
        words[SimWord.N_STEPS] += 1
        _publish(segment, world, enabled=enabled)
        deadline_ns += world.period_ns
        ahead_ns = deadline_ns - time.monotonic_ns()
        if ahead_ns > 0:
            time.sleep(ahead_ns / _NS_PER_S)
        elif ahead_ns < -_MAX_BEHIND_NS:
            words[SimWord.LOST_NS] -= ahead_ns
            deadline_ns -= ahead_ns


def _publish(segment: SimSegment, world: SimWorld, *, enabled: bool) -> None:
    t_ns = time.monotonic_ns()
    with segment.states.writing() as slot:
        slot["t_ns"] = t_ns
        slot["enabled"] = enabled
        slot["position"] = world.position
        slot["velocity"] = world.velocity
    with segment.configurations.writing() as slot:
        slot["t_ns"] = t_ns
        slot["qpos"] = world.qpos


def run_renderer(
    connection: Connection,
    segment: SimSegment,
    rings: Mapping[str, FrameRing],
    n_arms: int,
    options: SimOptions,
    life: Life,
) -> None:
    """Draw the newest configuration at the cameras' rate."""
    # Before the graphics library starts its threads, so that they are nice, too.
    os.nice(options.renderer_nice)
    backend = choose_backend()
    world = SimWorld(n_arms, tuple(rings), options)
    period_ns = round(_NS_PER_S / options.fps)
    n_seen = frame_idx = 0
    for role in rings:
        world.render(role)
    connection.send(("ready", backend))
    deadline_ns = time.monotonic_ns()
    while life.goes_on():
        t_begin_ns = time.monotonic_ns()
        newest = segment.configurations.latest()
        if newest is not None and newest[1] != n_seen:
            record, n_seen = newest
            world.set_qpos(record["qpos"])
            for role, ring in rings.items():
                image = world.render(role)
                ring.publish(
                    image,
                    t_captured_ns=int(record["t_ns"]),
                    t_received_ns=time.monotonic_ns(),
                    frame_idx=frame_idx,
                    domain="sim",
                )
            frame_idx += 1
            segment.words[SimWord.N_DRAWN] = frame_idx
            segment.words[SimWord.DRAWING_NS] += time.monotonic_ns() - t_begin_ns
        deadline_ns = max(deadline_ns + period_ns, time.monotonic_ns() - period_ns)
        # Short naps at low rates, so that the end is not waited for.
        while life.goes_on() and (left_ns := deadline_ns - time.monotonic_ns()) > 0:
            time.sleep(min(left_ns, 50_000_000) / _NS_PER_S)
    world.close()
