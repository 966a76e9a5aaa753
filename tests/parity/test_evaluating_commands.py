"""``gwp-edge eval`` and ``bench methods`` from the command line, on the example's policy."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("mujoco")

from typer.testing import CliRunner

from gwp_edge.cli import app
from gwp_edge.errors import SpecError
from gwp_edge.evaluation.episode import EpisodeRunner
from gwp_edge.evaluation.tasks import TouchTask

pytestmark = [pytest.mark.export, pytest.mark.sim]

RED, BLUE = TouchTask.instructions
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@pytest.fixture(scope="module")
def twin(reach_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same bundle under another name."""
    folder = tmp_path_factory.mktemp("twin") / "twin.gwp"
    shutil.copytree(reach_bundle, folder)
    return folder


def _invoke(*words: object) -> Any:
    return CliRunner().invoke(app, [str(word) for word in words])


@pytest.fixture
def interrupt(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, signal.Signals], None]:
    """Ctrl-C or a polite kill in an episode, counted from 0."""

    def arrange(at: int, number: signal.Signals) -> None:
        run, n_run = EpisodeRunner.run, [0]

        def counted(self: EpisodeRunner, *rest: Any) -> Any:
            n_run[0] += 1
            if n_run[0] > at:
                os.kill(os.getpid(), number)
                pytest.fail("the signal did nothing")
            return run(self, *rest)

        monkeypatch.setattr(EpisodeRunner, "run", counted)

    return arrange


def test_two_bundles_are_compared_on_the_same_seeds(
    reach_bundle: Path, twin: Path, tmp_path: Path
) -> None:
    report = tmp_path / "eval.json"
    words = ("--episodes", 2, "--seed-start", 7, "--threads", 1, "--json", report)
    result = _invoke("eval", reach_bundle, twin, "--compare", "--within", 3, *words)
    # Four equal pairs do not show that a difference is within 3 points.
    assert result.exit_code == 1, result.output
    assert "twin is not shown to be within 3 points" in result.output
    found = json.loads(report.read_text())
    policy, other = found["bundles"]
    assert [e["seed"] for e in policy["episodes"]] == [7, 8, 7, 8]
    assert [e["instruction"] for e in policy["episodes"]] == [RED, RED, BLUE, BLUE]
    assert policy["episodes"] == other["episodes"]
    assert policy["context"]["threads"] == 1
    assert [s["n"] for s in policy["summaries"]] == [2, 2, 4]
    succeeded = sum(e["outcome"] == "success" for e in policy["episodes"])
    assert policy["summaries"][-1]["n_success"] == succeeded
    for episode in policy["episodes"]:
        assert 0 < episode["withheld_p50_rad"] < episode["withheld_p99_rad"] < 0.1
        assert 0 < episode["limited_share"] < 1
    (compared,) = found["compared"]
    assert (compared["label"], compared["reference"]) == ("twin", "policy")
    assert (compared["n"], compared["n_only_first"], compared["n_only_second"]) == (4, 0, 0)
    assert compared["low"] == -compared["high"] < 0


def test_swapped_prompt_fails_by_the_other_cube_and_below_the_gate(
    reach_bundle: Path, tmp_path: Path
) -> None:
    report, pictures = tmp_path / "eval.json", tmp_path / "deep" / "failures"
    told = ("--instruction", RED, "--instruction", RED, "--ablate", "swapped-prompt")
    words = ("--episodes", 2, "--threads", 1, "--json", report, "--out", pictures)
    result = _invoke("eval", reach_bundle, *told, *words, "--fail-below", 0.6)
    assert result.exit_code == 1, result.output
    (bundle,) = json.loads(report.read_text())["bundles"]
    assert [(e["instruction"], e["seed"]) for e in bundle["episodes"]] == [(RED, 0), (RED, 1)]
    assert "wrong object" in {e["outcome"] for e in bundle["episodes"]}
    failed = [e for e in bundle["episodes"] if e["outcome"] != "success"]
    shown = ", ".join(f"{e['seed']} {e['outcome']}" for e in failed)
    assert f"policy, {RED}: failed seeds {shown}" in result.output
    assert len(list(pictures.glob("policy-touch-the-red-cube-*.png"))) == len(failed)


