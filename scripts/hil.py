"""Run the tests that need hardware, and write what they found as a dated JSON.

    GWP_HIL=jetson,gpu,bundle GWP_HIL_BUNDLE=policy.gwp python scripts/hil.py
    python scripts/hil.py --table build/hil/hil-DATE.json        # into README.md

The list is tests/hil/tests.toml. A test whose needs are not all named in GWP_HIL is skipped and
says so. Exit code 0 only if nothing failed and something ran; a test program that skipped all of
its cases has failed.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ET
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import msgspec

from gwp_edge.errors import GwpError, SpecError
from gwp_edge.machine_limits import describe_machine

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[1]
LIST = ROOT / "tests" / "hil" / "tests.toml"
NEEDS = frozenset({"jetson", "gpu", "bundle", "can", "realsense", "robot", "arm"})
_TAIL_LINES = 20
SCHEMA = "gwp-edge.hil"
SCHEMA_VERSION = 1


class HilTest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One entry of the list."""

    name: str
    what: str
    needs: tuple[str, ...]
    command: tuple[str, ...]
    timeout_s: float
    result: bool = False


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """What became of one test."""

    name: str
    what: str
    status: Literal["passed", "failed", "skipped"]
    why: str
    seconds: float
    command: tuple[str, ...]
    result: Any = None
    output: tuple[str, ...] = ()


def read_list(path: Path = LIST) -> tuple[HilTest, ...]:
    """Read the list.

    Raises:
        SpecError: it is not as it should be.
    """
    try:
        entries = tomllib.loads(path.read_text(encoding="utf-8"))["test"]
        tests = msgspec.convert(entries, tuple[HilTest, ...])
    except (OSError, KeyError, ValueError) as e:
        raise SpecError(f"{path}: {e}") from e
    for test in tests:
        unknown = set(test.needs) - NEEDS
        if unknown:
            raise SpecError(f"{path}: {test.name} needs {', '.join(sorted(unknown))}: not known")
    return tests


def missing(test: HilTest, named: frozenset[str], environ: Mapping[str, str]) -> str | None:
    """Return why a test cannot run, or None."""
    absent = [need for need in test.needs if need not in named]
    if absent:
        return f"GWP_HIL does not name {', '.join(absent)}"
    if "bundle" in test.needs and not environ.get("GWP_HIL_BUNDLE"):
        return "GWP_HIL_BUNDLE names no bundle"
    if "robot" in test.needs and not environ.get("GWP_HIL_ROBOT"):
        return "GWP_HIL_ROBOT names no robot file"
    if "arm" in test.needs and environ.get("GWP_ARM_ENABLE") != "1":
        return "GWP_ARM_ENABLE is not 1: the arm must not move"
    return None


def _command(test: HilTest, environ: Mapping[str, str], result: Path) -> tuple[str, ...]:
    places = {
        "python": sys.executable,
        # Commands run in the project's folder, whatever the caller's is.
        "BUNDLE": os.path.abspath(environ.get("GWP_HIL_BUNDLE", "")),
        "ROBOT": os.path.abspath(environ.get("GWP_HIL_ROBOT", "")),
        "RESULT": str(result),
    }
    words: list[str] = []
    for word in test.command:
        if word == "GWP":
            words += [sys.executable, "-m", "gwp_edge.cli"]
        else:
            words.append(places.get(word, word))
    if "pytest" in words:
        words.append(f"--junit-xml={result}")
    return tuple(words)


def run_test(test: HilTest, environ: Mapping[str, str]) -> Outcome:
    """Run one test to its end or its time limit."""
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / "result.json"
        command = _command(test, environ, place)
        t_start = time.monotonic()
        try:
            done = subprocess.run(
                command,
                capture_output=True,
                text=True,
                check=False,
                timeout=test.timeout_s,
                cwd=ROOT,
            )
            why = "" if done.returncode == 0 else f"exit code {done.returncode}"
            output, code = done.stdout, done.returncode
            told = done.stderr
        except subprocess.TimeoutExpired:
            why, output, told, code = f"not done after {test.timeout_s:.0f} s", "", "", 1
        seconds = time.monotonic() - t_start
        result, problem = _result(test, output, place)
    status: Literal["passed", "failed"] = "passed" if code == 0 and not problem else "failed"
    lines = (output + "\n" + told).strip().splitlines()
    return Outcome(
        name=test.name,
        what=test.what,
        status=status,
        why=why or problem,
        seconds=round(seconds, 1),
        command=test.command,
        result=result,
        output=() if status == "passed" else tuple(lines[-_TAIL_LINES:]),
    )


