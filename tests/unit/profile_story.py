"""A made-up run: stamps and ticks of which every answer is known beforehand."""

from __future__ import annotations

import dataclasses

import numpy as np

from gwp_edge.machine_limits import describe_machine
from gwp_edge.mailbox import TICK_DTYPE, command_dtype, state_dtype
from gwp_edge.profiling.build import build_report
from gwp_edge.profiling.context import make_context
from gwp_edge.profiling.raw import Raw
from gwp_edge.profiling.stamps import STAMP_DTYPE
from gwp_edge.status import Mode
from gwp_edge.testing import make_spec

MS = 1_000_000
PERIOD = 33 * MS + 333_333
T0 = 5_000 * MS
STAGES = {"preprocess": 1.0, "vision": 8.0, "prefill": 4.0, "postprocess": 0.5}
SPEC = make_spec()


class Story:
    """Writes what a run would have written: a chunk every ``every`` ms, ticks at 200 Hz."""

    def __init__(self, n=60, *, every=50.0, steps=(1.0, 1.0), age=5.0):
        self.n, self.every, self.steps = n, every, steps
        self.stages = {name: np.full(n, ms) for name, ms in STAGES.items()}
        self.age = np.full(n, age)
        self.late = {}  # tick number: ms
        self.send = {}
        self.frame_idx = None
        self.looked = {}  # chunk: (ms of the last look in vain, number of the newest frame then)
        self.transport = 2.0  # ms; None for a camera that is asked
        self.guide = self.rest = 0.3
        self.cpu = None

    def raw(self):
        stamps = np.zeros(self.n, STAMP_DTYPE)
        published = np.zeros(self.n)
        for i in range(self.n):
            started = i * self.every
            total = sum(v[i] for v in self.stages.values()) + sum(self.steps)
            rest = np.broadcast_to(self.rest, self.n)[i]
            predicted = started + 0.2 + rest + self.guide + total
            published[i] = predicted + 0.1
            stamps[i] = self._stamp(i, started, predicted, published[i])
        return Raw(
            stamps=stamps,
            ticks=self._ticks(stamps),
            states=np.empty(0, state_dtype(SPEC.n_channels)),
            commands=np.empty(0, command_dtype(SPEC.n_channels)),
        )

    def _stamp(self, i, started, predicted, published):
        def ns(ms):
            return T0 + round(ms * MS)

        stamp = np.zeros((), STAMP_DTYPE)
        captured = ns(started - self.age[i])
        received = ns(started + 0.05)
        if self.transport is not None:
            received = captured + round(np.broadcast_to(self.transport, self.n)[i] * MS)
        looked_ms, looked_idx = self.looked.get(i, (None, 0))
        filled = {
            "chunk_idx": i,
            "n_cameras": 1,
            "n_steps": len(self.steps),
            "t_observed_ns": captured,
            "t_state_ns": captured,
            "t_started_ns": ns(started),
            "t_built_ns": ns(started + 0.2),
            "t_predicted_ns": ns(predicted),
            "t_published_ns": ns(published),
            "guide_ns": round(self.guide * MS),
            **{f"{name}_ns": round(ms[i] * MS) for name, ms in self.stages.items()},
            "cpu_ns": 0 if self.cpu is None else round(self.cpu[i] * MS),
            "t_looked_ns": 0 if looked_ms is None else ns(looked_ms),
        }
        for name, value in filled.items():
            stamp[name] = value
        stamp["denoise_ns"][: len(self.steps)] = [round(s * MS) for s in self.steps]
        for name, value in (
            ("t_captured_ns", captured),
            ("t_received_ns", received),
            ("frame_idx", i if self.frame_idx is None else self.frame_idx[i]),
            ("domain", 3),
            ("looked_idx", looked_idx),
        ):
            stamp[name][0] = value
        return stamp

    def _ticks(self, stamps):
        rows, planned, k = [], T0, 0
        end = int(stamps["t_published_ns"][-1]) + 40 * MS
        while planned < end:
            woke = planned + round((0.05 + self.late.get(k, 0.0)) * MS)
            send = round(self.send.get(k, 0.05) * MS)
            sent = woke + MS // 10 + send
            newest = int(np.searchsorted(stamps["t_published_ns"], woke)) - 1
            observed = int(stamps["t_observed_ns"][newest]) if newest >= 0 else 0
            rows.append(
                (planned, woke, sent, woke - MS, observed, newest, 1.0, 0, int(Mode.RUN), send)
            )
            planned = planned + 5 * MS if sent < planned + 10 * MS else sent
            k += 1
        return np.array(rows, TICK_DTYPE)

    def report(self, **context):
        return report_of([self.raw()], **context)


def report_of(raws, *, cost_us=(0.0, 0.0), **context):
    """Return the report of runs one after the other."""
    given = {
        "manifest": None, "bundle": None, "robot": "story", "engine": "ort",
        "provider": "cpu", "threads": 1, "motor_hz": 200.0, "duration_s": 3.0,
        "warmup_s": 0.0, "repeat": len(raws),
    }  # fmt: skip
    made = make_context(SPEC, describe_machine(), **{**given, **context})
    return build_report(raws, SPEC, made, cameras=("cam_high",), cost_us=cost_us)


def moving_arm(lag_ms, *, n_s=6, late_lag_ms=None):
    """An arm that follows a sine by exactly this time; by another one in the second half."""
    story = Story(n=n_s * 20)
    raw = story.raw()
    t_ns = T0 + np.arange(0, n_s * 1000, 5) * MS
    commands, states = (
        np.zeros(len(t_ns), raw.commands.dtype),
        np.zeros(len(t_ns), raw.states.dtype),
    )
    commands["t_ns"] = states["t_ns"] = t_ns
    t_s = (t_ns - T0) / 1e9
    lag_s = np.full(len(t_s), lag_ms / 1e3)
    if late_lag_ms is not None:
        lag_s[t_s > n_s / 2] = late_lag_ms / 1e3
    commands["position"][:, 1] = 0.3 * np.sin(5.0 * t_s)
    states["position"][:, 1] = 0.3 * np.sin(5.0 * (t_s - lag_s))
    return dataclasses.replace(raw, commands=commands, states=states)


def arm_that_starts(lag_ms, *, rests_s=(0.5, 2.5), trembles=0.0005, n_s=4):
    """An arm that rests, moves for half a second, rests and moves again, always so much late."""
    raw = Story(n=n_s * 20).raw()
    t_ns = T0 + np.arange(0, n_s * 1000, 5) * MS

    def path(t_s):
        return sum(0.2 * np.clip(t_s - rest, 0.0, 0.5) ** 2 for rest in rests_s)

    commands = np.zeros(len(t_ns), raw.commands.dtype)
    states = np.zeros(len(t_ns), raw.states.dtype)
    commands["t_ns"] = states["t_ns"] = t_ns
    t_s = (t_ns - T0) / 1e9
    commands["position"][:, 1] = path(t_s)
    states["position"][:, 1] = path(t_s - lag_ms / 1e3) + 0.01  # an arm that sags
    states["position"] += trembles * np.sin(np.arange(len(t_ns)) * 2.1)[:, None]
    return dataclasses.replace(raw, commands=commands, states=states)


def verdict(report, topic):
    return next(v for v in report.verdicts if v.topic == topic)
