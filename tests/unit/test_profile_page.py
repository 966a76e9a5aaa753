"""The page of a profile in a real browser, as wide as a phone: every plot, of every kind of run."""

from __future__ import annotations

import dataclasses
import html
import os
import re
import shutil
import subprocess

import msgspec
import numpy as np
import pytest
from profile_story import MS, T0, Story, report_of

from gwp_edge.bench import Cost, against_roof, judge
from gwp_edge.machine_limits import GemmRate, Limits
from gwp_edge.profiling.blocks import Roofline
from gwp_edge.profiling.html_report import to_html
from gwp_edge.profiling.system_sampler import SystemSamples
from gwp_edge.status import TickFlag

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
# Set-up installs a browser, so where the checks must all run, a missing one is a failure.
needs_browser = pytest.mark.skipif(
    CHROMIUM is None and not os.environ.get("CI"), reason="needs chromium"
)


def on_a_phone(page, folder):
    """Return what the browser has made of a page in 390 pixels."""
    assert CHROMIUM, "no browser: run make setup"
    # A headless window is never as narrow as a phone, a frame in it is.
    inner = html.escape(page)
    (folder / "phone.html").write_text(
        f'<iframe id="phone" width="390" height="4000" srcdoc="{inner}"></iframe><script>'
        "phone.onload = () => { const page = phone.contentDocument.documentElement;"
        "page.dataset.overflow = page.scrollWidth - page.clientWidth;"
        "page.dataset.width = page.clientWidth;"
        "const cell = [...page.querySelectorAll('th')].find(t => t.textContent === 'max');"
        "page.dataset.max = cell ? Math.ceil(cell.getBoundingClientRect().right) : -1;"
        "phone.remove(); document.body.append(page); }</script>"
    )
    done = subprocess.run(
        [
            CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-sync",
            "--disable-background-networking", "--no-first-run", "--disable-component-update",
            f"--user-data-dir={folder / 'browser'}", "--window-size=800,4000", "--dump-dom",
            (folder / "phone.html").as_uri(),
        ],
        capture_output=True, text=True, timeout=300, check=True,
    )  # fmt: skip
    return done.stdout


def body_of(page):
    """Check what holds for every page and return its plots and tables."""
    assert 'data-ready="yes"' in page, "its script failed"
    assert int(re.search(r'data-width="(\d+)"', page)[1]) <= 390
    assert 'data-overflow="0"' in page, "wider than a phone"
    body = page.split("<main", 1)[1].split("</main>")[0]
    assert "NaN" not in body
    assert "Infinity" not in body
    assert "undefined" not in body
    return body


def robot_report():
    """Return a run of two repetitions with all that a page can show."""
    story = Story(n=80)
    story.stages["vision"] += np.random.default_rng(0).gamma(2.0, 1.0, 80)
    story.late, story.send = {100: 20.0, 200: 3.0}, {300: 14.0}
    story.transport = np.linspace(2.0, 4.0, 80)
    raw = story.raw()
    raw.stamps["chunk_idx"][:3] = (-1, -2, -3)
    raw.ticks["flags"][:30] |= int(TickFlag.VELOCITY)
    raw.ticks["flags"][:5] |= int(TickFlag.NOT_SENT)
    t_ns = T0 + np.arange(0, 4000, 5) * MS
    commands, states = (
        np.zeros(len(t_ns), raw.commands.dtype),
        np.zeros(len(t_ns), raw.states.dtype),
    )
    commands["t_ns"] = states["t_ns"] = t_ns
    commands["position"][:, 1] = np.sin(t_ns / 2e8)
    states["position"][:, 1] = np.sin((t_ns - 60 * MS) / 2e8)
    times = [T0 + i * 500 * MS for i in range(8)]
    rows = [
        {"gpu_c": 40.0 + i, "tj_c": 50.0 + i, "cpu0_percent": 90.0, "cpu1_percent": 80.0,
         "policy_cpu_percent": 70.0, "MemAvailable_mb": 900.0 - i, "cpu0_mhz": 2000.0 - 9 * i,
         "can0_tx_dropped": float(i)}
        for i in range(8)
    ]  # fmt: skip
    del rows[3]["tj_c"]
    raw = dataclasses.replace(
        raw, commands=commands, states=states, health={"cam_high": "60 frames, 2 lost"},
        system=SystemSamples(t_ns=times, rows=rows, throttled=("cpu-throttle",)),
    )  # fmt: skip
    report = report_of([raw, raw], execution="soft")
    return msgspec.structs.replace(report, roofline=measured_roofline())


def measured_roofline():
    limits = Limits(
        threads=1,
        gemm=(GemmRate(shape=(8, 8, 8), gflop_s=100.0),),
        stream_gb_s=10.0,
        gemm_int8=(GemmRate(shape=(8, 8, 8), gflop_s=400.0),),
        measured_at="2030-01-02T03:04:05+00:00",
        load_before=0.4,
    )
    cost = Cost(flops=10**8, n_bytes=10**7, int8_flops=10**7)
    stages = {s: against_roof(judge([8 * MS] * 3, cost, limits)) for s in ("vision", "denoise")}
    return Roofline(limits=limits, stages=stages)


@needs_browser
def test_profile_page_of_a_robot_draws_every_plot(tmp_path):
    """Only the page of the engine alone was ever drawn: no motor, no cameras, no temperatures."""
    page = on_a_phone(to_html(robot_report()), tmp_path)
    body = body_of(page)
    for words in (
        "From the frame to the motors", "frame wait", "Over time", "temperature, C", "Roofline",
        "Distribution with its tail", "Motor loop", "ticks, woke late by", "periods, off by",
        "worst jitter of the motor's period", "velocity 60", "10 ticks without a command",
        "motion follows commands after 60", "rows", "Cameras", "60 frames, 2 lost", "CAN buses",
        "can0 tx_dropped", "400 in int8", "at a load of 0.4", "left ms",
    ):  # fmt: skip
        assert words in body, words
    # Waterfall, chunks and temperatures over time, tail, two histograms, jitter, roofline.
    assert body.count("<svg") == 8
    legend = body.split("temperature, C")[-1].split("<h2>")[0]
    assert ">gpu<" in legend
    assert ">tj<" in legend
    # The smallest of what is scarce, the largest of everything else.
    assert re.search(r"MemAvailable_mb</td><td>893", body)
    assert re.search(r"gpu_c</td><td>47", body)
    right = int(re.search(r'data-max="(-?\d+)"', page)[1])
    assert 0 < right <= 390, "p50, p99 and max must be seen without scrolling"


@needs_browser
def test_profile_page_of_the_engine_alone_draws_what_there_is(tmp_path):
    raw = Story(n=60).raw()
    raw = dataclasses.replace(raw, ticks=raw.ticks[:0])
    report = report_of([raw], robot=None, motor_hz=None)
    body = body_of(on_a_phone(to_html(report), tmp_path))
    assert "Motor loop" not in body
    assert "prediction, ms" in body
    assert "frame wait" not in body.split("What was measured")[0]
    assert body.count("<svg") == 3


def test_profile_page_names_every_segment_with_a_colour_of_its_own():
    page = to_html(Story().report())
    colours = re.search(r"const COLORS = \{(.*?)\};", page, re.DOTALL)[1]
    named = dict(re.findall(r'"?([a-z ]+?)"?: "(#[0-9a-f]{6})"', colours))
    report = Story().report()
    assert {k.strip() for k in named} == set(report.chunks.segments_ms)
    assert len(set(named.values())) == len(named)