def _result(test: HilTest, output: str, place: Path) -> tuple[Any, str]:
    """Return what a test found as JSON, and what is wrong with it."""
    if "pytest" in test.command:
        return _cases(place)
    if not test.result:
        return None, ""
    try:
        text = place.read_text(encoding="utf-8") if place.is_file() else output
        return json.loads(text), ""
    except ValueError:
        return None, "it printed no JSON"


def _cases(place: Path) -> tuple[dict[str, int] | None, str]:
    """Return how many cases pytest ran, and a problem where all of them were skipped."""
    try:
        # Written by the program that was just started.
        suites = list(ET.parse(place).getroot().iter("testsuite"))
    except (OSError, ET.ParseError):
        return None, "pytest wrote no report"
    names = ("tests", "skipped", "failures", "errors")
    counts = {name: sum(int(suite.get(name, "0")) for suite in suites) for name in names}
    if counts["tests"] > counts["skipped"]:
        return counts, ""
    reasons = [x.get("message", "") for suite in suites for x in suite.iter("skipped")]
    why = reasons[0] if reasons else "no case was found"
    return counts, f"none of {counts['tests']} cases ran: {why}"


def run_all(
    tests: Sequence[HilTest], named: frozenset[str], environ: Mapping[str, str]
) -> list[Outcome]:
    """Run what can run, in the order of the list, and say how each went."""
    outcomes = []
    for test in tests:
        why = missing(test, named, environ)
        if why is None:
            sys.stderr.write(f"{test.name}: {test.what} ...\n")
            outcome = run_test(test, environ)
        else:
            outcome = Outcome(
                name=test.name,
                what=test.what,
                status="skipped",
                why=why,
                seconds=0.0,
                command=test.command,
            )
        outcomes.append(outcome)
        sys.stderr.write(f"{outcome.name}: {outcome.status} {outcome.why}\n")
    return outcomes


def _write_table(records: Sequence[Path], readme: Path) -> int:
    # Beside this file, and found there however this file was started.
    sys.path.insert(0, str(Path(__file__).resolve().parent))
    from hil_table import rewrite_block, table

    try:
        text = table([_read_record(path) for path in records])
        rewrite_block(readme, text)
    except GwpError as e:
        sys.stderr.write(f"hil: {e}\n")
        return 2
    sys.stdout.write(f"{readme}: {len(records)} records\n")
    return 0


def _read_record(path: Path) -> dict[str, Any]:
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise SpecError(f"{path}: {e}") from e
    if not isinstance(record, dict) or record.get("schema") != SCHEMA:
        raise SpecError(f"{path}: is not a record of scripts/hil.py")
    if record.get("schema_version") != SCHEMA_VERSION:
        raise SpecError(f"{path}: schema {record.get('schema_version')}, expected {SCHEMA_VERSION}")
    return record


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(description="Run the hardware tests.")
    parser.add_argument("--out", type=Path, default=Path("build/hil"), help="folder of records")
    parser.add_argument("--list", action="store_true", help="print the list and what is missing")
    parser.add_argument("--table", type=Path, nargs="+", metavar="JSON", help="make README's table")
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md", help="where it goes")
    options = parser.parse_args(arguments)
    if options.table:
        return _write_table(options.table, options.readme)
    named = frozenset(x.strip() for x in os.environ.get("GWP_HIL", "").split(",") if x.strip())
    try:
        if named - NEEDS:
            raise SpecError(
                f"GWP_HIL names {', '.join(sorted(named - NEEDS))}; known are "
                f"{', '.join(sorted(NEEDS))}"
            )
        tests = read_list()
    except GwpError as e:
        sys.stderr.write(f"hil: {e}\n")
        return 2
    if options.list:
        for test in tests:
            why = missing(test, named, os.environ)
            sys.stdout.write(f"{test.name:22s} {'ready' if why is None else why}\n")
        return 0
    outcomes = run_all(tests, named, os.environ)
    record = {
        "schema": SCHEMA,
        "schema_version": SCHEMA_VERSION,
        "created_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "hil": sorted(named),
        "machine": msgspec.to_builtins(describe_machine()),
        "tests": msgspec.to_builtins(outcomes),
    }
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / f"hil-{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime())}.json"
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    counts = {s: sum(o.status == s for o in outcomes) for s in ("passed", "failed", "skipped")}
    sys.stdout.write(f"{path}: {', '.join(f'{n} {s}' for s, n in counts.items())}\n")
    return 0 if counts["passed"] and not counts["failed"] else 1


if __name__ == "__main__":
    raise SystemExit(main())
