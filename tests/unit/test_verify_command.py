"""The stats and verify commands: what they print, write and refuse."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import typer
from typer.testing import CliRunner

pytest.importorskip("pyarrow")
pytest.importorskip("av")

from gwp_edge.commands.statistics import stats
from gwp_edge.commands.verifying import verify
from gwp_edge.errors import SpecError

DATA = Path(__file__).resolve().parents[1] / "data"
DATASET = DATA / "dataset"


def run(command, *arguments):
    app = typer.Typer(pretty_exceptions_enable=False)
    app.command()(command)
    return CliRunner().invoke(app, [str(a) for a in arguments])


def test_stats_writes_what_training_wrote(tmp_path):
    out = tmp_path / "norm_stats.json"
    result = run(stats, DATASET, "--out", out, "--json")
    assert result.exit_code == 0, result.output
    answer = json.loads(result.stdout)
    assert (answer["n_episodes"], answer["n_frames"]) == (4, 342)
    assert sum(answer["delta"]) == 12
    found = json.loads(out.read_text())["norm_stats"]
    expected = json.loads((DATASET / "norm_stats.json").read_text())["norm_stats"]
    assert answer["norm_stats"] == found
    for key, group in expected.items():
        for name, values in group.items():
            np.testing.assert_allclose(found[key][name], values, atol=1e-6, err_msg=f"{key} {name}")


def test_stats_pools_datasets_and_takes_a_mask(tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(DATASET, copy)
    out = tmp_path / "two.json"
    result = run(stats, DATASET, copy, "--out", out, "--horizon", 10, "--width", 14)
    assert result.exit_code == 0, result.output
    assert "8 episodes, 684 frames, windows of 10 rows, width 14" in result.stdout
    assert len(json.loads(out.read_text())["norm_stats"]["action"]["q01"]) == 14
    absolute = tmp_path / "absolute.json"
    mask = "0" * 14
    assert run(stats, DATASET, "--out", absolute, "--delta-mask", mask).exit_code == 0
    assert out.read_text() != absolute.read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{data}/nothing"], "not a LeRobot dataset"),
        (["{data}/dataset", "--delta-mask", "01"], "delta mask: expected 14"),
        (["{data}/dataset", "--delta-mask", "yes"], "expected one 0 or 1"),
        (["{data}/dataset", "--width", "4"], "width: expected at least the 14"),
        (["{data}/dataset", "--out", "{tmp}/no/x.json"], "does not exist"),
        (["{data}/dataset", "--out", "{tmp}"], "is a folder"),
    ],
)
def test_stats_with_bad_input_says_why_and_writes_nothing(tmp_path, arguments, message):
    filled = [a.format(data=DATA, tmp=tmp_path) for a in arguments]
    if "--out" not in filled:
        filled += ["--out", str(tmp_path / "out.json")]
    result = run(stats, *filled)
    assert isinstance(result.exception, SpecError)
    assert message in str(result.exception)
    assert "\n" not in str(result.exception)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.export
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--layers"], "--layers needs the float32 reference"),
        (["--max-error", "0.001"], "--max-error needs the float32 reference"),
        (["--norm-stats", "x.json"], "--norm-stats describes the reference"),
        (["--factor", "0.1"], "--factor"),
        (["--html", "/nowhere/at/all.html"], "does not exist"),
        (["--html", "{tmp}/a", "--json-file", "{tmp}/link"], "was named for two files"),
        ([], "no such bundle"),
    ],
)
def test_verify_with_bad_options_says_why(tmp_path, arguments, message):
    (tmp_path / "link").symlink_to("a")
    words = (word.format(tmp=tmp_path) for word in arguments)
    result = run(verify, tmp_path / "policy.gwp", "--dataset", DATASET, *words)
    assert isinstance(result.exception, SpecError)
    assert message in str(result.exception)


@pytest.mark.export
def test_verify_prints_writes_and_exits_by_its_verdict(exported, tmp_path):
    bundle = exported(
        "gwp05", n_steps=2, prompt_embeddings=tuple(sorted((DATASET / "t5_embedding").glob("*.pt")))
    )
    page, file = tmp_path / "report.html", tmp_path / "report.json"
    arguments = [bundle, "--dataset", DATASET, "--samples", 1, "--threads", 1]
    result = run(
        verify,
        *arguments,
        *("--against", DATA / "reference" / "gwp05" / "checkpoint"),
        *("--html", page, "--json-file", file),
    )
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines()[-1].startswith("passed: joints p99")
    written = json.loads(file.read_text())
    assert written["schema"] == "gwp-edge.verify"
    assert written["verdict"] in page.read_text()
    result = run(
        verify,
        *arguments,
        *("--against", DATA / "reference" / "gwp05" / "checkpoint"),
        *("--norm-stats", DATASET / "norm_stats.json", "--json"),
    )
    assert result.exit_code == 1
    assert json.loads(result.stdout)["passed"] is False
    assert result.stderr.splitlines()[-1].startswith("gwp-edge: verify FAILED: specification:")
