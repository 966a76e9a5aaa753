"""A made-up run: stamps and ticks of which every answer is known beforehand."""

from __future__ import annotations

import numpy as np

from gwp_edge.machine_limits import describe_machine
from gwp_edge.mailbox import TICK_DTYPE, command_dtype, state_dtype
from gwp_edge.profiling.build import build_report
from gwp_edge.profiling.context import make_context
from gwp_edge.profiling.raw import Raw
from gwp_edge.profiling.stamps import MAX_CAMERAS, MAX_STEPS, STAMP_DTYPE
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

    def raw(self):
        stamps = np.zeros(self.n, STAMP_DTYPE)
        published = np.zeros(self.n)
        for i in range(self.n):
            started = i * self.every
            total = sum(v[i] for v in self.stages.values()) + sum(self.steps)
            predicted = started + 0.2 + 0.3 + total
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

        captured = ns(started - self.age[i])
        idx = i if self.frame_idx is None else self.frame_idx[i]
        rest = (0,) * (MAX_STEPS - len(self.steps))
        cameras = (0,) * (MAX_CAMERAS - 1)
        stages = {k: round(v[i] * MS) for k, v in self.stages.items()}
        return (
            i, 1, len(self.steps), 0, captured, captured, ns(started), ns(started + 0.2),
            ns(predicted), ns(published), stages["preprocess"], stages["vision"],
            stages["prefill"], stages["postprocess"], 0,
            tuple(round(s * MS) for s in self.steps) + rest,
            (captured, *cameras), (captured + 2 * MS, *cameras), (idx, *cameras),
            (3, *cameras),
        )  # fmt: skip

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
        given = {
            "manifest": None, "bundle": None, "robot": "story", "engine": "ort",
            "provider": "cpu", "threads": 1, "motor_hz": 200.0, "duration_s": 3.0,
            "warmup_s": 0.0,
        }  # fmt: skip
        made = make_context(SPEC, describe_machine(), **{**given, **context})
        return build_report([self.raw()], SPEC, made, cameras=("cam_high",))


def verdict(report, topic):
    return next(v for v in report.verdicts if v.topic == topic)
