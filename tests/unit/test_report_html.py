"""The page of a verification: whole in itself, and the same numbers as the JSON."""

from __future__ import annotations

import html.parser
import json
import os
import re
import shutil
import subprocess

import msgspec
import numpy as np
import pytest

from gwp_edge.calibration.report import from_json, to_html, to_json
from gwp_edge.calibration.verify_errors import Ruler, compare
from gwp_edge.calibration.verify_schema import (
    Check,
    Context,
    LayerReport,
    PlotChunk,
    RangeGrowth,
    SampleId,
    Sensitivity,
    Settling,
    StepRange,
    VerifyReport,
)
from gwp_edge.errors import SpecError
from gwp_edge.manifest import ChannelError, MeasuredError
from gwp_edge.spec import Channel

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
HOSTILE = '</script><img src="http://evil.example/x.png"><!-- & \u2028 é'


LAYER = "blocks.0.ffn.net.0.proj"


def make_report(task="pick the apple") -> VerifyReport:
    rng = np.random.default_rng(5)
    channels = (
        Channel(name="joint1.pos", unit="rad", kind="delta"),
        Channel(name="gripper.pos", unit="m", kind="absolute"),
    )
    ruler = Ruler(channels=channels, n_first_rows=3, thresholds_m={"gripper.pos": 0.0})
    chunks = [rng.normal(size=(3, 8, 2)) for _ in range(3)]
    bundle, reference, recorded = ([c[i] for c in chunks] for i in range(3))
    rows = [tuple(map(tuple, c.round(6).tolist())) for c in (bundle[0], reference[0], recorded[0])]
    measured = compare(bundle, reference, ruler, of="bundle", against="float32 reference")
    error = ChannelError(mean=0.001, p50=0.001, p99=0.002, max=0.003)
    return VerifyReport(
        passed=False,
        verdict=f"FAILED: prompts: {task!r}",
        checks=(Check(name="prompts", passed=None, text=task),),
        notes=(task,),
        context=Context(
            created_at="2030-01-02T03:04:05Z",
            gwp_edge="0.1.0",
            machine="x86_64 Linux",
            libraries={"numpy": "2"},
            bundle="policy.gwp",
            bundle_id="0" * 64,
            precision="int8",
            engine="ort cpu",
            threads=None,
            against="ckpt.pt",
            dataset="towels",
            dataset_sha256="1" * 64,
            split_by="held-out episodes of seed 0",
            episodes=(1,),
            excluded_episodes=(0,),
            samples=(SampleId(episode=1, frame=2, task=task),),
            seed=0,
            n_first_rows=3,
            period_ns=33_333_333,
            n_rows=8,
        ),
        recorded_error=MeasuredError(
            inputs="golden", n_chunks=1, joints_rad=error, grippers_m=error
        ),
        reference=measured,
        bundle_open_loop=compare(bundle, recorded, ruler, of="bundle", against="recorded actions"),
        reference_open_loop=compare(reference, recorded, ruler, of="float32", against="recorded"),
        emulation=measured,
        layers=(
            LayerReport(
                stage="denoise",
                name=LAYER,
                format="int8",
                cosine=0.999,
                sqnr_db=30.0,
                own_sqnr_db=None,
                steps_sqnr_db=(30.0, None),
                steps_input_max=(1.0, 2.0),
            ),
        ),
        sensitivity=(Sensitivity(name="blocks.0.ffn", p99_rad=0.001, format="int8"),),
        ranges=(StepRange(name="denoise/blocks.0", steps=(1.0, 2.0)),),
        settling=Settling(
            method="mse",
            fractions=(0.125, 0.25, 0.5, 1.0),
            ranges=(
                RangeGrowth(
                    name="denoise/blocks.0",
                    amax=(1.0, 1.0, 1.0, 1.0),
                    thresholds=(0.9, 0.9, 0.9, 0.9),
                    growth=0.0,
                    is_growing=False,
                ),
                RangeGrowth(
                    name="denoise/blocks.1",
                    amax=(1.0, 2.0, 2.5, 4.0),
                    thresholds=(0.5, 1.5, 2.0, 3.0),
                    growth=0.5,
                    is_growing=True,
                ),
            ),
        ),
        chunks=(
            PlotChunk(
                episode=1, frame=2, task=task, bundle=rows[0], reference=rows[1], recorded=rows[2]
            ),
        ),
    )


