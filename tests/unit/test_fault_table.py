"""The table of faults names tests that exist, and the page for operators has its rows."""

import re
from pathlib import Path

import pytest
import test_piper_faults

TESTS = Path(__file__).parents[1]
SAFETY = TESTS.parent / "docs" / "safety.md"


def rows():
    lines = (test_piper_faults.__doc__ or "").splitlines()
    return [line.strip("|").split("|") for line in lines if line.startswith("|")][2:]


def names_of(module):
    if module == "here":
        module = "test_piper_faults"
    (path,) = TESTS.glob(f"*/{module}.py")
    return re.findall(r"^ *def (test_\w+)", path.read_text(), re.MULTILINE)


@pytest.mark.parametrize("row", rows(), ids=lambda row: row[0].strip().replace(" ", "-"))
def test_every_row_names_tests_that_exist(row):
    for part in row[1].split(";"):
        module, _, fragments = part.strip().partition(":")
        names = names_of(module)
        assert names
        for fragment in filter(None, (f.strip().rstrip("*") for f in fragments.split(","))):
            assert any(fragment in name for name in names), (module, fragment)


# Words of the page's rows, in its order, and the event of the table that tests it.
PAGE = [
    ("NaN or infinity", "NaN or infinity in a plan"),
    ("a little outside", "target out of limits"),
    ("more than 5 degrees", "target out of limits"),
    ("more than 20 degrees", "target out of limits"),
    ("plan used up", "plan used up"),
    ("frames older than", "cameras stall"),
    ("no usable frames", "cameras stall"),
    ("feedback older than 20 ms", "old joint feedback"),
    ("feedback older than 100 ms", "old joint feedback"),
    ("from its command", "arm does not follow"),
    ("queue full", "transmit queue full"),
    ("loop paused", "motor loop paused"),
    ("bus-off", "bus-off, interface down"),
    ("arm status 1", "arm status, driver bits"),
    ("arm status 4", "status 4"),
    ("report no power", "motors without power"),
    ("mode is not CAN", "mode is not CAN"),
    ("error inside", "error inside the motor process"),
    ("motor process killed", "motor process killed or hanging"),
    ("policy process killed", "guardian or policy process gone"),
    ("guardian silent", "guardian or policy process gone"),
    ("main process hangs", "main process hangs or dies"),
    ("what shows the run", "display fails"),
    ("recorder killed", "recorder gone"),
]
# People's doing, told above the page's table.
BY_PEOPLE = {"Ctrl-C, SIGTERM, SIGHUP", "operator, external e-stop", "likewise"}


def test_page_and_table_have_the_same_events():
    page = SAFETY.read_text()
    section = page[page.index("## Faults") : page.index("## Try it")]
    events = [line.split("|")[1] for line in section.splitlines() if line.startswith("| ")][1:]
    assert len(events) == len(PAGE)
    for event, (words, _) in zip(events, PAGE, strict=True):
        assert words in event
    assert {row[0].strip() for row in rows()} == {event for _, event in PAGE} | BY_PEOPLE
    assert "Ctrl-C" in page
    assert "SIGUSR1" in page
