"""Traces of made-up runs keep the format's rules and lead from the frame to the command."""

from __future__ import annotations

import dataclasses
import json

import pytest
from profile_story import MS, SPEC, T0, Story
from trace_rules import broken_rules

from gwp_edge.profiling.system_sampler import SystemSamples
from gwp_edge.profiling.trace import to_trace


def test_trace_names_processes_and_leads_from_frame_to_command():
    raw = Story().raw()
    report = Story().report()
    events = json.loads(json.dumps(to_trace(raw, SPEC, report.context)))["traceEvents"]
    names = {e["args"]["name"] for e in events if e["ph"] == "M" and "name" in e["args"]}
    assert {"policy process", "motor process", "stages", "ticks"} <= names
    flows = [e for e in events if e.get("id") == 7 and e["ph"] in "stf"]
    assert [e["ph"] for e in flows] == ["s", "t", "f"]
    assert flows[0]["ts"] < flows[1]["ts"] < flows[2]["ts"]
    ticks = [e for e in events if e["name"] == "tick"]
    end = flows[2]["ts"]
    assert any(t["ts"] <= end <= t["ts"] + t["dur"] for t in ticks), "the arrow must hit a tick"
    assert all(e["dur"] >= 0 for e in events if e["ph"] == "X")
    assert sum(e["ph"] == "C" for e in events) == len(ticks)


def trace_of(raw, **context):
    made = Story().report(**context).context
    return json.loads(json.dumps(to_trace(raw, SPEC, made), allow_nan=False))


def test_trace_of_stories_keeps_the_rules_of_its_format():
    slow = Story(every=80.0, steps=(1.0, 0.3, 2.7))
    slow.late, slow.send = {100: 20.0}, {50: 9.0}
    # Frames are on their way for longer than a loop takes, so they overlap.
    crowded = Story(every=20.0, age=33.0)
    preflight = Story().raw()
    preflight.stamps["chunk_idx"][:3] = (-1, -2, -3)
    engine = Story().raw()
    engine = dataclasses.replace(engine, ticks=engine.ticks[:0])
    heat = SystemSamples(t_ns=[T0, T0 + MS], rows=[{"gpu_c": 40.0}, {"gpu_c": 41.0, "x": 1.0}])
    hot = dataclasses.replace(Story().raw(), system=heat)
    for raw in (Story().raw(), slow.raw(), crowded.raw(), preflight, engine, hot):
        assert broken_rules(trace_of(raw)) == []
    assert any(e.get("tid") == 4 for e in trace_of(crowded.raw())["traceEvents"])


def test_trace_of_more_ticks_than_it_holds_has_no_arrow_into_nothing(monkeypatch):
    monkeypatch.setattr("gwp_edge.profiling.trace._MAX_TICKS", 100)
    trace = trace_of(Story().raw())
    assert broken_rules(trace) == []
    assert 0 < sum(e["ph"] == "s" for e in trace["traceEvents"]) < 15


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda e: e.pop("name"), "no name"),
        (lambda e: e.update(ph="Z"), "unknown phase"),
        (lambda e: e.update(pid="1"), "integers"),
        (lambda e: e.get("ph") == "X" and e.update(dur=-1.0), "must be times"),
        (lambda e: e["name"] == "vision" and e.update(dur=60_000.0), "overlaps"),
        (lambda e: e["ph"] == "f" and e.update(ts=1.0), "in time order"),
        (lambda e: e["ph"] == "f" and e.pop("bp"), "bp=e"),
        (lambda e: e["ph"] == "s" and e.update(ts=1.0), "inside no slice"),
        (lambda e: e["ph"] == "C" and e.update(args={"value": "much"}), "expected numbers"),
        (lambda e: e["name"] == "process_name" and e.update(pid=9), "has no name"),
        (lambda e: e["name"] == "thread_name" and e.update(tid=99), "thread"),
    ],
)
def test_rules_of_the_format_catch_a_spoilt_trace(spoil, words):
    trace = trace_of(Story(n=5).raw())
    for event in trace["traceEvents"]:
        spoil(event)
    assert any(words in line for line in broken_rules(trace))