def test_rate_above_the_gate_passes(reach_bundle: Path) -> None:
    words = ("--episodes", 1, "--threads", 1, "--instruction", RED)
    result = _invoke("eval", reach_bundle, *words, "--fail-below", 0.9)
    assert result.exit_code == 0, result.output


@pytest.mark.parametrize("number", SIGNALS)
def test_interrupted_evaluation_reports_what_is_finished_and_fails(
    reach_bundle: Path,
    twin: Path,
    tmp_path: Path,
    interrupt: Callable[[int, signal.Signals], None],
    number: signal.Signals,
) -> None:
    """SIGTERM, as of a batch queue, ended the program without a report of hours of episodes."""
    report = tmp_path / "eval.json"
    interrupt(1, number)
    words = ("--episodes", 2, "--threads", 1, "--json", report, "--fail-below", 0)
    result = _invoke("eval", reach_bundle, twin, "--compare", *words)
    assert result.exit_code == 130, result.output
    assert "interrupted" in result.output
    (bundle,) = json.loads(report.read_text())["bundles"]
    assert [(e["instruction"], e["seed"]) for e in bundle["episodes"]] == [(RED, 0)]


def test_outputs_are_checked_before_the_first_episode(
    reach_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both were found out when a hundred episodes had been run, one of them by a traceback."""

    def never(*_: object) -> None:
        pytest.fail("an episode was run")

    monkeypatch.setattr(EpisodeRunner, "run", never)
    (tmp_path / "file").write_text("")
    for words, message in (
        (("eval", "--json", tmp_path / "none" / "x.json"), "folder .*none does not exist"),
        (("eval", "--json", tmp_path), "this is a folder"),
        (("eval", "--out", tmp_path / "file"), "--out .*file: cannot be a folder"),
        (("bench", "methods", "--json", tmp_path / "none" / "x.json"), "does not exist"),
        (("eval", "--within", 3), "--within: judges the differences of --compare"),
        (("eval", "--compare"), "--compare: give two bundles or more"),
        (("eval", "--robot", "piper"), "closed-loop evaluation runs in the sim only"),
        (("eval", "--ablate", "ears"), "expected none, blank-cameras, swapped-prompt"),
        (("eval", "--instruction", "touch the sky"), "no instruction 'touch the sky'"),
    ):
        result = _invoke(*words, reach_bundle)
        assert result.exit_code != 0
        with pytest.raises(SpecError, match=message):
            raise result.exception


@pytest.mark.parametrize("number", SIGNALS[:2])
def test_methods_are_compared_by_latency_and_rows_outlive_an_interruption(
    reach_bundle: Path,
    tmp_path: Path,
    interrupt: Callable[[int, signal.Signals], None],
    number: signal.Signals,
) -> None:
    report = tmp_path / "methods.json"
    interrupt(5, number)
    methods = (
        "--execution",
        "soft",
        "--execution",
        "naive",
        "--latency-ms",
        0,
        "--latency-ms",
        200,
    )
    words = ("--episodes", 1, "--threads", 1, "--json", report)
    result = _invoke("bench", "methods", reach_bundle, *methods, *words)
    assert result.exit_code == 130, result.output
    found = json.loads(report.read_text())
    assert [(r["method"], r["latency_ms"]) for r in found["rows"]] == [
        ("soft", 0.0),
        ("naive", 0.0),
    ]
    assert found["context"]["threads"] == 1
    for row in found["rows"]:
        failed = [seed for how in row["failed_seeds"].values() for s in how.values() for seed in s]
        assert (row["n"], row["n_success"]) == (2, 2 - len(failed))