class Page(html.parser.HTMLParser):
    """Collects elements, their attributes, and the text of scripts."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.scripts, self._script = [], [], {}, None
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, *pair) for pair in attrs]
        if tag == "script":
            self._script = dict(attrs).get("id", "code")
            self.scripts[self._script] = ""

    def handle_endtag(self, tag):
        if tag == "script":
            self._script = None

    def handle_data(self, data):
        if self._script is not None:
            self.scripts[self._script] += data


@pytest.mark.parametrize("task", ["pick the apple", HOSTILE])
def test_page_holds_the_report_as_it_is_in_the_json_file(task):
    report = make_report(task)
    embedded = Page(to_html(report)).scripts["report"]
    assert json.loads(embedded) == json.loads(to_json(report))
    assert from_json(embedded.encode()) == report


@pytest.mark.parametrize("task", ["pick the apple", HOSTILE])
def test_page_refers_to_nothing_outside_itself(task):
    text = to_html(make_report(task))
    page = Page(text)
    assert {"link", "img", "iframe", "object", "embed", "base"}.isdisjoint(page.tags)
    assert not [a for a in page.attributes if a[1] in {"src", "href", "srcset", "action", "data"}]
    rest = text.replace(page.scripts["report"], "")
    assert not re.search(r"https?:|//[a-z]|@import|url\(|\bimport\b|\bfetch\b|XMLHttp", rest)
    (policy,) = [a[2] for a in page.attributes if a[2] and "default-src" in a[2]]
    assert "default-src 'none'" in policy


def test_page_with_hostile_names_has_no_more_elements_than_any_other():
    assert Page(to_html(make_report(HOSTILE))).tags == Page(to_html(make_report())).tags


def test_page_has_no_place_left_to_fill():
    assert "@REPORT@" not in to_html(make_report())
    assert "@REPORT@" in json.dumps(msgspec.to_builtins(make_report("@REPORT@")))
    embedded = Page(to_html(make_report("@REPORT@"))).scripts["report"]
    assert json.loads(embedded)["notes"] == ["@REPORT@"]


def test_json_report_is_read_back_whole():
    report = make_report()
    assert from_json(to_json(report)) == report
    assert to_json(report).endswith(b"}\n")


@pytest.mark.parametrize("data", [b"", b"{}", b"[]", b'{"schema": "gwp-edge.bundle"}'])
def test_json_that_is_no_report_is_refused(data):
    with pytest.raises(SpecError, match="not a report"):
        from_json(data)


def drawn(report, folder):
    """Return what a browser has made of the page."""
    assert CHROMIUM, "no browser: run make setup"
    page = folder / "verify.html"
    page.write_text(to_html(report))
    done = subprocess.run(
        [
            CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-sync",
            "--disable-background-networking", "--no-first-run", "--disable-component-update",
            f"--user-data-dir={folder / 'browser'}", "--window-size=1000,4000", "--dump-dom",
            page.as_uri(),
        ],
        capture_output=True, text=True, timeout=300, check=True,
    )  # fmt: skip
    return done.stdout


def section_of(dom, title):
    """Return a section of the drawn page, without what follows it."""
    _, found, rest = dom.partition(f"<h2>{title}</h2>")
    assert found, title
    return rest.partition("<h2>")[0]


@pytest.mark.skipif(CHROMIUM is None and not os.environ.get("CI"), reason="needs chromium")
def test_page_draws_errors_by_step_and_whether_ranges_settle(tmp_path):
    """Both were in the JSON, the first by layer and step, and no page showed them."""
    layer = make_report().layers[0]
    report = msgspec.structs.replace(
        make_report(),
        layers=(
            msgspec.structs.replace(layer, steps_sqnr_db=(40.0, 20.0, None)),
            msgspec.structs.replace(
                layer, name="action_decoder.out_proj", steps_sqnr_db=(60.0, 40.0, 20.0)
            ),
            msgspec.structs.replace(layer, name="exact", steps_sqnr_db=(None, None, None)),
        ),
    )
    dom = drawn(report, tmp_path)
    steps = section_of(dom, "Error by denoising step")
    points = dict(re.findall(r'points="([^"]+)"[^>]*><title>([^<]+)', steps))
    by_layer = {name: [p.split(",") for p in xy.split()] for xy, name in points.items()}
    assert {LAYER, "action_decoder.out_proj"} <= set(by_layer)
    heights = [float(y) for _, y in by_layer["action_decoder.out_proj"]]
    assert heights[0] > heights[1] > heights[2]  # downwards: the error grows from 0.1 to 10 %
    settling = section_of(dom, "Do the ranges settle?")
    assert "1 of 2 ranges, by mse, still grow" in settling
    rows = re.findall(r"<tr><td>(denoise/blocks\.\d)</td>(.*?)</tr>", settling)
    assert [name for name, _ in rows] == ["denoise/blocks.1", "denoise/blocks.0"]
    assert re.findall(r"<td>(.*?)</td>", rows[0][1])[:6] == ["1", "2", "2.5", "4", "3", "50 %"]
    assert "yes" in rows[0][1]
    assert "yes" not in rows[1][1]
