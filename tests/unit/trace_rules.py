"""The documented rules of the trace event format, as far as this project writes it.

After "Trace Event Format" (Google) and Perfetto's notes on importing it: slices of one thread nest,
flow events begin, pass and end inside slices in the order of time, counters hold numbers, and every
process and thread that is used has a name.
"""

from __future__ import annotations

import math
from collections import defaultdict

_METADATA = {"process_name", "thread_name", "process_sort_index", "thread_sort_index"}


def broken_rules(trace):
    """Return one line for each rule that an event breaks; an empty list for a good trace."""
    found = []
    if trace.get("displayTimeUnit") not in ("ms", "ns"):
        found.append("displayTimeUnit is neither ms nor ns")
    events = trace["traceEvents"]
    for event in events:
        found += _broken_event(event)
    if not found:
        found = _slices(events) + _flows(events) + _counters(events) + _names(events)
    return found


def _ns(us):
    return round(us * 1000)


def _broken_event(event):
    where = f"{event.get('ph')} {event.get('name')}"
    if event.get("ph") not in {"M", "X", "C", "s", "t", "f"}:
        return [f"{where}: unknown phase"]
    if not isinstance(event.get("name"), str) or not event["name"]:
        return [f"{where}: no name"]
    if any(type(event.get(key)) is not int for key in ("pid", "tid")):
        return [f"{where}: pid and tid must be integers"]
    if event["ph"] == "M":
        return [] if event["name"] in _METADATA else [f"{where}: unknown metadata"]
    times = [event.get("ts"), *([event.get("dur")] if event["ph"] == "X" else [])]
    if any(not isinstance(t, (int, float)) or not math.isfinite(t) or t < 0 for t in times):
        return [f"{where}: ts and dur must be times, got {times}"]
    if any(abs(t * 1000 - _ns(t)) > 0.01 for t in times):
        return [f"{where}: finer than the viewer's nanosecond"]
    return []


def _threads(events):
    threads = defaultdict(list)
    for event in events:
        if event["ph"] == "X":
            begin = _ns(event["ts"])
            span = (begin, begin + _ns(event["dur"]), event["name"])
            threads[event["pid"], event["tid"]].append(span)
    return threads


def _slices(events):
    found = []
    for thread, spans in _threads(events).items():
        open_until = []
        for begin, end, name in sorted(spans, key=lambda s: (s[0], -s[1])):
            while open_until and open_until[-1] <= begin:
                open_until.pop()
            if open_until and end > open_until[-1]:
                found.append(f"{name} of thread {thread} overlaps the slice it begins in")
            open_until.append(end)
    return found


def _flows(events):
    found, flows, threads = [], defaultdict(list), _threads(events)
    for event in events:
        if event["ph"] in "stf":
            flows[event.get("cat"), event["name"], event.get("id")].append(event)
    for key, flow in flows.items():
        if None in key:
            found.append(f"flow {key}: needs cat and id")
        phases = "".join(e["ph"] for e in sorted(flow, key=lambda e: e["ts"]))
        if phases != "s" + "t" * (len(phases) - 2) + "f":
            found.append(f"flow {key}: is {phases}, expected one s, any t, one f, in time order")
        for event in flow:
            at = _ns(event["ts"])
            spans = threads[event["pid"], event["tid"]]
            if not any(begin <= at <= end for begin, end, _ in spans):
                found.append(f"flow {key}: its {event['ph']} is inside no slice")
            if event["ph"] == "f" and event.get("bp") != "e":
                found.append(f"flow {key}: without bp=e it ends at the next slice")
    return found


def _counters(events):
    found, last = [], {}
    for event in events:
        if event["ph"] != "C":
            continue
        series, values = (event["pid"], event["name"]), event.get("args") or {}
        numbers = [isinstance(v, (int, float)) and math.isfinite(v) for v in values.values()]
        if not values or not all(numbers):
            found.append(f"counter {series}: expected numbers, got {values}")
        if event["ts"] < last.get(series, 0):
            found.append(f"counter {series}: goes back in time")
        last[series] = event["ts"]
    return found


def _names(events):
    named = {(e["name"], e["pid"], e["tid"]) for e in events if e["ph"] == "M"}
    found = []
    for pid in {e["pid"] for e in events}:
        if not any(name == "process_name" and p == pid for name, p, _ in named):
            found.append(f"process {pid} has no name")
    for pid, tid in {(e["pid"], e["tid"]) for e in events if e["ph"] in "Xstf"}:
        if ("thread_name", pid, tid) not in named:
            found.append(f"thread {pid}/{tid} has no name")
    return found
